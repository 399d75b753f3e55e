// Shared by the forward and backward of attention: inputs, masks, 2 ** x and scratch memory.
//
// FlashAttention-2 (Dao 2023), which stores no matrix of scores: tiles of keys and queries, a running maximum, and the log-sum-exp of each
// query for the backward. The G query heads of a kv head are rows of one tile. Exponentials have base 2.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common.h"
#include "gemm.h"

constexpr int64_t MOST_KEYS = 256, ROWS = 32;  // of a tile; a row is a query of one head
constexpr int64_t WORTH_THREADS = 1 << 19;     // multiply-adds, some 10 us
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

// 2 ** x to one unit in the last place for x below 128; 0 below -125. A polynomial of degree 6 on [-1/2, 1/2], fitted by its relative
// error.
inline Vec exp2_of(Vec x) {
  const float low = -125.0f, to_integer = 12582912.0f;  // 1.5 * 2 ** 23: in a sum with it the last bit stands for 1
  Vec c = x < low ? Vec{} + low : x;
  Vec shifted = c + to_integer;
  Vec r = c - (shifted - to_integer);
  Vec p = 1.534581191e-4f * r + 1.339993122e-3f;
  p = p * r + 9.618488957e-3f;
  p = p * r + 5.550328777e-2f;
  p = p * r + 2.402264689e-1f;
  p = p * r + 6.931472057e-1f;
  p = p * r + 1.0f;
  Vec y = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
  return x < low ? Vec{} : y;
}

// Memory of one thread, and the pieces of it that are handed out, each at the beginning of a cache line.
struct Memory {
  explicit Memory(int64_t floats) : data(static_cast<float *>(std::aligned_alloc(64, (floats + 16 * 32) / 16 * 64)), std::free) {}
  std::unique_ptr<float, void (*)(void *)> data;
};

struct Pieces {
  explicit Pieces(const Memory &memory) : at(memory.data.get()) {}
  template <typename T = float>
  T *take(int64_t n) {
    float *piece = at;
    at += (n + 15) / 16 * 16;
    return reinterpret_cast<T *>(piece);
  }
  float *at;
};

// The least and the greatest segment and order of a block of tokens.
struct Span {
  int32_t segment[2] = {INT_MAX, INT_MIN}, order[2] = {INT_MAX, INT_MIN};

  void add(int32_t s, int32_t o) {
    segment[0] = std::min(segment[0], s), segment[1] = std::max(segment[1], s);
    order[0] = std::min(order[0], o), order[1] = std::max(order[1], o);
  }
  // Whether a query with this span may see a key with that.
  bool may_see(const Span &key) const {
    return segment[0] <= key.segment[1] && key.segment[0] <= segment[1] && key.order[0] <= order[1];
  }
  // Whether every query sees every key.
  bool sees_all(const Span &key) const {
    return segment[0] == segment[1] && key.segment[0] == key.segment[1] && segment[0] == key.segment[0] && key.order[1] <= order[0];
  }
};

inline Span span_of(const int32_t *segment, const int32_t *order, int64_t n) {
  Span span;
  for (int64_t i = 0; i < n; i++) span.add(segment[i], order[i]);
  return span;
}

// The spans of `rows` rows of `length` tokens, in blocks.
inline std::vector<Span> spans_of(const int32_t *segment, const int32_t *order, int64_t rows, int64_t length, int64_t block) {
  std::vector<Span> spans;
  for (int64_t b = 0; b < rows; b++) {
    for (int64_t i = 0; i < length; i += block) {
      spans.push_back(span_of(segment + b * length + i, order + b * length + i, std::min(block, length - i)));
    }
  }
  return spans;
}

// to[i] = from[i] * factor for rows of n floats.
inline void scale_rows(int64_t rows, int64_t n, const float *from, int64_t ld_from, float *to, int64_t ld_to, float factor) {
  for (int64_t r = 0; r < rows; r++) {
    const float *x = from + r * ld_from;
    float *y = to + r * ld_to;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor;
  }
}

// The same into rows of `wide` floats, with zeros after the first n.
inline void scale_padded(int64_t rows, int64_t n, const float *from, int64_t ld_from, float *to, int64_t wide, float factor) {
  scale_rows(rows, n, from, ld_from, to, wide, factor);
  if (n == wide) return;
  for (int64_t r = 0; r < rows; r++) std::fill(to + r * wide + n, to + (r + 1) * wide, 0.0f);
}

// Has rows brought into the second level cache: one head's are too far apart for the processor to foresee them.
inline void prefetch(int64_t rows, int64_t n, const float *from, int64_t ld) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(from + r * ld + i, 0, 2);
    asm volatile("");  // else GCC sees a function without effects, and drops its calls
  }
}

// The inputs that forward and backward share, the first eight.
struct Problem {
  int64_t B, S, N, H, T, K, G;
  int64_t wide;           // H padded to whole vectors
  int64_t queries, keys;  // of a tile
  const float *q, *k, *v;
  const int32_t *segment, *key_segment, *order, *key_order;
  float scale;
  const int32_t *table = nullptr;  // [B, M], the pages of C keys in which a row's keys are; without it they are next to each other
  int64_t C = 0, M = 0;

  bool read(const Args &a) {
    if (a.ndims[0] != 4 || a.ndims[1] != 4 || a.ndims[2] != 4) return false;
    B = a.dim(0, 0), S = a.dim(0, 1), N = a.dim(0, 2), H = a.dim(0, 3), T = a.dim(1, 1), K = a.dim(1, 2);
    if (a.dim(1, 0) != B || a.dim(1, 3) != H || K == 0 || N % K) return false;
    for (int d = 0; d < 4; d++) {
      if (a.dim(2, d) != a.dim(1, d)) return false;
    }
    for (int i = 3; i < 7; i++) {
      if (a.ndims[i] != 2 || a.dim(i, 0) != B || a.dim(i, 1) != (i % 2 ? S : T)) return false;
    }
    if (a.size(7) != 1) return false;
    G = N / K, wide = padded(H);
    queries = std::max<int64_t>(1, (T > 2048 ? 2 * ROWS : ROWS) / std::max<int64_t>(G, 1));  // keys that fill the cache are read less often
    keys = std::min(wide > 128 ? MOST_KEYS / 2 : MOST_KEYS, padded(std::max<int64_t>(T, 1)));  // they stay in the second level cache
    while (keys > 64 && B * K * key_blocks() < 32) keys = padded(keys / 2);  // so that many threads have work
    q = a.get(0), k = a.get(1), v = a.get(2), scale = *a.get(7);
    segment = a.get<int32_t>(3), key_segment = a.get<int32_t>(4), order = a.get<int32_t>(5), key_order = a.get<int32_t>(6);
    return true;
  }
  // The first of the G rows, next to each other, of a query and kv head; the row of a key.
  int64_t q_at(int64_t b, int64_t s, int64_t head) const { return ((b * S + s) * N + head * G) * H; }
  int64_t k_at(int64_t b, int64_t t, int64_t head) const { return ((table ? table[b * M + t / C] * C + t % C : b * T + t) * K + head) * H; }
  // How many keys from key t on are next to each other.
  int64_t together(int64_t t) const { return table ? C - t % C : T - t; }
  // A query's G rows, in scores' units to base 2.
  void copy_queries(int64_t b, int64_t s, int64_t head, float *to) const {
    scale_padded(G, H, q + q_at(b, s, head), H, to, wide, scale * LOG2E);
  }
  int64_t blocks() const { return (S + queries - 1) / queries; }
  int64_t key_blocks() const { return (T + keys - 1) / keys; }
  int threads(int64_t multiply_adds) const { return multiply_adds < WORTH_THREADS ? 1 : omp_get_max_threads(); }
};

// The part [first, last) of `n` keys in which all are that a query of this span may see.
inline void trim_keys(const Span &query, const int32_t *segment, const int32_t *order, int64_t n, int64_t *first, int64_t *last) {
  auto unseen = [&](int64_t i) { return segment[i] < query.segment[0] || segment[i] > query.segment[1] || order[i] > query.order[1]; };
  *first = 0, *last = n;
  while (*first < n && unseen(*first)) ++*first;
  while (*last > *first && unseen(*last - 1)) --*last;
}

// The part [first, last) of `n` queries in which all are that may see a key of this span.
inline void trim_queries(const Span &key, const int32_t *segment, const int32_t *order, int64_t n, int64_t *first, int64_t *last) {
  auto blind = [&](int64_t i) { return segment[i] < key.segment[0] || segment[i] > key.segment[1] || order[i] < key.order[0]; };
  *first = 0, *last = n;
  while (*first < n && blind(*first)) ++*first;
  while (*last > *first && blind(*last - 1)) --*last;
}
