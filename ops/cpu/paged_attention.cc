// Attention of one query a row over the pages of a KV cache, a block of a page at a time with a running maximum.
#include <cfloat>

#include "attention.h"

namespace {

constexpr int64_t AT_ONCE = 64;  // keys
constexpr int NO_PAGE = 3;       // an error: a page that is not in the cache, or a length that the table has no room for

struct Paged {
  int64_t B, N, H, P, C, K, M, G;
  const float *q, *k, *v;
  const int32_t *table, *length;
  float scale, *o;

  bool read(const Args &a) {
    if (a.ndims[0] != 3 || a.ndims[1] != 4 || a.ndims[3] != 2) return false;
    B = a.dim(0, 0), N = a.dim(0, 1), H = a.dim(0, 2), P = a.dim(1, 0), C = a.dim(1, 1), K = a.dim(1, 2), M = a.dim(3, 1);
    if (K == 0 || N % K || C == 0) return false;
    const int64_t cache = P * C * K * H, sizes[] = {B * N * H, cache, cache, B * M, B, 1, B * N * H};
    for (int i = 0; i < 7; i++)
      if (a.size(i) != sizes[i]) return false;
    G = N / K, q = a.get(0), k = a.get(1), v = a.get(2), table = a.get<int32_t>(3), length = a.get<int32_t>(4), scale = *a.get(5);
    o = a.get(6);
    return true;
  }
  bool has_pages() const {
    for (int64_t b = 0; b < B; b++) {
      if (length[b] > M * C) return false;
      for (int64_t m = 0; m * C < length[b]; m++)
        if (table[b * M + m] < 0 || table[b * M + m] >= P) return false;
    }
    return true;
  }
  // The heads of a row that share a kv head.
  void heads(int64_t b, int64_t head) const {
    const int64_t first = (b * N + head * G) * H;
    std::vector<float> top(G, -FLT_MAX), sum(G, 0.0f), weight(AT_ONCE);
    std::fill_n(o + first, G * H, 0.0f);
    for (int64_t t = 0; t < length[b]; t += std::min(AT_ONCE, C - t % C)) {
      const int64_t n = std::min({AT_ONCE, C - t % C, length[b] - t}), at = ((table[b * M + t / C] * C + t % C) * K + head) * H;
      for (int64_t g = 0; g < G; g++)
        add(n, q + first + g * H, k + at, v + at, weight.data(), &top[g], &sum[g], o + first + g * H);
    }
    for (int64_t g = 0; g < G; g++)
      for (int64_t h = 0; h < H; h++) o[first + g * H + h] = sum[g] != 0 ? o[first + g * H + h] / sum[g] : 0.0f;
  }
  // Adds n keys to the mix of one query.
  void add(int64_t n, const float *query, const float *key, const float *value, float *weight, float *top, float *sum, float *mix) const {
    float most = *top;
    for (int64_t t = 0; t < n; t++) {
      float score = 0;
#pragma omp simd reduction(+ : score)
      for (int64_t h = 0; h < H; h++) score += query[h] * key[t * K * H + h];
      weight[t] = score * scale;
      most = weight[t] > most ? weight[t] : most;
    }
    const float fall = exp_float(*top - most);
    *top = most, *sum *= fall;
    for (int64_t t = 0; t < n; t++) weight[t] = exp_float(weight[t] - most), *sum += weight[t];
    for (int64_t h = 0; h < H; h++) mix[h] *= fall;
    for (int64_t t = 0; t < n; t++)
#pragma omp simd
      for (int64_t h = 0; h < H; h++) mix[h] += weight[t] * value[t * K * H + h];
  }
};

}  // namespace

// q [B, N, H], pages of keys and of values [P, C, K, H], table [B, M], length [B], scale -> o [B, N, H]
KERNEL(paged_attention) {
  if (!a.are("fffiiff")) return WRONG_TYPES;
  Paged p;
  if (!p.read(a)) return WRONG_SHAPES;
  if (!p.has_pages()) return NO_PAGE;
#pragma omp parallel for schedule(dynamic) if (p.B * p.N * p.H * p.M * p.C > WORTH_THREADS)
  for (int64_t i = 0; i < p.B * p.K; i++) p.heads(i / p.K, i % p.K);
  return 0;
}
