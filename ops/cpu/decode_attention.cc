// The attention half of a layer for one token a row: norm, q, k and v, the norms of heads and rotary embedding, the write into the cache,
// attention over it, the output projection and the residual sum.
#include <memory>

#include "attention_few.h"
#include "norm.h"
#include "team.h"

namespace {

struct Step {
  int64_t B, D, P, C, M, N, K, H;
  const float *x, *norm, *wq, *wk, *wv, *wo, *q_norm, *k_norm, *cos, *sin;
  const int32_t *at, *table;
  float *k_cache, *v_cache, eps, scale;

  bool read(const Args &a) {
    if (a.ndims[0] != 2 || a.ndims[2] != 2 || a.ndims[11] != 2 || a.ndims[12] != 4) return false;
    B = a.dim(0, 0), D = a.dim(0, 1), M = a.dim(11, 1), P = a.dim(12, 0), C = a.dim(12, 1), K = a.dim(12, 2), H = a.dim(12, 3);
    if (H == 0 || H % 2 || K == 0 || C == 0 || a.dim(2, 1) % (K * H)) return false;
    N = a.dim(2, 1) / H;
    const int64_t cache = P * C * K * H, angles = B * H / 2;
    const int64_t sizes[] = {B * D, D, D * N * H, D * K * H, D * K * H, N * H * D, H, H, angles, angles, B, B * M, cache, cache, 1, 1, B * D};
    for (int i = 0; i < 17; i++)
      if (a.size(i) != sizes[i]) return false;
    x = a.get(0), norm = a.get(1), wq = a.get(2), wk = a.get(3), wv = a.get(4), wo = a.get(5), q_norm = a.get(6), k_norm = a.get(7);
    cos = a.get(8), sin = a.get(9), at = a.get<int32_t>(10), table = a.get<int32_t>(11), k_cache = a.get(12), v_cache = a.get(13), eps = *a.get(14);
    scale = *a.get(15);
    return true;
  }
  // What attention is asked, of queries q.
  Problem problem(const float *q) const {
    Problem p{};
    p.B = B, p.S = 1, p.N = N, p.H = H, p.T = M * C, p.K = K, p.G = N / K, p.wide = padded(H), p.table = table, p.C = C, p.M = M;
    p.q = q, p.k = k_cache, p.v = v_cache, p.scale = scale;
    return p;
  }
  // For each row the last position that it sees, at[b] or the last one for which it has a page; -1 if there is none.
  std::vector<int32_t> last_seen() const {
    std::vector<int32_t> last(B);
    for (int64_t b = 0; b < B; b++) {
      int64_t t = std::min<int64_t>(at[b], M * C - 1);
      while (t >= 0 && (table[b * M + t / C] < 0 || table[b * M + t / C] >= P)) t = t / C * C - 1;
      last[b] = static_cast<int32_t>(std::max<int64_t>(t, -1));
    }
    return last;
  }
  // The heads of a row and kv head: normed and turned, q where it is, k and v into their slot; of a row without a page for them they are dropped.
  void place(const Problem &p, const UpTo &seen, int64_t b, int64_t head, float *q, float *k, const float *v) const {
    const int64_t G = N / K;
    with_constant_half(H / 2, [&](auto constant) {
      const int64_t half = constant ? constant : H / 2;
      const float *c = cos + b * half, *s = sin + b * half;
      for (int64_t g = 0; g < G; g++) {
        float *one = q + (b * N + head * G + g) * H;
        norm_turn_head(one, q_norm, c, s, half, eps, one);
      }
      float *one = k + (b * K + head) * H;
      norm_turn_head(one, k_norm, c, s, half, eps, one);
    });
    if (at[b] != seen.at[b] || !seen.sees(b)) return;
    const int64_t slot = p.k_at(b, at[b], head), from = (b * K + head) * H;
    std::copy_n(k + from, H, k_cache + slot);
    std::copy_n(v + from, H, v_cache + slot);
  }
};

}  // namespace

// x [B, D], its norm [D], wq [D, N H], wk, wv [D, K H], wo [N H, D], the norms of q and k [H], cos, sin [B, 1, 1, H / 2], at [B, 1],
// table [B, M], pages of keys and of values [P, C, K, H] (written to), eps, scale -> y [B, D]
KERNEL(decode_attention) {
  if (!a.are("ffffffffffiifffff")) return WRONG_TYPES;
  Step p;
  if (!p.read(a)) return WRONG_SHAPES;
  const int64_t B = p.B, D = p.D, Q = p.N * p.H, KV = p.K * p.H;
  const std::unique_ptr<float[]> memory(new float[B * (D + 2 * Q + 2 * KV + p.N)]);
  float *normed = memory.get(), *q = normed + B * D, *k = q + B * Q, *v = k + B * KV, *o = v + B * KV, *lse = o + B * Q, *y = a.get(16);
  const Problem problem = p.problem(q);
  const std::vector<int32_t> last = p.last_seen();
  const UpTo seen{problem, last.data(), p.P};
  const Few<UpTo> few{problem, seen, o, lse};
  const int threads = few::threads_for(B, 2 * D * (Q + KV));
  const Columns of_q(Q, threads), of_kv(KV, threads), of_y(D, threads);
  Team(threads).run([&](Team::Worker &worker) {
    const Memory own(few.floats());
    worker.stage(B, [&](int64_t b) { norm_row<false>(p.x + b * D, nullptr, p.norm, nullptr, normed + b * D, D, p.eps); });
    worker.stage(of_q.pieces() + 2 * of_kv.pieces(), [&](int64_t i) {
      if (i < of_q.pieces()) return multiply(of_q, i, B, D, normed, p.wq, q);
      i -= of_q.pieces();
      if (i < of_kv.pieces()) return multiply(of_kv, i, B, D, normed, p.wk, k);
      multiply(of_kv, i - of_kv.pieces(), B, D, normed, p.wv, v);
    });
    worker.stage(B * p.K, [&](int64_t i) {
      const int64_t b = i / p.K, head = i % p.K;
      int64_t from, to;
      p.place(problem, seen, b, head, q, k, v);
      seen.range(b, &from, &to);
      few.block(b, head, from, to, Pieces(own));
    });
    worker.stage(of_y.pieces(), [&](int64_t i) { multiply_add(of_y, i, B, Q, o, p.wo, p.x, y); });
  });
  return 0;
}
