// Quantization of rotated channels in the registers of a SIMD group: scales, codes, words.
//
// A lane has CH channels in a row, all of one group or of the part of a group that SPAN lanes
// share; the lanes of a group differ in the bits of MASK * (SPAN - 1), or, where SPAN is not a
// power of two, are those from `first` on. The arithmetic is that of `mlx_kvq.reference.quantize`:
// the scale is rounded to fp16 before it is used.
namespace kvq {

enum : int { SEARCH = 0, ABSMAX = 1, PAPER = 2 };  // template value RULE

template <int SPAN, int MASK, bool SUM>
inline float group_reduce(float x, uint first) {
  if (is_power(SPAN)) {
    UNROLL for (int h = 1; h < SPAN; h *= 2) {
      const float other = simd_shuffle_xor(x, ushort(h * MASK));
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

inline device ushort* halves_of(device uint* words) {
  return reinterpret_cast<device ushort*>(words);
}

// 1 / s for a scale; 0 for a group of zeros, whose codes are then the middle.
inline float inverse_scale(float s) {
  return s > 0.0f ? reciprocal(s) : 0.0f;
}

// Squared error at a scale: |x| / scale - 1/2 against the nearest of 0 to 7. NaN where an x is.
template <int CH>
inline float squared_error(const thread float* x, float scale, float inverse) {
  float e = 0.0f;
  if (scale == 0.0f) {
    UNROLL for (int i = 0; i < CH; i++) e = fma(x[i], x[i], e);
    return e;
  }
  UNROLL for (int i = 0; i < CH; i++) {
    const float t = fma(fabs(x[i]), inverse, -0.5f);
    const float d = t - round_small(min(t, 7.0f));
    e = fma(d, d, e);
  }
  return e * (scale * scale);
}

// Writes CH * BITS / 32 words and the bits of the group's fp16 scale. Half-precision channels that
// were not rotated are often whole multiples of their scale; EXACT then divides, so that all
// backends agree about such ties.
template <int CH, int BITS, int RULE, int SPAN, int MASK, bool EXACT>
inline void quantize_channels(
    thread uint* words,
    thread ushort& scale_bits,
    const thread float* x,
    uint first) {
  constexpr int LEVELS = RULE == PAPER ? (1 << BITS) - 2 : (1 << BITS) - 1;  // steps of a scale
  constexpr bool SEARCHED = RULE == SEARCH && BITS == 4;
  float top = 0.0f;
  UNROLL for (int i = 0; i < CH; i++) top = max(top, fabs(x[i]));
  top = group_reduce<SPAN, MASK, false>(top, first);
  float odd = 0.0f;  // NaN where a channel of the group is NaN, which max() passes over
  // 0.98, 0.92 and 0.86 of the scale of the largest channel are tried: `reference.SEARCH`.
  float scale = scale_to_half(top * ((SEARCHED ? 1.96f : 2.0f) / float(LEVELS)));
  float inverse = inverse_scale(scale);
  if (SEARCHED) {
    float least = group_reduce<SPAN, MASK, true>(squared_error<CH>(x, scale, inverse), first);
    odd = least;
    UNROLL for (int c = 1; c < 3; c++) {
      const float s = scale_to_half(top * (float(98 - 6 * c) / 750.0f));
      const float r = inverse_scale(s);
      const float e = group_reduce<SPAN, MASK, true>(squared_error<CH>(x, s, r), first);
      if (e < least) {
        least = e;
        scale = s;
        inverse = r;
      }
    }
  } else {
    UNROLL for (int i = 0; i < CH; i++) odd = fma(x[i], 0.0f, odd);
    odd = group_reduce<SPAN, MASK, true>(odd, first);
  }
  const bool finite = isfinite(top) && odd == odd;

  // n = floor(x / scale) + 2^(BITS - 1) in [0, LEVELS], as round(LEVELS * u) with u in [0, 1];
  // sums of fp32 put codes together exactly, 16 bits at a time.
  const float step = inverse * (1.0f / float(LEVELS));
  float squares = 0.0f, levels = 0.0f;
  constexpr int PER_HALF = 16 / BITS;
  UNROLL for (int w = 0; w < CH * BITS / 32; w++) {
    float parts[2];
    UNROLL for (int h = 0; h < 2; h++) {
      parts[h] = 0.0f;
      UNROLL for (int i = PER_HALF - 1; i >= 0; i--) {
        const float y = x[(2 * w + h) * PER_HALF + i];
        float n;
        if (EXACT) {
          const float q = scale > 0.0f ? y / scale : 0.0f;
          const float low = float(LEVELS / 2 + (RULE == PAPER ? 0 : 1));
          n = clamp(RULE == PAPER ? rint(q) : floor(q), -low, float(LEVELS / 2)) + low;
        } else {
          n = round_product(saturated(fma(y, step, 0.5f)), float(LEVELS));
        }
        parts[h] = fma(parts[h], float(1 << BITS), n);
        if (SEARCHED) {
          squares = fma(y, y, squares);
          levels = fma(n - 7.5f, n - 7.5f, levels);
        }
      }
      // The paper's codes begin at 1.
      parts[h] += RULE == PAPER ? (BITS == 4 ? 4369.0f : 257.0f) : 0.0f;
    }
    words[w] = finite ? uint(parts[0]) | (uint(parts[1]) << 16) : 0u;
  }
  if (SEARCHED) {
    // The scale that is stored gives the group its length back.
    squares = group_reduce<SPAN, MASK, true>(squares, first);
    levels = group_reduce<SPAN, MASK, true>(levels, first);
    scale = scale > 0.0f ? scale_to_half(square_root(squares * reciprocal(levels))) : 0.0f;
  }
  scale_bits = finite ? as_type<ushort>(half(scale)) : ushort(0x7e00);
}

// Whether a lane's 16 channels are one group, whole groups of 8, or share one with other lanes.
constexpr bool groups_are_lanes(int D, int GROUP) {
  return points_of(D) == 8 && is_power(GROUP);
}

// Quantizes the vectors of a SIMD group where groups are lanes: row of a lane's vector, whose
// codes begin at word FIRST and scales at half SCALE of those from word CODES on; EVEN rows have
// an even number of words.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int CODES, int SCALE,
    bool EVEN>
inline void store_vectors(device uint* row, const thread float2* z, bool valid, uint lane) {
  constexpr int CH = GROUP < 16 ? GROUP : 16;
  constexpr int SPAN = GROUP / CH;
  constexpr int MASK = ROTATION == SRFT ? lanes_of(D) / SPAN : 1;
  constexpr int WORDS = CH * BITS / 32;
  const int block = rotated_block<D, ROTATION>(lane);
  device ushort* scales = halves_of(row + CODES);
  UNROLL for (int part = 0; part < 16 / CH; part++) {
    float x[CH];
    UNROLL for (int i = 0; i < CH / 2; i++) {
      x[2 * i] = z[part * CH / 2 + i].x;
      x[2 * i + 1] = z[part * CH / 2 + i].y;
    }
    uint words[WORDS];
    ushort scale;
    quantize_channels<CH, BITS, RULE, SPAN, MASK, is_none(ROTATION)>(words, scale, x, 0);
    if (valid) {
      device uint* to = row + FIRST + (block * (16 / CH) + part) * WORDS;
      if (EVEN && WORDS % 2 == 0) {  // rows of an even number of words are aligned to two
        UNROLL for (int w = 0; w < WORDS; w += 2) {
          reinterpret_cast<device uint2*>(to)[w / 2] = uint2(words[w], words[(w + 1) % WORDS]);
        }
      } else {
        UNROLL for (int w = 0; w < WORDS; w++) to[w] = words[w];
      }
      if (block % SPAN == 0) {
        scales[SCALE + (block * (16 / CH) + part) / SPAN] = scale;
      }
    }
  }
}

// The same through threadgroup memory, for any group: y holds the vectors of the SIMD group in
// natural order, vector v belongs to the row at `row` + v * W. Lanes take a word's channels each,
// as many whole groups at once as 32 lanes hold.
template <int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int CODES, int SCALE, int W>
inline void store_shared(
    device uint* row,
    const threadgroup float* y,
    int vectors,
    uint lane) {
  constexpr int SPAN = GROUP / 8;
  constexpr int AT_ONCE = 32 / SPAN;
  constexpr int WORDS = BITS / 4;
  const int mine = int(lane) / SPAN;
  const int part = int(lane) % SPAN;
  for (int g = 0; g < vectors * (D / GROUP); g += AT_ONCE) {
    const int group = g + mine;
    const int v = group / (D / GROUP);
    const int index = group % (D / GROUP);
    const bool valid = mine < AT_ONCE && v < vectors;
    float x[8];
    UNROLL for (int i = 0; i < 8; i++) {
      x[i] = valid ? y[v * D + index * GROUP + 8 * part + i] : 0.0f;
    }
    uint words[WORDS];
    ushort scale;
    quantize_channels<8, BITS, RULE, SPAN, 1, is_none(ROTATION)>(
        words, scale, x, uint(mine * SPAN) & 31u);
    if (valid) {
      UNROLL for (int w = 0; w < WORDS; w++) {
        row[v * W + FIRST + (index * SPAN + part) * WORDS + w] = words[w];
      }
      if (part == 0) {
        halves_of(row + v * W + CODES)[SCALE + index] = scale;
      }
    }
  }
}

// A lane's rotated channels of one vector, as they are.
template <int D, int ROTATION, typename T>
inline void write_points(device T* out, const thread float2* z, uint lane) {
  out += 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  if (points_of(D) % 4 == 0) {
    UNROLL for (int i = 0; i < points_of(D) / 4; i++) {
      float y[8];
      UNROLL for (int a = 0; a < 4; a++) {
        y[2 * a] = z[4 * i + a].x;
        y[2 * a + 1] = z[4 * i + a].y;
      }
      write_eight(out + 8 * i, y);
    }
  } else {
    UNROLL for (int a = 0; a < points_of(D); a++) {
      write_one(out + 2 * a, z[a].x);
      write_one(out + 2 * a + 1, z[a].y);
    }
  }
}

// One side of a head's L tokens, by one SIMD group, which does every `workers`-th set of SET
// tokens from number `worker` on. x and rows begin with the head's first token; `shared` has room
// for a set's vectors unless groups are lanes. KEEPS: rotated vectors of the tokens from number
// `drop` on go to `kept`, KEPT channels apart.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, bool CALIBRATED, int SET,
    int FIRST, int CODES, int SCALE, int W, bool KEEPS, int KEPT, typename T, typename K>
inline void pack_vectors(
    device uint* rows,
    const device T* x,
    int64_t by_token,
    int64_t stride,
    int L,
    int worker,
    int workers,
    threadgroup float* shared,
    const device float* table,
    int head,
    device K* kept,
    int drop,
    uint lane) {
  const int v = int(lane) / lanes_of(D);
  lane_table<D> w;
  lane_factors<D> f;
  read_table<D, ROTATION>(w, table, lane);
  read_factors<D, ROTATION, CALIBRATED, CALIBRATED>(f, table, head, lane);
  for (int set = worker; set * SET < L; set += workers) {
    const int token = set * SET + v;
    const bool valid = v < SET && token < L;
    float2 z[points_of(D)];
    UNROLL for (int a = 0; a < points_of(D); a++) z[a] = float2(0.0f, 0.0f);
    if (valid) {
      read_points<D, ROTATION>(z, x + token * by_token, stride, lane);
    }
    rotate_points<D, ROTATION, CALIBRATED, CALIBRATED>(z, f, w, table, lane);
    if (KEEPS && valid && token >= drop) {
      write_points<D, ROTATION>(kept + int64_t(token - drop) * KEPT, z, lane);
    }
    if (groups_are_lanes(D, GROUP)) {
      store_vectors<D, BITS, GROUP, RULE, ROTATION, FIRST, CODES, SCALE, W % 2 == 0>(
          rows + int64_t(valid ? token : 0) * W, z, valid, lane);
    } else {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (valid) {
        UNROLL for (int a = 0; a < points_of(D); a++) {
          const int c = 2 * (rotated_block<D, ROTATION>(lane) * points_of(D) + a);
          shared[v * D + c] = z[a].x;
          shared[v * D + c + 1] = z[a].y;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      store_shared<D, BITS, GROUP, RULE, ROTATION, FIRST, CODES, SCALE, W>(
          rows + int64_t(set) * SET * W, shared, min(SET, L - set * SET), lane);
    }
  }
}

}  // namespace kvq
