// The feed-forward half of a layer for one token a row: norm, gate and up, SwiGLU, down and the residual sum.
#include <memory>

#include "norm.h"
#include "team.h"

// x [B, D], its norm w [D], gate, up [D, F], down [F, D], of any kind of matrix -> y [B, D]
template <typename W>
static void run(int64_t B, int64_t D, int64_t F, const float *x, const float *w, const W &w_gate, const W &w_up, const W &w_down, float eps,
                float *y) {
  const std::unique_ptr<float[]> memory(new float[B * (D + 2 * F)]);
  float *normed = memory.get(), *gate = normed + B * D, *up = gate + B * F;
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
}

// x [B, D], its norm [D], w_gate, w_up [D, F], w_down [F, D], eps -> y [B, D]
KERNEL(decode_mlp) {
  if (!a.are("fffffff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[2] != 2) return WRONG_SHAPES;
  const int64_t B = a.dim(0, 0), D = a.dim(0, 1), F = a.dim(2, 1), sizes[] = {B * D, D, D * F, D * F, F * D, 1, B * D};
  for (int i = 0; i < 7; i++)
    if (a.size(i) != sizes[i]) return WRONG_SHAPES;
  const float *w_gate = a.get(2), *w_up = a.get(3), *w_down = a.get(4);
  run(B, D, F, a.get(0), a.get(1), w_gate, w_up, w_down, *a.get(5), a.get(6));
  return 0;
}

// x [B, D], its norm [D], in 8 bits w_gate, w_up [F, D] and w_down [D, F], their scales [F, g], [F, g], [D, h], eps -> y [B, D]
KERNEL(decode_mlp_int8) {
  if (!a.are("ffbbbfffff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[2] != 2 || a.ndims[5] != 2 || a.ndims[7] != 2) return WRONG_SHAPES;
  const int64_t B = a.dim(0, 0), D = a.dim(0, 1), F = a.dim(2, 0), g = a.dim(5, 1), h = a.dim(7, 1);
  const int64_t sizes[] = {B * D, D, D * F, D * F, F * D, F * g, F * g, D * h, 1, B * D};
  for (int i = 0; i < 10; i++)
    if (a.size(i) != sizes[i]) return WRONG_SHAPES;
  if (g == 0 || h == 0 || D % g || F % h) return WRONG_SHAPES;
  const int8::Matrix w_gate{a.get<int8_t>(2), a.get(5), D, g}, w_up{a.get<int8_t>(3), a.get(6), D, g}, w_down{a.get<int8_t>(4), a.get(7), F, h};
  run(B, D, F, a.get(0), a.get(1), w_gate, w_up, w_down, *a.get(8), a.get(9));
  return 0;
}
