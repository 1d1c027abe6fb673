"""Planted faults of memory: bounds, unwritten memory, races, address spaces."""

from .fault import Fault

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

BOUNDS = (
    Fault("read past an input", "out of bounds", "o[i] = a[i + 1];  // here"),
    Fault("read before an input", "out of bounds", "o[i] = a[int(i) - 1];  // here"),
    Fault(
        "read so far away that another buffer lies there",
        "out of bounds",
        "o[i] = a[i + 0x80000000u];  // here",
    ),
    Fault("write past an output", "out of bounds", "o[i + 1] = a[i];  // here"),
    Fault(
        "vector load over the end",
        "out of bounds",
        "o[i] = ((const device float4*)(a + 4))[i / 4].x;  // here",
    ),
    Fault(
        "index outside a threadgroup array",
        "out of bounds",
        f"""threadgroup float s[64];
  s[t + 1] = a[i];  // here
  {_BARRIER}
  o[i] = s[t];""",
    ),
    Fault(
        "pointer outside a threadgroup array",
        "out of bounds",
        f"""threadgroup float s[64];
  threadgroup float r[64];
  threadgroup float* p = s + t;
  r[t] = 0.0f;
  p[4] = a[i];  // here
  {_BARRIER}
  o[i] = s[t] + r[t];""",
    ),
    Fault(
        "index outside an array of the thread",
        "out of bounds",
        """float x[4] = {0, 0, 0, 0};
  x[lane / 4] = a[i];  // here
  o[i] = x[lane % 4];""",
    ),
    Fault(
        "pointer outside an array of the thread, in a helper",
        "out of bounds",
        """float x[4] = {0, 0, 0, 0};
  set(x, int(lane));
  o[i] = x[lane % 4];""",
        "inline void set(thread float* x, int k) {\n  x[k] = 1.0f;  // here\n}\n",
    ),
    Fault(
        "index outside a constant table",
        "out of bounds",
        "o[i] = levels[lane];  // here",
        "constant float levels[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};\n",
    ),
    Fault(
        "vector load from a misaligned address",
        "misaligned access",
        "o[i] = ((const device float4*)(a + 1))[i % 4].x;  // here",
    ),
)

UNWRITTEN = (
    Fault(
        "read of an output nobody wrote", "read of unwritten memory", "o[i] = o[i] + a[i];  // here"
    ),
    Fault(
        "read of threadgroup memory nobody wrote",
        "read of unwritten memory",
        f"""threadgroup float s[64];
  if (t < 63) s[t] = a[i];
  {_BARRIER}
  o[i] = s[63 - t];  // here""",
    ),
    Fault(
        "threadgroup memory kept from the last threadgroup",
        "read of unwritten memory",
        f"""threadgroup float s[64];
  if (threadgroup_position_in_grid.x == 0) s[t] = a[i];
  {_BARRIER}
  o[i] = s[t];  // here""",
    ),
    Fault(
        "variable that is set on one path only",
        "uninitialized variable",
        """float x;
  if (lane < 16) x = a[i];  // here
  o[i] = x;""",
    ),
)

RACES = (
    Fault(
        "two threads write one threadgroup word",
        "data race",
        f"""threadgroup float s[32];
  s[lane] = a[i];  // here
  {_BARRIER}
  o[i] = s[lane];""",
    ),
    Fault(
        "no barrier between write and read",
        "data race",
        """threadgroup float s[64];
  s[t] = a[i];
  if (simdgroup_index_in_threadgroup == 1) o[i] = s[t - 32];  // here
  else o[i] = s[t + 32];  // here""",
        or_kind="read of unwritten memory",
    ),
    Fault(
        "no barrier between read and the next write",
        "data race",
        f"""threadgroup float s[64];
  s[t] = a[i];
  {_BARRIER}
  float x = s[63 - t];  // here
  s[t] = x + 1.0f;  // here
  o[i] = x;""",
    ),
    Fault(
        "no barrier inside one SIMD group",
        "data race",
        """threadgroup float s[64];
  s[t] = a[i];
  float x = simd_sum(a[i]);
  o[i] = s[t ^ 1] + x;  // here""",
        or_kind="read of unwritten memory",
    ),
    Fault(
        "simdgroup_barrier where a threadgroup_barrier is due",
        "data race",
        """threadgroup float s[64];
  s[t] = a[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = s[63 - t];  // here""",
        or_kind="read of unwritten memory",
    ),
    Fault(
        "barrier for another kind of memory",
        "data race",
        """threadgroup float s[64];
  s[t] = a[i];
  threadgroup_barrier(mem_flags::mem_device);
  o[i] = s[63 - t];  // here""",
        or_kind="read of unwritten memory",
    ),
    Fault(
        "bits of one word by two threads",
        "data race",
        f"""threadgroup uint s[2];
  if (t < 2) s[t] = 0;
  {_BARRIER}
  s[t / 32] |= 1u << lane;  // here
  {_BARRIER}
  o[i] = float(s[t / 32]);""",
    ),
    Fault(
        "device memory passed on without a barrier",
        "data race",
        """o[i] = a[i];
  float x = o[i ^ 1];  // here
  threadgroup_barrier(mem_flags::mem_device);
  o[i] = x;""",
        or_kind="read of unwritten memory",
    ),
    Fault(
        "two threadgroups write one byte",
        "race between threadgroups",
        "o[t] = a[i];  // here",
    ),
    Fault(
        "a threadgroup reads another's output",
        "race between threadgroups",
        """o[i] = a[i];
  threadgroup_barrier(mem_flags::mem_device);
  if (o[(i + 64) % 128] < 0.0f) o[i] = 0.0f;  // here""",
        or_kind="read of unwritten memory",
    ),
    Fault(
        "a threadgroup reads what another overwrites",
        "race between threadgroups",
        """float x = o[(i + 64) % 128];  // here
  o[i] = x + a[i];  // here""",
        init_value=0,
    ),
)

SPACES = (
    Fault(
        "threadgroup pointer for a device one",
        "address space",
        """threadgroup float s[64];
  device float* p = s;  // here
  p[t] = a[i];""",
    ),
    Fault(
        "cast from threadgroup to device",
        "address space",
        """threadgroup float s[64];
  device float* p = (device float*)s;  // here
  p[t] = a[i];""",
    ),
    Fault(
        "thread pointer to a device buffer",
        "address space",
        "const thread float* p = a; o[i] = p[i];  // here",
    ),
    Fault(
        "device argument for a threadgroup parameter",
        "address space",
        "o[i] = first(a);  // here",
        "inline float first(const threadgroup float* x) { return x[0]; }\n",
    ),
    Fault(
        "threadgroup variable in a helper",
        "address space",
        "o[i] = twice(a[i]);",
        "inline float twice(float x) {\n  threadgroup float s[2];  // here\n  return x + x;\n}\n",
    ),
    Fault("write to an input", "compile", "a[i] = 0.0f;  // here"),
    Fault(
        "write to an input through a cast",
        "write to input",
        "((device float*)a)[i] = 0.0f;  // here",
    ),
)
