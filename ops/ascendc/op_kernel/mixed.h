// Shared by kernels in which the cube of a block computes products and each of its two vector cores the rest for a part of the rows. They
// exchange tiles through global memory, with a flag for each kind of tile.
#pragma once
#include "product.h"

namespace qwen {

constexpr uint32_t HALF = 64;    // rows of a tile of 128 that are a vector core's
constexpr float HIDE = -1e9f;    // added to a score, so that exp of it is 0

// Flags between the cores of a block.
constexpr uint16_t SCORES_READY = 0, WEIGHTS_READY = 1, RESULT_READY = 2;

// The rows of a tile that are this vector core's: `rows` from `first`, which may be none, behind `skipped` of the tile.
struct Mine {
  uint32_t first, rows, skipped;
};
__aicore__ inline Mine MineOf(uint32_t first, uint32_t rows, uint32_t half = HALF) {
  const uint32_t skipped = GetSubBlockIdx() * half;
  return {first + skipped, rows > skipped ? Least(half, rows - skipped) : 0, skipped};
}

__aicore__ inline uint64_t BlockOf() {
  if ASCEND_IS_AIC return GetBlockIdx();
  return GetBlockIdx() / 2;
}

// Numbers of rows, as a block each.
__aicore__ inline void SpreadRows(const LocalTensor<float> &to, const LocalTensor<float> &numbers, uint32_t rows) {
  VectorBarrier();
  Brcb(to, numbers, static_cast<uint8_t>(AlignUp(rows, FLOATS) / FLOATS), {1, 8});
  VectorBarrier();
}

}  // namespace qwen
