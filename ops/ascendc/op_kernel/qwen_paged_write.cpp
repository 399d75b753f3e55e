#include "paged_write.h"

extern "C" __global__ __aicore__ void qwen_paged_write(GM_ADDR cache, GM_ADDR fresh, GM_ADDR slot, GM_ADDR done, GM_ADDR workspace,
                                                       GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  GET_TILING_DATA_WITH_STRUCT(PagedWriteTiling, data, tiling);
  if (TILING_KEY_IS(0)) qwen::PagedWrite<float>().Run(cache, fresh, slot, done, data);
  if (TILING_KEY_IS(1)) qwen::PagedWrite<half>().Run(cache, fresh, slot, done, data);
  if (TILING_KEY_IS(2)) qwen::PagedWrite<bfloat16_t>().Run(cache, fresh, slot, done, data);
}
