#include "routing.h"

extern "C" __global__ __aicore__ void qwen_permute_grad(GM_ADDR drows, GM_ADDR slot, GM_ADDR expert, GM_ADDR dx, GM_ADDR workspace,
                                                        GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PermuteTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::Combine<float, false>().Run(drows, slot, nullptr, dx, data);
  if (TILING_KEY_IS(1)) qwen::Combine<half, false>().Run(drows, slot, nullptr, dx, data);
  if (TILING_KEY_IS(2)) qwen::Combine<bfloat16_t, false>().Run(drows, slot, nullptr, dx, data);
}
