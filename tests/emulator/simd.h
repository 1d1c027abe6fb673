// SIMD-group functions over the lanes of one group. simd_sum adds in a tree of pairs; Metal
// leaves the order open, so a kernel must not depend on it.
#pragma once
#include "fibers.h"
#include "ops.h"

struct Lanes {
  u32 n;
  void* data[32];
  void* fill[32];
  int param[32];
};
using namespace emu;

template <typename T>
static T combine(u32 op, T a, T b) {
  switch (op) {
    case SUM:
    case INCLUSIVE_SUM:
    case EXCLUSIVE_SUM:
      return a + b;
    case PRODUCT:
    case INCLUSIVE_PRODUCT:
    case EXCLUSIVE_PRODUCT:
      return a * b;
    // As fmin and fmax: a NaN loses against a number.
    case MIN:
      return b < a || a != a ? b : a;
    case MAX:
      return b > a || a != a ? b : a;
    case ALL:
      return a && b;
    default:
      return a || b;
  }
}

template <typename T>
static void reduce(u32 op, u32 c, Lanes* l) {
  T v[32];
  for (u32 i = 0; i < l->n; i++) v[i] = ((T*)l->data[i])[c];
  bool scan = op >= INCLUSIVE_SUM && op <= EXCLUSIVE_PRODUCT;
  if (!scan) {
    for (u32 step = 1; step < 32; step *= 2)
      for (u32 i = 0; i + step < l->n; i += 2 * step) v[i] = combine(op, v[i], v[i + step]);
    for (u32 i = 0; i < l->n; i++) ((T*)l->data[i])[c] = v[0];
    return;
  }
  bool exclusive = op == EXCLUSIVE_SUM || op == EXCLUSIVE_PRODUCT;
  T total = op == EXCLUSIVE_PRODUCT || op == INCLUSIVE_PRODUCT ? T(1) : T(0);
  for (u32 i = 0; i < l->n; i++) {
    T next = combine(op, total, v[i]);
    ((T*)l->data[i])[c] = exclusive ? total : next;
    total = next;
  }
}

// Returns what is wrong, or null.
static const char* move(u32 op, u32 bytes, Lanes* l) {
  static u8 in[32][64];
  for (u32 i = 0; i < l->n; i++) memcpy(in[i], l->data[i], bytes);
  for (u32 i = 0; i < l->n; i++) {
    int p = l->param[i], from = (int)i;
    if (op != SHUFFLE && p != l->param[0])
      return "the lane or distance must be the same in all lanes";
    switch (op) {
      case SHUFFLE:
        from = p;
        break;
      case XOR:
        from = (int)i ^ p;
        break;
      case UP:
      case FILL_UP:
        from = (int)i - p;
        break;
      case DOWN:
        from = (int)i + p;
        break;
    }
    bool outside = from < 0 || from >= 32;
    if (op == UP || op == DOWN) {
      if (outside) from = (int)i;
    } else if (op == FILL_UP && outside) {
      u32 filler = (u32)from & 31;
      if (filler >= l->n) return "fills from a lane that the SIMD group does not have";
      memcpy(l->data[i], l->fill[filler], bytes);
      continue;
    } else if (outside) {
      return "reads from a lane above 31";
    }
    if ((u32)from >= l->n) return "reads from a lane that the SIMD group does not have";
    memcpy(l->data[i], in[from], bytes);
  }
  return nullptr;
}

// D = A B + C for 8 x 8 matrices; a lane's data are its two elements of A, B, C and D.
static const char* multiply_accumulate(Lanes* l) {
  if (l->n != 32) return "a matrix needs a SIMD group of 32 threads";
  float a[8][8], b[8][8];
  u32 row[32], column[32];
  for (u32 i = 0; i < 32; i++) {
    // The layout MLX's own kernels rely on.
    row[i] = (i / 4 & 4) + (i / 2 & 3);
    column[i] = (i / 4 & 2) * 2 + (i & 1) * 2;
    float* v = (float*)l->data[i];
    for (u32 k = 0; k < 2; k++) {
      a[row[i]][column[i] + k] = v[k];
      b[row[i]][column[i] + k] = v[2 + k];
    }
  }
  for (u32 i = 0; i < 32; i++) {
    float* v = (float*)l->data[i];
    for (u32 k = 0; k < 2; k++) {
      float sum = v[4 + k];
      for (u32 j = 0; j < 8; j++) sum = __builtin_fmaf(a[row[i]][j], b[j][column[i] + k], sum);
      v[6 + k] = sum;
    }
  }
  return nullptr;
}

static const char* simd_function(u32 op, int type, u32 count, Lanes* l) {
  static const u32 sizes[] = {4, 2, 4, 4, 2, 2, 1, 1, 8, 8};
  if (op == MATRIX) return multiply_accumulate(l);
  if (op >= SHUFFLE) return move(op, sizes[type] * (count == 3 ? 4 : count), l);
  for (u32 c = 0; c < count; c++) switch (type) {
      case 0: reduce<float>(op, c, l); break;
      case 1: reduce<_Float16>(op, c, l); break;
      case 2: reduce<int>(op, c, l); break;
      case 3: reduce<u32>(op, c, l); break;
      case 4: reduce<short>(op, c, l); break;
      case 5: reduce<u16>(op, c, l); break;
      case 6: reduce<signed char>(op, c, l); break;
      case 7: reduce<u8>(op, c, l); break;
      case 8: reduce<i64>(op, c, l); break;
      default: reduce<u64>(op, c, l); break;
    }
  return nullptr;
}
