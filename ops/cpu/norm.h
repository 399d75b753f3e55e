// RMS norms of one row, and of one head with its rotary embedding.
#pragma once
#include <type_traits>

#include "common.h"

// The norm of one row. If `y` is not null, it is added to x first, and the sum is stored in `h`.
template <bool ADD>
static inline void norm_row(const float *x, const float *y, const float *w, float *h, float *out, int64_t n, float eps) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) {
    float v = ADD ? x[i] + y[i] : x[i];
    if (ADD) h[i] = v;
    squares += v * v;
  }
  const float *from = ADD ? h : x;
  const float scale = inverse_rms(squares, n, eps);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = from[i] * scale * w[i];
}

// f(H / 2 as a constant) for the usual sizes, so that the compiler unrolls the loops over a head; f(0) for others.
template <typename F>
static void with_constant_half(int64_t half, F f) {
  switch (half) {
    case 16: return f(std::integral_constant<int64_t, 16>());
    case 32: return f(std::integral_constant<int64_t, 32>());
    case 64: return f(std::integral_constant<int64_t, 64>());
    default: return f(std::integral_constant<int64_t, 0>());
  }
}

// One head of half-split pairs: its norm, turned by the angles of its token.
static inline void norm_turn_head(const float *x, const float *w, const float *cos, const float *sin, int64_t half, float eps, float *y) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < 2 * half; i++) squares += x[i] * x[i];
  const float scale = inverse_rms(squares, 2 * half, eps);
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float p = x[i] * scale * w[i], q = x[i + half] * scale * w[i + half];
    y[i] = p * cos[i] - q * sin[i];
    y[i + half] = q * cos[i] + p * sin[i];
  }
}
