// Shared by attention and its gradient: which tiles of queries and spans of keys the cores of a block walk through, and the mask of a span.
//
// Spans without a key that a tile sees are skipped, and only those with keys that some query does not see are masked. The least and the
// largest segment and order of each tile and each span tell which; the vector cores find them first.
#pragma once
#include "attention_tiles.h"

namespace qwen {

constexpr uint32_t SPAN = 512;         // keys that the forward hands over at a time
constexpr float LOWEST_TOP = -8.0e8f;  // a running maximum is at least this, so that exp of a hidden score is 0
constexpr int32_t LEAST_INT = -2147483647, LARGEST_INT = 2147483647, LATER = 1 << 30;

// The least and the largest segment and order of tiles of queries and of `unit` keys each: 4 numbers each, queries first.
class Ranges {
 public:
  static constexpr uint32_t NUMBERS = 4;
  template <typename T>
  __aicore__ inline void Init(const Inputs<T> &in, GM_ADDR at, uint32_t unit) {
    numbers_.SetGlobalBuffer((__gm__ int32_t *)at);
    tiles_ = (in.S + ROWS - 1) / ROWS, unit_ = unit, spans_ = (in.keys + unit - 1) / unit;
  }
  __aicore__ inline uint64_t Tile(uint32_t b, uint32_t first) const {
    return (static_cast<uint64_t>(b) * (tiles_ + spans_) + first / ROWS) * NUMBERS;
  }
  __aicore__ inline uint64_t Span(uint32_t b, uint32_t key) const {
    return (static_cast<uint64_t>(b) * (tiles_ + spans_) + tiles_ + key / unit_) * NUMBERS;
  }
  __aicore__ inline int32_t At(uint64_t i) const { return numbers_.GetValue(i); }
  // n numbers on their way in, up to SPAN, and their end.
  __aicore__ inline LocalTensor<int32_t> Load(const GlobalTensor<int32_t> &from, uint32_t n) {
    held_ = ints_.AllocTensor<int32_t>();
    DataCopyPad(held_, from, DataCopyExtParams{1, static_cast<uint32_t>(n * sizeof(int32_t)), 0, 0, 0},
                DataCopyPadExtParams<int32_t>{false, 0, 0, 0});
    ints_.EnQue(held_);
    held_ = ints_.DeQue<int32_t>();
    VectorBarrier();
    return held_;
  }
  __aicore__ inline void Done() {
    ints_.FreeTensor(held_);
    VectorBarrier();
  }

  __aicore__ inline void Buffers(TPipe &pipe) {
    pipe.InitBuffer(ints_, 1, SPAN * sizeof(int32_t)), pipe.InitBuffer(out_, 1, 32);
    pipe.InitBuffer(least_, SPAN * sizeof(int32_t)), pipe.InitBuffer(largest_, SPAN * sizeof(int32_t));
  }
  // Those of all tiles and spans, shared out to the vector cores.
  template <typename T>
  __aicore__ inline void Find(const Inputs<T> &in) {
    const uint32_t each = tiles_ + spans_, cores = GetBlockNum() * 2;
    for (uint32_t i = GetBlockIdx(); i < in.batch * each; i += cores) {
      const uint32_t b = i / each, u = i % each;
      const bool of_keys = u >= tiles_;
      const uint32_t first = of_keys ? (u - tiles_) * unit_ : u * ROWS;
      const uint32_t n = of_keys ? Least(unit_, in.keys - first) : Least(ROWS, in.S - first);
      const uint64_t at = static_cast<uint64_t>(b) * (of_keys ? in.keys : in.S) + first;
      LocalTensor<int32_t> out = out_.AllocTensor<int32_t>();
      Sync<HardEvent::MTE3_S>();
      Range(of_keys ? in.key_segment[at] : in.segment[at], n, out, 0);
      Range(of_keys ? in.key_order[at] : in.order[at], n, out, 2);
      Sync<HardEvent::S_MTE3>();
      out_.EnQue(out);
      out = out_.DeQue<int32_t>();
      DataCopyPad(numbers_[static_cast<uint64_t>(i) * NUMBERS], out, DataCopyExtParams{1, NUMBERS * sizeof(int32_t), 0, 0, 0});
      out_.FreeTensor(out);
    }
  }

 private:
  // out[at] = the least of n numbers, out[at + 1] = the largest.
  __aicore__ inline void Range(const GlobalTensor<int32_t> &from, uint32_t n, const LocalTensor<int32_t> &out, uint32_t at) {
    LocalTensor<int32_t> x = Load(from, n), least = least_.Get<int32_t>(), largest = largest_.Get<int32_t>();
    uint32_t wide = FLOATS;
    while (wide < n) wide *= 2;
    Duplicate(least, LARGEST_INT, wide), Duplicate(largest, LEAST_INT, wide);
    VectorBarrier();
    Adds(least, x, 0, n), Adds(largest, x, 0, n);
    Done();
    for (uint32_t half = wide / 2; half >= FLOATS; half /= 2) {
      VectorBarrier();
      Min(least, least, least[half], half), Max(largest, largest, largest[half], half);
    }
    Sync<HardEvent::V_S>();
    int32_t low = LARGEST_INT, high = LEAST_INT;
    for (uint32_t i = 0; i < FLOATS; i++) {
      const int32_t a = least.GetValue(i), b = largest.GetValue(i);
      low = a < low ? a : low, high = b > high ? b : high;
    }
    out.SetValue(at, low), out.SetValue(at + 1, high);
    Sync<HardEvent::S_V>();
  }

  GlobalTensor<int32_t> numbers_;
  uint32_t tiles_, spans_, unit_;
  TQue<TPosition::VECIN, 1> ints_;
  LocalTensor<int32_t> held_;
  TQue<TPosition::VECOUT, 1> out_;
  TBuf<TPosition::VECCALC> least_, largest_;
};

enum class Masked : uint32_t { NOT, BY_ORDER, BY_BOTH };

// A span of keys and the tile of queries that it is for.
struct Handover {
  uint32_t b, head, first, rows, key, n, task;  // task: how many tiles were before it
  Masked masked;
  bool begins, ends;  // the first and the last of its tile
};

// The handovers of a block in order, which all of its cores walk through.
template <typename T>
class Walk {
 public:
  // Tiles of `high` queries by spans of `wide` keys.
  __aicore__ inline void Begin(const Inputs<T> *in, const Ranges *ranges, uint32_t high, uint32_t wide) {
    in_ = in, ranges_ = ranges, high_ = high, wide_ = wide, tiles_ = (in->S + high - 1) / high, tasks_ = in->batch * in->heads * tiles_;
    next_task_ = BlockOf(), at.ends = true, at.task = 0;
  }
  // Moves on to the next; false past the last.
  __aicore__ inline bool Next() {
    if (at.ends) {
      if (next_task_ >= tasks_) return false;
      at.b = next_task_ / tiles_ / in_->heads, at.head = next_task_ / tiles_ % in_->heads, at.first = next_task_ % tiles_ * high_;
      at.rows = Least(high_, in_->S - at.first), keys_ = in_->KeysFor(at.first + at.rows - 1);
      const uint64_t i = ranges_->Tile(at.b, at.first);
      least_segment_ = ranges_->At(i), largest_segment_ = ranges_->At(i + 1), least_order_ = ranges_->At(i + 2),
      largest_order_ = ranges_->At(i + 3);
      next_ = Seek(0);
      if (next_ >= keys_) next_ = 0;  // a tile that sees nothing has one span, all of it hidden
      next_task_ += GetBlockNum(), at.task++, at.begins = true;
    } else {
      at.begins = false;
    }
    at.key = next_, at.n = Least(wide_, keys_ - next_), at.masked = MaskOf();
    next_ = Seek(at.key + wide_), at.ends = next_ >= keys_;
    return true;
  }
  Handover at;

 private:
  __aicore__ inline uint32_t Seek(uint32_t key) const {
    for (; key < keys_; key += wide_) {
      const uint64_t i = ranges_->Span(at.b, key);
      if (ranges_->At(i) <= largest_segment_ && ranges_->At(i + 1) >= least_segment_ && ranges_->At(i + 2) <= largest_order_) break;
    }
    return key;
  }
  __aicore__ inline Masked MaskOf() const {
    const uint64_t i = ranges_->Span(at.b, at.key);
    const bool one = least_segment_ == largest_segment_ && ranges_->At(i) == least_segment_ && ranges_->At(i + 1) == least_segment_;
    if (!one) return Masked::BY_BOTH;
    return ranges_->At(i + 3) <= least_order_ && at.n % REPEAT == 0 ? Masked::NOT : Masked::BY_ORDER;
  }
  const Inputs<T> *in_;
  const Ranges *ranges_;
  uint32_t high_, wide_, tiles_, tasks_, next_task_, keys_, next_;
  int32_t least_segment_, largest_segment_, least_order_, largest_order_;
};

// The other way round: for each head, over its tiles of `wide` keys, and for each of them over spans of `high` queries.
template <typename T>
class KeyWalk {
 public:
  __aicore__ inline void Begin(const Inputs<T> *in, const Ranges *ranges, uint32_t high, uint32_t wide) {
    in_ = in, ranges_ = ranges, high_ = high, wide_ = wide;
    next_task_ = BlockOf(), at.ends = true, at.task = 0, at.key = in->keys;
  }
  __aicore__ inline bool Next() {
    if (at.ends) {
      at.key += wide_;
      if (at.key >= in_->keys) {
        if (next_task_ >= in_->batch * in_->heads) return false;
        at.b = next_task_ / in_->heads, at.head = next_task_ % in_->heads, at.key = 0, next_task_ += GetBlockNum();
      }
      at.n = Least(wide_, in_->keys - at.key), span_ = ranges_->Span(at.b, at.key);
      least_segment_ = ranges_->At(span_), largest_segment_ = ranges_->At(span_ + 1), least_order_ = ranges_->At(span_ + 2),
      largest_order_ = ranges_->At(span_ + 3);
      next_ = Seek(0), none_ = next_ >= in_->S;
      if (none_) next_ = 0;  // keys that no query sees have one span of queries, all of it hidden
      at.task++, at.begins = true;
    } else {
      at.begins = false;
    }
    at.first = next_, at.rows = Least(high_, in_->S - next_), at.masked = MaskOf();
    next_ = none_ ? in_->S : Seek(at.first + high_), at.ends = next_ >= in_->S;
    return true;
  }
  Handover at;

 private:
  // Whether tiles of a span of queries from `first` on see any of the keys, or all of them.
  __aicore__ inline bool Sees(uint32_t first, bool all) const {
    const uint32_t end = Least(first + high_, in_->S);
    for (uint32_t f = first / ROWS * ROWS; f < end; f += ROWS) {
      const uint64_t i = ranges_->Tile(at.b, f);
      const bool some = ranges_->At(i) <= largest_segment_ && ranges_->At(i + 1) >= least_segment_ && ranges_->At(i + 3) >= least_order_;
      const bool every = ranges_->At(i + 2) >= largest_order_;
      if (all ? !every : some) return !all;
    }
    return all;
  }
  __aicore__ inline bool OneSegment(uint32_t first) const {
    const uint32_t end = Least(first + high_, in_->S);
    for (uint32_t f = first / ROWS * ROWS; f < end; f += ROWS) {
      const uint64_t i = ranges_->Tile(at.b, f);
      if (ranges_->At(i) != least_segment_ || ranges_->At(i + 1) != least_segment_) return false;
    }
    return least_segment_ == largest_segment_;
  }
  __aicore__ inline uint32_t Seek(uint32_t first) const {
    for (; first < in_->S; first += high_)
      if (Sees(first, false)) break;
    return first;
  }
  __aicore__ inline Masked MaskOf() const {
    if (!OneSegment(at.first)) return Masked::BY_BOTH;
    return Sees(at.first, true) ? Masked::NOT : Masked::BY_ORDER;
  }
  const Inputs<T> *in_;
  const Ranges *ranges_;
  uint32_t high_, wide_, next_task_, next_;
  uint64_t span_;
  int32_t least_segment_, largest_segment_, least_order_, largest_order_;
  bool none_;
};

// Which of [rows, columns] of queries by keys, or of keys by queries if `turned`, are hidden: 1 for another segment or a later key, else 0.
// Orders are below 2^30.
class SpanMask {
 public:
  static constexpr uint32_t AREA = 4 * SPAN;  // elements at a time
  __aicore__ inline void Init(TPipe &pipe, uint32_t wide, Ranges *numbers) {
    wide_ = wide, numbers_ = numbers;
    pipe.InitBuffer(segments_, HALF * 32), pipe.InitBuffer(orders_, HALF * 32), pipe.InitBuffer(columns_, 2 * wide * sizeof(int32_t));
    pipe.InitBuffer(hidden_, AREA * sizeof(float)), pipe.InitBuffer(spare_, AREA * sizeof(float));
  }
  __aicore__ inline void Rows(const GlobalTensor<int32_t> &segment, const GlobalTensor<int32_t> &order, uint32_t n) {
    const uint8_t repeats = AlignUp(n, FLOATS) / FLOATS;
    Brcb(segments_.Get<int32_t>(), numbers_->Load(segment, n), repeats, {1, 8}), numbers_->Done();
    Brcb(orders_.Get<int32_t>(), numbers_->Load(order, n), repeats, {1, 8}), numbers_->Done();
  }
  // `wide` is n in whole repeats; what is past n is later than any query.
  __aicore__ inline void Columns(const GlobalTensor<int32_t> &segment, const GlobalTensor<int32_t> &order, uint32_t n, uint32_t wide) {
    LocalTensor<int32_t> segments = columns_.Get<int32_t>(), orders = segments[wide_];
    VectorBarrier();
    Duplicate(segments, 0, wide), Duplicate(orders, LATER, wide);
    Adds(segments, numbers_->Load(segment, n), 0, n), numbers_->Done();
    Adds(orders, numbers_->Load(order, n), 0, n), numbers_->Done();
  }
  // x += HIDE where hidden, [rows, wide]; `row`: the first of the rows.
  __aicore__ inline void Apply(const LocalTensor<float> &x, uint32_t row, uint32_t rows, uint32_t wide, Masked masked, bool turned) {
    LocalTensor<float> hidden = hidden_.Get<float>();
    const uint32_t at_once = AREA / wide_;
    for (uint32_t r = 0; r < rows; r += at_once) {
      const uint32_t n = Least(at_once, rows - r), count = n * wide;
      Find(row + r, n, wide, masked, turned);
      Axpy(x[r * wide], hidden, HIDE, count);
      VectorBarrier();
    }
  }

 private:
  // column - row, [rows, wide]
  __aicore__ inline void Difference(const LocalTensor<int32_t> &to, const LocalTensor<int32_t> &column, const LocalTensor<int32_t> &row,
                                    uint32_t rows, uint32_t wide) {
    const uint8_t stride = wide / FLOATS;
    for (uint32_t c = 0; c < wide; c += REPEAT)
      Sub(to[c], column[c], row, static_cast<uint64_t>(REPEAT), static_cast<uint8_t>(rows), {1, 1, 0, stride, 0, 1});
  }
  __aicore__ inline void Find(uint32_t row, uint32_t rows, uint32_t wide, Masked masked, bool turned) {
    LocalTensor<float> hidden = hidden_.Get<float>(), other = spare_.Get<float>();
    LocalTensor<int32_t> a = hidden.ReinterpretCast<int32_t>(), b = other.ReinterpretCast<int32_t>(), column = columns_.Get<int32_t>();
    const uint32_t count = rows * wide;
    Difference(a, column[wide_], orders_.Get<int32_t>()[row * FLOATS], rows, wide);
    if (masked == Masked::BY_BOTH) Difference(b, column, segments_.Get<int32_t>()[row * FLOATS], rows, wide);
    VectorBarrier();
    Cast(hidden, a, RoundMode::CAST_RINT, count);
    if (masked == Masked::BY_BOTH) Cast(other, b, RoundMode::CAST_RINT, count);
    VectorBarrier();
    if (turned) {
      Mins(hidden, hidden, 0.0f, count);
      VectorBarrier();
      Abs(hidden, hidden, count);
    } else {
      Maxs(hidden, hidden, 0.0f, count);
    }
    if (masked == Masked::BY_BOTH) {
      Abs(other, other, count);
      VectorBarrier();
      Max(hidden, hidden, other, count);
    }
    VectorBarrier();
    Mins(hidden, hidden, 1.0f, count);
    VectorBarrier();
  }

  TBuf<TPosition::VECCALC> segments_, orders_, columns_, hidden_, spare_;
  Ranges *numbers_;  // through whose buffer numbers come
  uint32_t wide_;
};

}  // namespace qwen
