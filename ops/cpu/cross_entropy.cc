// The terms of cross-entropy; see entropy.h.
#include "entropy.h"

static bool rows_and_places(const Args &a) { return a.ndims[0] == 2 && a.size(1) == a.dim(0, 0); }

// z [R, V], the index of the picked column [R] -> the maximum, sum(exp(z - maximum)), the picked element (0 if there is none), [R, 1]
KERNEL(cross_entropy) {
  if (!a.are("fifff")) return WRONG_TYPES;
  if (!rows_and_places(a)) return WRONG_SHAPES;
  const float *z = a.get(0);
  const int32_t *at = a.get<int32_t>(1);
  float *top = a.get(2), *total = a.get(3), *picked = a.get(4);
  const int64_t R = a.dim(0, 0), V = a.dim(0, 1);
  measure_rows(R, V, z, at, top, total, picked);
  return 0;
}

// z, place, largest, d sum, d picked -> dz = d sum exp(z - largest), and d picked more at the place
KERNEL(cross_entropy_grad) {
  if (!a.are("fiffff")) return WRONG_TYPES;
  if (!rows_and_places(a)) return WRONG_SHAPES;
  const int64_t R = a.dim(0, 0), V = a.dim(0, 1);
  for (int i : {2, 3, 4})
    if (a.size(i) != R) return WRONG_SHAPES;
  const float *z = a.get(0), *top = a.get(2), *weight = a.get(3), *dpicked = a.get(4);
  const int32_t *at = a.get<int32_t>(1);
  float *dz = a.get(5);
  entropy_grad(R, V, z, at, top, weight, dpicked, dz);
  return 0;
}
