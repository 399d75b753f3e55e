// Rotary embedding of half-split pairs, alone and after an RMS norm of each head, and their gradients.
#include "common.h"
#include "norm.h"

// x [B, S, N, H]; cos and sin have a row of H / 2 angles for each (b, s).
struct Heads {
  int64_t tokens, heads, half;

  Heads(const Args &a, int x) : tokens(0), heads(0), half(0) {
    if (a.ndims[x] != 4) return;
    tokens = a.dim(x, 0) * a.dim(x, 1), heads = a.dim(x, 2), half = a.dim(x, 3) / 2;
  }
  bool fits(const Args &a, int x, int cos, int sin) const {
    if (a.ndims[x] != 4 || a.dim(x, 3) % 2) return false;
    for (int i : {cos, sin})
      if (a.ndims[i] != 4 || a.dim(i, 0) != a.dim(x, 0) || a.dim(i, 1) != a.dim(x, 1) || a.dim(i, 2) != 1 || a.dim(i, 3) != half) return false;
    return true;
  }
  Rows rows() const { return Rows(tokens * heads, 2 * half); }
};

// y = x turned by the angle, or, with SIGN = -1, back.
template <int SIGN>
static void turn(const float *x, const float *cos, const float *sin, float *y, Heads size) {
  with_constant_half(size.half, [=](auto constant) {
    const int64_t half = constant ? constant : size.half;
#pragma omp parallel for schedule(static) if (size.rows().worth_threads())
    for (int64_t t = 0; t < size.tokens; t++) {
      const float *c = cos + t * half, *s = sin + t * half;
      for (int64_t r = t * size.heads; r < (t + 1) * size.heads; r++) {
        const float *from = x + r * 2 * half;
        float *to = y + r * 2 * half;
#pragma omp simd
        for (int64_t i = 0; i < half; i++) {
          float a = from[i], b = from[i + half], turned = SIGN * s[i];
          to[i] = a * c[i] - b * turned;
          to[i + half] = b * c[i] + a * turned;
        }
      }
    }
  });
}

// x, cos, sin -> y
KERNEL(rope) {
  if (!a.are("ffff")) return WRONG_TYPES;
  const Heads size(a, 0);
  if (!size.fits(a, 0, 1, 2)) return WRONG_SHAPES;
  turn<1>(a.get(0), a.get(1), a.get(2), a.get(3), size);
  return 0;
}

// dy, cos, sin -> dx
KERNEL(rope_grad) {
  if (!a.are("ffff")) return WRONG_TYPES;
  const Heads size(a, 0);
  if (!size.fits(a, 0, 1, 2)) return WRONG_SHAPES;
  turn<-1>(a.get(0), a.get(1), a.get(2), a.get(3), size);
  return 0;
}

// x, w [H], cos, sin, eps -> the norm of each head, turned
KERNEL(rope_norm) {
  if (!a.are("ffffff")) return WRONG_TYPES;
  const Heads size(a, 0);
  if (!size.fits(a, 0, 2, 3) || a.size(1) != 2 * size.half || a.size(4) != 1) return WRONG_SHAPES;
  const float *x = a.get(0), *w = a.get(1), *cos = a.get(2), *sin = a.get(3), eps = *a.get(4);
  float *y = a.get(5);
  with_constant_half(size.half, [=](auto constant) {
    const int64_t half = constant ? constant : size.half;
#pragma omp parallel for schedule(static) if (size.rows().worth_threads())
    for (int64_t t = 0; t < size.tokens; t++) {
      const float *c = cos + t * half, *s = sin + t * half;
      for (int64_t r = t * size.heads; r < (t + 1) * size.heads; r++) {
        norm_turn_head(x + r * 2 * half, w, c, s, half, eps, y + r * 2 * half);
      }
    }
  });
  return 0;
}

// x, w [H], cos, sin, eps, dy -> dx, dw
KERNEL(rope_norm_grad) {
  if (!a.are("ffffffff")) return WRONG_TYPES;
  const Heads size(a, 0);
  if (!size.fits(a, 0, 2, 3) || a.size(1) != 2 * size.half || a.size(4) != 1 || a.size(5) != a.size(0)) return WRONG_SHAPES;
  const float *x = a.get(0), *w = a.get(1), *cos = a.get(2), *sin = a.get(3), eps = *a.get(4), *dy = a.get(5);
  float *dx = a.get(6), *dw = a.get(7);
  with_constant_half(size.half, [=](auto constant) {
    const int64_t half = constant ? constant : size.half;
    sum_of_parts(size.rows(), dw, [=](int64_t r, float *part) {
      const float *c = cos + r / size.heads * half, *s = sin + r / size.heads * half;
      const float *from = x + r * 2 * half, *dto = dy + r * 2 * half;
      float *dfrom = dx + r * 2 * half, squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
      for (int64_t i = 0; i < half; i++) {
        float p = dto[i] * c[i] + dto[i + half] * s[i], q = dto[i + half] * c[i] - dto[i] * s[i];
        dfrom[i] = p, dfrom[i + half] = q;
        squares += from[i] * from[i] + from[i + half] * from[i + half];
        dot += p * w[i] * from[i] + q * w[i + half] * from[i + half];
      }
      const float scale = inverse_rms(squares, 2 * half, eps), back = back_scale(scale, dot, 2 * half);
#pragma omp simd
      for (int64_t i = 0; i < 2 * half; i++) {
        float d = dfrom[i];
        dfrom[i] = (d * w[i] - from[i] * back) * scale;
        part[i] += d * (from[i] * scale);
      }
    });
  });
  return 0;
}
