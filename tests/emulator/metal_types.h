// Metal's scalar and vector types, and the traits its standard library has for them.
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
constexpr half operator""h(long double x) { return (half)x; }

// Not checked for undefined behaviour: the line would be one of these headers.
#define EMU_INLINE \
  static inline __attribute__((always_inline, unused, no_sanitize("undefined")))

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define EMU_VECTORS(T)                                  \
  typedef T T##2 __attribute__((ext_vector_type(2)));   \
  typedef T T##3 __attribute__((ext_vector_type(3)));   \
  typedef T T##4 __attribute__((ext_vector_type(4)));
EMU_VECTORS(char)
EMU_VECTORS(uchar)
EMU_VECTORS(short)
EMU_VECTORS(ushort)
EMU_VECTORS(int)
EMU_VECTORS(uint)
EMU_VECTORS(long)
EMU_VECTORS(ulong)
EMU_VECTORS(half)
EMU_VECTORS(float)
EMU_VECTORS(bfloat)
#undef EMU_VECTORS

// ---- type traits ------------------------------------------------------------------------
template <typename T, T v>
struct integral_constant {
  static constexpr T value = v;
  constexpr operator T() const { return v; }
};
template <bool b>
using bool_constant = integral_constant<bool, b>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <typename A, typename B>
struct is_same : false_type {};
template <typename A>
struct is_same<A, A> : true_type {};
template <typename A, typename B>
constexpr bool is_same_v = is_same<A, B>::value;
template <bool b, typename A, typename B>
struct conditional {
  typedef A type;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  typedef B type;
};
template <bool b, typename A, typename B>
using conditional_t = typename conditional<b, A, B>::type;
template <bool b, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool b, typename T = void>
using enable_if_t = typename enable_if<b, T>::type;

template <typename T>
struct emu_type {
  static constexpr int id = -1;
};
#define EMU_TYPE(T, i)              \
  template <>                       \
  struct emu_type<T> {              \
    static constexpr int id = i;    \
  };
EMU_TYPE(float, 0)
EMU_TYPE(half, 1)
EMU_TYPE(int, 2)
EMU_TYPE(uint, 3)
EMU_TYPE(short, 4)
EMU_TYPE(ushort, 5)
EMU_TYPE(signed char, 6)
EMU_TYPE(char, 6)
EMU_TYPE(uchar, 7)
EMU_TYPE(long, 8)
EMU_TYPE(ulong, 9)
EMU_TYPE(bool, 7)
#undef EMU_TYPE
template <typename T>
constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
constexpr bool is_integral_v = emu_type<T>::id >= 2;
template <typename T>
constexpr bool is_signed_v = is_floating_point_v<T> || (is_integral_v<T> && T(-1) < T(0));

// A scalar is a vector of one component.
template <typename T>
struct emu_vec {
  typedef T scalar;
  static constexpr int count = 1;
};
#define EMU_VEC(N)                                           \
  template <typename T>                                      \
  struct emu_vec<T __attribute__((ext_vector_type(N)))> {    \
    typedef T scalar;                                        \
    static constexpr int count = N;                          \
  };
EMU_VEC(2)
EMU_VEC(3)
EMU_VEC(4)
#undef EMU_VEC

// ---- vector constructors ----------------------------------------------------------------
// clang's functional cast would reinterpret bits; Metal's converts values. The macros below
// send every `float4(...)` here.
template <typename V, typename A, bool scalar = emu_vec<A>::count == 1>
struct emu_maker {
  EMU_INLINE V make(A a) { return (V)(typename emu_vec<V>::scalar)a; }
};
template <typename V, typename A>
struct emu_maker<V, A, false> {
  EMU_INLINE V make(A a) { return __builtin_convertvector(a, V); }
};
template <typename V, typename A>
EMU_INLINE V emu_make(A a) {
  static_assert(emu_vec<A>::count == 1 || emu_vec<A>::count == emu_vec<V>::count,
                "a vector is made of as many components as it has");
  return emu_maker<V, A>::make(a);
}
template <typename V, typename S>
EMU_INLINE void emu_put(V& v, int& i, S s, enable_if_t<emu_vec<S>::count == 1>* = nullptr) {
  v[i++] = (typename emu_vec<V>::scalar)s;
}
template <typename V, typename S>
EMU_INLINE void emu_put(V& v, int& i, S s, enable_if_t<(emu_vec<S>::count > 1)>* = nullptr) {
  for (int k = 0; k < emu_vec<S>::count; k++) v[i++] = (typename emu_vec<V>::scalar)s[k];
}
template <typename... A>
struct emu_components {
  static constexpr int value = 0;
};
template <typename A, typename... B>
struct emu_components<A, B...> {
  static constexpr int value = emu_vec<A>::count + emu_components<B...>::value;
};
template <typename V, typename A, typename B, typename... C>
EMU_INLINE V emu_make(A a, B b, C... c) {
  static_assert(emu_components<A, B, C...>::value == emu_vec<V>::count,
                "a vector is made of as many components as it has");
  V v;
  int i = 0;
  emu_put(v, i, a);
  emu_put(v, i, b);
  int rest[] = {0, (emu_put(v, i, c), 0)...};
  (void)rest;
  return v;
}

}  // namespace metal
