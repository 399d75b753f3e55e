// Shared by the kernels: their arguments, exp, arrays as rows, sums over rows, and the scale of an RMS norm.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

// The arguments that MindSpore passes to a kernel: the arrays of the inputs, then those of the outputs.
struct Args {
  int count;
  void **data;
  int *ndims;
  int64_t **shapes;
  const char **dtypes;

  template <typename T = float>
  T *get(int i) const { return static_cast<T *>(data[i]); }
  int64_t dim(int i, int d) const { return shapes[i][d < 0 ? ndims[i] + d : d]; }
  int64_t size(int i) const {
    int64_t n = 1;
    for (int d = 0; d < ndims[i]; d++) n *= shapes[i][d];
    return n;
  }
  bool dtype(int i, const char *name) const { return std::strcmp(dtypes[i], name) == 0; }
  // Whether there are as many arrays as letters, each of float32 (f), int32 (i), int8 (b) or any type (.).
  bool are(const char *letters) const {
    if (count != static_cast<int>(std::strlen(letters))) return false;
    for (int i = 0; i < count; i++) {
      if (letters[i] == 'f' && !dtype(i, "float32")) return false;
      if (letters[i] == 'i' && !dtype(i, "int32")) return false;
      if (letters[i] == 'b' && !dtype(i, "int8")) return false;
    }
    return true;
  }
};

// KERNEL(name) { ... use `a`, an Args ...; return 0; }
#define KERNEL(name)                                                                                                     \
  static int name##_kernel(const Args &a);                                                                               \
  extern "C" int name(int count, void **data, int *ndims, int64_t **shapes, const char **dtypes, void *, void *) {       \
    return name##_kernel(Args{count, data, ndims, shapes, dtypes});                                                      \
  }                                                                                                                      \
  static int name##_kernel(const Args &a)

enum : int { WRONG_TYPES = 1, WRONG_SHAPES = 2 };

static const int64_t THREADS_FROM = 1 << 14;  // elements; below, waking threads takes longer than the work

// exp in float32, to 2 units in the last place between -87.3 and 88.3; 0 below (also for -inf), inf above. It has no branches and calls
// nothing, so that a loop of it becomes vector code. Cody and Waite's reduction, and a polynomial of degree 6 on [-ln2/2, ln2/2].
static inline float exp_float(float x) {
  const float low = -87.33654f, high = 88.72283f;
  float c = x < low ? low : (x > high ? high : x);
  float n = std::nearbyint(c * 1.44269504088896341f);
  float r = std::fma(n, -0.693359375f, c);
  r = std::fma(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p * r, r, r) + 1.0f;
  // 2 ** n in two factors, as n may be 128
  int32_t whole = static_cast<int32_t>(n), half = whole / 2, rest = whole - half;
  int32_t bits_a = (half + 127) << 23, bits_b = (rest + 127) << 23;
  float a, b;
  std::memcpy(&a, &bits_a, 4);
  std::memcpy(&b, &bits_b, 4);
  float y = p * a * b;
  y = x < low ? 0.0f : y;
  return x > high ? INFINITY : y;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_float(-x)); }

// An array [..., n] as rows.
struct Rows {
  int64_t n, rows;

  Rows(int64_t rows, int64_t n) : n(n), rows(rows) {}
  Rows(const Args &a, int i) : n(a.ndims[i] ? a.dim(i, -1) : 1), rows(n ? a.size(i) / n : 0) {}
  bool worth_threads() const { return rows * n >= THREADS_FROM; }
};

// total[i] = the sum over rows r of what add(r, part) adds to part[i]. The rows of a part depend on the array's shape alone, and so the
// sum does not depend on the number of threads.
template <typename F>
static inline void sum_of_parts(Rows size, float *total, F add) {
  const int64_t n = size.n, each = std::max<int64_t>(4, (size.rows + 63) / 64), parts = (size.rows + each - 1) / each;
  std::vector<float> sums(parts * n, 0.0f);
#pragma omp parallel for schedule(static) if (size.worth_threads())
  for (int64_t p = 0; p < parts; p++)
    for (int64_t r = p * each; r < std::min(size.rows, (p + 1) * each); r++) add(r, &sums[p * n]);
  std::fill(total, total + n, 0.0f);
  for (int64_t p = 0; p < parts; p++)
#pragma omp simd
    for (int64_t i = 0; i < n; i++) total[i] += sums[p * n + i];
}

// The scale of a row of n whose squares sum up to `squares`.
static inline float inverse_rms(float squares, int64_t n, float eps) { return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps); }

// For the gradient of y = x scale w: dx = (dy w - x back) scale, where dot = sum(dy w x).
static inline float back_scale(float scale, float dot, int64_t n) { return scale * scale * dot / static_cast<float>(n); }
