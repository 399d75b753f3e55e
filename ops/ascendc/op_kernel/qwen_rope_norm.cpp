#include "rope.h"

extern "C" __global__ __aicore__ void qwen_rope_norm(GM_ADDR x, GM_ADDR w, GM_ADDR cos, GM_ADDR sin, GM_ADDR y, GM_ADDR workspace,
                                                     GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(RopeTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::Rope<float, true>().Run(x, w, cos, sin, y, data);
  if (TILING_KEY_IS(1)) qwen::Rope<half, true>().Run(x, w, cos, sin, y, data);
  if (TILING_KEY_IS(2)) qwen::Rope<bfloat16_t, true>().Run(x, w, cos, sin, y, data);
}
