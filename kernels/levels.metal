// Codes to fp32 values, and vectors of eight or two channels in memory, of any float type.
namespace kvq {

// Narrow codes, of 3 or 5 bits (mlx_kvq/format/layout.py): bits that are among a row's codes, and
// bits of the codes that they are read as.
constexpr bool is_narrow(int BITS) {
  return BITS == 3 || BITS == 5;
}
constexpr int low_bits(int BITS) {
  return is_narrow(BITS) ? BITS - 1 : BITS;
}
constexpr int wide_bits(int BITS) {
  return BITS == 3 ? 4 : BITS == 5 ? 8 : BITS;
}

INLINE device ushort* halves_of(device uint* words) {
  return reinterpret_cast<device ushort*>(words);
}

INLINE float row_scale(const device uint* scales, int index) {
  const uint word = scales[index / 2];
  return float(as_type<half>(ushort(index % 2 == 0 ? word & 0xffffu : word >> 16)));
}

// Before a conversion to fp16: finite numbers saturate; infinities become NaN, so damage shows.
template <int N>
INLINE void keep_finite(const device half*, thread float2* x) {
  UNROLL for (int i = 0; i < N; i++) {
    x[i] = float2(
        fma(x[i].x, 0.0f, clamp(x[i].x, -65504.0f, 65504.0f)),
        fma(x[i].y, 0.0f, clamp(x[i].y, -65504.0f, 65504.0f)));
  }
}
template <int N, typename T>
INLINE void keep_finite(const device T*, thread float2*) {}

INLINE uint two_halves(float2 x) {
  return as_type<uint>(half2(half(x.x), half(x.y)));
}

// Eight neighbouring channels in one or two 16-byte stores; `out` is aligned to them.
INLINE void write_eight(device half* out, const thread float* x) {
  float2 y[4];
  UNROLL for (int i = 0; i < 4; i++) y[i] = float2(x[2 * i], x[2 * i + 1]);
  keep_finite<4>(out, y);
  *reinterpret_cast<device uint4*>(out) =
      uint4(two_halves(y[0]), two_halves(y[1]), two_halves(y[2]), two_halves(y[3]));
}
INLINE uint two_bfloats(float a, float b) {
  return uint(as_type<ushort>(bfloat16_t(a))) | (uint(as_type<ushort>(bfloat16_t(b))) << 16);
}
INLINE void write_eight(device bfloat16_t* out, const thread float* x) {
  *reinterpret_cast<device uint4*>(out) = uint4(
      two_bfloats(x[0], x[1]), two_bfloats(x[2], x[3]), two_bfloats(x[4], x[5]),
      two_bfloats(x[6], x[7]));
}
INLINE void write_eight(device float* out, const thread float* x) {
  UNROLL for (int i = 0; i < 2; i++) {
    reinterpret_cast<device uint4*>(out)[i] = uint4(
        as_type<uint>(x[4 * i]), as_type<uint>(x[4 * i + 1]), as_type<uint>(x[4 * i + 2]),
        as_type<uint>(x[4 * i + 3]));
  }
}

// Eight neighbouring channels, aligned to 16 bytes.
INLINE void read_eight(thread float* x, const device half* in) {
  const uint4 w = *reinterpret_cast<const device uint4*>(in);
  const uint words[4] = {w.x, w.y, w.z, w.w};
  UNROLL for (int i = 0; i < 4; i++) {
    const half2 pair = as_type<half2>(words[i]);
    x[2 * i] = float(pair.x);
    x[2 * i + 1] = float(pair.y);
  }
}
INLINE void read_eight(thread float* x, const device bfloat16_t* in) {
  const uint4 w = *reinterpret_cast<const device uint4*>(in);
  const uint words[4] = {w.x, w.y, w.z, w.w};
  UNROLL for (int i = 0; i < 4; i++) {
    x[2 * i] = as_type<float>(words[i] << 16);
    x[2 * i + 1] = as_type<float>(words[i] & 0xffff0000u);
  }
}
INLINE void read_eight(thread float* x, const device float* in) {
  UNROLL for (int i = 0; i < 2; i++) {
    const uint4 w = reinterpret_cast<const device uint4*>(in)[i];
    x[4 * i] = as_type<float>(w.x);
    x[4 * i + 1] = as_type<float>(w.y);
    x[4 * i + 2] = as_type<float>(w.z);
    x[4 * i + 3] = as_type<float>(w.w);
  }
}
template <typename T>  // compiled, never called, in a launch without a tail
INLINE void read_eight(thread float* x, const device T* in) {
  UNROLL for (int i = 0; i < 8; i++) x[i] = float(in[i]);
}

template <typename T>
INLINE void zero_eight(device T* out) {
  UNROLL for (int i = 0; i < int(sizeof(T)) / 2; i++) {
    reinterpret_cast<device uint4*>(out)[i] = uint4(0, 0, 0, 0);
  }
}

// Eight channels from one type to another.
template <typename T, typename S>
INLINE void convert_eight(device T* out, const device S* in) {
  float x[8];
  read_eight(x, in);
  write_eight(out, x);
}

// Two neighbouring channels in one store. For fp16, call `keep_finite` first.
INLINE void write_two(device half* out, float2 x) {
  *reinterpret_cast<device uint*>(out) = two_halves(x);
}
INLINE void write_two(device bfloat16_t* out, float2 x) {
  *reinterpret_cast<device uint*>(out) = two_bfloats(x.x, x.y);
}
INLINE void write_two(device float* out, float2 x) {
  *reinterpret_cast<device uint2*>(out) = uint2(as_type<uint>(x.x), as_type<uint>(x.y));
}

// Eight channels, from one word of 4-bit codes or two of 8-bit codes.
template <int BITS, bool HALF_STEP>
INLINE void eight_levels(thread float* x, const thread uint* words, float scale) {
  const float middle = float(1 << (BITS - 1)) - (HALF_STEP ? 0.5f : 0.0f);
  UNROLL for (int i = 0; i < 8; i++) {
    const uint word = words[i * BITS / 32];
    const uint code = (word >> (i * BITS % 32)) & uint((1 << BITS) - 1);
    x[i] = (float(code) - middle) * scale;
  }
}

}  // namespace kvq
