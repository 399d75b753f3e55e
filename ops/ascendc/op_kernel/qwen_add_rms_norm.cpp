#include "rms_norm.h"

extern "C" __global__ __aicore__ void qwen_add_rms_norm(GM_ADDR x, GM_ADDR y, GM_ADDR w, GM_ADDR h, GM_ADDR normed, GM_ADDR workspace,
                                                        GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(RmsNormTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::RmsNorm<float, true>().Run(x, y, w, h, normed, data);
  if (TILING_KEY_IS(1)) qwen::RmsNorm<half, true>().Run(x, y, w, h, normed, data);
  if (TILING_KEY_IS(2)) qwen::RmsNorm<bfloat16_t, true>().Run(x, y, w, h, normed, data);
}
