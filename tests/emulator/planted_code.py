"""Planted faults of control flow and language."""

from .fault import Fault

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

DIVERGENCE = (
    Fault(
        "barrier that some threads skip",
        "divergence at barrier",
        f"""if (t < 40) {_BARRIER}  // here
  o[i] = a[i];""",
    ),
    Fault(
        "barrier that a whole SIMD group skips",
        "divergence at barrier",
        f"""if (simdgroup_index_in_threadgroup == 0) {_BARRIER}  // here
  o[i] = a[i];""",
    ),
    Fault(
        "two barriers in two branches",
        "divergence at barrier",
        f"""if (simdgroup_index_in_threadgroup == 0) {{
    {_BARRIER}  // here
  }} else {{
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }}
  o[i] = a[i];""",
    ),
    Fault(
        "barrier after some threads returned",
        "divergence at barrier",
        f"""o[i] = a[i];
  if (lane == 3) return;
  {_BARRIER}  // here""",
    ),
    Fault(
        "SIMD operation under a lane's condition",
        "divergence at SIMD operation",
        """float x = a[i];
  if (lane < 16) x = simd_sum(x);  // here
  o[i] = x;""",
    ),
    Fault(
        "loop of SIMD operations with a lane's own length",
        "divergence at SIMD operation",
        """float x = a[i];
  for (uint k = 0; k < lane; k++) {
    x += simd_shuffle_xor(x, 1);  // here
  }
  o[i] = x;""",
    ),
    Fault(
        "one helper's SIMD operation from two branches",
        "divergence at SIMD operation",
        """float x = a[i];
  if (lane < 16) x = total(x); else x = total(2 * x);
  o[i] = x;""",
        "inline float total(float x) {\n  return simd_sum(x);  // here\n}\n",
    ),
    Fault(
        "simdgroup_barrier that some lanes skip",
        "divergence at SIMD operation",
        """if (lane > 3) simdgroup_barrier(mem_flags::mem_none);  // here
  o[i] = a[i];""",
    ),
    Fault(
        "shuffle from a lane that does not exist",
        "SIMD operation",
        "o[i] = simd_shuffle(a[i], ushort(lane + 8));  // here",
    ),
    Fault(
        "shuffle in a SIMD group of 16",
        "SIMD operation",
        "o[i] = simd_shuffle_xor(a[i], 16);  // here",
        threadgroup=16,
    ),
    Fault(
        "shuffle with a mask that differs between lanes",
        "SIMD operation",
        "o[i] = simd_shuffle_xor(a[i], ushort(lane & 1));  // here",
    ),
)

LANGUAGE = (
    Fault(
        "builtin that MLX's kernels do not use",
        "builtin not allowed",
        "o[i] = float(popcount(i));  // here",
    ),
    Fault(
        "atomic operation",
        "not allowed",
        "atomic_fetch_add_explicit((device atomic_uint*)o, 1u, memory_order_relaxed);  // here",
    ),
    Fault("goto", "not allowed", "again: if (a[i] > 1000.0f) goto again;  // here"),
    Fault(
        "bfloat arithmetic",
        "bfloat arithmetic",
        "bfloat16_t x = bfloat16_t(a[i]); o[i] = float(x * x);  // here",
    ),
    Fault("double", "double", "o[i] = 0.1 * a[i];  // here"),
    Fault(
        "cast that reinterprets a vector",
        "vector cast",
        "uint4 x = uint4(i); o[i] = ((float4)x).x;  // here",
    ),
    Fault("shift by the width", "undefined shift", "o[i] = float(1u << i);  // here"),
    Fault("division by zero", "undefined division", "o[i] = float(100u / (i / 2));  // here"),
    Fault(
        "negative float to unsigned",
        "undefined conversion",
        "o[i] = float(uint(-1.0f - a[i]));  // here",
    ),
    Fault(
        "clang's builtins by name",
        "not allowed",
        "o[i] = float(__builtin_popcount(i));  // here",
    ),
    Fault(
        "loop that never ends",
        "endless loop",
        "float x = 0; while (a[i] >= 0.0f) x += a[i];  // here\n  o[i] = x;",
    ),
    Fault(
        "too large an array in every thread",
        "too much thread memory",
        """float x[20000];
  for (int k = 0; k < 20000; k++) x[k] = a[(i * k) % 128];
  o[i] = x[int(a[i]) * 100];""",
    ),
    Fault("too many threads", "too many threads", "o[i % 128] = a[i % 128];", "", 1024, 1024),
    Fault(
        "too much threadgroup memory",
        "too much threadgroup memory",
        f"threadgroup float s[8193]; s[t] = a[i]; {_BARRIER} o[i] = s[t];",
    ),
)
