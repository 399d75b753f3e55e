// Flash attention (Dao 2023): for each tile of queries, a loop over tiles of keys with running maximum, sum and result.
//
//   cube      scores of tile i + 1 = q k^T     weights of tile i times v
//   vector    weights of tile i, from its scores and the running maximum; then rescales the result if the maximum rose
#pragma once
#include "attention_tiles.h"

namespace qwen {

template <typename T>
class Attention {
 public:
  __aicore__ inline void Run(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR segment, GM_ADDR key_segment, GM_ADDR order, GM_ADDR key_order,
                             GM_ADDR o, GM_ADDR lse, GM_ADDR workspace, const AttentionTiling &tiling) {
    in_.Init(q, k, v, segment, key_segment, order, key_order, tiling);
    o_.SetGlobalBuffer((__gm__ T *)o), lse_.SetGlobalBuffer((__gm__ float *)lse);
    const uint64_t floats = 2 * ROWS * KEYS + in_.panels * ROWS * TILE, bytes = floats * sizeof(float) + ROWS * KEYS * sizeof(T);
    GM_ADDR mine = GetUserWorkspace(workspace) + BlockOf() * bytes;
    scores_.SetGlobalBuffer((__gm__ float *)mine), result_.SetGlobalBuffer((__gm__ float *)mine + 2 * ROWS * KEYS);
    weights_.SetGlobalBuffer((__gm__ T *)(mine + floats * sizeof(float)));
    if ASCEND_IS_AIC {
      products_.Init(pipe_);
      pipe_.InitBuffer(c_, 2, ROWS * TILE * sizeof(float));
    } else {
      Buffers();
    }
    const uint32_t tiles = (in_.S + ROWS - 1) / ROWS, tasks = in_.batch * in_.heads * tiles;
    for (uint32_t task = BlockOf(); task < tasks; task += GetBlockNum()) {
      const uint32_t b = task / tiles / in_.heads, head = task / tiles % in_.heads, first = task % tiles * ROWS;
      const uint32_t rows = Least(ROWS, in_.S - first), keys = in_.KeysFor(first + rows - 1);
      if ASCEND_IS_AIC
        Cube(b, head, first, rows, keys);
      else
        Vector(b, head, MineOf(first, rows), keys);
    }
  }

 private:
  __aicore__ inline void Cube(uint32_t b, uint32_t head, uint32_t first, uint32_t rows, uint32_t keys) {
    const uint32_t kv = head / (in_.heads / in_.kv_heads);
    Scores(b, head, kv, first, rows, 0, Least(KEYS, keys), 0);
    for (uint32_t t = 0, i = 0; t < keys; t += KEYS, i++) {
      const uint32_t next = t + KEYS, n = Least(KEYS, keys - t);
      if (next < keys) Scores(b, head, kv, first, rows, next, Least(KEYS, keys - next), (i + 1) % 2);
      CrossCoreWaitFlag(WEIGHTS_READY);
      Matrix<T, false> p = {weights_, KEYS}, v = {in_.v[in_.Key(b, t, kv)], in_.KeyStride()};
      for (uint32_t panel = 0; panel < in_.panels; panel++) Result(p, v, rows, n, panel);
      CrossCoreSetFlag<2, PIPE_FIX>(RESULT_READY);
    }
  }
  __aicore__ inline void Scores(uint32_t b, uint32_t head, uint32_t kv, uint32_t first, uint32_t rows, uint32_t key, uint32_t n,
                                uint32_t slot) {
    LocalTensor<float> c = c_.AllocTensor<float>();
    Matrix<T, false> q = {in_.q[in_.Query(b, first, head)], in_.QueryStride()};
    Matrix<T, true> k = {in_.k[in_.Key(b, key, kv)], in_.KeyStride()};
    products_.Multiply(c, q, k, rows, n, in_.size, false);
    Put(scores_[slot * ROWS * KEYS], c, rows, n, KEYS);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
  }
  __aicore__ inline void Result(const Matrix<T, false> &p, Matrix<T, false> v, uint32_t rows, uint32_t n, uint32_t panel) {
    const uint32_t columns = in_.PanelSize(panel);
    LocalTensor<float> c = c_.AllocTensor<float>();
    v.at = v.From(0, panel * TILE);
    products_.Multiply(c, p, v, rows, columns, n, false);
    Put(result_[panel * ROWS * TILE], c, rows, columns, TILE);
  }
  __aicore__ inline void Put(const GlobalTensor<float> &to, const LocalTensor<float> &made, uint32_t m, uint32_t n, uint32_t stride) {
    c_.EnQue(made);
    LocalTensor<float> c = c_.DeQue<float>();
    Write(to, c, m, n, stride);
    c_.FreeTensor(c);
  }

  __aicore__ inline void Buffers() {
    hidden_.Init(pipe_);
    in_tile_.Init(pipe_, HALF * TILE, 1), weights_out_.Init(pipe_, HALF * KEYS, 1);
    pipe_.InitBuffer(o_out_, 1, HALF * TILE * sizeof(T));
    pipe_.InitBuffer(sum_, in_.panels * HALF * TILE * sizeof(float)), pipe_.InitBuffer(spread_, HALF * 32);
    pipe_.InitBuffer(numbers_, 4 * HALF * sizeof(float)), pipe_.InitBuffer(lse_out_, 1, HALF * sizeof(float));
  }
  __aicore__ inline void Vector(uint32_t b, uint32_t head, Mine mine, uint32_t keys) {
    LocalTensor<float> top = numbers_.Get<float>(), total = top[HALF];
    if (mine.rows) {
      VectorBarrier();
      Duplicate(top, -3.0e38f, HALF), Duplicate(total, 0.0f, HALF);
      for (uint32_t panel = 0; panel < in_.panels; panel++) Duplicate(Sum(panel), 0.0f, mine.rows * TILE);
      hidden_.Queries(in_, b, mine);
    }
    for (uint32_t t = 0, i = 0; t < keys; t += KEYS, i++) {
      CrossCoreWaitFlag(SCORES_READY);
      if (mine.rows) Weights(b, mine.rows, t, Least(KEYS, keys - t), i % 2);
      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
      CrossCoreWaitFlag(RESULT_READY);
      if (mine.rows) AddUp(mine.rows);
    }
    if (mine.rows) Finish(b, head, mine);
  }
  // The weights of a tile's keys, of which the columns past n are nobody's. `fall` is left: what the sum and the result so far are times.
  __aicore__ inline void Weights(uint32_t b, uint32_t rows, uint32_t key, uint32_t n, uint32_t slot) {
    const uint32_t count = rows * KEYS, skipped = GetSubBlockIdx() * HALF;
    LocalTensor<float> numbers = numbers_.Get<float>(), top = numbers, total = numbers[HALF], fall = numbers[2 * HALF],
                       most = numbers[3 * HALF];
    LocalTensor<float> spread = spread_.Get<float>(), spare = hidden_.Spare();
    in_tile_.Load(scores_[(slot * ROWS + skipped) * KEYS], 1, count);
    hidden_.Keys(in_, b, key, n);
    LocalTensor<float> hidden = hidden_.Of(rows, n), s = in_tile_.Wait(count), p = weights_out_.Get();
    VectorBarrier();
    Muls(p, s, in_.scale, count);
    in_tile_.Free();
    VectorBarrier();
    Axpy(p, hidden, HIDE, count);
    VectorBarrier();
    WholeReduceMax(most, p, n, rows, 1, 1, KEYS / FLOATS, ReduceOrder::ORDER_ONLY_VALUE);
    VectorBarrier();
    Max(most, most, top, rows);
    VectorBarrier();
    Sub(fall, top, most, rows);
    VectorBarrier();
    Exp(fall, fall, rows);
    Muls(top, most, 1.0f, rows);
    SpreadRows(spread, most, rows);
    Sub(p, p, spread, static_cast<uint64_t>(KEYS), static_cast<uint8_t>(rows), {1, 1, 0, 8, 8, 1});
    VectorBarrier();
    Exp(p, p, count);
    VectorBarrier();
    Mul(spare, p, hidden, count);
    VectorBarrier();
    Sub(p, p, spare, count);
    VectorBarrier();
    WholeReduceSum(most, p, n, rows, 1, 1, KEYS / FLOATS);
    Mul(total, total, fall, rows);
    VectorBarrier();
    Add(total, total, most, rows);
    weights_out_.Store(weights_[skipped * KEYS], 1, count, count);
  }
  // [HALF, TILE]: the sum so far
  __aicore__ inline LocalTensor<float> Sum(uint32_t panel) { return sum_.Get<float>()[panel * HALF * TILE]; }
  // sum = sum * numbers of rows
  __aicore__ inline void Scale(uint32_t rows) {
    for (uint32_t panel = 0; panel < in_.panels; panel++) {
      LocalTensor<float> sum = Sum(panel);
      MulEach(sum, sum, spread_.Get<float>(), rows, AlignUp(in_.PanelSize(panel), FLOATS), TILE);
    }
  }
  // sum = sum * fall + the tile's
  __aicore__ inline void AddUp(uint32_t rows) {
    SpreadRows(spread_.Get<float>(), numbers_.Get<float>()[2 * HALF], rows);
    Scale(rows);
    for (uint32_t panel = 0; panel < in_.panels; panel++) {
      in_tile_.Load(result_[(panel * ROWS + GetSubBlockIdx() * HALF) * TILE], 1, rows * TILE);
      LocalTensor<float> sum = Sum(panel), part = in_tile_.Wait(rows * TILE);
      VectorBarrier();
      Add(sum, sum, part, rows * TILE);
      in_tile_.Free();
    }
  }
  // o = sum / total, lse = top + ln(total). A query that sees no key has a total of 0, and a result of 0.
  __aicore__ inline void Finish(uint32_t b, uint32_t head, Mine mine) {
    LocalTensor<float> numbers = numbers_.Get<float>(), top = numbers, total = numbers[HALF], share = numbers[3 * HALF];
    VectorBarrier();
    Adds(total, total, 1.0e-30f, mine.rows);  // to no effect on others, which are at least 1; a NaN stays
    Duplicate(share, 1.0f, HALF);
    VectorBarrier();
    Div(share, share, total, mine.rows);
    SpreadRows(spread_.Get<float>(), share, mine.rows);
    Scale(mine.rows);
    LocalTensor<float> lse = lse_out_.AllocTensor<float>();
    Ln(lse, total, mine.rows);
    VectorBarrier();
    Add(lse, lse, top, mine.rows);
    lse_out_.EnQue(lse);
    lse = lse_out_.DeQue<float>();
    const uint64_t at = (static_cast<uint64_t>(b) * in_.heads + head) * in_.S + mine.first;
    DataCopyPad(lse_[at], lse, DataCopyExtParams{1, static_cast<uint32_t>(mine.rows * sizeof(float)), 0, 0, 0});
    lse_out_.FreeTensor(lse);
    for (uint32_t panel = 0; panel < in_.panels; panel++) Store(in_.Query(b, mine.first, head) + panel * TILE, mine.rows, panel);
  }
  // Rows of the result, which lie TILE apart, into those of a head.
  __aicore__ inline void Store(uint64_t at, uint32_t rows, uint32_t panel) {
    const uint32_t columns = in_.PanelSize(panel);
    LocalTensor<T> o = o_out_.template AllocTensor<T>();
    VectorBarrier();
    if constexpr (IsSameType<T, float>::value)
      Muls(o, Sum(panel), 1.0f, rows * TILE);
    else
      Cast(o, Sum(panel), RoundMode::CAST_RINT, rows * TILE);
    o_out_.EnQue(o);
    o = o_out_.template DeQue<T>();
    DataCopyExtParams copy;
    copy.blockCount = rows, copy.blockLen = columns * sizeof(T), copy.dstStride = (in_.QueryStride() - columns) * sizeof(T);
    copy.srcStride = (TILE - Padded<T>(columns)) * sizeof(T) / 32;
    DataCopyPad(o_[at], o, copy);
    o_out_.FreeTensor(o);
  }

  TPipe pipe_;
  Inputs<T> in_;
  GlobalTensor<T> o_, weights_;
  GlobalTensor<float> lse_, scores_, result_;
  // of the cube
  Products<T> products_;
  TQue<TPosition::CO1, 1> c_;
  // of the vector cores
  Hidden hidden_;
  In<float> in_tile_;  // of scores, and of a panel of the result
  Out<T> weights_out_;
  TQue<TPosition::VECOUT, 1> o_out_, lse_out_;
  TBuf<TPosition::VECCALC> sum_, spread_, numbers_;
};

}  // namespace qwen
