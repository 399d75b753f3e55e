// Sorting and gathering by the vector unit. An element of a sorted list is a pair of a float and a uint32_t, in 8 bytes.
#pragma once
#include "reduce.h"

namespace AscendC {

template <typename T>
struct MrgSortSrcList {
  LocalTensor<T> src1, src2, src3, src4;
  MrgSortSrcList() = default;
  MrgSortSrcList(const LocalTensor<T> &a, const LocalTensor<T> &b, const LocalTensor<T> &c, const LocalTensor<T> &d)
      : src1(a), src2(b), src3(c), src4(d) {}
};

struct MrgSort4Info {
  uint16_t elementLengths[4] = {0, 0, 0, 0};
  bool ifExhaustedSuspension = false;
  uint16_t validBit = 0;
  uint8_t repeatTimes = 1;
};

struct GatherMaskParams {
  uint8_t src0BlockStride = 1;
  uint16_t repeatTimes = 0, src0RepeatStride = 8;
  uint8_t src1RepeatStride = 8;
  GatherMaskParams() = default;
  GatherMaskParams(uint8_t block, uint16_t repeats, uint16_t repeat, uint8_t pattern)
      : src0BlockStride(block), repeatTimes(repeats), src0RepeatStride(repeat), src1RepeatStride(pattern) {}
};

}  // namespace AscendC

namespace emulator {

enum : uint32_t { SORTED_AT_ONCE = 32 };

// Whether one value comes after a later one in a list: the order of equals stays. Where NaN goes is not documented; here it comes first,
// and the last of several.
inline bool comes_after(float a, float b) { return b > a || std::isnan(b); }

}  // namespace emulator

namespace AscendC {

// Each repeat sorts 32 values with their numbers, the largest first, and of equals the one that came first, as CANN documents.
inline void Sort32(const LocalTensor<float> &dst, const LocalTensor<float> &src0, const LocalTensor<uint32_t> &src1,
                   const int32_t repeatTime, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("Sort32", "dst", dst, where), vector_operand("Sort32", "src0", src0, where), vector_operand("Sort32", "src1", src1, where);
  dst.aligned("Sort32", "dst", where, 256), src0.aligned("Sort32", "src0", where, 128), src1.aligned("Sort32", "src1", where, 128);
  if (repeatTime < 1 || repeatTime > 255) fail(where, text("Sort32: %d repeats (1 to 255)", repeatTime));
  issue(PIPE_V, where, of_repeats("Sort32", rates::ASSUMED_SORT, repeatTime));
  if (dry) return;
  for (int32_t r = 0; r < repeatTime; r++) {
    const float *x = src0.touch("Sort32", PIPE_V, r * SORTED_AT_ONCE, SORTED_AT_ONCE, false, where);
    const uint32_t *number = src1.touch("Sort32", PIPE_V, r * SORTED_AT_ONCE, SORTED_AT_ONCE, false, where);
    float *to = dst.touch("Sort32", PIPE_V, r * 2 * SORTED_AT_ONCE, 2 * SORTED_AT_ONCE, true, where);
    uint32_t order[SORTED_AT_ONCE];
    for (uint32_t i = 0; i < SORTED_AT_ONCE; i++) {
      uint32_t at = i;
      for (; at && comes_after(x[order[at - 1]], x[i]); at--) order[at] = order[at - 1];
      order[at] = i;
    }
    for (uint32_t i = 0; i < SORTED_AT_ONCE; i++) {
      to[2 * i] = x[order[i]];
      std::memcpy(to + 2 * i + 1, number + order[i], 4);
    }
  }
}

// One list of up to four sorted lists. Of equals, that of the earlier list comes first.
inline void MrgSort(const LocalTensor<float> &dst, const MrgSortSrcList<float> &src, const MrgSort4Info &p, EMULATOR_HERE) {
  using namespace emulator;
  const uint32_t lists = p.validBit == 3 ? 2 : p.validBit == 7 ? 3 : p.validBit == 15 ? 4 : 0;
  if (!lists) fail(where, text("MrgSort: validBit is %u, and it is 3, 7 or 15", p.validBit));
  if (p.ifExhaustedSuspension || p.repeatTimes != 1)
    fail(where, "MrgSort: the emulator merges once (repeatTimes 1), to the end of all lists (ifExhaustedSuspension false)");
  const LocalTensor<float> from[] = {src.src1, src.src2, src.src3, src.src4};
  vector_operand("MrgSort", "dst", dst, where);
  uint32_t total = 0;
  for (uint32_t i = 0; i < lists; i++) {
    wants_position("MrgSort", "src", from[i].GetPosition(), {TPosition::VECIN, TPosition::VECOUT, TPosition::VECCALC}, where);
    from[i].aligned("MrgSort", "src", where, 8);
    if (p.elementLengths[i] > 4095) fail(where, text("MrgSort: a list of %u elements; there are up to 4095", p.elementLengths[i]));
    total += p.elementLengths[i];
  }
  issue(PIPE_V, where, {0, rates::MERGE_START + total * rates::ASSUMED_MERGE, rates::MERGE_START, "MrgSort"});
  if (dry) return;
  const float *at[4], *end[4];
  for (uint32_t i = 0; i < lists; i++) {
    const uint32_t a = from[i].address(), n = 2 * p.elementLengths[i];
    if (a < dst.address() + total * 8 && dst.address() < a + n * 4) fail(where, "MrgSort: dst overlaps a list of src");
    at[i] = from[i].touch("MrgSort", PIPE_V, 0, n, false, where), end[i] = at[i] + n;
  }
  float *to = dst.touch("MrgSort", PIPE_V, 0, 2 * total, true, where);
  for (; total; total--) {
    int best = -1;
    for (uint32_t i = 0; i < lists; i++)
      if (at[i] < end[i] && (best < 0 || comes_after(*at[best], *at[i]))) best = static_cast<int>(i);
    std::memcpy(to, at[best], 8);
    at[best] += 2, to += 2;
  }
}

// The elements that a pattern chooses, side by side: 1 the even ones, 2 the odd ones, 3 to 6 the first to fourth of each four, 7 all. A
// repeat takes `mask` elements if `reduceMode`, else 256 bytes. rsvdCnt: how many were chosen.
template <typename T>
inline void GatherMask(const LocalTensor<T> &dst, const LocalTensor<T> &src0, const uint8_t src1Pattern, const bool reduceMode,
                       const uint32_t mask, const GatherMaskParams &p, uint64_t &rsvdCnt, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("GatherMask", "dst", dst, where), vector_operand("GatherMask", "src0", src0, where);
  if (src1Pattern < 1 || src1Pattern > 7) fail(where, text("GatherMask: src1Pattern is %u, and it is 1 to 7", src1Pattern));
  if (p.src0BlockStride != 1) fail(where, "GatherMask: the emulator knows a src0BlockStride of 1");
  const uint32_t n = reduceMode ? mask : 256 / sizeof(T);
  some("GatherMask", p.repeatTimes, where), some("GatherMask", static_cast<int32_t>(n), where);
  issue(PIPE_V, where, of_repeats("GatherMask", rates::PICK, p.repeatTimes * repeats_of(n * sizeof(T))));
  rsvdCnt = 0;
  if (skipped<T>()) return;
  for (uint32_t r = 0; r < p.repeatTimes; r++) {
    const T *x = src0.touch("GatherMask", PIPE_V, r * p.src0RepeatStride * BLOCK / sizeof(T), n, false, where);
    for (uint32_t i = 0; i < n; i++) {
      const bool chosen = src1Pattern == 7 || (src1Pattern < 3 ? i % 2 + 1 == src1Pattern : i % 4 + 3 == src1Pattern);
      if (chosen) *dst.touch("GatherMask", PIPE_V, rsvdCnt++, 1, true, where) = x[i];
    }
  }
}

// dst[i] = the element of src at byte srcBaseOffset + srcOffset[i].
template <typename T>
inline void Gather(const LocalTensor<T> &dst, const LocalTensor<T> &src, const LocalTensor<uint32_t> &srcOffset,
                   const uint32_t srcBaseOffset, const uint32_t count, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("Gather", "dst", dst, where), vector_operand("Gather", "src", src, where);
  vector_operand("Gather", "srcOffset", srcOffset, where);
  some("Gather", static_cast<int32_t>(count), where);
  issue(PIPE_V, where, of_repeats("Gather", rates::GATHER, repeats_of(count * sizeof(T))));
  if (skipped<T>()) return;
  const uint32_t *at = srcOffset.touch("Gather", PIPE_V, 0, count, false, where);
  T *to = dst.touch("Gather", PIPE_V, 0, count, true, where);
  for (uint32_t i = 0; i < count; i++) {
    const uint32_t byte = srcBaseOffset + at[i];
    if (byte % sizeof(T)) fail(where, text("Gather: an offset of %u bytes is no whole number of %s", byte, type_name<T>()));
    to[i] = *src.touch("Gather", PIPE_V, byte / sizeof(T), 1, false, where);
  }
}

// first, first + 1, ...
inline void CreateVecIndex(LocalTensor<int32_t> dst, const int32_t &firstValue, const uint32_t count, EMULATOR_HERE) {
  using namespace emulator;
  vector_operand("CreateVecIndex", "dst", dst, where);
  some("CreateVecIndex", static_cast<int32_t>(count), where);
  issue(PIPE_V, where, of_repeats("CreateVecIndex", rates::ASSUMED_INDEX, repeats_of(count * 4)));
  int32_t *to = dst.touch("CreateVecIndex", PIPE_V, 0, count, true, where);
  for (uint32_t i = 0; i < count; i++) to[i] = firstValue + static_cast<int32_t>(i);
}

}  // namespace AscendC
