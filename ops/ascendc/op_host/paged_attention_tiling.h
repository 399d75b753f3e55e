#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(PagedAttentionTiling)
TILING_DATA_FIELD_DEF(uint32_t, batch);
TILING_DATA_FIELD_DEF(uint32_t, heads);
TILING_DATA_FIELD_DEF(uint32_t, kv_heads);
TILING_DATA_FIELD_DEF(uint32_t, size);   // of a head
TILING_DATA_FIELD_DEF(uint32_t, page);   // tokens of it
TILING_DATA_FIELD_DEF(uint32_t, pages);  // of a row's table
TILING_DATA_FIELD_DEF(float, scale);
END_TILING_DATA_DEF;

}  // namespace optiling
