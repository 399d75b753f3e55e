// An operator as a function that MindSpore's Custom calls on CPU: it reads the definition of the operator, calls its tiling function, and
// runs its kernel on the emulated cores.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "include/register/op_def_registry.h"
#include "machine.h"

namespace emulator {

struct Arguments {
  int count;
  void **data;
  int *ndims;
  int64_t **shapes;
  const char **dtypes;
};

enum : size_t { GUARD = 64 };  // so that arrays never touch, and an overrun meets no other array

inline int type_of(const std::string &name) {
  if (name == "float32") return ge::DT_FLOAT;
  if (name == "float16") return ge::DT_FLOAT16;
  if (name == "bfloat16") return ge::DT_BF16;
  return name == "int32" ? ge::DT_INT32 : -1;
}

inline size_t bytes_of(int type) { return type == ge::DT_FLOAT || type == ge::DT_INT32 ? 4 : 2; }

inline gert::Shape shape_of(const Arguments &a, int i) {
  gert::Shape shape;
  for (int d = 0; d < a.ndims[i]; d++) shape.dims.push_back(a.shapes[i][d]);
  return shape;
}

// Whether the arrays have types that the definition lists, all at one place of its lists.
inline bool fits(const ops::OpDef &def, const std::vector<int> &types) {
  const size_t inputs = def.inputs.size(), n = def.inputs[0]->types.size();
  for (size_t at = 0; at < n; at++) {
    bool all = true;
    for (size_t i = 0; i < types.size(); i++) {
      const auto &list = i < inputs ? def.inputs[i]->types : def.outputs[i - inputs]->types;
      all = all && list.size() == n && list[at] == types[i];
    }
    if (all) return true;
  }
  return false;
}

struct Call {
  void *function;
  void (*invoke)(void *function, uint8_t **arrays);
  std::vector<uint8_t *> arrays;
};

template <typename... Pointers, size_t... I>
inline void call_with(void (*kernel)(Pointers...), uint8_t **arrays, std::index_sequence<I...>) {
  kernel(arrays[I]...);
}

// What the definition and the tiling function make of arrays: `context` and `launch`, with the inputs and outputs. The message of what is
// wrong, empty if nothing is.
inline std::string plan(const char *type, bool cube, bool vector, const Arguments &a, gert::TilingContext &context, Launch &launch) {
  const std::unique_ptr<ops::OpDef> def = ops::definitions().at(type)();
  const size_t inputs = def->inputs.size(), outputs = def->outputs.size(), scalars = def->attrs.empty() ? 0 : 1;
  if (static_cast<size_t>(a.count) != inputs + outputs + scalars)
    return text("%s: %d arrays; it takes %zu and gives %zu", type, a.count, inputs + scalars, outputs);
  std::vector<int> types;
  for (int i = 0; i < a.count; i++) {
    if (scalars && i == static_cast<int>(inputs)) {
      for (size_t j = 0; j < def->attrs.size(); j++) {
        context.attrs.floats.push_back(static_cast<float *>(a.data[i])[j]);
        context.attrs.ints.push_back(static_cast<int64_t>(context.attrs.floats[j]));
      }
      continue;
    }
    types.push_back(type_of(a.dtypes[i]));
    const gert::Shape shape = shape_of(a, i);
    const size_t width = bytes_of(types.back()), bytes = shape.GetShapeSize() * width;
    if (i < static_cast<int>(inputs))
      context.inputs.push_back({shape}), context.types.push_back({static_cast<ge::DataType>(types.back())});
    else if (!dry)
      std::memset(a.data[i], 0xff, bytes);  // what a kernel does not write is NaN
    launch.arrays.push_back({static_cast<uint8_t *>(a.data[i]), bytes, width});
  }
  if (!fits(*def, types)) return text("%s: arrays of types that its definition does not list", type);
  if (def->core.tiling(&context) != ge::GRAPH_SUCCESS)
    return text("%s: its tiling function refuses these shapes: %s", type, context.refusal.c_str());
  launch.blocks = static_cast<int>(context.blocks), launch.key = context.key, launch.cube = cube, launch.vector = vector;
  launch.together = context.schedule_mode == 1;
  const int most = cube ? cores() : 2 * cores();
  if (launch.blocks < 1 || launch.blocks > most)
    return text("%s: its tiling asks for %d blocks; the chip runs 1 to %d at once", type, launch.blocks, most);
  return "";
}

// The kernel's pointers: inputs, outputs, workspace, tiling data.
template <typename... Pointers>
inline int launch(const char *type, void (*kernel)(Pointers...), bool cube, bool vector, Arguments a) {
  gert::TilingContext context;
  Launch launch;
  const std::string refused = plan(type, cube, vector, a, context, launch);
  if (!refused.empty()) return emulator_report(refused.c_str());
  if (sizeof...(Pointers) != launch.arrays.size() + 2)
    return emulator_report(text("%s: a kernel of %zu pointers, for %zu arrays", type, sizeof...(Pointers), launch.arrays.size()).c_str());
  std::vector<uint8_t> workspace(context.workspace + GUARD, 0xff);
  launch.arrays.push_back({workspace.data(), context.workspace, 4});
  launch.arrays.push_back({context.tiling.bytes.data(), context.tiling.bytes.size(), 4});
  Call call;
  call.function = reinterpret_cast<void *>(kernel);
  call.invoke = [](void *function, uint8_t **arrays) {
    call_with(reinterpret_cast<void (*)(Pointers...)>(function), arrays, std::index_sequence_for<Pointers...>());
  };
  for (const Array &array : launch.arrays) call.arrays.push_back(array.data);
  auto body = [](void *argument) {
    Call &c = *static_cast<Call *>(argument);
    c.invoke(c.function, c.arrays.data());
  };
  return emulator_report(run(launch, body, &call).c_str());
}

// How a kernel would be run: made = {blocks, key, bytes of the workspace, of the tiling data}, and the tiling data, up to `capacity` bytes.
inline int tiled(const char *type, bool cube, bool vector, Arguments a, int64_t *made, uint8_t *tiling, size_t capacity) {
  gert::TilingContext context;
  Launch launch;
  const std::string refused = plan(type, cube, vector, a, context, launch);
  if (!refused.empty()) return emulator_report(refused.c_str());
  const std::vector<uint8_t> &bytes = context.tiling.bytes;
  made[0] = launch.blocks, made[1] = static_cast<int64_t>(launch.key), made[2] = static_cast<int64_t>(context.workspace);
  made[3] = static_cast<int64_t>(bytes.size());
  std::memcpy(tiling, bytes.data(), std::min(bytes.size(), capacity));
  return emulator_report("");
}

}  // namespace emulator

// EMULATED(snake_name, OpType, cube cores, vector cores)
#define EMULATED(name, type, cube, vector)                                                                                    \
  extern "C" __attribute__((visibility("default"))) int name##_emulated(int count, void **data, int *ndims, int64_t **shapes, \
                                                                        const char **dtypes, void *, void *) {                \
    return emulator::launch(#type, &name, cube, vector, {count, data, ndims, shapes, dtypes});                                \
  }                                                                                                                           \
  extern "C" __attribute__((visibility("default"))) int name##_tiled(int count, void **data, int *ndims, int64_t **shapes,    \
                                                                     const char **dtypes, int64_t *made, uint8_t *tiling,     \
                                                                     size_t capacity) {                                       \
    return emulator::tiled(#type, cube, vector, {count, data, ndims, shapes, dtypes}, made, tiling, capacity);                \
  }
