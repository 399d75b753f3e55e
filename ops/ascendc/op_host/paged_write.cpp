// Writes into a paged KV cache: definition and tiling.
#include "paged_write_tiling.h"

#include "host.h"

namespace optiling {

REGISTER_TILING_DATA_CLASS(QwenPagedWrite, PagedWriteTiling)

static ge::graphStatus TilePagedWrite(gert::TilingContext *context) {
  PagedWriteTiling tiling;
  const uint64_t slots = DimOf(context, 0, 0) * DimOf(context, 0, 1), width = DimOf(context, 0, 2) * DimOf(context, 0, 3);
  const uint32_t rows = static_cast<uint32_t>(DimOf(context, 1, 0));
  if (rows * width * slots == 0) return Refuse(context, "no dim may be 0");
  if (slots > INT32_MAX) return Refuse(context, "a slot is an int32");
  tiling.set_rows(rows);
  tiling.set_width(static_cast<uint32_t>(width));
  tiling.set_slots(static_cast<uint32_t>(slots));
  return Finish(context, tiling, std::min(VectorCores(context), rows), DtypeKey(context->GetInputDesc(0)->GetDataType()));
}

}  // namespace optiling

namespace ops {

// The cache is written to. `done` is for those who wait for that.
class QwenPagedWrite : public OpDef {
 public:
  explicit QwenPagedWrite(const char *name) : OpDef(name) {
    Declare(*this, {{"cache", 'T'}, {"fresh", 'T'}, {"slot", 'i'}}, {{"done", 'i'}}, optiling::TilePagedWrite);
  }
};
OP_ADD(QwenPagedWrite);

}  // namespace ops
