// The logits of the output head and the terms of cross-entropy; and the gradients, which overwrite the logits.
#include "blas.h"
#include "entropy.h"
#include "product.h"

// x [R, D], w [V, D], the index of the picked column [R] -> the logits z [R, V]; maximum, sum(exp(z - maximum)) and picked element, [R, 1]
KERNEL(head_loss) {
  if (!a.are("ffiffff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.dim(0, 1) != a.dim(1, 1) || a.size(2) != a.dim(0, 0)) return WRONG_SHAPES;
  const int64_t R = a.dim(0, 0), V = a.dim(1, 0);
  multiply(R, V, a.dim(0, 1), a.get(0), blas::AS_IS, a.get(1), blas::TURNED, a.get(3));
  measure_rows(R, V, a.get(3), a.get<int32_t>(2), a.get(4), a.get(5), a.get(6));
  return 0;
}

// x, w, place, z (in whose place dz is written), largest, d sum, d picked -> dx [R, D], dw [V, D]
KERNEL(head_loss_grad) {
  if (!a.are("ffiffffff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.ndims[3] != 2 || a.dim(0, 1) != a.dim(1, 1)) return WRONG_SHAPES;
  const int64_t R = a.dim(0, 0), V = a.dim(1, 0), D = a.dim(0, 1);
  if (a.dim(3, 0) != R || a.dim(3, 1) != V || a.size(2) != R || a.size(4) != R || a.size(5) != R || a.size(6) != R) return WRONG_SHAPES;
  float *z = a.get(3);
  entropy_grad(R, V, z, a.get<int32_t>(2), a.get(4), a.get(5), a.get(6), z);
  multiply(R, D, V, z, blas::AS_IS, a.get(1), blas::AS_IS, a.get(7));
  multiply(V, D, R, z, blas::TURNED, a.get(0), blas::AS_IS, a.get(8));
  return 0;
}
