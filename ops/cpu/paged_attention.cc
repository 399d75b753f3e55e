// Attention over the pages of a KV cache: of one query a row, as in decoding, and of many queries of several rows, as prompts are read.
#include "attention_few.h"
#include "attention_tile.h"

namespace {

constexpr int NO_PAGE = 3;  // an error: a page that is not in the cache, or a token that the table has no room for

// The cache and the table [B, M] in the arguments from `first` on, for queries [R, N, H] in argument 0.
bool read_pages(const Args &a, Problem *p, int64_t *pages) {
  if (a.ndims[0] != 3 || a.ndims[1] != 4 || a.ndims[3] != 2) return false;
  *pages = a.dim(1, 0);
  p->B = a.dim(3, 0), p->M = a.dim(3, 1), p->S = 1, p->N = a.dim(0, 1), p->H = a.dim(0, 2), p->C = a.dim(1, 1), p->K = a.dim(1, 2);
  if (p->K == 0 || p->N % p->K || p->C == 0) return false;
  const int64_t cache = *pages * p->C * p->K * p->H;
  if (a.size(1) != cache || a.size(2) != cache) return false;
  p->T = p->M * p->C, p->G = p->N / p->K, p->wide = padded(p->H), p->queries = std::max<int64_t>(1, ROWS / std::max<int64_t>(p->G, 1));
  p->keys = p->wide > 128 ? MOST_KEYS / 2 : MOST_KEYS;
  p->q = a.get(0), p->k = a.get(1), p->v = a.get(2), p->table = a.get<int32_t>(3);
  return true;
}

// A row of the table has the first n tokens.
bool has_pages(const Problem &p, int64_t pages, int64_t b, int64_t n) {
  if (n > p.T) return false;
  for (int64_t m = 0; m * p.C < n; m++)
    if (p.table[b * p.M + m] < 0 || p.table[b * p.M + m] >= pages) return false;
  return true;
}

// Queries of one row at positions next to each other: tokens first ... first + n - 1 of the packed ones.
struct Tile {
  int64_t first, n;
};

struct Packed {
  const Problem &p;
  const int32_t *row, *position;
  float *o, *lse;  // lse: not a result

  // The tiles of R tokens. Tokens of no row are in none of them.
  std::vector<Tile> tiles(int64_t R) const {
    std::vector<Tile> found;
    for (int64_t r = 0; r < R; r++) {
      if (!is_token(r)) continue;
      const bool goes_on = r > 0 && is_token(r - 1) && row[r] == row[r - 1] && position[r] == position[r - 1] + 1;
      if (goes_on && found.back().n < p.queries) found.back().n++;
      else found.push_back({r, 1});
    }
    return found;
  }
  bool is_token(int64_t r) const { return row[r] >= 0 && position[r] >= 0; }
  int64_t ld() const { return padded(p.queries * p.G) + LANES; }
  int64_t floats() const { return ld() * (2 * p.wide + p.keys) + padded(p.queries * p.G) * (p.wide + 6); }

  // The result of a query depends on its own keys alone: blocks of keys begin at multiples of p.keys, and hidden keys add zeros.
  void block(const Tile &tile, int64_t head, Pieces pieces) const {
    const int64_t b = row[tile.first], M = tile.n * p.G, width = padded(M), step = ld(), seen = position[tile.first] + tile.n;
    float *lines = pieces.take(width * p.wide), *q = pieces.take(p.wide * step), *mix = pieces.take(p.wide * step);
    float *scores = pieces.take(p.keys * step);
    const Rows rows{pieces.take(width), pieces.take(width), pieces.take(width), pieces.take(width),
                    pieces.take<int32_t>(width), pieces.take<int32_t>(width)};
    for (int64_t s = 0; s < tile.n; s++) {
      scale_padded(p.G, p.H, p.q + ((tile.first + s) * p.N + head * p.G) * p.H, p.H, lines + s * p.G * p.wide, p.wide, p.scale * LOG2E);
    }
    std::fill(lines + M * p.wide, lines + width * p.wide, 0.0f);
    transpose(width, p.wide, lines, p.wide, q, step);
    std::fill(mix, mix + p.wide * step, 0.0f);
    for (int64_t m = 0; m < width; m++) {
      rows.top[m] = -FLT_MAX, rows.sum[m] = 0, rows.segment[m] = 0, rows.order[m] = position[tile.first] + std::min(m / p.G, tile.n - 1);
    }
    for (int64_t start = 0; start < seen; start += p.keys) {
      const int64_t stop = std::min(seen, start + p.keys);
      each_page(b, head, start, stop, [&](int64_t t, int64_t n, int64_t at) {
        product<false>(n, width, p.H, p.k + at, p.K * p.H, q, step, scores + (t - start) * step, step, false);
      });
      hide(rows.order, std::max<int64_t>(start, position[tile.first] + 1), stop, width, scores - start * step);
      if (soften<false>(scores, stop - start, width, step, nullptr, nullptr, rows)) {
        for (int64_t h = 0; h < p.H; h++) {
          for (int64_t m = 0; m < width; m += LANES) store(mix + h * step + m, load(mix + h * step + m) * load(rows.alpha + m));
        }
      }
      each_page(b, head, start, stop, [&](int64_t t, int64_t n, int64_t at) {
        product<true>(p.H, width, n, p.v + at, p.K * p.H, scores + (t - start) * step, step, mix, step, true);
      });
    }
    transpose(p.wide, width, mix, step, lines, p.wide);
    for (int64_t m = 0; m < M; m++) {
      write_row(p, tile.first + m / p.G, 0, head * p.G + m % p.G, lines + m * p.wide, rows.top[m], rows.sum[m], o, lse);
    }
  }
  // f(t, n, place in the cache) for the keys start ... stop - 1 of a row, by page
  template <typename F>
  void each_page(int64_t b, int64_t head, int64_t start, int64_t stop, F f) const {
    for (int64_t t = start, n; t < stop; t += n) {
      n = std::min(p.together(t), stop - t);
      f(t, n, p.k_at(b, t, head));
    }
  }
  // Of keys first ... stop - 1, the scores for earlier queries become -inf. scores: of key 0.
  void hide(const int32_t *order, int64_t first, int64_t stop, int64_t width, float *scores) const {
    for (int64_t t = first; t < stop; t++) {
      for (int64_t m = 0; m < width; m += LANES) {
        float *at = scores + t * ld() + m;
        store(at, load(order + m) >= static_cast<int32_t>(t) ? load(at) : Vec{} - INFINITY);
      }
    }
  }
};

}  // namespace

// q [B, N, H], pages of keys and of values [P, C, K, H], table [B, M], length [B], scale -> o [B, N, H]
KERNEL(paged_attention) {
  if (!a.are("fffiiff")) return WRONG_TYPES;
  Problem p{};
  int64_t pages;
  if (!read_pages(a, &p, &pages) || a.dim(0, 0) != p.B || a.size(4) != p.B || a.size(5) != 1 || a.size(6) != a.size(0)) return WRONG_SHAPES;
  const int32_t *length = a.get<int32_t>(4);
  std::vector<int32_t> at(length, length + p.B);
  int64_t seen = 0;
  for (int64_t b = 0; b < p.B; b++) {
    if (!has_pages(p, pages, b, length[b])) return NO_PAGE;
    at[b]--, seen += std::max(length[b], 0);
  }
  p.scale = *a.get(5);
  const UpTo up_to{p, at.data(), pages};
  std::vector<float> lse(p.B * p.N);
  const Few<UpTo> few{p, up_to, a.get(6), lse.data()};
#pragma omp parallel num_threads(p.threads(2 * seen * p.N * p.H))
  {
    const Memory memory(few.floats());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < p.B * p.K; i++) {
      int64_t from, to;
      up_to.range(i / p.K, &from, &to);
      few.block(i / p.K, i % p.K, from, to, Pieces(memory));
    }
  }
  return 0;
}

// q [R, N, H], pages of keys and of values [P, C, K, H], table [B, M], row [R], position [R], scale -> o [R, N, H]
KERNEL(paged_attention_packed) {
  if (!a.are("fffiiiff")) return WRONG_TYPES;
  Problem p{};
  int64_t pages;
  if (!read_pages(a, &p, &pages)) return WRONG_SHAPES;
  const int64_t R = a.dim(0, 0);
  if (a.size(4) != R || a.size(5) != R || a.size(6) != 1 || a.size(7) != a.size(0)) return WRONG_SHAPES;
  p.scale = *a.get(6);
  std::vector<float> lse(R * p.N);
  const Packed packed{p, a.get<int32_t>(4), a.get<int32_t>(5), a.get(7), lse.data()};
  const std::vector<Tile> tiles = packed.tiles(R);
  int64_t seen = 0;
  for (const Tile &tile : tiles) {
    const int64_t b = packed.row[tile.first], last = packed.position[tile.first] + tile.n;
    if (b >= p.B || !has_pages(p, pages, b, last)) return NO_PAGE;
    seen += last * tile.n;
  }
  for (int64_t r = 0; r < R; r++)
    if (!packed.is_token(r)) std::fill_n(packed.o + r * p.N * p.H, p.N * p.H, 0.0f);
  const int64_t tasks = tiles.size() * p.K;
#pragma omp parallel num_threads(p.threads(2 * seen * p.N * p.H))
  {
    const Memory memory(packed.floats());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; i++) packed.block(tiles[i / p.K], i % p.K, Pieces(memory));
  }
  return 0;
}
