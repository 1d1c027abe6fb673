// What the threads of a SIMD group or threadgroup do together; runtime.cpp does it.
#pragma once
#include "ops.h"
#include "metal_types.h"

// A place in the kernel: line << 10 | column, of whoever called the function with this default.
#define EMU_AT_CALLER int line = __builtin_LINE(), int column = __builtin_COLUMN()
#define EMU_SITE (((unsigned)line << 10) | (unsigned)(column < 1023 ? column : 1023))

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((int)a | (int)b);
}

extern "C" {
void emu_barrier(unsigned scope, unsigned flags, unsigned site)
    __attribute__((convergent, nothrow));
void emu_simd(unsigned op, int type, unsigned count, void* data, void* fill, int param,
              unsigned site) __attribute__((convergent, nothrow));
}

EMU_INLINE void threadgroup_barrier(mem_flags flags, EMU_AT_CALLER) {
  emu_barrier(0, (unsigned)flags, EMU_SITE);
}
EMU_INLINE void simdgroup_barrier(mem_flags flags, EMU_AT_CALLER) {
  emu_barrier(1, (unsigned)flags, EMU_SITE);
}

template <typename T>
EMU_INLINE T emu_simd_of(unsigned op, T x, T fill, int param, unsigned site) {
  typedef typename emu_vec<T>::scalar S;
  static_assert(emu_type<S>::id >= 0, "SIMD-group functions take half, float and integer types");
  emu_simd(op, emu_type<S>::id, emu_vec<T>::count, &x, &fill, param, site);
  return x;
}
#define EMU_SIMD(name, op)                                       \
  template <typename T>                                          \
  EMU_INLINE T name(T x, EMU_AT_CALLER) {                        \
    return emu_simd_of(op, x, x, 0, EMU_SITE);                   \
  }
EMU_SIMD(simd_sum, emu::SUM)
EMU_SIMD(simd_product, emu::PRODUCT)
EMU_SIMD(simd_min, emu::MIN)
EMU_SIMD(simd_max, emu::MAX)
EMU_SIMD(simd_prefix_inclusive_sum, emu::INCLUSIVE_SUM)
EMU_SIMD(simd_prefix_exclusive_sum, emu::EXCLUSIVE_SUM)
EMU_SIMD(simd_prefix_inclusive_product, emu::INCLUSIVE_PRODUCT)
EMU_SIMD(simd_prefix_exclusive_product, emu::EXCLUSIVE_PRODUCT)
#undef EMU_SIMD
EMU_INLINE bool simd_all(bool x, EMU_AT_CALLER) {
  return emu_simd_of(emu::ALL, (uint)x, (uint)x, 0, EMU_SITE);
}
EMU_INLINE bool simd_any(bool x, EMU_AT_CALLER) {
  return emu_simd_of(emu::ANY, (uint)x, (uint)x, 0, EMU_SITE);
}
#define EMU_SHUFFLE(name, op)                                    \
  template <typename T>                                          \
  EMU_INLINE T name(T x, ushort lane, EMU_AT_CALLER) {           \
    return emu_simd_of(op, x, x, lane, EMU_SITE);                \
  }
EMU_SHUFFLE(simd_shuffle, emu::SHUFFLE)
EMU_SHUFFLE(simd_shuffle_xor, emu::XOR)
EMU_SHUFFLE(simd_shuffle_up, emu::UP)
EMU_SHUFFLE(simd_shuffle_down, emu::DOWN)
#undef EMU_SHUFFLE
template <typename T>
EMU_INLINE T simd_shuffle_and_fill_up(T x, T fill, ushort delta, EMU_AT_CALLER) {
  return emu_simd_of(emu::FILL_UP, x, fill, delta, EMU_SITE);
}
// An 8 x 8 matrix over the lanes of a SIMD group; each lane holds two neighbours of one row.
template <typename T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8 x 8 matrices");
  typedef vec<T, 2> storage_type;
  storage_type elements;
  simdgroup_matrix() : elements((storage_type)(T)__builtin_nanf("")) {}
  storage_type& thread_elements() { return elements; }
  const storage_type& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <typename D, typename A, typename B, typename C>
EMU_INLINE void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, EMU_AT_CALLER) {
  float v[8] = {(float)a.elements.x, (float)a.elements.y, (float)b.elements.x,
                (float)b.elements.y, (float)c.elements.x, (float)c.elements.y};
  emu_simd(emu::MATRIX, 0, 8, v, v, 0, EMU_SITE);
  d.elements.x = (D)v[6];
  d.elements.y = (D)v[7];
}
template <typename D, typename A, typename B>
EMU_INLINE void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b, EMU_AT_CALLER) {
  float v[8] = {(float)a.elements.x, (float)a.elements.y, (float)b.elements.x,
                (float)b.elements.y, 0.0f, 0.0f};
  emu_simd(emu::MATRIX, 0, 8, v, v, 0, EMU_SITE);
  d.elements.x = (D)v[6];
  d.elements.y = (D)v[7];
}

}  // namespace metal
