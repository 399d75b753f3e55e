#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(AttentionTiling)
TILING_DATA_FIELD_DEF(uint32_t, batch);
TILING_DATA_FIELD_DEF(uint32_t, queries);
TILING_DATA_FIELD_DEF(uint32_t, keys);
TILING_DATA_FIELD_DEF(uint32_t, heads);
TILING_DATA_FIELD_DEF(uint32_t, kv_heads);
TILING_DATA_FIELD_DEF(uint32_t, size);      // of a head
TILING_DATA_FIELD_DEF(uint32_t, in_order);  // no key is seen that is later in the row than the query
TILING_DATA_FIELD_DEF(float, scale);
END_TILING_DATA_DEF;

}  // namespace optiling
