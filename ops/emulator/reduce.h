// Reductions of the vector unit. Sums are pairwise within a repeat; the order of the chip is not documented.
#pragma once
#include "vector.h"

namespace emulator {

inline float sum_of_pairs(const float *x, uint32_t n) {
  if (n <= 2) return n == 2 ? x[0] + x[1] : n ? x[0] : 0.0f;
  const uint32_t left = (n + 1) / 2;
  return sum_of_pairs(x, left) + sum_of_pairs(x + left, n - left);
}

inline uint32_t largest_of(const float *x, uint32_t n) {  // the first of equals
  uint32_t at = 0;
  for (uint32_t i = 1; i < n; i++)
    if (x[i] > x[at] || std::isnan(x[at])) at = i;
  return at;
}

// What ReduceSum and ReduceMax keep in between: a number for each repeat.
inline void wants_work(const char *name, const AscendC::LocalTensor<float> &work, int32_t count, Where where) {
  const uint32_t needed = ((static_cast<uint32_t>(count) + 63) / 64 + 7) / 8 * 8;
  vector_operand(name, "sharedTmpBuffer", work, where);
  if (work.GetSize() < needed) fail(where, text("%s: sharedTmpBuffer has %u elements and needs %u", name, work.GetSize(), needed));
  work.touch(name, PIPE_V, 0, needed, true, where);
}

}  // namespace emulator

namespace AscendC {

inline void ReduceSum(const LocalTensor<float> &dst, const LocalTensor<float> &src, const LocalTensor<float> &work, const int32_t count,
                      EMULATOR_HERE) {
  emulator::vector_operand("ReduceSum", "src", src, where);
  dst.aligned("ReduceSum", "dst", where, 4);
  emulator::some("ReduceSum", count, where);
  emulator::issue(PIPE_V, where);
  const float *x = src.touch("ReduceSum", PIPE_V, 0, count, false, where);
  emulator::wants_work("ReduceSum", work, count, where);
  std::vector<float> sums;
  for (int32_t at = 0; at < count; at += 64) sums.push_back(emulator::sum_of_pairs(x + at, std::min(64, count - at)));
  *dst.touch("ReduceSum", PIPE_V, 0, 1, true, where) = emulator::sum_of_pairs(sums.data(), static_cast<uint32_t>(sums.size()));
}

inline void ReduceMax(const LocalTensor<float> &dst, const LocalTensor<float> &src, const LocalTensor<float> &work, const int32_t count,
                      bool index = false, EMULATOR_HERE) {
  if (index) emulator::fail(where, "ReduceMax: the emulator gives the value alone");
  emulator::vector_operand("ReduceMax", "src", src, where);
  dst.aligned("ReduceMax", "dst", where, 4);
  emulator::some("ReduceMax", count, where);
  emulator::issue(PIPE_V, where);
  const float *x = src.touch("ReduceMax", PIPE_V, 0, count, false, where);
  emulator::wants_work("ReduceMax", work, count, where);
  *dst.touch("ReduceMax", PIPE_V, 0, 1, true, where) = x[emulator::largest_of(x, count)];
}

// One number for each repeat of `mask` elements; dstRepStride counts elements.
inline void WholeReduceSum(const LocalTensor<float> &dst, const LocalTensor<float> &src, const int32_t mask, const int32_t repeatTime,
                           const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("WholeReduceSum", "src", src, where);
  dst.aligned("WholeReduceSum", "dst", where, 4);
  if (mask < 1 || mask > 64 || repeatTime < 1 || repeatTime > 255 || srcBlkStride != 1)
    fail(where, text("WholeReduceSum: a mask of %d (1 to 64), %d repeats (1 to 255), srcBlkStride %d (1)", mask, repeatTime, srcBlkStride));
  issue(PIPE_V, where);
  for (int32_t r = 0; r < repeatTime; r++) {
    const float *x = src.touch("WholeReduceSum", PIPE_V, r * srcRepStride * 8, mask, false, where);
    *dst.touch("WholeReduceSum", PIPE_V, r * dstRepStride, 1, true, where) = sum_of_pairs(x, mask);
  }
}

// The largest of each repeat; with its place, as the bits of a uint32_t, behind it, when dstRepStride counts pairs.
inline void WholeReduceMax(const LocalTensor<float> &dst, const LocalTensor<float> &src, const int32_t mask, const int32_t repeatTime,
                           const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride,
                           ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("WholeReduceMax", "src", src, where);
  const bool both = order == ReduceOrder::ORDER_VALUE_INDEX;
  dst.aligned("WholeReduceMax", "dst", where, both ? 8 : 4);
  if (!both && order != ReduceOrder::ORDER_ONLY_VALUE)
    fail(where, "WholeReduceMax: the emulator knows ORDER_VALUE_INDEX and ORDER_ONLY_VALUE");
  if (mask < 1 || mask > 64 || repeatTime < 1 || repeatTime > 255 || srcBlkStride != 1)
    fail(where, text("WholeReduceMax: a mask of %d (1 to 64), %d repeats (1 to 255), srcBlkStride %d (1)", mask, repeatTime, srcBlkStride));
  issue(PIPE_V, where);
  for (int32_t r = 0; r < repeatTime; r++) {
    const float *x = src.touch("WholeReduceMax", PIPE_V, r * srcRepStride * 8, mask, false, where);
    const uint32_t at = largest_of(x, mask);
    float *to = dst.touch("WholeReduceMax", PIPE_V, r * dstRepStride * (both ? 2 : 1), both ? 2 : 1, true, where);
    to[0] = x[at];
    if (both) std::memcpy(to + 1, &at, 4);
  }
}

}  // namespace AscendC
