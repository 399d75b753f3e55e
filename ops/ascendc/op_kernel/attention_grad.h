// The gradient of flash attention by 5 products. A query head of a row is a task of one block, which walks over tiles of 64 keys, and for
// each over spans of 128 queries (64 in float32), turned: rows are keys, so that p^T and ds^T lie as the cube wants them.
//
//   dv += p^T do, dk += ds^T q      of a tile of keys, in L0C
//   dq += ds k                      of each span of queries, in global memory
//
// where p = exp(scores - lse), ds = p (do v^T - delta) scale, delta = sum(o do) - dlse. One block adds all that a head's dq is the sum of,
// in the order of its walk, so bits are the same on any number of cores. The cube makes scores and do v^T two spans ahead of the vector
// cores' p and ds, and then the products of a span. The vector cores find the deltas first, and at last round dq, and the sums of dk and dv
// over the heads that share keys. Heads with two panels need twice the width in L0C, so tiles have 32 keys (16 in float32), and spans 64
// queries. Spans that a tile does not see are skipped, as in the forward.
#pragma once
#include "attention_spans.h"

namespace qwen {

constexpr uint16_t WEIGHTS_TAKEN = 3;         // a flag next to those of the forward: the cube has read the weights
constexpr uint32_t GRAD_SLOTS = 3, HELD = 4;  // spans of scores in global memory, and of operands in L1

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
    wide_ = KEYS / in_.panels / (sizeof(T) == 4 ? in_.panels : 1), row_ = AlignUp(in_.size, FRACTAL_ROWS);
    span_ = sizeof(T) == 4 || in_.panels > 1 ? REPEAT : 2 * REPEAT;
    Workspace(GetUserWorkspace(workspace));
    if ASCEND_IS_AIV First();
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    KeyWalk<T> walk;
    walk.Begin(&in_, &ranges_, span_, wide_);
    if ASCEND_IS_AIC {
      CubeBuffers();
      Cube(walk);
    } else {
      pipe_.Reset();
      VectorBuffers();
      Vector(walk);
    }
    PipeBarrier<PIPE_ALL>();
    SyncAll<false>();
    if ASCEND_IS_AIV {
      pipe_.Reset();
      Round();
    }
  }

 private:
  // Of a block: scores and their gradients of three spans, p and ds of two. Of all: deltas [B, N, S], sums of dq [B, N, S, row] and of each
  // query head's dk and dv [B, N, T, row], and the ranges.
  __aicore__ inline void Workspace(GM_ADDR user) {
    slot_ = KEYS * 256 / sizeof(T);
    const uint64_t floats = 2 * GRAD_SLOTS * slot_, bytes = floats * sizeof(float) + 4 * slot_ * sizeof(T);
    GM_ADDR mine = user + BlockOf() * bytes;
    scores_.SetGlobalBuffer((__gm__ float *)mine), made_.SetGlobalBuffer((__gm__ T *)(mine + floats * sizeof(float)));
    GM_ADDR shared = user + GetBlockNum() * bytes;
    delta_row_ = AlignUp(in_.S, FLOATS);
    const uint64_t heads = static_cast<uint64_t>(in_.batch) * in_.heads;
    const uint64_t of_queries = heads * in_.S * row_, of_keys = heads * in_.keys * row_;
    deltas_.SetGlobalBuffer((__gm__ float *)shared);
    dq_sum_.SetGlobalBuffer((__gm__ float *)shared + heads * delta_row_);
    dk_sum_.SetGlobalBuffer((__gm__ float *)shared + heads * delta_row_ + of_queries);
    dv_sum_.SetGlobalBuffer((__gm__ float *)shared + heads * delta_row_ + of_queries + of_keys);
    GM_ADDR ranges = shared + (heads * delta_row_ + of_queries + 2 * of_keys) * sizeof(float);
    finder_.Init(in_, ranges, KEYS), ranges_.Init(in_, ranges, KEYS);
  }
  // Where a query's or a key's row is among the sums.
  __aicore__ inline uint64_t QuerySum(uint32_t b, uint32_t head, uint32_t s) const {
    return ((static_cast<uint64_t>(b) * in_.heads + head) * in_.S + s) * row_;
  }
  __aicore__ inline uint64_t KeySum(uint32_t b, uint32_t head, uint32_t t) const {
    return ((static_cast<uint64_t>(b) * in_.heads + head) * in_.keys + t) * row_;
  }

  // The cube. Of L1: k and v of three tiles together, four spans of q and do together, p and ds together. In float32 heads with two panels
  // leave room for one less of the first two.
  __aicore__ inline void CubeBuffers() {
    const uint32_t row = row_ * sizeof(T), pair = 2 * span_ * row;
    ahead_ = HELD * pair > 384 * 1024 ? 1 : 2;
    pipe_.InitBuffer(own1_, ahead_ + 1, 2 * wide_ * row), pipe_.InitBuffer(made1_, 1, 2 * wide_ * span_ * sizeof(T));
    pipe_.InitBuffer(span1_, ahead_ + 2, pair);
    pipe_.InitBuffer(a2_, 2, 32 * 1024), pipe_.InitBuffer(b2_, 2, 32 * 1024);
    pipe_.InitBuffer(c_, 2, 32 * 1024), pipe_.InitBuffer(sums_, 1, 64 * 1024);
  }
  static constexpr uint32_t DEPTH = 256 / sizeof(T);  // of k in L0

  // Operands are loaded one span before the scores are made of them, which are up to two spans ahead of the sums.
  __aicore__ inline void Cube(const KeyWalk<T> &walk) {
    KeyWalk<T> loader = walk, ahead = walk, behind = walk;
    LocalTensor<T> held[HELD];
    bool loads = loader.Next(), makes = ahead.Next();
    uint32_t loaded = 0, made = 0;
    if (loads) {
      Load(loader.at, held[loaded++ % HELD]);
      loads = loader.Next();
    }
    for (; made < ahead_ && makes; makes = ahead.Next()) {
      if (loads) {
        Load(loader.at, held[loaded++ % HELD]);
        loads = loader.Next();
      }
      Scores(ahead.at, made, held[made % HELD]);
      made++;
    }
    for (uint32_t j = 0; behind.Next(); j++) {
      if (makes) {
        Scores(ahead.at, made, held[made % HELD]);
        made++, makes = ahead.Next();
      }
      Fetch(behind.at, j);
      if (loads) {  // behind the weights, which are wanted sooner
        Load(loader.at, held[loaded++ % HELD]);
        loads = loader.Next();
      }
      AddUp(behind.at, held[j % HELD]);
    }
  }
  __aicore__ inline uint64_t QueryAt(const Handover &at) const { return in_.Query(at.b, at.first, at.head); }
  __aicore__ inline uint64_t KeyAt(const Handover &at) const {
    return in_.Key(at.b, at.key, at.head / (in_.heads / in_.kv_heads));
  }
  // The second of two operands that lie together, each of up to `rows`.
  __aicore__ inline LocalTensor<T> Second(const LocalTensor<T> &pair, uint32_t rows) const { return pair[rows * row_]; }
  // q and do of a span.
  __aicore__ inline void Load(const Handover &at, LocalTensor<T> &held) {
    held = span1_.template AllocTensor<T>();
    InParts(held, in_.q[QueryAt(at)], at.rows), InParts(Second(held, span_), dout_[QueryAt(at)], at.rows);
    span1_.EnQue(held);
  }
  // In parts of up to 128 rows, each a matrix of its own.
  __aicore__ inline void InParts(const LocalTensor<T> &l1, const GlobalTensor<T> &from, uint32_t n) {
    for (uint32_t r = 0; r < n; r += TILE)
      ToL1(l1[r * row_], from[static_cast<uint64_t>(r) * in_.QueryStride()], Least(TILE, n - r), in_.size, in_.QueryStride());
  }
  // Scores and do v^T of a span, turned. k and v of a tile are kept until its last products.
  __aicore__ inline void Scores(const Handover &at, uint32_t j, LocalTensor<T> &held) {
    LocalTensor<T> &own = own_[at.task % OWN];
    if (at.begins) {
      own = own1_.template AllocTensor<T>();
      ToL1(own, in_.k[KeyAt(at)], at.n, in_.size, in_.KeyStride());
      ToL1(Second(own, wide_), in_.v[KeyAt(at)], at.n, in_.size, in_.KeyStride());
      own1_.EnQue(own);
      own = own1_.template DeQue<T>();
    }
    const uint64_t slot = static_cast<uint64_t>(j % GRAD_SLOTS) * 2 * slot_;
    held = span1_.template DeQue<T>();
    Product(own, held, at, scores_[slot]);
    Product(Second(own, wide_), Second(held, span_), at, scores_[slot + slot_]);
    CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
  }
  // The rows of a tile times those of a span, part by part.
  __aicore__ inline void Product(const LocalTensor<T> &own, const LocalTensor<T> &span, const Handover &at, const GlobalTensor<float> &to) {
    for (uint32_t r = 0; r < at.rows; r += TILE) {
      const uint32_t columns = Least(TILE, at.rows - r);
      LocalTensor<float> c = c_.AllocTensor<float>();
      for (uint32_t d = 0; d < in_.size; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, in_.size - d);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>(), b2 = b2_.template AllocTensor<T>();
        LoadRows(a2, own, at.n, in_.size, d, depth);
        LoadColumns(b2, span[r * row_], columns, d, depth);
        a2_.EnQue(a2), b2_.EnQue(b2);
        a2 = a2_.template DeQue<T>(), b2 = b2_.template DeQue<T>();
        MultiplyL0(c, a2, b2, at.n, columns, depth, false, d > 0);
        a2_.FreeTensor(a2), b2_.FreeTensor(b2);
      }
      c_.EnQue(c);
      c = c_.DeQue<float>();
      Write(to[r], c, at.n, columns, span_);
      c_.FreeTensor(c);
    }
  }
  // What the vector cores made of a span, ds and p, into L1.
  __aicore__ inline void Fetch(const Handover &at, uint32_t j) {
    const GlobalTensor<T> p = made_[static_cast<uint64_t>(j % 2) * 2 * slot_];
    CrossCoreWaitFlag<2, PIPE_MTE2>(WEIGHTS_READY);
    ds_ = made1_.template AllocTensor<T>();
    ToL1(ds_, p[slot_], at.n, at.rows, span_);
    ToL1(ds_[wide_ * span_], p, at.n, at.rows, span_);
    made1_.EnQue(ds_);
    ds_ = made1_.template DeQue<T>();
    CrossCoreSetFlag<2, PIPE_MTE2>(WEIGHTS_TAKEN);
  }
  // Its products with the span and with the tile.
  __aicore__ inline void AddUp(const Handover &at, LocalTensor<T> &held) {
    LocalTensor<T> &own = own_[at.task % OWN];
    if (at.begins) sum_ = sums_.AllocTensor<float>();
    SumOver(sum_[KEYS * TILE], ds_, held, at);
    SumOver(sum_, ds_[wide_ * span_], Second(held, span_), at);
    span1_.FreeTensor(held);
    AddToQueries(own, at);
    made1_.FreeTensor(ds_);
    if (!at.ends) return;
    own1_.FreeTensor(own);
    sums_.EnQue(sum_);
    sum_ = sums_.DeQue<float>();
    const uint64_t to = KeySum(at.b, at.head, at.key);
    Store(dv_sum_[to], sum_, at.n), Store(dk_sum_[to], sum_[KEYS * TILE], at.n);
    sums_.FreeTensor(sum_);
  }
  // sum (+)= made times the rows of a span, in panels that share KEYS rows of L0C.
  __aicore__ inline void SumOver(const LocalTensor<float> &sum, const LocalTensor<T> &made, const LocalTensor<T> &span,
                                 const Handover &at) {
    for (uint32_t r = 0; r < at.rows; r += TILE) {
      const uint32_t rows = Least(TILE, at.rows - r);
      for (uint32_t d = 0; d < rows; d += DEPTH) {
        const uint32_t depth = Least(DEPTH, rows - d);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>();
        LoadRows(a2, made, at.n, at.rows, r + d, depth);
        a2_.EnQue(a2);
        a2 = a2_.template DeQue<T>();
        for (uint32_t panel = 0; panel < in_.panels; panel++) {
          LocalTensor<T> b2 = b2_.template AllocTensor<T>();
          LoadTurned(b2, span[r * row_], rows, in_.size, d, depth, panel * TILE, in_.PanelSize(panel));
          b2_.EnQue(b2);
          b2 = b2_.template DeQue<T>();
          MultiplyL0(sum[panel * PanelRows() * TILE], a2, b2, at.n, in_.PanelSize(panel), depth, false, !at.begins || r + d > 0);
          b2_.FreeTensor(b2);
        }
        a2_.FreeTensor(a2);
      }
    }
  }
  __aicore__ inline uint32_t PanelRows() const { return KEYS / in_.panels; }
  __aicore__ inline void Store(const GlobalTensor<float> &to, const LocalTensor<float> &sum, uint32_t m) {
    for (uint32_t panel = 0; panel < in_.panels; panel++)
      Write(to[panel * TILE], sum[panel * PanelRows() * TILE], m, in_.PanelSize(panel), row_);
  }
  // dq of a span += ds k, up to 64 queries at a time, added in global memory.
  __aicore__ inline void AddToQueries(const LocalTensor<T> &keys, const Handover &at) {
    for (uint32_t panel = 0; panel < in_.panels; panel++) {
      LocalTensor<T> b2 = b2_.template AllocTensor<T>();
      LoadTurned(b2, keys, at.n, in_.size, 0, at.n, panel * TILE, in_.PanelSize(panel));
      b2_.EnQue(b2);
      b2 = b2_.template DeQue<T>();
      for (uint32_t r = 0; r < at.rows; r += HALF) {
        const uint32_t rows = Least(HALF, at.rows - r);
        LocalTensor<T> a2 = a2_.template AllocTensor<T>();
        LoadTurned(a2, ds_, at.n, at.rows, 0, at.n, r, rows);
        a2_.EnQue(a2);
        a2 = a2_.template DeQue<T>();
        LocalTensor<float> c = c_.AllocTensor<float>();
        MultiplyL0(c, a2, b2, rows, in_.PanelSize(panel), at.n, true, false);
        a2_.FreeTensor(a2);
        c_.EnQue(c);
        c = c_.DeQue<float>();
        SetAtomicAdd<float>();
        Write(dq_sum_[QuerySum(at.b, at.head, at.first + r) + panel * TILE], c, rows, in_.PanelSize(panel), row_);
        SetAtomicNone();
        c_.FreeTensor(c);
      }
      b2_.FreeTensor(b2);
    }
  }

  // The vector cores, first: ranges, zeros for dq, and deltas.
  __aicore__ inline void First() {
    finder_.Buffers(pipe_), finder_.Find(in_);
    pipe_.InitBuffer(dlse_in_, 1, HALF * sizeof(float)), pipe_.InitBuffer(delta_out_, 1, HALF * sizeof(float));
    pipe_.InitBuffer(part_, DELTA_ROWS * sizeof(float)), pipe_.InitBuffer(zeros_, ZEROS * sizeof(float));
    o_in_.Init(pipe_, DELTA_ROWS * TILE, 2), dout_in_.Init(pipe_, DELTA_ROWS * TILE, 2);
    Zero();
    const uint32_t tiles = (in_.S + HALF - 1) / HALF;
    for (uint32_t i = GetBlockIdx(); i < in_.batch * in_.heads * tiles; i += GetBlockNum() * 2)
      Delta(i / tiles / in_.heads, i / tiles % in_.heads, i % tiles * HALF);
  }
  // Elements of a span that are a vector core's; rows of o and do at a time; floats that are written at a time.
  static constexpr uint32_t AREA = 4096, DELTA_ROWS = 32, ZEROS = 2048;

  __aicore__ inline void Zero() {
    LocalTensor<float> zeros = zeros_.Get<float>();
    Duplicate(zeros, 0.0f, ZEROS);
    Sync<HardEvent::V_MTE3>();
    const uint64_t units = static_cast<uint64_t>(in_.batch) * in_.heads * in_.S * row_ / FRACTAL_ROWS, cores = GetBlockNum() * 2;
    const uint64_t end = units * (GetBlockIdx() + 1) / cores * FRACTAL_ROWS;
    for (uint64_t at = units * GetBlockIdx() / cores * FRACTAL_ROWS; at < end; at += ZEROS)
      DataCopy(dq_sum_[at], zeros, end - at < ZEROS ? static_cast<uint32_t>(end - at) : ZEROS);
  }
  // The deltas of up to 64 queries of a head.
  __aicore__ inline void Delta(uint32_t b, uint32_t head, uint32_t first) {
    const uint32_t all = Least(HALF, in_.S - first), pieces = (all + DELTA_ROWS - 1) / DELTA_ROWS * in_.panels;
    LocalTensor<float> delta = delta_out_.AllocTensor<float>(), part = part_.Get<float>();
    Duplicate(delta, 0.0f, HALF);
    LoadRowsOf(b, head, first, all, 0);
    for (uint32_t i = 0; i < pieces; i++) {
      const uint32_t r = i / in_.panels * DELTA_ROWS, rows = Least(DELTA_ROWS, all - r), n = in_.PanelSize(i % in_.panels);
      const uint32_t padded = Padded<T>(n), count = rows * padded;
      if (i + 1 < pieces) LoadRowsOf(b, head, first, all, i + 1);
      LocalTensor<float> o = o_in_.Wait(count), dout = dout_in_.Wait(count);
      VectorBarrier();
      Mul(o, o, dout, count);
      for (uint32_t c = 0; c < n; c += REPEAT) {
        VectorBarrier();
        WholeReduceSum(part, o[c], Least(REPEAT, n - c), rows, 1, 1, padded / FLOATS);
        VectorBarrier();
        Add(delta[r], delta[r], part, rows);
      }
      o_in_.Free(), dout_in_.Free();
    }
    const uint64_t row = static_cast<uint64_t>(b) * in_.heads + head;
    LocalTensor<float> dlse = dlse_in_.AllocTensor<float>();
    const DataCopyExtParams some{1, static_cast<uint32_t>(all * sizeof(float)), 0, 0, 0};
    DataCopyPad(dlse, dlse_[row * in_.S + first], some, DataCopyPadExtParams<float>{false, 0, 0, 0.0f});
    dlse_in_.EnQue(dlse);
    dlse = dlse_in_.DeQue<float>();
    VectorBarrier();
    Sub(delta, delta, dlse, all);
    dlse_in_.FreeTensor(dlse);
    delta_out_.EnQue(delta);
    delta = delta_out_.DeQue<float>();
    DataCopyPad(deltas_[row * delta_row_ + first], delta, some);
    delta_out_.FreeTensor(delta);
  }
  __aicore__ inline void LoadRowsOf(uint32_t b, uint32_t head, uint32_t first, uint32_t all, uint32_t i) {
    const uint32_t r = i / in_.panels * DELTA_ROWS, rows = Least(DELTA_ROWS, all - r), n = in_.PanelSize(i % in_.panels);
    const uint64_t from = in_.Query(b, first + r, head) + i % in_.panels * TILE;
    o_in_.Load(o_[from], rows, n, in_.QueryStride() - n), dout_in_.Load(dout_[from], rows, n, in_.QueryStride() - n);
  }

  // Then: p and ds of each span.
  __aicore__ inline void VectorBuffers() {
    ranges_.Buffers(pipe_), mask_.Init(pipe_, span_, &ranges_);
    pipe_.InitBuffer(numbers_in_, 2, 2 * SPAN * sizeof(float));
    pipe_.InitBuffer(lse_numbers_, SPAN * sizeof(float)), pipe_.InitBuffer(delta_numbers_, SPAN * sizeof(float));
    scores_in_.Init(pipe_, AREA, 2), dp_in_.Init(pipe_, AREA, 2);
    p_out_.Init(pipe_, AREA, 2), ds_out_.Init(pipe_, AREA, 2);
  }
  // Scores and numbers of a span are loaded while those of the span before it are worked on.
  __aicore__ inline void Vector(KeyWalk<T> walk) {
    KeyWalk<T> loader = walk;
    bool loads = loader.Next();
    if (loads) {
      Load(loader.at, 0);
      loads = loader.Next();
    }
    uint32_t j = 0;
    for (; walk.Next(); j++) {
      if (loads) {
        Load(loader.at, j + 1);
        loads = loader.Next();
      }
      if (j > 1) CrossCoreWaitFlag<2, PIPE_MTE3>(WEIGHTS_TAKEN);
      const Mine mine = MineOf(walk.at.key, walk.at.n, wide_ / 2);
      if (mine.rows) Rows(walk.at, j, mine);
      CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
    }
    for (uint32_t left = Least(j, 2); left > 0; left--) CrossCoreWaitFlag<2, PIPE_MTE3>(WEIGHTS_TAKEN);
  }
  // Begins to load the scores of this core's keys for a span, and the numbers of its queries.
  __aicore__ inline void Load(const Handover &at, uint32_t j) {
    const Mine mine = MineOf(at.key, at.n, wide_ / 2);
    if (mine.rows) {
      const uint64_t row = static_cast<uint64_t>(at.b) * in_.heads + at.head;
      LocalTensor<float> both = numbers_in_.AllocTensor<float>();
      const DataCopyExtParams copy{1, static_cast<uint32_t>(at.rows * sizeof(float)), 0, 0, 0};
      const DataCopyPadExtParams<float> pad{false, 0, 0, 0.0f};
      DataCopyPad(both, lse_[row * in_.S + at.first], copy, pad);
      DataCopyPad(both[SPAN], deltas_[row * delta_row_ + at.first], copy, pad);
      numbers_in_.EnQue(both);
    }
    CrossCoreWaitFlag<2, PIPE_MTE2>(SCORES_READY);
    if (mine.rows == 0) return;
    const uint64_t from = static_cast<uint64_t>(j % GRAD_SLOTS) * 2 * slot_ + static_cast<uint64_t>(mine.skipped) * span_;
    const uint32_t wide = AlignUp(at.rows, REPEAT);
    scores_in_.Load(scores_[from], mine.rows, wide, span_ - wide), dp_in_.Load(scores_[from + slot_], mine.rows, wide, span_ - wide);
  }
  // lse and delta. Of a query that sees no key lse is raised, so that exp of a hidden score is 0.
  __aicore__ inline void Numbers(uint32_t n) {
    LocalTensor<float> both = numbers_in_.DeQue<float>();
    VectorBarrier();
    Maxs(lse_numbers_.Get<float>(), both, LOWEST_TOP, n);
    Muls(delta_numbers_.Get<float>(), both[SPAN], 1.0f, n);
    numbers_in_.FreeTensor(both);
    VectorBarrier();
  }
  __aicore__ inline void Mask(const Handover &at, Mine mine, uint32_t wide) {
    const uint64_t query = static_cast<uint64_t>(at.b) * in_.S + at.first, key = static_cast<uint64_t>(at.b) * in_.keys + mine.first;
    if (!knows_keys_) mask_.Rows(in_.key_segment[key], in_.key_order[key], mine.rows), knows_keys_ = true;
    mask_.Columns(in_.segment[query], in_.order[query], at.rows, wide);
  }
  // p and ds of a span, for the cube.
  __aicore__ inline void Rows(const Handover &at, uint32_t j, Mine mine) {
    const uint32_t wide = AlignUp(at.rows, REPEAT), rows = mine.rows, count = rows * wide;
    if (at.begins) knows_keys_ = false;
    if (at.masked != Masked::NOT) Mask(at, mine, wide);
    Numbers(at.rows);
    LocalTensor<float> s = scores_in_.Wait(count), dp = dp_in_.Wait(count);
    VectorBarrier();
    Muls(s, s, in_.scale, count);
    Less(dp, delta_numbers_.Get<float>(), rows, wide);
    VectorBarrier();
    if (at.masked != Masked::NOT) mask_.Apply(s, 0, rows, wide, at.masked, true);
    Less(s, lse_numbers_.Get<float>(), rows, wide);
    Muls(dp, dp, in_.scale, count);
    VectorBarrier();
    Exp(s, s, count);
    VectorBarrier();
    Mul(dp, s, dp, count);
    const uint64_t to = static_cast<uint64_t>(j % 2) * 2 * slot_ + static_cast<uint64_t>(mine.skipped) * span_;
    p_out_.StoreOf(made_[to], s, rows, wide, count, span_ - wide);
    VectorBarrier();
    ds_out_.StoreOf(made_[to + slot_], dp, rows, wide, count, span_ - wide);
    scores_in_.Free(), dp_in_.Free();
  }
  // x -= a number of each column
  __aicore__ inline void Less(const LocalTensor<float> &x, const LocalTensor<float> &numbers, uint32_t rows, uint32_t wide) {
    const uint8_t repeats = rows, stride = wide / FLOATS;
    for (uint32_t c = 0; c < wide; c += REPEAT)
      Sub(x[c], x[c], numbers[c], static_cast<uint64_t>(REPEAT), repeats, {1, 1, 1, stride, stride, 0});
  }

  // At last: dq of each head, and dk and dv, which are sums over the heads of a group.
  __aicore__ inline void Round() {
    const uint32_t group = in_.heads / in_.kv_heads;
    sums_in_.Init(pipe_, AREA, 2), rounded_out_.Init(pipe_, AREA, 2);
    most_ = AREA / row_;
    const uint32_t of_queries = (in_.S + most_ - 1) / most_, of_keys = (in_.keys + most_ - 1) / most_, cores = GetBlockNum() * 2;
    for (uint32_t i = GetBlockIdx(); i < in_.batch * in_.heads * of_queries; i += cores) {
      const uint32_t b = i / of_queries / in_.heads, head = i / of_queries % in_.heads, s = i % of_queries * most_;
      RoundRows(dq_sum_[QuerySum(b, head, s)], 1, 0, Least(most_, in_.S - s), dq_[in_.Query(b, s, head)], in_.QueryStride());
    }
    for (uint32_t i = GetBlockIdx(); i < in_.batch * in_.kv_heads * of_keys; i += cores) {
      const uint32_t b = i / of_keys / in_.kv_heads, kv = i / of_keys % in_.kv_heads, t = i % of_keys * most_;
      const uint32_t n = Least(most_, in_.keys - t);
      const uint64_t from = KeySum(b, kv * group, t), apart = KeySum(0, 1, 0), to = in_.Key(b, t, kv);
      RoundRows(dk_sum_[from], group, apart, n, dk_[to], in_.KeyStride());
      RoundRows(dv_sum_[from], group, apart, n, dv_[to], in_.KeyStride());
    }
  }
  // to = the sum of `parts` that lie `apart`, rows of a head.
  __aicore__ inline void RoundRows(const GlobalTensor<float> &from, uint32_t parts, uint64_t apart, uint32_t rows,
                                   const GlobalTensor<T> &to, uint32_t stride) {
    const uint32_t count = rows * row_;
    sums_in_.Load(from, 1, count);
    LocalTensor<float> total = rounded_out_.Get();
    for (uint32_t g = 0; g < parts; g++) {
      if (g + 1 < parts) sums_in_.Load(from[(g + 1) * apart], 1, count);
      LocalTensor<float> x = sums_in_.Wait(count);
      VectorBarrier();
      if (g == 0)
        Muls(total, x, 1.0f, count);
      else
        Add(total, total, x, count);
      sums_in_.Free();
    }
    rounded_out_.Store(to, rows, in_.size, count, stride - in_.size, row_);
  }

  static constexpr uint32_t OWN = 3;  // tiles of keys in L1
  TPipe pipe_;
  Inputs<T> in_;
  Ranges finder_, ranges_;
  GlobalTensor<T> o_, dout_, dq_, dk_, dv_, made_;
  GlobalTensor<float> lse_, dlse_, scores_, deltas_, dq_sum_, dk_sum_, dv_sum_;
  uint32_t wide_, span_, slot_, row_, delta_row_, most_;
  uint32_t ahead_ = 0;  // spans of scores that the cube makes ahead
  // of the cube
  TQue<TPosition::A1, 1> own1_, made1_;
  TQue<TPosition::B1, 4> span1_;
  TQue<TPosition::A2, 1> a2_;
  TQue<TPosition::B2, 1> b2_;
  TQue<TPosition::CO1, 1> c_, sums_;
  LocalTensor<T> own_[OWN], ds_;
  LocalTensor<float> sum_;
  // of the vector cores
  SpanMask mask_;
  In<float> scores_in_, dp_in_, sums_in_;
  In<T> o_in_, dout_in_;
  Out<T> p_out_, ds_out_, rounded_out_;
  TQue<TPosition::VECIN, 1> dlse_in_;
  TQue<TPosition::VECIN, 2> numbers_in_;
  TQue<TPosition::VECOUT, 1> delta_out_;
  TBuf<TPosition::VECCALC> lse_numbers_, delta_numbers_, part_, zeros_;
  bool knows_keys_ = false;
};

}  // namespace qwen
