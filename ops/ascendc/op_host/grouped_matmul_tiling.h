#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(GroupedMatmulTiling)
TILING_DATA_FIELD_DEF(uint32_t, groups);
TILING_DATA_FIELD_DEF(uint32_t, from);  // w is [groups, from, to]
TILING_DATA_FIELD_DEF(uint32_t, to);
END_TILING_DATA_DEF;

}  // namespace optiling
