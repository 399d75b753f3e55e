// Attention of one query a row over a paged KV cache (flash decoding). The query heads of a kv head are the rows of a tile, and their keys
// are cut into spans of 512, whatever the number of cores. Spans are shared out over the blocks, and a block has three under way:
//
//   cube      scores of span j + 2 = q k^T        weights of span j times v
//   vector    weights of span j + 1, relative to the largest score of the span
//
// After all, the vector cores merge the results of the spans of each kv head by their largest scores and sums. Pages are read where they
// are, a copy for each run of tokens of a page.
#pragma once
#include "mixed.h"

namespace qwen {

constexpr uint32_t DECODE_SPAN = 512, DECODE_AHEAD = 2, DECODE_SLOTS = 3;  // keys of a span; spans of scores ahead, and in global memory

// A span of a kv head of a row.
struct PagedSpan {
  uint32_t b, kv, span, key, n;
};

// The spans of a block in order, which all of its cores walk through.
class PagedWalk {
 public:
  __aicore__ inline void Begin(const PagedAttentionTiling &t, const GlobalTensor<int32_t> &length) {
    length_ = length, batch_ = t.batch, kv_heads_ = t.kv_heads, most_ = t.page * t.pages;
    next_ = BlockOf(), first_ = 0, at.b = 0;
    Row();
  }
  // Moves on to the next; false past the last.
  __aicore__ inline bool Next() {
    while (next_ >= first_ + kv_heads_ * spans_) {
      first_ += kv_heads_ * spans_;
      if (++at.b >= batch_) return false;
      Row();
    }
    const uint32_t i = next_ - first_;
    at.kv = i / spans_, at.span = i % spans_, at.key = at.span * DECODE_SPAN, at.n = Least(DECODE_SPAN, keys_ - at.key);
    next_ += GetBlockNum();
    return true;
  }
  // The keys that row b sees.
  __aicore__ inline uint32_t Keys(uint32_t b) const {
    const int32_t n = length_.GetValue(b);
    return n > 0 ? Least(n, most_) : 0;
  }
  PagedSpan at;

 private:
  __aicore__ inline void Row() { keys_ = Keys(at.b), spans_ = (keys_ + DECODE_SPAN - 1) / DECODE_SPAN; }
  GlobalTensor<int32_t> length_;
  uint32_t batch_, kv_heads_, most_, next_, first_, keys_, spans_;  // first_: how many spans the rows before this one have
};

template <typename T>
class PagedAttention {
 public:
  __aicore__ inline void Run(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR table, GM_ADDR length, GM_ADDR o, GM_ADDR workspace,
                             const PagedAttentionTiling &tiling) {
    t_ = tiling;
    group_ = t_.heads / t_.kv_heads, padded_group_ = AlignUp(group_, FLOATS), high_ = AlignUp(group_, FRACTAL_ROWS);
    half_ = (group_ + 1) / 2, panels_ = (t_.size + TILE - 1) / TILE, row_ = AlignUp(t_.size, FRACTAL_ROWS);
    spans_ = (t_.page * t_.pages + DECODE_SPAN - 1) / DECODE_SPAN;
    q_.SetGlobalBuffer((__gm__ T *)q), k_.SetGlobalBuffer((__gm__ T *)k), v_.SetGlobalBuffer((__gm__ T *)v);
    o_.SetGlobalBuffer((__gm__ T *)o), table_.SetGlobalBuffer((__gm__ int32_t *)table), length_.SetGlobalBuffer((__gm__ int32_t *)length);
    Workspace(GetUserWorkspace(workspace));
    if ASCEND_IS_AIC {
      CubeBuffers();
      Cube();
    } else {
      VectorBuffers();
      Vector();
    }
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    if ASCEND_IS_AIV {
      pipe_.Reset();
      Merge();
    }
  }

 private:
  static constexpr uint32_t PIECE = 128, DEPTH = 256 / sizeof(T), C = 32 / sizeof(T);  // keys of a product; of k in L0; of a block

  // Of a block: scores of three spans and weights of two. Of all: results of spans [B, K, spans, G, row], and [B, K, spans, G] of their
  // largest scores and of their sums.
  __aicore__ inline void Workspace(GM_ADDR user) {
    const uint64_t floats = DECODE_SLOTS * high_ * DECODE_SPAN, bytes = floats * sizeof(float) + 2 * high_ * DECODE_SPAN * sizeof(T);
    const uint64_t all = static_cast<uint64_t>(t_.batch) * t_.kv_heads * spans_;
    GM_ADDR mine = user + BlockOf() * bytes;
    scores_.SetGlobalBuffer((__gm__ float *)mine), weights_.SetGlobalBuffer((__gm__ T *)(mine + floats * sizeof(float)));
    GM_ADDR shared = user + GetBlockNum() * bytes;
    parts_.SetGlobalBuffer((__gm__ float *)shared);
    tops_.SetGlobalBuffer((__gm__ float *)shared + all * group_ * row_);
    totals_.SetGlobalBuffer((__gm__ float *)shared + all * (group_ * row_ + padded_group_));
  }
  __aicore__ inline uint64_t Part(uint32_t b, uint32_t kv, uint32_t span) const {
    return (static_cast<uint64_t>(b) * t_.kv_heads + kv) * spans_ + span;
  }

  // The cube.
  __aicore__ inline void CubeBuffers() {
    // 512 KiB of L1: 64 for queries, 128 for weights, 256 for tiles of 128 keys or values, of which four fit, or two of more than 64 KiB.
    const uint32_t tile = PIECE * row_ * sizeof(T);
    keys_in_l1_ = tile > 64 * 1024 ? 2 : 4;
    pipe_.InitBuffer(q1_, 2, high_ * row_ * sizeof(T)), pipe_.InitBuffer(kv1_, keys_in_l1_, tile);
    pipe_.InitBuffer(p1_, 2, high_ * DECODE_SPAN * sizeof(T));
    pipe_.InitBuffer(a2_, 2, high_ * DEPTH * sizeof(T)), pipe_.InitBuffer(b2_, 2, PIECE * DEPTH * sizeof(T));
    pipe_.InitBuffer(c_, 4, high_ * TILE * sizeof(float));
  }
  __aicore__ inline void Cube() {
    PagedWalk ahead, behind;
    ahead.Begin(t_, length_), behind.Begin(t_, length_);
    bool more = ahead.Next();
    uint32_t made = 0;
    for (; made < DECODE_AHEAD && more; made++, more = ahead.Next()) Scores(ahead.at, made);
    for (uint32_t j = 0; behind.Next(); j++) {
      if (more) {
        Scores(ahead.at, made++);
        more = ahead.Next();
      }
      Result(behind.at, j);
    }
  }
  __aicore__ inline void Scores(const PagedSpan &at, uint32_t j) {
    LocalTensor<T> q = q1_.template AllocTensor<T>();
    ToL1(q, q_[(static_cast<uint64_t>(at.b) * t_.heads + at.kv * group_) * t_.size], group_, t_.size, t_.size);
    q1_.EnQue(q);
    q = q1_.template DeQue<T>();
    const uint32_t wide = AlignUp(at.n, REPEAT);
    for (uint32_t c = 0; c < wide; c += PIECE) {
      const uint32_t n = Least(PIECE, wide - c);
      Load(k_, at, c, Least(PIECE, at.n - c), n);
      LocalTensor<T> k1 = kv1_.template DeQue<T>();
      LocalTensor<float> made = c_.AllocTensor<float>();
      for (uint32_t d = 0; d < t_.size; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, t_.size - d);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>(), b2 = b2_.template AllocTensor<T>();
        LoadRows(a2, q, group_, t_.size, d, depth);
        LoadColumns(b2, k1, n, d, depth);
        a2_.EnQue(a2), b2_.EnQue(b2);
        a2 = a2_.template DeQue<T>(), b2 = b2_.template DeQue<T>();
        MultiplyL0(made, a2, b2, group_, n, depth, false, d > 0);
        a2_.FreeTensor(a2), b2_.FreeTensor(b2);
      }
      kv1_.FreeTensor(k1);
      Put(scores_[static_cast<uint64_t>(j % DECODE_SLOTS) * high_ * DECODE_SPAN + c], made, n, DECODE_SPAN);
    }
    q1_.FreeTensor(q);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
  }
  // Keys or values of a span from its key c on into L1, `high` there: those past `rows` are zeros.
  __aicore__ inline void Load(const GlobalTensor<T> &cache, const PagedSpan &at, uint32_t c, uint32_t rows, uint32_t high) {
    LocalTensor<T> l1 = kv1_.template AllocTensor<T>();
    if (rows < high) {
      InitConstValueParams<T> zeros;
      zeros.repeatTimes = 1, zeros.blockNum = AlignUp(high, FRACTAL_ROWS) * row_ * sizeof(T) / 32;
      InitConstValue(l1, zeros);
      PipeBarrier<PIPE_MTE2>();
    }
    const uint64_t entries = static_cast<uint64_t>(at.b) * t_.pages;
    uint32_t n = 0;
    for (uint32_t i = 0; i < rows; i += n) {
      const uint32_t token = at.key + c + i, within = token % t_.page;
      n = Least(t_.page - within, rows - i);
      const uint64_t slot = static_cast<uint64_t>(table_.GetValue(entries + token / t_.page)) * t_.page + within;
      ToL1(l1[i * C], cache[(slot * t_.kv_heads + at.kv) * t_.size], n, t_.size, t_.kv_heads * t_.size, high);
    }
    kv1_.EnQue(l1);
  }
  __aicore__ inline void Values(const PagedSpan &at, uint32_t c) {
    const uint32_t n = Least(PIECE, at.n - c);
    Load(v_, at, c, n, n);
  }
  __aicore__ inline void Result(const PagedSpan &at, uint32_t j) {
    const uint32_t first = Least(at.n, keys_in_l1_ * PIECE);
    for (uint32_t c = 0; c < first; c += PIECE) Values(at, c);
    CrossCoreWaitFlag<2, PIPE_MTE2>(WEIGHTS_READY);
    LocalTensor<T> p1 = p1_.template AllocTensor<T>();
    ToL1(p1, weights_[static_cast<uint64_t>(j % 2) * high_ * DECODE_SPAN], group_, at.n, DECODE_SPAN);
    p1_.EnQue(p1);
    p1 = p1_.template DeQue<T>();
    LocalTensor<float> sums[2];
    for (uint32_t panel = 0; panel < panels_; panel++) sums[panel] = c_.AllocTensor<float>();
    for (uint32_t c = 0; c < at.n; c += PIECE) {
      const uint32_t n = Least(PIECE, at.n - c);
      LocalTensor<T> v1 = kv1_.template DeQue<T>();
      for (uint32_t d = 0; d < n; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, n - d);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>();
        LoadRows(a2, p1, group_, at.n, c + d, depth);
        a2_.EnQue(a2);
        a2 = a2_.template DeQue<T>();
        for (uint32_t panel = 0; panel < panels_; panel++) {
          LocalTensor<T> b2 = b2_.template AllocTensor<T>();
          LoadTurned(b2, v1, n, t_.size, d, depth, panel * TILE, PanelSize(panel));
          b2_.EnQue(b2);
          b2 = b2_.template DeQue<T>();
          MultiplyL0(sums[panel], a2, b2, group_, PanelSize(panel), depth, false, c + d > 0);
          b2_.FreeTensor(b2);
        }
        a2_.FreeTensor(a2);
      }
      kv1_.FreeTensor(v1);
      if (first + c < at.n) Values(at, first + c);
    }
    p1_.FreeTensor(p1);
    const uint64_t to = Part(at.b, at.kv, at.span) * group_ * row_;
    for (uint32_t panel = 0; panel < panels_; panel++) Put(parts_[to + panel * TILE], sums[panel], PanelSize(panel), row_);
    CrossCoreSetFlag<2, PIPE_FIX>(RESULT_READY);
  }
  __aicore__ inline uint32_t PanelSize(uint32_t panel) const { return Least(TILE, t_.size - panel * TILE); }
  __aicore__ inline void Put(const GlobalTensor<float> &to, const LocalTensor<float> &made, uint32_t n, uint32_t stride) {
    c_.EnQue(made);
    LocalTensor<float> c = c_.DeQue<float>();
    Write(to, c, group_, n, stride);
    c_.FreeTensor(c);
  }

  // The vector cores.
  __aicore__ inline void VectorBuffers() {
    const uint32_t tile = half_ * DECODE_SPAN;
    scores_in_.Init(pipe_, tile, 2);
    pipe_.InitBuffer(weights_out_, 2, tile * sizeof(T)), pipe_.InitBuffer(numbers_out_, 2, 2 * HALF * sizeof(float));
    pipe_.InitBuffer(spread_, AlignUp(half_, FLOATS) * 32), pipe_.InitBuffer(partial_, tile / FLOATS * sizeof(float));
    pipe_.InitBuffer(lanes_, REPEAT * sizeof(float)), pipe_.InitBuffer(tail_, REPEAT * sizeof(float));
    LocalTensor<int32_t> lanes = tail_.Get<int32_t>();
    CreateVecIndex(lanes, static_cast<int32_t>(0), REPEAT);
    VectorBarrier();
    Cast(lanes_.Get<float>(), lanes, RoundMode::CAST_RINT, REPEAT);
  }
  __aicore__ inline void Vector() {
    PagedWalk walk;
    walk.Begin(t_, length_);
    uint32_t j = 0;
    for (; walk.Next(); j++) {
      CrossCoreWaitFlag<2, PIPE_MTE2>(SCORES_READY);
      if (j >= 2) CrossCoreWaitFlag<2, PIPE_MTE3>(RESULT_READY);  // the cube has read the weights of two spans ago
      const Mine mine = MineOf(0, group_, half_);
      if (mine.rows) Weights(walk.at, j, mine);
      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
    }
    for (uint32_t left = Least(j, 2); left; left--) CrossCoreWaitFlag<2, PIPE_MTE3>(RESULT_READY);
  }
  // The weights of a span, of which the columns past n are nobody's, and of each row the largest score and the sum of weights.
  __aicore__ inline void Weights(const PagedSpan &at, uint32_t j, Mine mine) {
    const uint32_t rows = mine.rows, wide = AlignUp(at.n, REPEAT), count = rows * wide;
    const uint8_t repeats = rows, stride = wide / FLOATS;
    scores_in_.Load(scores_[static_cast<uint64_t>(j % DECODE_SLOTS * high_ + mine.skipped) * DECODE_SPAN], rows, wide, DECODE_SPAN - wide);
    LocalTensor<float> x = scores_in_.Wait(count), numbers = numbers_out_.AllocTensor<float>(), spread = spread_.Get<float>();
    LocalTensor<float> partial = partial_.Get<float>();
    VectorBarrier();
    Muls(x, x, t_.scale, count);
    VectorBarrier();
    if (wide > at.n) HideTail(x, rows, at.n, wide);
    BlockReduceMax(partial, x, count / REPEAT, REPEAT, 1, 1, FLOATS);
    VectorBarrier();
    WholeReduceMax(numbers, partial, wide / FLOATS, rows, 1, 1, wide / REPEAT, ReduceOrder::ORDER_ONLY_VALUE);
    SpreadRows(spread, numbers, rows);
    for (uint32_t c = 0; c < wide; c += REPEAT)
      Sub(x[c], x[c], spread, static_cast<uint64_t>(REPEAT), repeats, {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    Exp(x, x, count);
    LocalTensor<T> p = weights_out_.template AllocTensor<T>();
    VectorBarrier();
    if constexpr (IsSameType<T, float>::value)
      Muls(p, x, 1.0f, count);
    else
      Cast(p, x, RoundMode::CAST_RINT, count);
    weights_out_.EnQue(p);
    p = weights_out_.template DeQue<T>();
    DataCopyExtParams copy;
    copy.blockCount = rows, copy.blockLen = wide * sizeof(T), copy.dstStride = (DECODE_SPAN - wide) * sizeof(T);
    DataCopyPad(weights_[static_cast<uint64_t>(j % 2 * high_ + mine.skipped) * DECODE_SPAN], p, copy);
    weights_out_.FreeTensor(p);
    BlockReduceSum(partial, x, count / REPEAT, REPEAT, 1, 1, FLOATS);
    VectorBarrier();
    WholeReduceSum(numbers[HALF], partial, wide / FLOATS, rows, 1, 1, wide / REPEAT);
    scores_in_.Free();
    numbers_out_.EnQue(numbers);
    numbers = numbers_out_.DeQue<float>();
    const uint64_t to = Part(at.b, at.kv, at.span) * padded_group_ + mine.skipped;
    const DataCopyExtParams some{1, static_cast<uint32_t>(rows * sizeof(float)), 0, 0, 0};
    DataCopyPad(tops_[to], numbers, some);
    DataCopyPad(totals_[to], numbers[HALF], some);
    numbers_out_.FreeTensor(numbers);
  }
  // Adds HIDE to the columns past n, which are in the last repeat.
  __aicore__ inline void HideTail(const LocalTensor<float> &x, uint32_t rows, uint32_t n, uint32_t wide) {
    LocalTensor<float> tail = tail_.Get<float>();
    const uint8_t stride = wide / FLOATS;
    const float last = static_cast<float>(n + REPEAT - wide) - 1.0f;
    Adds(tail, lanes_.Get<float>(), -last, REPEAT);
    VectorBarrier();
    Maxs(tail, tail, 0.0f, REPEAT);
    VectorBarrier();
    Mins(tail, tail, 1.0f, REPEAT);
    VectorBarrier();
    Muls(tail, tail, HIDE, REPEAT);
    VectorBarrier();
    Add(x[wide - REPEAT], x[wide - REPEAT], tail, static_cast<uint64_t>(REPEAT), static_cast<uint8_t>(rows), {1, 1, 1, stride, stride, 0});
    VectorBarrier();
  }

  // The merge: o = sum over spans of exp(top - most) part / sum over spans of exp(top - most) total.
  __aicore__ inline void Merge() {
    unit_ = padded_group_ * row_;  // of a span in UB
    at_once_ = Least(Least(32 * 1024 / sizeof(float) / unit_, spans_), MOST_REPEATS / padded_group_);
    const uint32_t numbers = spans_ * padded_group_;
    parts_in_.Init(pipe_, at_once_ * unit_, 2), tops_in_.Init(pipe_, numbers, 1), totals_in_.Init(pipe_, numbers, 1);
    o_out_.Init(pipe_, unit_, 1);
    pipe_.InitBuffer(most_, numbers * sizeof(float)), pipe_.InitBuffer(each_, at_once_ * padded_group_ * 32);
    PagedWalk rows;
    rows.Begin(t_, length_);
    for (uint32_t i = GetBlockIdx(); i < t_.batch * t_.kv_heads; i += GetBlockNum() * 2) {
      const uint32_t b = i / t_.kv_heads, kv = i % t_.kv_heads, keys = rows.Keys(b);
      LocalTensor<float> out = o_out_.Get();
      if (keys == 0)
        Duplicate(out, 0.0f, unit_);
      else
        MergeOne(out, Part(b, kv, 0), (keys + DECODE_SPAN - 1) / DECODE_SPAN);
      o_out_.Store(o_[(static_cast<uint64_t>(b) * t_.heads + kv * group_) * t_.size], group_, t_.size, group_ * row_, 0, row_);
    }
  }
  __aicore__ inline void MergeOne(const LocalTensor<float> &out, uint64_t part, uint32_t spans) {
    const uint32_t numbers = spans * padded_group_;
    tops_in_.Load(tops_[part * padded_group_], 1, numbers), totals_in_.Load(totals_[part * padded_group_], 1, numbers);
    LoadParts(part, 0, spans);
    LocalTensor<float> weight = tops_in_.Wait(numbers), total = totals_in_.Wait(numbers), most = most_.Get<float>();
    VectorBarrier();
    Muls(most, weight, 1.0f, numbers);
    for (uint32_t n = spans; n > 1; n = (n + 1) / 2) {
      const uint32_t left = (n + 1) / 2;
      VectorBarrier();
      Max(most, most, most[left * padded_group_], (n - left) * padded_group_);
    }
    VectorBarrier();
    for (uint32_t s = 0; s < spans; s += MOST_REPEATS)
      Sub(weight[s * padded_group_], weight[s * padded_group_], most, All(), Some(spans - s), Rows());
    VectorBarrier();
    Exp(weight, weight, numbers);
    VectorBarrier();
    Mul(total, total, weight, numbers);
    SumRows(total, spans, padded_group_);
    Duplicate(most, 1.0f, padded_group_);
    VectorBarrier();
    Div(most, most, total, padded_group_);
    totals_in_.Free();
    VectorBarrier();
    for (uint32_t s = 0; s < spans; s += MOST_REPEATS)
      Mul(weight[s * padded_group_], weight[s * padded_group_], most, All(), Some(spans - s), Rows());
    for (uint32_t s = 0; s < spans; s += at_once_) {
      const uint32_t n = Least(at_once_, spans - s);
      if (s + n < spans) LoadParts(part, s + n, spans);
      LocalTensor<float> x = parts_in_.Wait(n * unit_), each = each_.Get<float>();
      SpreadRows(each, weight[s * padded_group_], n * padded_group_);
      MulEach(x, x, each, n * padded_group_, row_, row_);
      SumRows(x, n, unit_);
      if (s == 0)
        Muls(out, x, 1.0f, unit_);
      else
        Add(out, out, x, unit_);
      parts_in_.Free();
    }
    tops_in_.Free();
  }
  __aicore__ inline void LoadParts(uint64_t part, uint32_t span, uint32_t spans) {
    parts_in_.Load(parts_[(part + span) * group_ * row_], Least(at_once_, spans - span), group_ * row_, 0, unit_);
  }
  // Of a number for each query head of each span and one for each query head alone.
  __aicore__ inline uint64_t All() const { return padded_group_; }
  __aicore__ inline uint8_t Some(uint32_t spans) const { return static_cast<uint8_t>(Least(MOST_REPEATS, spans)); }
  __aicore__ inline BinaryRepeatParams Rows() const {
    const uint8_t stride = padded_group_ / FLOATS;
    return {1, 1, 1, stride, stride, 0};
  }
  // The first of n rows = the sum of all, in an order fixed by n.
  __aicore__ inline void SumRows(const LocalTensor<float> &x, uint32_t n, uint32_t row) {
    for (; n > 1; n = (n + 1) / 2) {
      const uint32_t left = (n + 1) / 2;
      VectorBarrier();
      Add(x, x, x[left * row], (n - left) * row);
    }
    VectorBarrier();
  }

  static constexpr uint32_t MOST_REPEATS = 248;
  TPipe pipe_;
  PagedAttentionTiling t_;
  GlobalTensor<T> q_, k_, v_, o_, weights_;
  GlobalTensor<int32_t> table_, length_;
  GlobalTensor<float> scores_, parts_, tops_, totals_;
  uint32_t group_, padded_group_, high_, half_, panels_, row_, spans_;
  // of the cube
  TQue<TPosition::A1, 1> q1_, p1_;
  TQue<TPosition::B1, 4> kv1_;
  TQue<TPosition::A2, 1> a2_;
  TQue<TPosition::B2, 1> b2_;
  TQue<TPosition::CO1, 1> c_;
  uint32_t keys_in_l1_;  // tiles of them
  // of the vector cores
  In<float> scores_in_, parts_in_, tops_in_, totals_in_;
  TQue<TPosition::VECOUT, 1> weights_out_, numbers_out_;
  TBuf<TPosition::VECCALC> spread_, partial_, lanes_, tail_, most_, each_;
  Out<T> o_out_;
  uint32_t unit_, at_once_;  // of the merge: floats of a span, and spans at a time
};

}  // namespace qwen
