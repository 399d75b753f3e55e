#include "routing.h"

extern "C" __global__ __aicore__ void qwen_combine_grad(GM_ADDR y, GM_ADDR slot, GM_ADDR weight, GM_ADDR dout, GM_ADDR dy, GM_ADDR dweight,
                                                        GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PermuteTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::CombineGrad<float>().Run(y, slot, weight, dout, dy, dweight, data);
  if (TILING_KEY_IS(1)) qwen::CombineGrad<half>().Run(y, slot, weight, dout, dy, dweight, data);
  if (TILING_KEY_IS(2)) qwen::CombineGrad<bfloat16_t>().Run(y, slot, weight, dout, dy, dweight, data);
}
