#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(TopKTiling)
TILING_DATA_FIELD_DEF(uint32_t, rows);
TILING_DATA_FIELD_DEF(uint32_t, experts);
TILING_DATA_FIELD_DEF(uint32_t, k);
TILING_DATA_FIELD_DEF(uint32_t, tile);    // rows in UB at a time
TILING_DATA_FIELD_DEF(uint32_t, shares);  // whether weights are divided by their sum
END_TILING_DATA_DEF;

BEGIN_TILING_DATA_DEF(PermuteTiling)
TILING_DATA_FIELD_DEF(uint32_t, tokens);
TILING_DATA_FIELD_DEF(uint32_t, k);
TILING_DATA_FIELD_DEF(uint32_t, experts);
TILING_DATA_FIELD_DEF(uint32_t, width);  // of a row
TILING_DATA_FIELD_DEF(uint32_t, rows);   // there are, for a slot one past the last is none
END_TILING_DATA_DEF;

}  // namespace optiling
