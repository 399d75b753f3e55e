// Shared by the kernels: waits between pipes, and rows of float32, float16 or bfloat16 that are computed in float32.
#pragma once
#include "kernel_operator.h"

// A separate namespace, since CANN has many names, such as AlignUp, that would clash with names here.
namespace qwen {

using namespace AscendC;

constexpr uint32_t FLOATS = 8;  // of a block of 32 bytes

__aicore__ inline uint32_t AlignUp(uint32_t n, uint32_t to) { return (n + to - 1) / to * to; }
__aicore__ inline uint32_t Least(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <HardEvent event>
__aicore__ inline void Sync() {
  const event_t id = static_cast<event_t>(GetTPipePtr()->FetchEventID(event));
  SetFlag<event>(id);
  WaitFlag<event>(id);
}

__aicore__ inline void VectorBarrier() { PipeBarrier<PIPE_V>(); }

// The elements of a row of n as it lies in UB: whole blocks of 32 bytes.
template <typename T>
__aicore__ inline uint32_t Padded(uint32_t n) {
  return AlignUp(n, 32 / sizeof(T));
}

// Tiles of rows on their way into float32, of which up to WAITING may be loaded before the first is taken.
template <typename T, uint32_t WAITING = 2>
class In {
 public:
  __aicore__ inline void Init(TPipe &pipe, uint32_t elements, uint32_t buffers) {
    pipe.InitBuffer(queue_, buffers, elements * sizeof(T));
    if constexpr (!IsSameType<T, float>::value) pipe.InitBuffer(wide_, elements * sizeof(float));
  }
  // Begins to copy `rows` of n elements, with `gap` elements between them; in UB they begin `pitch` elements apart, or lie side by side.
  __aicore__ inline void Load(const GlobalTensor<T> &from, uint32_t rows, uint32_t n, uint32_t gap = 0, uint32_t pitch = 0) {
    LocalTensor<T> tile = queue_.template AllocTensor<T>();
    DataCopyExtParams copy{static_cast<uint16_t>(rows), static_cast<uint32_t>(n * sizeof(T)), static_cast<uint32_t>(gap * sizeof(T)), 0, 0};
    if (pitch) copy.dstStride = (pitch - Padded<T>(n)) * sizeof(T) / 32;
    DataCopyPadExtParams<T> pad{false, 0, 0, T()};
    DataCopyPad(tile, from, copy, pad);
    queue_.EnQue(tile);
  }
  // The same for rows of two halves of n: first all first halves, then all second ones, `elements` further on.
  __aicore__ inline void LoadHalves(const GlobalTensor<T> &from, uint32_t rows, uint32_t n, uint32_t elements) {
    LocalTensor<T> tile = queue_.template AllocTensor<T>();
    const uint32_t bytes = n * sizeof(T);
    DataCopyExtParams copy{static_cast<uint16_t>(rows), bytes, bytes, 0, 0};
    DataCopyPadExtParams<T> pad{false, 0, 0, T()};
    DataCopyPad(tile, from, copy, pad);
    DataCopyPad(tile[elements], from[n], copy, pad);
    queue_.EnQue(tile);
  }
  // The oldest tile that was loaded; `elements` of it, with what pads the rows.
  __aicore__ inline LocalTensor<float> Wait(uint32_t elements) {
    LocalTensor<T> tile = queue_.template DeQue<T>();
    if constexpr (IsSameType<T, float>::value) {
      held_ = tile;
      return tile;
    } else {
      LocalTensor<float> wide = wide_.template Get<float>();
      VectorBarrier();
      Cast(wide, tile, RoundMode::CAST_NONE, elements);
      queue_.FreeTensor(tile);
      VectorBarrier();
      return wide;
    }
  }
  __aicore__ inline void Free() {
    if constexpr (IsSameType<T, float>::value) queue_.FreeTensor(held_);
  }

 private:
  TQue<TPosition::VECIN, WAITING> queue_;
  TBuf<TPosition::VECCALC> wide_;
  LocalTensor<T> held_;
};

// Tiles of rows on their way out, from float32.
template <typename T>
class Out {
 public:
  __aicore__ inline void Init(TPipe &pipe, uint32_t elements, uint32_t buffers) {
    pipe.InitBuffer(queue_, buffers, elements * sizeof(T));
    if constexpr (!IsSameType<T, float>::value) pipe.InitBuffer(wide_, elements * sizeof(float));
  }
  // Where to compute the next tile.
  __aicore__ inline LocalTensor<float> Get() {
    if constexpr (IsSameType<T, float>::value) {
      held_ = queue_.template AllocTensor<float>();
      return held_;
    } else {
      VectorBarrier();
      return wide_.template Get<float>();
    }
  }
  // Writes it: `rows` of n elements, with `gap` elements between them, of `elements` with what pads them; `pitch` as for In::Load.
  __aicore__ inline void Store(const GlobalTensor<T> &to, uint32_t rows, uint32_t n, uint32_t elements, uint32_t gap = 0,
                               uint32_t pitch = 0) {
    if constexpr (!IsSameType<T, float>::value) {
      held_ = queue_.template AllocTensor<T>();
      VectorBarrier();
      Cast(held_, wide_.template Get<float>(), RoundMode::CAST_RINT, elements);
    }
    Write(to, rows, n, gap, pitch);
  }
  __aicore__ inline void StoreHalves(const GlobalTensor<T> &to, uint32_t rows, uint32_t n, uint32_t elements) {
    if constexpr (!IsSameType<T, float>::value) {
      held_ = queue_.template AllocTensor<T>();
      VectorBarrier();
      Cast(held_, wide_.template Get<float>(), RoundMode::CAST_RINT, 2 * elements);
    }
    queue_.EnQue(held_);
    LocalTensor<T> tile = queue_.template DeQue<T>();
    const uint32_t bytes = n * sizeof(T);
    DataCopyExtParams copy{static_cast<uint16_t>(rows), bytes, 0, bytes, 0};
    DataCopyPad(to, tile, copy);
    DataCopyPad(to[n], tile[elements], copy);
    queue_.FreeTensor(tile);
  }
  // Writes `x`, computed elsewhere.
  __aicore__ inline void StoreOf(const GlobalTensor<T> &to, const LocalTensor<float> &x, uint32_t rows, uint32_t n, uint32_t elements,
                                 uint32_t gap) {
    held_ = queue_.template AllocTensor<T>();
    VectorBarrier();
    if constexpr (IsSameType<T, float>::value)
      Muls(held_, x, 1.0f, elements);
    else
      Cast(held_, x, RoundMode::CAST_RINT, elements);
    Write(to, rows, n, gap, 0);
  }
  // Writes `x`, computed elsewhere, and leaves in it what was written.
  __aicore__ inline void StoreRounded(const GlobalTensor<T> &to, const LocalTensor<float> &x, uint32_t rows, uint32_t n,
                                      uint32_t elements) {
    held_ = queue_.template AllocTensor<T>();
    if constexpr (IsSameType<T, float>::value) {
      Muls(held_, x, 1.0f, elements);
    } else {
      Cast(held_, x, RoundMode::CAST_RINT, elements);
      VectorBarrier();
      Cast(x, held_, RoundMode::CAST_NONE, elements);
    }
    Write(to, rows, n, 0, 0);
  }

 private:
  __aicore__ inline void Write(const GlobalTensor<T> &to, uint32_t rows, uint32_t n, uint32_t gap, uint32_t pitch) {
    queue_.EnQue(held_);
    LocalTensor<T> tile = queue_.template DeQue<T>();
    DataCopyExtParams copy{static_cast<uint16_t>(rows), static_cast<uint32_t>(n * sizeof(T)), 0, static_cast<uint32_t>(gap * sizeof(T)), 0};
    if (pitch) copy.srcStride = (pitch - Padded<T>(n)) * sizeof(T) / 32;
    DataCopyPad(to, tile, copy);
    queue_.FreeTensor(tile);
  }

  TQue<TPosition::VECOUT, 1> queue_;
  TBuf<TPosition::VECCALC> wide_;
  LocalTensor<T> held_;
};

constexpr uint32_t REPEAT = 64;  // floats

// dst = src * row, the same row for `rows` rows
__aicore__ inline void MulRow(const LocalTensor<float> &dst, const LocalTensor<float> &src, const LocalTensor<float> &row, uint32_t rows,
                              uint32_t n, uint32_t padded) {
  const uint8_t stride = padded / FLOATS;
  for (uint32_t c = 0; c < n; c += REPEAT)
    Mul(dst[c], src[c], row[c], static_cast<uint64_t>(Least(REPEAT, n - c)), static_cast<uint8_t>(rows), {1, 1, 1, stride, stride, 0});
}

// dst = src * a number of each row, which fills a block of `each`
__aicore__ inline void MulEach(const LocalTensor<float> &dst, const LocalTensor<float> &src, const LocalTensor<float> &each, uint32_t rows,
                               uint32_t n, uint32_t padded) {
  const uint8_t stride = padded / FLOATS;
  for (uint32_t c = 0; c < n; c += REPEAT)
    Mul(dst[c], src[c], each, static_cast<uint64_t>(Least(REPEAT, n - c)), static_cast<uint8_t>(rows), {1, 1, 0, stride, stride, 1});
}

// to[0] = the sum of n floats, without the scalar unit where n allows. work: WorkOfSum(n) floats.
__aicore__ inline uint32_t WorkOfSum(uint32_t n) { return AlignUp((n + FLOATS - 1) / FLOATS, FLOATS); }
__aicore__ inline void RowSum(const LocalTensor<float> &to, const LocalTensor<float> &x, const LocalTensor<float> &work, uint32_t n) {
  VectorBarrier();
  if (n % (REPEAT * FLOATS) || n > REPEAT * REPEAT) {
    ReduceSum(to, x, work, static_cast<int32_t>(n));
    return;
  }
  BlockReduceSum(work, x, n / REPEAT, REPEAT, 1, 1, FLOATS);
  VectorBarrier();
  BlockReduceSum(work, work, n / REPEAT / FLOATS, REPEAT, 1, 1, FLOATS);
  VectorBarrier();
  WholeReduceSum(to, work, n / REPEAT, 1, 1, 1, FLOATS);
}

// dw = the sum of rows of n floats, `row` apart, that cores wrote: each core adds up some columns of all, in an order fixed by how many
// there are.
template <typename T>
class SumOfParts {
 public:
  __aicore__ inline void Init(TPipe &pipe) { in_.Init(pipe, AT_ONCE * COLUMNS, 2), out_.Init(pipe, COLUMNS, 1); }
  __aicore__ inline void Run(const GlobalTensor<float> &parts, uint32_t count, uint32_t n, uint32_t row, const GlobalTensor<T> &to) {
    for (uint32_t c = GetBlockIdx() * COLUMNS; c < n; c += GetBlockNum() * COLUMNS) {
      const uint32_t columns = Least(COLUMNS, n - c), padded = AlignUp(columns, FLOATS);
      LocalTensor<float> total = out_.Get();
      Duplicate(total, 0.0f, COLUMNS);
      for (uint32_t p = 0; p < count; p += AT_ONCE) {
        uint32_t rows = Least(AT_ONCE, count - p);
        in_.Load(parts[static_cast<uint64_t>(p) * row + c], rows, columns, row - columns);
        LocalTensor<float> x = in_.Wait(rows * padded);
        while (rows > 1) {
          const uint32_t left = (rows + 1) / 2;
          VectorBarrier();
          Add(x, x, x[left * padded], (rows - left) * padded);
          rows = left;
        }
        VectorBarrier();
        Add(total, total, x, columns);
        in_.Free();
      }
      out_.Store(to[c], 1, columns, COLUMNS);
    }
  }

 private:
  static constexpr uint32_t COLUMNS = 128, AT_ONCE = 64;
  In<float> in_;
  Out<T> out_;
};

// The parts of 0 ... n that block `b` of `blocks` does.
struct Share {
  uint32_t begin, end;
};
__aicore__ inline Share ShareOf(uint32_t n, uint32_t b, uint32_t blocks) {
  return {static_cast<uint32_t>(static_cast<uint64_t>(n) * b / blocks), static_cast<uint32_t>(static_cast<uint64_t>(n) * (b + 1) / blocks)};
}

}  // namespace qwen
