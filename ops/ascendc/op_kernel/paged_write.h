// Copies rows into their slots of a paged KV cache. A row with a slot outside the cache is dropped.
#pragma once
#include "device.h"

namespace qwen {

template <typename T>
class PagedWrite {
 public:
  __aicore__ inline void Run(GM_ADDR cache, GM_ADDR fresh, GM_ADDR slot, GM_ADDR done, const PagedWriteTiling &tiling) {
    width_ = tiling.width, slots_ = tiling.slots;
    cache_.SetGlobalBuffer((__gm__ T *)cache), fresh_.SetGlobalBuffer((__gm__ T *)fresh), slot_.SetGlobalBuffer((__gm__ int32_t *)slot);
    done_.SetGlobalBuffer((__gm__ int32_t *)done);
    pipe_.InitBuffer(row_, 4, COLUMNS * sizeof(T)), pipe_.InitBuffer(zero_, 1, 32);
    if (GetBlockIdx() == 0) Done();
    const Share mine = ShareOf(tiling.rows, GetBlockIdx(), GetBlockNum());
    for (uint32_t c = 0; c < width_; c += COLUMNS) {
      const uint32_t n = Least(COLUMNS, width_ - c);
      uint32_t ahead = mine.begin;
      for (uint32_t r = mine.begin; r < mine.end; r++) {
        for (; ahead < mine.end && ahead < r + AHEAD; ahead++) Load(static_cast<uint64_t>(ahead) * width_ + c, n);
        Store(slot_.GetValue(r), c, n);
      }
    }
  }

 private:
  static constexpr uint32_t COLUMNS = 4096, AHEAD = 4;  // of a row at a time; rows that are loaded before the first is stored

  __aicore__ inline void Done() {
    LocalTensor<int32_t> zero = zero_.AllocTensor<int32_t>();
    Duplicate(zero, 0, static_cast<int32_t>(FLOATS));
    zero_.EnQue(zero);
    zero = zero_.DeQue<int32_t>();
    DataCopyPad(done_, zero, DataCopyExtParams{1, sizeof(int32_t), 0, 0, 0});
    zero_.FreeTensor(zero);
  }
  __aicore__ inline void Load(uint64_t at, uint32_t n) {
    LocalTensor<T> row = row_.template AllocTensor<T>();
    DataCopyPad(row, fresh_[at], DataCopyExtParams{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0},
                DataCopyPadExtParams<T>{false, 0, 0, T()});
    row_.EnQue(row);
  }
  __aicore__ inline void Store(int32_t slot, uint32_t column, uint32_t n) {
    LocalTensor<T> row = row_.template DeQue<T>();
    if (static_cast<uint32_t>(slot) < slots_)  // which those below 0 are not either
      DataCopyPad(cache_[static_cast<uint64_t>(slot) * width_ + column], row,
                  DataCopyExtParams{1, static_cast<uint32_t>(n * sizeof(T)), 0, 0, 0});
    row_.FreeTensor(row);
  }

  TPipe pipe_;
  GlobalTensor<T> cache_, fresh_;
  GlobalTensor<int32_t> slot_, done_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, AHEAD> row_;
  TQue<TPosition::VECOUT, 1> zero_;
  uint32_t width_, slots_;
};

}  // namespace qwen
