#include "routing.h"

extern "C" __global__ __aicore__ void qwen_combine(GM_ADDR y, GM_ADDR slot, GM_ADDR weight, GM_ADDR out, GM_ADDR workspace,
                                                   GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PermuteTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::Combine<float, true>().Run(y, slot, weight, out, data);
  if (TILING_KEY_IS(1)) qwen::Combine<half, true>().Run(y, slot, weight, out, data);
  if (TILING_KEY_IS(2)) qwen::Combine<bfloat16_t, true>().Run(y, slot, weight, out, data);
}
