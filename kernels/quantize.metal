// Quantization of one rotated vector by one SIMD group: scales, codes, packed words.
//
// Lane w owns channels 8w to 8w + 7: one word of 4-bit codes or two words of 8-bit codes. Groups
// are whole lanes (a group is a multiple of 8 channels). The arithmetic is that of
// `mlx_kvq.reference.quantize`, step for step: the scale is rounded to fp16 before it is used.
namespace kvq {

enum : int { SEARCH = 0, ABSMAX = 1, PAPER = 2 };  // template value RULE

// Maximum or sum over the SPAN lanes of this lane's group, the same bits in all of them.
template <int SPAN, bool SUM>
inline float group_reduce(float x, uint first) {
  if ((SPAN & (SPAN - 1)) == 0) {
    UNROLL for (int h = 1; h < SPAN; h *= 2) {
      const float other = simd_shuffle_xor(x, ushort(h));
      x = SUM ? x + other : max(x, other);
    }
    return x;
  }
  float total = simd_shuffle(x, ushort(first));
  UNROLL for (int i = 1; i < SPAN; i++) {
    const float other = simd_shuffle(x, ushort((first + uint(i)) & 31u));
    total = SUM ? total + other : max(total, other);
  }
  return total;
}

inline float scale_to_half(float s) {
  return float(half(min(s, 65504.0f)));
}

// Squared error of eight values at scale s. A reciprocal will do here: a value that it moves
// across a boundary between two levels is as far from the one as from the other.
inline float clipping_error(thread float* y, float s) {
  const float inverse = 1.0f / (s > 0.0f ? s : 1.0f);
  float e = 0.0f;
  UNROLL for (int i = 0; i < 8; i++) {
    const float level = clamp(floor(y[i] * inverse), -8.0f, 7.0f) + 0.5f;
    const float d = y[i] - s * level;
    e += d * d;
  }
  return e;
}

inline threadgroup ushort* halves_of(threadgroup uint* words) {
  return reinterpret_cast<threadgroup ushort*>(words);
}

// x -> y = lambda * R((x - mu) / sigma) in natural order.
template <int D, int ROTATION, bool CALIBRATED, typename T>
inline void rotate_vector(
    threadgroup float* y,
    const device T* x,
    int64_t stride,
    const device float* table,
    int head,
    uint lane) {
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  float2 z[points_of(D)];
  read_vector<D, CALIBRATED>(z, x, stride, factors, lane);
  rotate<D, ROTATION>(z, table, lane);
  scale_rotated<D, ROTATION, CALIBRATED>(z, factors, lane);
  if (lane < uint(lanes_of(D / 2))) {
    UNROLL for (int a = 0; a < points_of(D); a++) {
      const int c = 2 * int(rotated_index<D, ROTATION>(lane, a));
      y[c] = z[a].x;
      y[c + 1] = z[a].y;
    }
  }
}

// y: D rotated channels in natural order. Writes D * BITS / 32 words and D / GROUP scales.
template <int D, int BITS, int GROUP, int RULE>
inline void quantize_vector(
    const threadgroup float* y,
    threadgroup uint* words,
    threadgroup ushort* scales,
    uint lane) {
  constexpr int SPAN = GROUP / 8;
  constexpr int MIDDLE = 1 << (BITS - 1);
  const uint first = lane / uint(SPAN) * uint(SPAN);
  const bool owner = lane < uint(D / 8);
  float x[8];
  float top = 0.0f, odd = 0.0f;
  UNROLL for (int i = 0; i < 8; i++) {
    x[i] = owner ? y[8 * lane + uint(i)] : 0.0f;
    top = max(top, fabs(x[i]));
    odd = isfinite(x[i]) ? odd : 1.0f;
  }
  top = group_reduce<SPAN, false>(top, first);
  const bool finite = group_reduce<SPAN, false>(odd, first) == 0.0f;

  float scale;
  if (RULE == PAPER) {
    scale = scale_to_half(top / float(MIDDLE - 1));
  } else {
    scale = scale_to_half(top / (float(MIDDLE) - 0.5f));
  }
  if (RULE == SEARCH && BITS == 4) {
    float least = group_reduce<SPAN, true>(clipping_error(x, scale), first);
    UNROLL for (int c = 1; c < 6; c++) {
      // 0.95, 0.9, 0.85, 0.8, 0.75, each rounded once as the reference's constants are.
      const float fraction = float(100 - 5 * c) / 100.0f;
      const float s = scale_to_half(fraction * top / 7.5f);
      const float e = group_reduce<SPAN, true>(clipping_error(x, s), first);
      if (e < least) {
        least = e;
        scale = s;
      }
    }
  }

  const float divisor = scale > 0.0f ? scale : 1.0f;
  uint packed[2] = {0, 0};
  UNROLL for (int i = 0; i < 8; i++) {
    float n;
    if (RULE == PAPER) {
      n = clamp(rint(x[i] / divisor), float(1 - MIDDLE), float(MIDDLE - 1));
    } else {
      n = clamp(floor(x[i] / divisor), float(-MIDDLE), float(MIDDLE - 1));
    }
    uint code = uint(int(scale > 0.0f ? n : 0.0f) + MIDDLE);
    code = finite ? code : 0u;
    if (BITS == 4) {
      packed[0] |= code << (4 * i);
    } else {
      packed[i / 4] |= code << (8 * (i % 4));
    }
  }
  if (owner) {
    if (BITS == 4) {
      words[lane] = packed[0];
    } else {
      words[2 * lane] = packed[0];
      words[2 * lane + 1] = packed[1];
    }
    if (lane == first) {
      scales[lane / uint(SPAN)] = finite ? as_type<ushort>(half(scale)) : ushort(0x7e00);
    }
  }
}

}  // namespace kvq
