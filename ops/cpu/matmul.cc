// Products of two matrices by OpenBLAS, cut into tiles for the threads. The tiles follow from the shapes alone, so the number of threads
// changes nothing.
#include "blas.h"
#include "common.h"

static const int64_t SMALL = 1 << 18;  // multiplications below which threads cost more than they save

// The edges of a tile of c [m, n]: enough for OpenBLAS to run near its peak, and no more, as it packs what it reads for a tile into memory of
// its own; less where that leaves fewer than a few for each thread, but never less than is worth the packing.
struct Tiles {
  int64_t tall, wide;

  Tiles(int64_t m, int64_t n) : tall(std::min<int64_t>(m, 256)), wide(std::min<int64_t>(n, 2048)) {
    const int64_t enough = 8, least = 64;
    while (count(m, n) < enough && std::max(tall, wide) > least) (tall > wide ? tall : wide) = (std::max(tall, wide) + 1) / 2;
  }
  int64_t across(int64_t n) const { return (n + wide - 1) / wide; }
  int64_t count(int64_t m, int64_t n) const { return (m + tall - 1) / tall * across(n); }
};

// Few rows, as of decoding: the matrix b is read once, in order, which takes longer than the products.
static const int64_t FEW = 4;
static const int64_t STRIP = 1024;  // columns of c, whose sums and whose DEEP rows of b stay in the L1 cache
static const int64_t DEEP = 8;
static const int64_t WORTH_READING = 1 << 19;  // elements of b; below, one thread reads them as fast

// c [m, n] = a [m, k] b [k, n]
static void few_rows(int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *c) {
#pragma omp parallel for schedule(static) if (n * k >= WORTH_READING)
  for (int64_t at = 0; at < n; at += STRIP) {
    const int64_t width = std::min(STRIP, n - at);
    for (int64_t r = 0; r < m; r++) std::fill_n(c + r * n + at, width, 0.0f);
    for (int64_t d = 0; d < k; d += DEEP) {
      for (int64_t r = 0; r < m; r++) {
        float x[DEEP] = {};
        std::copy_n(a + r * k + d, std::min(DEEP, k - d), x);
        float *sum = c + r * n + at;
        const float *row = b + d * n + at;
        if (d + DEEP <= k) {
#pragma omp simd
          for (int64_t i = 0; i < width; i++) {
            sum[i] += x[0] * row[i] + x[1] * row[n + i] + x[2] * row[2 * n + i] + x[3] * row[3 * n + i] + x[4] * row[4 * n + i] +
                      x[5] * row[5 * n + i] + x[6] * row[6 * n + i] + x[7] * row[7 * n + i];
          }
        } else {
          for (int64_t j = 0; j < k - d; j++)
#pragma omp simd
            for (int64_t i = 0; i < width; i++) sum[i] += x[j] * row[j * n + i];
        }
      }
    }
  }
}

// c [m, n] = a [m, k] b^T, where b is [n, k]
static void few_rows_turned(int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *c) {
#pragma omp parallel for schedule(static) if (n * k >= WORTH_READING)
  for (int64_t o = 0; o < n; o++) {
    for (int64_t r = 0; r < m; r++) {
      const float *x = a + r * k, *w = b + o * k;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < k; i++) sum += x[i] * w[i];
      c[r * n + o] = sum;
    }
  }
}

// c [m, n] = a b of depth k; a TURNED matrix is stored as its transpose
static void multiply(int64_t m, int64_t n, int64_t k, const float *a, blas::Side of_a, const float *b, blas::Side of_b, float *c) {
  if (m == 0 || n == 0) return;
  if (k == 0) return void(std::fill_n(c, m * n, 0.0f));
  if (m <= FEW && of_a == blas::AS_IS) return (of_b == blas::TURNED ? few_rows_turned : few_rows)(m, n, k, a, b, c);
  const Tiles tiles(m, n);
  const int64_t across = tiles.across(n), lda = of_a == blas::TURNED ? m : k, ldb = of_b == blas::TURNED ? k : n;
#pragma omp parallel for schedule(dynamic, 1) if (m * n * k > SMALL)
  for (int64_t t = 0; t < tiles.count(m, n); t++) {
    const int64_t r = t / across * tiles.tall, o = t % across * tiles.wide;
    blas::product(std::min(tiles.tall, m - r), std::min(tiles.wide, n - o), k, a + (of_a == blas::TURNED ? r : r * k), lda, of_a,
                  b + (of_b == blas::TURNED ? o * k : o), ldb, of_b, c + r * n + o, n, false);
  }
}

// a [m, k], b [k, n] -> c [m, n]
KERNEL(matmul) {
  if (!a.are("fff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.dim(0, 1) != a.dim(1, 0)) return WRONG_SHAPES;
  multiply(a.dim(0, 0), a.dim(1, 1), a.dim(0, 1), a.get(0), blas::AS_IS, a.get(1), blas::AS_IS, a.get(2));
  return 0;
}

// a [m, k], b [n, k] -> c [m, n]
KERNEL(matmul_nt) {
  if (!a.are("fff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.dim(0, 1) != a.dim(1, 1)) return WRONG_SHAPES;
  multiply(a.dim(0, 0), a.dim(1, 0), a.dim(0, 1), a.get(0), blas::AS_IS, a.get(1), blas::TURNED, a.get(2));
  return 0;
}

// a [k, m], b [k, n] -> c [m, n]
KERNEL(matmul_tn) {
  if (!a.are("fff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.dim(0, 0) != a.dim(1, 0)) return WRONG_SHAPES;
  multiply(a.dim(0, 1), a.dim(1, 1), a.dim(0, 0), a.get(0), blas::TURNED, a.get(1), blas::AS_IS, a.get(2));
  return 0;
}
