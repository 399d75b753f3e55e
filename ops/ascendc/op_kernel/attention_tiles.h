// Shared by attention and its gradient: tiles of 128 queries of one head by 64 keys. The cube of a block computes the products, and each of
// its two vector cores the rest for 64 queries. They exchange tiles through global memory, with one flag for each kind of tile. A row of 64
// keys is one repeat. Results with more than 128 elements a head have two panels of up to 128 columns, each a tile of its own.
#pragma once
#include "product.h"

namespace qwen {

constexpr uint32_t ROWS = 128, HALF = 64, KEYS = 64;  // queries of a tile, and of a vector core; keys of a tile
constexpr float HIDE = -1e9f;                         // added to a score, so that exp of it is 0

// Flags between the cores of a block.
constexpr uint16_t SCORES_READY = 0, WEIGHTS_READY = 1, RESULT_READY = 2;

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

// The queries of a tile that are this vector core's: `rows` from `first`, which may be none, behind `skipped` of the tile.
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

// Which keys a vector core's queries do not see: 1 for those of another segment or of a later order, else 0. Orders are below 2^30.
class Hidden {
 public:
  __aicore__ inline void Init(TPipe &pipe) {
    pipe.InitBuffer(ints_, 2, HALF * sizeof(int32_t));
    pipe.InitBuffer(segments_, HALF * 32), pipe.InitBuffer(orders_, HALF * 32), pipe.InitBuffer(keys_, 2 * KEYS * sizeof(int32_t));
    pipe.InitBuffer(hidden_, HALF * KEYS * sizeof(float)), pipe.InitBuffer(spare_, HALF * KEYS * sizeof(float));
  }
  template <typename T>
  __aicore__ inline void Queries(const Inputs<T> &in, uint32_t b, Mine mine) {
    Load(in.segment[static_cast<uint64_t>(b) * in.S + mine.first], mine.rows, segments_.Get<int32_t>(), true);
    Load(in.order[static_cast<uint64_t>(b) * in.S + mine.first], mine.rows, orders_.Get<int32_t>(), true);
  }
  template <typename T>
  __aicore__ inline void Keys(const Inputs<T> &in, uint32_t b, uint32_t first, uint32_t keys) {
    LocalTensor<int32_t> both = keys_.Get<int32_t>();
    Load(in.key_segment[static_cast<uint64_t>(b) * in.keys + first], keys, both, false);
    Load(in.key_order[static_cast<uint64_t>(b) * in.keys + first], keys, both[KEYS], false);
  }
  // [rows, KEYS], of the queries and keys last loaded
  __aicore__ inline LocalTensor<float> Of(uint32_t rows, uint32_t keys) {
    const uint32_t count = rows * KEYS;
    const uint8_t repeats = rows;
    LocalTensor<float> hidden = hidden_.Get<float>(), later = spare_.Get<float>();
    LocalTensor<int32_t> a = hidden.ReinterpretCast<int32_t>(), b = later.ReinterpretCast<int32_t>(), key = keys_.Get<int32_t>();
    VectorBarrier();
    Sub(a, key, segments_.Get<int32_t>(), static_cast<uint64_t>(keys), repeats, {1, 1, 0, 8, 0, 1});
    Sub(b, key[KEYS], orders_.Get<int32_t>(), static_cast<uint64_t>(keys), repeats, {1, 1, 0, 8, 0, 1});
    VectorBarrier();
    Cast(hidden, a, RoundMode::CAST_RINT, count);
    Cast(later, b, RoundMode::CAST_RINT, count);
    VectorBarrier();
    Abs(hidden, hidden, count);
    Maxs(later, later, 0.0f, count);
    VectorBarrier();
    Max(hidden, hidden, later, count);
    VectorBarrier();
    Mins(hidden, hidden, 1.0f, count);
    VectorBarrier();
    return hidden;
  }
  __aicore__ inline LocalTensor<float> Spare() { return spare_.Get<float>(); }

 private:
  // n numbers, each as a block if `spread`
  __aicore__ inline void Load(const GlobalTensor<int32_t> &from, uint32_t n, const LocalTensor<int32_t> &to, bool spread) {
    LocalTensor<int32_t> tile = ints_.AllocTensor<int32_t>();
    DataCopyPad(tile, from, DataCopyExtParams{1, static_cast<uint32_t>(n * sizeof(int32_t)), 0, 0, 0},
                DataCopyPadExtParams<int32_t>{false, 0, 0, 0});
    ints_.EnQue(tile);
    tile = ints_.DeQue<int32_t>();
    VectorBarrier();
    if (spread)
      Brcb(to, tile, static_cast<uint8_t>(AlignUp(n, FLOATS) / FLOATS), {1, 8});
    else
      Adds(to, tile, 0, n);
    ints_.FreeTensor(tile);
  }
  TQue<TPosition::VECIN, 1> ints_;
  TBuf<TPosition::VECCALC> segments_, orders_, keys_, hidden_, spare_;
};

}  // namespace qwen
