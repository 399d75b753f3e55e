// The host side of an operator, emulated: its definition, and the inputs and outputs of its tiling function.
#pragma once
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tilingdata_base.h"

#define EMULATED_HOST  // so that a tiling function may say why it refuses

namespace ge {
using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0, GRAPH_FAILED = 0xFFFFFFFF;
enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_BF16 = 27 };
enum Format { FORMAT_ND = 2 };
}  // namespace ge

namespace gert {

class Shape {
 public:
  std::vector<int64_t> dims;
  size_t GetDimNum() const { return dims.size(); }
  int64_t GetDim(size_t i) const { return dims[i]; }
  int64_t GetShapeSize() const {
    int64_t n = 1;
    for (int64_t d : dims) n *= d;
    return n;
  }
};

class StorageShape {
 public:
  Shape shape;
  const Shape &GetStorageShape() const { return shape; }
};

class CompileTimeTensorDesc {
 public:
  ge::DataType type = ge::DT_FLOAT;
  ge::DataType GetDataType() const { return type; }
};

class RuntimeAttrs {
 public:
  std::vector<float> floats;
  std::vector<int64_t> ints;
  const float *GetFloat(size_t i) const { return &floats[i]; }
  const int64_t *GetInt(size_t i) const { return &ints[i]; }
};

class TilingData {
 public:
  std::vector<uint8_t> bytes = std::vector<uint8_t>(2048);
  void *GetData() { return bytes.data(); }
  size_t GetCapacity() const { return bytes.size(); }
  void SetDataSize(size_t) {}
};

class TilingContext {
 public:
  std::vector<StorageShape> inputs;
  std::vector<CompileTimeTensorDesc> types;
  RuntimeAttrs attrs;
  TilingData tiling;
  size_t workspace = 0;
  uint32_t blocks = 0, schedule_mode = 0;
  uint64_t key = 0;
  std::string refusal;

  const StorageShape *GetInputShape(size_t i) const { return &inputs[i]; }
  const CompileTimeTensorDesc *GetInputDesc(size_t i) const { return &types[i]; }
  const RuntimeAttrs *GetAttrs() const { return &attrs; }
  TilingData *GetRawTilingData() { return &tiling; }
  size_t *GetWorkspaceSizes(size_t) { return &workspace; }
  void *GetPlatformInfo() { return this; }
  const char *GetNodeName() const { return "op"; }
  void SetBlockDim(uint32_t n) { blocks = n; }
  void SetTilingKey(uint64_t n) { key = n; }
  ge::graphStatus SetScheduleMode(uint32_t mode) {
    schedule_mode = mode;
    return ge::GRAPH_SUCCESS;
  }
};

}  // namespace gert

namespace ops {

enum ParamKind { REQUIRED, OPTIONAL };

class OpParamDef {
 public:
  explicit OpParamDef(const char *name) : name(name) {}
  std::string name;
  std::vector<ge::DataType> types;
  OpParamDef &ParamType(ParamKind) { return *this; }
  OpParamDef &DataType(std::vector<ge::DataType> list) {
    types = std::move(list);
    return *this;
  }
  OpParamDef &Format(std::vector<ge::Format>) { return *this; }
  OpParamDef &UnknownShapeFormat(std::vector<ge::Format>) { return *this; }
};

class OpAttrDef {
 public:
  std::string name;
  OpAttrDef &AttrType(ParamKind) { return *this; }
  OpAttrDef &Float() { return *this; }
  OpAttrDef &Int() { return *this; }
};

using TilingFunc = ge::graphStatus (*)(gert::TilingContext *);

class OpAICoreDef {
 public:
  TilingFunc tiling = nullptr;
  std::vector<std::string> chips;
  OpAICoreDef &SetTiling(TilingFunc f) {
    tiling = f;
    return *this;
  }
  OpAICoreDef &AddConfig(const char *chip) {
    chips.push_back(chip);
    return *this;
  }
};

class OpDef {
 public:
  explicit OpDef(const char *type) : type(type) {}
  std::string type;
  std::vector<std::unique_ptr<OpParamDef>> inputs, outputs;
  std::vector<std::unique_ptr<OpAttrDef>> attrs;
  OpAICoreDef core;
  OpParamDef &Input(const char *name) {
    inputs.push_back(std::make_unique<OpParamDef>(name));
    return *inputs.back();
  }
  OpParamDef &Output(const char *name) {
    outputs.push_back(std::make_unique<OpParamDef>(name));
    return *outputs.back();
  }
  OpAttrDef &Attr(const char *name) {
    attrs.push_back(std::make_unique<OpAttrDef>());
    attrs.back()->name = name;
    return *attrs.back();
  }
  OpAICoreDef &AICore() { return core; }
};

// Of one library, and never destroyed: MindSpore closes libraries in an order of its own.
inline std::map<std::string, std::function<std::unique_ptr<OpDef>()>> &definitions() {
  static auto *all = new std::map<std::string, std::function<std::unique_ptr<OpDef>()>>;
  return *all;
}

#define OP_ADD(type) static const bool added_##type = (::ops::definitions()[#type] = [] { return std::make_unique<type>(#type); }, true)

}  // namespace ops
