// Mathematics on scalars and vectors, by clang's elementwise builtins, and numeric limits.
#pragma once
#include "metal_types.h"

namespace metal {

#define EMU_UNARY(name, builtin)                     \
  template <typename T>                              \
  EMU_INLINE T name(T x) {                           \
    return builtin(x);                               \
  }
#define EMU_FLOAT_FUNCTIONS                          \
  EMU_UNARY(exp, __builtin_elementwise_exp)          \
  EMU_UNARY(exp2, __builtin_elementwise_exp2)        \
  EMU_UNARY(log, __builtin_elementwise_log)          \
  EMU_UNARY(log2, __builtin_elementwise_log2)        \
  EMU_UNARY(log10, __builtin_elementwise_log10)      \
  EMU_UNARY(sqrt, __builtin_elementwise_sqrt)        \
  EMU_UNARY(sin, __builtin_elementwise_sin)          \
  EMU_UNARY(cos, __builtin_elementwise_cos)          \
  EMU_UNARY(tanh, __builtin_elementwise_tanh)        \
  template <typename T>                              \
  EMU_INLINE T rsqrt(T x) {                          \
    return (T)1 / __builtin_elementwise_sqrt(x);     \
  }
EMU_FLOAT_FUNCTIONS
namespace fast {
EMU_FLOAT_FUNCTIONS
template <typename T>
EMU_INLINE T divide(T x, T y) {
  return x / y;
}
}
namespace precise {
EMU_FLOAT_FUNCTIONS
}
EMU_UNARY(floor, __builtin_elementwise_floor)
EMU_UNARY(ceil, __builtin_elementwise_ceil)
EMU_UNARY(rint, __builtin_elementwise_rint)
EMU_UNARY(round, __builtin_elementwise_round)
EMU_UNARY(abs, __builtin_elementwise_abs)
EMU_UNARY(fabs, __builtin_elementwise_abs)
#undef EMU_UNARY

#define EMU_BINARY(name, builtin)                    \
  template <typename T>                              \
  EMU_INLINE T name(T x, T y) {                      \
    return builtin(x, y);                            \
  }
EMU_BINARY(min, __builtin_elementwise_min)
EMU_BINARY(max, __builtin_elementwise_max)
EMU_BINARY(fmin, __builtin_elementwise_min)
EMU_BINARY(fmax, __builtin_elementwise_max)
EMU_BINARY(pow, __builtin_elementwise_pow)
EMU_BINARY(copysign, __builtin_elementwise_copysign)
#undef EMU_BINARY
template <typename T>
EMU_INLINE T fma(T x, T y, T z) {
  return __builtin_elementwise_fma(x, y, z);
}
template <typename T>
EMU_INLINE T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
EMU_INLINE bool isnan(float x) { return __builtin_isnan(x); }
EMU_INLINE bool isinf(float x) { return __builtin_isinf(x); }
EMU_INLINE bool isfinite(float x) { return __builtin_isfinite(x); }
EMU_INLINE bool signbit(float x) { return __builtin_bit_cast(uint, x) >> 31; }
template <typename T>
EMU_INLINE T select(T no, T yes, bool c) {
  return c ? yes : no;
}
template <typename T, typename C>
EMU_INLINE enable_if_t<(emu_vec<T>::count > 1 && emu_vec<C>::count > 1), T> select(
    T no, T yes, C c) {
  for (int i = 0; i < emu_vec<T>::count; i++) no[i] = c[i] ? yes[i] : no[i];
  return no;
}
template <typename T>
EMU_INLINE typename emu_vec<T>::scalar dot(T a, T b) {
  T p = a * b;
  typename emu_vec<T>::scalar s = p[0];
  for (int i = 1; i < emu_vec<T>::count; i++) s += p[i];
  return s;
}

template <typename T>
struct numeric_limits;
#define EMU_INT_LIMITS(T, low, high)                       \
  template <>                                              \
  struct numeric_limits<T> {                               \
    static constexpr T max() { return high; }              \
    static constexpr T min() { return low; }               \
    static constexpr T lowest() { return low; }            \
  };
EMU_INT_LIMITS(int8_t, -128, 127)
EMU_INT_LIMITS(uint8_t, 0, 255)
EMU_INT_LIMITS(int16_t, -32768, 32767)
EMU_INT_LIMITS(uint16_t, 0, 65535)
EMU_INT_LIMITS(int32_t, -2147483647 - 1, 2147483647)
EMU_INT_LIMITS(uint32_t, 0, 4294967295u)
EMU_INT_LIMITS(int64_t, -9223372036854775807l - 1, 9223372036854775807l)
EMU_INT_LIMITS(uint64_t, 0, 18446744073709551615ul)
#undef EMU_INT_LIMITS
#define EMU_FLOAT_LIMITS(T, bits, high, low, eps, inf, nan)                        \
  template <>                                                                      \
  struct numeric_limits<T> {                                                       \
    static constexpr T max() { return __builtin_bit_cast(T, (bits)high); }         \
    static constexpr T lowest() { return __builtin_bit_cast(T, (bits)(high | ((bits)1 << (sizeof(T) * 8 - 1)))); } \
    static constexpr T min() { return __builtin_bit_cast(T, (bits)low); }          \
    static constexpr T epsilon() { return __builtin_bit_cast(T, (bits)eps); }      \
    static constexpr T infinity() { return __builtin_bit_cast(T, (bits)inf); }     \
    static constexpr T quiet_NaN() { return __builtin_bit_cast(T, (bits)nan); }    \
  };
EMU_FLOAT_LIMITS(float, uint, 0x7f7fffff, 0x00800000, 0x34000000, 0x7f800000, 0x7fc00000)
EMU_FLOAT_LIMITS(half, ushort, 0x7bff, 0x0400, 0x1400, 0x7c00, 0x7e00)
EMU_FLOAT_LIMITS(bfloat, ushort, 0x7f7f, 0x0080, 0x3c00, 0x7f80, 0x7fc0)
#undef EMU_FLOAT_LIMITS

}  // namespace metal
