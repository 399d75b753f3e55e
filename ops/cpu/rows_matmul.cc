// Products of rows and a weight matrix in which an element of the result is one sum over the inner dim, in order. So a row's result has the
// same bits whatever rows are beside it, in a product of one row as in one of thousands, which OpenBLAS does not promise.
#include <memory>

#include "attention.h"
#include "few_rows.h"

namespace {

constexpr int TALL = LANES == 16 ? 12 : 6;  // rows of a tile, with which its sums fill the registers
constexpr int64_t PANEL = few::PANEL;       // columns of a tile
constexpr int64_t DEEP = 384, WIDE = 128;   // a panel of so many rows stays in the first cache; columns that a thread takes at a time
constexpr int64_t NEAR = 252;               // rows whose tiles stay in the second cache
constexpr int64_t AHEAD = 8, LINE = 16;     // rows of b that are fetched ahead, as each is in another page of memory; floats of a cache line

// One tile of c, c + a b of this depth with `add`. a is [depth, TALL], b is [depth, PANEL].
inline void tile(int64_t depth, const float *a, const float *b, float *c, int64_t ldc, bool add) {
  Vec sum[TALL][2] = {};
  if (add)
    for (int r = 0; r < TALL; r++)
      for (int v = 0; v < 2; v++) sum[r][v] = load(c + r * ldc + v * LANES);
  for (int64_t d = 0; d < depth; d++) {
    const Vec x = load(b + d * PANEL), y = load(b + d * PANEL + LANES);
    for (int r = 0; r < TALL; r++) sum[r][0] += a[d * TALL + r] * x, sum[r][1] += a[d * TALL + r] * y;
  }
  for (int r = 0; r < TALL; r++)
    for (int v = 0; v < 2; v++) store(c + r * ldc + v * LANES, sum[r][v]);
}

// A tile at the edge of c, of fewer rows or columns, by way of a copy.
void edge(int64_t rows, int64_t columns, int64_t depth, const float *a, const float *b, float *c, int64_t ldc, bool add) {
  float copy[TALL * PANEL] = {};
  for (int64_t r = 0; add && r < rows; r++) std::copy_n(c + r * ldc, columns, copy + r * PANEL);
  tile(depth, a, b, copy, PANEL, add);
  for (int64_t r = 0; r < rows; r++) std::copy_n(copy + r * PANEL, columns, c + r * ldc);
}

struct Product {
  int64_t m, n, k;
  const float *a, *b;
  float *c;

  int64_t tiles() const { return (m + TALL - 1) / TALL; }
  int64_t pieces() const { return (n + WIDE - 1) / WIDE; }

  // Rows of tile t, columns d ... d + depth - 1 of a -> [depth, TALL], with the last row again for rows that are not there
  void pack_rows(int64_t t, int64_t d, int64_t depth, float *to) const {
    const int64_t rows = std::min<int64_t>(TALL, m - t * TALL);
    const float *from[TALL];
    for (int64_t r = 0; r < TALL; r++) from[r] = a + (t * TALL + std::min(r, rows - 1)) * k + d;
    for (int64_t i = 0; i < depth; i++)
      for (int64_t r = 0; r < TALL; r++) to[i * TALL + r] = from[r][i];
  }
  // Rows d ... d + depth - 1 of b, in panels [depth, PANEL], with zeros for columns that are not there
  void pack_columns(int64_t first, int64_t columns, int64_t d, int64_t depth, float *to) const {
    for (int64_t i = 0; i < depth; i++) {
      const float *from = b + (d + i) * n + first;
      if (i + AHEAD < depth)
        for (int64_t at = 0; at < columns; at += LINE) __builtin_prefetch(from + AHEAD * n + at);
      for (int64_t at = 0; at < columns; at += PANEL) {
        float *panel = to + at * depth + i * PANEL;
        const int64_t some = std::min(PANEL, columns - at);
        std::copy_n(from + at, some, panel);
        std::fill(panel + some, panel + PANEL, 0.0f);
      }
    }
  }
  // Columns of piece i of c, for one depth of a and b.
  void piece(int64_t i, int64_t d, int64_t depth, const float *rows, float *panels) const {
    const int64_t first = i * WIDE, columns = std::min(WIDE, n - first), near = NEAR / TALL;
    pack_columns(first, columns, d, depth, panels);
    for (int64_t start = 0; start < tiles(); start += near)
      for (int64_t at = 0; at < columns; at += PANEL)
        for (int64_t t = start; t < std::min(tiles(), start + near); t++) {
          const int64_t tall = std::min<int64_t>(TALL, m - t * TALL), wide = std::min(PANEL, columns - at);
          const float *x = rows + t * TALL * depth, *y = panels + at * depth;
          float *to = c + t * TALL * n + first + at;
          if (tall == TALL && wide == PANEL) tile(depth, x, y, to, n, d > 0);
          else edge(tall, wide, depth, x, y, to, n, d > 0);
        }
  }
  void run() const {
    const Memory all_rows(tiles() * TALL * std::min(DEEP, k));
    float *rows = all_rows.data.get();
#pragma omp parallel if (m * n * k > few::WORTH_THREADS)
    {
      const Memory own((WIDE + PANEL) * std::min(DEEP, k));
      for (int64_t d = 0; d < k; d += DEEP) {
        const int64_t depth = std::min(DEEP, k - d);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles(); t++) pack_rows(t, d, depth, rows + t * TALL * depth);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < pieces(); i++) piece(i, d, depth, rows, own.data.get());
      }
    }
  }
};

// A product of few rows, which reads b once; or of more rows with a transposed b, in which a piece of b stays in the cache.
template <typename Columns>
void of_few(int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *c, Columns columns) {
  const int threads = few::threads_for(m, n * k);
  const int64_t piece = m > few::MOST_ROWS ? 2 * PANEL : few::piece(n, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t at = 0; at < n; at += piece)
    for (int64_t r = 0; r < m; r += few::MOST_ROWS)
      columns(std::min(few::MOST_ROWS, m - r), n, k, a + r * k, b, at, std::min(n, at + piece), c + r * n);
}

}  // namespace

// a [m, k], b [k, n] -> c [m, n]
KERNEL(rows_matmul) {
  if (!a.are("fff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.dim(0, 1) != a.dim(1, 0)) return WRONG_SHAPES;
  const Product p{a.dim(0, 0), a.dim(1, 1), a.dim(0, 1), a.get(0), a.get(1), a.get(2)};
  if (p.m == 0 || p.n == 0) return 0;
  if (p.k == 0) std::fill_n(p.c, p.m * p.n, 0.0f);
  else if (p.m <= few::MOST_ROWS) of_few(p.m, p.n, p.k, p.a, p.b, p.c, few::columns);
  else p.run();
  return 0;
}

// a [m, k], b [n, k] -> c [m, n]
KERNEL(rows_matmul_nt) {
  if (!a.are("fff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 2 || a.dim(0, 1) != a.dim(1, 1)) return WRONG_SHAPES;
  const int64_t m = a.dim(0, 0), n = a.dim(1, 0), k = a.dim(0, 1);
  if (k == 0) std::fill_n(a.get(2), m * n, 0.0f);
  else of_few(m, n, k, a.get(0), a.get(1), a.get(2), few::columns_turned);
  return 0;
}
