// Takes one token id a row: that of the largest logit, or a sample from softmax(logits / temperature) filtered by top-k, top-p and min-p.
#include <algorithm>
#include <vector>

#include "common.h"

enum : int { NOT_FINITE = 3, WRONG_OPTIONS = 4 };

struct Candidate {
  float logit;
  int32_t id;
  bool operator<(const Candidate &other) const { return logit > other.logit || (logit == other.logit && id < other.id); }  // in order of rank
};

struct Options {
  double temperature, top_k, top_p, min_p;
  bool valid() const { return temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1; }
};

// exp of x <= 0 in float64, to 1e-15; 0 below -700. As exp_float in common.h, with Taylor's polynomial of degree 12, and for the same reason.
static inline double exp_double(double x) {
  double c = x < -700.0 ? -700.0 : x;
  double n = std::nearbyint(c * 1.4426950408889634);
  double r = std::fma(n, -6.93147180369123816490e-01, c);
  r = std::fma(n, -1.90821492927058770002e-10, r);
  double p = 1.0 / 479001600;
  p = std::fma(p, r, 1.0 / 39916800);
  p = std::fma(p, r, 1.0 / 3628800);
  p = std::fma(p, r, 1.0 / 362880);
  p = std::fma(p, r, 1.0 / 40320);
  p = std::fma(p, r, 1.0 / 5040);
  p = std::fma(p, r, 1.0 / 720);
  p = std::fma(p, r, 1.0 / 120);
  p = std::fma(p, r, 1.0 / 24);
  p = std::fma(p, r, 1.0 / 6);
  p = std::fma(p, r, 0.5);
  p = std::fma(p * r, r, r) + 1.0;
  int64_t bits = (static_cast<int64_t>(n) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
  return x < -700.0 ? 0.0 : p * scale;
}

struct Range {
  float low, high;  // of the logits above -inf
  bool finite;      // there is no NaN, no +inf, and one logit above -inf
};

static Range range_of(const float *logits, int64_t V) {
  float low = INFINITY, high = -INFINITY;
  int bad = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : bad)
  for (int64_t i = 0; i < V; i++) {
    const float x = logits[i], above = x == -INFINITY ? INFINITY : x;
    low = above < low ? above : low;
    high = x > high ? x : high;
    bad |= !(x < INFINITY);
  }
  return {low, high, !bad && high > -INFINITY};
}

// The k candidates of the first ranks, in order. A logit is looked at one by one only where its block holds one above the worst kept.
static void best(const float *logits, int64_t V, int64_t k, std::vector<Candidate> &kept) {
  constexpr int64_t BLOCK = 64;
  for (int64_t i = 0; i < k; i++) kept.push_back({logits[i], static_cast<int32_t>(i)});
  std::make_heap(kept.begin(), kept.end());  // the worst on top
  for (int64_t start = k; start < V; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, V);
    float high = -INFINITY;
#pragma omp simd reduction(max : high)
    for (int64_t i = start; i < stop; i++) high = logits[i] > high ? logits[i] : high;
    if (!(high > kept.front().logit)) continue;
    for (int64_t i = start; i < stop; i++) {
      if (!(logits[i] > kept.front().logit)) continue;  // of two equal logits the first one stays
      std::pop_heap(kept.begin(), kept.end());
      kept.back() = {logits[i], static_cast<int32_t>(i)};
      std::push_heap(kept.begin(), kept.end());
    }
  }
  std::sort_heap(kept.begin(), kept.end());
}

// Where a walk along the ranks has come to: how many it has passed, the sum of their weights, and the last one that has any.
struct Walk {
  int64_t rank = 0;
  double weight = 0;
  int32_t id = 0;

  // Goes on along `ranked` until it has passed `ranks` in all, or their weights reach `limit`.
  void along(const std::vector<Candidate> &ranked, float high, double temperature, int64_t ranks, double limit) {
    for (const Candidate &c : ranked) {
      if (rank >= ranks || weight >= limit) return;
      const double w = exp_double((static_cast<double>(c.logit) - high) / temperature);
      rank++;
      weight += w;
      if (w > 0) id = c.id;
    }
  }
};

// Few candidates, all in order.
struct Few {
  std::vector<Candidate> ranked;
  double temperature;

  Walk walk(int64_t ranks, double limit) const {
    Walk at;
    at.along(ranked, ranked[0].logit, temperature, ranks, limit);
    return at;
  }
  int64_t at_least(double weight) const {
    int64_t n = 0;
    for (const Candidate &c : ranked) n += exp_double((static_cast<double>(c.logit) - ranked[0].logit) / temperature) >= weight;
    return n;
  }
};

// All of a row, in buckets of equal width below the largest logit. Only the bucket that a walk ends in is put in order.
struct Buckets {
  static constexpr int N = 4096;
  const float *logits;
  int64_t V;
  float high;
  double temperature;
  std::vector<uint16_t> bucket;
  std::vector<int32_t> count = std::vector<int32_t>(N);
  std::vector<double> weight = std::vector<double>(N);
  int64_t heavy = 0;  // how many weigh at least min_p

  Buckets(const float *logits, int64_t V, Range range, const Options &o)
      : logits(logits), V(V), high(range.high), temperature(o.temperature), bucket(V) {
    const float span = std::min<float>(range.high - range.low, 32 * o.temperature);  // exp(-32) is 1e-14
    const float per_unit = span > 0 ? N / span : 0.0f;
    constexpr int64_t BLOCK = 256;
    double w[BLOCK];
    for (int64_t start = 0; start < V; start += BLOCK) {
      const int64_t n = std::min(BLOCK, V - start);
      const float *x = logits + start;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        const float place = (high - x[i]) * per_unit;
        bucket[start + i] = place < N - 1 ? static_cast<int32_t>(place) : N - 1;
        w[i] = exp_double((static_cast<double>(x[i]) - high) / temperature);
      }
      for (int64_t i = 0; i < n; i++) {
        count[bucket[start + i]]++;
        weight[bucket[start + i]] += w[i];
        heavy += w[i] >= o.min_p;
      }
    }
  }

  Walk walk(int64_t ranks, double limit) const {
    Walk at;
    for (int b = 0; b < N; b++) {
      if (at.rank + count[b] < ranks && at.weight + weight[b] < limit) {
        at.rank += count[b];
        at.weight += weight[b];
        continue;
      }
      at.along(members(b), high, temperature, ranks, limit);
      break;
    }
    return at;
  }
  std::vector<Candidate> members(int b) const {
    std::vector<Candidate> ranked;
    ranked.reserve(count[b]);
    for (int64_t i = 0; i < V; i++) {
      if (bucket[i] == b) ranked.push_back({logits[i], static_cast<int32_t>(i)});
    }
    std::sort(ranked.begin(), ranked.end());
    return ranked;
  }
  int64_t at_least(double) const { return heavy; }
};

// The formula of ops/sampling.py. The last walk goes the way of the one before it, to where the weights first pass u of their sum.
template <typename Ranked>
static int32_t draw(const Ranked &ranked, int64_t ranks, const Options &o, double u) {
  Walk kept = ranked.walk(ranks, INFINITY);
  if (o.top_p < 1) kept = ranked.walk(kept.rank, o.top_p * kept.weight);
  if (o.min_p > 0) kept = ranked.walk(std::min(kept.rank, ranked.at_least(o.min_p)), INFINITY);
  return ranked.walk(kept.rank, std::min(std::nextafter(u * kept.weight, INFINITY), kept.weight)).id;
}

static int token(const float *logits, int64_t V, double u, const Options &o, int32_t *id) {
  constexpr int64_t FEW = 256;  // a heap is faster than the buckets up to about here
  if (!o.valid()) return WRONG_OPTIONS;
  const Range range = range_of(logits, V);
  if (!range.finite) return NOT_FINITE;
  const int64_t ranks = o.top_k > 0 && o.top_k < V ? static_cast<int64_t>(o.top_k) : V;
  if (o.temperature == 0) {
    *id = static_cast<int32_t>(std::find(logits, logits + V, range.high) - logits);
  } else if (ranks <= FEW) {
    Few few{{}, o.temperature};
    best(logits, V, ranks, few.ranked);
    *id = draw(few, ranks, o, u);
  } else {
    *id = draw(Buckets(logits, V, range, o), ranks, o, u);
  }
  return 0;
}

// logits [B, V], u [B], options [B, 4] float64: temperature, top_k, top_p, min_p -> [B] int32
KERNEL(sampling) {
  if (!a.are("ff.i") || !a.dtype(2, "float64")) return WRONG_TYPES;
  if (a.ndims[0] != 2 || a.ndims[2] != 2 || a.dim(2, 1) != 4) return WRONG_SHAPES;
  const int64_t B = a.dim(0, 0), V = a.dim(0, 1);
  if (V < 1 || V > INT32_MAX || a.size(1) != B || a.dim(2, 0) != B || a.size(3) != B) return WRONG_SHAPES;
  const float *logits = a.get(0), *u = a.get(1);
  const double *options = a.get<double>(2);
  int32_t *ids = a.get<int32_t>(3);
  int wrong = 0;
#pragma omp parallel for schedule(dynamic) reduction(max : wrong) if (B * V > 32768)
  for (int64_t b = 0; b < B; b++) {
    const double *o = options + b * 4;
    wrong = std::max(wrong, token(logits + b * V, V, u[b], {o[0], o[1], o[2], o[3]}, ids + b));
  }
  return wrong;
}
