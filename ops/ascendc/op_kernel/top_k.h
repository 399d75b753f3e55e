// Softmax over experts, the k most probable experts of each row (the lower number among equals) and their probabilities; and the gradient.
//
// A tile of rows is stored in UB as [R][P]; P is the number of experts, padded to a multiple of a block. An instruction acts on 64 columns
// of all rows. A choice is the maximum of each row and its index. The scalar unit stores and excludes it, for all rows between two waits.
#pragma once
#include "device.h"

namespace qwen {

constexpr uint32_t LANES = 64;              // floats of a repeat
constexpr uint32_t OUT_OF_IT = 0xff7fffff;  // the lowest float, as bits

class RowNumbers {
 public:
  __aicore__ inline void Init(TPipe &pipe, uint32_t rows, uint32_t n, uint32_t padded) {
    n_ = n, padded_ = padded;
    pipe.InitBuffer(numbers_, rows * sizeof(float)), pipe.InitBuffer(part_, rows * sizeof(float)), pipe.InitBuffer(spread_, rows * 32);
  }
  // A block of each row's largest element.
  __aicore__ inline LocalTensor<float> Largest(const LocalTensor<float> &x, uint32_t rows) {
    LocalTensor<float> numbers = numbers_.Get<float>(), part = part_.Get<float>();
    for (uint32_t c = 0; c < n_; c += LANES) {
      VectorBarrier();
      WholeReduceMax(c ? part : numbers, x[c], Least(LANES, n_ - c), rows, 1, 1, padded_ / FLOATS, ReduceOrder::ORDER_ONLY_VALUE);
      VectorBarrier();
      if (c) Max(numbers, numbers, part, rows);
    }
    return Spread(rows);
  }
  // A block of each row's sum.
  __aicore__ inline LocalTensor<float> Sum(const LocalTensor<float> &x, uint32_t rows, uint32_t n, uint32_t padded) {
    LocalTensor<float> numbers = numbers_.Get<float>(), part = part_.Get<float>();
    for (uint32_t c = 0; c < n; c += LANES) {
      VectorBarrier();
      WholeReduceSum(c ? part : numbers, x[c], Least(LANES, n - c), rows, 1, 1, padded / FLOATS);
      VectorBarrier();
      if (c) Add(numbers, numbers, part, rows);
    }
    return Spread(rows);
  }
  __aicore__ inline LocalTensor<float> Sum(const LocalTensor<float> &x, uint32_t rows) { return Sum(x, rows, n_, padded_); }

 private:
  __aicore__ inline LocalTensor<float> Spread(uint32_t rows) {
    LocalTensor<float> spread = spread_.Get<float>();
    VectorBarrier();
    Brcb(spread, numbers_.Get<float>(), static_cast<uint8_t>(AlignUp(rows, FLOATS) / FLOATS), {1, 8});
    VectorBarrier();
    return spread;
  }
  TBuf<TPosition::VECCALC> numbers_, part_, spread_;
  uint32_t n_, padded_;
};

class TopK {
 public:
  __aicore__ inline void Run(GM_ADDR logits, GM_ADDR bias, GM_ADDR probs, GM_ADDR expert, GM_ADDR weight, const TopKTiling &tiling) {
    n_ = tiling.experts, k_ = tiling.k, padded_ = AlignUp(n_, FLOATS), choices_ = AlignUp(k_, FLOATS), tile_ = tiling.tile;
    logits_.SetGlobalBuffer((__gm__ float *)logits), bias_.SetGlobalBuffer((__gm__ float *)bias),
        probs_.SetGlobalBuffer((__gm__ float *)probs);
    expert_.SetGlobalBuffer((__gm__ int32_t *)expert), weight_.SetGlobalBuffer((__gm__ float *)weight);
    logits_in_.Init(pipe_, tile_ * padded_, 2), probs_out_.Init(pipe_, tile_ * padded_, 2), bias_in_.Init(pipe_, padded_, 1);
    weight_out_.Init(pipe_, tile_ * choices_, 2);
    pipe_.InitBuffer(expert_out_, 2, tile_ * choices_ * sizeof(int32_t));
    pipe_.InitBuffer(score_, tile_ * padded_ * sizeof(float));
    pipe_.InitBuffer(best_, (n_ + LANES - 1) / LANES * tile_ * 2 * sizeof(float));
    numbers_.Init(pipe_, tile_, n_, padded_);
    bias_in_.Load(bias_, 1, n_);
    LocalTensor<float> bias_row = bias_in_.Wait(padded_);
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    for (uint32_t r = mine.begin; r < mine.end; r += tile_) Tile(r, Least(tile_, mine.end - r), bias_row, tiling.shares);
    bias_in_.Free();
  }

 private:
  __aicore__ inline void Tile(uint32_t row, uint32_t rows, const LocalTensor<float> &bias, bool shares) {
    logits_in_.Load(logits_[static_cast<uint64_t>(row) * n_], rows, n_);
    LocalTensor<float> x = logits_in_.Wait(rows * padded_), probs = probs_out_.Get(), score = score_.Get<float>();
    Softmax(probs, x, rows);
    logits_in_.Free();
    const uint8_t stride = padded_ / FLOATS;
    for (uint32_t c = 0; c < n_; c += LANES)
      Add(score[c], probs[c], bias[c], static_cast<uint64_t>(Least(LANES, n_ - c)), static_cast<uint8_t>(rows),
          {1, 1, 1, stride, stride, 0});
    LocalTensor<int32_t> expert = expert_out_.AllocTensor<int32_t>();
    LocalTensor<float> weight = weight_out_.Get();
    Sync<HardEvent::MTE3_S>();
    for (uint32_t j = 0; j < k_; j++) Choose(j, rows, score, probs, expert, weight);
    if (shares) {
      LocalTensor<float> sum = numbers_.Sum(weight, rows, k_, choices_);
      Div(weight, weight, sum, static_cast<uint64_t>(k_), static_cast<uint8_t>(rows),
          {1, 1, 0, static_cast<uint8_t>(choices_ / FLOATS), static_cast<uint8_t>(choices_ / FLOATS), 1});
    }
    probs_out_.Store(probs_[static_cast<uint64_t>(row) * n_], rows, n_, rows * padded_);
    weight_out_.Store(weight_[static_cast<uint64_t>(row) * k_], rows, k_, rows * choices_);
    expert_out_.EnQue(expert);
    expert = expert_out_.DeQue<int32_t>();
    DataCopyExtParams copy{static_cast<uint16_t>(rows), static_cast<uint32_t>(k_ * sizeof(int32_t)), 0, 0, 0};
    DataCopyPad(expert_[static_cast<uint64_t>(row) * k_], expert, copy);
    expert_out_.FreeTensor(expert);
  }
  __aicore__ inline void Softmax(const LocalTensor<float> &probs, const LocalTensor<float> &x, uint32_t rows) {
    const uint8_t stride = padded_ / FLOATS, repeats = rows;
    LocalTensor<float> top = numbers_.Largest(x, rows);
    for (uint32_t c = 0; c < n_; c += LANES)
      Sub(probs[c], x[c], top, static_cast<uint64_t>(Least(LANES, n_ - c)), repeats, {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    Exp(probs, probs, rows * padded_);
    LocalTensor<float> sum = numbers_.Sum(probs, rows);
    for (uint32_t c = 0; c < n_; c += LANES)
      Div(probs[c], probs[c], sum, static_cast<uint64_t>(Least(LANES, n_ - c)), repeats, {1, 1, 0, stride, stride, 1});
    VectorBarrier();
  }
  // The j-th choice of each row.
  __aicore__ inline void Choose(uint32_t j, uint32_t rows, const LocalTensor<float> &score, const LocalTensor<float> &probs,
                                const LocalTensor<int32_t> &expert, const LocalTensor<float> &weight) {
    LocalTensor<float> best = best_.Get<float>();
    LocalTensor<uint32_t> place = best.ReinterpretCast<uint32_t>();
    VectorBarrier();
    for (uint32_t c = 0; c < n_; c += LANES)
      WholeReduceMax(best[c / LANES * 2 * tile_], score[c], Least(LANES, n_ - c), rows, 1, 1, padded_ / FLOATS);
    Sync<HardEvent::V_S>();
    union {
      uint32_t bits;
      float value;
    } lowest = {OUT_OF_IT};
    for (uint32_t r = 0; r < rows; r++) {
      float most = best.GetValue(2 * r);
      uint32_t at = place.GetValue(2 * r + 1);
      for (uint32_t c = LANES; c < n_; c += LANES) {
        const uint32_t pair = c / LANES * 2 * tile_ + 2 * r;
        if (!(best.GetValue(pair) > most)) continue;
        most = best.GetValue(pair), at = c + place.GetValue(pair + 1);
      }
      if (!(most > lowest.value)) at = j;  // all of a row is NaN where one of it is: the first k
      expert.SetValue(r * choices_ + j, static_cast<int32_t>(at));
      weight.SetValue(r * choices_ + j, probs.GetValue(r * padded_ + at));
      score.SetValue(r * padded_ + at, lowest.value);
    }
    Sync<HardEvent::S_V>();
  }

  TPipe pipe_;
  GlobalTensor<float> logits_, bias_, probs_, weight_;
  GlobalTensor<int32_t> expert_;
  In<float> logits_in_, bias_in_;
  Out<float> probs_out_, weight_out_;
  TQue<TPosition::VECOUT, 1> expert_out_;
  TBuf<TPosition::VECCALC> score_, best_;
  RowNumbers numbers_;
  uint32_t n_, k_, padded_, choices_, tile_;
};

// g = dprobs, and at each choice its weight's gradient more; dlogits = (g - sum(g probs)) probs. Of a share w = p / s, s = sum(p), that
// gradient is (dw - sum(dw w)) / s.
class TopKGrad {
 public:
  __aicore__ inline void Run(GM_ADDR probs, GM_ADDR expert, GM_ADDR weight, GM_ADDR dprobs, GM_ADDR dweight, GM_ADDR dlogits,
                             const TopKTiling &tiling) {
    n_ = tiling.experts, k_ = tiling.k, padded_ = AlignUp(n_, FLOATS);
    probs_.SetGlobalBuffer((__gm__ float *)probs), expert_.SetGlobalBuffer((__gm__ int32_t *)expert);
    weight_.SetGlobalBuffer((__gm__ float *)weight), dprobs_.SetGlobalBuffer((__gm__ float *)dprobs);
    dweight_.SetGlobalBuffer((__gm__ float *)dweight), dlogits_.SetGlobalBuffer((__gm__ float *)dlogits);
    const uint32_t elements = tiling.tile * padded_;
    choices_ = AlignUp(k_, FLOATS);
    weight_in_.Init(pipe_, tiling.tile * choices_, 1), dweight_in_.Init(pipe_, tiling.tile * choices_, 1);
    pipe_.InitBuffer(expert_in_, 1, tiling.tile * choices_ * sizeof(int32_t));
    probs_in_.Init(pipe_, elements, 2), dprobs_in_.Init(pipe_, elements, 1), dlogits_out_.Init(pipe_, elements, 2);
    numbers_.Init(pipe_, tiling.tile, n_, padded_);
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    for (uint32_t r = mine.begin; r < mine.end; r += tiling.tile) Tile(r, Least(tiling.tile, mine.end - r), tiling.shares);
  }

 private:
  __aicore__ inline void Tile(uint32_t row, uint32_t rows, bool shares) {
    const uint64_t at = static_cast<uint64_t>(row) * n_;
    const uint32_t count = rows * padded_;
    probs_in_.Load(probs_[at], rows, n_), dprobs_in_.Load(dprobs_[at], rows, n_);
    const uint64_t first = static_cast<uint64_t>(row) * k_;
    weight_in_.Load(weight_[first], rows, k_), dweight_in_.Load(dweight_[first], rows, k_);
    LocalTensor<int32_t> expert = expert_in_.AllocTensor<int32_t>();
    DataCopyPad(expert, expert_[first],
                DataCopyExtParams{static_cast<uint16_t>(rows), static_cast<uint32_t>(k_ * sizeof(int32_t)), 0, 0, 0},
                DataCopyPadExtParams<int32_t>{false, 0, 0, 0});
    expert_in_.EnQue(expert);
    expert = expert_in_.DeQue<int32_t>();
    LocalTensor<float> weight = weight_in_.Wait(rows * choices_), dweight = dweight_in_.Wait(rows * choices_);
    LocalTensor<float> p = probs_in_.Wait(count), g = dprobs_in_.Wait(count), out = dlogits_out_.Get();
    Add(out, p, g, count);  // the scalar unit waits for the vector unit, which has waited for the copies
    Sync<HardEvent::V_S>();
    for (uint32_t r = 0; r < rows; r++)
      Scatter(r * padded_, p, g, expert[r * choices_], weight[r * choices_], dweight[r * choices_], shares);
    Sync<HardEvent::S_V>();
    expert_in_.FreeTensor(expert), weight_in_.Free(), dweight_in_.Free();
    Mul(out, g, p, count);
    LocalTensor<float> dot = numbers_.Sum(out, rows);
    const uint8_t stride = padded_ / FLOATS;
    for (uint32_t c = 0; c < n_; c += LANES)
      Sub(g[c], g[c], dot, static_cast<uint64_t>(Least(LANES, n_ - c)), static_cast<uint8_t>(rows), {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    Mul(out, g, p, count);
    probs_in_.Free(), dprobs_in_.Free();
    dlogits_out_.Store(dlogits_[at], rows, n_, count);
  }
  __aicore__ inline void Scatter(uint32_t at, const LocalTensor<float> &p, const LocalTensor<float> &g, const LocalTensor<int32_t> &expert,
                                 const LocalTensor<float> &weight, const LocalTensor<float> &dweight, bool shares) {
    float sum = 1.0f, mean = 0.0f;
    if (shares) {
      sum = 0.0f;
      for (uint32_t j = 0; j < k_; j++) {
        sum += p.GetValue(at + expert.GetValue(j));
        mean += dweight.GetValue(j) * weight.GetValue(j);
      }
    }
    for (uint32_t j = 0; j < k_; j++) {
      const uint32_t e = at + expert.GetValue(j);
      g.SetValue(e, g.GetValue(e) + (dweight.GetValue(j) - mean) / sum);
    }
  }

  TPipe pipe_;
  GlobalTensor<float> probs_, weight_, dprobs_, dweight_, dlogits_;
  GlobalTensor<int32_t> expert_;
  In<float> probs_in_, dprobs_in_, weight_in_, dweight_in_;
  TQue<TPosition::VECIN, 1> expert_in_;
  Out<float> dlogits_out_;
  RowNumbers numbers_;
  uint32_t n_, k_, padded_, choices_;
};

}  // namespace qwen
