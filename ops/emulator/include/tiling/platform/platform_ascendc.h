// What a tiling function asks of the chip, emulated.
#pragma once
#include "../../../machine.h"

namespace platform_ascendc {

enum class CoreMemType { L0_A, L0_B, L0_C, L1, UB };

class PlatformAscendC {
 public:
  explicit PlatformAscendC(void *) {}
  uint32_t GetCoreNumAic() const { return emulator::cores(); }
  uint32_t GetCoreNumAiv() const { return 2 * emulator::cores(); }
  uint32_t GetLibApiWorkSpaceSize() const { return 1024; }
  void GetCoreMemSize(CoreMemType type, uint64_t &bytes) const {
    using emulator::Memory;
    const Memory memories[] = {Memory::L0A, Memory::L0B, Memory::L0C, Memory::L1, Memory::UB};
    bytes = emulator::CAPACITY[static_cast<int>(memories[static_cast<int>(type)])];
  }
};

}  // namespace platform_ascendc
