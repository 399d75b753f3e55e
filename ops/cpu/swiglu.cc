// silu(gate) * up, and its gradient.
#include "common.h"

// gate, up -> y, all [n]
KERNEL(swiglu) {
  if (!a.are("fff")) return WRONG_TYPES;
  if (a.size(0) != a.size(1)) return WRONG_SHAPES;
  const float *gate = a.get(0), *up = a.get(1);
  float *y = a.get(2);
  const int64_t n = a.size(0);
#pragma omp parallel for simd schedule(static) if (parallel : n >= THREADS_FROM)
  for (int64_t i = 0; i < n; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
  return 0;
}

// gate, up, dy -> d gate, d up
KERNEL(swiglu_grad) {
  if (!a.are("fffff")) return WRONG_TYPES;
  if (a.size(0) != a.size(1) || a.size(0) != a.size(2)) return WRONG_SHAPES;
  const float *gate = a.get(0), *up = a.get(1), *dy = a.get(2);
  float *d_gate = a.get(3), *d_up = a.get(4);
  const int64_t n = a.size(0);
#pragma omp parallel for simd schedule(static) if (parallel : n >= THREADS_FROM)
  for (int64_t i = 0; i < n; i++) {
    float s = sigmoid(gate[i]);
    d_gate[i] = dy[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
    d_up[i] = dy[i] * gate[i] * s;
  }
  return 0;
}
