// Attention of one query a row over a paged KV cache: definition and tiling.
#include "paged_attention_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenPagedAttention, PagedAttentionTiling)

constexpr uint64_t SPAN = 512, MOST_GROUP = 32, MOST_SIZE = 256, MOST_STRIDE = 65535;  // see op_kernel/paged_attention.h
constexpr uint64_t MOST_NUMBERS = 4096;  // of the spans of a kv head, one for each of its query heads

static ge::graphStatus TilePagedAttention(gert::TilingContext *context) {
  PagedAttentionTiling tiling;
  const uint64_t batch = DimOf(context, 0, 0), heads = DimOf(context, 0, 1), size = DimOf(context, 0, 2);
  const uint64_t page = DimOf(context, 1, 1), kv_heads = DimOf(context, 1, 2), pages = DimOf(context, 3, 1);
  if (batch * heads * size * kv_heads * page * pages * DimOf(context, 1, 0) == 0 || heads % kv_heads)
    return Refuse(context, "no dim may be 0, and K has to divide N");
  if (size > MOST_SIZE) return Refuse(context, "a head has up to 256 elements");
  if (heads / kv_heads > MOST_GROUP) return Refuse(context, "a kv head has up to 32 query heads");
  if (kv_heads * size > MOST_STRIDE) return Refuse(context, "the kv heads of a token have up to 65535 elements");
  const uint64_t spans = (page * pages + SPAN - 1) / SPAN, group = heads / kv_heads;
  const uint64_t padded = RoundUp(static_cast<uint32_t>(group), 8);
  if (spans * padded > MOST_NUMBERS)
    return Refuse(context, "a table has too many tokens: up to 262,144 with 8 query heads a kv head, 131,072 with 16, 65,536 with 32");
  tiling.set_batch(static_cast<uint32_t>(batch));
  tiling.set_heads(static_cast<uint32_t>(heads));
  tiling.set_kv_heads(static_cast<uint32_t>(kv_heads));
  tiling.set_size(static_cast<uint32_t>(size));
  tiling.set_page(static_cast<uint32_t>(page));
  tiling.set_pages(static_cast<uint32_t>(pages));
  tiling.set_scale(*context->GetAttrs()->GetFloat(0));
  const uint32_t blocks = static_cast<uint32_t>(std::min<uint64_t>(batch * kv_heads * spans, CubeCores(context)));
  // Of a block: scores of three spans and weights of two. Of each span of each kv head of a row: the result, and the largest and the sum
  // of each query head.
  const uint64_t width = WidthOf(context->GetInputDesc(0)->GetDataType()), high = RoundUp(static_cast<uint32_t>(group), 16);
  const uint64_t each = high * SPAN * (3 * 4 + 2 * width), row = RoundUp(static_cast<uint32_t>(size), 16);
  const uint64_t shared = batch * kv_heads * spans * (group * row + 2 * padded) * sizeof(float);
  StartTogether(context);
  return Finish(context, tiling, blocks, DtypeKey(context->GetInputDesc(0)->GetDataType()), each * blocks + shared);
}

}  // namespace optiling

namespace ops {

class QwenPagedAttention : public OpDef {
 public:
  explicit QwenPagedAttention(const char *name) : OpDef(name) {
    Declare(*this, {{"q", 'T'}, {"k", 'T'}, {"v", 'T'}, {"table", 'i'}, {"length", 'i'}}, {{"o", 'T'}}, optiling::TilePagedAttention);
    this->Attr("scale").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenPagedAttention);

}  // namespace ops
