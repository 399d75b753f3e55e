// Writes the array of one layer into a stack of all layers, in place, and makes such a stack; for floats of 2 or 4 bytes.
#include "common.h"

static int64_t bytes_of(const Args &a, int i) {
  if (a.dtype(i, "float32")) return 4;
  return a.dtype(i, "float16") || a.dtype(i, "bfloat16") ? 2 : 0;
}

// stack [L, ...] (written to), at [] int32, x [...] -> [1] int32, 0, for which readers of the stack wait.
KERNEL(stack_write) {
  if (!a.are(".i.i") || !a.dtype(2, a.dtypes[0]) || !bytes_of(a, 0)) return WRONG_TYPES;
  if (a.ndims[0] != a.ndims[2] + 1 || a.size(1) != 1 || a.size(3) != 1) return WRONG_SHAPES;
  for (int d = 0; d < a.ndims[2]; d++)
    if (a.dim(0, d + 1) != a.dim(2, d)) return WRONG_SHAPES;
  const int64_t at = a.get<int32_t>(1)[0], size = a.size(2) * bytes_of(a, 0), block = 1 << 18;
  if (at < 0 || at >= a.dim(0, 0)) return WRONG_SHAPES;
  char *to = a.get<char>(0) + at * size;
  const char *from = a.get<char>(2);
#pragma omp parallel for schedule(static) if (size > block)
  for (int64_t b = 0; b < size; b += block) std::memcpy(to + b, from + b, std::min(block, size - b));
  a.get<int32_t>(3)[0] = 0;
  return 0;
}

// x of any shape and type -> an array that nothing was written to.
KERNEL(stack_new) { return a.are("..") && a.dtype(1, a.dtypes[0]) ? 0 : WRONG_TYPES; }
