// Tiling data, emulated: a struct that the host writes and the kernel reads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define BEGIN_TILING_DATA_DEF(name) struct name {
#define TILING_DATA_FIELD_DEF(type, field) \
  type field = 0;                          \
  void set_##field(type value) { field = value; }
#define END_TILING_DATA_DEF                                                                         \
  size_t GetDataSize() const { return sizeof(*this); }                                              \
  void SaveToBuffer(void *to, size_t capacity) const {                                              \
    if (sizeof(*this) <= capacity) std::memcpy(to, static_cast<const void *>(this), sizeof(*this)); \
  }                                                                                                 \
  }
#define REGISTER_TILING_DATA_CLASS(op, type) static_assert(sizeof(type) <= 2048, "tiling data of " #op " is too large");
