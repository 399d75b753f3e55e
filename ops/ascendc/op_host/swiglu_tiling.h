#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(SwigluTiling)
TILING_DATA_FIELD_DEF(uint32_t, tiles);
TILING_DATA_FIELD_DEF(uint32_t, tile);  // elements in UB at a time
TILING_DATA_FIELD_DEF(uint64_t, size);
END_TILING_DATA_DEF;

}  // namespace optiling
