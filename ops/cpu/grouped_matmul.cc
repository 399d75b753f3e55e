// Multiplies blocks of rows with the matrices of their groups; and the gradients. Neighbouring blocks of one group are one product, which
// is split into tiles for the threads. The tiles depend on shapes and groups only, so the number of threads does not change results.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "common.h"
#include "int8_wide.h"

enum : int { WRONG_GROUP = 3 };

static const int64_t SMALL = 1 << 18;  // multiplications below which threads cost more than they save

struct Run {
  int64_t group, first, rows;
};

struct Tile {
  Run run;
  int64_t column, columns;
};

// The runs of n blocks of b rows. false: a group is not one of 0 .. groups, the last of which is none.
static bool runs_of(const int32_t *group, int64_t n, int64_t b, int64_t groups, std::vector<Run> &runs) {
  for (int64_t i = 0; i < n; i++) {
    if (group[i] < 0 || group[i] > groups) return false;
    if (runs.empty() || runs.back().group != group[i]) runs.push_back({group[i], i * b, 0});
    runs.back().rows += b;
  }
  return true;
}

// Tiles of at most 256 rows. They have all columns where that gives work to many threads.
static std::vector<Tile> tiles_of(const std::vector<Run> &runs, int64_t columns) {
  const int64_t tall = 256, enough = 32;
  int64_t count = 0, wide = columns;
  for (const Run &run : runs) count += (run.rows + tall - 1) / tall;
  while (wide > 128 && count * ((columns + wide - 1) / wide) < enough) wide = (wide + 1) / 2;
  std::vector<Tile> tiles;
  for (const Run &run : runs)
    for (int64_t row = 0; row < run.rows; row += tall)
      for (int64_t column = 0; column < columns; column += wide)
        tiles.push_back({{run.group, run.first + row, std::min(tall, run.rows - row)}, column, std::min(wide, columns - column)});
  return tiles;
}

static void zero(float *y, int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r++) std::fill_n(y + r * stride, columns, 0.0f);
}

// y [n * b, to] = x [n * b, from] @ w[group], where w is [groups, from, to], or [groups, to, from] if TURNED
static bool multiply(const float *x, const float *w, blas::Side side, const int32_t *group, int64_t n, int64_t b, int64_t groups, int64_t from,
                     int64_t to, float *y) {
  std::vector<Run> runs;
  if (!runs_of(group, n, b, groups, runs)) return false;
  const std::vector<Tile> tiles = tiles_of(runs, to);
#pragma omp parallel for schedule(dynamic, 1) if (n * b * from * to > SMALL)
  for (size_t i = 0; i < tiles.size(); i++) {
    const Tile &t = tiles[i];
    float *out = y + t.run.first * to + t.column;
    if (t.run.group == groups || from == 0) {
      zero(out, to, t.run.rows, t.columns);
      continue;
    }
    const float *matrix = w + t.run.group * from * to + (side == blas::TURNED ? t.column * from : t.column);
    blas::product(t.run.rows, t.columns, from, x + t.run.first * from, from, blas::AS_IS, matrix, side == blas::TURNED ? from : to, side, out,
                  to, false);
  }
  return true;
}

// x [n, b, i], w [E, i, o], group [n] -> y [n, b, o]
KERNEL(grouped_matmul) {
  if (!a.are("ffif")) return WRONG_TYPES;
  if (a.ndims[0] != 3 || a.ndims[1] != 3 || a.dim(0, 2) != a.dim(1, 1) || a.size(2) != a.dim(0, 0)) return WRONG_SHAPES;
  bool ok = multiply(a.get(0), a.get(1), blas::AS_IS, a.get<int32_t>(2), a.dim(0, 0), a.dim(0, 1), a.dim(1, 0), a.dim(1, 1), a.dim(1, 2),
                     a.get(3));
  return ok ? 0 : WRONG_GROUP;
}

// x [n, b, i], w [E, o, i] in 8 bits, group [n], the scale [E, o, groups of i] -> y [n, b, o]
KERNEL(grouped_matmul_int8) {
  if (!a.are("fbiff")) return WRONG_TYPES;
  if (a.ndims[0] != 3 || a.ndims[1] != 3 || a.ndims[3] != 3 || a.dim(0, 2) != a.dim(1, 2) || a.size(2) != a.dim(0, 0)) return WRONG_SHAPES;
  const int64_t n = a.dim(0, 0), b = a.dim(0, 1), experts = a.dim(1, 0), from = a.dim(1, 2), to = a.dim(1, 1), groups = a.dim(3, 2);
  if (a.dim(3, 0) != experts || a.dim(3, 1) != to || groups == 0 || from % groups) return WRONG_SHAPES;
  const float *x = a.get(0);
  float *y = a.get(4);
  std::vector<Run> runs;
  if (!runs_of(a.get<int32_t>(2), n, b, experts, runs)) return WRONG_GROUP;
  const std::vector<Tile> tiles = tiles_of(runs, to);
#pragma omp parallel for schedule(dynamic, 1) if (n * b * from * to > SMALL)
  for (size_t i = 0; i < tiles.size(); i++) {
    const Tile &t = tiles[i];
    float *out = y + t.run.first * to;
    if (t.run.group == experts) {
      zero(out + t.column, to, t.run.rows, t.columns);
      continue;
    }
    const int8::Matrix w{a.get<int8_t>(1) + t.run.group * to * from, a.get(3) + t.run.group * to * groups, from, groups};
    const auto multiply = t.run.rows <= few::MOST_ROWS ? int8::columns : int8::wide_columns;
    multiply(t.run.rows, to, x + t.run.first * from, w, t.column, t.column + t.columns, out);
  }
  return 0;
}

// dy [n, b, o], w [E, i, o], group [n] -> dx [n, b, i]
KERNEL(grouped_matmul_dx) {
  if (!a.are("ffif")) return WRONG_TYPES;
  if (a.ndims[0] != 3 || a.ndims[1] != 3 || a.dim(0, 2) != a.dim(1, 2) || a.size(2) != a.dim(0, 0)) return WRONG_SHAPES;
  bool ok = multiply(a.get(0), a.get(1), blas::TURNED, a.get<int32_t>(2), a.dim(0, 0), a.dim(0, 1), a.dim(1, 0), a.dim(1, 2), a.dim(1, 1),
                     a.get(3));
  return ok ? 0 : WRONG_GROUP;
}

// x [n, b, i], w [E, i, o] for its shape, group [n], dy [n, b, o] -> dw [E, i, o]: tiles of each dw[e], which add up their runs in order
KERNEL(grouped_matmul_dw) {
  if (!a.are("ffiff")) return WRONG_TYPES;
  if (a.ndims[0] != 3 || a.ndims[1] != 3 || a.ndims[3] != 3 || a.dim(0, 2) != a.dim(1, 1) || a.size(2) != a.dim(0, 0)) return WRONG_SHAPES;
  if (a.dim(3, 0) != a.dim(0, 0) || a.dim(3, 1) != a.dim(0, 1) || a.dim(3, 2) != a.dim(1, 2)) return WRONG_SHAPES;
  const float *x = a.get(0), *dy = a.get(3);
  float *dw = a.get(4);
  const int64_t groups = a.dim(1, 0), from = a.dim(1, 1), to = a.dim(1, 2);
  std::vector<Run> runs;
  if (!runs_of(a.get<int32_t>(2), a.dim(0, 0), a.dim(0, 1), groups, runs)) return WRONG_GROUP;
  std::stable_sort(runs.begin(), runs.end(), [](const Run &p, const Run &q) { return p.group < q.group; });
  int64_t edge = 256, enough = 32;
  while (edge > 64 && groups * ((from + edge - 1) / edge) * ((to + edge - 1) / edge) < enough) edge /= 2;
  const int64_t tall = (from + edge - 1) / edge, wide = (to + edge - 1) / edge;
#pragma omp parallel for schedule(dynamic, 1) if (a.size(0) * to > SMALL)
  for (int64_t t = 0; t < groups * tall * wide; t++) {
    const int64_t g = t / (tall * wide), i = t / wide % tall * edge, o = t % wide * edge;
    float *out = dw + (g * from + i) * to + o;
    bool add = false;
    auto run = std::lower_bound(runs.begin(), runs.end(), g, [](const Run &p, int64_t group) { return p.group < group; });
    for (; run != runs.end() && run->group == g; ++run) {
      if (run->rows == 0) continue;
      blas::product(std::min(edge, from - i), std::min(edge, to - o), run->rows, x + run->first * from + i, from, blas::TURNED,
                    dy + run->first * to + o, to, blas::AS_IS, out, to, add);
      add = true;
    }
    if (!add) zero(out, to, std::min(edge, from - i), std::min(edge, to - o));
  }
  return 0;
}
