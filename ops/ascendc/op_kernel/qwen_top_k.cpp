#include "routing.h"

extern "C" __global__ __aicore__ void qwen_top_k(GM_ADDR logits, GM_ADDR bias, GM_ADDR probs, GM_ADDR expert, GM_ADDR weight,
                                                 GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(TopKTiling, data, tiling);
  qwen::TopK().Run(logits, bias, probs, expert, weight, data);
}
