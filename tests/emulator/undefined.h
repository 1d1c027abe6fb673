// What clang's own checks call when a kernel does what C++ (and Metal) leaves undefined:
// an index outside an array, a shift by the width or more, a division by zero, a float that
// does not fit the integer it is converted to.
#pragma once
#include "memory.h"

struct SourceLocation {
  const char* file;
  u32 line, column;
};
struct TypeName {
  u16 kind, info;
  char text[1];
};
struct CheckData {
  SourceLocation at;
  TypeName *first, *second;
};

static void undefined(const char* kind, CheckData* d, const char* what, i64 value) {
  fail(kind, d->at.line << 10 | (d->at.column & 1023), what, value, d->first->text);
  stop_thread();
}
extern "C" {
void __ubsan_handle_out_of_bounds(CheckData* d, u64 index) {
  undefined("out of bounds", d, "index %ld in an array of type %s", (i64)(int)index);
}
void __ubsan_handle_shift_out_of_bounds(CheckData* d, u64, u64 by) {
  undefined("undefined shift", d, "a shift by %ld of %s", (i64)by);
}
void __ubsan_handle_divrem_overflow(CheckData* d, u64, u64 by) {
  undefined("undefined division", d, "a division by %ld of %s", (i64)by);
}
void __ubsan_handle_float_cast_overflow(CheckData* d, u64 from) {
  float value = __builtin_bit_cast(float, (u32)from);
  fail("undefined conversion", d->at.line << 10 | (d->at.column & 1023),
       "%s does not hold the converted value (%g if it was a float)", d->second->text,
       (double)value);
  stop_thread();
}
// clang's bounds check for pointers to a thread's own variables.
void emu_private(u32 site) {
  fail("out of bounds", site, "an access outside the thread's own variable");
  stop_thread();
}

// Conversions that clang calls by name on CPUs without the instructions. Round to nearest even.
__bf16 __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  u32 rounded = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, (u16)(rounded >> 16));
}
// By way of a float rounded to odd, which keeps what the second rounding needs to know. An fma
// of halves comes here; in double it is exact wherever that matters.
_Float16 __truncdfhf2(double x) {
  float near = (float)x;
  u32 bits = __builtin_bit_cast(u32, near);
  if (x == x && (double)near != x && !(bits & 1))
    bits += __builtin_fabs((double)near) < __builtin_fabs(x) ? 1 : -1;
  return (_Float16)__builtin_bit_cast(float, bits);
}
#ifndef __F16C__
float __extendhfsf2(_Float16 x) {
  u32 bits = __builtin_bit_cast(u16, x), sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  u32 out = rest >= 0x7c00 ? (rest << 13) + 0x70000000 : (rest << 13) + 0x38000000;
  if (rest >= 0x0400) return __builtin_bit_cast(float, sign | out);
  float tiny = (float)(int)rest * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -tiny : tiny;
}
_Float16 __truncsfhf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  u32 out;
  if (rest > 0x7f800000) {
    out = 0x7e00 | (rest >> 13 & 0x3ff);
  } else if (rest >= 0x477ff000) {
    out = 0x7c00;
  } else if (rest >= 0x38800000) {
    out = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  } else {
    // A subnormal: adding 0.5 leaves its bits, rounded, at the bottom of the sum.
    float shifted = __builtin_bit_cast(float, rest) + 0.5f;
    out = __builtin_bit_cast(u32, shifted) - 0x3f000000;
  }
  return __builtin_bit_cast(_Float16, (u16)(sign | out));
}
#endif
}
