#include "cross_entropy.h"

extern "C" __global__ __aicore__ void qwen_cross_entropy_grad(GM_ADDR z, GM_ADDR at, GM_ADDR top, GM_ADDR dtotal, GM_ADDR dpicked,
                                                              GM_ADDR dz, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(CrossEntropyTiling, data, tiling);
  qwen::CrossEntropyGrad().Run(z, at, top, dtotal, dpicked, dz, data);
}
