// For each row of logits: the maximum, the sum of exp(z - maximum) and the picked element, in one pass that rescales the running sum when
// the maximum rises. The gradient recomputes the exponentials.
#pragma once
#include "device.h"

namespace qwen {

__aicore__ inline float FloatOf(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } u = {bits};
  return u.value;
}

constexpr uint32_t MINUS_INFINITY = 0xff800000, LOWEST = 0xff7fffff;  // as bits of a float
constexpr uint32_t RESULTS = 64;                                      // rows whose results are written together

class CrossEntropy {
 public:
  __aicore__ inline void Run(GM_ADDR z, GM_ADDR at, GM_ADDR top, GM_ADDR total, GM_ADDR picked, const CrossEntropyTiling &tiling) {
    z_.SetGlobalBuffer((__gm__ float *)z), at_.SetGlobalBuffer((__gm__ int32_t *)at);
    top_.SetGlobalBuffer((__gm__ float *)top), total_.SetGlobalBuffer((__gm__ float *)total),
        picked_.SetGlobalBuffer((__gm__ float *)picked);
    z_in_.Init(pipe_, tiling.tile, 2);
    pipe_.InitBuffer(exp_, tiling.tile * sizeof(float));
    pipe_.InitBuffer(work_, AlignUp(2 * ((tiling.tile + 63) / 64), FLOATS) * sizeof(float));  // a value and an index for each repeat
    pipe_.InitBuffer(numbers_, 4 * 32);
    pipe_.InitBuffer(results_, 1, 3 * RESULTS * sizeof(float));
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    for (uint32_t r = mine.begin; r < mine.end; r += RESULTS) {
      const uint32_t rows = Least(RESULTS, mine.end - r);
      LocalTensor<float> results = results_.AllocTensor<float>();
      Sync<HardEvent::MTE3_S>();
      for (uint32_t i = 0; i < rows; i++) Row(r + i, i, results, tiling);
      Sync<HardEvent::S_V>();  // the queue waits for the vector unit, and so for what came before
      results_.EnQue(results);
      results = results_.DeQue<float>();
      DataCopyExtParams copy{1, static_cast<uint32_t>(rows * sizeof(float)), 0, 0, 0};
      DataCopyPad(top_[r], results, copy), DataCopyPad(total_[r], results[RESULTS], copy),
          DataCopyPad(picked_[r], results[2 * RESULTS], copy);
      results_.FreeTensor(results);
    }
  }

 private:
  __aicore__ inline void Row(uint32_t row, uint32_t i, const LocalTensor<float> &results, const CrossEntropyTiling &tiling) {
    LocalTensor<float> total = numbers_.Get<float>();
    const int32_t at = at_.GetValue(row);
    const uint64_t first = static_cast<uint64_t>(row) * tiling.columns;
    float top = FloatOf(MINUS_INFINITY), shift = FloatOf(LOWEST);
    results.SetValue(2 * RESULTS + i, 0.0f);
    VectorBarrier();
    Duplicate(total, 0.0f, FLOATS);
    z_in_.Load(z_[first], 1, Least(tiling.tile, tiling.columns));
    for (uint32_t c = 0; c < tiling.columns; c += tiling.tile) {
      const uint32_t n = Least(tiling.tile, tiling.columns - c), next = c + n;
      if (next < tiling.columns) z_in_.Load(z_[first + next], 1, Least(tiling.tile, tiling.columns - next));
      LocalTensor<float> z = z_in_.Wait(n);
      Largest(z, n, top, shift);
      if (at >= static_cast<int32_t>(c) && at < static_cast<int32_t>(next)) results.SetValue(2 * RESULTS + i, z.GetValue(at - c));
      Sync<HardEvent::S_V>();
      AddUp(z, n, shift);
      z_in_.Free();
    }
    Sync<HardEvent::V_S>();
    results.SetValue(i, top);
    results.SetValue(RESULTS + i, total.GetValue(0));
    Sync<HardEvent::S_V>();
  }
  // Raises top and shift to those of z, and scales the sum so far. A row of -inf is shifted by the lowest number, so that its sum is 0.
  __aicore__ inline void Largest(const LocalTensor<float> &z, uint32_t n, float &top, float &shift) {
    LocalTensor<float> numbers = numbers_.Get<float>(), total = numbers, most = numbers[FLOATS], scale = numbers[2 * FLOATS];
    VectorBarrier();
    ReduceMax(most, z, work_.Get<float>(), n);
    Sync<HardEvent::V_S>();
    const float above = most.GetValue(0);
    if (!(above > top)) return;
    top = above;
    Duplicate(scale, above > shift ? shift - above : 0.0f, FLOATS);
    shift = above > shift ? above : shift;
    VectorBarrier();
    Exp(scale, scale, FLOATS);
    VectorBarrier();
    Mul(total, total, scale, FLOATS);
  }
  __aicore__ inline void AddUp(const LocalTensor<float> &z, uint32_t n, float shift) {
    LocalTensor<float> numbers = numbers_.Get<float>(), e = exp_.Get<float>(), sum = numbers[3 * FLOATS];
    VectorBarrier();
    Adds(e, z, -shift, n);
    VectorBarrier();
    Exp(e, e, n);
    VectorBarrier();
    ReduceSum(sum, e, work_.Get<float>(), n);
    VectorBarrier();
    Add(numbers, numbers, sum, 1);
  }

  TPipe pipe_;
  GlobalTensor<float> z_, top_, total_, picked_;
  GlobalTensor<int32_t> at_;
  In<float> z_in_;
  TBuf<TPosition::VECCALC> exp_, work_, numbers_;
  TQue<TPosition::VECOUT, 1> results_;
};

// dz = d total exp(z - top), and d picked more at the picked one
class CrossEntropyGrad {
 public:
  __aicore__ inline void Run(GM_ADDR z, GM_ADDR at, GM_ADDR top, GM_ADDR dtotal, GM_ADDR dpicked, GM_ADDR dz,
                             const CrossEntropyTiling &tiling) {
    z_.SetGlobalBuffer((__gm__ float *)z), at_.SetGlobalBuffer((__gm__ int32_t *)at), dz_.SetGlobalBuffer((__gm__ float *)dz);
    top_.SetGlobalBuffer((__gm__ float *)top), dtotal_.SetGlobalBuffer((__gm__ float *)dtotal);
    dpicked_.SetGlobalBuffer((__gm__ float *)dpicked);
    z_in_.Init(pipe_, tiling.tile, 2), dz_out_.Init(pipe_, tiling.tile, 2);
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    for (uint32_t r = mine.begin; r < mine.end; r++) Row(r, tiling);
  }

 private:
  __aicore__ inline void Row(uint32_t row, const CrossEntropyTiling &tiling) {
    const float top = top_.GetValue(row), weight = dtotal_.GetValue(row), more = dpicked_.GetValue(row);
    const int32_t at = at_.GetValue(row);
    const bool nothing = top == FloatOf(MINUS_INFINITY);  // the row is nothing but -inf
    const uint64_t first = static_cast<uint64_t>(row) * tiling.columns;
    for (uint32_t c = 0; c < tiling.columns; c += tiling.tile) {
      const uint32_t n = Least(tiling.tile, tiling.columns - c);
      z_in_.Load(z_[first + c], 1, n);
      LocalTensor<float> z = z_in_.Wait(n), dz = dz_out_.Get();
      if (nothing) {
        Duplicate(dz, 0.0f, n);
      } else {
        Adds(dz, z, -top, n);
        VectorBarrier();
        Exp(dz, dz, n);
        VectorBarrier();
        Muls(dz, dz, weight, n);
      }
      z_in_.Free();
      if (at >= static_cast<int32_t>(c) && at < static_cast<int32_t>(c + n)) {
        Sync<HardEvent::V_S>();
        dz.SetValue(at - c, dz.GetValue(at - c) + more);
        Sync<HardEvent::S_V>();
      }
      dz_out_.Store(dz_[first + c], 1, n, n);
    }
  }

  TPipe pipe_;
  GlobalTensor<float> z_, top_, dtotal_, dpicked_, dz_;
  GlobalTensor<int32_t> at_;
  In<float> z_in_;
  Out<float> dz_out_;
};

}  // namespace qwen
