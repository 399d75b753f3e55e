// Writes new keys or values into their slots of a paged KV cache, in place.
#include "common.h"

// cache [P, C, K, H] (written to), new [R, K, H], slot [R] int32 -> [1] int32, 0, for which readers of the cache wait.
KERNEL(paged_write) {
  if (!a.are("ffii")) return WRONG_TYPES;
  if (a.ndims[0] != 4 || a.ndims[1] != 3 || a.ndims[2] != 1) return WRONG_SHAPES;
  const int64_t slots = a.dim(0, 0) * a.dim(0, 1), row = a.dim(0, 2) * a.dim(0, 3), R = a.dim(1, 0);
  if (a.dim(1, 1) != a.dim(0, 2) || a.dim(1, 2) != a.dim(0, 3) || a.dim(2, 0) != R || a.size(3) != 1) return WRONG_SHAPES;
  float *cache = a.get(0);
  const float *fresh = a.get(1);
  const int32_t *slot = a.get<int32_t>(2);
#pragma omp parallel for schedule(static) if (R * row > 65536)
  for (int64_t r = 0; r < R; r++)
    if (slot[r] >= 0 && slot[r] < slots) std::memcpy(cache + slot[r] * row, fresh + r * row, row * sizeof(float));
  a.get<int32_t>(3)[0] = 0;
  return 0;
}
