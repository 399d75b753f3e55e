// The types of AscendC's numbers and enumerations.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using half = _Float16;

// bfloat16: the upper half of a float32. As on the chip, it has casts but no arithmetic.
struct bfloat16_t {
  uint16_t bits = 0;
};

enum class QuantMode_t { NoQuant = 0, F322F16 = 1, F322BF16 = 2 };
using event_t = int32_t;
using TEventID = int32_t;

namespace emulator {

inline float to_float(float x) { return x; }
inline float to_float(half x) { return static_cast<float>(x); }
inline float to_float(int32_t x) { return static_cast<float>(x); }
inline float to_float(bfloat16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <typename T>
inline T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bfloat16_t from_float(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {static_cast<uint16_t>((bits >> 16) | 64)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <typename T>
constexpr const char *type_name() {
  if (std::is_same_v<T, float>) return "float";
  if (std::is_same_v<T, half>) return "half";
  if (std::is_same_v<T, bfloat16_t>) return "bfloat16_t";
  if (std::is_same_v<T, int32_t>) return "int32_t";
  return "uint32_t";
}

template <typename T, typename... Ts>
constexpr bool is_one_of = (std::is_same_v<T, Ts> || ...);

}  // namespace emulator

namespace AscendC {

enum class TPosition : uint8_t { GM, A1, A2, B1, B2, CO1, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

enum class HardEvent : uint8_t {
  MTE2_MTE1,
  MTE1_MTE2,
  MTE1_M,
  M_MTE1,
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  M_FIX,
  FIX_M,
  MTE3_MTE2,
  MTE2_MTE3,
  S_V,
  V_S,
  S_MTE2,
  MTE2_S,
  S_MTE3,
  MTE3_S,
  FIX_MTE2,
  MTE2_FIX,
  FIX_S,
  M_S,
};

enum class RoundMode : uint8_t { CAST_NONE, CAST_RINT, CAST_FLOOR, CAST_CEIL, CAST_ROUND, CAST_TRUNC, CAST_ODD };
enum class ReduceOrder : uint8_t { ORDER_VALUE_INDEX, ORDER_INDEX_VALUE, ORDER_ONLY_VALUE, ORDER_ONLY_INDEX };
enum class CO2Layout : uint8_t { NZ, ROW_MAJOR, COLUMN_MAJOR };

// Helpers of CANN's header: here for their names alone, which a kernel's own helper outside a namespace would be ambiguous with.
constexpr inline uint32_t DivCeil(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
constexpr inline uint32_t AlignUp(uint32_t a, uint32_t b) { return DivCeil(a, b) * b; }

template <typename A, typename B>
struct IsSameType {
  static constexpr bool value = std::is_same_v<A, B>;
};

}  // namespace AscendC
