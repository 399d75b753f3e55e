#include "rms_norm.h"

extern "C" __global__ __aicore__ void qwen_rms_norm(GM_ADDR x, GM_ADDR w, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(RmsNormTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::RmsNorm<float, false>().Run(x, nullptr, w, nullptr, y, data);
  if (TILING_KEY_IS(1)) qwen::RmsNorm<half, false>().Run(x, nullptr, w, nullptr, y, data);
  if (TILING_KEY_IS(2)) qwen::RmsNorm<bfloat16_t, false>().Run(x, nullptr, w, nullptr, y, data);
}
