// MoE routing: the choice of experts, the slots of assignments, and dispatch and combination of rows. Each sum is computed by one thread in
// one order.
#include <algorithm>
#include <numeric>
#include <vector>

#include "common.h"

enum : int { WRONG_INDEX = 3 };

static const int64_t SMALL = 1 << 15;  // elements below which threads cost more than they save

// A stable counting sort: the indices of the elements with key g are place[first[g]] .. place[first[g + 1] - 1], in order.
struct Sorted {
  std::vector<int64_t> first;
  std::vector<int32_t> place;

  // false: a key is not one of 0 .. kinds - 1
  bool sort(const int32_t *key, int64_t n, int64_t divisor, int64_t kinds) {
    first.assign(kinds + 1, 0);
    for (int64_t i = 0; i < n; i++) {
      if (key[i] < 0 || key[i] / divisor >= kinds) return false;
      first[key[i] / divisor + 1]++;
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    place.resize(n);
    for (int64_t i = 0; i < n; i++) place[next[key[i] / divisor]++] = static_cast<int32_t>(i);
    return true;
  }
};

// expert [T, k], E [1] -> slot [N], source [n, b], group [n]. some: an expert of number E is none.
static int plan_of(const Args &a, bool some) {
  if (!a.are("iiiii")) return WRONG_TYPES;
  const int64_t N = a.size(0), E = a.get<int32_t>(1)[0], n = a.size(4);
  if (a.ndims[0] != 2 || a.size(1) != 1 || a.size(2) != N || a.ndims[3] != 2 || a.dim(3, 0) != n || E < 1) return WRONG_SHAPES;
  const int64_t k = a.dim(0, 1), b = a.dim(3, 1);
  int32_t *slot = a.get<int32_t>(2), *source = a.get<int32_t>(3), *group = a.get<int32_t>(4);
  Sorted by_expert;
  if (!by_expert.sort(a.get<int32_t>(0), N, 1, E + some)) return WRONG_INDEX;
  std::fill_n(source, n * b, static_cast<int32_t>(a.dim(0, 0)));
  std::fill_n(group, n, static_cast<int32_t>(E));
  int64_t block = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t load = by_expert.first[e + 1] - by_expert.first[e], blocks = (load + b - 1) / b;
    if (block + blocks > n) return WRONG_SHAPES;
    std::fill_n(group + block, blocks, static_cast<int32_t>(e));
    for (int64_t i = 0; i < load; i++) {
      const int32_t at = by_expert.place[by_expert.first[e] + i];
      slot[at] = static_cast<int32_t>(block * b + i);
      source[block * b + i] = static_cast<int32_t>(at / k);
    }
    block += blocks;
  }
  for (int64_t i = by_expert.first[E]; i < N; i++) slot[by_expert.place[i]] = static_cast<int32_t>(n * b);
  return 0;
}

KERNEL(plan) { return plan_of(a, false); }
KERNEL(plan_some) { return plan_of(a, true); }

// expert [T, k], E [1] -> slot [N], source [s, C], local [s, C], lost [T, k]
KERNEL(send_plan) {
  if (!a.are("iiiiif")) return WRONG_TYPES;
  const int64_t N = a.size(0), E = a.get<int32_t>(1)[0];
  if (a.ndims[0] != 2 || a.size(1) != 1 || a.size(2) != N || a.ndims[3] != 2 || a.size(4) != a.size(3) || a.size(5) != N) return WRONG_SHAPES;
  const int64_t k = a.dim(0, 1), shards = a.dim(3, 0), C = a.dim(3, 1);
  if (shards < 1 || E < 1 || E % shards) return WRONG_SHAPES;
  const int64_t within = E / shards;
  const int32_t *expert = a.get<int32_t>(0);
  int32_t *slot = a.get<int32_t>(2), *source = a.get<int32_t>(3), *local = a.get<int32_t>(4);
  float *lost = a.get(5);
  Sorted by_shard;
  if (!by_shard.sort(expert, N, within, shards)) return WRONG_INDEX;
  std::fill_n(source, shards * C, static_cast<int32_t>(a.dim(0, 0)));
  std::fill_n(local, shards * C, static_cast<int32_t>(within));
  for (int64_t s = 0; s < shards; s++) {
    for (int64_t i = 0; i < by_shard.first[s + 1] - by_shard.first[s]; i++) {
      const int32_t at = by_shard.place[by_shard.first[s] + i];
      lost[at] = i < C ? 0.0f : 1.0f;
      slot[at] = static_cast<int32_t>(i < C ? s * C + i : shards * C);
      if (i >= C) continue;
      source[s * C + i] = static_cast<int32_t>(at / k);
      local[s * C + i] = static_cast<int32_t>(expert[at] - s * within);
    }
  }
  return 0;
}

static bool all_within(const int32_t *index, int64_t n, int64_t last) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < n; i++) low = std::min(low, index[i]), high = std::max(high, index[i]);
  return low >= 0 && high <= last;
}

// x [..., D], index [...] -> y [..., D]: rows of x, zeros for one past the last
KERNEL(take) {
  if (!a.are("fif")) return WRONG_TYPES;
  if (a.ndims[0] < 2 || a.dim(2, -1) != a.dim(0, -1) || a.size(2) != a.size(1) * a.dim(0, -1)) return WRONG_SHAPES;
  const int64_t D = a.dim(0, -1), M = a.size(1), rows = D ? a.size(0) / D : 0;
  const float *x = a.get(0);
  const int32_t *index = a.get<int32_t>(1);
  float *y = a.get(2);
  if (!all_within(index, M, rows)) return WRONG_INDEX;
#pragma omp parallel for schedule(static) if (M * D > SMALL)
  for (int64_t m = 0; m < M; m++) {
    if (index[m] < rows) {
      std::memcpy(y + m * D, x + index[m] * D, D * sizeof(float));
    } else {
      std::memset(y + m * D, 0, D * sizeof(float));
    }
  }
  return 0;
}

// x [..., D] for its shape, index [...], dy [..., D] -> dx: for each row the sum of those that were taken from it
KERNEL(take_grad) {
  if (!a.are("fiff")) return WRONG_TYPES;
  if (a.ndims[0] < 2 || a.dim(2, -1) != a.dim(0, -1) || a.size(2) != a.size(1) * a.dim(0, -1)) return WRONG_SHAPES;
  const int64_t D = a.dim(0, -1), M = a.size(1), rows = D ? a.size(0) / D : 0;
  const float *dy = a.get(2);
  float *dx = a.get(3);
  Sorted by_row;
  if (!by_row.sort(a.get<int32_t>(1), M, 1, rows + 1)) return WRONG_INDEX;
#pragma omp parallel for schedule(static) if (M * D > SMALL)
  for (int64_t r = 0; r < rows; r++) {
    float *out = dx + r * D;
    int64_t i = by_row.first[r];
    const int64_t end = by_row.first[r + 1];
    if (i == end) {
      std::memset(out, 0, D * sizeof(float));
    } else {
      std::memcpy(out, dy + by_row.place[i] * D, D * sizeof(float));
    }
    for (i++; i < end; i++) {
      const float *one = dy + by_row.place[i] * D;
#pragma omp simd
      for (int64_t d = 0; d < D; d++) out[d] += one[d];
    }
  }
  return 0;
}

// y [..., D], slot [R * k], weight [R, k] -> out [R, D]: sums of rows of y by weight
KERNEL(combine) {
  if (!a.are("fiff")) return WRONG_TYPES;
  if (a.ndims[0] < 2 || a.ndims[2] != 2 || a.size(1) != a.size(2) || a.size(3) != a.dim(2, 0) * a.dim(0, -1)) return WRONG_SHAPES;
  const int64_t D = a.dim(0, -1), R = a.dim(2, 0), k = a.dim(2, 1), rows = D ? a.size(0) / D : 0;
  const float *y = a.get(0), *weight = a.get(2);
  const int32_t *slot = a.get<int32_t>(1);
  float *out = a.get(3);
  if (!all_within(slot, R * k, rows)) return WRONG_INDEX;
#pragma omp parallel for schedule(static) if (R * k * D > SMALL)
  for (int64_t r = 0; r < R; r++) {
    float *sum = out + r * D;
    std::memset(sum, 0, D * sizeof(float));
    for (int64_t i = r * k; i < (r + 1) * k; i++) {
      if (slot[i] == rows) continue;
      const float *row = y + slot[i] * D, w = weight[i];
#pragma omp simd
      for (int64_t d = 0; d < D; d++) sum[d] += w * row[d];
    }
  }
  return 0;
}

// y, slot, weight, d_out [R, D] -> dy, d_weight
KERNEL(combine_grad) {
  if (!a.are("fiffff")) return WRONG_TYPES;
  if (a.ndims[0] < 2 || a.ndims[2] != 2 || a.size(1) != a.size(2) || a.size(3) != a.dim(2, 0) * a.dim(0, -1)) return WRONG_SHAPES;
  const int64_t D = a.dim(0, -1), R = a.dim(2, 0), k = a.dim(2, 1), rows = D ? a.size(0) / D : 0;
  const float *y = a.get(0), *weight = a.get(2), *d_out = a.get(3);
  float *dy = a.get(4), *d_weight = a.get(5);
  Sorted by_slot;
  if (!by_slot.sort(a.get<int32_t>(1), R * k, 1, rows + 1)) return WRONG_INDEX;
  for (int64_t i = by_slot.first[rows]; i < R * k; i++) d_weight[by_slot.place[i]] = 0.0f;
#pragma omp parallel for schedule(static) if (R * k * D > SMALL)
  for (int64_t m = 0; m < rows; m++) {
    float *to = dy + m * D;
    const float *row = y + m * D;
    std::memset(to, 0, D * sizeof(float));
    for (int64_t i = by_slot.first[m]; i < by_slot.first[m + 1]; i++) {
      const int32_t at = by_slot.place[i];
      const float *from = d_out + at / k * D, w = weight[at];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; d++) {
        to[d] += w * from[d];
        dot += row[d] * from[d];
      }
      d_weight[at] = dot;
    }
  }
  return 0;
}

// The k largest of score [E], the first among equals, in order. NaNs come last, but for those among the first k.
static void largest(const float *score, int64_t E, int64_t k, float *value, int32_t *index) {
  int64_t count = 0;
  for (int64_t e = 0; e < E; e++) {
    if (count == k && !(score[e] > value[k - 1])) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && score[e] > value[at - 1]; at--) value[at] = value[at - 1], index[at] = index[at - 1];
    value[at] = score[e], index[at] = static_cast<int32_t>(e);
  }
}

static void softmax(const float *x, int64_t n, float *y) {
  float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    y[i] = exp_float(x[i] - top);
    sum += y[i];
  }
  for (int64_t i = 0; i < n; i++) y[i] /= sum;
}

// logits [R, E] (, bias [E]) -> probs [R, E], expert [R, k], weight [R, k]
static int top_k_of(const Args &a, bool shares, bool biased) {
  if (!a.are(biased ? "fffif" : "ffif")) return WRONG_TYPES;
  const int p = biased ? 2 : 1;
  const int64_t R = a.dim(0, 0), E = a.dim(0, -1), k = a.dim(p + 1, -1);
  if (a.ndims[0] != 2 || a.size(p) != R * E || a.size(p + 1) != R * k || a.size(p + 2) != R * k || k < 1 || k > E) return WRONG_SHAPES;
  if (biased && a.size(1) != E) return WRONG_SHAPES;
  const float *logits = a.get(0), *bias = biased ? a.get(1) : nullptr;
  float *probs = a.get(p), *weight = a.get(p + 2);
  int32_t *expert = a.get<int32_t>(p + 1);
#pragma omp parallel if (R * E > SMALL / 4)
  {
    std::vector<float> score(E);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) {
      const float *row = probs + r * E;
      float *w = weight + r * k;
      softmax(logits + r * E, E, probs + r * E);
      for (int64_t e = 0; biased && e < E; e++) score[e] = row[e] + bias[e];
      largest(biased ? score.data() : row, E, k, w, expert + r * k);
      float sum = 0.0f;
      for (int64_t j = 0; j < k; j++) sum += w[j] = row[expert[r * k + j]];
      for (int64_t j = 0; shares && j < k; j++) w[j] /= sum;
    }
  }
  return 0;
}

KERNEL(top_k) { return top_k_of(a, false, false); }
KERNEL(top_k_shares) { return top_k_of(a, true, false); }
KERNEL(top_k_biased) { return top_k_of(a, false, true); }
KERNEL(top_k_shares_biased) { return top_k_of(a, true, true); }

// probs, expert, weight, d_probs [R, E], d_weight [R, k] -> d_logits [R, E]
static int top_k_grad_of(const Args &a, bool shares) {
  if (!a.are("fiffff")) return WRONG_TYPES;
  const int64_t R = a.dim(0, 0), E = a.dim(0, -1), k = a.dim(1, -1);
  if (a.ndims[0] != 2 || a.size(1) != R * k || a.size(2) != R * k || a.size(3) != R * E || a.size(4) != R * k) return WRONG_SHAPES;
  const float *probs = a.get(0), *weight = a.get(2), *d_probs = a.get(3), *d_weight = a.get(4);
  const int32_t *expert = a.get<int32_t>(1);
  float *d_logits = a.get(5);
  if (R * k > 0 && !all_within(expert, R * k, E - 1)) return WRONG_INDEX;
#pragma omp parallel for schedule(static) if (R * E > SMALL / 4)
  for (int64_t r = 0; r < R; r++) {
    const float *p = probs + r * E, *w = weight + r * k, *dw = d_weight + r * k;
    const int32_t *chosen = expert + r * k;
    float *dx = d_logits + r * E, mean = 0.0f, sum = 1.0f, dot = 0.0f;
    std::memcpy(dx, d_probs + r * E, E * sizeof(float));
    if (shares) {
      sum = 0.0f;
      for (int64_t j = 0; j < k; j++) sum += p[chosen[j]], mean += dw[j] * w[j];
    }
    for (int64_t j = 0; j < k; j++) dx[chosen[j]] += (dw[j] - mean) / sum;
#pragma omp simd reduction(+ : dot)
    for (int64_t e = 0; e < E; e++) dot += dx[e] * p[e];
    for (int64_t e = 0; e < E; e++) dx[e] = (dx[e] - dot) * p[e];
  }
  return 0;
}

KERNEL(top_k_grad) { return top_k_grad_of(a, false); }
KERNEL(top_k_shares_grad) { return top_k_grad_of(a, true); }
