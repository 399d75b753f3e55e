// The running softmax of a tile of queries.
#pragma once
#include "attention.h"

namespace {

// The layout of scores is [key][row]: each row of the tile is a SIMD lane, so maxima and sums over keys stay within a lane.

struct Rows {
  float *top, *before, *sum, *alpha;  // maximum, the one before this tile, sum of 2 ** (score - top), 2 ** (before - top)
  int32_t *segment, *order;
};

// Replaces the scores [n][ld] of `width` rows by 2 ** (score - top) and updates top and sum. Returns whether a top rose. SOME: some keys
// are hidden from some rows.
template <bool SOME>
bool soften(float *p, int64_t n, int64_t width, int64_t ld, const int32_t *segment, const int32_t *order, const Rows &rows) {
  std::memcpy(rows.before, rows.top, width * sizeof(float));
  for (int64_t m = 0; m < width; m += LANES) {
    const IntVec own = load(rows.segment + m), now = load(rows.order + m);
    const Vec before = load(rows.top + m);
    Vec top = before, sum = {};
    for (int64_t t = 0; t < n; t++) {
      Vec x = load(p + t * ld + m);
      if (SOME) {
        x = ((own == segment[t]) & (now >= order[t])) ? x : Vec{} - INFINITY;
        store(p + t * ld + m, x);
      }
      top = x > top ? x : top;
    }
    for (int64_t t = 0; t < n; t++) {
      Vec x = exp2_of(load(p + t * ld + m) - top);
      sum += x;
      store(p + t * ld + m, x);
    }
    const Vec alpha = exp2_of(before - top);
    store(rows.top + m, top);
    store(rows.alpha + m, alpha);
    store(rows.sum + m, load(rows.sum + m) * alpha + sum);
  }
  return std::memcmp(rows.before, rows.top, width * sizeof(float)) != 0;
}

}  // namespace
