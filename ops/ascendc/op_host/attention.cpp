// Flash attention and its gradient: definitions and tiling.
#include "attention_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenAttention, AttentionTiling)
REGISTER_TILING_DATA_CLASS(QwenAttentionGrad, AttentionTiling)

constexpr uint64_t ROWS = 128, KEYS = 64, SPAN = 512, PANEL = 128, MOST_SIZE = 256, MOST_STRIDE = 65535;  // see op_kernel/attention_*.h

static ge::graphStatus TileAttention(gert::TilingContext *context, bool grad) {
  AttentionTiling tiling;
  const uint64_t batch = DimOf(context, 0, 0), queries = DimOf(context, 0, 1), heads = DimOf(context, 0, 2), size = DimOf(context, 0, 3);
  const uint64_t keys = DimOf(context, 1, 1), kv_heads = DimOf(context, 1, 2);
  if (batch * queries * heads * keys * kv_heads * size == 0 || heads % kv_heads)
    return Refuse(context, "no dim may be 0, and K has to divide N");
  if (size > MOST_SIZE) return Refuse(context, "a head has up to 256 elements");
  if (heads * size > MOST_STRIDE) return Refuse(context, "the heads of a token have up to 65535 elements");
  tiling.set_batch(batch);
  tiling.set_queries(queries);
  tiling.set_keys(keys);
  tiling.set_heads(heads);
  tiling.set_kv_heads(kv_heads);
  tiling.set_size(size);
  tiling.set_scale(*context->GetAttrs()->GetFloat(0));
  const int64_t in_order = *context->GetAttrs()->GetInt(1);
  if (in_order && queries != keys) return Refuse(context, "rows in order have as many queries as keys");
  tiling.set_in_order(static_cast<uint32_t>(in_order));
  const uint64_t panels = (size + PANEL - 1) / PANEL;
  const uint64_t tasks = grad ? batch * heads : batch * heads * ((queries + ROWS - 1) / ROWS);
  const uint32_t blocks = static_cast<uint32_t>(std::min<uint64_t>(tasks, CubeCores(context)));
  // Of a block: scores of three spans, weights and results of two; of the gradient scores and their gradients of three spans, p and ds of
  // two.
  const uint64_t width = WidthOf(context->GetInputDesc(0)->GetDataType());
  const uint64_t each =
      grad ? KEYS * (256 / width) * (6 * 4 + 4 * width) : ROWS * SPAN * (3 * 4 + 2 * width) + 2 * ROWS * panels * PANEL * 4;
  // Of all: the ranges of segments and orders; of the gradient deltas, and sums of dq and of each query head's dk and dv.
  const uint64_t unit = grad ? KEYS : SPAN, ranges = batch * ((queries + ROWS - 1) / ROWS + (keys + unit - 1) / unit) * 4 * 4;
  const uint64_t row = RoundUp(static_cast<uint32_t>(size), 16), delta = RoundUp(static_cast<uint32_t>(queries), 8);
  const uint64_t shared = ranges + (grad ? batch * heads * (delta + (queries + 2 * keys) * row) * 4 : 0);
  StartTogether(context);
  return Finish(context, tiling, blocks, DtypeKey(context->GetInputDesc(0)->GetDataType()), each * blocks + shared);
}

static ge::graphStatus TileForward(gert::TilingContext *context) { return TileAttention(context, false); }
static ge::graphStatus TileGrad(gert::TilingContext *context) { return TileAttention(context, true); }

}  // namespace optiling

namespace ops {

// lse is [B, N, S], and so is its cotangent.
class QwenAttention : public OpDef {
 public:
  explicit QwenAttention(const char *name) : OpDef(name) {
    Declare(*this, {{"q", 'T'}, {"k", 'T'}, {"v", 'T'}, {"segment", 'i'}, {"key_segment", 'i'}, {"order", 'i'}, {"key_order", 'i'}},
            {{"o", 'T'}, {"lse", 'f'}}, optiling::TileForward);
    this->Attr("scale").AttrType(REQUIRED).Float();
    this->Attr("in_order").AttrType(REQUIRED).Int();
  }
};
OP_ADD(QwenAttention);

class QwenAttentionGrad : public OpDef {
 public:
  explicit QwenAttentionGrad(const char *name) : OpDef(name) {
    Declare(*this,
            {{"q", 'T'},
             {"k", 'T'},
             {"v", 'T'},
             {"segment", 'i'},
             {"key_segment", 'i'},
             {"order", 'i'},
             {"key_order", 'i'},
             {"o", 'T'},
             {"lse", 'f'},
             {"dout", 'T'},
             {"dlse", 'f'}},
            {{"dq", 'T'}, {"dk", 'T'}, {"dv", 'T'}}, optiling::TileGrad);
    this->Attr("scale").AttrType(REQUIRED).Float();
    this->Attr("in_order").AttrType(REQUIRED).Int();
  }
};
OP_ADD(QwenAttentionGrad);

}  // namespace ops
