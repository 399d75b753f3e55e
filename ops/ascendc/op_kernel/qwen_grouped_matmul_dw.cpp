#include "grouped_matmul.h"

extern "C" __global__ __aicore__ void qwen_grouped_matmul_dw(GM_ADDR x, GM_ADDR dy, GM_ADDR ends, GM_ADDR dw, GM_ADDR workspace,
                                                             GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  GET_TILING_DATA_WITH_STRUCT(GroupedMatmulTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::GroupedMatmulDw<float>().Run(x, dy, ends, dw, data);
  if (TILING_KEY_IS(1)) qwen::GroupedMatmulDw<half>().Run(x, dy, ends, dw, data);
  if (TILING_KEY_IS(2)) qwen::GroupedMatmulDw<bfloat16_t>().Run(x, dy, ends, dw, data);
}
