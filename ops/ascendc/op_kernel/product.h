// Products of matrices in global memory by the cube: results of up to 128 by WIDE (128 or 256), with two buffers at each step.
//
// Sizes on 910B: 512 bytes of k are in L1 at a time (256 elements of 2 bytes), so that copies fetch long rows, and 128 bytes of k in L0.
// Two buffers of both operands take 256 of the 512 KiB of L1 (384 for WIDE 256), 32 of L0A's 64 KiB and 32 of L0B's (all 64). A result is
// 128 x WIDE floats, 64 or 128 of the 128 KiB of L0C.
#pragma once
#include "device.h"

namespace qwen {

constexpr uint32_t TILE = 128, FRACTAL_ROWS = 16;
constexpr uint32_t FEW_FRACTALS = 10;  // products of fewer fractals are not kept in order by the cube itself

// A matrix in global memory with rows `stride` elements apart. TURNED: it is stored transposed.
template <typename T, bool TURNED>
struct Matrix {
  GlobalTensor<T> at;
  uint32_t stride;
  __aicore__ inline GlobalTensor<T> From(uint64_t row, uint64_t column) const {
    return at[TURNED ? column * stride + row : row * stride + column];
  }
};

// Rows `stride` elements apart into L1, as a matrix of `high` rows there, by default as many in whole fractals.
template <typename T>
__aicore__ inline void ToL1(const LocalTensor<T> &to, const GlobalTensor<T> &from, uint32_t rows, uint32_t columns, uint32_t stride,
                            uint32_t high = 0) {
  Nd2NzParams copy;
  copy.ndNum = 1, copy.nValue = rows, copy.dValue = columns, copy.srcNdMatrixStride = 0, copy.srcDValue = stride;
  copy.dstNzC0Stride = AlignUp(high ? high : rows, FRACTAL_ROWS), copy.dstNzNStride = 1, copy.dstNzMatrixStride = 0;
  DataCopy(to, from, copy);
}

// Of a matrix of m rows by `columns` in L1: `k` columns from `column`, to L0A as they are.
template <typename T>
__aicore__ inline void LoadRows(const LocalTensor<T> &to, const LocalTensor<T> &from, uint32_t m, uint32_t columns, uint32_t column,
                                uint32_t k) {
  constexpr uint32_t C = 32 / sizeof(T);
  LoadData3DParamsV2<T> load;
  load.l1H = AlignUp(m, FRACTAL_ROWS), load.l1W = 1, load.channelSize = AlignUp(columns, C);
  load.mExtension = AlignUp(m, FRACTAL_ROWS), load.kExtension = AlignUp(k, C), load.kStartPt = column;
  LoadData(to, from, load);
}

// Of a matrix of `rows` by `columns` in L1: `k` rows from `row`, and `n` columns from `column`, turned on their way: to L0A as the
// transpose, to L0B as L0B wants them.
template <typename T>
__aicore__ inline void LoadTurned(const LocalTensor<T> &to, const LocalTensor<T> &from, uint32_t rows, uint32_t columns, uint32_t row,
                                  uint32_t k, uint32_t column, uint32_t n) {
  LoadData3DParamsV2<T> load;
  load.l1H = AlignUp(rows, FRACTAL_ROWS), load.l1W = 1, load.channelSize = AlignUp(columns, FRACTAL_ROWS);
  load.mExtension = AlignUp(k, FRACTAL_ROWS), load.mStartPt = row;
  load.kExtension = AlignUp(n, FRACTAL_ROWS), load.kStartPt = column;
  load.enTranspose = true;
  LoadData(to, from, load);
}

// Of a matrix of n rows in L1: `k` columns from `column`, to L0B as the transpose. L1's columns of fractals are L0B's rows.
template <typename T>
__aicore__ inline void LoadColumns(const LocalTensor<T> &to, const LocalTensor<T> &from, uint32_t n, uint32_t column, uint32_t k) {
  constexpr uint32_t C = 32 / sizeof(T);
  const uint32_t high = AlignUp(n, FRACTAL_ROWS);
  LoadData2DParams load;
  load.repeatTimes = high / FRACTAL_ROWS * (AlignUp(k, C) / C), load.srcStride = 1, load.dstGap = 0, load.ifTranspose = false;
  LoadData(to, from[high * column], load);
}

// c (+)= a b, [m, k] by [k, n]. In float32 an A that was turned has its k in multiples of 16.
template <typename T>
__aicore__ inline void MultiplyL0(const LocalTensor<float> &c, const LocalTensor<T> &a, const LocalTensor<T> &b, uint32_t m, uint32_t n,
                                  uint32_t k, bool turned, bool add) {
  MmadParams multiply;
  multiply.m = AlignUp(m, FRACTAL_ROWS), multiply.n = n, multiply.k = k;  // of one row the chip would want another layout
  multiply.kDirectionAlign = turned && sizeof(T) == 4;
  multiply.cmatrixInitVal = !add;
  if (multiply.m / FRACTAL_ROWS * (AlignUp(n, FRACTAL_ROWS) / FRACTAL_ROWS) < FEW_FRACTALS) PipeBarrier<PIPE_M>();
  Mmad(c, a, b, multiply);
}

template <typename T, uint32_t WIDE = TILE>
class Products {
 public:
  static constexpr uint32_t C = 32 / sizeof(T), STEP = 512 / sizeof(T), DEPTH = 128 / sizeof(T);  // of a block; of k in L1, and in L0

  __aicore__ inline void Init(TPipe &pipe) {
    pipe.InitBuffer(a1_, 2, TILE * STEP * sizeof(T)), pipe.InitBuffer(b1_, 2, WIDE * STEP * sizeof(T));
    pipe.InitBuffer(a2_, 2, TILE * DEPTH * sizeof(T)), pipe.InitBuffer(b2_, 2, WIDE * DEPTH * sizeof(T));
  }

  // c (+)= a b, of [m, k] and [k, n]; m is up to TILE and n to WIDE. c lies in L0C.
  template <bool TURNED_A, bool TURNED_B>
  __aicore__ inline void Multiply(const LocalTensor<float> &c, const Matrix<T, TURNED_A> &a, const Matrix<T, TURNED_B> &b, uint32_t m,
                                  uint32_t n, uint32_t k, bool add) {
    Load(a, b, m, n, 0, Least(STEP, k));
    for (uint32_t at = 0; at < k; at += STEP) {
      const uint32_t depth = Least(STEP, k - at), next = at + depth;
      if (next < k) Load(a, b, m, n, next, Least(STEP, k - next));
      Step<TURNED_A, TURNED_B>(c, m, n, depth, add || at);
    }
  }
  // c = 0
  __aicore__ inline void Zero(const LocalTensor<float> &c, uint32_t m, uint32_t n) {
    LocalTensor<T> a = a1_.template AllocTensor<T>(), b = b1_.template AllocTensor<T>();
    InitConstValueParams<T> zeros;
    zeros.repeatTimes = 1, zeros.blockNum = AlignUp(m, FRACTAL_ROWS) * FRACTAL_ROWS / C;
    InitConstValue(a, zeros);
    zeros.blockNum = AlignUp(n, FRACTAL_ROWS) * FRACTAL_ROWS / C;
    InitConstValue(b, zeros);
    a1_.EnQue(a), b1_.EnQue(b);
    Step<false, true>(c, m, n, FRACTAL_ROWS, false);
  }

 private:
  template <bool TURNED_A, bool TURNED_B>
  __aicore__ inline void Load(const Matrix<T, TURNED_A> &a, const Matrix<T, TURNED_B> &b, uint32_t m, uint32_t n, uint32_t k,
                              uint32_t depth) {
    LocalTensor<T> a1 = a1_.template AllocTensor<T>(), b1 = b1_.template AllocTensor<T>();
    ToL1(a1, a.From(0, k), TURNED_A ? depth : m, TURNED_A ? m : depth, a.stride);
    ToL1(b1, b.From(k, 0), TURNED_B ? n : depth, TURNED_B ? depth : n, b.stride);
    a1_.EnQue(a1), b1_.EnQue(b1);
  }
  // The product of what is in L1.
  template <bool TURNED_A, bool TURNED_B>
  __aicore__ inline void Step(const LocalTensor<float> &c, uint32_t m, uint32_t n, uint32_t depth, bool add) {
    LocalTensor<T> a1 = a1_.template DeQue<T>(), b1 = b1_.template DeQue<T>();
    for (uint32_t at = 0; at < depth; at += DEPTH) {
      const uint32_t k = Least(DEPTH, depth - at);
      LocalTensor<T> a2 = a2_.template AllocTensor<T>(), b2 = b2_.template AllocTensor<T>();
      if constexpr (TURNED_A)
        LoadTurned(a2, a1, depth, m, at, k, 0, m);
      else
        LoadRows(a2, a1, m, depth, at, k);
      if constexpr (TURNED_B)
        LoadColumns(b2, b1, n, at, k);
      else
        LoadTurned(b2, b1, depth, n, at, k, 0, n);
      a2_.EnQue(a2), b2_.EnQue(b2);
      a2 = a2_.template DeQue<T>(), b2 = b2_.template DeQue<T>();
      MultiplyL0(c, a2, b2, m, n, k, TURNED_A, add || at);
      a2_.FreeTensor(a2), b2_.FreeTensor(b2);
    }
    a1_.FreeTensor(a1), b1_.FreeTensor(b1);
  }

  TQue<TPosition::A1, 2> a1_;
  TQue<TPosition::B1, 2> b1_;
  TQue<TPosition::A2, 1> a2_;
  TQue<TPosition::B2, 1> b2_;
};

// Writes [m, n] out of L0C, rows `stride` elements apart.
template <typename U>
__aicore__ inline void Write(const GlobalTensor<U> &to, const LocalTensor<float> &c, uint32_t m, uint32_t n, uint32_t stride) {
  FixpipeParamsV220 out;
  out.nSize = n, out.mSize = m, out.srcStride = AlignUp(m, FRACTAL_ROWS), out.dstStride = stride;
  if constexpr (IsSameType<U, half>::value) out.quantPre = QuantMode_t::F322F16;
  if constexpr (IsSameType<U, bfloat16_t>::value) out.quantPre = QuantMode_t::F322BF16;
  Fixpipe<U, float, CFG_ROW_MAJOR>(to, c, out);
}

}  // namespace qwen
