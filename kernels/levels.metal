// Codes to values, one thread at a time, in fp32.
namespace kvq {

inline float row_scale(const device uint* scales, int index) {
  const uint word = scales[index / 2];
  return float(as_type<half>(ushort(index % 2 == 0 ? word & 0xffffu : word >> 16)));
}

// Eight channels, from one word of 4-bit codes or two of 8-bit codes.
template <int BITS, bool HALF_STEP, typename T>
inline void write_eight(device T* out, const device uint* words, float scale) {
  const float middle = float(1 << (BITS - 1)) - (HALF_STEP ? 0.5f : 0.0f);
  UNROLL for (int i = 0; i < 8; i++) {
    const uint word = words[i * BITS / 32];
    const uint code = (word >> (i * BITS % 32)) & uint((1 << BITS) - 1);
    out[i] = T((float(code) - middle) * scale);
  }
}

}  // namespace kvq
