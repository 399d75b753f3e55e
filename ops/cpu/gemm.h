// Products of matrices in the cache, by tiles in registers. Sums run over the inner dim in order, so a result does not depend on where its
// tile begins.
#pragma once
#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 6;  // 16 registers: 12 of sums, 2 of b, 1 of a
#else
constexpr int LANES = 4, TILE_ROWS = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef float VecAt __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  // anywhere in memory
typedef int32_t IntVecAt __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline Vec load(const float *p) { return *reinterpret_cast<const VecAt *>(p); }
static inline IntVec load(const int32_t *p) { return *reinterpret_cast<const IntVecAt *>(p); }
static inline void store(float *p, Vec x) { *reinterpret_cast<VecAt *>(p) = x; }
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// R rows and V vectors of c = a b (+ c). a[r][d] is at a[r * lda + d], and if TURNED at a[d * lda + r].
template <bool TURNED, int R, int V>
static inline void register_tile(int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, bool add) {
  Vec sum[R][V] = {};
  for (int64_t d = 0; d < depth; d++) {
    Vec y[V];
    for (int v = 0; v < V; v++) y[v] = load(b + d * ldb + v * LANES);
    for (int r = 0; r < R; r++) {
      const float x = TURNED ? a[d * lda + r] : a[r * lda + d];
      for (int v = 0; v < V; v++) sum[r][v] += x * y[v];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) {
      float *to = c + r * ldc + v * LANES;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// The last rows, fewer than R of them.
template <bool TURNED, int R, int V>
static void last_rows(int64_t rows, int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                      bool add) {
  if constexpr (R > 1) {
    if (rows == R - 1) return register_tile<TURNED, R - 1, V>(depth, a, lda, b, ldb, c, ldc, add);
    last_rows<TURNED, R - 1, V>(rows, depth, a, lda, b, ldb, c, ldc, add);
  }
}

template <bool TURNED, int V>
static void strip(int64_t rows, int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS) {
    register_tile<TURNED, TILE_ROWS, V>(depth, a + r * (TURNED ? 1 : lda), lda, b, ldb, c + r * ldc, ldc, add);
  }
  last_rows<TURNED, TILE_ROWS, V>(rows - r, depth, a + r * (TURNED ? 1 : lda), lda, b, ldb, c + r * ldc, ldc, add);
}

// c[rows, columns] = a[rows, depth] b[depth, columns], or added to it; columns is a multiple of LANES. a is [depth, rows] if TURNED.
template <bool TURNED>
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                    int64_t ldc, bool add) {
  int64_t at = 0;
  for (; at + 2 * LANES <= columns; at += 2 * LANES) strip<TURNED, 2>(rows, depth, a, lda, b + at, ldb, c + at, ldc, add);
  if (at < columns) strip<TURNED, 1>(rows, depth, a, lda, b + at, ldb, c + at, ldc, add);
}

// Lanes start, start + step, ... of the 2 * LANES that two vectors hold together.
template <int... I>
struct Places {
  static constexpr IntVec strided(int start, int step) { return IntVec{(start + I * step)...}; }
  static constexpr IntVec woven(int start) { return IntVec{(start + I / 2 + (I % 2) * LANES)...}; }
};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> : Places<I...> {};
using Lanes = Count<LANES>;

// One vector of the sums of LANES vectors, which it overwrites.
static inline Vec sums_of_lanes(Vec *x) {
  for (int n = LANES / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; i++) {
      const Vec a = x[2 * i], b = x[2 * i + 1];
      x[i] = __builtin_shuffle(a, b, Lanes::strided(0, 2)) + __builtin_shuffle(a, b, Lanes::strided(1, 2));
    }
  }
  return x[0];
}

// to[columns, rows] = from[rows, columns], both numbers multiples of LANES. Weaving the halves of a list of rows into each other, as often
// as LANES has factors of two, turns a square.
static inline void transpose(int64_t rows, int64_t columns, const float *from, int64_t ld_from, float *to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) {
      Vec x[LANES], y[LANES];
      for (int i = 0; i < LANES; i++) x[i] = load(from + (r + i) * ld_from + c);
      for (int n = LANES; n > 1; n /= 2) {
        for (int i = 0; i < LANES / 2; i++) {
          y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], Lanes::woven(0));
          y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], Lanes::woven(LANES / 2));
        }
        for (int i = 0; i < LANES; i++) x[i] = y[i];
      }
      for (int i = 0; i < LANES; i++) store(to + (c + i) * ld_to + r, x[i]);
    }
  }
}
