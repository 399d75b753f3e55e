// Tensors in the memories of a core and in global memory, and synchronisation of the pipes of a core.
#pragma once
#include "types.h"

namespace emulator {

using AscendC::TPosition;

constexpr Memory memory_of(TPosition position) {
  switch (position) {
    case TPosition::A1:
    case TPosition::B1:
      return Memory::L1;
    case TPosition::A2:
      return Memory::L0A;
    case TPosition::B2:
      return Memory::L0B;
    case TPosition::CO1:
      return Memory::L0C;
    default:
      return Memory::UB;
  }
}

constexpr const char *position_name(TPosition position) {
  constexpr const char *names[] = {"GM", "A1", "A2", "B1", "B2", "CO1", "VECIN", "VECOUT", "VECCALC"};
  return names[static_cast<int>(position)];
}

inline void wants_position(const char *name, const char *operand, TPosition is, std::initializer_list<TPosition> allowed, Where where) {
  std::string list;
  for (TPosition p : allowed) {
    if (p == is) return;
    list += std::string(list.empty() ? "" : " or ") + position_name(p);
  }
  fail(where, text("%s: %s is in %s and has to be in %s", name, operand, position_name(is), list.c_str()));
}

// A buffer that TPipe gave to a queue, or to a TBuf.
struct Buffer {
  enum State : uint8_t { FREE, TAKEN, QUEUED, OUT, ALWAYS } state = ALWAYS;
  TPosition position = TPosition::VECCALC;
  uint32_t at = 0, bytes = 0;
  Clock given_back, enqueued;
  Where line = {"", 0};  // of its last change of state
};

}  // namespace emulator

namespace AscendC {

template <typename T>
class LocalTensor {
 public:
  using PrimType = T;
  LocalTensor() = default;
  LocalTensor(emulator::Buffer *buffer, uint32_t at) : buffer_(buffer), at_(at) {}

  LocalTensor operator[](const uint32_t offset) const { return LocalTensor(buffer_, at_ + offset * static_cast<uint32_t>(sizeof(T))); }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    return LocalTensor<U>(buffer_, at_);
  }

  uint32_t GetSize() const { return (buffer_->at + buffer_->bytes - at_) / sizeof(T); }
  TPosition GetPosition() const { return buffer_->position; }

  T GetValue(const uint32_t i, EMULATOR_HERE) const {
    emulator::issue(PIPE_S, where, {0, emulator::rates::LOCAL, 0, "GetValue"});
    return *touch("GetValue", PIPE_S, i, 1, false, where);
  }
  void SetValue(const uint32_t i, const T value, EMULATOR_HERE) const {
    emulator::issue(PIPE_S, where, {0, emulator::rates::LOCAL, 0, "SetValue"});
    *touch("SetValue", PIPE_S, i, 1, true, where) = value;
  }

  // The emulator's own: `count` elements from `first` on, checked for bounds, state and order.
  T *touch(const char *name, pipe_t pipe, uint32_t first, uint32_t count, bool write, emulator::Where where) const {
    using emulator::text;
    if (!buffer_) emulator::fail(where, text("%s: a tensor that no queue or buffer gave", name));
    const uint32_t from = at_ + first * sizeof(T), bytes = count * sizeof(T), end = buffer_->at + buffer_->bytes;
    const emulator::Memory memory = emulator::memory_of(buffer_->position);
    if (from + bytes > end || from < buffer_->at)
      emulator::fail(where, text("%s: %u bytes from byte %u of a buffer of %u bytes in %s (%s): it overruns the buffer", name, bytes,
                                 from - buffer_->at, buffer_->bytes, emulator::MEMORY_NAMES[static_cast<int>(memory)],
                                 emulator::position_name(buffer_->position)));
    if (buffer_->state == emulator::Buffer::FREE || buffer_->state == emulator::Buffer::QUEUED)
      emulator::fail(where, text("%s: a tensor that was %s at %s", name, buffer_->state == emulator::Buffer::FREE ? "freed" : "enqueued",
                                 buffer_->line.text().c_str()));
    emulator::local_access(name, pipe, memory, from, bytes, write, where);
    return reinterpret_cast<T *>(emulator::core().memory[static_cast<int>(memory)].data() + from);
  }
  void aligned(const char *name, const char *operand, emulator::Where where, uint32_t to = emulator::BLOCK) const {
    if (at_ % to) emulator::fail(where, emulator::text("%s: %s begins at byte %u, which is not a multiple of %u", name, operand, at_, to));
  }
  uint32_t address() const { return at_; }
  emulator::Buffer *buffer() const { return buffer_; }

 private:
  emulator::Buffer *buffer_ = nullptr;
  uint32_t at_ = 0;  // byte in its memory
};

template <typename T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(T *address, uint64_t size = 0) { data_ = address, size_ = size; }
  void SetGlobalBuffer(uint8_t *address) { data_ = reinterpret_cast<T *>(address); }

  GlobalTensor operator[](const uint64_t offset) const {
    GlobalTensor part;
    part.data_ = data_ + offset;
    return part;
  }
  T GetValue(const uint64_t i, EMULATOR_HERE) const {
    emulator::issue(PIPE_S, where);
    emulator::global_access("GetValue", PIPE_S, data_ + i, sizeof(T), false, where);
    return data_[i];
  }
  const T *GetPhyAddr() const { return data_; }
  T *address() const { return data_; }

 private:
  T *data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace AscendC
