// Shared by the definitions and tiling functions of the operators.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "register/op_def_registry.h"
#include "register/tilingdata_base.h"
#include "tiling/platform/platform_ascendc.h"

namespace optiling {

constexpr uint32_t BLOCK_BYTES = 32;
constexpr uint32_t UB_SPARE = 4096;  // of UB, for small buffers

inline uint32_t RoundUp(uint32_t n, uint32_t to) { return (n + to - 1) / to * to; }

// The dtype that a kernel is chosen by: 0 float32, 1 float16, 2 bfloat16.
inline uint64_t DtypeKey(ge::DataType type) { return type == ge::DT_FLOAT ? 0 : type == ge::DT_FLOAT16 ? 1 : 2; }
inline uint32_t WidthOf(ge::DataType type) { return type == ge::DT_FLOAT || type == ge::DT_INT32 ? 4 : 2; }

inline int64_t DimOf(gert::TilingContext *context, size_t input, int d) {
  const auto &shape = context->GetInputShape(input)->GetStorageShape();
  return shape.GetDim(d < 0 ? shape.GetDimNum() + d : d);
}
inline int64_t SizeOf(gert::TilingContext *context, size_t input) {
  return context->GetInputShape(input)->GetStorageShape().GetShapeSize();
}

inline uint32_t UbBytes(gert::TilingContext *context) {
  uint64_t bytes = 0;
  platform_ascendc::PlatformAscendC(context->GetPlatformInfo()).GetCoreMemSize(platform_ascendc::CoreMemType::UB, bytes);
  return static_cast<uint32_t>(bytes);
}
inline uint32_t VectorCores(gert::TilingContext *context) {
  return std::max(1u, static_cast<uint32_t>(platform_ascendc::PlatformAscendC(context->GetPlatformInfo()).GetCoreNumAiv()));
}
inline uint32_t CubeCores(gert::TilingContext *context) {
  return std::max(1u, static_cast<uint32_t>(platform_ascendc::PlatformAscendC(context->GetPlatformInfo()).GetCoreNumAic()));
}

inline ge::graphStatus Refuse(gert::TilingContext *context, const char *why) {
#ifdef EMULATED_HOST
  context->refusal = why;
#else
  std::fprintf(stderr, "%s: %s\n", context->GetNodeName(), why);
#endif
  return ge::GRAPH_FAILED;
}

// For kernels whose blocks wait for each other (SyncAll): all are started at once, or none. Otherwise two such operators on two streams
// could each hold a part of the cores for ever.
inline void StartTogether(gert::TilingContext *context) { context->SetScheduleMode(1); }

template <typename Tiling>
inline ge::graphStatus Finish(gert::TilingContext *context, Tiling &tiling, uint32_t blocks, uint64_t key, size_t workspace = 0) {
  tiling.SaveToBuffer(context->GetRawTilingData()->GetData(), context->GetRawTilingData()->GetCapacity());
  context->GetRawTilingData()->SetDataSize(tiling.GetDataSize());
  context->SetBlockDim(blocks);
  context->SetTilingKey(key);
  context->GetWorkspaceSizes(1)[0] = platform_ascendc::PlatformAscendC(context->GetPlatformInfo()).GetLibApiWorkSpaceSize() + workspace;
  return ge::GRAPH_SUCCESS;
}

}  // namespace optiling

namespace ops {

// An array of an operator: T of float32, float16 and bfloat16, f of float32 always, i of int32.
struct Port {
  const char *name;
  char kind;
};

// Where no array is a T there is one combination of types, else three.
inline std::vector<ge::DataType> TypesOf(char kind, size_t combinations) {
  if (kind == 'T') return {ge::DT_FLOAT, ge::DT_FLOAT16, ge::DT_BF16};
  return std::vector<ge::DataType>(combinations, kind == 'f' ? ge::DT_FLOAT : ge::DT_INT32);
}

template <typename Tiling>
inline void Declare(OpDef &def, std::initializer_list<Port> inputs, std::initializer_list<Port> outputs, Tiling tiling) {
  const auto is_t = [](const Port &p) { return p.kind == 'T'; };
  const size_t n = std::any_of(inputs.begin(), inputs.end(), is_t) ? 3 : 1;
  const std::vector<ge::Format> formats(n, ge::FORMAT_ND);
  for (const Port &p : inputs)
    def.Input(p.name).ParamType(REQUIRED).DataType(TypesOf(p.kind, n)).Format(formats).UnknownShapeFormat(formats);
  for (const Port &p : outputs)
    def.Output(p.name).ParamType(REQUIRED).DataType(TypesOf(p.kind, n)).Format(formats).UnknownShapeFormat(formats);
  def.AICore().SetTiling(tiling).AddConfig("ascend910b");
}

}  // namespace ops
