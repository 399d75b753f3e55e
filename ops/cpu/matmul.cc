// Products of two matrices; see product.h.
#include "blas.h"
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
