// TPipe, which allocates the memories of a core; queues, which order its pipes; flags and barriers between pipes and between cores.
#pragma once
#include <memory>

#include "tensor.h"

namespace emulator {

struct Stage {
  pipe_t from, to;
};
// The pipe that fills a queue of a position, and the pipe that reads from it.
constexpr Stage stage_of(TPosition position) {
  switch (position) {
    case TPosition::A1:
    case TPosition::B1:
      return {PIPE_MTE2, PIPE_MTE1};
    case TPosition::A2:
    case TPosition::B2:
      return {PIPE_MTE1, PIPE_M};
    case TPosition::CO1:
      return {PIPE_M, PIPE_FIX};
    case TPosition::VECOUT:
      return {PIPE_V, PIPE_MTE3};
    default:
      return {PIPE_MTE2, PIPE_V};
  }
}

constexpr Stage stage_of(AscendC::HardEvent event) {
  using AscendC::HardEvent;
  switch (event) {
    case HardEvent::MTE2_MTE1:
      return {PIPE_MTE2, PIPE_MTE1};
    case HardEvent::MTE1_MTE2:
      return {PIPE_MTE1, PIPE_MTE2};
    case HardEvent::MTE1_M:
      return {PIPE_MTE1, PIPE_M};
    case HardEvent::M_MTE1:
      return {PIPE_M, PIPE_MTE1};
    case HardEvent::MTE2_V:
      return {PIPE_MTE2, PIPE_V};
    case HardEvent::V_MTE2:
      return {PIPE_V, PIPE_MTE2};
    case HardEvent::MTE3_V:
      return {PIPE_MTE3, PIPE_V};
    case HardEvent::V_MTE3:
      return {PIPE_V, PIPE_MTE3};
    case HardEvent::M_FIX:
      return {PIPE_M, PIPE_FIX};
    case HardEvent::FIX_M:
      return {PIPE_FIX, PIPE_M};
    case HardEvent::MTE3_MTE2:
      return {PIPE_MTE3, PIPE_MTE2};
    case HardEvent::MTE2_MTE3:
      return {PIPE_MTE2, PIPE_MTE3};
    case HardEvent::S_V:
      return {PIPE_S, PIPE_V};
    case HardEvent::V_S:
      return {PIPE_V, PIPE_S};
    case HardEvent::S_MTE2:
      return {PIPE_S, PIPE_MTE2};
    case HardEvent::MTE2_S:
      return {PIPE_MTE2, PIPE_S};
    case HardEvent::S_MTE3:
      return {PIPE_S, PIPE_MTE3};
    case HardEvent::MTE3_S:
      return {PIPE_MTE3, PIPE_S};
    case HardEvent::FIX_MTE2:
      return {PIPE_FIX, PIPE_MTE2};
    case HardEvent::MTE2_FIX:
      return {PIPE_MTE2, PIPE_FIX};
    case HardEvent::FIX_S:
      return {PIPE_FIX, PIPE_S};
    default:
      return {PIPE_M, PIPE_S};
  }
}

inline uint32_t take_memory(TPosition position, uint32_t bytes, Where where) {
  const int m = static_cast<int>(memory_of(position));
  Core &c = core();
  if (c.memory[m].empty()) fail(where, text("InitBuffer: this core has no %s", MEMORY_NAMES[m]));
  bytes = (bytes + BLOCK - 1) / BLOCK * BLOCK;
  if (c.used[m] + bytes > CAPACITY[m])
    fail(where,
         text("InitBuffer: %u bytes more than the %u in use make the %s overrun its %u", bytes, c.used[m], MEMORY_NAMES[m], CAPACITY[m]));
  c.used[m] += bytes;
  return c.used[m] - bytes;
}

}  // namespace emulator

namespace AscendC {

using emulator::Buffer;

// A queue from what fills a position to what uses another; TQue has both in one.
template <TPosition src, TPosition dst, int32_t depth>
class TQueBind {
  // A buffer that comes in and goes out again is in neither position alone.
  static constexpr TPosition position = src == dst ? src : TPosition::VECCALC;

 public:
  template <typename T>
  LocalTensor<T> AllocTensor(EMULATOR_HERE) {
    emulator::spend(emulator::rates::ASSUMED_QUEUE);
    for (size_t tried = 0; tried < buffers_.size(); tried++) {
      Buffer *b = buffers_[next_].get();
      next_ = (next_ + 1) % buffers_.size();
      if (b->state != Buffer::FREE) continue;
      b->state = Buffer::TAKEN, b->line = where;
      if (!emulator::dropped(emulator::QUEUES)) emulator::after(stage_.from, b->given_back);
      // Nothing may be expected of what a buffer holds: it is NaN.
      constexpr int memory = static_cast<int>(emulator::memory_of(position));
      if (!emulator::dry) std::memset(emulator::core().memory[memory].data() + b->at, 0xff, b->bytes);
      return LocalTensor<T>(b, b->at);
    }
    emulator::fail(where, emulator::text("deadlock: AllocTensor waits for ever: all %zu buffers of the queue are in use, the first since "
                                         "%s; FreeTensor is missing",
                                         buffers_.size(), buffers_.empty() ? "never" : buffers_[0]->line.text().c_str()));
  }

  template <typename T>
  bool EnQue(const LocalTensor<T> &tensor, EMULATOR_HERE) {
    Buffer *b = mine("EnQue", tensor, where);
    emulator::spend(emulator::rates::ASSUMED_QUEUE);
    if (b->state != Buffer::TAKEN)
      emulator::fail(where, emulator::text("EnQue: a tensor that was %s at %s", state_name(b->state), b->line.text().c_str()));
    if (waiting_.size() == depth)
      emulator::fail(where, emulator::text("EnQue: %d tensors wait already, and the queue's depth is %d", depth, depth));
    b->state = Buffer::QUEUED, b->line = where, b->enqueued = emulator::done(stage_.from);
    waiting_.push_back(b);
    return true;
  }

  template <typename T>
  LocalTensor<T> DeQue(EMULATOR_HERE) {
    if (waiting_.empty()) emulator::fail(where, "DeQue: the queue is empty: nothing was enqueued");
    Buffer *b = waiting_.front();
    emulator::spend(emulator::rates::ASSUMED_QUEUE);
    waiting_.erase(waiting_.begin());
    b->state = Buffer::OUT, b->line = where;
    if (!emulator::dropped(emulator::QUEUES)) emulator::after(stage_.to, b->enqueued);
    return LocalTensor<T>(b, b->at);
  }

  template <typename T>
  void FreeTensor(LocalTensor<T> &tensor, EMULATOR_HERE) {
    Buffer *b = mine("FreeTensor", tensor, where);
    emulator::spend(emulator::rates::ASSUMED_QUEUE);
    if (b->state != Buffer::OUT && b->state != Buffer::TAKEN)
      emulator::fail(where, emulator::text("FreeTensor: a tensor that was %s at %s", state_name(b->state), b->line.text().c_str()));
    b->state = Buffer::FREE, b->line = where, b->given_back = emulator::done(stage_.to);
  }

  void init(uint32_t num, uint32_t bytes, emulator::Where where) {
    if (!buffers_.empty())
      emulator::fail(where, "InitBuffer of a queue a second time: after Reset too it goes on from the buffer it was at; use another queue");
    uint32_t &events = emulator::core().queue_buffers[stage_.from][stage_.to];
    events += num;
    // A buffer needs an event each way. TPipe keeps 3 of those from the cube to MTE1 for itself.
    const uint32_t most = stage_.from == PIPE_MTE1 && stage_.to == PIPE_M ? emulator::EVENTS - 3 : emulator::EVENTS;
    if (events > most)
      emulator::fail(where,
                     emulator::text("InitBuffer: %u buffers of queues from %s to %s, each of which needs an event; a pair of pipes has "
                                    "%d%s",
                                    events, emulator::PIPE_NAMES[stage_.from], emulator::PIPE_NAMES[stage_.to], emulator::EVENTS,
                                    most < emulator::EVENTS ? ", of which TPipe takes 3" : ""));
    for (uint32_t i = 0; i < num; i++) {
      buffers_.push_back(std::make_unique<Buffer>());
      Buffer &b = *buffers_.back();
      b.state = Buffer::FREE, b.position = position, b.line = where;
      b.bytes = (bytes + emulator::BLOCK - 1) / emulator::BLOCK * emulator::BLOCK;
      b.at = emulator::take_memory(position, bytes, where);
    }
  }

 private:
  static const char *state_name(Buffer::State state) {
    return state == Buffer::FREE ? "freed" : state == Buffer::QUEUED ? "enqueued" : state == Buffer::OUT ? "dequeued" : "taken";
  }
  template <typename T>
  Buffer *mine(const char *name, const LocalTensor<T> &tensor, emulator::Where where) {
    for (auto &b : buffers_)
      if (b.get() == tensor.buffer()) return b.get();
    emulator::fail(where, emulator::text("%s: a tensor of another queue", name));
  }

  static constexpr emulator::Stage stage_ = {emulator::stage_of(src).from, emulator::stage_of(dst).to};
  std::vector<std::unique_ptr<Buffer>> buffers_;
  size_t next_ = 0;  // that AllocTensor tries first
  std::vector<Buffer *> waiting_;
};

template <TPosition position, int32_t depth>
using TQue = TQueBind<position, position, depth>;

template <TPosition position = TPosition::VECCALC>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() {
    return LocalTensor<T>(buffer_.get(), buffer_->at);
  }

  void init(uint32_t bytes, emulator::Where where) {
    buffer_ = std::make_unique<Buffer>();
    buffer_->position = position, buffer_->line = where;
    buffer_->bytes = (bytes + emulator::BLOCK - 1) / emulator::BLOCK * emulator::BLOCK;
    buffer_->at = emulator::take_memory(position, bytes, where);
    std::memset(emulator::core().memory[static_cast<int>(emulator::memory_of(position))].data() + buffer_->at, 0xff, buffer_->bytes);
  }

 private:
  std::unique_ptr<Buffer> buffer_;
};

class TPipe {
 public:
  TPipe();
  ~TPipe();

  template <TPosition src, TPosition dst, int32_t depth>
  bool InitBuffer(TQueBind<src, dst, depth> &queue, uint8_t num, uint32_t bytes, EMULATOR_HERE) {
    count(num, where);
    queue.init(num, bytes, where);
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position> &buffer, uint32_t bytes, EMULATOR_HERE) {
    count(1, where);
    buffer.init(bytes, where);
    return true;
  }
  // Takes back all that it gave. What was there is not to be used again.
  void Reset() {
    emulator::Core &c = emulator::core();
    std::fill_n(c.used, static_cast<int>(emulator::MEMORIES), 0u);
    std::fill_n(&c.queue_buffers[0][0], emulator::PIPES * emulator::PIPES, 0u);
    buffers_ = 0;
  }
  TEventID FetchEventID(HardEvent event) { return fetched_[static_cast<int>(event)]; }

 private:
  void count(uint32_t num, emulator::Where where) {
    buffers_ += num;
    if (buffers_ > 64) emulator::fail(where, emulator::text("InitBuffer: %u buffers; TPipe has 64", buffers_));
  }
  uint32_t buffers_ = 0;
  TEventID fetched_[32] = {};
};

inline TPipe *&current_pipe() {
  static std::vector<TPipe *> pipes;
  const size_t id = emulator::core().id;
  if (id >= pipes.size()) pipes.resize(id + 1);
  return pipes[id];
}
inline TPipe::TPipe() { current_pipe() = this; }
inline TPipe::~TPipe() { current_pipe() = nullptr; }
inline TPipe *GetTPipePtr() { return current_pipe(); }

template <HardEvent event>
inline void SetFlag(int32_t id, EMULATOR_HERE) {
  constexpr emulator::Stage stage = emulator::stage_of(event);
  emulator::set_flag(stage.from, stage.to, id, where);
}
template <HardEvent event>
inline void WaitFlag(int32_t id, EMULATOR_HERE) {
  constexpr emulator::Stage stage = emulator::stage_of(event);
  emulator::wait_flag(stage.from, stage.to, id, where);
}
template <pipe_t pipe>
inline void PipeBarrier(EMULATOR_HERE) {
  emulator::barrier(pipe, where);
}

template <uint8_t mode, pipe_t pipe>
inline void CrossCoreSetFlag(uint16_t flag, EMULATOR_HERE) {
  emulator::cross_set(mode, pipe, flag, where);
}
template <uint8_t mode = 0, pipe_t pipe = PIPE_S>
inline void CrossCoreWaitFlag(uint16_t flag, EMULATOR_HERE) {
  emulator::cross_wait(pipe, flag, where);
}
template <bool vector_only = true>
inline void SyncAll(EMULATOR_HERE) {
  emulator::sync_all(vector_only, where);
}

// As on the chip, the vector cores of a mixed kernel count on through the blocks.
inline int64_t GetBlockIdx() {
  const emulator::Core &c = emulator::core();
  return emulator::mixed() && c.kind == emulator::Kind::AIV ? c.block * 2 + c.sub : c.block;
}
inline int64_t GetBlockNum() { return emulator::blocks(); }
inline int64_t GetSubBlockIdx() { return emulator::core().sub; }

enum : uint32_t { SYSTEM_WORKSPACE = 1024 };  // the chip's own part of a workspace, which lies before the kernel's
inline uint8_t *GetUserWorkspace(uint8_t *workspace) { return workspace + SYSTEM_WORKSPACE; }

}  // namespace AscendC
