// The attention half of a layer for one token a row: norm, q, k and v, the norms of heads and rotary embedding, the write into the cache,
// attention over it, the output projection and the residual sum.
#include <memory>

#include "attention_few.h"
#include "norm.h"
#include "team.h"

namespace {

// W: the type of the four matrices, const float * or int8::Matrix
template <typename W>
struct Step {
  int64_t B, D, P, C, M, N, K, H;
  W wq, wk, wv, wo;
  const float *x, *norm, *q_norm, *k_norm, *cos, *sin;
  const int32_t *at, *table;
  float *k_cache, *v_cache, eps, scale;

  // All but the matrices. queries: the dim of wq that has them.
  bool read(const Args &a, int queries) {
    if (a.ndims[0] != 2 || a.ndims[2] != 2 || a.ndims[11] != 2 || a.ndims[12] != 4) return false;
    B = a.dim(0, 0), D = a.dim(0, 1), M = a.dim(11, 1), P = a.dim(12, 0), C = a.dim(12, 1), K = a.dim(12, 2), H = a.dim(12, 3);
    if (H == 0 || H % 2 || K == 0 || C == 0 || a.dim(2, queries) % (K * H)) return false;
    N = a.dim(2, queries) / H;
    const int64_t cache = P * C * K * H, angles = B * H / 2;
    const int64_t sizes[] = {B * D, D, D * N * H, D * K * H, D * K * H, N * H * D, H, H, angles, angles, B, B * M, cache, cache, 1, 1};
    for (int i = 0; i < 16; i++)
      if (a.size(i) != sizes[i]) return false;
    if (a.size(a.count - 1) != B * D) return false;
    x = a.get(0), norm = a.get(1), q_norm = a.get(6), k_norm = a.get(7);
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

template <typename W>
void run(const Step<W> &p, float *y) {
  const int64_t B = p.B, D = p.D, Q = p.N * p.H, KV = p.K * p.H;
  const std::unique_ptr<float[]> memory(new float[B * (D + 2 * Q + 2 * KV + p.N)]);
  float *normed = memory.get(), *q = normed + B * D, *k = q + B * Q, *v = k + B * KV, *o = v + B * KV, *lse = o + B * Q;
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
}

// The matrix in argument i, whose scale is argument s; false if they do not fit.
bool read_int8(const Args &a, int i, int s, int8::Matrix *w) {
  if (a.ndims[i] != 2 || a.ndims[s] != 2 || a.dim(s, 0) != a.dim(i, 0)) return false;
  *w = {a.get<int8_t>(i), a.get(s), a.dim(i, 1), a.dim(s, 1)};
  return w->groups > 0 && w->k % w->groups == 0;
}

}  // namespace

// x [B, D], its norm [D], wq [D, N H], wk, wv [D, K H], wo [N H, D], the norms of q and k [H], cos, sin [B, 1, 1, H / 2], at [B, 1],
// table [B, M], pages of keys and of values [P, C, K, H] (written to), eps, scale -> y [B, D]
KERNEL(decode_attention) {
  if (!a.are("ffffffffffiifffff")) return WRONG_TYPES;
  Step<const float *> p;
  if (!p.read(a, 1)) return WRONG_SHAPES;
  p.wq = a.get(2), p.wk = a.get(3), p.wv = a.get(4), p.wo = a.get(5);
  run(p, a.get(16));
  return 0;
}

// The same with wq [N H, D], wk, wv [K H, D] and wo [D, N H] in 8 bits, and their scales [N H, g], [K H, g], [K H, g], [D, h] after `scale`
KERNEL(decode_attention_int8) {
  if (!a.are("ffbbbbffffiifffffffff")) return WRONG_TYPES;
  Step<int8::Matrix> p;
  if (!p.read(a, 0)) return WRONG_SHAPES;
  if (!read_int8(a, 2, 16, &p.wq) || !read_int8(a, 3, 17, &p.wk) || !read_int8(a, 4, 18, &p.wv) || !read_int8(a, 5, 19, &p.wo)) return WRONG_SHAPES;
  if (p.wq.k != p.D || p.wk.k != p.D || p.wv.k != p.D || p.wo.k != p.N * p.H) return WRONG_SHAPES;
  run(p, a.get(20));
  return 0;
}
