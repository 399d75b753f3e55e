#include "rope.h"

extern "C" __global__ __aicore__ void qwen_rope_norm_grad(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR dy, GM_ADDR dx,
                                                          GM_ADDR dw, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  GET_TILING_DATA_WITH_STRUCT(RopeTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::RopeNormGrad<float>().Run(x, w, cos, sin, dy, dx, dw, workspace, data);
  if (TILING_KEY_IS(1)) qwen::RopeNormGrad<half>().Run(x, w, cos, sin, dy, dx, dw, workspace, data);
  if (TILING_KEY_IS(2)) qwen::RopeNormGrad<bfloat16_t>().Run(x, w, cos, sin, dy, dx, dw, workspace, data);
}
