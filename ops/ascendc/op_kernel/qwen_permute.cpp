#include "routing.h"

extern "C" __global__ __aicore__ void qwen_permute(GM_ADDR x, GM_ADDR expert, GM_ADDR rows, GM_ADDR slot, GM_ADDR group, GM_ADDR workspace,
                                                   GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
  GET_TILING_DATA_WITH_STRUCT(PermuteTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::Permute<float>().Run(x, expert, rows, slot, group, workspace, data);
  if (TILING_KEY_IS(1)) qwen::Permute<half>().Run(x, expert, rows, slot, group, workspace, data);
  if (TILING_KEY_IS(2)) qwen::Permute<bfloat16_t>().Run(x, expert, rows, slot, group, workspace, data);
}
