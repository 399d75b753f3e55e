// Products of two matrices; see product.h.
#include "blas.h"
#include "int8_wide.h"
#include "product.h"

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

// a [m, k], w [n, k] in 8 bits, its scale [n, groups] -> c [m, n]
KERNEL(matmul_int8) {
  if (!a.are("fbff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.ndims[2] != 2 || a.dim(0, 1) != a.dim(1, 1) || a.dim(1, 0) != a.dim(2, 0)) return WRONG_SHAPES;
  const int64_t m = a.dim(0, 0), n = a.dim(1, 0), k = a.dim(0, 1), groups = a.dim(2, 1);
  if (groups == 0 || k % groups) return WRONG_SHAPES;
  const int8::Matrix b{a.get<int8_t>(1), a.get(2), k, groups};
  const bool few_rows = m <= few::MOST_ROWS;
  const Tiles tiles(m, n);
  const int threads = few_rows ? few::threads_for(m, n * k) : m * n * k > SMALL ? omp_get_max_threads() : 1;
  const int64_t tall = few_rows ? m : tiles.tall, wide = few_rows ? few::piece(n, threads) : tiles.wide, across = (n + wide - 1) / wide;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t t = 0; t < (m + tall - 1) / tall * across; t++) {
    const int64_t r = t / across * tall, o = t % across * wide, last = std::min(n, o + wide);
    (few_rows ? int8::columns : int8::wide_columns)(std::min(tall, m - r), n, a.get(0) + r * k, b, o, last, a.get(3) + r * n);
  }
  return 0;
}
