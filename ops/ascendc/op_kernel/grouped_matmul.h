// y[r] = x[r] w[group of r], for rows in order of group; `ends` has the index after the last row of each group. And the gradients
// dx[r] = dy[r] w^T and dw[g] = x^T dy over the rows of the group. Tiles of the result, 128 by 256, are assigned to the cores in turn.
#pragma once
#include "product.h"

namespace qwen {

enum class Side { Y, DX };
constexpr uint32_t WIDE = 256;  // of a tile of the result

template <typename T>
class GroupedBase {
 protected:
  __aicore__ inline void Buffers() {
    products_.Init(pipe_);
    pipe_.InitBuffer(result_, 1, TILE * WIDE * sizeof(float));
  }
  __aicore__ inline void Store(const LocalTensor<float> &made, const GlobalTensor<T> &to, uint32_t m, uint32_t n, uint32_t stride) {
    result_.EnQue(made);
    LocalTensor<float> c = result_.template DeQue<float>();
    Write(to, c, m, n, stride);
    result_.FreeTensor(c);
  }

  TPipe pipe_;
  Products<T, WIDE> products_;
  TQue<TPosition::CO1, 1> result_;
};

template <typename T, Side SIDE>
class GroupedMatmul : GroupedBase<T> {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR w, GM_ADDR ends, GM_ADDR y, const GroupedMatmulTiling &tiling) {
    const uint32_t from = SIDE == Side::Y ? tiling.from : tiling.to, to = SIDE == Side::Y ? tiling.to : tiling.from;
    GlobalTensor<int32_t> ends_at;
    ends_at.SetGlobalBuffer((__gm__ int32_t *)ends);
    x_.at.SetGlobalBuffer((__gm__ T *)x), x_.stride = from;
    w_.SetGlobalBuffer((__gm__ T *)w), y_.SetGlobalBuffer((__gm__ T *)y);
    this->Buffers();
    uint32_t first = 0, tile = 0;
    for (uint32_t g = 0; g < tiling.groups; g++) {
      const uint32_t end = ends_at.GetValue(g);
      for (uint32_t r = first; r < end; r += TILE)
        for (uint32_t c = 0; c < to; c += WIDE, tile++)
          if (tile % GetBlockNum() == GetBlockIdx()) Tile(g, r, c, Least(TILE, end - r), Least(WIDE, to - c), from, to);
      first = end;
    }
  }

 private:
  __aicore__ inline void Tile(uint32_t group, uint32_t row, uint32_t column, uint32_t m, uint32_t n, uint32_t from, uint32_t to) {
    Matrix<T, false> x = {x_.From(row, 0), x_.stride};
    Matrix<T, SIDE == Side::DX> w = {w_[static_cast<uint64_t>(group) * from * to], SIDE == Side::Y ? to : from};
    w.at = w.From(0, column);
    LocalTensor<float> c = this->result_.template AllocTensor<float>();
    this->products_.Multiply(c, x, w, m, n, from, false);
    this->Store(c, y_[static_cast<uint64_t>(row) * to + column], m, n, to);
  }

  Matrix<T, false> x_;
  GlobalTensor<T> w_, y_;
};

template <typename T>
class GroupedMatmulDw : GroupedBase<T> {
 public:
  __aicore__ inline void Run(GM_ADDR x, GM_ADDR dy, GM_ADDR ends, GM_ADDR dw, const GroupedMatmulTiling &tiling) {
    GlobalTensor<int32_t> ends_at;
    ends_at.SetGlobalBuffer((__gm__ int32_t *)ends);
    x_.SetGlobalBuffer((__gm__ T *)x), dy_.SetGlobalBuffer((__gm__ T *)dy), dw_.SetGlobalBuffer((__gm__ T *)dw);
    from_ = tiling.from, to_ = tiling.to;
    this->Buffers();
    uint32_t first = 0, tile = 0;
    for (uint32_t g = 0; g < tiling.groups; g++) {
      const uint32_t end = ends_at.GetValue(g);
      for (uint32_t i = 0; i < from_; i += TILE)
        for (uint32_t o = 0; o < to_; o += WIDE, tile++)
          if (tile % GetBlockNum() == GetBlockIdx()) Tile(g, first, end - first, i, o);
      first = end;
    }
  }

 private:
  __aicore__ inline void Tile(uint32_t group, uint32_t first, uint32_t rows, uint32_t i, uint32_t o) {
    const uint32_t m = Least(TILE, from_ - i), n = Least(WIDE, to_ - o);
    LocalTensor<float> c = this->result_.template AllocTensor<float>();
    if (rows) {
      Matrix<T, true> x = {x_[static_cast<uint64_t>(first) * from_ + i], from_};
      Matrix<T, false> dy = {dy_[static_cast<uint64_t>(first) * to_ + o], to_};
      this->products_.Multiply(c, x, dy, m, n, rows, false);
    } else {
      this->products_.Zero(c, m, n);
    }
    this->Store(c, dw_[(static_cast<uint64_t>(group) * from_ + i) * to_ + o], m, n, to_);
  }

  GlobalTensor<T> x_, dy_, dw_;
  uint32_t from_, to_;
};

}  // namespace qwen
