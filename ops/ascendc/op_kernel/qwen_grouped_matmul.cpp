#include "grouped_matmul.h"

extern "C" __global__ __aicore__ void qwen_grouped_matmul(GM_ADDR x, GM_ADDR w, GM_ADDR ends, GM_ADDR y, GM_ADDR workspace,
                                                          GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIC_ONLY);
  GET_TILING_DATA_WITH_STRUCT(GroupedMatmulTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::GroupedMatmul<float, qwen::Side::Y>().Run(x, w, ends, y, data);
  if (TILING_KEY_IS(1)) qwen::GroupedMatmul<half, qwen::Side::Y>().Run(x, w, ends, y, data);
  if (TILING_KEY_IS(2)) qwen::GroupedMatmul<bfloat16_t, qwen::Side::Y>().Run(x, w, ends, y, data);
}
