// Products of many rows and a matrix in 8 bits (see int8.h): a tile of the matrix at a time is written as float32 and given to OpenBLAS.
#pragma once
#include "blas.h"
#include "int8.h"

namespace int8 {

constexpr int64_t TILE = 256;  // rows of b, and its columns, that are written as float32 at a time: they stay in the cache

// Columns first ... last - 1 of c [m, n] = a [m, k] b^T, of many rows.
static inline void wide_columns(int64_t m, int64_t n, const float *a, const Matrix &b, int64_t first, int64_t last, float *c) {
  std::vector<float> tile(std::min(TILE, last - first) * std::min(TILE, b.k));
  for (int64_t at = first; at < last; at += TILE) {
    const int64_t count = std::min(TILE, last - at);
    for (int64_t d = 0; d < b.k; d += TILE) {
      const int64_t deep = std::min(TILE, b.k - d);
      for (int64_t j = 0; j < count; j++) b.widen(at + j, d, d + deep, &tile[j * deep]);
      blas::product(m, count, deep, a + d, b.k, blas::AS_IS, tile.data(), deep, blas::TURNED, c + at, n, d > 0);
    }
  }
}

}  // namespace int8
