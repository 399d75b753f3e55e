// The terms of cross-entropy over rows of logits, and their gradient: definitions and tiling.
#include "cross_entropy_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenCrossEntropy, CrossEntropyTiling)
REGISTER_TILING_DATA_CLASS(QwenCrossEntropyGrad, CrossEntropyTiling)

constexpr uint32_t MOST = 8192;  // columns: 20 bytes each, 160 KiB of 192

static ge::graphStatus TileRows(gert::TilingContext *context) {
  CrossEntropyTiling tiling;
  const uint32_t rows = static_cast<uint32_t>(DimOf(context, 0, 0)), columns = static_cast<uint32_t>(DimOf(context, 0, 1));
  if (rows == 0 || columns == 0 || SizeOf(context, 1) != rows) return Refuse(context, "z has to be [R, V], neither 0, and `at` [R]");
  tiling.set_rows(rows);
  tiling.set_columns(columns);
  tiling.set_tile(std::min(MOST, RoundUp(columns, 8)));
  return Finish(context, tiling, std::min(VectorCores(context), rows), 0);
}

}  // namespace optiling

namespace ops {

class QwenCrossEntropy : public OpDef {
 public:
  explicit QwenCrossEntropy(const char *name) : OpDef(name) {
    Declare(*this, {{"z", 'f'}, {"at", 'i'}}, {{"top", 'f'}, {"total", 'f'}, {"picked", 'f'}}, optiling::TileRows);
  }
};
OP_ADD(QwenCrossEntropy);

class QwenCrossEntropyGrad : public OpDef {
 public:
  explicit QwenCrossEntropyGrad(const char *name) : OpDef(name) {
    Declare(*this, {{"z", 'f'}, {"at", 'i'}, {"top", 'f'}, {"dtotal", 'f'}, {"dpicked", 'f'}}, {{"dz", 'f'}}, optiling::TileRows);
  }
};
OP_ADD(QwenCrossEntropyGrad);

}  // namespace ops
