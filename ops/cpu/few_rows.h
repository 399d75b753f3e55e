// Products of few rows and a weight matrix, for decoding. The weights are read once, in order, which takes longer than the arithmetic. The
// order of each sum does not depend on the number of rows or on how columns are split, so decoding a token gives bitwise equal results in
// batches of any size up to MOST_ROWS.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace few {

constexpr int64_t MOST_ROWS = 16;
constexpr int64_t PANEL = 2 * LANES;  // columns of a tile of sums in registers
constexpr int64_t RUN = 1024;         // columns at most that are read of one row of b before the next one's
constexpr int64_t TALL = 6;           // rows of a tile at most
constexpr int64_t WORTH_READING = 1 << 19, WORTH_THREADS = 1 << 21;  // elements of b, multiplications; some 50 us

// Of a product of m rows with so many elements of b.
static inline int threads_for(int64_t m, int64_t elements) {
  return elements >= WORTH_READING || m * elements >= WORTH_THREADS ? omp_get_max_threads() : 1;
}

// How many of n columns a thread takes at a time, one of several: whole panels, in runs as long as there are some for each.
static inline int64_t piece(int64_t n, int threads) {
  if (threads == 1) return std::max<int64_t>(n, 1);
  return std::min<int64_t>(RUN, std::max<int64_t>(2 * PANEL, (n / (2 * threads) + PANEL - 1) / PANEL * PANEL));
}

// f(n as a constant) for n in 1 ... MOST
template <int MOST, typename F>
static inline void with_constant(int64_t n, F f) {
  if constexpr (MOST > 0) {
    if (n == MOST) return f(std::integral_constant<int, MOST>());
    with_constant<MOST - 1>(n, f);
  }
}

// R rows and V vectors of columns of c = a b, or with `add` of c + a b. With `ahead` columns of b that come later are fetched.
template <int R, int V>
static inline void tile(int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, bool add,
                        bool ahead) {
  Vec sum[R][V] = {};
  if (add) {
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] = load(c + r * ldc + v * LANES);
  }
  for (int64_t d = 0; d < depth; d++) {
    Vec y[V];
    for (int v = 0; v < V; v++) y[v] = load(b + d * ldb + v * LANES);
    if (ahead)
      for (int v = 0; v < V; v += 2) __builtin_prefetch(b + d * ldb + (2 * V + v) * LANES);
    for (int r = 0; r < R; r++) {
      const float x = a[r * lda + d];
      for (int v = 0; v < V; v++) sum[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, sum[r][v]);
}

// All m rows of V vectors of columns, in tiles as even as they can be: few sums would wait for each other.
template <int V>
static void panel(int64_t m, int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, bool add) {
  const int64_t tiles = (m + TALL - 1) / TALL;
  for (int64_t i = 0, r = 0; i < tiles; i++) {
    const int64_t rows = (m - r + tiles - i - 1) / (tiles - i);
    with_constant<TALL>(rows, [&](auto R) { tile<R, V>(depth, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add, i == 0); });
    r += rows;
  }
}

// Fewer columns than a vector has, by way of copies.
static inline void last_columns(int64_t m, int64_t n, int64_t k, int64_t columns, const float *a, const float *b, float *c) {
  std::vector<float> wide(k * LANES, 0.0f), out(m * LANES);
  for (int64_t d = 0; d < k; d++) std::copy_n(b + d * n, columns, &wide[d * LANES]);
  panel<1>(m, k, a, k, wide.data(), LANES, out.data(), LANES, false);
  for (int64_t r = 0; r < m; r++) std::copy_n(&out[r * LANES], columns, c + r * n);
}

// Columns first ... last - 1 of c [m, n] = a [m, k] b [k, n]
static inline void columns(int64_t m, int64_t n, int64_t k, const float *a, const float *b, int64_t first, int64_t last, float *c) {
  const int64_t whole = first + (last - first) / LANES * LANES;
  const int64_t depth = m > 3 ? 64 : n > RUN ? 8 : 16;  // with few rows, reading b in long runs is what counts
  for (int64_t start = first; start < whole; start += RUN) {
    const int64_t stop = std::min(whole, start + RUN);
    for (int64_t d = 0; d < k; d += depth) {
      const int64_t deep = std::min(depth, k - d);
      int64_t at = start;
      for (; m <= 3 && at + 2 * PANEL <= stop; at += 2 * PANEL) panel<4>(m, deep, a + d, k, b + d * n + at, n, c + at, n, d > 0);
      for (; at + PANEL <= stop; at += PANEL) panel<2>(m, deep, a + d, k, b + d * n + at, n, c + at, n, d > 0);
      if (at < stop) panel<1>(m, deep, a + d, k, b + d * n + at, n, c + at, n, d > 0);
    }
  }
  if (whole < last) last_columns(m, n, k, last - whole, a, b + whole, c + whole);
}

// R rows of c = a b^T, whose columns are up to LANES rows of b; k is a multiple of LANES. With `ahead` the rows of b after them are
// fetched.
template <int R>
static inline void dots(int64_t k, const float *a, const float *b, int64_t columns, float *c, int64_t ldc, bool ahead) {
  constexpr int C = LANES / R;
  for (int64_t first = 0; first < columns; first += C) {
    const float *row[C];
    for (int j = 0; j < C; j++) row[j] = b + std::min<int64_t>(first + j, columns - 1) * k;
    Vec sum[LANES] = {};
    for (int64_t d = 0; d < k; d += LANES) {
      for (int j = 0; j < C; j++) {
        const Vec y = load(row[j] + d);
        if (ahead) __builtin_prefetch(row[j] + LANES * k + d);
        for (int r = 0; r < R; r++) sum[r * C + j] += load(a + r * k + d) * y;
      }
    }
    const Vec total = sums_of_lanes(sum);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < std::min<int64_t>(C, columns - first); j++) c[r * ldc + first + j] = total[r * C + j];
  }
}

template <int R = LANES>
static void rows_of_dots(int64_t m, int64_t k, const float *a, const float *b, int64_t columns, float *c, int64_t ldc, bool ahead) {
  for (; m >= R; m -= R, a += R * k, c += R * ldc, ahead = false) dots<R>(k, a, b, columns, c, ldc, ahead);
  if constexpr (R > 1) rows_of_dots<R / 2>(m, k, a, b, columns, c, ldc, ahead);
}

static inline void copy_padded(int64_t rows, int64_t k, const float *from, float *to) {
  for (int64_t r = 0; r < rows; r++) {
    std::copy_n(from + r * k, k, to + r * padded(k));
    std::fill(to + r * padded(k) + k, to + (r + 1) * padded(k), 0.0f);
  }
}

// Columns first ... last - 1 of c [m, n] = a [m, k] b^T, where b is [n, k]
static inline void columns_turned(int64_t m, int64_t n, int64_t k, const float *a, const float *b, int64_t first, int64_t last, float *c) {
  const int64_t wide = padded(k);
  const bool whole = wide == k;
  std::vector<float> rows(whole ? 0 : m * wide), some(whole ? 0 : LANES * wide);
  if (!whole) copy_padded(m, k, a, rows.data());
  for (int64_t at = first; at < last; at += LANES) {
    const int64_t count = std::min<int64_t>(LANES, last - at);
    if (!whole) copy_padded(count, k, b + at * k, some.data());
    rows_of_dots(m, wide, whole ? a : rows.data(), whole ? b + at * k : some.data(), count, c + at, n, whole);
  }
}

}  // namespace few
