// Products of matrices in global memory by the cube: tiles of up to 128 by 128 through L1 and L0, with two buffers at each step.
//
// Sizes on 910B: a tile of an operand is 128 x 128 elements of 2 bytes or 128 x 64 elements of 4 bytes, 32 KiB. Two tiles of each operand
// take 128 of the 512 KiB of L1, and all of L0A and L0B (64 KiB each). A tile of the result is 128 x 128 floats, 64 of the 128 KiB of L0C.
#pragma once
#include "device.h"

namespace qwen {

constexpr uint32_t TILE = 128, FRACTAL_ROWS = 16;

// A matrix in global memory with rows `stride` elements apart. TURNED: it is stored transposed.
template <typename T, bool TURNED>
struct Matrix {
  GlobalTensor<T> at;
  uint32_t stride;
  __aicore__ inline GlobalTensor<T> From(uint64_t row, uint64_t column) const {
    return at[TURNED ? column * stride + row : row * stride + column];
  }
};

template <typename T>
class Products {
 public:
  static constexpr uint32_t C = 32 / sizeof(T), DEPTH = 256 / sizeof(T);  // elements of a block; of k at a time
  static constexpr uint32_t TILE_BYTES = TILE * 256;

  __aicore__ inline void Init(TPipe &pipe) {
    pipe.InitBuffer(a1_, 2, TILE_BYTES), pipe.InitBuffer(b1_, 2, TILE_BYTES);
    pipe.InitBuffer(a2_, 2, TILE_BYTES), pipe.InitBuffer(b2_, 2, TILE_BYTES);
  }

  // c (+)= a b, of [m, k] and [k, n]; m and n are up to TILE. c lies in L0C.
  template <bool TURNED_A, bool TURNED_B>
  __aicore__ inline void Multiply(const LocalTensor<float> &c, const Matrix<T, TURNED_A> &a, const Matrix<T, TURNED_B> &b, uint32_t m,
                                  uint32_t n, uint32_t k, bool add) {
    Load(a, b, m, n, 0, Least(DEPTH, k));
    for (uint32_t at = 0; at < k; at += DEPTH) {
      const uint32_t depth = Least(DEPTH, k - at), next = at + depth;
      if (next < k) Load(a, b, m, n, next, Least(DEPTH, k - next));
      Part<TURNED_A, TURNED_B>(c, m, n, depth, add || at);
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
    Part<false, true>(c, m, n, FRACTAL_ROWS, false);
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
  __aicore__ inline void ToL1(const LocalTensor<T> &to, const GlobalTensor<T> &from, uint32_t rows, uint32_t columns, uint32_t stride) {
    Nd2NzParams copy;
    copy.ndNum = 1, copy.nValue = rows, copy.dValue = columns, copy.srcNdMatrixStride = 0, copy.srcDValue = stride;
    copy.dstNzC0Stride = AlignUp(rows, FRACTAL_ROWS), copy.dstNzNStride = 1, copy.dstNzMatrixStride = 0;
    DataCopy(to, from, copy);
  }
  template <bool TURNED_A, bool TURNED_B>
  __aicore__ inline void Part(const LocalTensor<float> &c, uint32_t m, uint32_t n, uint32_t depth, bool add) {
    LocalTensor<T> a1 = a1_.template DeQue<T>(), b1 = b1_.template DeQue<T>();
    LocalTensor<T> a2 = a2_.template AllocTensor<T>(), b2 = b2_.template AllocTensor<T>();
    if constexpr (TURNED_A)
      Turn(a2, a1, depth, m);
    else
      Rows(a2, a1, m, depth);
    if constexpr (TURNED_B)
      Columns(b2, b1, n, depth);
    else
      Turn(b2, b1, depth, n);
    a1_.FreeTensor(a1), b1_.FreeTensor(b1);
    a2_.EnQue(a2), b2_.EnQue(b2);
    a2 = a2_.template DeQue<T>(), b2 = b2_.template DeQue<T>();
    MmadParams multiply;
    multiply.m = AlignUp(m, FRACTAL_ROWS), multiply.n = n, multiply.k = depth;  // of one row the chip would want another layout
    multiply.kDirectionAlign = TURNED_A && sizeof(T) == 4;
    multiply.cmatrixInitVal = !add;
    PipeBarrier<PIPE_M>();
    Mmad(c, a2, b2, multiply);
    a2_.FreeTensor(a2), b2_.FreeTensor(b2);
  }
  // L1's columns of fractals into L0A's rows of them.
  __aicore__ inline void Rows(const LocalTensor<T> &to, const LocalTensor<T> &from, uint32_t m, uint32_t k) {
    const uint32_t high = AlignUp(m, FRACTAL_ROWS) / FRACTAL_ROWS, wide = AlignUp(k, C) / C;
    LoadData2DParams load;
    load.repeatTimes = wide, load.srcStride = high, load.dstGap = 0, load.ifTranspose = false;
    for (uint32_t i = 0; i < high; i++) LoadData(to[i * wide * FRACTAL_ROWS * C], from[i * FRACTAL_ROWS * C], load);
  }
  // L1's columns of fractals of a transposed matrix are L0B's.
  __aicore__ inline void Columns(const LocalTensor<T> &to, const LocalTensor<T> &from, uint32_t n, uint32_t k) {
    LoadData2DParams load;
    load.repeatTimes = AlignUp(n, FRACTAL_ROWS) / FRACTAL_ROWS, load.srcStride = 1, load.dstGap = 0, load.ifTranspose = false;
    const uint32_t column = load.repeatTimes * FRACTAL_ROWS * C;
    for (uint32_t j = 0; j < AlignUp(k, C) / C; j++) LoadData(to[j * column], from[j * column], load);
  }
  // A matrix of `rows` of k in L1, turned on its way: to L0A as its transpose, to L0B as L0B wants it.
  __aicore__ inline void Turn(const LocalTensor<T> &to, const LocalTensor<T> &from, uint32_t rows, uint32_t columns) {
    LoadData3DParamsV2<T> load;
    load.l1H = AlignUp(rows, FRACTAL_ROWS), load.l1W = 1;
    load.channelSize = AlignUp(columns, FRACTAL_ROWS), load.kExtension = load.channelSize, load.mExtension = load.l1H;
    load.enTranspose = true;
    LoadData(to, from, load);
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
