#include "attention.h"

extern "C" __global__ __aicore__ void qwen_attention_grad(GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR segment, GM_ADDR key_segment,
                                                          GM_ADDR order, GM_ADDR key_order, GM_ADDR o, GM_ADDR lse, GM_ADDR dout,
                                                          GM_ADDR dlse, GM_ADDR dq, GM_ADDR dk, GM_ADDR dv, GM_ADDR workspace,
                                                          GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIC_1_2);
  GET_TILING_DATA_WITH_STRUCT(AttentionTiling, data, tiling);
  if (TILING_KEY_IS(0))
    qwen::AttentionGrad<float>().Run(q, k, v, segment, key_segment, order, key_order, o, lse, dout, dlse, dq, dk, dv, workspace, data);
  if (TILING_KEY_IS(1))
    qwen::AttentionGrad<half>().Run(q, k, v, segment, key_segment, order, key_order, o, lse, dout, dlse, dq, dk, dv, workspace, data);
  if (TILING_KEY_IS(2))
    qwen::AttentionGrad<bfloat16_t>().Run(q, k, v, segment, key_segment, order, key_order, o, lse, dout, dlse, dq, dk, dv, workspace, data);
}
