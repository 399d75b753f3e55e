// silu(gate) * up and its gradient: definitions and tiling.
#include "swiglu_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenSwiglu, SwigluTiling)
REGISTER_TILING_DATA_CLASS(QwenSwigluGrad, SwigluTiling)

constexpr uint32_t MOST = 4096;  // elements: 44 bytes each in the gradient's buffers, 176 KiB of 192

static ge::graphStatus TileSwiglu(gert::TilingContext *context) {
  SwigluTiling tiling;
  const uint64_t size = SizeOf(context, 0);
  if (size == 0 || size != static_cast<uint64_t>(SizeOf(context, 1)))
    return Refuse(context, "gate and up have to have one shape, and elements");
  const uint64_t each = (size + VectorCores(context) - 1) / VectorCores(context);
  const uint32_t tile = static_cast<uint32_t>(std::min<uint64_t>(MOST, (each + 63) / 64 * 64));
  const uint32_t tiles = static_cast<uint32_t>((size + tile - 1) / tile);
  tiling.set_tiles(tiles);
  tiling.set_tile(tile);
  tiling.set_size(size);
  return Finish(context, tiling, std::min(VectorCores(context), tiles), DtypeKey(context->GetInputDesc(0)->GetDataType()));
}

}  // namespace optiling

namespace ops {

class QwenSwiglu : public OpDef {
 public:
  explicit QwenSwiglu(const char *name) : OpDef(name) { Declare(*this, {{"gate", 'T'}, {"up", 'T'}}, {{"y", 'T'}}, optiling::TileSwiglu); }
};
OP_ADD(QwenSwiglu);

class QwenSwigluGrad : public OpDef {
 public:
  explicit QwenSwigluGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"gate", 'T'}, {"up", 'T'}, {"dy", 'T'}}, {{"dgate", 'T'}, {"dup", 'T'}}, optiling::TileSwiglu);
  }
};
OP_ADD(QwenSwigluGrad);

}  // namespace ops
