// The feed-forward half of a layer for one token a row: norm, gate and up, SwiGLU, down and the residual sum.
#include <memory>

#include "norm.h"
#include "team.h"

// x [B, D], its norm [D], w_gate, w_up [D, F], w_down [F, D], eps -> y [B, D]
KERNEL(decode_mlp) {
  if (!a.are("fffffff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[2] != 2) return WRONG_SHAPES;
  const int64_t B = a.dim(0, 0), D = a.dim(0, 1), F = a.dim(2, 1), sizes[] = {B * D, D, D * F, D * F, F * D, 1, B * D};
  for (int i = 0; i < 7; i++)
    if (a.size(i) != sizes[i]) return WRONG_SHAPES;
  const float *x = a.get(0), *w = a.get(1), *w_gate = a.get(2), *w_up = a.get(3), *w_down = a.get(4), eps = *a.get(5);
  const std::unique_ptr<float[]> memory(new float[B * (D + 2 * F)]);
  float *normed = memory.get(), *gate = normed + B * D, *up = gate + B * F, *y = a.get(6);
  const int threads = few::threads_for(B, 3 * D * F);
  const Columns of_inner(F, threads), of_y(D, threads);
  Team(threads).run([&](Team::Worker &worker) {
    worker.stage(B, [&](int64_t b) { norm_row<false>(x + b * D, nullptr, w, nullptr, normed + b * D, D, eps); });
    worker.stage(of_inner.pieces(), [&](int64_t i) {
      multiply(of_inner, i, B, D, normed, w_gate, gate);
      multiply(of_inner, i, B, D, normed, w_up, up);
      for (int64_t b = 0; b < B; b++)
#pragma omp simd
        for (int64_t j = b * F + of_inner.first(i); j < b * F + of_inner.last(i); j++) gate[j] = gate[j] * sigmoid(gate[j]) * up[j];
    });
    worker.stage(of_y.pieces(), [&](int64_t i) { multiply_add(of_y, i, B, F, gate, w_down, x, y); });
  });
  return 0;
}
