#include "cross_entropy.h"

extern "C" __global__ __aicore__ void qwen_cross_entropy(GM_ADDR z, GM_ADDR at, GM_ADDR top, GM_ADDR total, GM_ADDR picked,
                                                         GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(CrossEntropyTiling, data, tiling);
  qwen::CrossEntropy().Run(z, at, top, total, picked, data);
}
