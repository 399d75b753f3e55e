// Copies between global memory and the memories of a core: rows with gaps and padding, and rows of a matrix into fractals of the cube.
#pragma once
#include "tensor.h"

namespace AscendC {

struct DataCopyExtParams {
  uint16_t blockCount = 0;
  uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t count, uint32_t len, uint32_t src, uint32_t dst, uint32_t rsv)
      : blockCount(count), blockLen(len), srcStride(src), dstStride(dst), rsv(rsv) {}
};

template <typename T>
struct DataCopyPadExtParams {
  bool isPad = false;
  uint8_t leftPadding = 0, rightPadding = 0;
  T paddingValue{};
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

struct Nd2NzParams {
  uint16_t ndNum = 0, nValue = 0, dValue = 0, srcNdMatrixStride = 0, srcDValue = 0, dstNzC0Stride = 0, dstNzNStride = 0;
  uint16_t dstNzMatrixStride = 0;
};

}  // namespace AscendC

namespace emulator {

inline void rows_in_range(const char *name, const AscendC::DataCopyExtParams &p, Where where) {
  if (p.blockCount < 1 || p.blockCount > 4095) fail(where, text("%s: blockCount is %u, and it is 1 to 4095", name, p.blockCount));
  if (p.blockLen < 1 || p.blockLen > 2097151) fail(where, text("%s: blockLen is %u bytes, and it is 1 to 2097151", name, p.blockLen));
}

// The side of a copy that is in a core's memory.
template <typename T>
inline void takes(const char *name, const char *operand, const AscendC::LocalTensor<T> &tensor, std::initializer_list<TPosition> allowed,
                  Where where) {
  wants_position(name, operand, tensor.GetPosition(), allowed, where);
  tensor.aligned(name, operand, where);
}

inline void replaces(const char *name, Where where) {
  if (core().adds) fail(where, text("%s after SetAtomicAdd: the emulator adds what Fixpipe writes alone", name));
}

// The bytes of a copy by count.
template <typename T>
inline size_t counted(uint32_t count, Where where) {
  const size_t bytes = count * sizeof(T);
  if (bytes % BLOCK) fail(where, text("DataCopy: %zu bytes are no whole blocks of %d; DataCopyPad copies those", bytes, BLOCK));
  return bytes;
}

inline Work copy_work(const char *name, double rate, uint32_t rows, size_t bytes) {
  return {0, std::max(rates::COPY, rows * bytes / rate), 0, name};
}

inline uint32_t whole_blocks(uint32_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }

}  // namespace emulator

namespace AscendC {

// Whether what is written to global memory from now on is added to what is there, in one step. The emulator has it of Fixpipe, in float.
template <typename T>
inline void SetAtomicAdd() {
  static_assert(std::is_same_v<T, float>, "the emulator adds floats in global memory");
  emulator::core().adds = true;
}
inline void SetAtomicNone() { emulator::core().adds = false; }

// From global memory: strides are the gaps between rows, of the source in bytes, of the destination in blocks. What fills the last block of
// a row is `paddingValue`, or nobody's: NaN here.
template <typename T>
inline void DataCopyPad(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const DataCopyExtParams &p,
                        const DataCopyPadExtParams<T> &pad, EMULATOR_HERE) {
  using namespace emulator;
  takes("DataCopyPad", "dst", dst, {TPosition::VECIN, TPosition::VECCALC}, where);
  rows_in_range("DataCopyPad", p, where);
  if (pad.isPad && (pad.leftPadding || pad.rightPadding * sizeof(T) > BLOCK))
    fail(where, text("DataCopyPad: padding of %u and %u elements; the emulator knows right padding of up to 32 bytes", pad.leftPadding,
                     pad.rightPadding));
  if (p.blockLen % sizeof(T)) fail(where, text("DataCopyPad: blockLen of %u bytes is no number of %s", p.blockLen, type_name<T>()));
  issue(PIPE_MTE2, where, copy_work("DataCopyPad", rates::GM_TO_UB, p.blockCount, p.blockLen));
  const uint32_t n = p.blockLen / sizeof(T), filled = pad.isPad ? n + pad.rightPadding : n;
  const uint32_t row = whole_blocks(filled * sizeof(T)) / sizeof(T), step = row + p.dstStride * BLOCK / sizeof(T);
  for (uint32_t r = 0; r < p.blockCount; r++) {
    const uint8_t *from = reinterpret_cast<const uint8_t *>(src.address()) + static_cast<size_t>(r) * (p.blockLen + p.srcStride);
    global_access("DataCopyPad", PIPE_MTE2, from, p.blockLen, false, where);
    if (skipped<T>()) continue;
    T *to = dst.touch("DataCopyPad", PIPE_MTE2, r * step, row, true, where);
    std::memset(static_cast<void *>(to), 0xff, row * sizeof(T));
    std::memcpy(static_cast<void *>(to), from, p.blockLen);
    for (uint32_t i = n; i < filled; i++) to[i] = pad.paddingValue;
  }
  copied(PIPE_MTE2);
}

// To global memory, without what pads the rows.
template <typename T>
inline void DataCopyPad(const GlobalTensor<T> &dst, const LocalTensor<T> &src, const DataCopyExtParams &p, EMULATOR_HERE) {
  using namespace emulator;
  takes("DataCopyPad", "src", src, {TPosition::VECOUT, TPosition::VECCALC}, where);
  replaces("DataCopyPad", where);
  rows_in_range("DataCopyPad", p, where);
  issue(PIPE_MTE3, where, copy_work("DataCopyPad", rates::UB_TO_GM, p.blockCount, p.blockLen));
  const uint32_t row = whole_blocks(p.blockLen) / sizeof(T), step = row + p.srcStride * BLOCK / sizeof(T);
  for (uint32_t r = 0; r < p.blockCount; r++) {
    uint8_t *to = reinterpret_cast<uint8_t *>(dst.address()) + static_cast<size_t>(r) * (p.blockLen + p.dstStride);
    global_access("DataCopyPad", PIPE_MTE3, to, p.blockLen, true, where);
    if (skipped<T>()) continue;
    const T *from = src.touch("DataCopyPad", PIPE_MTE3, r * step, row, false, where);
    std::memcpy(to, from, p.blockLen);
  }
  copied(PIPE_MTE3);
}

// Whole blocks of 32 bytes.
template <typename T>
inline void DataCopy(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const uint32_t count, EMULATOR_HERE) {
  using namespace emulator;
  takes("DataCopy", "dst", dst, {TPosition::VECIN, TPosition::VECCALC}, where);
  const size_t bytes = counted<T>(count, where);
  issue(PIPE_MTE2, where, copy_work("DataCopy", rates::GM_TO_UB, 1, bytes));
  global_access("DataCopy", PIPE_MTE2, src.address(), bytes, false, where);
  copied(PIPE_MTE2);
  if (skipped<T>()) return;
  std::memcpy(static_cast<void *>(dst.touch("DataCopy", PIPE_MTE2, 0, count, true, where)), src.address(), bytes);
}

template <typename T>
inline void DataCopy(const GlobalTensor<T> &dst, const LocalTensor<T> &src, const uint32_t count, EMULATOR_HERE) {
  using namespace emulator;
  takes("DataCopy", "src", src, {TPosition::VECOUT, TPosition::VECCALC}, where);
  replaces("DataCopy", where);
  const size_t bytes = counted<T>(count, where);
  issue(PIPE_MTE3, where, copy_work("DataCopy", rates::UB_TO_GM, 1, bytes));
  global_access("DataCopy", PIPE_MTE3, dst.address(), bytes, true, where);
  copied(PIPE_MTE3);
  if (skipped<T>()) return;
  std::memcpy(static_cast<void *>(dst.address()), src.touch("DataCopy", PIPE_MTE3, 0, count, false, where), bytes);
}

// A matrix of n rows of d into L1, in columns of blocks of 32 bytes: element (i, j) at (j / c) * dstNzC0Stride + i, c to a block. The last
// block of a row is filled up with zeros.
template <typename T>
inline void DataCopy(const LocalTensor<T> &dst, const GlobalTensor<T> &src, const Nd2NzParams &p, EMULATOR_HERE) {
  using namespace emulator;
  takes("DataCopy", "dst", dst, {TPosition::A1, TPosition::B1}, where);
  if (p.ndNum != 1 || p.dstNzNStride != 1) fail(where, "DataCopy: the emulator copies one matrix, with rows side by side (dstNzNStride 1)");
  if (p.nValue < 1 || p.nValue > 16384 || p.dValue < 1 || p.dstNzC0Stride < p.nValue || p.dstNzC0Stride > 16384)
    fail(where, text("DataCopy: %u rows of %u with dstNzC0Stride %u; they are 1 to 16384, and the stride at least the rows", p.nValue,
                     p.dValue, p.dstNzC0Stride));
  if (p.srcDValue < p.dValue) fail(where, text("DataCopy: rows of %u that are %u apart", p.dValue, p.srcDValue));
  const double row_cycles = std::max(rates::ROW_TO_L1, p.dValue * sizeof(T) / rates::GM_TO_L1);
  issue(PIPE_MTE2, where, {0, std::max(rates::COPY, p.nValue * row_cycles), 0, "DataCopy"});
  constexpr uint32_t c = BLOCK / sizeof(T);
  const uint32_t columns = (p.dValue + c - 1) / c;
  for (uint32_t i = 0; i < p.nValue; i++)
    global_access("DataCopy", PIPE_MTE2, src.address() + static_cast<size_t>(i) * p.srcDValue, p.dValue * sizeof(T), false, where);
  copied(PIPE_MTE2);
  if (skipped<T>()) return;
  for (uint32_t j = 0; j < columns; j++) {
    T *to = dst.touch("DataCopy", PIPE_MTE2, j * p.dstNzC0Stride * c, p.nValue * c, true, where);
    const uint32_t n = std::min<uint32_t>(c, p.dValue - j * c);
    for (uint32_t i = 0; i < p.nValue; i++) {
      const T *from = src.address() + static_cast<size_t>(i) * p.srcDValue + j * c;
      for (uint32_t e = 0; e < c; e++) to[i * c + e] = e < n ? from[e] : T{};
    }
  }
}

}  // namespace AscendC
