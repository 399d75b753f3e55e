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

// Both reductions by count leave a number to the scalar unit, which waits for the vector unit, writes it, and lets the vector unit and
// MTE3 go on after that.
inline void by_scalar(const char *name, const AscendC::LocalTensor<float> &dst, float value, Where where) {
  after(PIPE_S, done(PIPE_V));
  issue(PIPE_S, where, {0, rates::LOCAL, 0, name});
  *dst.touch(name, PIPE_S, 0, 1, true, where) = value;
  const Clock written = done(PIPE_S);
  after(PIPE_V, written), after(PIPE_MTE3, written);
}

}  // namespace emulator

namespace AscendC {

// The chip adds up in an accumulator, and leaves the work tensor alone.
inline void ReduceSum(const LocalTensor<float> &dst, const LocalTensor<float> &src, const LocalTensor<float> &work, const int32_t count,
                      EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("ReduceSum", "src", src, where), vector_operand("ReduceSum", "sharedTmpBuffer", work, where);
  dst.aligned("ReduceSum", "dst", where, 4);
  some("ReduceSum", count, where);
  issue(PIPE_V, where, of_repeats("ReduceSum", rates::SUM, repeats_of(count * 4)));
  std::vector<float> sums;
  if (!dry) {
    const float *x = src.touch("ReduceSum", PIPE_V, 0, count, false, where);
    for (int32_t at = 0; at < count; at += 64) sums.push_back(sum_of_pairs(x + at, std::min(64, count - at)));
  }
  by_scalar("ReduceSum", dst, sum_of_pairs(sums.data(), static_cast<uint32_t>(sums.size())), where);
}

// The work tensor gets a value and its index for each repeat, also where no index is asked for: two floats a repeat, in whole blocks.
inline void ReduceMax(const LocalTensor<float> &dst, const LocalTensor<float> &src, const LocalTensor<float> &work, const int32_t count,
                      bool index = false, EMULATOR_HERE) {
  using namespace emulator;
  if (index) fail(where, "ReduceMax: the emulator gives the value alone");
  vector_operand("ReduceMax", "src", src, where), vector_operand("ReduceMax", "sharedTmpBuffer", work, where);
  dst.aligned("ReduceMax", "dst", where, 4);
  some("ReduceMax", count, where);
  const uint32_t repeats = (static_cast<uint32_t>(count) + 63) / 64, needed = (2 * repeats + 7) / 8 * 8;
  if (work.GetSize() < needed)
    fail(where, text("ReduceMax: sharedTmpBuffer has %u elements and needs %u: a value and an index for each of %u repeats", work.GetSize(),
                     needed, repeats));
  issue(PIPE_V, where, of_repeats("ReduceMax", rates::MOST, repeats_of(count * 4)));
  for (uint32_t left = repeats; left > 1; left = (left + 31) / 32)
    issue(PIPE_V, where, of_repeats("ReduceMax", rates::MOST, (left + 31) / 32));
  float most = 0;
  if (!dry) {
    const float *x = src.touch("ReduceMax", PIPE_V, 0, count, false, where);
    float *pairs = work.touch("ReduceMax", PIPE_V, 0, needed, true, where);
    for (uint32_t r = 0; r < repeats; r++) {
      const uint32_t at = largest_of(x + r * 64, std::min<uint32_t>(64, count - r * 64));
      pairs[2 * r] = x[r * 64 + at];
      std::memcpy(pairs + 2 * r + 1, &at, 4);
    }
    most = x[largest_of(x, count)];
  }
  by_scalar("ReduceMax", dst, most, where);
}

// One number for each block of 8 of a repeat of `mask` elements, side by side; dstRepStride counts 8 numbers.
template <typename F>
inline void block_reduce(const char *name, const LocalTensor<float> &dst, const LocalTensor<float> &src, int32_t repeats, int32_t mask,
                         int32_t dst_stride, int32_t block_stride, int32_t src_stride, emulator::Where where,
                         const emulator::rates::Vector &rate, F f) {
  using namespace emulator;
  vector_operand(name, "src", src, where), vector_operand(name, "dst", dst, where);
  if (mask < 1 || mask > 64 || repeats < 1 || repeats > 255 || block_stride != 1)
    fail(where, text("%s: a mask of %d (1 to 64), %d repeats (1 to 255), srcBlkStride %d (1)", name, mask, repeats, block_stride));
  issue(PIPE_V, where, of_repeats(name, rate, repeats));
  if (dry) return;
  for (int32_t r = 0; r < repeats; r++)
    for (int32_t k = 0; k * 8 < mask; k++) {
      const uint32_t n = std::min(8, mask - k * 8);
      const float *x = src.touch(name, PIPE_V, r * src_stride * 8 + k * 8, n, false, where);
      *dst.touch(name, PIPE_V, r * dst_stride * 8 + k, 1, true, where) = f(x, n);
    }
}
inline void BlockReduceSum(const LocalTensor<float> &dst, const LocalTensor<float> &src, const int32_t repeatTime, const int32_t mask,
                           const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, EMULATOR_HERE) {
  block_reduce("BlockReduceSum", dst, src, repeatTime, mask, dstRepStride, srcBlkStride, srcRepStride, where, emulator::rates::BLOCK_SUM,
               [](const float *x, uint32_t n) { return emulator::sum_of_pairs(x, n); });
}
inline void BlockReduceMax(const LocalTensor<float> &dst, const LocalTensor<float> &src, const int32_t repeatTime, const int32_t mask,
                           const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, EMULATOR_HERE) {
  block_reduce("BlockReduceMax", dst, src, repeatTime, mask, dstRepStride, srcBlkStride, srcRepStride, where, emulator::rates::BLOCK_MOST,
               [](const float *x, uint32_t n) { return x[emulator::largest_of(x, n)]; });
}

// One number for each repeat of `mask` elements; dstRepStride counts elements.
inline void WholeReduceSum(const LocalTensor<float> &dst, const LocalTensor<float> &src, const int32_t mask, const int32_t repeatTime,
                           const int32_t dstRepStride, const int32_t srcBlkStride, const int32_t srcRepStride, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("WholeReduceSum", "src", src, where);
  dst.aligned("WholeReduceSum", "dst", where, 4);
  if (mask < 1 || mask > 64 || repeatTime < 1 || repeatTime > 255 || srcBlkStride != 1)
    fail(where, text("WholeReduceSum: a mask of %d (1 to 64), %d repeats (1 to 255), srcBlkStride %d (1)", mask, repeatTime, srcBlkStride));
  issue(PIPE_V, where, of_repeats("WholeReduceSum", rates::SUM, repeatTime));
  if (dry) return;
  for (int32_t r = 0; r < repeatTime; r++) {
    const float *x = src.touch("WholeReduceSum", PIPE_V, r * srcRepStride * 8, mask, false, where);
    *dst.touch("WholeReduceSum", PIPE_V, r * dstRepStride, 1, true, where) = sum_of_pairs(x, mask);
  }
}

// The largest of each repeat, and the first of equals, as CANN documents. With its place, as the bits of a uint32_t, behind it,
// dstRepStride counts pairs.
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
  issue(PIPE_V, where, of_repeats("WholeReduceMax", rates::MOST, repeatTime));
  if (dry) return;
  for (int32_t r = 0; r < repeatTime; r++) {
    const float *x = src.touch("WholeReduceMax", PIPE_V, r * srcRepStride * 8, mask, false, where);
    const uint32_t at = largest_of(x, mask);
    float *to = dst.touch("WholeReduceMax", PIPE_V, r * dstRepStride * (both ? 2 : 1), both ? 2 : 1, true, where);
    to[0] = x[at];
    if (both) std::memcpy(to + 1, &at, 4);
  }
}

}  // namespace AscendC
