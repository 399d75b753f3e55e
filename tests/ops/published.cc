// Kernels whose times on Ascend 910B are published, written from their descriptions: copies of a matrix into UB and into L1 in tiles, and
// an addition of two arrays in pieces. Their attributes are the sizes.
#include "host.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(PublishedTiling)
TILING_DATA_FIELD_DEF(uint32_t, rows);     // of a tile; of the addition: the buffers of a queue
TILING_DATA_FIELD_DEF(uint32_t, columns);  // of a tile; of the addition: the elements of a piece
TILING_DATA_FIELD_DEF(uint64_t, size);     // columns of the matrix; elements of the arrays
END_TILING_DATA_DEF;

static ge::graphStatus Tile(gert::TilingContext *context) {
  PublishedTiling tiling;
  tiling.set_rows(*context->GetAttrs()->GetInt(0));
  tiling.set_columns(*context->GetAttrs()->GetInt(1));
  tiling.set_size(*context->GetAttrs()->GetInt(2));
  return Finish(context, tiling, *context->GetAttrs()->GetInt(3), 0);
}

}  // namespace optiling

namespace ops {
template <typename F>
static void Describe(OpDef &def, F declare) {
  declare();
  for (const char *name : {"rows", "columns", "size", "blocks"}) def.Attr(name).AttrType(REQUIRED).Int();
}
class Copies : public OpDef {
 public:
  explicit Copies(const char *name) : OpDef(name) {
    Describe(*this, [this] { Declare(*this, {{"x", 'T'}}, {{"y", 'T'}}, optiling::Tile); });
  }
};
OP_ADD(Copies);
class CopiesToL1 : public OpDef {
 public:
  explicit CopiesToL1(const char *name) : OpDef(name) {
    Describe(*this, [this] { Declare(*this, {{"x", 'T'}}, {{"y", 'T'}}, optiling::Tile); });
  }
};
OP_ADD(CopiesToL1);
class Addition : public OpDef {
 public:
  explicit Addition(const char *name) : OpDef(name) {
    Describe(*this, [this] { Declare(*this, {{"x", 'T'}, {"y", 'T'}}, {{"z", 'T'}}, optiling::Tile); });
  }
};
OP_ADD(Addition);
}  // namespace ops

using namespace optiling;
#include "product.h"

using namespace qwen;

// Each core copies its rows of a square matrix, tile by tile, to one place.
extern "C" void copies(GM_ADDR x, GM_ADDR, GM_ADDR, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PublishedTiling, t, tiling);
  TPipe pipe;
  TBuf<TPosition::VECCALC> to;
  pipe.InitBuffer(to, t.rows * t.columns * 2);
  GlobalTensor<half> from;
  from.SetGlobalBuffer((__gm__ half *)x);
  const Share mine = ShareOf(t.size, GetBlockIdx(), GetBlockNum());
  for (uint32_t c = 0; c < t.size; c += t.columns)
    for (uint32_t r = mine.begin; r < mine.end; r += t.rows)
      DataCopyPad(to.Get<half>(), from[static_cast<uint64_t>(r) * t.size + c],
                  DataCopyExtParams{static_cast<uint16_t>(t.rows), t.columns * 2, static_cast<uint32_t>(t.size - t.columns) * 2, 0, 0},
                  DataCopyPadExtParams<half>{false, 0, 0, 0});
}

extern "C" void copies_to_l1(GM_ADDR x, GM_ADDR, GM_ADDR, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PublishedTiling, t, tiling);
  TPipe pipe;
  TQue<TPosition::A1, 1> to;
  pipe.InitBuffer(to, 1, t.rows * t.columns * 2);
  GlobalTensor<half> from;
  from.SetGlobalBuffer((__gm__ half *)x);
  const Share mine = ShareOf(t.size, GetBlockIdx(), GetBlockNum());
  LocalTensor<half> tile = to.AllocTensor<half>();
  for (uint32_t c = 0; c < t.size; c += t.columns)
    for (uint32_t r = mine.begin; r < mine.end; r += t.rows)
      ToL1(tile, from[static_cast<uint64_t>(r) * t.size + c], t.rows, t.columns, t.size);
  to.FreeTensor(tile);
}

extern "C" void addition(GM_ADDR x, GM_ADDR y, GM_ADDR z, GM_ADDR, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PublishedTiling, t, tiling);
  TPipe pipe;
  TQue<TPosition::VECIN, 1> x_in, y_in;
  TQue<TPosition::VECOUT, 1> z_out;
  pipe.InitBuffer(x_in, t.rows, t.columns * 2), pipe.InitBuffer(y_in, t.rows, t.columns * 2), pipe.InitBuffer(z_out, t.rows, t.columns * 2);
  GlobalTensor<half> from_x, from_y, to;
  from_x.SetGlobalBuffer((__gm__ half *)x), from_y.SetGlobalBuffer((__gm__ half *)y), to.SetGlobalBuffer((__gm__ half *)z);
  const uint64_t pieces = t.size / t.columns, first = pieces * GetBlockIdx() / GetBlockNum(),
                 last = pieces * (GetBlockIdx() + 1) / GetBlockNum();
  for (uint64_t p = first; p < last; p++) {
    LocalTensor<half> a = x_in.AllocTensor<half>(), b = y_in.AllocTensor<half>(), c = z_out.AllocTensor<half>();
    DataCopy(a, from_x[p * t.columns], t.columns);
    x_in.EnQue(a);
    DataCopy(b, from_y[p * t.columns], t.columns);
    y_in.EnQue(b);
    a = x_in.DeQue<half>(), b = y_in.DeQue<half>();
    Add(c, a, b, static_cast<int32_t>(t.columns));
    x_in.FreeTensor(a), y_in.FreeTensor(b);
    z_out.EnQue(c);
    c = z_out.DeQue<half>();
    DataCopy(to[p * t.columns], c, t.columns);
    z_out.FreeTensor(c);
  }
}

#include "launch.h"
EMULATED(copies, Copies, false, true)
EMULATED(copies_to_l1, CopiesToL1, true, false)
EMULATED(addition, Addition, false, true)
