// The AdamW update of one array, in place, and the sum of squares of a gradient.
#include "common.h"

// values [lr, 1 - b1**t, 1 - b2**t, ...], scale, keep, constants [b1, 1 - b1, b2, 1 - b2, eps, decay, skips], g, p, m, v -> token [1].
// Changes p, m and v. If skips is set and keep <= 0, it changes nothing. values may have a row for each layer of p [L, ...].
KERNEL(adamw) {
  if (!a.are("fffffffff")) return WRONG_TYPES;
  const int64_t n = a.size(5);
  const int64_t layers = a.ndims[0] == 2 ? a.dim(0, 0) : 1, columns = a.dim(0, -1), each = layers ? n / layers : 0;
  if (columns < 3 || each * layers != n || a.size(1) != 1 || a.size(2) != 1 || a.size(3) != 7) return WRONG_SHAPES;
  for (int i : {4, 6, 7})
    if (a.size(i) != n) return WRONG_SHAPES;
  const float *values = a.get(0), *constants = a.get(3), *g = a.get(4);
  const float scale = *a.get(1), keep = *a.get(2), c1 = values[1], c2 = values[2];
  const float b1 = constants[0], b1_rest = constants[1], b2 = constants[2], b2_rest = constants[3], eps = constants[4];
  float *p = a.get(5), *m = a.get(6), *v = a.get(7);
  *a.get(8) = 1.0f;
  if (constants[6] != 0.0f && !(keep > 0.0f)) return 0;
  for (int64_t layer = 0; layer < layers; layer++) {
    const float lr = values[layer * columns], shrink = 1.0f - lr * constants[5];
#pragma omp parallel for simd schedule(static) if (parallel : each >= THREADS_FROM)
    for (int64_t i = layer * each; i < (layer + 1) * each; i++) {
      float x = g[i] * scale;
      float new_m = b1 * m[i] + b1_rest * x, new_v = b2 * v[i] + b2_rest * x * x;
      m[i] = new_m, v[i] = new_v;
      p[i] = p[i] * shrink - lr * (new_m / c1) / (std::sqrt(new_v / c2) + eps);
    }
  }
  return 0;
}

// g -> the sum of its squares, 0-d. The parts that threads sum depend on the size alone.
KERNEL(sum_of_squares) {
  if (!a.are("ff")) return WRONG_TYPES;
  const int64_t n = a.size(0), each = 2048, parts = (n + each - 1) / each;
  const float *g = a.get(0);
  std::vector<float> sums(parts);
#pragma omp parallel for schedule(static) if (n >= THREADS_FROM)
  for (int64_t p = 0; p < parts; p++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = p * each; i < std::min(n, (p + 1) * each); i++) sum += g[i] * g[i];
    sums[p] = sum;
  }
  double total = 0;
  for (float sum : sums) total += sum;
  *a.get(1) = static_cast<float>(total);
  return 0;
}
