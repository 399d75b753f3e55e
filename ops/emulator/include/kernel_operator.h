// The part of AscendC that the kernels of ops/ascendc use, emulated. On an NPU the same sources include CANN's header of this name.
#pragma once
#include "../machine.h"

#define __aicore__
#define __global__
#define __gm__
#define __ubuf__
#define GM_ADDR uint8_t *
// On a device these are `constexpr(...)`, so that only `if ASCEND_IS_AIC` compiles; the semicolon has that effect here.
#define ASCEND_IS_AIC (const auto kind = ::emulator::core().kind; kind == ::emulator::Kind::AIC)
#define ASCEND_IS_AIV (const auto kind = ::emulator::core().kind; kind == ::emulator::Kind::AIV)
#define TILING_KEY_IS(key) (::emulator::tiling_key() == (key))
#define GET_TILING_DATA_WITH_STRUCT(type, name, address) const type name = *reinterpret_cast<const type *>(address)
// Which cores run a kernel is told to the emulator by its build; here, whether it may use what makes all of them wait.
enum KernelMetaType { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_AIC_ONLY, KERNEL_TYPE_MIX_AIV_1_0, KERNEL_TYPE_MIX_AIC_1_2 };
#define KERNEL_TASK_TYPE_DEFAULT(kind) ::emulator::core().alone = (kind) == KERNEL_TYPE_AIV_ONLY || (kind) == KERNEL_TYPE_AIC_ONLY

#include "../types.h"
#include "../tensor.h"
#include "../queue.h"
#include "../copy.h"
#include "../vector.h"
#include "../reduce.h"
#include "../sort.h"
#include "../cube.h"
