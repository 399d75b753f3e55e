// The gradient of flash attention, without atomic additions, so that the order of its sums is fixed:
//
//   1. for each tile of 128 queries, over spans of keys                                      dq += ds k
//   2. for each tile of 64 keys, over the heads that share them and spans of queries     dv += p^T do, dk += ds^T q
//
// where p = exp(scores - lse), ds = p (do v^T - delta) scale, delta = sum(o do) - dlse. In both, the cube makes scores and do v^T two spans
// ahead of the vector cores' p and ds, and then adds up the products of a span in L0C. In 2 all is turned: rows are keys, so that p^T and
// ds^T lie as the cube wants them. A span is 256 keys or 128 queries (half of that in float32, and half for heads of more than 128). Heads
// with two panels need twice the width in L0C, so tiles have half the height: 64 queries in 1, and 32 keys in 2. Spans that a tile does not
// see are skipped, as in the forward.
#pragma once
#include "attention_spans.h"

namespace qwen {

constexpr uint16_t WEIGHTS_TAKEN = 3;                 // a flag next to those of the forward: the cube has read the weights
constexpr uint32_t GRAD_SLOTS = 3, HELD = 4;        // spans of scores in global memory, and of operands in L1

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
    high_ = ROWS / in_.panels, wide_ = KEYS / in_.panels, span_ = 512 / sizeof(T) / in_.panels, at_once_ = AREA / span_;
    slot_ = ROWS * 512 / sizeof(T);
    const uint64_t floats = 2 * GRAD_SLOTS * slot_, bytes = floats * sizeof(float) + 4 * slot_ * sizeof(T);
    GM_ADDR user = GetUserWorkspace(workspace);
    GM_ADDR mine = user + BlockOf() * bytes;
    scores_.SetGlobalBuffer((__gm__ float *)mine), made_.SetGlobalBuffer((__gm__ T *)(mine + floats * sizeof(float)));
    GM_ADDR shared = user + GetBlockNum() * bytes;
    delta_row_ = AlignUp(in_.S, FLOATS);
    deltas_.SetGlobalBuffer((__gm__ float *)shared);
    ranges_.Init(in_, shared + static_cast<uint64_t>(in_.batch) * in_.heads * delta_row_ * sizeof(float));
    if ASCEND_IS_AIC
      CubeBuffers<false>();
    else
      VectorBuffers();
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    Walk<T> walk;
    walk.Begin(&in_, &ranges_, high_, span_);
    Over<false>(walk);
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    span_ = span_ > 2 * REPEAT ? span_ / 2 : REPEAT, at_once_ = AREA / span_;
    if ASCEND_IS_AIC {
      pipe_.Reset();
      CubeBuffers<true>();
    }
    KeyWalk<T> keys;
    keys.Begin(&in_, &ranges_, span_, wide_);
    Over<true>(keys);
  }

 private:
  template <bool TURNED, typename W>
  __aicore__ inline void Over(W walk) {
    if ASCEND_IS_AIC
      Cube<TURNED>(walk);
    else
      Vector<TURNED>(walk);
  }

  // The cube, with queues of its own for each part.
  struct CubeQueues {
    TQue<TPosition::A1, 2> own1, made1;
    TQue<TPosition::B1, 4> span1;
    TQue<TPosition::A2, 1> a2;
    TQue<TPosition::B2, 1> b2;
    TQue<TPosition::CO1, 1> c, sums;
  };
  // Of 512 KiB of L1: the tile's own two operands; in 1 five of k or v and one of ds, in 2 four of q and do together, p and ds.
  template <bool TURNED>
  __aicore__ inline void CubeBuffers() {
    const uint32_t row = AlignUp(in_.size, FRACTAL_ROWS) * sizeof(T), own = TURNED ? wide_ : high_, pair = 2 * span_ * row;
    queues_ = TURNED ? &of_keys_ : &of_queries_;
    ahead_ = TURNED && HELD * pair > 384 * 1024 ? 1 : 2;
    pipe_.InitBuffer(queues_->own1, 2, own * row), pipe_.InitBuffer(queues_->made1, TURNED ? 2 : 1, own * span_ * sizeof(T));
    pipe_.InitBuffer(queues_->span1, TURNED ? ahead_ + 2 : 5, TURNED ? pair : pair / 2);
    pipe_.InitBuffer(queues_->a2, 2, 32 * 1024), pipe_.InitBuffer(queues_->b2, 2, 32 * 1024);
    pipe_.InitBuffer(queues_->c, 2, 32 * 1024), pipe_.InitBuffer(queues_->sums, 1, 64 * 1024);
  }
  static constexpr uint32_t DEPTH = 256 / sizeof(T);  // of k in L0

  // What a span has in L1: in 1 k and v, in 2 q and do, in parts of Part() rows, each a matrix of its own.
  struct Held {
    LocalTensor<T> first, second;
  };
  template <bool TURNED>
  __aicore__ inline uint32_t Part() const {
    return TURNED ? Least(TILE, span_) : KEYS;
  }
  template <bool TURNED>
  __aicore__ inline uint32_t Count(const Handover &at) const {
    return TURNED ? at.rows : at.n;
  }
  template <bool TURNED>
  __aicore__ inline uint32_t OwnRows(const Handover &at) const {
    return TURNED ? at.n : at.rows;
  }

  // Operands are loaded one span before the scores are made of them, which are up to two spans ahead of the sums.
  template <bool TURNED, typename W>
  __aicore__ inline void Cube(W walk) {
    W loader = walk, ahead = walk, behind = walk;
    Held held[HELD];
    bool loads = loader.Next(), makes = ahead.Next();
    uint32_t loaded = 0, made = 0;
    if (loads) {
      Load<TURNED>(loader.at, held[loaded++ % HELD]);
      loads = loader.Next();
    }
    for (; made < ahead_ && makes; makes = ahead.Next()) {
      if (loads) {
        Load<TURNED>(loader.at, held[loaded++ % HELD]);
        loads = loader.Next();
      }
      Scores<TURNED>(ahead.at, made, held[made % HELD]);
      made++;
    }
    for (uint32_t j = 0; behind.Next(); j++) {
      if (makes) {
        Scores<TURNED>(ahead.at, made, held[made % HELD]);
        made++, makes = ahead.Next();
      }
      Fetch<TURNED>(behind.at, j);
      if (loads) {  // behind the weights, which are wanted sooner
        Load<TURNED>(loader.at, held[loaded++ % HELD]);
        loads = loader.Next();
      }
      AddUp<TURNED>(behind.at, held[j % HELD]);
    }
    if (made) queues_->own1.FreeTensor(own_.first), queues_->own1.FreeTensor(own_.second);
  }
  __aicore__ inline uint64_t QueryAt(const Handover &at) const { return in_.Query(at.b, at.first, at.head); }
  __aicore__ inline uint64_t KeyAt(const Handover &at) const {
    return in_.Key(at.b, at.key, at.head / (in_.heads / in_.kv_heads));
  }
  __aicore__ inline LocalTensor<T> Second(const LocalTensor<T> &pair) const { return pair[span_ * AlignUp(in_.size, FRACTAL_ROWS)]; }
  template <bool TURNED>
  __aicore__ inline void Load(const Handover &at, Held &held) {
    const uint32_t n = Count<TURNED>(at), stride = TURNED ? in_.QueryStride() : in_.KeyStride(), part = Part<TURNED>();
    held.first = queues_->span1.template AllocTensor<T>();
    if constexpr (TURNED) {
      InParts(held.first, in_.q[QueryAt(at)], n, stride, part), InParts(Second(held.first), dout_[QueryAt(at)], n, stride, part);
      queues_->span1.EnQue(held.first);
    } else {
      held.second = queues_->span1.template AllocTensor<T>();
      InParts(held.first, in_.k[KeyAt(at)], n, stride, part);
      queues_->span1.EnQue(held.first);
      InParts(held.second, in_.v[KeyAt(at)], n, stride, part);
      queues_->span1.EnQue(held.second);
    }
  }
  // Scores and do v^T of a span, or both turned.
  template <bool TURNED>
  __aicore__ inline void Scores(const Handover &at, uint32_t j, Held &held) {
    const uint64_t query = QueryAt(at), key = KeyAt(at);
    if (at.begins) {
      if (j) queues_->own1.FreeTensor(own_.first), queues_->own1.FreeTensor(own_.second);
      own_.first = Own(TURNED ? in_.k[key] : in_.q[query], OwnRows<TURNED>(at), TURNED ? in_.KeyStride() : in_.QueryStride());
      own_.second = Own(TURNED ? in_.v[key] : dout_[query], OwnRows<TURNED>(at), TURNED ? in_.KeyStride() : in_.QueryStride());
    }
    const uint64_t slot = static_cast<uint64_t>(j % GRAD_SLOTS) * 2 * slot_;
    const uint32_t n = Count<TURNED>(at), part = Part<TURNED>(), m = OwnRows<TURNED>(at);
    if constexpr (TURNED) {
      held.first = queues_->span1.template DeQue<T>(), held.second = Second(held.first);
    } else {
      held.first = queues_->span1.template DeQue<T>(), held.second = queues_->span1.template DeQue<T>();
    }
    Product(own_.first, held.first, n, part, m, scores_[slot]);
    Product(own_.second, held.second, n, part, m, scores_[slot + slot_]);
    if constexpr (!TURNED) queues_->span1.FreeTensor(held.second);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
  }
  __aicore__ inline LocalTensor<T> Own(const GlobalTensor<T> &from, uint32_t rows, uint32_t stride) {
    LocalTensor<T> l1 = queues_->own1.template AllocTensor<T>();
    ToL1(l1, from, rows, in_.size, stride);
    queues_->own1.EnQue(l1);
    return queues_->own1.template DeQue<T>();
  }
  __aicore__ inline void InParts(const LocalTensor<T> &l1, const GlobalTensor<T> &from, uint32_t n, uint32_t stride, uint32_t part) {
    for (uint32_t r = 0; r < n; r += part)
      ToL1(l1[PartAt(r)], from[static_cast<uint64_t>(r) * stride], Least(part, n - r), in_.size, stride);
  }
  __aicore__ inline uint32_t PartAt(uint32_t row) const { return row * AlignUp(in_.size, FRACTAL_ROWS); }
  // own times the rows of a span, part by part
  __aicore__ inline void Product(const LocalTensor<T> &own, const LocalTensor<T> &span, uint32_t n, uint32_t part, uint32_t m,
                                 const GlobalTensor<float> &to) {
    for (uint32_t r = 0; r < n; r += part) {
      const uint32_t columns = Least(part, n - r);
      LocalTensor<float> c = queues_->c.template AllocTensor<float>();
      for (uint32_t d = 0; d < in_.size; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, in_.size - d);
        LocalTensor<T> a2 = queues_->a2.template AllocTensor<T>(), b2 = queues_->b2.template AllocTensor<T>();
        LoadRows(a2, own, m, in_.size, d, depth);
        LoadColumns(b2, span[PartAt(r)], columns, d, depth);
        queues_->a2.EnQue(a2), queues_->b2.EnQue(b2);
        a2 = queues_->a2.template DeQue<T>(), b2 = queues_->b2.template DeQue<T>();
        MultiplyL0(c, a2, b2, m, columns, depth, false, d > 0);
        queues_->a2.FreeTensor(a2), queues_->b2.FreeTensor(b2);
      }
      queues_->c.EnQue(c);
      c = queues_->c.template DeQue<float>();
      Write(to[r], c, m, columns, span_);
      queues_->c.FreeTensor(c);
    }
  }
  // What the vector cores made of a span, into L1.
  template <bool TURNED>
  __aicore__ inline void Fetch(const Handover &at, uint32_t j) {
    const uint32_t m = OwnRows<TURNED>(at), n = Count<TURNED>(at);
    const GlobalTensor<T> p = made_[static_cast<uint64_t>(j % 2) * 2 * slot_];
    CrossCoreWaitFlag<2, PIPE_MTE2>(WEIGHTS_READY);
    ds_ = Made(p[slot_], m, n);
    if constexpr (TURNED) p_ = Made(p, m, n);
    CrossCoreSetFlag<2, PIPE_MTE2>(WEIGHTS_TAKEN);
  }
  // Its products with the span.
  template <bool TURNED>
  __aicore__ inline void AddUp(const Handover &at, Held &held) {
    const uint32_t m = OwnRows<TURNED>(at), n = Count<TURNED>(at), part = Part<TURNED>();
    if (at.begins) sum_ = queues_->sums.template AllocTensor<float>();
    if constexpr (TURNED) {
      SumOver(sum_[KEYS * TILE], ds_, held.first, m, n, part, !at.begins, KEYS);
      SumOver(sum_, p_, held.second, m, n, part, !at.begins, KEYS);
      queues_->made1.FreeTensor(p_);
    } else {
      SumOver(sum_, ds_, held.first, m, n, part, !at.begins, ROWS);
    }
    queues_->made1.FreeTensor(ds_), queues_->span1.FreeTensor(held.first);
    if (!at.ends) return;
    queues_->sums.EnQue(sum_);
    sum_ = queues_->sums.template DeQue<float>();
    if constexpr (TURNED) {
      Store(dv_[KeyAt(at)], sum_, KEYS, m, in_.KeyStride());
      Store(dk_[KeyAt(at)], sum_[KEYS * TILE], KEYS, m, in_.KeyStride());
    } else {
      Store(dq_[QueryAt(at)], sum_, ROWS, m, in_.QueryStride());
    }
    queues_->sums.FreeTensor(sum_);
  }
  __aicore__ inline LocalTensor<T> Made(const GlobalTensor<T> &from, uint32_t m, uint32_t n) {
    LocalTensor<T> l1 = queues_->made1.template AllocTensor<T>();
    ToL1(l1, from, m, n, span_);
    queues_->made1.EnQue(l1);
    return queues_->made1.template DeQue<T>();
  }
  // sum (+)= made times the rows of a span, in panels that share `high` rows of L0C.
  __aicore__ inline void SumOver(const LocalTensor<float> &sum, const LocalTensor<T> &made, const LocalTensor<T> &span, uint32_t m,
                                 uint32_t n, uint32_t part, bool add, uint32_t high) {
    for (uint32_t r = 0; r < n; r += part) {
      const uint32_t rows = Least(part, n - r);
      for (uint32_t d = 0; d < rows; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, rows - d);
        LocalTensor<T> a2 = queues_->a2.template AllocTensor<T>();
        LoadRows(a2, made, m, n, r + d, depth);
        queues_->a2.EnQue(a2);
        a2 = queues_->a2.template DeQue<T>();
        for (uint32_t panel = 0; panel < in_.panels; panel++) {
          LocalTensor<T> b2 = queues_->b2.template AllocTensor<T>();
          LoadTurned(b2, span[PartAt(r)], rows, in_.size, d, depth, panel * TILE, in_.PanelSize(panel));
          queues_->b2.EnQue(b2);
          b2 = queues_->b2.template DeQue<T>();
          MultiplyL0(sum[panel * (high / in_.panels) * TILE], a2, b2, m, in_.PanelSize(panel), depth, false, add || r + d > 0);
          queues_->b2.FreeTensor(b2);
        }
        queues_->a2.FreeTensor(a2);
      }
    }
  }
  __aicore__ inline void Store(const GlobalTensor<T> &to, const LocalTensor<float> &sum, uint32_t high, uint32_t m, uint32_t stride) {
    for (uint32_t panel = 0; panel < in_.panels; panel++)
      Write(to[panel * TILE], sum[panel * (high / in_.panels) * TILE], m, in_.PanelSize(panel), stride);
  }

  // The vector cores.
  __aicore__ inline void VectorBuffers() {
    ranges_.Buffers(pipe_), mask_.Init(pipe_, span_, &ranges_);
    ranges_.Find(in_);
    pipe_.InitBuffer(numbers_in_, 1, 2 * SPAN * sizeof(float));
    pipe_.InitBuffer(lse_numbers_, SPAN * sizeof(float)), pipe_.InitBuffer(delta_numbers_, SPAN * sizeof(float));
    pipe_.InitBuffer(lse_spread_, HALF * 32), pipe_.InitBuffer(delta_spread_, HALF * 32), pipe_.InitBuffer(part_, HALF * sizeof(float));
    pipe_.InitBuffer(delta_out_, 1, HALF * sizeof(float));
    scores_in_.Init(pipe_, AREA, 2), dp_in_.Init(pipe_, AREA, 2);
    p_out_.Init(pipe_, AREA, 1), ds_out_.Init(pipe_, AREA, 1);
    o_in_.Init(pipe_, DELTA_ROWS * TILE, 1), dout_in_.Init(pipe_, DELTA_ROWS * TILE, 1);
  }
  static constexpr uint32_t AREA = 4096, DELTA_ROWS = 16;  // elements of a span at a time; rows of o and do

  // The rows of a tile that are this vector core's.
  template <bool TURNED>
  __aicore__ inline Mine MyRows(const Handover &at) const {
    return MineOf(TURNED ? at.key : at.first, OwnRows<TURNED>(at), (TURNED ? wide_ : high_) / 2);
  }
  template <bool TURNED, typename W>
  __aicore__ inline void Vector(W walk) {
    uint32_t j = 0;
    for (; walk.Next(); j++) {
      const Handover &at = walk.at;
      const Mine mine = MyRows<TURNED>(at);
      const uint32_t n = Count<TURNED>(at), wide = AlignUp(n, REPEAT);
      if (mine.rows) Prepare<TURNED>(at, mine, n, wide);
      CrossCoreWaitFlag<2, PIPE_MTE2>(SCORES_READY);
      if (j > 1) CrossCoreWaitFlag<2, PIPE_MTE3>(WEIGHTS_TAKEN);
      if (mine.rows) LoadRowsOf(j, mine, 0, wide);
      for (uint32_t r = 0; r < mine.rows; r += at_once_) {
        if (r + at_once_ < mine.rows) LoadRowsOf(j, mine, r + at_once_, wide);
        Rows<TURNED>(at, j, mine, r, Least(at_once_, mine.rows - r), wide);
      }
      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
    }
    for (uint32_t left = Least(j, 2); left > 0; left--) CrossCoreWaitFlag<2, PIPE_MTE3>(WEIGHTS_TAKEN);
  }
  // Numbers of the rows at the beginning of a tile; numbers of the columns of a span.
  template <bool TURNED>
  __aicore__ inline void Prepare(const Handover &at, Mine mine, uint32_t n, uint32_t wide) {
    const uint64_t query = static_cast<uint64_t>(at.b) * in_.S + (TURNED ? at.first : mine.first);
    const uint64_t key = static_cast<uint64_t>(at.b) * in_.keys + (TURNED ? mine.first : at.key);
    if (at.begins) knows_rows_ = false;
    if constexpr (TURNED) {
      Numbers(at.b, at.head, at.first, n);
    } else if (at.begins) {
      Delta(at, mine);
      Numbers(at.b, at.head, mine.first, mine.rows);
      SpreadRows(lse_spread_.Get<float>(), Lse(), mine.rows);
      SpreadRows(delta_spread_.Get<float>(), Deltas(), mine.rows);
    }
    if (at.masked == Masked::NOT) return;
    if (!knows_rows_) {
      if constexpr (TURNED)
        mask_.Rows(in_.key_segment[key], in_.key_order[key], mine.rows);
      else
        mask_.Rows(in_.segment[query], in_.order[query], mine.rows);
      knows_rows_ = true;
    }
    if constexpr (TURNED)
      mask_.Columns(in_.segment[query], in_.order[query], n, wide);
    else
      mask_.Columns(in_.key_segment[key], in_.key_order[key], n, wide);
  }
  __aicore__ inline LocalTensor<float> Lse() { return lse_numbers_.Get<float>(); }
  __aicore__ inline LocalTensor<float> Deltas() { return delta_numbers_.Get<float>(); }
  // lse and delta of n queries. Of a query that sees no key lse is raised, so that exp of a hidden score is 0.
  __aicore__ inline void Numbers(uint32_t b, uint32_t head, uint32_t first, uint32_t n) {
    const uint64_t row = static_cast<uint64_t>(b) * in_.heads + head;
    LocalTensor<float> both = numbers_in_.AllocTensor<float>();
    const DataCopyExtParams copy{1, static_cast<uint32_t>(n * sizeof(float)), 0, 0, 0};
    const DataCopyPadExtParams<float> pad{false, 0, 0, 0.0f};
    DataCopyPad(both, lse_[row * in_.S + first], copy, pad);
    DataCopyPad(both[SPAN], deltas_[row * delta_row_ + first], copy, pad);
    numbers_in_.EnQue(both);
    both = numbers_in_.DeQue<float>();
    VectorBarrier();
    Maxs(Lse(), both, LOWEST_TOP, n);
    Muls(Deltas(), both[SPAN], 1.0f, n);
    numbers_in_.FreeTensor(both);
    VectorBarrier();
  }
  // deltas of the queries of a tile
  __aicore__ inline void Delta(const Handover &at, Mine mine) {
    LocalTensor<float> delta = delta_out_.AllocTensor<float>(), part = part_.Get<float>();
    Duplicate(delta, 0.0f, HALF);
    for (uint32_t r = 0; r < mine.rows; r += DELTA_ROWS)
      for (uint32_t c = 0; c < in_.size; c += KEYS) {
        const uint32_t rows = Least(DELTA_ROWS, mine.rows - r), n = Least(KEYS, in_.size - c), padded = Padded<T>(n),
                       gap = in_.QueryStride() - n;
        const uint64_t from = in_.Query(at.b, mine.first + r, at.head) + c;
        o_in_.Load(o_[from], rows, n, gap), dout_in_.Load(dout_[from], rows, n, gap);
        LocalTensor<float> o = o_in_.Wait(rows * padded), dout = dout_in_.Wait(rows * padded);
        VectorBarrier();
        Mul(o, o, dout, rows * padded);
        VectorBarrier();
        WholeReduceSum(part, o, n, rows, 1, 1, padded / FLOATS);
        VectorBarrier();
        Add(delta[r], delta[r], part, rows);
        o_in_.Free(), dout_in_.Free();
      }
    const uint64_t row = static_cast<uint64_t>(at.b) * in_.heads + at.head;
    LocalTensor<float> dlse = numbers_in_.AllocTensor<float>();
    DataCopyPad(dlse, dlse_[row * in_.S + mine.first], DataCopyExtParams{1, static_cast<uint32_t>(mine.rows * sizeof(float)), 0, 0, 0},
                DataCopyPadExtParams<float>{false, 0, 0, 0.0f});
    numbers_in_.EnQue(dlse);
    dlse = numbers_in_.DeQue<float>();
    VectorBarrier();
    Sub(delta, delta, dlse, mine.rows);
    numbers_in_.FreeTensor(dlse);
    delta_out_.EnQue(delta);
    delta = delta_out_.DeQue<float>();
    DataCopyPad(deltas_[row * delta_row_ + mine.first], delta,
                DataCopyExtParams{1, static_cast<uint32_t>(mine.rows * sizeof(float)), 0, 0, 0});
    delta_out_.FreeTensor(delta);
    Sync<HardEvent::MTE3_MTE2>();  // it is read again from where it was written
  }
  __aicore__ inline void LoadRowsOf(uint32_t j, Mine mine, uint32_t r, uint32_t wide) {
    const uint64_t at = static_cast<uint64_t>(j % GRAD_SLOTS) * 2 * slot_ + static_cast<uint64_t>(mine.skipped + r) * span_;
    const uint32_t rows = Least(at_once_, mine.rows - r);
    scores_in_.Load(scores_[at], rows, wide, span_ - wide), dp_in_.Load(scores_[at + slot_], rows, wide, span_ - wide);
  }
  // ds of some rows of a span, and in 2 p, for the cube.
  template <bool TURNED>
  __aicore__ inline void Rows(const Handover &at, uint32_t j, Mine mine, uint32_t r, uint32_t rows, uint32_t wide) {
    const uint32_t count = rows * wide;
    LocalTensor<float> s = scores_in_.Wait(count), dp = dp_in_.Wait(count);
    VectorBarrier();
    Muls(s, s, in_.scale, count);
    Less<TURNED>(dp, Deltas(), delta_spread_.Get<float>()[r * FLOATS], rows, wide);
    VectorBarrier();
    if (at.masked != Masked::NOT) mask_.Apply(s, r, rows, wide, at.masked, TURNED);
    Less<TURNED>(s, Lse(), lse_spread_.Get<float>()[r * FLOATS], rows, wide);
    VectorBarrier();
    Exp(s, s, count);
    VectorBarrier();
    Mul(dp, s, dp, count);
    const uint64_t to = static_cast<uint64_t>(j % 2) * 2 * slot_ + static_cast<uint64_t>(mine.skipped + r) * span_;
    if constexpr (TURNED) {
      LocalTensor<float> p = p_out_.Get();
      Muls(p, s, 1.0f, count);
      p_out_.Store(made_[to], rows, wide, count, span_ - wide);
    }
    LocalTensor<float> ds = ds_out_.Get();
    VectorBarrier();
    Muls(ds, dp, in_.scale, count);
    scores_in_.Free(), dp_in_.Free();
    ds_out_.Store(made_[to + slot_], rows, wide, count, span_ - wide);
  }
  // x -= a number of each column, or of each row
  template <bool BY_COLUMN>
  __aicore__ inline void Less(const LocalTensor<float> &x, const LocalTensor<float> &of_columns, const LocalTensor<float> &of_rows,
                              uint32_t rows, uint32_t wide) {
    const uint8_t repeats = rows, stride = wide / FLOATS;
    for (uint32_t c = 0; c < wide; c += REPEAT) {
      if constexpr (BY_COLUMN)
        Sub(x[c], x[c], of_columns[c], static_cast<uint64_t>(REPEAT), repeats, {1, 1, 1, stride, stride, 0});
      else
        Sub(x[c], x[c], of_rows, static_cast<uint64_t>(REPEAT), repeats, {1, 1, 0, stride, stride, 1});
    }
  }

  TPipe pipe_;
  Inputs<T> in_;
  Ranges ranges_;
  GlobalTensor<T> o_, dout_, dq_, dk_, dv_, made_;
  GlobalTensor<float> lse_, dlse_, scores_, deltas_;
  uint32_t high_, wide_, span_, slot_, delta_row_;
  uint32_t ahead_ = 0, at_once_;  // spans of scores that the cube makes ahead; rows of a span that a vector core has at a time
  // of the cube
  CubeQueues of_queries_, of_keys_, *queues_;
  Held own_;
  LocalTensor<float> sum_;
  LocalTensor<T> p_, ds_;
  // of the vector cores
  SpanMask mask_;
  In<float> scores_in_, dp_in_;
  In<T> o_in_, dout_in_;
  Out<T> p_out_, ds_out_;
  TQue<TPosition::VECIN, 1> numbers_in_;
  TQue<TPosition::VECOUT, 1> delta_out_;
  TBuf<TPosition::VECCALC> lse_numbers_, delta_numbers_, lse_spread_, delta_spread_, part_;
  bool knows_rows_ = false;
};

}  // namespace qwen
