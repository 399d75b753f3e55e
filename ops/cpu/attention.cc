// The forward of attention; see attention.h.
#include "attention_few.h"
#include "attention_tile.h"

namespace {

struct Forward {
  const Problem &p;
  const std::vector<Span> &spans, &key_spans;
  float *o, *lse;

  int64_t ld() const { return padded(p.queries * p.G) + LANES; }
  int64_t floats() const { return ld() * (2 * p.wide + p.keys + 6) + padded(p.queries * p.G) * p.wide; }

  void block(int64_t b, int64_t head, int64_t i, Pieces pieces) const {
    const int64_t first = i * p.queries, n = std::min(p.queries, p.S - first), M = n * p.G, width = padded(M), step = ld();
    float *row = pieces.take(width * p.wide), *q = pieces.take(p.wide * step), *mix = pieces.take(p.wide * step);
    float *scores = pieces.take(p.keys * step);
    Rows rows{pieces.take(width), pieces.take(width), pieces.take(width), pieces.take(width),
              pieces.take<int32_t>(width), pieces.take<int32_t>(width)};
    for (int64_t s = 0; s < n; s++) p.copy_queries(b, first + s, head, row + s * p.G * p.wide);
    std::fill(row + M * p.wide, row + width * p.wide, 0.0f);
    transpose(width, p.wide, row, p.wide, q, step);
    std::fill(mix, mix + p.wide * step, 0.0f);
    for (int64_t m = 0; m < width; m++) {
      const int64_t s = b * p.S + first + std::min(m / p.G, n - 1);
      rows.top[m] = -FLT_MAX, rows.sum[m] = 0, rows.segment[m] = p.segment[s], rows.order[m] = p.order[s];
    }
    for (int64_t j = 0; j < p.key_blocks(); j++) tile(b, head, j, width, spans[b * p.blocks() + i], q, scores, mix, rows);
    transpose(p.wide, width, mix, step, row, p.wide);
    for (int64_t m = 0; m < M; m++) {
      write_row(p, b, first + m / p.G, head * p.G + m % p.G, row + m * p.wide, rows.top[m], rows.sum[m], o, lse);
    }
  }

  void tile(int64_t b, int64_t head, int64_t j, int64_t width, const Span &query, const float *q, float *scores, float *mix,
            const Rows &rows) const {
    const Span &keys = key_spans[b * p.key_blocks() + j];
    if (!query.may_see(keys)) return;
    const int64_t step = ld(), start = j * p.keys;
    const int32_t *segment = p.key_segment + b * p.T + start, *order = p.key_order + b * p.T + start;
    int64_t from = 0, to = std::min(p.keys, p.T - start);
    const bool all = query.sees_all(keys);
    if (!all) trim_keys(query, segment, order, to, &from, &to);
    const int64_t at = p.k_at(b, start + from, head), n = to - from;
    product<false>(n, width, p.H, p.k + at, p.K * p.H, q, step, scores, step, false);
    const bool rose = all ? soften<false>(scores, n, width, step, segment, order, rows)
                          : soften<true>(scores, n, width, step, segment + from, order + from, rows);
    if (rose) {
      for (int64_t h = 0; h < p.H; h++) {
        for (int64_t m = 0; m < width; m += LANES) store(mix + h * step + m, load(mix + h * step + m) * load(rows.alpha + m));
      }
    }
    product<true>(p.H, width, n, p.v + at, p.K * p.H, scores, step, mix, step, true);
  }
};

void attend_few(const Problem &p, float *o, float *lse) {
  const Masked masked{p};
  const Few<Masked> few{p, masked, o, lse};
  std::vector<int64_t> from(p.B), to(p.B);
  int64_t seen = 0;
  for (int64_t b = 0; b < p.B; b++) {
    masked.range(b, &from[b], &to[b]);
    seen += to[b] - from[b];
  }
#pragma omp parallel num_threads(p.threads(2 * seen * p.S * p.N * p.H))
  {
    const Memory memory(few.floats());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < p.B * p.K; i++) few.block(i / p.K, i % p.K, from[i / p.K], to[i / p.K], Pieces(memory));
  }
}

}  // namespace

// q, k, v, segment, key segment, order, key order, scale -> o, lse
KERNEL(attention) {
  if (!a.are("fffiiiifff")) return WRONG_TYPES;
  Problem p;
  if (!p.read(a) || a.size(8) != a.size(0) || a.size(9) != p.B * p.S * p.N) return WRONG_SHAPES;
  float *o = a.get(8), *lse = a.get(9);
  if (p.S * p.G <= TILE_ROWS) {
    attend_few(p, o, lse);
    return 0;
  }
  const std::vector<Span> spans = spans_of(p.segment, p.order, p.B, p.S, p.queries);
  const std::vector<Span> key_spans = spans_of(p.key_segment, p.key_order, p.B, p.T, p.keys);
  const Forward forward{p, spans, key_spans, o, lse};
  const int64_t tasks = p.B * p.K * p.blocks();
  const int threads = p.threads(p.B * p.N * p.S * p.T * p.H);
  const int64_t together = std::max<int64_t>(1, std::min(tasks / threads / 16, p.blocks()));
#pragma omp parallel num_threads(threads)
  {
    const Memory memory(forward.floats());
#pragma omp for schedule(dynamic, together)
    for (int64_t i = 0; i < tasks; i++) {
      forward.block(i / (p.K * p.blocks()), i / p.blocks() % p.K, i % p.blocks(), Pieces(memory));
    }
  }
  return 0;
}
