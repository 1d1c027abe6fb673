// SIMD-group functions by number, for kernels and runtime; counters.py has their names in order.
#pragma once

namespace emu {
enum Op : unsigned {
  SUM,
  PRODUCT,
  MIN,
  MAX,
  INCLUSIVE_SUM,
  EXCLUSIVE_SUM,
  INCLUSIVE_PRODUCT,
  EXCLUSIVE_PRODUCT,
  ALL,
  ANY,
  SHUFFLE,
  XOR,
  UP,
  DOWN,
  FILL_UP,
  MATRIX,
};
}
