#include "rms_norm.h"

extern "C" __global__ __aicore__ void qwen_rms_norm_grad(GM_ADDR x, GM_ADDR w, GM_ADDR dy, GM_ADDR dx, GM_ADDR dw, GM_ADDR workspace,
                                                         GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  GET_TILING_DATA_WITH_STRUCT(RmsNormTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::RmsNormGrad<float, false>().Run(x, w, dy, nullptr, dx, dw, workspace, data);
  if (TILING_KEY_IS(1)) qwen::RmsNormGrad<half, false>().Run(x, w, dy, nullptr, dx, dw, workspace, data);
  if (TILING_KEY_IS(2)) qwen::RmsNormGrad<bfloat16_t, false>().Run(x, w, dy, nullptr, dx, dw, workspace, data);
}
