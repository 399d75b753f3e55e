// Instructions of the vector unit: on the first `count` elements, or on repeats of up to 256 bytes with strides in blocks of 32 bytes.
#pragma once
#include <algorithm>

#include "tensor.h"

namespace AscendC {

struct BinaryRepeatParams {
  uint8_t dstBlkStride = 1, src0BlkStride = 1, src1BlkStride = 1, dstRepStride = 8, src0RepStride = 8, src1RepStride = 8;
  BinaryRepeatParams() = default;
  BinaryRepeatParams(uint8_t d, uint8_t a, uint8_t b, uint8_t dr, uint8_t ar, uint8_t br)
      : dstBlkStride(d), src0BlkStride(a), src1BlkStride(b), dstRepStride(dr), src0RepStride(ar), src1RepStride(br) {}
};

struct BrcbRepeatParams {
  uint16_t dstBlkStride = 1, dstRepStride = 8;
  BrcbRepeatParams() = default;
  BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}
};

}  // namespace AscendC

namespace emulator {

// Integers wrap around; whether the chip's do is left open.
template <typename T>
inline T sum(T a, T b) {
  if constexpr (std::is_same_v<T, int32_t>)
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  else
    return a + b;
}
template <typename T>
inline T difference(T a, T b) {
  if constexpr (std::is_same_v<T, int32_t>)
    return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
  else
    return a - b;
}
template <typename T>
inline T product(T a, T b) {
  if constexpr (std::is_same_v<T, int32_t>)
    return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
  else
    return a * b;
}

template <typename T>
inline void vector_operand(const char *name, const char *operand, const AscendC::LocalTensor<T> &x, Where where) {
  wants_position(name, operand, x.GetPosition(), {TPosition::VECIN, TPosition::VECOUT, TPosition::VECCALC}, where);
  x.aligned(name, operand, where);
}

template <typename T>
inline void apart(const char *name, const AscendC::LocalTensor<T> &dst, const AscendC::LocalTensor<T> &src, uint32_t count, Where where) {
  const uint32_t a = dst.address(), b = src.address(), bytes = count * sizeof(T);
  if (a != b && a < b + bytes && b < a + bytes)
    fail(where, text("%s: dst and src overlap in part, by %u of %u bytes", name, bytes - (a > b ? a - b : b - a), bytes));
}

inline void some(const char *name, int32_t count, Where where) {
  if (count <= 0) fail(where, text("%s: count is %d", name, count));
}

template <typename T, typename F>
inline void binary(const char *name, const AscendC::LocalTensor<T> &dst, const AscendC::LocalTensor<T> &a, const AscendC::LocalTensor<T> &b,
                   int32_t count, Where where, const rates::Vector &rate, F f) {
  vector_operand(name, "dst", dst, where), vector_operand(name, "src0", a, where), vector_operand(name, "src1", b, where);
  some(name, count, where);
  issue(PIPE_V, where, of_repeats(name, rate, repeats_of(count * sizeof(T)), count * sizeof(T) % 256 != 0));
  if (skipped<T>()) return;
  const T *x = a.touch(name, PIPE_V, 0, count, false, where), *y = b.touch(name, PIPE_V, 0, count, false, where);
  T *z = dst.touch(name, PIPE_V, 0, count, true, where);
  apart(name, dst, a, count, where), apart(name, dst, b, count, where);
  for (int32_t i = 0; i < count; i++) z[i] = f(x[i], y[i]);
}

template <typename T, typename F>
inline void binary_repeats(const char *name, const AscendC::LocalTensor<T> &dst, const AscendC::LocalTensor<T> &a,
                           const AscendC::LocalTensor<T> &b, uint64_t mask, uint8_t repeats, const AscendC::BinaryRepeatParams &p,
                           Where where, const rates::Vector &rate, F f) {
  constexpr uint32_t c = BLOCK / sizeof(T);
  vector_operand(name, "dst", dst, where), vector_operand(name, "src0", a, where), vector_operand(name, "src1", b, where);
  if (mask < 1 || mask > 8 * c)
    fail(where, text("%s: a mask of %u elements; a repeat has 1 to %u", name, static_cast<unsigned>(mask), 8 * c));
  some(name, repeats, where);
  issue(PIPE_V, where, of_repeats(name, rate, repeats));
  if (skipped<T>()) return;
  for (uint32_t r = 0; r < repeats; r++)
    for (uint32_t k = 0; k * c < mask; k++) {
      const uint32_t n = std::min<uint32_t>(c, mask - k * c);
      const T *x = a.touch(name, PIPE_V, (r * p.src0RepStride + k * p.src0BlkStride) * c, n, false, where);
      const T *y = b.touch(name, PIPE_V, (r * p.src1RepStride + k * p.src1BlkStride) * c, n, false, where);
      T *z = dst.touch(name, PIPE_V, (r * p.dstRepStride + k * p.dstBlkStride) * c, n, true, where);
      for (uint32_t i = 0; i < n; i++) z[i] = f(x[i], y[i]);
    }
}

template <typename T, typename F>
inline void unary(const char *name, const AscendC::LocalTensor<T> &dst, const AscendC::LocalTensor<T> &src, int32_t count, Where where,
                  const rates::Vector &rate, F f) {
  vector_operand(name, "dst", dst, where), vector_operand(name, "src", src, where);
  some(name, count, where);
  issue(PIPE_V, where, of_repeats(name, rate, repeats_of(count * sizeof(T))));
  if (skipped<T>()) return;
  const T *x = src.touch(name, PIPE_V, 0, count, false, where);
  T *z = dst.touch(name, PIPE_V, 0, count, true, where);
  apart(name, dst, src, count, where);
  for (int32_t i = 0; i < count; i++) z[i] = f(x[i]);
}

}  // namespace emulator

namespace AscendC {

#define EMULATOR_BINARY(NAME, RATE, EXPRESSION, ...)                                                                         \
  template <typename T>                                                                                                      \
  inline void NAME(const LocalTensor<T> &dst, const LocalTensor<T> &src0, const LocalTensor<T> &src1, const int32_t &count,  \
                   EMULATOR_HERE) {                                                                                          \
    static_assert(emulator::is_one_of<T, __VA_ARGS__>, #NAME " does not take this type");                                    \
    const auto f = [](T a, T b) -> T { return EXPRESSION; };                                                                 \
    emulator::binary(#NAME, dst, src0, src1, count, where, emulator::rates::RATE, f);                                        \
  }                                                                                                                          \
  template <typename T>                                                                                                      \
  inline void NAME(const LocalTensor<T> &dst, const LocalTensor<T> &src0, const LocalTensor<T> &src1, uint64_t mask,         \
                   const uint8_t repeatTime, const BinaryRepeatParams &params, EMULATOR_HERE) {                              \
    static_assert(emulator::is_one_of<T, __VA_ARGS__>, #NAME " does not take this type");                                    \
    const auto f = [](T a, T b) -> T { return EXPRESSION; };                                                                 \
    emulator::binary_repeats(#NAME, dst, src0, src1, mask, repeatTime, params, where, emulator::rates::RATE, f);             \
  }

EMULATOR_BINARY(Add, ADD, emulator::sum(a, b), float, half, int32_t)
EMULATOR_BINARY(Sub, ADD, emulator::difference(a, b), float, half, int32_t)
EMULATOR_BINARY(Mul, MUL, emulator::product(a, b), float, half, int32_t)
EMULATOR_BINARY(Div, DIV, a / b, float, half)
EMULATOR_BINARY(Max, ADD, a > b ? a : b, float, half, int32_t)
EMULATOR_BINARY(Min, ADD, a < b ? a : b, float, half, int32_t)
#undef EMULATOR_BINARY

#define EMULATOR_SCALAR(NAME, RATE, EXPRESSION)                                                                                  \
  template <typename T>                                                                                                          \
  inline void NAME(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T &scalar, const int32_t &count, EMULATOR_HERE) { \
    static_assert(emulator::is_one_of<T, float, half, int32_t>, #NAME " does not take this type");                               \
    const auto f = [b = scalar](T a) -> T { return EXPRESSION; };                                                                \
    emulator::unary(#NAME, dst, src, count, where, emulator::rates::RATE, f);                                                    \
  }

EMULATOR_SCALAR(Adds, ADDS, emulator::sum(a, b))
EMULATOR_SCALAR(Muls, MULS, emulator::product(a, b))
EMULATOR_SCALAR(Maxs, MAXS, a > b ? a : b)
EMULATOR_SCALAR(Mins, MINS, a < b ? a : b)
#undef EMULATOR_SCALAR

#define EMULATOR_UNARY(NAME, RATE, EXPRESSION)                                                                        \
  template <typename T>                                                                                         \
  inline void NAME(const LocalTensor<T> &dst, const LocalTensor<T> &src, const int32_t &count, EMULATOR_HERE) { \
    static_assert(emulator::is_one_of<T, float, half>, #NAME " does not take this type");                       \
    emulator::unary(#NAME, dst, src, count, where, emulator::rates::RATE, [](T v) -> T {                                               \
      const float a = static_cast<float>(v);                                                                    \
      return static_cast<T>(EXPRESSION);                                                                        \
    });                                                                                                         \
  }

EMULATOR_UNARY(Exp, EXP, std::exp(a))
EMULATOR_UNARY(Ln, LN, std::log(a))
EMULATOR_UNARY(Abs, ABS, std::fabs(a))
EMULATOR_UNARY(Sqrt, SQRT, std::sqrt(a))
#undef EMULATOR_UNARY

// Signed numbers keep their sign.
template <typename T>
inline void ShiftRight(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T &scalarValue, const int32_t &count, EMULATOR_HERE) {
  static_assert(emulator::is_one_of<T, int32_t, uint32_t>, "ShiftRight does not take this type");
  if (scalarValue < T(0) || scalarValue > T(31)) emulator::fail(where, "ShiftRight: the emulator shifts by 0 to 31");
  emulator::unary("ShiftRight", dst, src, count, where, emulator::rates::ASSUMED_SHIFT, [by = scalarValue](T a) -> T { return a >> by; });
}

// dst += src * scalar
template <typename T>
inline void Axpy(const LocalTensor<T> &dst, const LocalTensor<T> &src, const T scalar, const int32_t &count, EMULATOR_HERE) {
  static_assert(emulator::is_one_of<T, float, half>, "Axpy does not take this type");
  emulator::binary("Axpy", dst, dst, src, count, where, emulator::rates::ASSUMED_AXPY, [scalar](T a, T b) -> T { return a + b * scalar; });
}

template <typename T>
inline void Duplicate(const LocalTensor<T> &dst, const T &scalar, const int32_t &count, EMULATOR_HERE) {
  emulator::vector_operand("Duplicate", "dst", dst, where);
  emulator::some("Duplicate", count, where);
  emulator::issue(PIPE_V, where, emulator::of_repeats("Duplicate", emulator::rates::DUPLICATE, emulator::repeats_of(count * sizeof(T))));
  if (emulator::skipped<T>()) return;
  std::fill_n(dst.touch("Duplicate", PIPE_V, 0, count, true, where), count, scalar);
}

// Each of 8 elements a repeat fills a block.
template <typename T>
inline void Brcb(const LocalTensor<T> &dst, const LocalTensor<T> &src, const uint8_t repeatTime, const BrcbRepeatParams &p, EMULATOR_HERE) {
  constexpr uint32_t c = emulator::BLOCK / sizeof(T);
  emulator::vector_operand("Brcb", "dst", dst, where), emulator::vector_operand("Brcb", "src0", src, where);
  emulator::some("Brcb", repeatTime, where);
  emulator::issue(PIPE_V, where, emulator::of_repeats("Brcb", emulator::rates::BRCB, repeatTime));
  if (emulator::skipped<T>()) return;
  for (uint32_t r = 0; r < repeatTime; r++) {
    const T *x = src.touch("Brcb", PIPE_V, r * 8, 8, false, where);
    for (uint32_t k = 0; k < 8; k++)
      std::fill_n(dst.touch("Brcb", PIPE_V, (r * p.dstRepStride + k * p.dstBlkStride) * c, c, true, where), c, x[k]);
  }
}

template <typename T, typename U>
inline void Cast(const LocalTensor<T> &dst, const LocalTensor<U> &src, const RoundMode &mode, const uint32_t count, EMULATOR_HERE) {
  using namespace emulator;
  constexpr bool widens = std::is_same_v<T, float> && is_one_of<U, half, bfloat16_t>,
                 narrows = std::is_same_v<U, float> && is_one_of<T, half, bfloat16_t>;
  constexpr bool from_int = std::is_same_v<T, float> && std::is_same_v<U, int32_t>,
                 to_int = std::is_same_v<T, int32_t> && std::is_same_v<U, float>;
  static_assert(widens || narrows || from_int || to_int, "Cast between these types is not one of the emulator's");
  vector_operand("Cast", "dst", dst, where), vector_operand("Cast", "src", src, where);
  some("Cast", static_cast<int32_t>(count), where);
  const bool sound = widens ? mode == RoundMode::CAST_NONE : mode == RoundMode::CAST_RINT || (to_int && mode == RoundMode::CAST_TRUNC);
  if (!sound)
    fail(where, text("Cast from %s to %s in round mode %d; the emulator knows CAST_NONE to wider types and CAST_RINT to others",
                     type_name<U>(), type_name<T>(), static_cast<int>(mode)));
  issue(PIPE_V, where, of_repeats("Cast", rates::CAST, repeats_of(count * std::max(sizeof(T), sizeof(U)))));
  if (skipped<T>() || skipped<U>()) return;
  const U *x = src.touch("Cast", PIPE_V, 0, count, false, where);
  T *z = dst.touch("Cast", PIPE_V, 0, count, true, where);
  for (uint32_t i = 0; i < count; i++) {
    const float wide = to_float(x[i]);
    if constexpr (to_int)
      z[i] = static_cast<int32_t>(mode == RoundMode::CAST_TRUNC ? std::trunc(wide) : std::nearbyint(wide));
    else
      z[i] = from_float<T>(wide);
  }
}

}  // namespace AscendC
