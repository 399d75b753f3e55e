// Writes new keys or values into their slots of a KV cache, in place; for types of 4 bytes.
#include "common.h"

// cache [B, T, K, H] (written to), new [B, S, K, H], at [B, S] int32 -> [1] int32, 0, for which readers of the cache wait.
KERNEL(cache_write) {
  if (!a.are("..ii") || !a.dtype(1, a.dtypes[0]) || !(a.dtype(0, "float32") || a.dtype(0, "int32"))) return WRONG_TYPES;
  if (a.ndims[0] != 4 || a.ndims[1] != 4 || a.ndims[2] != 2) return WRONG_SHAPES;
  const int64_t B = a.dim(0, 0), T = a.dim(0, 1), S = a.dim(1, 1), row = a.dim(0, 2) * a.dim(0, 3);
  if (a.dim(1, 0) != B || a.dim(1, 2) != a.dim(0, 2) || a.dim(1, 3) != a.dim(0, 3)) return WRONG_SHAPES;
  if (a.dim(2, 0) != B || a.dim(2, 1) != S || a.size(3) != 1) return WRONG_SHAPES;
  float *cache = a.get(0);
  const float *fresh = a.get(1);
  const int32_t *at = a.get<int32_t>(2);
#pragma omp parallel for schedule(static) if (B * S * row > 65536)
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < S; s++) {
      const int64_t i = b * S + s, slot = at[i];
      if (slot >= 0 && slot < T) std::memcpy(cache + (b * T + slot) * row, fresh + i * row, row * sizeof(float));
    }
  a.get<int32_t>(3)[0] = 0;
  return 0;
}
