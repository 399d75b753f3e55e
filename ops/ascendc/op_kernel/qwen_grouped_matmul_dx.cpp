#include "grouped_matmul.h"

extern "C" __global__ __aicore__ void qwen_grouped_matmul_dx(GM_ADDR dy, GM_ADDR w, GM_ADDR ends, GM_ADDR dx, GM_ADDR workspace,
                                                             GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  GET_TILING_DATA_WITH_STRUCT(GroupedMatmulTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::GroupedMatmul<float, qwen::Side::DX>().Run(dy, w, ends, dx, data);
  if (TILING_KEY_IS(1)) qwen::GroupedMatmul<half, qwen::Side::DX>().Run(dy, w, ends, dx, data);
  if (TILING_KEY_IS(2)) qwen::GroupedMatmul<bfloat16_t, qwen::Side::DX>().Run(dy, w, ends, dx, data);
}
