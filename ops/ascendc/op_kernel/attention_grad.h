// The gradient of flash attention, without atomic additions, so that the order of its sums is fixed:
//
//   1. for each tile of queries, over tiles of keys     dq += ds k
//   2. for each tile of keys, over the heads that share them and tiles of queries     dv += p^T do, dk += ds^T q
//
// where p = exp(scores - lse), ds = p (do v^T - delta) scale, delta = sum(o do) - dlse. In both, the cube recomputes scores and do v^T,
// and the vector cores p and ds; sums stay in L0C. Heads with two panels need twice the width in L0C, so tiles have half the height: 64
// queries in 1, and 32 keys in 2.
#pragma once
#include "attention_tiles.h"

namespace qwen {

template <typename T>
class AttentionGrad {
 public:
  __aicore__ inline void Run(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR segment, GM_ADDR key_segment, GM_ADDR order, GM_ADDR key_order,
                             GM_ADDR o, GM_ADDR lse, GM_ADDR dout, GM_ADDR dlse, GM_ADDR dq, GM_ADDR dk, GM_ADDR dv, GM_ADDR workspace,
                             const AttentionTiling &tiling) {
    in_.Init(q, k, v, segment, key_segment, order, key_order, tiling);
    o_.SetGlobalBuffer((__gm__ T *)o), lse_.SetGlobalBuffer((__gm__ float *)lse), dout_.SetGlobalBuffer((__gm__ T *)dout),
        dlse_.SetGlobalBuffer((__gm__ float *)dlse);
    dq_.SetGlobalBuffer((__gm__ T *)dq), dk_.SetGlobalBuffer((__gm__ T *)dk), dv_.SetGlobalBuffer((__gm__ T *)dv);
    const uint64_t tile = ROWS * KEYS, bytes = tile * (4 * sizeof(float) + 2 * sizeof(T));
    GM_ADDR user = GetUserWorkspace(workspace);
    GM_ADDR mine = user + BlockOf() * bytes;
    scores_.SetGlobalBuffer((__gm__ float *)mine), dweights_.SetGlobalBuffer((__gm__ float *)mine + 2 * tile);
    p_.SetGlobalBuffer((__gm__ T *)(mine + 4 * tile * sizeof(float))),
        ds_.SetGlobalBuffer((__gm__ T *)(mine + 4 * tile * sizeof(float)) + tile);
    deltas_.SetGlobalBuffer((__gm__ float *)(user + GetBlockNum() * bytes)), delta_row_ = AlignUp(in_.S, FLOATS);
    if ASCEND_IS_AIC
      CubeBuffers();
    else
      VectorBuffers();
    Queries();
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    Keys();
  }

 private:
  struct Task {  // a tile of queries and one of keys
    uint32_t b, head, first, rows, key, n;
  };

  __aicore__ inline void Queries() {
    const uint32_t high = ROWS / in_.panels, tiles = (in_.S + high - 1) / high, tasks = in_.batch * in_.heads * tiles;
    for (uint32_t task = BlockOf(); task < tasks; task += GetBlockNum()) {
      Task t = {task / tiles / in_.heads, task / tiles % in_.heads, task % tiles * high, 0, 0, 0};
      t.rows = Least(high, in_.S - t.first);
      if ASCEND_IS_AIC
        QueriesCube(t);
      else
        QueriesVector(t, MineOf(t.first, t.rows, high / 2));
    }
  }
  __aicore__ inline void Keys() {
    const uint32_t wide = KEYS / in_.panels, tiles = (in_.keys + wide - 1) / wide, tasks = in_.batch * in_.kv_heads * tiles;
    for (uint32_t task = BlockOf(); task < tasks; task += GetBlockNum()) {
      Task t = {task / tiles / in_.kv_heads, task / tiles % in_.kv_heads, 0, 0, task % tiles * wide, 0};
      t.n = Least(wide, in_.keys - t.key);
      if ASCEND_IS_AIC
        KeysCube(t);
      else
        KeysVector(t);
    }
  }
  // The i-th tile of queries over which a tile of keys is summed; false past the last.
  __aicore__ inline bool Ith(Task &t, uint32_t kv, uint32_t i) const {
    const uint32_t group = in_.heads / in_.kv_heads, skipped = in_.in_order ? t.key / ROWS : 0, tiles = (in_.S + ROWS - 1) / ROWS - skipped;
    if (i >= group * tiles) return false;
    t.head = kv * group + i / tiles, t.first = (skipped + i % tiles) * ROWS, t.rows = Least(ROWS, in_.S - t.first);
    return true;
  }

  // The cube.
  __aicore__ inline void CubeBuffers() {
    products_.Init(pipe_);
    pipe_.InitBuffer(c_, 1, ROWS * KEYS * sizeof(float)), pipe_.InitBuffer(sums_, 1, ROWS * TILE * sizeof(float));
  }
  __aicore__ inline void Scores(const Task &t, uint32_t slot) {
    const uint32_t kv = t.head / (in_.heads / in_.kv_heads);
    const uint64_t query = in_.Query(t.b, t.first, t.head), key = in_.Key(t.b, t.key, kv);
    One(Matrix<T, false>{in_.q[query], in_.QueryStride()}, Matrix<T, true>{in_.k[key], in_.KeyStride()}, scores_[slot * ROWS * KEYS], t);
    One(Matrix<T, false>{dout_[query], in_.QueryStride()}, Matrix<T, true>{in_.v[key], in_.KeyStride()}, dweights_[slot * ROWS * KEYS], t);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
  }
  __aicore__ inline void One(const Matrix<T, false> &a, const Matrix<T, true> &b, const GlobalTensor<float> &to, const Task &t) {
    LocalTensor<float> c = c_.AllocTensor<float>();
    products_.Multiply(c, a, b, t.rows, t.n, in_.size, false);
    c_.EnQue(c);
    c = c_.DeQue<float>();
    Write(to, c, t.rows, t.n, KEYS);
    c_.FreeTensor(c);
  }
  __aicore__ inline void QueriesCube(Task t) {
    const uint32_t kv = t.head / (in_.heads / in_.kv_heads), keys = in_.KeysFor(t.first + t.rows - 1);
    LocalTensor<float> sum = sums_.AllocTensor<float>();
    t.n = Least(KEYS, keys);
    Scores(t, 0);
    for (uint32_t i = 0; t.key < keys; i++) {
      Task next = t;
      next.key += KEYS;
      if (next.key < keys) next.n = Least(KEYS, keys - next.key), Scores(next, (i + 1) % 2);
      CrossCoreWaitFlag(WEIGHTS_READY);
      Matrix<T, false> k = {in_.k[in_.Key(t.b, t.key, kv)], in_.KeyStride()};
      AddTo(sum, ROWS, Matrix<T, false>{ds_, KEYS}, k, t.rows, t.n, i > 0);
      Taken();
      t = next;
    }
    sums_.EnQue(sum);
    sum = sums_.DeQue<float>();
    Store(dq_[in_.Query(t.b, t.first, t.head)], sum, ROWS, t.rows, in_.QueryStride());
    sums_.FreeTensor(sum);
  }
  __aicore__ inline void KeysCube(Task t) {
    const uint32_t kv = t.head;
    LocalTensor<float> sum = sums_.AllocTensor<float>(), dv = sum, dk = sum[KEYS * TILE];
    Ith(t, kv, 0);
    Scores(t, 0);
    Task next = t;
    for (uint32_t i = 0; Ith(t, kv, i); i++) {
      if (Ith(next, kv, i + 1)) Scores(next, (i + 1) % 2);
      CrossCoreWaitFlag(WEIGHTS_READY);
      const uint64_t query = in_.Query(t.b, t.first, t.head);
      Matrix<T, false> q = {in_.q[query], in_.QueryStride()}, dout = {dout_[query], in_.QueryStride()};
      AddTo(dv, KEYS, Matrix<T, true>{p_, KEYS}, dout, t.n, t.rows, i > 0);
      AddTo(dk, KEYS, Matrix<T, true>{ds_, KEYS}, q, t.n, t.rows, i > 0);
      Taken();
    }
    sums_.EnQue(sum);
    sum = sums_.DeQue<float>();
    const uint64_t at = in_.Key(t.b, t.key, kv);
    Store(dv_[at], sum, KEYS, t.n, in_.KeyStride());
    Store(dk_[at], sum[KEYS * TILE], KEYS, t.n, in_.KeyStride());
    sums_.FreeTensor(sum);
  }
  // sum (+)= a b, [m, k] by [k, size], in panels that share `high` rows of L0C.
  template <bool TURNED>
  __aicore__ inline void AddTo(const LocalTensor<float> &sum, uint32_t high, const Matrix<T, TURNED> &a, Matrix<T, false> b, uint32_t m,
                               uint32_t k, bool add) {
    const GlobalTensor<T> first = b.at;
    for (uint32_t panel = 0; panel < in_.panels; panel++) {
      b.at = first[panel * TILE];
      products_.Multiply(sum[panel * (high / in_.panels) * TILE], a, b, m, in_.PanelSize(panel), k, add);
    }
  }
  __aicore__ inline void Store(const GlobalTensor<T> &to, const LocalTensor<float> &sum, uint32_t high, uint32_t m, uint32_t stride) {
    for (uint32_t panel = 0; panel < in_.panels; panel++)
      Write(to[panel * TILE], sum[panel * (high / in_.panels) * TILE], m, in_.PanelSize(panel), stride);
  }
  // The tile of weights was read, and may be written again.
  __aicore__ inline void Taken() { CrossCoreSetFlag<2, PIPE_MTE2>(RESULT_READY); }

  // The vector cores.
  __aicore__ inline void VectorBuffers() {
    hidden_.Init(pipe_);
    scores_in_.Init(pipe_, HALF * KEYS, 1), dweights_in_.Init(pipe_, HALF * KEYS, 1), p_out_.Init(pipe_, HALF * KEYS, 1),
        ds_out_.Init(pipe_, HALF * KEYS, 1);
    numbers_in_.Init(pipe_, HALF, 2);
    pipe_.InitBuffer(lse_spread_, HALF * 32), pipe_.InitBuffer(delta_spread_, HALF * 32);
    pipe_.InitBuffer(delta_, 1, HALF * sizeof(float)), pipe_.InitBuffer(part_, HALF * sizeof(float));
    o_in_.Init(pipe_, HALF * KEYS, 1), dout_in_.Init(pipe_, HALF * KEYS, 1);
  }
  __aicore__ inline void QueriesVector(Task t, Mine mine) {
    const uint32_t keys = in_.KeysFor(t.first + t.rows - 1);
    if (mine.rows) {
      hidden_.Queries(in_, t.b, mine);
      Delta(t, mine);
      Numbers(t, mine);
    }
    for (uint32_t i = 0; t.key < keys; i++, t.key += KEYS) {
      t.n = Least(KEYS, keys - t.key);
      if (mine.rows) hidden_.Keys(in_, t.b, t.key, t.n);
      Weights(t, mine, i, false);
    }
    CrossCoreWaitFlag(RESULT_READY);  // the last tile of this task was read
  }
  __aicore__ inline void KeysVector(Task t) {
    const uint32_t kv = t.head;
    hidden_.Keys(in_, t.b, t.key, t.n);
    for (uint32_t i = 0; Ith(t, kv, i); i++) {
      const Mine mine = MineOf(t.first, t.rows);
      if (mine.rows) {
        hidden_.Queries(in_, t.b, mine);
        Numbers(t, mine);
      }
      Weights(t, mine, i, true);
    }
    CrossCoreWaitFlag(RESULT_READY);
  }
  // deltas of the queries, in columns of KEYS
  __aicore__ inline void Delta(const Task &t, Mine mine) {
    LocalTensor<float> delta = delta_.AllocTensor<float>(), part = part_.Get<float>();
    Duplicate(delta, 0.0f, HALF);
    for (uint32_t c = 0; c < in_.size; c += KEYS) {
      const uint32_t n = Least(KEYS, in_.size - c), padded = Padded<T>(n), gap = in_.QueryStride() - n;
      const uint64_t at = in_.Query(t.b, mine.first, t.head) + c;
      o_in_.Load(o_[at], mine.rows, n, gap), dout_in_.Load(dout_[at], mine.rows, n, gap);
      LocalTensor<float> o = o_in_.Wait(mine.rows * padded), dout = dout_in_.Wait(mine.rows * padded);
      VectorBarrier();
      Mul(o, o, dout, mine.rows * padded);
      VectorBarrier();
      WholeReduceSum(part, o, n, mine.rows, 1, 1, padded / FLOATS);
      VectorBarrier();
      Add(delta, delta, part, mine.rows);
      o_in_.Free(), dout_in_.Free();
    }
    numbers_in_.Load(dlse_[LseAt(t, mine)], 1, mine.rows);
    LocalTensor<float> dlse = numbers_in_.Wait(mine.rows);
    VectorBarrier();
    Sub(delta, delta, dlse, mine.rows);
    numbers_in_.Free();
    delta_.EnQue(delta);
    delta = delta_.DeQue<float>();
    DataCopyPad(deltas_[DeltaAt(t, mine)], delta, DataCopyExtParams{1, static_cast<uint32_t>(mine.rows * sizeof(float)), 0, 0, 0});
    delta_.FreeTensor(delta);
    Sync<HardEvent::MTE3_MTE2>();  // it is read again from where it was written
  }
  __aicore__ inline uint64_t LseAt(const Task &t, Mine mine) const {
    return (static_cast<uint64_t>(t.b) * in_.heads + t.head) * in_.S + mine.first;
  }
  __aicore__ inline uint64_t DeltaAt(const Task &t, Mine mine) const {
    return (static_cast<uint64_t>(t.b) * in_.heads + t.head) * delta_row_ + mine.first;
  }
  // lse and delta of the queries, a block each
  __aicore__ inline void Numbers(const Task &t, Mine mine) {
    numbers_in_.Load(lse_[LseAt(t, mine)], 1, mine.rows);
    numbers_in_.Load(deltas_[DeltaAt(t, mine)], 1, mine.rows);
    SpreadRows(lse_spread_.Get<float>(), numbers_in_.Wait(mine.rows), mine.rows);
    numbers_in_.Free();
    SpreadRows(delta_spread_.Get<float>(), numbers_in_.Wait(mine.rows), mine.rows);
    numbers_in_.Free();
  }
  // ds of a tile, and with `both` p, for the cube.
  __aicore__ inline void Weights(const Task &t, Mine mine, uint32_t i, bool both) {
    const uint32_t rows = mine.rows;
    CrossCoreWaitFlag(SCORES_READY);
    if (rows) {
      const uint32_t count = rows * KEYS, skipped = mine.skipped * KEYS, at = i % 2 * ROWS * KEYS + skipped;
      scores_in_.Load(scores_[at], 1, count), dweights_in_.Load(dweights_[at], 1, count);
      LocalTensor<float> hidden = hidden_.Of(rows, t.n), spare = hidden_.Spare();
      LocalTensor<float> s = scores_in_.Wait(count), dp = dweights_in_.Wait(count), ds = ds_out_.Get();
      const uint8_t repeats = rows;
      VectorBarrier();
      Muls(s, s, in_.scale, count);
      Sub(dp, dp, delta_spread_.Get<float>(), static_cast<uint64_t>(KEYS), repeats, {1, 1, 0, 8, 8, 1});
      VectorBarrier();
      Axpy(s, hidden, HIDE, count);
      VectorBarrier();
      Sub(s, s, lse_spread_.Get<float>(), static_cast<uint64_t>(KEYS), repeats, {1, 1, 0, 8, 8, 1});
      VectorBarrier();
      Exp(s, s, count);
      VectorBarrier();
      Mul(spare, s, hidden, count);
      VectorBarrier();
      Sub(s, s, spare, count);
      VectorBarrier();
      Mul(ds, s, dp, count);
      VectorBarrier();
      Muls(ds, ds, in_.scale, count);
      if (i) CrossCoreWaitFlag(RESULT_READY);
      if (both) {
        Muls(p_out_.Get(), s, 1.0f, count);
        p_out_.Store(p_[skipped], 1, count, count);
      }
      scores_in_.Free(), dweights_in_.Free();
      ds_out_.Store(ds_[skipped], 1, count, count);
    } else if (i) {
      CrossCoreWaitFlag(RESULT_READY);
    }
    CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
  }

  TPipe pipe_;
  Inputs<T> in_;
  GlobalTensor<T> o_, dout_, dq_, dk_, dv_, p_, ds_;
  GlobalTensor<float> lse_, dlse_, scores_, dweights_, deltas_;
  uint32_t delta_row_;
  // of the cube
  Products<T> products_;
  TQue<TPosition::CO1, 1> c_, sums_;
  // of the vector cores
  Hidden hidden_;
  In<float> scores_in_, dweights_in_, numbers_in_;
  In<T> o_in_, dout_in_;
  Out<T> p_out_, ds_out_;
  TQue<TPosition::VECOUT, 1> delta_;
  TBuf<TPosition::VECCALC> lse_spread_, delta_spread_, part_;
};

}  // namespace qwen
