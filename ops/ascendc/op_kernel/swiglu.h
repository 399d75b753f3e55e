// silu(gate) * up in one pass, and its gradient: s = 1 / (1 + exp(-gate)), y = gate s up.
#pragma once
#include "device.h"

namespace qwen {

// Computes s of n elements into a buffer that must not be that of the gate.
__aicore__ inline void Sigmoid(const LocalTensor<float> &s, const LocalTensor<float> &gate, const LocalTensor<float> &ones, uint32_t n) {
  Muls(s, gate, -1.0f, n);
  VectorBarrier();
  Exp(s, s, n);
  VectorBarrier();
  Adds(s, s, 1.0f, n);
  VectorBarrier();
  Div(s, ones, s, n);
}

template <typename T>
class Swiglu {
 public:
  __aicore__ inline void Run(GM_ADDR gate, GM_ADDR up, GM_ADDR y, const SwigluTiling &tiling) {
    gate_.SetGlobalBuffer((__gm__ T *)gate), up_.SetGlobalBuffer((__gm__ T *)up), y_.SetGlobalBuffer((__gm__ T *)y);
    gate_in_.Init(pipe_, tiling.tile, 2), up_in_.Init(pipe_, tiling.tile, 2), out_.Init(pipe_, tiling.tile, 2);
    pipe_.InitBuffer(ones_, tiling.tile * sizeof(float));
    Duplicate(ones_.Get<float>(), 1.0f, tiling.tile);
    const Share mine = ShareOf(tiling.tiles, GetBlockIdx(), GetBlockNum());
    for (uint32_t t = mine.begin; t < mine.end; t++) {
      const uint64_t at = static_cast<uint64_t>(t) * tiling.tile;
      const uint32_t n = static_cast<uint32_t>(tiling.size - at < tiling.tile ? tiling.size - at : tiling.tile);
      gate_in_.Load(gate_[at], 1, n), up_in_.Load(up_[at], 1, n);
      LocalTensor<float> g = gate_in_.Wait(n), u = up_in_.Wait(n), y = out_.Get();
      VectorBarrier();
      Sigmoid(y, g, ones_.Get<float>(), n);
      VectorBarrier();
      Mul(y, y, g, n);
      VectorBarrier();
      Mul(y, y, u, n);
      gate_in_.Free(), up_in_.Free();
      out_.Store(y_[at], 1, n, n);
    }
  }

 private:
  TPipe pipe_;
  GlobalTensor<T> gate_, up_, y_;
  In<T> gate_in_, up_in_;
  Out<T> out_;
  TBuf<TPosition::VECCALC> ones_;
};

// d gate = dy up s (1 + gate (1 - s)), d up = dy gate s
template <typename T>
class SwigluGrad {
 public:
  __aicore__ inline void Run(GM_ADDR gate, GM_ADDR up, GM_ADDR dy, GM_ADDR dgate, GM_ADDR dup, const SwigluTiling &tiling) {
    gate_.SetGlobalBuffer((__gm__ T *)gate), up_.SetGlobalBuffer((__gm__ T *)up), dy_.SetGlobalBuffer((__gm__ T *)dy);
    dgate_.SetGlobalBuffer((__gm__ T *)dgate), dup_.SetGlobalBuffer((__gm__ T *)dup);
    gate_in_.Init(pipe_, tiling.tile, 2), up_in_.Init(pipe_, tiling.tile, 2), dy_in_.Init(pipe_, tiling.tile, 2);
    dgate_out_.Init(pipe_, tiling.tile, 2), dup_out_.Init(pipe_, tiling.tile, 2);
    pipe_.InitBuffer(s_, tiling.tile * sizeof(float));
    const Share mine = ShareOf(tiling.tiles, GetBlockIdx(), GetBlockNum());
    for (uint32_t t = mine.begin; t < mine.end; t++) {
      const uint64_t at = static_cast<uint64_t>(t) * tiling.tile;
      const uint32_t n = static_cast<uint32_t>(tiling.size - at < tiling.tile ? tiling.size - at : tiling.tile);
      gate_in_.Load(gate_[at], 1, n), up_in_.Load(up_[at], 1, n), dy_in_.Load(dy_[at], 1, n);
      Tile(at, n);
    }
  }

 private:
  __aicore__ inline void Tile(uint64_t at, uint32_t n) {
    LocalTensor<float> g = gate_in_.Wait(n), u = up_in_.Wait(n), dy = dy_in_.Wait(n), dg = dgate_out_.Get(), du = dup_out_.Get(),
                       s = s_.Get<float>();
    VectorBarrier();
    Duplicate(du, 1.0f, n);
    VectorBarrier();
    Sigmoid(s, g, du, n);
    VectorBarrier();
    Sub(dg, du, s, n);  // 1 - s
    Mul(dy, dy, s, n);
    VectorBarrier();
    Mul(dg, dg, g, n);
    Mul(du, dy, g, n);
    Mul(dy, dy, u, n);
    VectorBarrier();
    Adds(dg, dg, 1.0f, n);
    VectorBarrier();
    Mul(dg, dg, dy, n);
    gate_in_.Free(), up_in_.Free(), dy_in_.Free();
    dgate_out_.Store(dgate_[at], 1, n, n), dup_out_.Store(dup_[at], 1, n, n);
  }

  TPipe pipe_;
  GlobalTensor<T> gate_, up_, dy_, dgate_, dup_;
  In<T> gate_in_, up_in_, dy_in_;
  Out<T> dgate_out_, dup_out_;
  TBuf<TPosition::VECCALC> s_;
};

}  // namespace qwen
