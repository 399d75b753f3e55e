#include "swiglu.h"

extern "C" __global__ __aicore__ void qwen_swiglu_grad(GM_ADDR gate, GM_ADDR up, GM_ADDR dy, GM_ADDR dgate, GM_ADDR dup, GM_ADDR workspace,
                                                       GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(SwigluTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::SwigluGrad<float>().Run(gate, up, dy, dgate, dup, data);
  if (TILING_KEY_IS(1)) qwen::SwigluGrad<half>().Run(gate, up, dy, dgate, dup, data);
  if (TILING_KEY_IS(2)) qwen::SwigluGrad<bfloat16_t>().Run(gate, up, dy, dgate, dup, data);
}
