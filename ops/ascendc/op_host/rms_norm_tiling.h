#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(RmsNormTiling)
TILING_DATA_FIELD_DEF(uint32_t, rows);
TILING_DATA_FIELD_DEF(uint32_t, n);
TILING_DATA_FIELD_DEF(uint32_t, tile);     // rows in UB at a time
TILING_DATA_FIELD_DEF(uint32_t, buffers);  // of a queue
TILING_DATA_FIELD_DEF(uint32_t, parts);    // of the rows, whose sums for dw are made apart
TILING_DATA_FIELD_DEF(float, eps);
END_TILING_DATA_DEF;

}  // namespace optiling
