// Flash attention (Dao 2023): for each tile of 128 queries of a head, spans of 512 keys with running maximum, sum and result. Three spans
// are under way in a block, also of one tile and the next:
//
//   cube      scores of span j + 2 = q k^T        weights of span j times v
//   vector    weights of span j + 1, from its scores and the running maximum        adds up the result of span j, rescaled
#pragma once
#include "attention_spans.h"

namespace qwen {

constexpr uint32_t AHEAD = 2, SLOTS_OF_SCORES = 3;  // spans of scores that are made ahead

template <typename T>
class Attention {
 public:
  __aicore__ inline void Run(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR segment, GM_ADDR key_segment, GM_ADDR order, GM_ADDR key_order,
                             GM_ADDR o, GM_ADDR lse, GM_ADDR workspace, const AttentionTiling &tiling) {
    in_.Init(q, k, v, segment, key_segment, order, key_order, tiling);
    o_.SetGlobalBuffer((__gm__ T *)o), lse_.SetGlobalBuffer((__gm__ float *)lse);
    const uint64_t floats = SLOTS_OF_SCORES * ROWS * SPAN + 2 * in_.panels * ROWS * TILE;
    const uint64_t bytes = floats * sizeof(float) + 2 * ROWS * SPAN * sizeof(T);
    GM_ADDR user = GetUserWorkspace(workspace);
    GM_ADDR mine = user + BlockOf() * bytes;
    scores_.SetGlobalBuffer((__gm__ float *)mine), result_.SetGlobalBuffer((__gm__ float *)mine + SLOTS_OF_SCORES * ROWS * SPAN);
    weights_.SetGlobalBuffer((__gm__ T *)(mine + floats * sizeof(float)));
    ranges_.Init(in_, user + GetBlockNum() * bytes, SPAN);
    if ASCEND_IS_AIC
      CubeBuffers();
    else
      VectorBuffers();
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    if ASCEND_IS_AIC
      Cube();
    else
      Vector();
  }

 private:
  static constexpr uint32_t PIECE = 128, DEPTH = 256 / sizeof(T);     // keys of a product, and of L0
  static constexpr uint32_t WEIGHTS_AT_ONCE = 64 * 1024 / ROWS / sizeof(T);  // keys of weights in L1

  // The cube.
  __aicore__ inline void CubeBuffers() {
    // 512 KiB of L1: 128 for weights; for heads of up to 64 KiB two tiles of queries and four of keys or values, else one and two
    const uint32_t head = ROWS * AlignUp(in_.size, FRACTAL_ROWS) * sizeof(T);
    keys_in_l1_ = head > 64 * 1024 ? 2 : 4;
    pipe_.InitBuffer(q1_, keys_in_l1_ / 2, head), pipe_.InitBuffer(kv1_, keys_in_l1_, head);
    pipe_.InitBuffer(p1_, 2, ROWS * WEIGHTS_AT_ONCE * sizeof(T));
    pipe_.InitBuffer(a2_, 2, ROWS * DEPTH * sizeof(T)), pipe_.InitBuffer(b2_, 2, PIECE * DEPTH * sizeof(T));
    pipe_.InitBuffer(c_, 2, ROWS * TILE * sizeof(float));
  }
  __aicore__ inline void Cube() {
    Walk<T> ahead, behind;
    ahead.Begin(&in_, &ranges_, ROWS, SPAN), behind.Begin(&in_, &ranges_, ROWS, SPAN);
    bool more = ahead.Next();
    uint32_t made = 0;
    for (; made < AHEAD && more; made++, more = ahead.Next()) Scores(ahead.at, made);
    for (uint32_t j = 0; behind.Next(); j++) {
      if (more) {
        Scores(ahead.at, made++);
        more = ahead.Next();
      }
      Result(behind.at, j);
    }
    if (holds_q_) q1_.FreeTensor(q_);
  }
  __aicore__ inline void Scores(const Handover &at, uint32_t j) {
    if (at.begins) {
      if (holds_q_) q1_.FreeTensor(q_);
      q_ = q1_.template AllocTensor<T>(), holds_q_ = true;
      ToL1(q_, in_.q[in_.Query(at.b, at.first, at.head)], at.rows, in_.size, in_.QueryStride());
      q1_.EnQue(q_);
      q_ = q1_.template DeQue<T>();
    }
    const uint32_t wide = AlignUp(at.n, REPEAT), kv = at.head / (in_.heads / in_.kv_heads);
    for (uint32_t c = 0; c < wide; c += PIECE) {
      const uint32_t n = Least(PIECE, wide - c);
      Load(in_.k[in_.Key(at.b, at.key + c, kv)], Least(PIECE, at.n - c), n);
      LocalTensor<T> k1 = kv1_.template DeQue<T>();
      LocalTensor<float> made = c_.AllocTensor<float>();
      for (uint32_t d = 0; d < in_.size; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, in_.size - d);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>(), b2 = b2_.template AllocTensor<T>();
        LoadRows(a2, q_, at.rows, in_.size, d, depth);
        LoadColumns(b2, k1, n, d, depth);
        a2_.EnQue(a2), b2_.EnQue(b2);
        a2 = a2_.template DeQue<T>(), b2 = b2_.template DeQue<T>();
        MultiplyL0(made, a2, b2, at.rows, n, depth, false, d > 0);
        a2_.FreeTensor(a2), b2_.FreeTensor(b2);
      }
      kv1_.FreeTensor(k1);
      Put(scores_[static_cast<uint64_t>(j % SLOTS_OF_SCORES) * ROWS * SPAN + c], made, at.rows, n, SPAN);
    }
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
  }
  // Rows of keys or values into L1, `high` there: those past `rows` are zeros.
  __aicore__ inline void Load(const GlobalTensor<T> &from, uint32_t rows, uint32_t high) {
    LocalTensor<T> l1 = kv1_.template AllocTensor<T>();
    if (rows < high) {
      InitConstValueParams<T> zeros;
      zeros.repeatTimes = 1, zeros.blockNum = AlignUp(high, FRACTAL_ROWS) * AlignUp(in_.size, FRACTAL_ROWS) * sizeof(T) / 32;
      InitConstValue(l1, zeros);
      PipeBarrier<PIPE_MTE2>();
    }
    ToL1(l1, from, rows, in_.size, in_.KeyStride(), high);
    kv1_.EnQue(l1);
  }
  __aicore__ inline void Values(const Handover &at, uint32_t c) {
    const uint32_t kv = at.head / (in_.heads / in_.kv_heads), n = Least(PIECE, at.n - c);
    Load(in_.v[in_.Key(at.b, at.key + c, kv)], n, n);
  }
  __aicore__ inline void Result(const Handover &at, uint32_t j) {
    const uint32_t first = Least(at.n, keys_in_l1_ * PIECE);
    for (uint32_t c = 0; c < first; c += PIECE) Values(at, c);
    CrossCoreWaitFlag<2, PIPE_MTE2>(WEIGHTS_READY);
    LocalTensor<float> sums[2];
    for (uint32_t panel = 0; panel < in_.panels; panel++) sums[panel] = c_.AllocTensor<float>();
    LocalTensor<T> p1;
    for (uint32_t c = 0; c < at.n; c += PIECE) {
      const uint32_t n = Least(PIECE, at.n - c), within = c % WEIGHTS_AT_ONCE, begin = c - within,
                     held = Least(WEIGHTS_AT_ONCE, at.n - begin);
      if (within == 0) {
        p1 = p1_.template AllocTensor<T>();
        ToL1(p1, weights_[static_cast<uint64_t>(j % 2) * ROWS * SPAN + c], at.rows, held, SPAN);
        p1_.EnQue(p1);
        p1 = p1_.template DeQue<T>();
      }
      LocalTensor<T> v1 = kv1_.template DeQue<T>();
      for (uint32_t d = 0; d < n; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, n - d);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>();
        LoadRows(a2, p1, at.rows, held, within + d, depth);
        a2_.EnQue(a2);
        a2 = a2_.template DeQue<T>();
        for (uint32_t panel = 0; panel < in_.panels; panel++) {
          LocalTensor<T> b2 = b2_.template AllocTensor<T>();
          LoadTurned(b2, v1, n, in_.size, d, depth, panel * TILE, in_.PanelSize(panel));
          b2_.EnQue(b2);
          b2 = b2_.template DeQue<T>();
          MultiplyL0(sums[panel], a2, b2, at.rows, in_.PanelSize(panel), depth, false, c + d > 0);
          b2_.FreeTensor(b2);
        }
        a2_.FreeTensor(a2);
      }
      kv1_.FreeTensor(v1);
      if (first + c < at.n) Values(at, first + c);
      if (begin + held == c + n) p1_.FreeTensor(p1);
    }
    for (uint32_t panel = 0; panel < in_.panels; panel++)
      Put(result_[static_cast<uint64_t>(j % 2 * in_.panels + panel) * ROWS * TILE], sums[panel], at.rows, in_.PanelSize(panel), TILE);
    CrossCoreSetFlag<2, PIPE_FIX>(RESULT_READY);
  }
  __aicore__ inline void Put(const GlobalTensor<float> &to, const LocalTensor<float> &made, uint32_t m, uint32_t n, uint32_t stride) {
    c_.EnQue(made);
    LocalTensor<float> c = c_.DeQue<float>();
    Write(to, c, m, n, stride);
    c_.FreeTensor(c);
  }

  // The vector cores.
  __aicore__ inline void VectorBuffers() {
    at_once_ = sizeof(T) == 2 && in_.panels == 1 ? 16 : 8;
    ranges_.Buffers(pipe_), mask_.Init(pipe_, SPAN, &ranges_);
    ranges_.Find(in_);
    scores_in_.Init(pipe_, at_once_ * SPAN, 2), result_in_.Init(pipe_, FEW * TILE, 2);
    pipe_.InitBuffer(weights_out_, 2, at_once_ * SPAN * sizeof(T)), pipe_.InitBuffer(o_out_, 1, FEW * TILE * sizeof(T));
    pipe_.InitBuffer(sum_, in_.panels * HALF * TILE * sizeof(float)), pipe_.InitBuffer(spread_, HALF * 32);
    pipe_.InitBuffer(partial_, at_once_ * SPAN / FLOATS * sizeof(float));
    pipe_.InitBuffer(numbers_, 8 * HALF * sizeof(float)), pipe_.InitBuffer(lse_out_, 1, HALF * sizeof(float));
  }
  __aicore__ inline void Vector() {
    Walk<T> ahead, behind;
    ahead.Begin(&in_, &ranges_, ROWS, SPAN), behind.Begin(&in_, &ranges_, ROWS, SPAN);
    for (uint32_t j = 0; ahead.Next(); j++) {
      Weights(ahead.at, j);
      if (j == 0) continue;
      behind.Next();
      AddUp(behind.at, j - 1);
      last_ = j;
    }
    if (behind.Next()) AddUp(behind.at, last_);
  }
  // Numbers of 64 rows: the running maximum and sum of a tile and of the next; what two spans' sums are rescaled by; of a
  // span, the largest so far (or what is to spare) and the sum.
  __aicore__ inline LocalTensor<float> Top(uint32_t task) { return numbers_.Get<float>()[task % 2 * HALF]; }
  __aicore__ inline LocalTensor<float> Total(uint32_t task) { return numbers_.Get<float>()[(2 + task % 2) * HALF]; }
  __aicore__ inline LocalTensor<float> Fall(uint32_t j) { return numbers_.Get<float>()[(4 + j % 2) * HALF]; }
  __aicore__ inline LocalTensor<float> Spare() { return numbers_.Get<float>()[6 * HALF]; }
  __aicore__ inline LocalTensor<float> Part() { return numbers_.Get<float>()[7 * HALF]; }

  // The weights of a span, of which the columns past n are nobody's.
  __aicore__ inline void Weights(const Handover &at, uint32_t j) {
    const Mine mine = MineOf(at.first, at.rows);
    const uint32_t wide = AlignUp(at.n, REPEAT);
    if (mine.rows && at.begins) {
      VectorBarrier();
      Duplicate(Top(at.task), LOWEST_TOP, HALF), Duplicate(Total(at.task), 0.0f, HALF);
      knows_queries_ = false;
    }
    if (mine.rows && at.masked != Masked::NOT) {
      const uint64_t query = static_cast<uint64_t>(at.b) * in_.S + mine.first, key = static_cast<uint64_t>(at.b) * in_.keys + at.key;
      if (!knows_queries_) mask_.Rows(in_.segment[query], in_.order[query], mine.rows), knows_queries_ = true;
      mask_.Columns(in_.key_segment[key], in_.key_order[key], at.n, wide);
    }
    CrossCoreWaitFlag<2, PIPE_MTE2>(SCORES_READY);
    if (mine.rows) LoadScores(j, mine, 0, wide);
    for (uint32_t r = 0; r < mine.rows; r += at_once_) {
      if (r + at_once_ < mine.rows) LoadScores(j, mine, r + at_once_, wide);
      Rows(at, j, mine, r, Least(at_once_, mine.rows - r), wide);
    }
    if (mine.rows) Rise(at.task, j, mine.rows);
    CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
  }
  __aicore__ inline void LoadScores(uint32_t j, Mine mine, uint32_t r, uint32_t wide) {
    const uint64_t at = static_cast<uint64_t>(j % SLOTS_OF_SCORES * ROWS + mine.skipped + r) * SPAN;
    scores_in_.Load(scores_[at], Least(at_once_, mine.rows - r), wide, SPAN - wide);
  }
  // After a span: the running maximum and sum, and what the result before it is to be rescaled by.
  __aicore__ inline void Rise(uint32_t task, uint32_t j, uint32_t rows) {
    LocalTensor<float> top = Top(task), total = Total(task), fall = Fall(j), most = Spare();
    VectorBarrier();
    Sub(fall, top, most, rows);
    VectorBarrier();
    Exp(fall, fall, rows);
    Muls(top, most, 1.0f, rows);
    VectorBarrier();
    Mul(total, total, fall, rows);
    VectorBarrier();
    Add(total, total, Part(), rows);
  }
  // Of some rows of a span, from row r on: the weights, their sum, and the largest score so far.
  __aicore__ inline void Rows(const Handover &at, uint32_t j, Mine mine, uint32_t r, uint32_t rows, uint32_t wide) {
    const uint32_t count = rows * wide, row = mine.skipped + r;
    const uint8_t repeats = rows, stride = wide / FLOATS;
    LocalTensor<float> most = Spare()[r], spread = spread_.Get<float>(), x = scores_in_.Wait(count);
    VectorBarrier();
    Muls(x, x, in_.scale, count);
    VectorBarrier();
    if (at.masked != Masked::NOT) mask_.Apply(x, r, rows, wide, at.masked, false);
    Largest(most, x, rows, wide);
    Max(most, most, Top(at.task)[r], rows);
    SpreadRows(spread, most, rows);
    for (uint32_t c = 0; c < wide; c += REPEAT)
      Sub(x[c], x[c], spread, static_cast<uint64_t>(REPEAT), repeats, {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    LocalTensor<T> p = weights_out_.template AllocTensor<T>();
    Exp(x, x, count);
    VectorBarrier();
    if constexpr (IsSameType<T, float>::value)
      Muls(p, x, 1.0f, count);
    else
      Cast(p, x, RoundMode::CAST_RINT, count);
    Sum(Part()[r], x, rows, wide);
    scores_in_.Free();
    weights_out_.EnQue(p);
    p = weights_out_.template DeQue<T>();
    DataCopyExtParams copy;
    copy.blockCount = rows, copy.blockLen = wide * sizeof(T), copy.dstStride = (SPAN - wide) * sizeof(T);
    DataCopyPad(weights_[static_cast<uint64_t>(j % 2 * ROWS + row) * SPAN], p, copy);
    weights_out_.FreeTensor(p);
  }
  // Of each row: the largest of each block of 8, and then of those, which are up to 64.
  __aicore__ inline void Largest(const LocalTensor<float> &to, const LocalTensor<float> &x, uint32_t rows, uint32_t wide) {
    LocalTensor<float> partial = partial_.Get<float>();
    BlockReduceMax(partial, x, rows * wide / REPEAT, REPEAT, 1, 1, FLOATS);
    VectorBarrier();
    WholeReduceMax(to, partial, wide / FLOATS, rows, 1, 1, wide / FLOATS / FLOATS, ReduceOrder::ORDER_ONLY_VALUE);
    VectorBarrier();
  }
  __aicore__ inline void Sum(const LocalTensor<float> &to, const LocalTensor<float> &x, uint32_t rows, uint32_t wide) {
    LocalTensor<float> partial = partial_.Get<float>();
    BlockReduceSum(partial, x, rows * wide / REPEAT, REPEAT, 1, 1, FLOATS);
    VectorBarrier();
    WholeReduceSum(to, partial, wide / FLOATS, rows, 1, 1, wide / FLOATS / FLOATS);
    VectorBarrier();
  }
  // [HALF, TILE]: the sum so far
  __aicore__ inline LocalTensor<float> SumOf(uint32_t panel) { return sum_.Get<float>()[panel * HALF * TILE]; }
  // sum = sum * fall + the span's
  __aicore__ inline void AddUp(const Handover &at, uint32_t j) {
    const Mine mine = MineOf(at.first, at.rows);
    CrossCoreWaitFlag<2, PIPE_MTE2>(RESULT_READY);
    if (mine.rows == 0) return;
    if (!at.begins) SpreadRows(spread_.Get<float>(), Fall(j), mine.rows);
    for (uint32_t panel = 0; panel < in_.panels; panel++) {
      const uint32_t columns = AlignUp(in_.PanelSize(panel), FLOATS);
      LocalTensor<float> sum = SumOf(panel);
      LoadResult(j, panel, mine, 0);
      if (!at.begins) MulEach(sum, sum, spread_.Get<float>(), mine.rows, columns, TILE);
      for (uint32_t r = 0; r < mine.rows; r += FEW) {
        const uint32_t count = Least(FEW, mine.rows - r) * TILE;
        if (r + FEW < mine.rows) LoadResult(j, panel, mine, r + FEW);
        LocalTensor<float> part = result_in_.Wait(count);
        VectorBarrier();
        if (at.begins)
          Muls(sum[r * TILE], part, 1.0f, count);
        else
          Add(sum[r * TILE], sum[r * TILE], part, count);
        result_in_.Free();
      }
    }
    if (at.ends) Finish(at, mine);
  }
  __aicore__ inline void LoadResult(uint32_t j, uint32_t panel, Mine mine, uint32_t r) {
    const uint64_t at = (static_cast<uint64_t>(j % 2 * in_.panels + panel) * ROWS + mine.skipped + r) * TILE;
    result_in_.Load(result_[at], 1, Least(FEW, mine.rows - r) * TILE);
  }
  // o = sum / total, lse = top + ln(total). A query that sees no key has a total of 0, and a result of 0.
  __aicore__ inline void Finish(const Handover &at, Mine mine) {
    LocalTensor<float> top = Top(at.task), total = Total(at.task), share = Spare();
    VectorBarrier();
    Adds(total, total, 1.0e-30f, mine.rows);  // to no effect on others, which are at least 1; a NaN stays
    Duplicate(share, 1.0f, HALF);
    VectorBarrier();
    Div(share, share, total, mine.rows);
    SpreadRows(spread_.Get<float>(), share, mine.rows);
    LocalTensor<float> lse = lse_out_.AllocTensor<float>();
    Ln(lse, total, mine.rows);
    VectorBarrier();
    Add(lse, lse, top, mine.rows);
    lse_out_.EnQue(lse);
    lse = lse_out_.DeQue<float>();
    const uint64_t to = (static_cast<uint64_t>(at.b) * in_.heads + at.head) * in_.S + mine.first;
    DataCopyPad(lse_[to], lse, DataCopyExtParams{1, static_cast<uint32_t>(mine.rows * sizeof(float)), 0, 0, 0});
    lse_out_.FreeTensor(lse);
    for (uint32_t panel = 0; panel < in_.panels; panel++) {
      LocalTensor<float> sum = SumOf(panel);
      MulEach(sum, sum, spread_.Get<float>(), mine.rows, AlignUp(in_.PanelSize(panel), FLOATS), TILE);
      VectorBarrier();
      for (uint32_t r = 0; r < mine.rows; r += FEW)
        Store(in_.Query(at.b, mine.first + r, at.head) + panel * TILE, sum[r * TILE], Least(FEW, mine.rows - r), in_.PanelSize(panel));
    }
  }
  // Rows of the result, which lie TILE apart, into those of a head.
  __aicore__ inline void Store(uint64_t at, const LocalTensor<float> &sum, uint32_t rows, uint32_t columns) {
    LocalTensor<T> o = o_out_.template AllocTensor<T>();
    if constexpr (IsSameType<T, float>::value)
      Muls(o, sum, 1.0f, rows * TILE);
    else
      Cast(o, sum, RoundMode::CAST_RINT, rows * TILE);
    o_out_.EnQue(o);
    o = o_out_.template DeQue<T>();
    DataCopyExtParams copy;
    copy.blockCount = rows, copy.blockLen = columns * sizeof(T), copy.dstStride = (in_.QueryStride() - columns) * sizeof(T);
    copy.srcStride = (TILE - Padded<T>(columns)) * sizeof(T) / 32;
    DataCopyPad(o_[at], o, copy);
    o_out_.FreeTensor(o);
  }

  static constexpr uint32_t FEW = 16;  // rows of a result at a time
  TPipe pipe_;
  Inputs<T> in_;
  Ranges ranges_;
  GlobalTensor<T> o_, weights_;
  GlobalTensor<float> lse_, scores_, result_;
  // of the cube
  TQue<TPosition::A1, 1> q1_, p1_;
  TQue<TPosition::B1, 4> kv1_;
  TQue<TPosition::A2, 1> a2_;
  TQue<TPosition::B2, 1> b2_;
  TQue<TPosition::CO1, 1> c_;
  LocalTensor<T> q_;
  bool holds_q_ = false;
  uint32_t keys_in_l1_;  // tiles of them
  // of the vector cores
  SpanMask mask_;
  In<float> scores_in_, result_in_;
  TQue<TPosition::VECOUT, 1> weights_out_, o_out_, lse_out_;
  TBuf<TPosition::VECCALC> sum_, spread_, partial_, numbers_;
  uint32_t at_once_, last_ = 0;  // rows of scores at a time
  bool knows_queries_ = false;
};

}  // namespace qwen
