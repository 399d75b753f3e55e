// RMS norm of rows, of a sum of two, and their gradients: definitions and tiling.
#include "rms_norm_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenRmsNorm, RmsNormTiling)
REGISTER_TILING_DATA_CLASS(QwenAddRmsNorm, RmsNormTiling)
REGISTER_TILING_DATA_CLASS(QwenRmsNormGrad, RmsNormTiling)
REGISTER_TILING_DATA_CLASS(QwenAddRmsNormGrad, RmsNormTiling)

constexpr uint32_t MOST_ROWS = 64;   // of a tile: enough for long copies
// Fixed by the shape, so that the sums do not depend on the number of cores; 40 and 48 of them get equal shares.
constexpr uint32_t MOST_PARTS = 240;

// ins, outs: the arrays of rows; plain: the float32 rows beside them, of one row or of a tile.
static ge::graphStatus TileRows(gert::TilingContext *context, uint32_t w, uint32_t ins, uint32_t outs, uint32_t row_plain, uint32_t plain,
                                bool grad) {
  RmsNormTiling tiling;
  const ge::DataType type = context->GetInputDesc(0)->GetDataType();
  const uint32_t width = WidthOf(type), n = static_cast<uint32_t>(DimOf(context, 0, -1));
  const uint32_t rows = n ? static_cast<uint32_t>(SizeOf(context, 0) / n) : 0, padded = RoundUp(n, BLOCK_BYTES / width);
  if (rows == 0 || SizeOf(context, w) != n) return Refuse(context, "w has to have the size of a row, and there has to be one");
  const uint32_t wide = width == 4 ? 0 : 4, room = UbBytes(context) - UB_SPARE, fixed = padded * (row_plain * 4 + width + wide);
  uint32_t tile = 0, buffers = 2;
  for (; buffers; buffers--) {
    const uint32_t row = padded * ((ins + outs) * (buffers * width + wide) + plain * 4) + 3 * BLOCK_BYTES;
    const uint32_t work = RoundUp((n + 7) / 8, 8) * 4;
    tile = fixed + work < room ? (room - fixed - work) / row : 0;
    if (tile) break;
  }
  if (tile == 0) return Refuse(context, "a row is too long: its buffers do not fit UB");
  const uint32_t blocks = std::min(VectorCores(context), rows);
  tiling.set_rows(rows);
  tiling.set_n(n);
  tiling.set_tile(std::min({tile, MOST_ROWS, (rows + blocks - 1) / blocks}));
  tiling.set_buffers(buffers);
  tiling.set_parts(std::min(MOST_PARTS, rows));
  tiling.set_eps(*context->GetAttrs()->GetFloat(0));
  if (grad) StartTogether(context);
  const size_t workspace = grad ? static_cast<size_t>(std::min(MOST_PARTS, rows)) * RoundUp(n, 8) * sizeof(float) : 0;
  return Finish(context, tiling, blocks, DtypeKey(type), workspace);
}

static ge::graphStatus TileNorm(gert::TilingContext *context) { return TileRows(context, 1, 1, 1, 0, 0, false); }
static ge::graphStatus TileAddNorm(gert::TilingContext *context) { return TileRows(context, 2, 2, 2, 0, 0, false); }
static ge::graphStatus TileNormGrad(gert::TilingContext *context) { return TileRows(context, 1, 2, 1, 1, 1, true); }
static ge::graphStatus TileAddNormGrad(gert::TilingContext *context) { return TileRows(context, 1, 2, 1, 1, 1, true); }

}  // namespace optiling

namespace ops {

class QwenRmsNorm : public OpDef {
 public:
  explicit QwenRmsNorm(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"w", 'T'}}, {{"y", 'T'}}, optiling::TileNorm);
    this->Attr("eps").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenRmsNorm);

class QwenAddRmsNorm : public OpDef {
 public:
  explicit QwenAddRmsNorm(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"y", 'T'}, {"w", 'T'}}, {{"h", 'T'}, {"normed", 'T'}}, optiling::TileAddNorm);
    this->Attr("eps").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenAddRmsNorm);

class QwenRmsNormGrad : public OpDef {
 public:
  explicit QwenRmsNormGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"w", 'T'}, {"dy", 'T'}}, {{"dx", 'T'}, {"dw", 'T'}}, optiling::TileNormGrad);
    this->Attr("eps").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenRmsNormGrad);

class QwenAddRmsNormGrad : public OpDef {
 public:
  explicit QwenAddRmsNormGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"h", 'T'}, {"w", 'T'}, {"dnormed", 'T'}, {"dh", 'T'}}, {{"dx", 'T'}, {"dw", 'T'}}, optiling::TileAddNormGrad);
    this->Attr("eps").AttrType(REQUIRED).Float();
  }
};
OP_ADD(QwenAddRmsNormGrad);

}  // namespace ops
