// Products of two matrices by OpenBLAS, split into tiles for the threads. The tiles depend on the shapes only, so the number of threads
// does not change results.
#pragma once
#include "blas.h"
#include "common.h"
#include "few_rows.h"

static const int64_t SMALL = 1 << 18;  // multiplications below which threads cost more than they save

// The sizes of a tile of c [m, n]. A tile is as small as OpenBLAS allows near its peak, since OpenBLAS copies the operands of a tile. If
// there were only few tiles a thread, tiles are smaller, down to a size that is still worth the copies.
struct Tiles {
  int64_t tall, wide;

  Tiles(int64_t m, int64_t n) : tall(std::min<int64_t>(m, 256)), wide(std::min<int64_t>(n, 2048)) {
    const int64_t enough = 8, least = 64;
    while (count(m, n) < enough && std::max(tall, wide) > least) (tall > wide ? tall : wide) = (std::max(tall, wide) + 1) / 2;
  }
  int64_t across(int64_t n) const { return (n + wide - 1) / wide; }
  int64_t count(int64_t m, int64_t n) const { return (m + tall - 1) / tall * across(n); }
};

// c [m, n] = a [m, k] b, of few rows
static void few_rows(int64_t m, int64_t n, int64_t k, const float *a, const float *b, blas::Side of_b, float *c) {
  const int threads = few::threads_for(m, n * k);
  const int64_t piece = few::piece(n, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t at = 0; at < n; at += piece) {
    (of_b == blas::TURNED ? few::columns_turned : few::columns)(m, n, k, a, b, at, std::min(n, at + piece), c);
  }
}

// c [m, n] = a b of depth k; a TURNED matrix is stored as its transpose
static void multiply(int64_t m, int64_t n, int64_t k, const float *a, blas::Side of_a, const float *b, blas::Side of_b, float *c) {
  if (m == 0 || n == 0) return;
  if (k == 0) return void(std::fill_n(c, m * n, 0.0f));
  if (m <= few::MOST_ROWS && of_a == blas::AS_IS) return few_rows(m, n, k, a, b, of_b, c);
  const Tiles tiles(m, n);
  const int64_t across = tiles.across(n), lda = of_a == blas::TURNED ? m : k, ldb = of_b == blas::TURNED ? k : n;
#pragma omp parallel for schedule(dynamic, 1) if (m * n * k > SMALL)
  for (int64_t t = 0; t < tiles.count(m, n); t++) {
    const int64_t r = t / across * tiles.tall, o = t % across * tiles.wide;
    blas::product(std::min(tiles.tall, m - r), std::min(tiles.wide, n - o), k, a + (of_a == blas::TURNED ? r : r * k), lda, of_a,
                  b + (of_b == blas::TURNED ? o * k : o), ldb, of_b, c + r * n + o, n, false);
  }
}
