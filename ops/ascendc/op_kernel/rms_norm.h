// RMS norm of rows: y = x w / sqrt(mean(x^2) + eps), computed in float32 and rounded once.
#pragma once
#include "device.h"

namespace qwen {

// The scales 1 / sqrt(sum / n + eps) of rows, from sums that are a block apart, for the scalar unit.
class Scales {
 public:
  __aicore__ inline void Init(TPipe &pipe, uint32_t rows, uint32_t n) {
    pipe.InitBuffer(sums_, rows * 32);
    pipe.InitBuffer(ones_, rows * 32);
    pipe.InitBuffer(work_, WorkOfSum(n) * sizeof(float));
    Duplicate(ones_.Get<float>(), 1.0f, rows * FLOATS);
  }
  __aicore__ inline void Of(const LocalTensor<float> &squares, uint32_t rows, uint32_t n, uint32_t padded, float eps) {
    LocalTensor<float> sums = sums_.Get<float>(), work = work_.Get<float>();
    for (uint32_t r = 0; r < rows; r++) RowSum(sums[r * FLOATS], squares[r * padded], work, n);
    const uint32_t count = rows * FLOATS;
    VectorBarrier();
    Muls(sums, sums, 1.0f / static_cast<float>(n), count);
    VectorBarrier();
    Adds(sums, sums, eps, count);
    VectorBarrier();
    Sqrt(sums, sums, count);
    VectorBarrier();
    Div(sums, ones_.Get<float>(), sums, count);
  }
  __aicore__ inline float At(uint32_t r) { return sums_.Get<float>().GetValue(r * FLOATS); }
  __aicore__ inline LocalTensor<float> Work() { return work_.Get<float>(); }

 private:
  TBuf<TPosition::VECCALC> sums_, ones_, work_;
};

// ADD: h = x + y is made and rounded first, and is a result too.
template <typename T, bool ADD>
class RmsNorm {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR y, GM_ADDR w, GM_ADDR h, GM_ADDR out, const RmsNormTiling &tiling) {
    n_ = tiling.n, padded_ = Padded<T>(n_), eps_ = tiling.eps;
    x_.SetGlobalBuffer((__gm__ T *)x), out_.SetGlobalBuffer((__gm__ T *)out), w_.SetGlobalBuffer((__gm__ T *)w);
    if constexpr (ADD) y_.SetGlobalBuffer((__gm__ T *)y), h_.SetGlobalBuffer((__gm__ T *)h);
    Buffers(tiling);
    w_in_.Load(w_, 1, n_);
    weight_ = w_in_.Wait(padded_);
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    if (mine.begin < mine.end) Load(mine.begin, Least(tiling.tile, mine.end - mine.begin));
    for (uint32_t r = mine.begin; r < mine.end; r += tiling.tile) {
      const uint32_t rows = Least(tiling.tile, mine.end - r), next = r + rows;
      if (tiling.buffers > 1 && next < mine.end) Load(next, Least(tiling.tile, mine.end - next));
      Compute(r, rows);
      if (tiling.buffers == 1 && next < mine.end) Load(next, Least(tiling.tile, mine.end - next));
    }
    w_in_.Free();
  }

 private:
  __aicore__ inline void Buffers(const RmsNormTiling &tiling) {
    const uint32_t elements = tiling.tile * padded_;
    w_in_.Init(pipe_, padded_, 1);
    x_in_.Init(pipe_, elements, tiling.buffers);
    normed_.Init(pipe_, elements, tiling.buffers);
    if constexpr (ADD) y_in_.Init(pipe_, elements, tiling.buffers), sum_.Init(pipe_, elements, tiling.buffers);
    scales_.Init(pipe_, tiling.tile, n_);
  }
  __aicore__ inline void Load(uint32_t row, uint32_t rows) {
    x_in_.Load(x_[static_cast<uint64_t>(row) * n_], rows, n_);
    if constexpr (ADD) y_in_.Load(y_[static_cast<uint64_t>(row) * n_], rows, n_);
  }
  __aicore__ inline void Compute(uint32_t row, uint32_t rows) {
    const uint32_t count = rows * padded_;
    const uint64_t at = static_cast<uint64_t>(row) * n_;
    LocalTensor<float> x = x_in_.Wait(count);
    if constexpr (ADD) {
      LocalTensor<float> y = y_in_.Wait(count);
      Add(x, x, y, count);
      y_in_.Free();
      VectorBarrier();
      sum_.StoreRounded(h_[at], x, rows, n_, count);
      VectorBarrier();
    }
    LocalTensor<float> out = normed_.Get();
    Mul(out, x, x, count);
    scales_.Of(out, rows, n_, padded_, eps_);
    Sync<HardEvent::V_S>();
    for (uint32_t r = 0; r < rows; r++) Muls(out[r * padded_], x[r * padded_], scales_.At(r), n_);
    Sync<HardEvent::S_V>();
    x_in_.Free();
    VectorBarrier();
    for (uint32_t r = 0; r < rows; r++) Mul(out[r * padded_], out[r * padded_], weight_, n_);
    normed_.Store(out_[at], rows, n_, count);
  }

  TPipe pipe_;
  GlobalTensor<T> x_, y_, w_, h_, out_;
  In<T> x_in_, y_in_, w_in_;
  Out<T> sum_, normed_;
  Scales scales_;
  LocalTensor<float> weight_;
  uint32_t n_, padded_;
  float eps_;
};

// dx = (dy w - x back) scale, with back = scale^2 sum(dy w x) / n; dw = the sum over rows of dy x scale. ADD: dx is dh more.
template <typename T, bool ADD>
class RmsNormGrad {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR w, GM_ADDR dy, GM_ADDR dh, GM_ADDR dx, GM_ADDR dw, GM_ADDR workspace,
                             const RmsNormTiling &tiling) {
    n_ = tiling.n, padded_ = Padded<T>(n_), row_ = AlignUp(n_, FLOATS), eps_ = tiling.eps, parts_ = tiling.parts;
    x_.SetGlobalBuffer((__gm__ T *)x), dy_.SetGlobalBuffer((__gm__ T *)dy), dx_.SetGlobalBuffer((__gm__ T *)dx);
    w_.SetGlobalBuffer((__gm__ T *)w), dw_.SetGlobalBuffer((__gm__ T *)dw);
    if constexpr (ADD) dh_.SetGlobalBuffer((__gm__ T *)dh);
    partial_.SetGlobalBuffer((__gm__ float *)GetUserWorkspace(workspace));
    Rows(tiling);
    PipeBarrier<PIPE_ALL>();
    SyncAll();
    pipe_.Reset();
    dw_sum_.Init(pipe_);
    dw_sum_.Run(partial_, parts_, n_, row_, dw_);
  }

 private:
  __aicore__ inline void Buffers(const RmsNormTiling &tiling) {
    const uint32_t elements = tiling.tile * padded_;
    w_in_.Init(pipe_, padded_, 1);
    x_in_.Init(pipe_, elements, tiling.buffers), dy_in_.Init(pipe_, elements, tiling.buffers);
    dx_out_.Init(pipe_, elements, tiling.buffers);
    pipe_.InitBuffer(products_, elements * sizeof(float));
    pipe_.InitBuffer(dots_, tiling.tile * 32);
    pipe_.InitBuffer(total_, padded_ * sizeof(float));
    scales_.Init(pipe_, tiling.tile, n_);
  }
  __aicore__ inline void Rows(const RmsNormTiling &tiling) {
    Buffers(tiling);
    w_in_.Load(w_, 1, n_);
    weight_ = w_in_.Wait(padded_);
    const Share parts = ShareOf(parts_, GetBlockIdx(), GetBlockNum());
    for (uint32_t p = parts.begin; p < parts.end; p++) {
      VectorBarrier();
      Duplicate(total_.Get<float>(), 0.0f, padded_);
      const Share rows = ShareOf(tiling.rows, p, parts_);
      for (uint32_t r = rows.begin; r < rows.end; r += tiling.tile) Tile(r, Least(tiling.tile, rows.end - r));
      Sync<HardEvent::V_MTE3>();
      DataCopy(partial_[static_cast<uint64_t>(p) * row_], total_.Get<float>(), row_);
      Sync<HardEvent::MTE3_V>();
    }
    w_in_.Free();
  }
  __aicore__ inline void Tile(uint32_t row, uint32_t rows) {
    const uint32_t count = rows * padded_;
    const uint64_t at = static_cast<uint64_t>(row) * n_;
    x_in_.Load(x_[at], rows, n_), dy_in_.Load(dy_[at], rows, n_);
    LocalTensor<float> x = x_in_.Wait(count), dy = dy_in_.Wait(count), dx = dx_out_.Get();
    LocalTensor<float> products = products_.Get<float>(), dots = dots_.Get<float>();
    VectorBarrier();
    Mul(products, x, x, count);
    scales_.Of(products, rows, n_, padded_, eps_);
    for (uint32_t r = 0; r < rows; r++) Mul(dx[r * padded_], dy[r * padded_], weight_, n_);
    VectorBarrier();
    for (uint32_t r = 0; r < rows; r++) Mul(products[r * padded_], dx[r * padded_], x[r * padded_], n_);
    for (uint32_t r = 0; r < rows; r++) {
      VectorBarrier();
      ReduceSum(dots[r * FLOATS], products[r * padded_], scales_.Work(), n_);
    }
    Sync<HardEvent::V_S>();
    for (uint32_t r = 0; r < rows; r++) Row(r, x, dy, dx, products, dots);
    Sync<HardEvent::S_V>();
    x_in_.Free(), dy_in_.Free();
    if constexpr (ADD) {
      dy_in_.Load(dh_[at], rows, n_);  // into the buffers of dy, so that longer rows fit
      LocalTensor<float> dh = dy_in_.Wait(count);
      VectorBarrier();
      Add(dx, dx, dh, count);
      dy_in_.Free();
    }
    dx_out_.Store(dx_[at], rows, n_, count);
  }
  __aicore__ inline void Row(uint32_t r, const LocalTensor<float> &x, const LocalTensor<float> &dy, const LocalTensor<float> &dx,
                             const LocalTensor<float> &products, const LocalTensor<float> &dots) {
    const uint32_t at = r * padded_;
    const float scale = scales_.At(r), back = scale * scale * dots.GetValue(r * FLOATS) / static_cast<float>(n_);
    LocalTensor<float> total = total_.Get<float>();
    Axpy(dx[at], x[at], -back, n_);
    Muls(products[at], x[at], scale, n_);
    VectorBarrier();
    Muls(dx[at], dx[at], scale, n_);
    Mul(products[at], products[at], dy[at], n_);
    VectorBarrier();
    Add(total, total, products[at], n_);
  }

  TPipe pipe_;
  GlobalTensor<T> x_, w_, dy_, dh_, dx_, dw_;
  GlobalTensor<float> partial_;
  In<T> x_in_, dy_in_, w_in_;
  Out<T> dx_out_;
  SumOfParts<T> dw_sum_;
  TBuf<TPosition::VECCALC> products_, dots_, total_;
  Scales scales_;
  LocalTensor<float> weight_;
  uint32_t n_, padded_, row_, parts_;
  float eps_;
};

}  // namespace qwen
