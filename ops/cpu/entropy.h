// Sums of exponentials over rows of logits, and one picked element of each row, without storing probabilities.
#pragma once
#include "common.h"

static const int64_t BLOCK = 1024;  // columns, which are read for their largest and then from L1 for the sum

static inline float largest(const float *z, int64_t n) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) top = z[i] > top ? z[i] : top;
  return top;
}

static inline float sum_exp(const float *z, int64_t n, float shift) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += exp_float(z[i] - shift);
  return sum;
}

// Of a row: its largest, and sum(exp(z - largest)); (-inf, 0) of nothing but -inf.
struct Sum {
  float top = -INFINITY;
  double total = 0;

  // In one pass: where a block's largest is above those before it, the sum so far is scaled down.
  Sum(const float *z, int64_t n) {
    for (int64_t at = 0; at < n; at += BLOCK) {
      const int64_t size = std::min(BLOCK, n - at);
      const float above = std::max(top, largest(z + at, size));
      if (above > top) total *= std::exp(static_cast<double>(top) - above);
      total += sum_exp(z + at, size, above == -INFINITY ? 0.0f : above);  // also of a block of -inf, for it may hold a NaN
      top = above;
    }
  }
};

// z [R, V], the place of the picked column [R] -> the largest, sum(exp(z - largest)), the picked column (0 for a place in none)
static inline void measure_rows(int64_t R, int64_t V, const float *z, const int32_t *at, float *top, float *total, float *picked) {
#pragma omp parallel for schedule(static) if (R * V >= THREADS_FROM)
  for (int64_t r = 0; r < R; r++) {
    const Sum sum(z + r * V, V);
    top[r] = sum.top, total[r] = static_cast<float>(sum.total);
    picked[r] = at[r] >= 0 && at[r] < V ? z[r * V + at[r]] : 0.0f;
  }
}

// dz = d sum exp(z - largest), and d picked more at the place; dz may be z
static inline void entropy_grad(int64_t R, int64_t V, const float *z, const int32_t *at, const float *top, const float *weight,
                                const float *dpicked, float *dz) {
#pragma omp parallel for schedule(static) if (R * V >= THREADS_FROM)
  for (int64_t r = 0; r < R; r++) {
    const float *from = z + r * V, most = top[r], w = weight[r];
    float *to = dz + r * V;
    if (most == -INFINITY) {  // the row is nothing but -inf
      std::fill_n(to, V, 0.0f);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < V; i++) to[i] = w * exp_float(from[i] - most);
    }
    if (at[r] >= 0 && at[r] < V) to[at[r]] += dpicked[r];
  }
}
