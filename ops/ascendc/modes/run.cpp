// Runs one kernel outside an operator package: in CANN's CPU mode (ASCENDC_CPU_DEBUG), or built for the device and run in the simulator.
//
//   run BLOCKS BYTES...   BYTES of each of the kernel's arrays in order: inputs, outputs, the workspace, the tiling data
//
// Array i is read from the file i.bin, and is zeros if there is none. If the file exists, the array is written back to it.
// ops/ascendc/build.py writes call.h: the declarations of the mode, and Call(blocks, arrays).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "call.h"

namespace {

[[noreturn]] void Fail(const char *what, int i) {
  std::fprintf(stderr, "run: %s %d\n", what, i);
  std::exit(1);
}

std::FILE *Open(int i, const char *mode) {
  char name[32];
  std::snprintf(name, sizeof name, "%d.bin", i);
  return std::fopen(name, mode);
}

// The bytes of array i, and whether they came from a file.
bool Read(int i, std::vector<uint8_t> &bytes) {
  std::FILE *file = Open(i, "rb");
  if (file == nullptr) return false;
  if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) Fail("too few bytes in the file of array", i);
  std::fclose(file);
  return true;
}

void Write(int i, const std::vector<uint8_t> &bytes) {
  std::FILE *file = Open(i, "wb");
  if (file == nullptr || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fclose(file) != 0)
    Fail("cannot write the file of array", i);
}

#ifdef ASCENDC_CPU_DEBUG

void Begin() {}
void End() {}
uint8_t *Place(const std::vector<uint8_t> &bytes, int i) {
  auto *array = static_cast<uint8_t *>(AscendC::GmAlloc(bytes.size()));
  if (array == nullptr) Fail("no memory for array", i);
  std::memcpy(array, bytes.data(), bytes.size());
  return array;
}
void Fetch(std::vector<uint8_t> &bytes, uint8_t *array) {
  std::memcpy(bytes.data(), array, bytes.size());
  AscendC::GmFree(array);
}
void Run(uint32_t blocks, uint8_t **arrays) { Call(blocks, arrays); }

#else

aclrtStream stream = nullptr;

void Check(aclError status, const char *what) {
  if (status != ACL_SUCCESS) Fail(what, static_cast<int>(status));
}
void Begin() {
  Check(aclInit(nullptr), "aclInit gives");
  Check(aclrtSetDevice(0), "aclrtSetDevice gives");
  Check(aclrtCreateStream(&stream), "aclrtCreateStream gives");
}
void End() {
  Check(aclrtDestroyStream(stream), "aclrtDestroyStream gives");
  Check(aclrtResetDevice(0), "aclrtResetDevice gives");
  Check(aclFinalize(), "aclFinalize gives");
}
uint8_t *Place(const std::vector<uint8_t> &bytes, int i) {
  void *array = nullptr;
  if (aclrtMalloc(&array, bytes.size(), ACL_MEM_MALLOC_HUGE_FIRST) != ACL_SUCCESS) Fail("no memory for array", i);
  Check(aclrtMemcpy(array, bytes.size(), bytes.data(), bytes.size(), ACL_MEMCPY_HOST_TO_DEVICE), "aclrtMemcpy to the device gives");
  return static_cast<uint8_t *>(array);
}
void Fetch(std::vector<uint8_t> &bytes, uint8_t *array) {
  Check(aclrtMemcpy(bytes.data(), bytes.size(), array, bytes.size(), ACL_MEMCPY_DEVICE_TO_HOST), "aclrtMemcpy to the host gives");
  Check(aclrtFree(array), "aclrtFree gives");
}
void Run(uint32_t blocks, uint8_t **arrays) {
  Call(blocks, stream, arrays);
  Check(aclrtSynchronizeStream(stream), "aclrtSynchronizeStream gives");
}

#endif

}  // namespace

int main(int argc, char **argv) {
  if (argc != ARRAYS + 2) Fail("the arguments are the blocks and the bytes of each array; arrays:", ARRAYS);
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<bool> kept;
  std::vector<uint8_t *> arrays;
  Begin();
  for (int i = 0; i < ARRAYS; i++) {
    bytes.emplace_back(std::strtoull(argv[i + 2], nullptr, 10));
    kept.push_back(Read(i, bytes[i]));
    arrays.push_back(Place(bytes[i], i));
  }
  Run(static_cast<uint32_t>(std::strtoul(argv[1], nullptr, 10)), arrays.data());
  for (int i = 0; i < ARRAYS; i++) {
    Fetch(bytes[i], arrays[i]);
    if (kept[i]) Write(i, bytes[i]);
  }
  End();
  return 0;
}
