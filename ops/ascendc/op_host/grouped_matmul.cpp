// Products of rows with the matrices of their groups, and the two gradients: definitions and tiling.
#include "grouped_matmul_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenGroupedMatmul, GroupedMatmulTiling)
REGISTER_TILING_DATA_CLASS(QwenGroupedMatmulDx, GroupedMatmulTiling)
REGISTER_TILING_DATA_CLASS(QwenGroupedMatmulDw, GroupedMatmulTiling)

constexpr uint32_t HIGH = 128, WIDE = 256, MOST_STRIDE = 65535;  // of a tile; between two rows

static ge::graphStatus Tile(gert::TilingContext *context, uint32_t groups, uint32_t from, uint32_t to, uint32_t rows, bool of_weights) {
  GroupedMatmulTiling tiling;
  if (groups == 0 || from == 0 || to == 0 || rows == 0) return Refuse(context, "there have to be rows, groups and columns");
  if (from > MOST_STRIDE || to > MOST_STRIDE) return Refuse(context, "a matrix has up to 65535 rows and columns");
  tiling.set_groups(groups);
  tiling.set_from(from);
  tiling.set_to(to);
  const uint64_t high = ((of_weights ? from : rows) + HIGH - 1) / HIGH, wide = (std::max(from, to) + WIDE - 1) / WIDE;
  const uint32_t tiles = static_cast<uint32_t>(std::min<uint64_t>(high * wide * groups, CubeCores(context)));
  return Finish(context, tiling, std::max(1u, tiles), DtypeKey(context->GetInputDesc(0)->GetDataType()));
}

// x [R, i], w [E, i, o], ends [E]
static ge::graphStatus TileForward(gert::TilingContext *context) {
  return Tile(context, DimOf(context, 1, 0), DimOf(context, 1, 1), DimOf(context, 1, 2), DimOf(context, 0, 0), false);
}
// x [R, i], dy [R, o], ends [E]
static ge::graphStatus TileWeights(gert::TilingContext *context) {
  return Tile(context, DimOf(context, 2, 0), DimOf(context, 0, 1), DimOf(context, 1, 1), DimOf(context, 0, 0), true);
}

}  // namespace optiling

namespace ops {

class QwenGroupedMatmul : public OpDef {
 public:
  explicit QwenGroupedMatmul(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"w", 'T'}, {"ends", 'i'}}, {{"y", 'T'}}, optiling::TileForward);
  }
};
OP_ADD(QwenGroupedMatmul);

class QwenGroupedMatmulDx : public OpDef {
 public:
  explicit QwenGroupedMatmulDx(const char *name) : OpDef(name) {
    Declare(*this, {{"dy", 'T'}, {"w", 'T'}, {"ends", 'i'}}, {{"dx", 'T'}}, optiling::TileForward);
  }
};
OP_ADD(QwenGroupedMatmulDx);

class QwenGroupedMatmulDw : public OpDef {
 public:
  explicit QwenGroupedMatmulDw(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'T'}, {"dy", 'T'}, {"ends", 'i'}}, {{"dw", 'T'}}, optiling::TileWeights);
  }
};
OP_ADD(QwenGroupedMatmulDw);

}  // namespace ops
