// Dropless dispatch of the rows of tokens to their experts, and back. Assignments are sorted by expert, then by token.
#pragma once
#include "device.h"

namespace qwen {

constexpr uint32_t COLUMNS = 4096;  // of a row in UB at a time
constexpr uint32_t SLOTS = 1024;    // numbers written together
constexpr uint32_t ROWS_AHEAD = 8, ROWS_AHEAD_OF_GRAD = 4;  // rows that are loaded before the first is taken

// Integers that the scalar unit computes, which are written in order.
class IntsOut {
 public:
  __aicore__ inline void Init(TPipe &pipe) { pipe.InitBuffer(queue_, 1, SLOTS * sizeof(int32_t)); }
  __aicore__ inline void Begin(const GlobalTensor<int32_t> &to) { to_ = to, at_ = 0, held_ = 0; }
  __aicore__ inline void Put(int32_t value) {
    if (held_ == 0) {
      tile_ = queue_.AllocTensor<int32_t>();
      Sync<HardEvent::MTE3_S>();
    }
    tile_.SetValue(held_++, value);
    if (held_ == SLOTS) Flush();
  }
  __aicore__ inline void Flush() {
    if (held_ == 0) return;
    Sync<HardEvent::S_MTE3>();
    queue_.EnQue(tile_);
    tile_ = queue_.DeQue<int32_t>();
    DataCopyPad(to_[at_], tile_, DataCopyExtParams{1, static_cast<uint32_t>(held_ * sizeof(int32_t)), 0, 0, 0});
    queue_.FreeTensor(tile_);
    at_ += held_, held_ = 0;
  }

 private:
  TQue<TPosition::VECOUT, 1> queue_;
  LocalTensor<int32_t> tile_;
  GlobalTensor<int32_t> to_;
  uint64_t at_;
  uint32_t held_;
};

// Each core counts its tokens' choices of each expert; from the counts of all, each knows where its own begin, and copies its rows there.
template <typename T>
class Permute {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR expert, GM_ADDR rows, GM_ADDR slot, GM_ADDR group, GM_ADDR workspace,
                             const PermuteTiling &tiling) {
    k_ = tiling.k, experts_ = tiling.experts, width_ = tiling.width, padded_ = AlignUp(experts_, FLOATS);
    x_.SetGlobalBuffer((__gm__ T *)x), rows_.SetGlobalBuffer((__gm__ T *)rows);
    expert_.SetGlobalBuffer((__gm__ int32_t *)expert), slot_.SetGlobalBuffer((__gm__ int32_t *)slot),
        group_.SetGlobalBuffer((__gm__ int32_t *)group);
    counts_.SetGlobalBuffer((__gm__ int32_t *)GetUserWorkspace(workspace));
    pipe_.InitBuffer(own_, padded_ * sizeof(int32_t)), pipe_.InitBuffer(before_, padded_ * sizeof(int32_t));
    pipe_.InitBuffer(total_, padded_ * sizeof(int32_t)), pipe_.InitBuffer(counts_in_, 2, padded_ * sizeof(int32_t));
    pipe_.InitBuffer(row_, 2, COLUMNS * sizeof(T));
    ints_.Init(pipe_);
    const Share tokens = ShareOf(tiling.tokens, GetBlockIdx(), GetBlockNum());
    Count(tokens);
    PipeBarrier<PIPE_ALL>();
    SyncAll();
    Begin();
    Groups(ShareOf(tiling.tokens * k_, GetBlockIdx(), GetBlockNum()));
    Move(tokens);
  }

 private:
  __aicore__ inline void Count(Share tokens) {
    LocalTensor<int32_t> own = own_.Get<int32_t>();
    Duplicate(own, 0, padded_);
    Sync<HardEvent::V_S>();
    for (uint64_t i = static_cast<uint64_t>(tokens.begin) * k_; i < static_cast<uint64_t>(tokens.end) * k_; i++) {
      const int32_t e = expert_.GetValue(i);
      own.SetValue(e, own.GetValue(e) + 1);
    }
    Sync<HardEvent::S_MTE3>();
    DataCopy(counts_[static_cast<uint64_t>(GetBlockIdx()) * padded_], own, padded_);
    Sync<HardEvent::MTE3_S>();
  }
  // own = where the first of this core's assignments to each expert goes; total = the assignments to each.
  __aicore__ inline void Begin() {
    LocalTensor<int32_t> own = own_.Get<int32_t>(), before = before_.Get<int32_t>(), total = total_.Get<int32_t>();
    Duplicate(before, 0, padded_), Duplicate(total, 0, padded_);
    for (uint32_t b = 0; b < GetBlockNum(); b++) {
      LocalTensor<int32_t> counts = counts_in_.AllocTensor<int32_t>();
      DataCopy(counts, counts_[static_cast<uint64_t>(b) * padded_], padded_);
      counts_in_.EnQue(counts);
      counts = counts_in_.DeQue<int32_t>();
      VectorBarrier();
      if (b < GetBlockIdx()) Add(before, before, counts, padded_);
      Add(total, total, counts, padded_);
      counts_in_.FreeTensor(counts);
    }
    Sync<HardEvent::V_S>();
    int32_t first = 0;
    for (uint32_t e = 0; e < experts_; e++) {
      own.SetValue(e, first + before.GetValue(e));
      first += total.GetValue(e);
    }
  }
  // The expert of each slot.
  __aicore__ inline void Groups(Share slots) {
    LocalTensor<int32_t> total = total_.Get<int32_t>();
    ints_.Begin(group_[slots.begin]);
    uint32_t e = 0, end = total.GetValue(0);
    for (uint32_t i = slots.begin; i < slots.end; i++) {
      while (i >= end) end += total.GetValue(++e);
      ints_.Put(e);
    }
    ints_.Flush();
  }
  __aicore__ inline void Move(Share tokens) {
    LocalTensor<int32_t> own = own_.Get<int32_t>();
    for (uint32_t c = 0; c < width_; c += COLUMNS) {
      const uint32_t n = Least(COLUMNS, width_ - c);
      const bool last = c + n == width_;
      if (last) ints_.Begin(slot_[static_cast<uint64_t>(tokens.begin) * k_]);
      for (uint32_t t = tokens.begin; t < tokens.end; t++) {
        LocalTensor<T> row = row_.template AllocTensor<T>();
        DataCopyExtParams copy{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0};
        DataCopyPad(row, x_[static_cast<uint64_t>(t) * width_ + c], copy, DataCopyPadExtParams<T>{false, 0, 0, T()});
        row_.EnQue(row);
        row = row_.template DeQue<T>();
        for (uint32_t j = 0; j < k_; j++) {
          const int32_t e = expert_.GetValue(static_cast<uint64_t>(t) * k_ + j), to = own.GetValue(e);
          own.SetValue(e, to + 1);
          DataCopyPad(rows_[static_cast<uint64_t>(to) * width_ + c], row, copy);
          if (last) ints_.Put(to);
        }
        row_.FreeTensor(row);
      }
      if (!last) Back(tokens);
    }
    ints_.Flush();
  }
  // own, as it was before the tokens were moved
  __aicore__ inline void Back(Share tokens) {
    LocalTensor<int32_t> own = own_.Get<int32_t>();
    for (uint64_t i = static_cast<uint64_t>(tokens.begin) * k_; i < static_cast<uint64_t>(tokens.end) * k_; i++) {
      const int32_t e = expert_.GetValue(i);
      own.SetValue(e, own.GetValue(e) - 1);
    }
  }

  TPipe pipe_;
  GlobalTensor<T> x_, rows_;
  GlobalTensor<int32_t> expert_, slot_, group_, counts_;
  TBuf<TPosition::VECCALC> own_, before_, total_;
  TQue<TPosition::VECIN, 1> counts_in_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> row_;
  IntsOut ints_;
  uint32_t k_, experts_, width_, padded_;
};

// Loads columns c to c + n of the rows in which choices first to last of a token are, and gives their slots. One past the last row is not
// loaded.
template <typename T, uint32_t AHEAD>
__aicore__ inline void LoadAhead(In<T, AHEAD> &in, GlobalTensor<T> &rows, GlobalTensor<int32_t> &slot, uint32_t token, uint32_t first,
                                 uint32_t last, uint32_t c, uint32_t n, const PermuteTiling &tiling, uint32_t (&slots)[AHEAD]) {
  for (uint32_t j = first; j < last; j++) {
    const uint32_t at = static_cast<uint32_t>(slot.GetValue(static_cast<uint64_t>(token) * tiling.k + j));
    if (at < tiling.rows) in.Load(rows[static_cast<uint64_t>(at) * tiling.width + c], 1, n);
    slots[j - first] = at;
  }
}

// out[t] = the sum over j of rows[slot[t, j]], WEIGHTED: times weight[t, j]; a slot past the last row adds nothing.
template <typename T, bool WEIGHTED>
class Combine {
 public:
  __aicore__ inline void Run(GM_ADDR rows, GM_ADDR slot, GM_ADDR weight, GM_ADDR out, const PermuteTiling &tiling) {
    rows_.SetGlobalBuffer((__gm__ T *)rows), out_.SetGlobalBuffer((__gm__ T *)out), slot_.SetGlobalBuffer((__gm__ int32_t *)slot);
    if constexpr (WEIGHTED) weight_.SetGlobalBuffer((__gm__ float *)weight);
    rows_in_.Init(pipe_, COLUMNS, ROWS_AHEAD), out_out_.Init(pipe_, COLUMNS, 2);
    const Share tokens = ShareOf(tiling.tokens, GetBlockIdx(), GetBlockNum());
    for (uint32_t t = tokens.begin; t < tokens.end; t++)
      for (uint32_t c = 0; c < tiling.width; c += COLUMNS) Part(t, c, Least(COLUMNS, tiling.width - c), tiling);
  }

 private:
  __aicore__ inline void Part(uint32_t token, uint32_t c, uint32_t n, const PermuteTiling &tiling) {
    LocalTensor<float> sum = out_out_.Get();
    Duplicate(sum, 0.0f, n);
    for (uint32_t first = 0; first < tiling.k; first += ROWS_AHEAD) {
      const uint32_t last = Least(first + ROWS_AHEAD, tiling.k);
      uint32_t slots[ROWS_AHEAD];
      LoadAhead(rows_in_, rows_, slot_, token, first, last, c, n, tiling, slots);
      for (uint32_t j = first; j < last; j++) {
        if (slots[j - first] >= tiling.rows) continue;
        LocalTensor<float> row = rows_in_.Wait(n);
        VectorBarrier();
        if constexpr (WEIGHTED)
          Axpy(sum, row, weight_.GetValue(static_cast<uint64_t>(token) * tiling.k + j), n);
        else
          Add(sum, sum, row, n);
        rows_in_.Free();
      }
    }
    out_out_.Store(out_[static_cast<uint64_t>(token) * tiling.width + c], 1, n, n);
  }

  TPipe pipe_;
  GlobalTensor<T> rows_, out_;
  GlobalTensor<float> weight_;
  GlobalTensor<int32_t> slot_;
  In<T, ROWS_AHEAD> rows_in_;
  Out<T> out_out_;
};

// dy[slot] = weight dout, dweight = sum(y[slot] dout); every row of y is in one slot.
template <typename T>
class CombineGrad {
 public:
  __aicore__ inline void Run(GM_ADDR y, GM_ADDR slot, GM_ADDR weight, GM_ADDR dout, GM_ADDR dy, GM_ADDR dweight,
                             const PermuteTiling &tiling) {
    y_.SetGlobalBuffer((__gm__ T *)y), dout_.SetGlobalBuffer((__gm__ T *)dout), dy_.SetGlobalBuffer((__gm__ T *)dy);
    slot_.SetGlobalBuffer((__gm__ int32_t *)slot), weight_.SetGlobalBuffer((__gm__ float *)weight),
        dweight_.SetGlobalBuffer((__gm__ float *)dweight);
    y_in_.Init(pipe_, COLUMNS, ROWS_AHEAD_OF_GRAD), dout_in_.Init(pipe_, COLUMNS, 1), dy_out_.Init(pipe_, COLUMNS, 2);
    pipe_.InitBuffer(products_, COLUMNS * sizeof(float)), pipe_.InitBuffer(work_, WorkOfSum(COLUMNS) * sizeof(float));
    pipe_.InitBuffer(dots_, (tiling.k + 1) * 32), pipe_.InitBuffer(dweight_out_, 1, AlignUp(tiling.k, FLOATS) * sizeof(float));
    const Share tokens = ShareOf(tiling.tokens, GetBlockIdx(), GetBlockNum());
    for (uint32_t t = tokens.begin; t < tokens.end; t++) Token(t, tiling);
  }

 private:
  __aicore__ inline void Token(uint32_t token, const PermuteTiling &tiling) {
    LocalTensor<float> dots = dots_.Get<float>();
    VectorBarrier();
    Duplicate(dots, 0.0f, tiling.k * FLOATS);
    for (uint32_t c = 0; c < tiling.width; c += COLUMNS) {
      const uint32_t n = Least(COLUMNS, tiling.width - c);
      dout_in_.Load(dout_[static_cast<uint64_t>(token) * tiling.width + c], 1, n);
      LocalTensor<float> dout = dout_in_.Wait(n);
      for (uint32_t first = 0; first < tiling.k; first += ROWS_AHEAD_OF_GRAD) {
        const uint32_t last = Least(first + ROWS_AHEAD_OF_GRAD, tiling.k);
        uint32_t slots[ROWS_AHEAD_OF_GRAD];
        LoadAhead(y_in_, y_, slot_, token, first, last, c, n, tiling, slots);
        for (uint32_t j = first; j < last; j++)
          if (slots[j - first] < tiling.rows) Choice(token, j, slots[j - first], c, n, dout, tiling);
      }
      dout_in_.Free();
    }
    LocalTensor<float> dweight = dweight_out_.AllocTensor<float>();
    Sync<HardEvent::V_S>();
    Sync<HardEvent::MTE3_S>();
    for (uint32_t j = 0; j < tiling.k; j++) dweight.SetValue(j, dots.GetValue(j * FLOATS));
    Sync<HardEvent::S_V>();
    dweight_out_.EnQue(dweight);
    dweight = dweight_out_.DeQue<float>();
    DataCopyPad(dweight_[static_cast<uint64_t>(token) * tiling.k], dweight,
                DataCopyExtParams{1, static_cast<uint32_t>(tiling.k * sizeof(float)), 0, 0, 0});
    dweight_out_.FreeTensor(dweight);
  }
  __aicore__ inline void Choice(uint32_t token, uint32_t j, uint32_t slot, uint32_t c, uint32_t n, const LocalTensor<float> &dout,
                                const PermuteTiling &tiling) {
    LocalTensor<float> dots = dots_.Get<float>(), products = products_.Get<float>(), sum = dots[tiling.k * FLOATS];
    LocalTensor<float> y = y_in_.Wait(n), dy = dy_out_.Get();
    Muls(dy, dout, weight_.GetValue(static_cast<uint64_t>(token) * tiling.k + j), n);
    VectorBarrier();
    Mul(products, y, dout, n);
    y_in_.Free();
    RowSum(sum, products, work_.Get<float>(), n);
    VectorBarrier();
    Add(dots[j * FLOATS], dots[j * FLOATS], sum, 1);
    dy_out_.Store(dy_[static_cast<uint64_t>(slot) * tiling.width + c], 1, n, n);
  }

  TPipe pipe_;
  GlobalTensor<T> y_, dout_, dy_;
  GlobalTensor<float> weight_, dweight_;
  GlobalTensor<int32_t> slot_;
  In<T, ROWS_AHEAD_OF_GRAD> y_in_;
  In<T> dout_in_;
  Out<T> dy_out_;
  TBuf<TPosition::VECCALC> products_, work_, dots_;
  TQue<TPosition::VECOUT, 1> dweight_out_;
};

}  // namespace qwen
