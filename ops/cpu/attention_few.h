// Attention of a few queries, as in decoding, over the keys of a cache.
#pragma once
#include <cfloat>

#include "attention.h"

namespace {

constexpr float UNSEEN = -1e9f;  // the lse of a query that sees no key: MASKED in ops/attention.py

inline float largest(Vec x) {
  float top = x[0];
  for (int i = 1; i < LANES; i++) top = std::max(top, x[i]);
  return top;
}

inline float total(Vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

// The result of one row: its mix of values over its sum of weights.
void write_row(const Problem &p, int64_t b, int64_t s, int64_t n, const float *mix, float top, float sum, float *o, float *lse) {
  const int64_t row = (b * p.S + s) * p.N + n;
  const bool seen = sum != 0;  // also for NaN
  scale_rows(1, p.H, mix, 0, o + row * p.H, 0, seen ? 1.0f / sum : 0.0f);
  lse[row] = seen ? (top + std::log2(sum)) * LN2 : UNSEEN;
}

// What a few queries see by their segments and orders.
struct Masked {
  const Problem &p;

  // The part of a row's keys that its queries may see, to whole vectors of keys where there are as many.
  void range(int64_t b, int64_t *from, int64_t *to) const {
    const Span query = span_of(p.segment + b * p.S, p.order + b * p.S, p.S);
    trim_keys(query, p.key_segment + b * p.T, p.key_order + b * p.T, p.T, from, to);
    *from = *from / LANES * LANES;
    *to = std::min(p.T, padded(*to));
  }
  // How many of n keys may be in the sum of values.
  int64_t seen(int64_t, int64_t, int64_t n) const { return n; }
  // Of the scores of n keys for query s those that it does not see become -inf.
  void hide(int64_t b, int64_t s, int64_t start, int64_t n, float *scores) const {
    const int32_t own = p.segment[b * p.S + s], now = p.order[b * p.S + s];
    const int32_t *segment = p.key_segment + b * p.T + start, *order = p.key_order + b * p.T + start;
    for (int64_t t = 0; t < n; t++) scores[t] = segment[t] == own && order[t] <= now ? scores[t] : -INFINITY;
  }
};

// One query a row, at position at[b], which sees the keys 0 ... at[b] of its row, and none if the row has no page for one of them. What is in
// the pages after these keys changes nothing.
struct UpTo {
  const Problem &p;
  const int32_t *at;
  int64_t pages;  // of the cache

  bool sees(int64_t b) const {
    if (at[b] < 0 || at[b] >= p.M * p.C) return false;
    const int32_t *page = p.table + b * p.M;
    return std::all_of(page, page + at[b] / p.C + 1, [&](int32_t i) { return i >= 0 && i < pages; });
  }
  void range(int64_t b, int64_t *from, int64_t *to) const { *from = 0, *to = sees(b) ? at[b] + int64_t{1} : 0; }
  int64_t seen(int64_t b, int64_t start, int64_t n) const { return std::min<int64_t>(n, at[b] + int64_t{1} - start); }
  void hide(int64_t b, int64_t, int64_t start, int64_t n, float *scores) const {
    for (int64_t t = 0; t < n; t++) scores[t] = start + t <= at[b] ? scores[t] : -INFINITY;
  }
};

// For a few rows, as in decoding: the head dim lies in the lanes, so that none is idle, and keys are read where they are.

// Seen: which keys queries see, range(), seen() and hide() as of Masked.
template <typename Seen>
struct Few {
  const Problem &p;
  const Seen seen;
  float *o, *lse;

  static constexpr int64_t BLOCK = 64;  // keys

  int64_t floats() const { return p.S * p.G * (2 * p.wide + BLOCK + 2) + 2 * BLOCK * p.wide; }

  void block(int64_t b, int64_t head, int64_t from, int64_t to, Pieces pieces) const {
    const int64_t M = p.S * p.G, apart = p.K * p.H;
    float *q = pieces.take(M * p.wide), *mix = pieces.take(M * p.wide), *scores = pieces.take(M * BLOCK);
    float *copies[2] = {pieces.take(BLOCK * p.wide), pieces.take(BLOCK * p.wide)};
    float *top = pieces.take(M), *sum = pieces.take(M);
    std::fill(top, top + M, -FLT_MAX);
    std::fill(sum, sum + M, 0.0f);
    std::fill(mix, mix + M * p.wide, 0.0f);
    for (int64_t s = 0; s < p.S; s++) p.copy_queries(b, s, head, q + s * p.G * p.wide);
    for (int64_t start = from, n; start < to; start += n) {
      n = std::min({BLOCK, p.together(start), to - start});
      const float *k = p.k + p.k_at(b, start, head), *v = p.v + p.k_at(b, start, head);
      if (const int64_t next = start + n; next < to) {
        const int64_t rest = std::min({BLOCK, p.together(next), to - next});
        prefetch(rest, p.H, p.k + p.k_at(b, next, head), apart);
        prefetch(rest, p.H, p.v + p.k_at(b, next, head), apart);
      }
      int64_t step = apart;
      if (p.H % LANES || padded(n) > p.together(start)) {
        scale_padded(n, p.H, k, apart, copies[0], p.wide, 1.0f);
        scale_padded(n, p.H, v, apart, copies[1], p.wide, 1.0f);
        k = copies[0], v = copies[1], step = p.wide;
      }
      for (int64_t m = 0; m < M; m++) {
        score(padded(n), k, step, q + m * p.wide, scores + m * BLOCK);
        const float alpha = soften(b, m / p.G, start, n, scores + m * BLOCK, top + m, sum + m);
        for (int64_t h = 0; h < p.wide; h++) mix[m * p.wide + h] *= alpha;
      }
      product<false>(M, p.wide, seen.seen(b, start, n), scores, BLOCK, v, step, mix, p.wide, true);
    }
    for (int64_t m = 0; m < M; m++) write_row(p, b, m / p.G, head * p.G + m % p.G, mix + m * p.wide, top[m], sum[m], o, lse);
  }

  void score(int64_t n, const float *k, int64_t step, const float *q, float *scores) const {
    for (int64_t t = 0; t < n; t += LANES) {
      Vec sum[LANES] = {};
      for (int64_t h = 0; h < p.wide; h += LANES) {
        const Vec x = load(q + h);
        for (int i = 0; i < LANES; i++) sum[i] += x * load(k + (t + i) * step + h);
      }
      store(scores + t, sums_of_lanes(sum));
    }
  }

  // Scores of keys start ... start + n - 1 for query s -> 2 ** (score - top). Returns the factor of all that is summed so far.
  float soften(int64_t b, int64_t s, int64_t start, int64_t n, float *scores, float *top, float *sum) const {
    seen.hide(b, s, start, n, scores);
    for (int64_t t = n; t < padded(n); t++) scores[t] = -INFINITY;
    Vec most = Vec{} + *top, added = {};
    for (int64_t t = 0; t < n; t += LANES) {
      const Vec x = load(scores + t);
      most = x > most ? x : most;
    }
    const float high = largest(most), alpha = exp2_of(Vec{} + (*top - high))[0];
    for (int64_t t = 0; t < n; t += LANES) {
      const Vec x = exp2_of(load(scores + t) - high);
      store(scores + t, x);
      added += x;
    }
    *top = high;
    *sum = *sum * alpha + total(added);
    return alpha;
  }
};

}  // namespace
