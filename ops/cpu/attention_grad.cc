// The backward of attention; see attention.h.
#include "attention.h"

#include <atomic>
#include <thread>

namespace {

// The layout of scores is [row][key]: keys are SIMD lanes, and a block of keys is transposed once for all queries. A task is a block of
// keys and computes its dk and dv. Tasks add to dq in the order of their keys, so sums do not depend on the number of threads.

struct Backward {
  const Problem &p;
  const std::vector<Span> &spans, &key_spans;
  const float *lse, *dO, *delta;  // delta_BSN = sum of do * o, less d lse
  float *dq, *dk, *dv;
  std::atomic<int64_t> *last;  // of each kv head's query blocks: the last key block that has added to dq, or -1

  int64_t rows() const { return p.queries * p.G; }
  int64_t step() const { return p.keys + LANES; }
  int64_t floats() const { return (5 * p.keys + 3 * rows()) * p.wide + 2 * (p.wide + rows()) * step() + 4 * rows(); }

  struct Keys {
    int64_t b, head, j, n;
    float *k, *v, *k_turned, *v_turned, *dk, *dv;  // [keys][wide], turned [wide][step]
  };
  struct Queries {
    float *q, *dO, *dq, *lse, *delta;
    int32_t *segment, *order;
  };

  void block(int64_t b, int64_t head, int64_t j, Pieces pieces) const {
    const int64_t n = std::min(p.keys, p.T - j * p.keys), size = p.keys * p.wide, at = p.k_at(b, j * p.keys, head);
    const int64_t turned = p.wide * step();
    const Keys keys{b, head, j, n, pieces.take(size), pieces.take(size), pieces.take(turned), pieces.take(turned), pieces.take(size),
                    pieces.take(size)};
    std::fill(keys.k + n * p.wide, keys.k + size, 0.0f);
    std::fill(keys.v + n * p.wide, keys.v + size, 0.0f);
    scale_padded(n, p.H, p.k + at, p.K * p.H, keys.k, p.wide, 1.0f);
    scale_padded(n, p.H, p.v + at, p.K * p.H, keys.v, p.wide, 1.0f);
    transpose(padded(n), p.wide, keys.k, p.wide, keys.k_turned, step());
    transpose(padded(n), p.wide, keys.v, p.wide, keys.v_turned, step());
    std::fill(keys.dk, keys.dk + size, 0.0f);
    std::fill(keys.dv, keys.dv + size, 0.0f);
    for (int64_t i = 0; i < p.blocks(); i++) {
      if (spans[b * p.blocks() + i].may_see(key_spans[b * p.key_blocks() + j])) tile(keys, i, pieces);
    }
    scale_rows(n, p.H, keys.dk, p.wide, dk + at, p.K * p.H, LN2);  // q came times scale / ln 2
    scale_rows(n, p.H, keys.dv, p.wide, dv + at, p.K * p.H, 1.0f);
  }

  void tile(const Keys &keys, int64_t i, Pieces pieces) const {
    const Span &query = spans[keys.b * p.blocks() + i], &key = key_spans[keys.b * p.key_blocks() + keys.j];
    const int64_t start = i * p.queries, at = keys.b * p.S + start, key_at = keys.b * p.T + keys.j * p.keys;
    int64_t first = 0, end = std::min(p.queries, p.S - start), from = 0, to = keys.n;
    const bool all = query.sees_all(key);
    if (!all) {
      trim_queries(key, p.segment + at, p.order + at, end, &first, &end);
      trim_keys(query, p.key_segment + key_at, p.key_order + key_at, keys.n, &from, &to);
    }
    from = from / LANES * LANES;
    const int64_t M = (end - first) * p.G, n = to - from, width = padded(n), side = p.wide, move = from * side;
    float *scores = pieces.take(rows() * step()), *d_scores = pieces.take(rows() * step());
    const Queries x = gather(keys, start + first, end - first, pieces);
    product<false>(M, width, p.H, x.q, side, keys.k_turned + from, step(), scores, step(), false);
    product<false>(M, width, p.H, x.dO, side, keys.v_turned + from, step(), d_scores, step(), false);
    const int32_t *segment = p.key_segment + key_at + from, *order = p.key_order + key_at + from;
    if (all) soften<false>(M, n, segment, order, x, scores, d_scores);
    else soften<true>(M, n, segment, order, x, scores, d_scores);
    product<true>(n, side, M, scores, step(), x.dO, side, keys.dv + move, side, true);
    product<true>(n, side, M, d_scores, step(), x.q, side, keys.dk + move, side, true);
    product<false>(M, side, n, d_scores, step(), keys.k + move, side, x.dq, side, false);
    add_dq(keys, i, start + first, end - first, x.dq);
  }

  Queries gather(const Keys &keys, int64_t start, int64_t n, Pieces &pieces) const {
    const int64_t size = rows() * p.wide;
    Queries x{pieces.take(size), pieces.take(size), pieces.take(size), pieces.take(rows()), pieces.take(rows()),
              pieces.take<int32_t>(rows()), pieces.take<int32_t>(rows())};
    for (int64_t s = 0; s < n; s++) {
      const int64_t row = keys.b * p.S + start + s, at = p.q_at(keys.b, start + s, keys.head), m = s * p.G;
      p.copy_queries(keys.b, start + s, keys.head, x.q + m * p.wide);
      scale_padded(p.G, p.H, dO + at, p.H, x.dO + m * p.wide, p.wide, 1.0f);
      scale_rows(1, p.G, lse + row * p.N + keys.head * p.G, 0, x.lse + m, 0, LOG2E);
      scale_rows(1, p.G, delta + row * p.N + keys.head * p.G, 0, x.delta + m, 0, 1.0f);
      std::fill(x.segment + m, x.segment + m + p.G, p.segment[row]);
      std::fill(x.order + m, x.order + m + p.G, p.order[row]);
    }
    return x;
  }

  // scores -> probabilities, and their gradients -> the scores'.
  template <bool SOME>
  void soften(int64_t M, int64_t n, const int32_t *segment, const int32_t *order, const Queries &x, float *scores, float *d_scores) const {
    int32_t own[MOST_KEYS], now[MOST_KEYS];  // to whole vectors
    std::fill(std::copy(segment, segment + n, own), own + padded(n), 0);
    std::fill(std::copy(order, order + n, now), now + padded(n), 0);
    for (int64_t m = 0; m < M; m++) {
      float *s = scores + m * step(), *d = d_scores + m * step();
      for (int64_t t = 0; t < n; t += LANES) {
        Vec y = load(s + t) - x.lse[m];
        if (SOME) y = ((load(own + t) == x.segment[m]) & (load(now + t) <= x.order[m])) ? y : Vec{} - INFINITY;
        y = exp2_of(y);
        store(s + t, y);
        store(d + t, y * (load(d + t) - x.delta[m]));
      }
    }
  }

  void add_dq(const Keys &keys, int64_t i, int64_t start, int64_t n, const float *part) const {
    int64_t before = keys.j - 1;
    while (before >= 0 && !spans[keys.b * p.blocks() + i].may_see(key_spans[keys.b * p.key_blocks() + before])) before--;
    std::atomic<int64_t> &done = last[(keys.b * p.K + keys.head) * p.blocks() + i];
    while (done.load(std::memory_order_acquire) != before) std::this_thread::yield();
    for (int64_t m = 0; m < n * p.G; m++) {
      float *to = dq + p.q_at(keys.b, start + m / p.G, keys.head) + m % p.G * p.H;
#pragma omp simd
      for (int64_t h = 0; h < p.H; h++) to[h] += p.scale * part[m * p.wide + h];
    }
    done.store(keys.j, std::memory_order_release);
  }
};

// delta_BSN, and dq set to 0.
void prepare(const Problem &p, const float *o, const float *dO, const float *d_lse, float *delta, float *dq, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < p.B * p.S * p.N; i++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t h = i * p.H; h < (i + 1) * p.H; h++) sum += o[h] * dO[h];
    delta[i] = sum - d_lse[i];
    std::fill(dq + i * p.H, dq + (i + 1) * p.H, 0.0f);
  }
}

}  // namespace

// q, k, v, segment, key segment, order, key order, scale, o, lse, do, d lse -> dq, dk, dv
KERNEL(attention_grad) {
  if (!a.are("fffiiiiffffffff")) return WRONG_TYPES;
  Problem p;
  if (!p.read(a)) return WRONG_SHAPES;
  for (int i : {8, 10, 12}) {
    if (a.size(i) != a.size(0)) return WRONG_SHAPES;
  }
  if (a.size(9) != p.B * p.S * p.N || a.size(11) != a.size(9) || a.size(13) != a.size(1) || a.size(14) != a.size(1)) return WRONG_SHAPES;
  const int threads = p.threads(p.B * p.N * p.S * p.T * p.H);
  std::vector<float> delta(a.size(9));
  prepare(p, a.get(8), a.get(10), a.get(11), delta.data(), a.get(12), threads);
  const std::vector<Span> spans = spans_of(p.segment, p.order, p.B, p.S, p.queries);
  const std::vector<Span> key_spans = spans_of(p.key_segment, p.key_order, p.B, p.T, p.keys);
  Backward backward{p, spans, key_spans, a.get(9), a.get(10), delta.data(), a.get(12), a.get(13), a.get(14), nullptr};
  const int64_t heads = p.B * p.K, tasks = heads * p.key_blocks(), group = std::min<int64_t>(heads, 2 * threads);
  std::vector<std::atomic<int64_t>> last(heads * p.blocks());
  for (auto &x : last) x = -1;
  backward.last = last.data();
  // Tasks begin in this order: each waits for earlier ones only and, where there are heads enough, for none that still runs.
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const Memory memory(backward.floats());
    for (int64_t i = next++; i < tasks; i = next++) {
      const int64_t first = i / (group * p.key_blocks()) * group, size = std::min(group, heads - first);
      const int64_t within = i - first * p.key_blocks(), head = first + within % size;
      backward.block(head / p.K, head % p.K, within / size, Pieces(memory));
    }
  }
  return 0;
}
