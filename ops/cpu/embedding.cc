// Takes rows of a matrix by id, and sums their gradients.
#include "common.h"
#include "int8.h"

#include <cstdio>

enum : int { ID_OUT_OF_RANGE = 3 };

// Calls write(id, to) for each id; `to` is its row of D. An id outside [0, V) gives a row of zeros if PART, else an error.
template <bool PART, typename F>
static int take(int64_t R, int64_t V, int64_t D, const int32_t *ids, float *out, F write) {
  if (!PART)
    for (int64_t r = 0; r < R; r++)
      if (ids[r] < 0 || ids[r] >= V) {
        std::fprintf(stderr, "embedding: token id %d is outside the vocabulary of %lld; is the tokenizer that of the model?\n", ids[r],
                     static_cast<long long>(V));
        return ID_OUT_OF_RANGE;
      }
#pragma omp parallel for schedule(static) if (R * D >= THREADS_FROM)
  for (int64_t r = 0; r < R; r++) {
    float *to = out + r * D;
    if (ids[r] >= 0 && ids[r] < V) {
      write(ids[r], to);
    } else {
      std::fill_n(to, D, 0.0f);
    }
  }
  return 0;
}

template <bool PART>
static int take_floats(const Args &a) {
  if (!a.are("fif")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 1) return WRONG_SHAPES;
  const int64_t D = a.dim(0, 1);
  const float *w = a.get(0);
  return take<PART>(a.size(1), a.dim(0, 0), D, a.get<int32_t>(1), a.get(2), [=](int64_t id, float *to) { std::copy_n(w + id * D, D, to); });
}

template <bool PART>
static int take_int8(const Args &a) {
  if (!a.are("biff")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[1] != 1 || a.ndims[2] != 2 || a.dim(0, 0) != a.dim(2, 0)) return WRONG_SHAPES;
  const int64_t D = a.dim(0, 1), groups = a.dim(2, 1);
  if (groups == 0 || D % groups) return WRONG_SHAPES;
  const int8::Matrix w{a.get<int8_t>(0), a.get(2), D, groups};
  return take<PART>(a.size(1), a.dim(0, 0), D, a.get<int32_t>(1), a.get(3), [=](int64_t id, float *to) { w.widen(id, 0, D, to); });
}

// w [V, D], ids [R] -> [R, D]
KERNEL(embedding) { return take_floats<false>(a); }
KERNEL(embedding_part) { return take_floats<true>(a); }

// w [V, D] in 8 bits, ids [R], the scale of w [V, groups] -> [R, D]
KERNEL(embedding_int8) { return take_int8<false>(a); }
KERNEL(embedding_int8_part) { return take_int8<true>(a); }

// w, for its shape, ids, dy [R, D] -> dw [V, D]; ids outside [0, V) add to nothing
KERNEL(embedding_grad) {
  if (!a.are("fiff")) return WRONG_TYPES;
  const int64_t V = a.dim(0, 0), D = a.dim(0, 1), R = a.size(1);
  if (a.ndims[0] != 2 || a.ndims[1] != 1 || a.size(2) != R * D) return WRONG_SHAPES;
  const int32_t *ids = a.get<int32_t>(1);
  const float *dy = a.get(2);
  float *dw = a.get(3);

  // The places of each id, in order: those of v are order[start[v]] to order[start[v + 1] - 1].
  std::vector<int64_t> start(V + 2, 0), order(R);
  auto inside = [=](int64_t r) { return ids[r] >= 0 && ids[r] < V; };
  for (int64_t r = 0; r < R; r++)
    if (inside(r)) start[ids[r] + 2]++;
  for (int64_t v = 2; v < V + 2; v++) start[v] += start[v - 1];
  for (int64_t r = 0; r < R; r++)
    if (inside(r)) order[start[ids[r] + 1]++] = r;

#pragma omp parallel for schedule(dynamic, 64) if (V * D >= THREADS_FROM)
  for (int64_t v = 0; v < V; v++) {
    float *to = dw + v * D;
    std::fill_n(to, D, 0.0f);
    for (int64_t k = start[v]; k < start[v + 1]; k++) {
      const float *from = dy + order[k] * D;
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] += from[d];
    }
  }
  return 0;
}
