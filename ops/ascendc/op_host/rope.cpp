// Rotary embedding, alone and after an RMS norm of each head, and their gradients: definitions and tiling.
#include "rope_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenRope, RopeTiling)
REGISTER_TILING_DATA_CLASS(QwenRopeNorm, RopeTiling)
REGISTER_TILING_DATA_CLASS(QwenRopeNormGrad, RopeTiling)

constexpr uint32_t MOST_HEADS = 248;  // rows of one instruction, which has up to 255 repeats
constexpr uint32_t MOST_PARTS = 240;  // see rms_norm.cpp

// queues: the arrays of heads that come and go; plain: float32 ones beside them; vectors: numbers beside each head.
static ge::graphStatus TileHeads(gert::TilingContext *context, uint32_t queues, uint32_t plain, uint32_t vectors, bool grad) {
  RopeTiling tiling;
  const bool normed = vectors > 0;
  tiling.set_sign(normed ? 1 : static_cast<int32_t>(*context->GetAttrs()->GetInt(0)));
  tiling.set_eps(normed ? *context->GetAttrs()->GetFloat(0) : 0.0f);
  const ge::DataType type = context->GetInputDesc(0)->GetDataType();
  const uint32_t width = WidthOf(type), heads = static_cast<uint32_t>(DimOf(context, 0, 2)),
                 size = static_cast<uint32_t>(DimOf(context, 0, 3));
  const uint32_t tokens = static_cast<uint32_t>(DimOf(context, 0, 0) * DimOf(context, 0, 1)), half = size / 2;
  if (tokens == 0 || heads == 0 || half == 0 || size % 2) return Refuse(context, "x has to be [B, S, N, H], none of them 0, H even");
  if (heads > MOST_HEADS || half > 2040) return Refuse(context, "there are up to 248 heads of up to 4080");
  const uint32_t padded = RoundUp(half, BLOCK_BYTES / width), wide = width == 4 ? 0 : 4;
  const uint32_t head = 2 * padded * (queues * (2 * width + wide) + plain * 4) + vectors * 4, angle = 4 * RoundUp(half, 8) * 4;
  const uint32_t fixed = 4 * padded * (8 + width), room = UbBytes(context) - UB_SPARE;
  const uint32_t fit = fixed < room ? (room - fixed) / (heads * head + angle) : 0;
  if (fit == 0) return Refuse(context, "the heads of a token do not fit UB");
  const uint32_t parts = std::min(MOST_PARTS, tokens), cores = VectorCores(context), blocks = std::min(cores, grad ? parts : tokens);
  const uint32_t each = grad ? (tokens + parts - 1) / parts : (tokens + blocks - 1) / blocks;
  tiling.set_tokens(tokens);
  tiling.set_heads(heads);
  tiling.set_half(half);
  tiling.set_tile(std::min({fit, MOST_HEADS / heads, each}));
  tiling.set_parts(parts);
  if (grad) StartTogether(context);
  return Finish(context, tiling, blocks, DtypeKey(type), grad ? parts * RoundUp(size, 8) * sizeof(float) : 0);
}

static ge::graphStatus TileRope(gert::TilingContext *context) { return TileHeads(context, 2, 1, 0, false); }
static ge::graphStatus TileNorm(gert::TilingContext *context) { return TileHeads(context, 2, 1, 12, false); }
static ge::graphStatus TileNormGrad(gert::TilingContext *context) { return TileHeads(context, 3, 2, 24, true); }

}  // namespace optiling

namespace ops {

class QwenRope : public OpDef {
 public:
  explicit QwenRope(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"cos", 'f'}, {"sin", 'f'}}, {{"y", 'T'}}, optiling::TileRope);
    this->Attr("sign").AttrType(REQUIRED).Int();
  }
};
OP_ADD(QwenRope);

class QwenRopeNorm : public OpDef {
 public:
  explicit QwenRopeNorm(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"w", 'T'}, {"cos", 'f'}, {"sin", 'f'}}, {{"y", 'T'}}, optiling::TileNorm);
    this->Attr("eps").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenRopeNorm);

class QwenRopeNormGrad : public OpDef {
 public:
  explicit QwenRopeNormGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"w", 'T'}, {"cos", 'f'}, {"sin", 'f'}, {"dy", 'T'}}, {{"dx", 'T'}, {"dw", 'T'}}, optiling::TileNormGrad);
    this->Attr("eps").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenRopeNormGrad);

}  // namespace ops
