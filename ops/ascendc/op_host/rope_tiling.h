#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(RopeTiling)
TILING_DATA_FIELD_DEF(uint32_t, tokens);
TILING_DATA_FIELD_DEF(uint32_t, heads);
TILING_DATA_FIELD_DEF(uint32_t, half);   // of a head
TILING_DATA_FIELD_DEF(uint32_t, tile);   // tokens in UB at a time
TILING_DATA_FIELD_DEF(uint32_t, parts);  // of the tokens, whose sums for dw are made apart
TILING_DATA_FIELD_DEF(int32_t, sign);    // -1: turned back
TILING_DATA_FIELD_DEF(float, eps);
END_TILING_DATA_DEF;

}  // namespace optiling
