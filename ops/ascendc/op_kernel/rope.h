// Rotary embedding of half-split pairs, alone and after an RMS norm of each head, in float32.
//
// A tile of R = tokens * heads rows is stored in UB as [2][R][P]: all first halves, then all second halves; P is half a head, padded to a
// multiple of a block. So one instruction with R repeats acts on 64 columns of all heads; strides of 0 broadcast angles or a scale.
#pragma once
#include "device.h"

namespace qwen {

struct HeadRows {
  uint32_t tokens, heads, half, padded;
  __aicore__ inline uint32_t Rows() const { return tokens * heads; }
  __aicore__ inline uint32_t Elements() const { return Rows() * padded; }  // of the first halves
};

// y = x turned by the angles of its tokens, sign -1: back. spare: as large as x. angles: rows of cos, then of sin.
__aicore__ inline void Turn(const LocalTensor<float> &y, const LocalTensor<float> &x, const LocalTensor<float> &spare,
                            const LocalTensor<float> &cos, const LocalTensor<float> &sin, const HeadRows &size, int32_t sign) {
  const uint32_t n = size.half, p = size.padded, second = size.Elements(), token = size.heads * p, angle = AlignUp(n, FLOATS);
  for (uint32_t t = 0; t < size.tokens; t++)
    for (uint32_t h = 0; h < 2; h++) {
      const uint32_t at = h * second + t * token, other = (1 - h) * second + t * token;
      MulRow(y[at], x[at], cos[t * angle], size.heads, n, p);
      MulRow(spare[at], x[other], sin[t * angle], size.heads, n, p);
    }
  VectorBarrier();
  if (sign > 0) {
    Sub(y, y, spare, second);
    Add(y[second], y[second], spare[second], second);
  } else {
    Add(y, y, spare, second);
    Sub(y[second], y[second], spare[second], second);
  }
}

// Numbers of heads: sums over their elements, and what is made of them.
class HeadSums {
 public:
  __aicore__ inline void Init(TPipe &pipe, uint32_t rows) {
    const uint32_t bytes = AlignUp(rows, FLOATS) * sizeof(float);
    pipe.InitBuffer(sums_, bytes), pipe.InitBuffer(part_, bytes);
    pipe.InitBuffer(spread_, bytes * FLOATS);
  }
  // The sums of x [2][R][P] over both halves of a row.
  __aicore__ inline LocalTensor<float> Of(const LocalTensor<float> &x, const HeadRows &size) {
    LocalTensor<float> sums = sums_.Get<float>(), part = part_.Get<float>();
    const uint32_t rows = size.Rows();
    Duplicate(sums, 0.0f, AlignUp(rows, FLOATS));
    for (uint32_t h = 0; h < 2; h++)
      for (uint32_t c = 0; c < size.half; c += REPEAT) {
        VectorBarrier();
        WholeReduceSum(part, x[h * size.Elements() + c], Least(REPEAT, size.half - c), rows, 1, 1, size.padded / FLOATS);
        VectorBarrier();
        Add(sums, sums, part, rows);
      }
    VectorBarrier();
    return sums;
  }
  // 1 / sqrt(sum / n + eps) of sums of squares, in place
  __aicore__ inline void Scale(const HeadRows &size, float eps) {
    LocalTensor<float> sums = sums_.Get<float>(), ones = part_.Get<float>();
    const uint32_t rows = size.Rows();
    Duplicate(ones, 1.0f, rows);
    Muls(sums, sums, 1.0f / static_cast<float>(2 * size.half), rows);
    VectorBarrier();
    Adds(sums, sums, eps, rows);
    VectorBarrier();
    Sqrt(sums, sums, rows);
    VectorBarrier();
    Div(sums, ones, sums, rows);
    VectorBarrier();
  }
  // A block of each sum.
  __aicore__ inline LocalTensor<float> Spread(const HeadRows &size) {
    LocalTensor<float> spread = spread_.Get<float>();
    Brcb(spread, sums_.Get<float>(), static_cast<uint8_t>(AlignUp(size.Rows(), FLOATS) / FLOATS), {1, 8});
    VectorBarrier();
    return spread;
  }
  __aicore__ inline LocalTensor<float> Sums() { return sums_.Get<float>(); }

 private:
  TBuf<TPosition::VECCALC> sums_, part_, spread_;
};

// y = x turned; NORM: the norm of each head of x, times w, turned.
template <typename T, bool NORM>
class Rope {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR y, const RopeTiling &tiling) {
    size_ = {tiling.tile, tiling.heads, tiling.half, Padded<T>(tiling.half)};
    x_.SetGlobalBuffer((__gm__ T *)x), y_.SetGlobalBuffer((__gm__ T *)y);
    cos_.SetGlobalBuffer((__gm__ float *)cos), sin_.SetGlobalBuffer((__gm__ float *)sin);
    const uint32_t elements = 2 * size_.Elements();
    x_in_.Init(pipe_, elements, 2), y_out_.Init(pipe_, elements, 2);
    cos_in_.Init(pipe_, tiling.tile * AlignUp(size_.half, FLOATS), 2), sin_in_.Init(pipe_, tiling.tile * AlignUp(size_.half, FLOATS), 2);
    pipe_.InitBuffer(spare_, elements * sizeof(float));
    if constexpr (NORM) {
      w_.SetGlobalBuffer((__gm__ T *)w);
      w_in_.Init(pipe_, 2 * size_.padded, 1), sums_.Init(pipe_, size_.Rows());
      w_in_.LoadHalves(w_, 1, size_.half, size_.padded);
      weight_ = w_in_.Wait(2 * size_.padded);
    }
    const Share mine = ShareOf(tiling.tokens, GetBlockIdx(), GetBlockNum());
    for (uint32_t t = mine.begin; t < mine.end; t += tiling.tile) Tile(t, Least(tiling.tile, mine.end - t), tiling);
    if constexpr (NORM) w_in_.Free();
  }

 private:
  __aicore__ inline void Tile(uint32_t token, uint32_t tokens, const RopeTiling &tiling) {
    const HeadRows size = {tokens, size_.heads, size_.half, size_.padded};
    const uint64_t at = static_cast<uint64_t>(token) * size.heads * 2 * size.half, angle = static_cast<uint64_t>(token) * size.half;
    x_in_.LoadHalves(x_[at], size.Rows(), size.half, size.Elements());
    cos_in_.Load(cos_[angle], tokens, size.half), sin_in_.Load(sin_[angle], tokens, size.half);
    LocalTensor<float> x = x_in_.Wait(2 * size.Elements()), y = y_out_.Get(), spare = spare_.Get<float>();
    LocalTensor<float> cos = cos_in_.Wait(0), sin = sin_in_.Wait(0);
    VectorBarrier();
    if constexpr (NORM) Norm(x, spare, size, tiling.eps);
    Turn(y, x, spare, cos, sin, size, tiling.sign);
    x_in_.Free(), cos_in_.Free(), sin_in_.Free();
    y_out_.StoreHalves(y_[at], size.Rows(), size.half, size.Elements());
  }
  __aicore__ inline void Norm(const LocalTensor<float> &x, const LocalTensor<float> &spare, const HeadRows &size, float eps) {
    Mul(spare, x, x, 2 * size.Elements());
    VectorBarrier();
    sums_.Of(spare, size);
    sums_.Scale(size, eps);
    LocalTensor<float> scale = sums_.Spread(size);
    for (uint32_t h = 0; h < 2; h++) MulEach(x[h * size.Elements()], x[h * size.Elements()], scale, size.Rows(), size.half, size.padded);
    VectorBarrier();
    for (uint32_t h = 0; h < 2; h++)
      MulRow(x[h * size.Elements()], x[h * size.Elements()], weight_[h * size.padded], size.Rows(), size.half, size.padded);
    VectorBarrier();
  }

  TPipe pipe_;
  GlobalTensor<T> x_, y_, w_;
  GlobalTensor<float> cos_, sin_;
  In<T> x_in_, w_in_;
  In<float> cos_in_, sin_in_;
  Out<T> y_out_;
  TBuf<TPosition::VECCALC> spare_;
  HeadSums sums_;
  LocalTensor<float> weight_;
  HeadRows size_;
};

// With g = dy turned back and r a head's scale: dx = (g w - x r^2 sum(g w x) / H) r, dw = the sum of g x r over all heads.
template <typename T>
class RopeNormGrad {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR dy, GM_ADDR dx, GM_ADDR dw, GM_ADDR workspace,
                             const RopeTiling &tiling) {
    size_ = {tiling.tile, tiling.heads, tiling.half, Padded<T>(tiling.half)};
    row_ = AlignUp(2 * size_.half, FLOATS);
    x_.SetGlobalBuffer((__gm__ T *)x), w_.SetGlobalBuffer((__gm__ T *)w), dy_.SetGlobalBuffer((__gm__ T *)dy);
    dx_.SetGlobalBuffer((__gm__ T *)dx), dw_.SetGlobalBuffer((__gm__ T *)dw);
    cos_.SetGlobalBuffer((__gm__ float *)cos), sin_.SetGlobalBuffer((__gm__ float *)sin);
    partial_.SetGlobalBuffer((__gm__ float *)GetUserWorkspace(workspace));
    Buffers(tiling);
    w_in_.LoadHalves(w_, 1, size_.half, size_.padded);
    weight_ = w_in_.Wait(2 * size_.padded);
    const Share parts = ShareOf(tiling.parts, GetBlockIdx(), GetBlockNum());
    for (uint32_t p = parts.begin; p < parts.end; p++) Part(p, ShareOf(tiling.tokens, p, tiling.parts), tiling);
    w_in_.Free();
    PipeBarrier<PIPE_ALL>();
    SyncAll();
    pipe_.Reset();
    dw_sum_.Init(pipe_);
    dw_sum_.Run(partial_, tiling.parts, 2 * size_.half, row_, dw_);
  }

 private:
  __aicore__ inline void Buffers(const RopeTiling &tiling) {
    const uint32_t elements = 2 * size_.Elements(), angles = tiling.tile * AlignUp(size_.half, FLOATS);
    w_in_.Init(pipe_, 2 * size_.padded, 1);
    x_in_.Init(pipe_, elements, 2), dy_in_.Init(pipe_, elements, 2), dx_out_.Init(pipe_, elements, 2);
    cos_in_.Init(pipe_, angles, 1), sin_in_.Init(pipe_, angles, 1);  // there are 8 events for all queues that come in
    pipe_.InitBuffer(turned_, elements * sizeof(float)), pipe_.InitBuffer(spare_, elements * sizeof(float));
    pipe_.InitBuffer(total_, 2 * size_.padded * sizeof(float));
    scales_.Init(pipe_, size_.Rows()), dots_.Init(pipe_, size_.Rows());
  }
  __aicore__ inline void Part(uint32_t p, Share tokens, const RopeTiling &tiling) {
    LocalTensor<float> total = total_.Get<float>();
    VectorBarrier();
    Duplicate(total, 0.0f, 2 * size_.padded);
    for (uint32_t t = tokens.begin; t < tokens.end; t += tiling.tile) Tile(t, Least(tiling.tile, tokens.end - t), tiling.eps);
    Sync<HardEvent::V_MTE3>();
    DataCopyExtParams copy{1, static_cast<uint32_t>(size_.half * sizeof(float)), 0, 0, 0};
    for (uint32_t h = 0; h < 2; h++) DataCopyPad(partial_[static_cast<uint64_t>(p) * row_ + h * size_.half], total[h * size_.padded], copy);
    Sync<HardEvent::MTE3_V>();
  }
  __aicore__ inline void Tile(uint32_t token, uint32_t tokens, float eps) {
    const HeadRows size = {tokens, size_.heads, size_.half, size_.padded};
    const uint64_t at = static_cast<uint64_t>(token) * size.heads * 2 * size.half, angle = static_cast<uint64_t>(token) * size.half;
    const uint32_t count = 2 * size.Elements(), rows = size.Rows();
    x_in_.LoadHalves(x_[at], rows, size.half, size.Elements()), dy_in_.LoadHalves(dy_[at], rows, size.half, size.Elements());
    cos_in_.Load(cos_[angle], tokens, size.half), sin_in_.Load(sin_[angle], tokens, size.half);
    LocalTensor<float> x = x_in_.Wait(count), dy = dy_in_.Wait(count), dx = dx_out_.Get(), g = turned_.Get<float>(),
                       spare = spare_.Get<float>();
    LocalTensor<float> cos = cos_in_.Wait(0), sin = sin_in_.Wait(0);
    VectorBarrier();
    Turn(g, dy, spare, cos, sin, size, -1);
    dy_in_.Free(), cos_in_.Free(), sin_in_.Free();
    VectorBarrier();
    Mul(spare, x, x, count);
    VectorBarrier();
    scales_.Of(spare, size);
    scales_.Scale(size, eps);
    LocalTensor<float> scale = scales_.Spread(size);
    for (uint32_t h = 0; h < 2; h++)
      MulRow(dx[h * size.Elements()], g[h * size.Elements()], weight_[h * size.padded], rows, size.half, size.padded);
    VectorBarrier();
    Mul(spare, dx, x, count);
    VectorBarrier();
    Back(size, spare);
    for (uint32_t h = 0; h < 2; h++)
      MulEach(spare[h * size.Elements()], x[h * size.Elements()], dots_.Spread(size), rows, size.half, size.padded);
    Mul(g, g, x, count);
    VectorBarrier();
    Sub(dx, dx, spare, count);
    VectorBarrier();
    for (uint32_t h = 0; h < 2; h++) {
      MulEach(dx[h * size.Elements()], dx[h * size.Elements()], scale, rows, size.half, size.padded);
      MulEach(g[h * size.Elements()], g[h * size.Elements()], scale, rows, size.half, size.padded);
    }
    x_in_.Free();
    dx_out_.StoreHalves(dx_[at], rows, size.half, size.Elements());
    VectorBarrier();
    AddUp(g, size);
  }
  // dots = r^2 sum(g w x) / H
  __aicore__ inline void Back(const HeadRows &size, const LocalTensor<float> &products) {
    LocalTensor<float> dots = dots_.Of(products, size), scale = scales_.Sums();
    const uint32_t rows = size.Rows();
    Muls(dots, dots, 1.0f / static_cast<float>(2 * size.half), rows);
    VectorBarrier();
    Mul(dots, dots, scale, rows);
    VectorBarrier();
    Mul(dots, dots, scale, rows);
    VectorBarrier();
  }
  // total += the sum of the rows of g, which are folded in halves
  __aicore__ inline void AddUp(const LocalTensor<float> &g, const HeadRows &size) {
    LocalTensor<float> total = total_.Get<float>();
    for (uint32_t h = 0; h < 2; h++) {
      const uint32_t at = h * size.Elements();
      for (uint32_t rows = size.Rows(); rows > 1;) {
        const uint32_t left = (rows + 1) / 2;
        Add(g[at], g[at], g[at + left * size.padded], (rows - left) * size.padded);
        VectorBarrier();
        rows = left;
      }
      Add(total[h * size.padded], total[h * size.padded], g[at], size.half);
    }
    VectorBarrier();
  }

  TPipe pipe_;
  GlobalTensor<T> x_, w_, dy_, dx_, dw_;
  GlobalTensor<float> cos_, sin_, partial_;
  In<T> x_in_, dy_in_, w_in_;
  In<float> cos_in_, sin_in_;
  Out<T> dx_out_;
  SumOfParts<T> dw_sum_;
  TBuf<TPosition::VECCALC> turned_, spare_, total_;
  HeadSums scales_, dots_;
  LocalTensor<float> weight_;
  HeadRows size_;
  uint32_t row_;
};

}  // namespace qwen
