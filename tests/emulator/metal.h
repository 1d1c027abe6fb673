// Metal's vocabulary for clang: types, address spaces, and the builtins that MLX's own
// kernels use. Nothing else is declared, so any other builtin is a compile error.
//
// device, constant and threadgroup are clang address spaces 1, 2 and 3; clang refuses to mix
// them, and instrument.py turns every load and store in them into a checked one.
#pragma once
#include "metal_math.h"
#include "metal_simd.h"
#include "metal_types.h"

template <typename To, typename From>
EMU_INLINE To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, x);
}

// ---- what MLX puts before every custom kernel -------------------------------------------
using namespace metal;
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265358979323846f
#define M_SQRT2_F 1.41421356237309504880f
typedef half float16_t;
typedef bfloat bfloat16_t;

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
// instrument.py keeps these out of other variables' reach, and poisons them.
#define EMU_THREADGROUP_VARIABLE static __attribute__((used, address_space(3)))
#define METAL_FUNC inline __attribute__((always_inline))
#define MTL_CONST constant
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define double metal_has_no_double

template <typename T>
struct Limits {
  static constexpr T max = metal::numeric_limits<T>::max();
  static constexpr T min = metal::numeric_limits<T>::min();
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = metal::numeric_limits<T>::min();
};
#define EMU_LIMITS(T)                                                        \
  template <>                                                                \
  struct Limits<T> {                                                         \
    static constexpr T max = metal::numeric_limits<T>::infinity();           \
    static constexpr T min = -metal::numeric_limits<T>::infinity();          \
    static constexpr T finite_max = metal::numeric_limits<T>::max();         \
    static constexpr T finite_min = metal::numeric_limits<T>::lowest();      \
  };
EMU_LIMITS(float)
EMU_LIMITS(half)
#undef EMU_LIMITS

template <typename T, typename U>
EMU_INLINE T ceildiv(T n, U m) {
  return (n + m - 1) / m;
}
template <typename I = int64_t>
EMU_INLINE I elem_to_loc(I elem, constant int* shape, constant int64_t* strides, int ndim) {
  I loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * I(strides[i]);
    elem /= shape[i];
  }
  return loc;
}

// A constructor is a call of emu_make (metal_types.h); without the bracket it is the type.
#define char2(...) emu_make<char2>(__VA_ARGS__)
#define char3(...) emu_make<char3>(__VA_ARGS__)
#define char4(...) emu_make<char4>(__VA_ARGS__)
#define uchar2(...) emu_make<uchar2>(__VA_ARGS__)
#define uchar3(...) emu_make<uchar3>(__VA_ARGS__)
#define uchar4(...) emu_make<uchar4>(__VA_ARGS__)
#define short2(...) emu_make<short2>(__VA_ARGS__)
#define short3(...) emu_make<short3>(__VA_ARGS__)
#define short4(...) emu_make<short4>(__VA_ARGS__)
#define ushort2(...) emu_make<ushort2>(__VA_ARGS__)
#define ushort3(...) emu_make<ushort3>(__VA_ARGS__)
#define ushort4(...) emu_make<ushort4>(__VA_ARGS__)
#define int2(...) emu_make<int2>(__VA_ARGS__)
#define int3(...) emu_make<int3>(__VA_ARGS__)
#define int4(...) emu_make<int4>(__VA_ARGS__)
#define uint2(...) emu_make<uint2>(__VA_ARGS__)
#define uint3(...) emu_make<uint3>(__VA_ARGS__)
#define uint4(...) emu_make<uint4>(__VA_ARGS__)
#define long2(...) emu_make<long2>(__VA_ARGS__)
#define long4(...) emu_make<long4>(__VA_ARGS__)
#define ulong2(...) emu_make<ulong2>(__VA_ARGS__)
#define ulong4(...) emu_make<ulong4>(__VA_ARGS__)
#define half2(...) emu_make<half2>(__VA_ARGS__)
#define half3(...) emu_make<half3>(__VA_ARGS__)
#define half4(...) emu_make<half4>(__VA_ARGS__)
#define float2(...) emu_make<float2>(__VA_ARGS__)
#define float3(...) emu_make<float3>(__VA_ARGS__)
#define float4(...) emu_make<float4>(__VA_ARGS__)
#define bfloat2(...) emu_make<bfloat2>(__VA_ARGS__)
#define bfloat3(...) emu_make<bfloat3>(__VA_ARGS__)
#define bfloat4(...) emu_make<bfloat4>(__VA_ARGS__)
