// Products of rows and a matrix in 8 bits: b [n, k] is stored as the int8 matrix w [n, k], output first, and a scale [n, groups] for each
// group of k / groups neighbours: b = w * scale. The numbers are converted in registers, so that one byte of memory is read for each. For
// many rows see int8_wide.h.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "few_rows.h"

namespace int8 {

// LANES numbers as float32. GCC 12 converts vectors of bytes one by one, so the instructions are named.
static inline Vec load(const int8_t *p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))));
#else
  Vec out;
  for (int i = 0; i < LANES; i++) out[i] = static_cast<float>(p[i]);
  return out;
#endif
}

struct Matrix {
  const int8_t *w;
  const float *scale;
  int64_t k, groups;

  int64_t group() const { return k / groups; }
  // Whether each group is whole vectors, so that rows can be read where they are.
  bool in_vectors() const { return group() % LANES == 0; }
  // The rows at ... at + count - 1
  Matrix from(int64_t at) const { return {w + at * k, scale + at * groups, k, groups}; }
  // Columns first ... last - 1 of a row as float32
  void widen(int64_t row, int64_t first, int64_t last, float *to) const {
    const int64_t each = group();
    const int8_t *from = w + row * k;
    for (int64_t d = first; d < last;) {
      const int64_t g = d / each, stop = std::min(last, (g + 1) * each);
      const float s = scale[row * groups + g];
#pragma omp simd
      for (int64_t i = d; i < stop; i++) to[i - first] = static_cast<float>(from[i]) * s;
      d = stop;
    }
  }
};

constexpr int64_t LINE = 64;  // bytes of a line of the cache

// R rows of c = a b^T, whose columns are up to LANES rows of b. Each sum runs over the groups in order, and within a group over its
// vectors, whatever R is. With `ahead`, as many bytes from there on are fetched as b has in LANES rows, in the order of memory: several
// rows at a time would be too many places for the processor to fetch from, which costs a quarter of the speed.
template <int R>
static inline void dots(const float *a, const Matrix &b, int64_t columns, float *c, int64_t ldc, const int8_t *ahead) {
  constexpr int C = LANES / R;
  const int64_t k = b.k, group = b.group();
  for (int64_t first = 0; first < columns; first += C) {
    const int8_t *row[C];
    const float *scale[C];
    for (int j = 0; j < C; j++) {
      const int64_t at = std::min<int64_t>(first + j, columns - 1);
      row[j] = b.w + at * k, scale[j] = b.scale + at * b.groups;
    }
    Vec total[LANES] = {};
    for (int64_t g = 0, d = 0; g < b.groups; g++) {
      Vec sum[LANES] = {};
      for (const int64_t stop = d + group; d < stop; d += LANES) {
        if (ahead && d % LINE == 0)
          for (int j = 0; j < C; j++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
        for (int j = 0; j < C; j++) {
          const Vec y = load(row[j] + d);
          for (int r = 0; r < R; r++) sum[r * C + j] += ::load(a + r * k + d) * y;
        }
      }
      for (int j = 0; j < C; j++)
        for (int r = 0; r < R; r++) total[r * C + j] += sum[r * C + j] * scale[j][g];
    }
    const Vec each = sums_of_lanes(total);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < std::min<int64_t>(C, columns - first); j++) c[r * ldc + first + j] = each[r * C + j];
  }
}

// All m rows, at most 4 at a time, as each vector of b is converted once for them and their parts of a stay in the cache.
template <int R = 4>
static void rows_of_dots(int64_t m, const float *a, const Matrix &b, int64_t columns, float *c, int64_t ldc, const int8_t *ahead) {
  for (; m >= R; m -= R, a += R * b.k, c += R * ldc, ahead = nullptr) dots<R>(a, b, columns, c, ldc, ahead);
  if constexpr (R > 1) rows_of_dots<R / 2>(m, a, b, columns, c, ldc, ahead);
}

// Columns first ... last - 1 of c [m, n] = a [m, k] b^T, of few rows. Where a group is not whole vectors, some rows of b at a time are
// written as float32.
static inline void columns(int64_t m, int64_t n, const float *a, const Matrix &b, int64_t first, int64_t last, float *c) {
  const int64_t k = b.k, wide = padded(k);
  const bool whole = b.in_vectors();
  std::vector<float> rows(whole ? 0 : m * wide), some(whole ? 0 : LANES * wide, 0.0f);
  if (!whole) few::copy_padded(m, k, a, rows.data());
  for (int64_t at = first; at < last; at += LANES) {
    const int64_t count = std::min<int64_t>(LANES, last - at);
    if (whole) {
      rows_of_dots(m, a, b.from(at), count, c + at, n, b.w + (at + 2 * LANES) * k);
      continue;
    }
    for (int64_t j = 0; j < count; j++) b.widen(at + j, 0, k, &some[j * wide]);
    few::rows_of_dots(m, wide, rows.data(), some.data(), count, c + at, n, false);
  }
}

}  // namespace int8
