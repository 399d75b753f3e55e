// Softmax over experts, the k most probable experts of each row (the lower number among equals) and their probabilities; and the gradient.
//
// A tile of rows is stored in UB as [R][P]; P is the number of experts, padded to whole lists of 32. An instruction acts on 64 columns of
// all rows. Scores are sorted with their columns, 32 at a time, and the lists of a row merged by fours; of a list only the first k count.
#pragma once
#include "device.h"

namespace qwen {

constexpr uint32_t LANES = 64;                 // floats of a repeat
constexpr uint32_t LIST = 32, MERGED = 4;      // pairs of a list that is sorted at once; lists that are merged at once
constexpr int32_t HALF_BITS = 0x3f000000;      // of the float 0.5
constexpr uint32_t MINUS_INFINITY = 0xff800000;  // as bits
constexpr uint8_t ODD_ONES = 2;                // a pattern of GatherMask

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
  // The bits of the last ones.
  __aicore__ inline LocalTensor<int32_t> Bits() { return numbers_.Get<int32_t>(); }

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

// Writes where each row of a tile begins, in bytes, eight times a row. numbers: space for one element a row.
__aicore__ inline void RowBegins(const LocalTensor<int32_t> &begins, const LocalTensor<int32_t> &numbers, uint32_t rows, uint32_t padded) {
  CreateVecIndex(numbers, static_cast<int32_t>(0), rows);
  VectorBarrier();
  Muls(numbers, numbers, static_cast<int32_t>(padded * sizeof(float)), rows);
  VectorBarrier();
  Brcb(begins, numbers, static_cast<uint8_t>(rows / FLOATS), {1, 8});
}

class TopK {
 public:
  __aicore__ inline void Run(GM_ADDR logits, GM_ADDR bias, GM_ADDR probs, GM_ADDR expert, GM_ADDR weight, const TopKTiling &tiling) {
    n_ = tiling.experts, k_ = tiling.k, padded_ = AlignUp(n_, LIST), choices_ = AlignUp(k_, FLOATS), tile_ = tiling.tile;
    logits_.SetGlobalBuffer((__gm__ float *)logits), bias_.SetGlobalBuffer((__gm__ float *)bias),
        probs_.SetGlobalBuffer((__gm__ float *)probs);
    expert_.SetGlobalBuffer((__gm__ int32_t *)expert), weight_.SetGlobalBuffer((__gm__ float *)weight);
    Buffers();
    bias_in_.Load(bias_, 1, n_);
    LocalTensor<float> bias_row = bias_in_.Wait(padded_);
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    if (mine.begin < mine.end) Load(mine.begin, Least(tile_, mine.end - mine.begin));
    for (uint32_t r = mine.begin; r < mine.end; r += tile_) {
      const uint32_t next = r + tile_;
      if (next < mine.end) Load(next, Least(tile_, mine.end - next));
      Tile(r, Least(tile_, mine.end - r), bias_row, tiling.shares);
    }
    bias_in_.Free();
  }

 private:
  __aicore__ inline void Buffers() {
    const uint32_t lists = padded_ / LIST, groups = (lists + MERGED - 1) / MERGED, kept = Least(LIST, choices_);
    merged_row_ = lists > 1 ? groups * ((lists + groups - 1) / groups) * kept * 2 : FLOATS;
    // Sorting wants addresses of whole lists, so these come first.
    pipe_.InitBuffer(sorted_, tile_ * padded_ * 2 * sizeof(float)), pipe_.InitBuffer(score_, tile_ * padded_ * sizeof(float));
    pipe_.InitBuffer(columns_, padded_ * sizeof(int32_t)), pipe_.InitBuffer(merged_, tile_ * merged_row_ * sizeof(float));
    logits_in_.Init(pipe_, tile_ * padded_, 2), probs_out_.Init(pipe_, tile_ * padded_, 2), bias_in_.Init(pipe_, padded_, 1);
    weight_out_.Init(pipe_, tile_ * choices_, 2);
    pipe_.InitBuffer(expert_out_, 2, tile_ * choices_ * sizeof(int32_t)), pipe_.InitBuffer(at_, tile_ * choices_ * sizeof(int32_t));
    pipe_.InitBuffer(begins_, tile_ * 32), pipe_.InitBuffer(failed_, tile_ * 32), pipe_.InitBuffer(bits_, tile_ * sizeof(int32_t));
    numbers_.Init(pipe_, tile_, n_, padded_);
    union {
      uint32_t bits;
      float value;
    } last = {MINUS_INFINITY};
    if (padded_ > n_) Duplicate(score_.Get<float>(), last.value, tile_ * padded_);
    CreateVecIndex(columns_.Get<int32_t>(), static_cast<int32_t>(0), padded_);
    RowBegins(begins_.Get<int32_t>(), bits_.Get<int32_t>(), tile_, padded_);
    VectorBarrier();
  }
  __aicore__ inline void Load(uint32_t row, uint32_t rows) {
    logits_in_.Load(logits_[static_cast<uint64_t>(row) * n_], rows, n_, 0, padded_);
  }
  __aicore__ inline void Tile(uint32_t row, uint32_t rows, const LocalTensor<float> &bias, bool shares) {
    LocalTensor<float> x = logits_in_.Wait(rows * padded_), probs = probs_out_.Get(), score = score_.Get<float>();
    Softmax(probs, x, rows);
    logits_in_.Free();
    const uint8_t stride = padded_ / FLOATS, repeats = rows;
    for (uint32_t c = 0; c < n_; c += LANES)
      Add(score[c], probs[c], bias[c], static_cast<uint64_t>(Least(LANES, n_ - c)), repeats, {1, 1, 1, stride, stride, 0});
    LocalTensor<int32_t> expert = expert_out_.AllocTensor<int32_t>();
    LocalTensor<float> weight = weight_out_.Get();
    Choose(expert, score, rows);
    WeightsOf(weight, expert, probs, rows);
    if (shares) {
      LocalTensor<float> sum = numbers_.Sum(weight, rows, k_, choices_);
      Div(weight, weight, sum, static_cast<uint64_t>(k_), repeats,
          {1, 1, 0, static_cast<uint8_t>(choices_ / FLOATS), static_cast<uint8_t>(choices_ / FLOATS), 1});
    }
    probs_out_.Store(probs_[static_cast<uint64_t>(row) * n_], rows, n_, rows * padded_, 0, padded_);
    weight_out_.Store(weight_[static_cast<uint64_t>(row) * k_], rows, k_, rows * choices_);
    expert_out_.EnQue(expert);
    expert = expert_out_.DeQue<int32_t>();
    DataCopyExtParams copy{static_cast<uint16_t>(rows), static_cast<uint32_t>(k_ * sizeof(int32_t)), 0, 0, 0};
    DataCopyPad(expert_[static_cast<uint64_t>(row) * k_], expert, copy);
    expert_out_.FreeTensor(expert);
  }
  // Also finds the rows without a probability, whose sum is NaN: 1 in `failed_`.
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
    // A sum is 1 to 2^11, whose bits above those of 0.5 are less than 2^30; the bits of NaN are not.
    LocalTensor<int32_t> bits = bits_.Get<int32_t>();
    Adds(bits, numbers_.Bits(), -HALF_BITS, rows);
    VectorBarrier();
    ShiftRight(bits.ReinterpretCast<uint32_t>(), bits.ReinterpretCast<uint32_t>(), static_cast<uint32_t>(30), static_cast<int32_t>(rows));
    VectorBarrier();
    Mins(bits, bits, static_cast<int32_t>(1), rows);
    VectorBarrier();
    Brcb(failed_.Get<int32_t>(), bits, static_cast<uint8_t>(AlignUp(rows, FLOATS) / FLOATS), {1, 8});
    VectorBarrier();
  }
  // The columns of the k largest of each row, [R, choices_]: the first ones of equals, and of a row without a probability.
  __aicore__ inline void Choose(const LocalTensor<int32_t> &expert, const LocalTensor<float> &score, uint32_t rows) {
    LocalTensor<float> sorted = sorted_.Get<float>();
    LocalTensor<int32_t> columns = columns_.Get<int32_t>();
    VectorBarrier();
    for (uint32_t r = 0; r < rows; r++)
      Sort32(sorted[r * 2 * padded_], score[r * padded_], columns.ReinterpretCast<uint32_t>(), static_cast<int32_t>(padded_ / LIST));
    uint32_t pitch = 2 * padded_;
    LocalTensor<uint32_t> pairs = Merge(sorted, rows, pitch).ReinterpretCast<uint32_t>();
    VectorBarrier();
    uint64_t count = 0;
    GatherMask(expert.ReinterpretCast<uint32_t>(), pairs, ODD_ONES, true, 2 * choices_,
               {1, static_cast<uint16_t>(rows), static_cast<uint16_t>(pitch / FLOATS), 0}, count);
    VectorBarrier();
    LocalTensor<int32_t> change = at_.Get<int32_t>();
    const uint8_t stride = choices_ / FLOATS, repeats = rows;
    const uint64_t all = choices_;
    Sub(change, columns, expert, all, repeats, {1, 1, 1, stride, 0, stride});
    VectorBarrier();
    Mul(change, change, failed_.Get<int32_t>(), all, repeats, {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    Add(expert, expert, change, static_cast<int32_t>(rows * choices_));
  }
  // Merges the lists of each row, `pitch` floats apart, until one is left; returns where that is, and its pitch.
  __aicore__ inline LocalTensor<float> Merge(const LocalTensor<float> &sorted, uint32_t rows, uint32_t &pitch) {
    LocalTensor<float> from = sorted, to = merged_.Get<float>();
    uint32_t lists = padded_ / LIST, apart = 2 * LIST, held = Least(LIST, choices_);  // of a list: floats, and pairs that count
    while (lists > 1) {
      const uint32_t groups = (lists + MERGED - 1) / MERGED, most = (lists + groups - 1) / groups, next = groups * most * held * 2;
      VectorBarrier();
      for (uint32_t r = 0; r < rows; r++)
        for (uint32_t g = 0; g < groups; g++) {
          const Share part = ShareOf(lists, g, groups);
          MergeOne(to[r * next + g * most * held * 2], from[r * pitch + part.begin * apart], part.end - part.begin, apart, held);
        }
      pitch = next, apart = most * held * 2, lists = groups, held = choices_;
      const LocalTensor<float> other = from;
      from = to, to = other;
    }
    return from;
  }
  __aicore__ inline void MergeOne(const LocalTensor<float> &to, const LocalTensor<float> &from, uint32_t lists, uint32_t apart,
                                  uint32_t held) {
    MrgSort4Info how;
    for (uint32_t i = 0; i < MERGED; i++) how.elementLengths[i] = i < lists ? held : 0;
    how.ifExhaustedSuspension = false, how.validBit = (1 << lists) - 1, how.repeatTimes = 1;
    MrgSortSrcList<float> all(from, from[apart], from[lists > 2 ? 2 * apart : 0], from[lists > 3 ? 3 * apart : 0]);
    MrgSort(to, all, how);
  }
  // The probabilities of the choices, whose places are those of their rows and columns.
  __aicore__ inline void WeightsOf(const LocalTensor<float> &weight, const LocalTensor<int32_t> &expert, const LocalTensor<float> &probs,
                                   uint32_t rows) {
    LocalTensor<int32_t> at = at_.Get<int32_t>();
    const uint8_t stride = choices_ / FLOATS;
    VectorBarrier();
    Muls(at, expert, static_cast<int32_t>(sizeof(float)), static_cast<int32_t>(rows * choices_));
    VectorBarrier();
    Add(at, at, begins_.Get<int32_t>(), static_cast<uint64_t>(choices_), static_cast<uint8_t>(rows), {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    Gather(weight, probs, at.ReinterpretCast<uint32_t>(), 0, rows * choices_);
    VectorBarrier();
  }

  TPipe pipe_;
  GlobalTensor<float> logits_, bias_, probs_, weight_;
  GlobalTensor<int32_t> expert_;
  In<float> logits_in_, bias_in_;
  Out<float> probs_out_, weight_out_;
  TQue<TPosition::VECOUT, 1> expert_out_;
  TBuf<TPosition::VECCALC> sorted_, merged_, score_, columns_, at_, begins_, failed_, bits_;
  RowNumbers numbers_;
  uint32_t n_, k_, padded_, choices_, tile_, merged_row_;
};

// g = dprobs, and at each choice its weight's gradient more; dlogits = (g - sum(g probs)) probs. Of a share w = p / s, s = sum(p), that
// gradient is (dw - sum(dw w)) / s. The vector unit computes what g is at the choices, and the scalar unit puts it there.
class TopKGrad {
 public:
  __aicore__ inline void Run(GM_ADDR probs, GM_ADDR expert, GM_ADDR weight, GM_ADDR dprobs, GM_ADDR dweight, GM_ADDR dlogits,
                             const TopKTiling &tiling) {
    n_ = tiling.experts, k_ = tiling.k, padded_ = AlignUp(n_, FLOATS), choices_ = AlignUp(k_, FLOATS);
    probs_.SetGlobalBuffer((__gm__ float *)probs), expert_.SetGlobalBuffer((__gm__ int32_t *)expert);
    weight_.SetGlobalBuffer((__gm__ float *)weight), dprobs_.SetGlobalBuffer((__gm__ float *)dprobs);
    dweight_.SetGlobalBuffer((__gm__ float *)dweight), dlogits_.SetGlobalBuffer((__gm__ float *)dlogits);
    Buffers(tiling.tile);
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    if (mine.begin < mine.end) Load(mine.begin, Least(tiling.tile, mine.end - mine.begin));
    for (uint32_t r = mine.begin; r < mine.end; r += tiling.tile) {
      const uint32_t next = r + tiling.tile;
      if (next < mine.end) Load(next, Least(tiling.tile, mine.end - next));
      Tile(r, Least(tiling.tile, mine.end - r), tiling.shares);
    }
  }

 private:
  __aicore__ inline void Buffers(uint32_t tile) {
    const uint32_t elements = tile * padded_, chosen = tile * choices_;
    chosen_ = chosen;
    pipe_.InitBuffer(weights_in_, 2, 2 * chosen * sizeof(float));  // weights and their gradients
    pipe_.InitBuffer(expert_in_, 2, chosen * sizeof(int32_t)), pipe_.InitBuffer(at_, chosen * sizeof(int32_t));
    pipe_.InitBuffer(value_, chosen * sizeof(float)), pipe_.InitBuffer(spare_, chosen * sizeof(float));
    probs_in_.Init(pipe_, elements, 2), dprobs_in_.Init(pipe_, elements, 2), dlogits_out_.Init(pipe_, elements, 2);
    pipe_.InitBuffer(row_, tile * sizeof(int32_t)), pipe_.InitBuffer(begins_, tile * 32);
    numbers_.Init(pipe_, tile, n_, padded_);
    RowBegins(begins_.Get<int32_t>(), row_.Get<int32_t>(), tile, padded_);
  }
  __aicore__ inline void Load(uint32_t row, uint32_t rows) {
    const uint64_t at = static_cast<uint64_t>(row) * n_, first = static_cast<uint64_t>(row) * k_;
    probs_in_.Load(probs_[at], rows, n_), dprobs_in_.Load(dprobs_[at], rows, n_);
    const DataCopyExtParams copy{static_cast<uint16_t>(rows), static_cast<uint32_t>(k_ * sizeof(float)), 0, 0, 0};
    const DataCopyPadExtParams<float> nothing{false, 0, 0, 0.0f};
    LocalTensor<float> weights = weights_in_.AllocTensor<float>();
    DataCopyPad(weights, weight_[first], copy, nothing);
    DataCopyPad(weights[chosen_], dweight_[first], copy, nothing);
    weights_in_.EnQue(weights);
    LocalTensor<int32_t> expert = expert_in_.AllocTensor<int32_t>();
    // what pads a row is column 0, so that it can be looked up
    DataCopyPad(expert, expert_[first], copy, DataCopyPadExtParams<int32_t>{true, 0, static_cast<uint8_t>(choices_ - k_), 0});
    expert_in_.EnQue(expert);
  }
  __aicore__ inline void Tile(uint32_t row, uint32_t rows, bool shares) {
    const uint32_t count = rows * padded_, chosen = rows * choices_;
    LocalTensor<float> p = probs_in_.Wait(count), g = dprobs_in_.Wait(count), out = dlogits_out_.Get(), value = value_.Get<float>();
    LocalTensor<int32_t> at = at_.Get<int32_t>();
    Places(at, rows);
    Values(value, p, at, rows, shares);
    LocalTensor<float> before = spare_.Get<float>();
    Gather(before, g, at.ReinterpretCast<uint32_t>(), 0, chosen);
    VectorBarrier();
    Add(value, value, before, static_cast<int32_t>(chosen));
    Sync<HardEvent::V_S>();
    for (uint32_t r = 0; r < rows; r++)
      for (uint32_t i = r * choices_; i < r * choices_ + k_; i++) g.SetValue(at.GetValue(i) / sizeof(float), value.GetValue(i));
    Sync<HardEvent::S_V>();
    Mul(out, g, p, count);
    LocalTensor<float> dot = numbers_.Sum(out, rows);
    const uint8_t stride = padded_ / FLOATS;
    for (uint32_t c = 0; c < n_; c += LANES)
      Sub(g[c], g[c], dot, static_cast<uint64_t>(Least(LANES, n_ - c)), static_cast<uint8_t>(rows), {1, 1, 0, stride, stride, 1});
    VectorBarrier();
    Mul(out, g, p, count);
    probs_in_.Free(), dprobs_in_.Free();
    dlogits_out_.Store(dlogits_[static_cast<uint64_t>(row) * n_], rows, n_, count);
  }
  // The bytes at which the choices are.
  __aicore__ inline void Places(const LocalTensor<int32_t> &at, uint32_t rows) {
    LocalTensor<int32_t> expert = expert_in_.DeQue<int32_t>();
    const uint8_t stride = choices_ / FLOATS;
    VectorBarrier();
    Muls(at, expert, static_cast<int32_t>(sizeof(float)), static_cast<int32_t>(rows * choices_));
    expert_in_.FreeTensor(expert);
    VectorBarrier();
    Add(at, at, begins_.Get<int32_t>(), static_cast<uint64_t>(choices_), static_cast<uint8_t>(rows), {1, 1, 0, stride, stride, 1});
    VectorBarrier();
  }
  // What the gradients of the weights add at the choices.
  __aicore__ inline void Values(const LocalTensor<float> &value, const LocalTensor<float> &p, const LocalTensor<int32_t> &at, uint32_t rows,
                                bool shares) {
    const uint32_t chosen = rows * choices_;
    const uint8_t stride = choices_ / FLOATS, repeats = rows;
    const uint64_t all = choices_;
    LocalTensor<float> weight = weights_in_.DeQue<float>(), dweight = weight[chosen_], spare = spare_.Get<float>();
    if (!shares) {
      Muls(value, dweight, 1.0f, static_cast<int32_t>(chosen));
    } else {
      Mul(spare, dweight, weight, static_cast<int32_t>(chosen));
      LocalTensor<float> mean = numbers_.Sum(spare, rows, k_, choices_);
      Sub(value, dweight, mean, all, repeats, {1, 1, 0, stride, stride, 1});
      VectorBarrier();
      Gather(spare, p, at.ReinterpretCast<uint32_t>(), 0, chosen);
      LocalTensor<float> sum = numbers_.Sum(spare, rows, k_, choices_);
      Div(value, value, sum, all, repeats, {1, 1, 0, stride, stride, 1});
    }
    weights_in_.FreeTensor(weight);
    VectorBarrier();
  }

  TPipe pipe_;
  GlobalTensor<float> probs_, weight_, dprobs_, dweight_, dlogits_;
  GlobalTensor<int32_t> expert_;
  In<float> probs_in_, dprobs_in_;
  TQue<TPosition::VECIN, 2> expert_in_, weights_in_;
  Out<float> dlogits_out_;
  TBuf<TPosition::VECCALC> at_, value_, spare_, row_, begins_;
  RowNumbers numbers_;
  uint32_t n_, k_, padded_, choices_, chosen_;  // chosen_: choices of a tile
};

}  // namespace qwen
