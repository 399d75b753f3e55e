// Kernels that are wrong in one way each, and one that is sound: what the emulator has to say of them. The attribute is the fault.
#include <cstdlib>

#include "host.h"

enum Fault : uint32_t {
  NONE,
  MISALIGNED,
  UB_OVERRUN,
  BUFFER_OVERRUN,
  ENQUEUED_TWICE,
  NOT_FREED,
  WRONG_POSITION,
  PAST_THE_ARRAY,
  NOT_ENQUEUED,
  NO_BARRIER,
  NO_SCALAR_WAIT,
  FREED,
  NEVER_SET,
  LEFT_SET,
  SOME_SYNC,
  ENDLESS,
  NO_SYNC,
  EMPTY_QUEUE,
  OVERLAP,
  ODD_COPY,
  SYNC_ALONE,
  DEPTH,
  EVENTS_SPENT,
  NO_BATCH,
  SMALL_WORK,
  INIT_AGAIN,
  ODD_LIST,
  MERGED_IN_PLACE,
  FAR_GATHER,
  ADDED_COPY,
  ADDS_LEFT,
  // of the mixed kernel
  L1_OVERRUN,
  NO_CROSS_WAIT,
  NO_CROSS_SET,
  CROSS_LEFT,
  WRONG_MATRIX,
  ONE_ROW,
  NO_LOAD_WAIT,
  CUBE_EVENTS_SPENT,
};

namespace optiling {

BEGIN_TILING_DATA_DEF(FaultTiling)
TILING_DATA_FIELD_DEF(uint32_t, fault);
END_TILING_DATA_DEF;

static ge::graphStatus Tile(gert::TilingContext *context) {
  FaultTiling tiling;
  tiling.set_fault(*context->GetAttrs()->GetInt(0));
  if (tiling.fault != NO_BATCH) StartTogether(context);
  return Finish(context, tiling, 2, 0, 4096);
}

}  // namespace optiling

namespace ops {
class Copy : public OpDef {
 public:
  explicit Copy(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'f'}}, {{"y", 'f'}}, optiling::Tile);
    this->Attr("fault").AttrType(REQUIRED).Int();
  }
};
OP_ADD(Copy);
class Mixed : public OpDef {
 public:
  explicit Mixed(const char *name) : OpDef(name) {
    Declare(*this, {{"x", 'f'}}, {{"y", 'f'}}, optiling::Tile);
    this->Attr("fault").AttrType(REQUIRED).Int();
  }
};
OP_ADD(Mixed);
}  // namespace ops

using namespace optiling;
#include "device.h"

using namespace AscendC;

// y = 2 x, [64] by each of two cores
extern "C" void copy(GM_ADDR x, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  GET_TILING_DATA_WITH_STRUCT(FaultTiling, data, tiling);
  const uint32_t fault = data.fault, n = 64, me = GetBlockIdx();
  if (fault == SYNC_ALONE) KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> spare;
  pipe.InitBuffer(in, fault == DEPTH ? 2 : 1, n * 4);
  TQue<TPosition::VECIN, 1> more;
  if (fault == EVENTS_SPENT) pipe.InitBuffer(more, 8, n * 4);  // EVENTS_SPENT
  if (fault == INIT_AGAIN) pipe.Reset(), pipe.InitBuffer(in, 1, n * 4);  // INIT_AGAIN
  pipe.InitBuffer(out, 1, n * 4);
  pipe.InitBuffer(spare, fault == UB_OVERRUN ? 192 * 1024 : 328 * 4);  // UB_OVERRUN
  GlobalTensor<float> from, to, shared;
  from.SetGlobalBuffer((__gm__ float *)x + me * n), to.SetGlobalBuffer((__gm__ float *)y + me * n);
  shared.SetGlobalBuffer((__gm__ float *)GetUserWorkspace(workspace));
  LocalTensor<float> a = in.AllocTensor<float>();
  if (fault == ODD_COPY) DataCopy(a, from, 63);                  // ODD_COPY
  DataCopy(a, fault == PAST_THE_ARRAY ? from[n + 1] : from, n);  // PAST_THE_ARRAY
  if (fault == NOT_ENQUEUED) Muls(a, a, 1.0f, n);                // NOT_ENQUEUED
  in.EnQue(a);
  if (fault == ENQUEUED_TWICE) in.EnQue(a);               // ENQUEUED_TWICE
  if (fault == DEPTH) in.EnQue(in.AllocTensor<float>());  // DEPTH
  a = in.DeQue<float>();
  if (fault == EMPTY_QUEUE) a = in.DeQue<float>();      // EMPTY_QUEUE
  if (fault == NOT_FREED) a = in.AllocTensor<float>();  // NOT_FREED
  LocalTensor<float> b = out.AllocTensor<float>(), c = spare.Get<float>();
  if (fault == WRONG_POSITION) DataCopy(b, from, n);  // WRONG_POSITION
  LocalTensor<uint32_t> number = c[192].ReinterpretCast<uint32_t>();
  if (fault == ODD_LIST) Sort32(c, c[72], number, 1);  // ODD_LIST: scores lie at whole lists of 32
  Duplicate(number, static_cast<uint32_t>(4096), 8), PipeBarrier<PIPE_V>();
  if (fault == FAR_GATHER) Gather(b, c, number, 0, 8);  // FAR_GATHER
  MrgSort4Info two;
  two.elementLengths[0] = two.elementLengths[1] = 8, two.validBit = 3;
  if (fault == MERGED_IN_PLACE) MrgSort(c, MrgSortSrcList<float>(c, c[16], c, c), two);  // MERGED_IN_PLACE
  if (fault == SMALL_WORK) ReduceMax(b, c, c[320], 320);  // SMALL_WORK: 8 floats, for a value and an index of each of 5 repeats
  Muls(c, a, 2.0f, n);
  if (fault != NO_BARRIER) PipeBarrier<PIPE_V>();
  Muls(b, c, 1.0f, fault == BUFFER_OVERRUN ? n + 8 : n);                   // NO_BARRIER BUFFER_OVERRUN
  if (fault == MISALIGNED) Muls(b[1], c, 1.0f, 8);                         // MISALIGNED
  if (fault == OVERLAP) PipeBarrier<PIPE_ALL>(), Muls(c[8], c, 1.0f, 16);  // OVERLAP
  if (fault == NO_SCALAR_WAIT) c.GetValue(0);                              // NO_SCALAR_WAIT
  in.FreeTensor(a);
  if (fault == FREED) Muls(b, a, 1.0f, n);              // FREED
  if (fault == NEVER_SET) WaitFlag<HardEvent::V_S>(0);  // NEVER_SET
  if (fault == LEFT_SET) SetFlag<HardEvent::V_S>(0);    // LEFT_SET
  out.EnQue(b);
  b = out.DeQue<float>();
  if (fault == ADDED_COPY) SetAtomicAdd<float>();
  DataCopy(to, b, n);  // ADDED_COPY
  DataCopy(shared[me * n], b, n);  // NO_SYNC: what the other core reads
  out.FreeTensor(b);
  if (fault == SOME_SYNC && me) return;
  if (fault != NO_SYNC) SyncAll();  // SOME_SYNC SYNC_ALONE NO_BATCH
  a = in.AllocTensor<float>();
  DataCopy(a, shared[(1 - me) * n], n);
  in.EnQue(a);
  a = in.DeQue<float>();
  in.FreeTensor(a);
  if (fault == ADDS_LEFT) SetAtomicAdd<float>();
  while (fault == ENDLESS) spare.Get<float>().SetValue(0, 1.0f);  // ENDLESS
}

constexpr uint16_t READY = 3;

// y = x x^T, [16, 16], by the cube into the workspace, and from there by the vector cores
extern "C" void mixed(GM_ADDR x, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  GET_TILING_DATA_WITH_STRUCT(FaultTiling, data, tiling);
  const uint32_t fault = data.fault, n = 16, half_of_it = n * n / 2;
  TPipe pipe;
  GlobalTensor<float> from, to, product;
  from.SetGlobalBuffer((__gm__ float *)x), to.SetGlobalBuffer((__gm__ float *)y);
  uint64_t block = GetBlockIdx() / 2;
  if ASCEND_IS_AIC block = GetBlockIdx();
  product.SetGlobalBuffer((__gm__ float *)GetUserWorkspace(workspace) + block * n * n);
  if ASCEND_IS_AIC {
    TQue<TPosition::A1, 1> rows;
    TQue<TPosition::A2, 1> left;
    TQue<TPosition::B2, 1> right;
    TQue<TPosition::CO1, 1> result;
    pipe.InitBuffer(rows, 1, fault == L1_OVERRUN ? 513 * 1024 : 1024);  // L1_OVERRUN
    TQue<TPosition::A2, 1> more;
    if (fault == CUBE_EVENTS_SPENT) pipe.InitBuffer(more, 4, 1024);
    pipe.InitBuffer(left, 1, 1024), pipe.InitBuffer(right, 1, 1024);  // CUBE_EVENTS_SPENT
    pipe.InitBuffer(result, 1, 1024);
    LocalTensor<float> a1 = rows.AllocTensor<float>();
    DataCopy(a1, from, Nd2NzParams{1, 16, 16, 0, 16, 16, 1, 0});
    rows.EnQue(a1);
    if (fault != NO_LOAD_WAIT) a1 = rows.DeQue<float>();
    LocalTensor<float> a = left.AllocTensor<float>(), b = right.AllocTensor<float>(), c = result.AllocTensor<float>();
    LoadData2DParams load;
    load.repeatTimes = 2, load.srcStride = 1;
    LoadData(a, a1, load);  // NO_LOAD_WAIT
    LoadData(b, a1, load);
    rows.FreeTensor(a1);
    left.EnQue(a), right.EnQue(b);
    a = left.DeQue<float>(), b = right.DeQue<float>();
    MmadParams multiply;
    multiply.m = fault == ONE_ROW ? 1 : n, multiply.n = n, multiply.k = n;
    if (fault == WRONG_MATRIX) Mmad(c, b, a, multiply);  // WRONG_MATRIX
    Mmad(c, a, b, multiply);                             // ONE_ROW
    left.FreeTensor(a), right.FreeTensor(b);
    result.EnQue(c);
    c = result.DeQue<float>();
    FixpipeParamsV220 out;
    out.nSize = n, out.mSize = n, out.srcStride = n, out.dstStride = n;
    Fixpipe<float, float, CFG_ROW_MAJOR>(product, c, out);
    result.FreeTensor(c);
    if (fault != NO_CROSS_SET) CrossCoreSetFlag<2, PIPE_FIX>(READY);
    if (fault == CROSS_LEFT) CrossCoreSetFlag<2, PIPE_FIX>(READY);
    return;
  }
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  pipe.InitBuffer(in, 1, half_of_it * 4), pipe.InitBuffer(out, 1, half_of_it * 4);
  if (fault != NO_CROSS_WAIT) CrossCoreWaitFlag(READY);  // NO_CROSS_SET
  LocalTensor<float> a = in.AllocTensor<float>();
  DataCopy(a, product[GetSubBlockIdx() * half_of_it], half_of_it);  // NO_CROSS_WAIT
  in.EnQue(a);
  a = in.DeQue<float>();
  LocalTensor<float> b = out.AllocTensor<float>();
  Muls(b, a, 1.0f, half_of_it);
  in.FreeTensor(a);
  out.EnQue(b);
  b = out.DeQue<float>();
  if (block == 0) DataCopy(to[GetSubBlockIdx() * half_of_it], b, half_of_it);
  out.FreeTensor(b);
}

#include "launch.h"
EMULATED(copy, Copy, false, true)
EMULATED(mixed, Mixed, true, true)
