// Shared by attention and its gradient: tiles of 128 queries of one head by 64 keys. The cube of a block computes the products, and each of
// its two vector cores the rest for 64 queries. They exchange tiles through global memory, with one flag for each kind of tile. A row of 64
// keys is one repeat. Results with more than 128 elements a head have two panels of up to 128 columns, each a tile of its own.
#pragma once
#include "mixed.h"

namespace qwen {

constexpr uint32_t ROWS = 128, KEYS = 64;  // queries of a tile; keys of a tile

template <typename T>
struct Inputs {
  GlobalTensor<T> q, k, v;
  GlobalTensor<int32_t> segment, key_segment, order, key_order;
  uint32_t batch, S, keys, heads, kv_heads, size;
  uint32_t panels;  // of a head
  bool in_order;
  float scale;

  __aicore__ inline void Init(GM_ADDR q_at, GM_ADDR k_at, GM_ADDR v_at, GM_ADDR segment_at, GM_ADDR key_segment_at, GM_ADDR order_at,
                              GM_ADDR key_order_at, const AttentionTiling &t) {
    q.SetGlobalBuffer((__gm__ T *)q_at), k.SetGlobalBuffer((__gm__ T *)k_at), v.SetGlobalBuffer((__gm__ T *)v_at);
    segment.SetGlobalBuffer((__gm__ int32_t *)segment_at), key_segment.SetGlobalBuffer((__gm__ int32_t *)key_segment_at);
    order.SetGlobalBuffer((__gm__ int32_t *)order_at), key_order.SetGlobalBuffer((__gm__ int32_t *)key_order_at);
    batch = t.batch, S = t.queries, keys = t.keys, heads = t.heads, kv_heads = t.kv_heads, size = t.size;
    panels = (size + TILE - 1) / TILE, in_order = t.in_order, scale = t.scale;
  }
  // Places of a query's or a key's head, and how far apart two of a row are.
  __aicore__ inline uint64_t Query(uint32_t b, uint32_t s, uint32_t head) const {
    return ((static_cast<uint64_t>(b) * S + s) * heads + head) * size;
  }
  __aicore__ inline uint64_t Key(uint32_t b, uint32_t t, uint32_t head) const {
    return ((static_cast<uint64_t>(b) * keys + t) * kv_heads + head) * size;
  }
  __aicore__ inline uint32_t QueryStride() const { return heads * size; }
  __aicore__ inline uint32_t KeyStride() const { return kv_heads * size; }
  __aicore__ inline uint32_t PanelSize(uint32_t panel) const { return Least(TILE, size - panel * TILE); }
  // The keys that queries up to `last` may see.
  __aicore__ inline uint32_t KeysFor(uint32_t last) const { return in_order ? Least(keys, last + 1) : keys; }
};

}  // namespace qwen
