// RMS norm of rows, alone and with a residual sum in the same pass; and the gradients.
#include "common.h"
#include "norm.h"

template <bool ADD>
static void norm_rows(const float *x, const float *y, const float *w, float *h, float *out, Rows size, float eps) {
#pragma omp parallel for schedule(static) if (size.worth_threads())
  for (int64_t r = 0; r < size.rows; r++) {
    int64_t at = r * size.n;
    norm_row<ADD>(x + at, ADD ? y + at : nullptr, w, ADD ? h + at : nullptr, out + at, size.n, eps);
  }
}

// x [..., n], w [n], eps -> like x
KERNEL(rms_norm) {
  if (!a.are("ffff")) return WRONG_TYPES;
  const Rows size(a, 0);
  if (a.size(1) != size.n || a.size(2) != 1) return WRONG_SHAPES;
  norm_rows<false>(a.get(0), nullptr, a.get(1), nullptr, a.get(3), size, *a.get(2));
  return 0;
}

// x, y [..., n], w [n], eps -> h = x + y, its norm
KERNEL(rms_norm_add) {
  if (!a.are("ffffff")) return WRONG_TYPES;
  const Rows size(a, 0);
  if (a.size(1) != a.size(0) || a.size(2) != size.n || a.size(3) != 1) return WRONG_SHAPES;
  norm_rows<true>(a.get(0), a.get(1), a.get(2), a.get(4), a.get(5), size, *a.get(3));
  return 0;
}

// One row's dx, and what it adds to dw. With `dh`, the gradient of x on another way, dx is the sum.
template <bool ADD>
static inline void grad_row(const float *x, const float *w, const float *dy, const float *dh, float *dx, float *dw, int64_t n, float eps) {
  float squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
  for (int64_t i = 0; i < n; i++) {
    squares += x[i] * x[i];
    dot += dy[i] * w[i] * x[i];
  }
  const float scale = inverse_rms(squares, n, eps), back = back_scale(scale, dot, n);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float d = (dy[i] * w[i] - x[i] * back) * scale;
    dx[i] = ADD ? d + dh[i] : d;
    dw[i] += dy[i] * (x[i] * scale);
  }
}

template <bool ADD>
static void grad_rows(const float *x, const float *w, const float *dy, const float *dh, float *dx, float *dw, Rows size, float eps) {
  const int64_t n = size.n;
  sum_of_parts(size, dw, [=](int64_t r, float *part) {
    int64_t at = r * n;
    grad_row<ADD>(x + at, w, dy + at, ADD ? dh + at : nullptr, dx + at, part, n, eps);
  });
}

// x [..., n], w [n], eps, dy -> dx, dw
KERNEL(rms_norm_grad) {
  if (!a.are("ffffff")) return WRONG_TYPES;
  const Rows size(a, 0);
  if (a.size(1) != size.n || a.size(2) != 1 || a.size(3) != a.size(0)) return WRONG_SHAPES;
  grad_rows<false>(a.get(0), a.get(1), a.get(3), nullptr, a.get(4), a.get(5), size, *a.get(2));
  return 0;
}

// h [..., n], w [n], eps, d norm, dh -> d x (and d y), dw
KERNEL(rms_norm_add_grad) {
  if (!a.are("fffffff")) return WRONG_TYPES;
  const Rows size(a, 0);
  if (a.size(1) != size.n || a.size(2) != 1 || a.size(3) != a.size(0) || a.size(4) != a.size(0)) return WRONG_SHAPES;
  grad_rows<true>(a.get(0), a.get(1), a.get(3), a.get(4), a.get(5), a.get(6), size, *a.get(2));
  return 0;
}
