#include "routing.h"

extern "C" __global__ __aicore__ void qwen_top_k_grad(GM_ADDR probs, GM_ADDR expert, GM_ADDR weight, GM_ADDR dprobs, GM_ADDR dweight,
                                                      GM_ADDR dlogits, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(TopKTiling, data, tiling);
  qwen::TopKGrad().Run(probs, expert, weight, dprobs, dweight, dlogits, data);
}
