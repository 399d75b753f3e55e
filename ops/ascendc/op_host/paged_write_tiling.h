#pragma once
#include "register/tilingdata_base.h"

namespace optiling {

BEGIN_TILING_DATA_DEF(PagedWriteTiling)
TILING_DATA_FIELD_DEF(uint32_t, rows);   // to write
TILING_DATA_FIELD_DEF(uint32_t, width);  // of a row
TILING_DATA_FIELD_DEF(uint32_t, slots);
END_TILING_DATA_DEF;

}  // namespace optiling
