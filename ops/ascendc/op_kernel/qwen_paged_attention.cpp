#include "paged_attention.h"

extern "C" __global__ __aicore__ void qwen_paged_attention(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR table, GM_ADDR length, GM_ADDR o,
                                                           GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  GET_TILING_DATA_WITH_STRUCT(PagedAttentionTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::PagedAttention<float>().Run(q, k, v, table, length, o, workspace, data);
  if (TILING_KEY_IS(1)) qwen::PagedAttention<half>().Run(q, k, v, table, length, o, workspace, data);
  if (TILING_KEY_IS(2)) qwen::PagedAttention<bfloat16_t>().Run(q, k, v, table, length, o, workspace, data);
}
