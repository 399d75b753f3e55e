#include "swiglu.h"

extern "C" __global__ __aicore__ void qwen_swiglu(GM_ADDR gate, GM_ADDR up, GM_ADDR y, GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(SwigluTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::Swiglu<float>().Run(gate, up, y, data);
  if (TILING_KEY_IS(1)) qwen::Swiglu<half>().Run(gate, up, y, data);
  if (TILING_KEY_IS(2)) qwen::Swiglu<bfloat16_t>().Run(gate, up, y, data);
}
