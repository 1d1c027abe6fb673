// Keys rounded with feedback (mlx_kvq/format/feedback.py): blocks of eight channels from the last
// to the first, each towards what makes up for the errors so far. The arithmetic is that of
// `mlx_kvq.format.levels.quantize_with_feedback`.
//
// A SIMD group works on one vector: lane l has channels 32 i + l, for i < slices_of(D). Errors of a
// block go to all channels before it at once, so that nothing but a group's scale is a reduction.
namespace kvq {

constexpr int slices_of(int D) {
  return (D + 31) / 32;
}

// x[slice], without an index that would move x from registers to memory.
template <int N>
INLINE float of_slice(const thread float* x, int slice) {
  float out = x[0];
  UNROLL for (int i = 1; i < N; i++) out = i == slice ? x[i] : out;
  return out;
}

// Makes channels from `low` to before `high` of the targets t make up for the errors e of block
// number `block`. G is [D, D]: row j holds what an error of channel j adds to others.
template <int D>
INLINE void feed_back(
    thread float* t, float e, const device float* G, int block, int low, int high, uint lane) {
  float errors[8];
  UNROLL for (int j = 0; j < 8; j++) errors[j] = simd_shuffle(e, ushort(8 * (block % 4) + j));
  G += 8 * D * block;
  UNROLL for (int i = 0; i < slices_of(D); i++) {
    const int c = 32 * i + int(lane);
    if (c >= low && c < high) {
      UNROLL for (int j = 0; j < 8; j++) t[i] = fma(G[j * D + c], errors[j], t[i]);
    }
  }
}

// EXACT as in `code_channels`.
template <int BITS, int RULE, bool EXACT>
INLINE float nearest_level(float x, float step, float inverse) {
  constexpr float MIDDLE = float(1 << (BITS - 1));
  const float q = EXACT ? (step > 0.0f ? x / step : 0.0f) : x * inverse;
  return RULE == PAPER ? clamp(rint(q), 1.0f - MIDDLE, MIDDLE - 1.0f)
                       : clamp(floor(q), -MIDDLE, MIDDLE - 1.0f) + 0.5f;
}

// The step for the group of targets from channel `low` on, and its inverse; 0 for zeros.
template <int D, int BITS, int GROUP, int RULE, bool EXACT>
INLINE float2 step_of_group(const thread float* t, int low, uint lane) {
  float top = 0.0f;
  UNROLL for (int i = 0; i < slices_of(D); i++) {
    const int c = 32 * i + int(lane) - low;
    top = c >= 0 && c < GROUP ? max(top, fabs(t[i])) : top;
  }
  top = simd_max(top);
  if (RULE != SEARCH) {
    constexpr int LEVELS = RULE == PAPER ? (1 << BITS) - 2 : (1 << BITS) - 1;
    const float s = top >= smallest_half() ? scale_to_half(top * (2.0f / float(LEVELS))) : 0.0f;
    return float2(s, s > 0.0f ? reciprocal(s) : 0.0f);
  }
  const bool some = top > least_top(BITS);
  const float inverse = some ? reciprocal(0.25f * top) : 0.0f;
  float2 best = float2(0.0f, 0.0f);
  float best_dot = 0.0f, best_length = 1.0f;
  UNROLL for (int k = 0; k < 2; k++) {
    const float tried = float(tried_scale(BITS, GROUP, k)) / tried_parts(BITS);
    const float step = some ? top * tried : 0.0f;
    const float by = inverse * (0.25f / tried);
    float dot = 0.0f, length = 0.0f;
    UNROLL for (int i = 0; i < slices_of(D); i++) {
      const int c = 32 * i + int(lane) - low;
      if (c >= 0 && c < GROUP) {
        const float level = nearest_level<BITS, RULE, EXACT>(t[i], step, by);
        dot = fma(t[i], level, dot);
        length = fma(level, level, length);
      }
    }
    dot = simd_sum(dot);
    length = simd_sum(length);
    const bool better = k == 0 || dot * dot * best_length > best_dot * best_dot * length;
    best = better ? float2(step, by) : best;
    best_dot = better ? dot : best_dot;
    best_length = better ? length : best_length;
  }
  return best;
}

// The scale that is stored: a searched one gives the levels the length of the targets.
template <int D, int GROUP, int RULE>
INLINE float stored_scale(
    const thread float* t, const thread float* level, float step, int low, uint lane) {
  if (RULE != SEARCH) {
    return step;
  }
  float squares = 0.0f, length = 0.0f;
  UNROLL for (int i = 0; i < slices_of(D); i++) {
    const int c = 32 * i + int(lane) - low;
    squares = c >= 0 && c < GROUP ? fma(t[i], t[i], squares) : squares;
    length = c >= 0 && c < GROUP ? fma(level[i], level[i], length) : length;
  }
  squares = simd_sum(squares);
  length = simd_sum(length);
  const float scale = square_root(squares * reciprocal(length));
  return step > 0.0f ? float(half(min(scale, 65504.0f))) : 0.0f;
}

// Whether the group from channel `low` on has a NaN or an infinity.
template <int D, int GROUP>
INLINE bool is_damaged(const thread float* t, int low, uint lane) {
  bool damaged = false;
  UNROLL for (int i = 0; i < slices_of(D); i++) {
    const int c = 32 * i + int(lane) - low;
    damaged = damaged || (c >= 0 && c < GROUP && !isfinite(t[i]));
  }
  return simd_any(damaged);
}

// Writes the codes of levels: a lane per unit of narrow codes, or per word.
template <int D, int BITS, int RULE, int FIRST, int HIGH>
INLINE void store_levels(device uint* row, const thread float* level, uint lane) {
  constexpr float ZERO = float(1 << (BITS - 1)) - (RULE == PAPER ? 0.0f : 0.5f);
  constexpr int WIDE = wide_bits(BITS);
  constexpr int LANES = 32 / WIDE;                          // that have a word
  constexpr int WORDS = BITS == 3 ? 2 : BITS == 5 ? 4 : 1;  // that a lane writes
  UNROLL for (int i = 0; i < slices_of(D); i++) {
    uint words[WORDS];
    words[0] = uint(level[i] + ZERO) << (uint(WIDE) * (lane & uint(LANES - 1)));
    UNROLL for (int h = 1; h < LANES; h *= 2) words[0] |= simd_shuffle_xor(words[0], ushort(h));
    UNROLL for (int w = 1; w < WORDS; w++) {
      words[w] = simd_shuffle_xor(words[0], ushort(w * LANES));
    }
    if (32 * i + int(lane) < D && lane % uint(LANES * WORDS) == 0) {
      store_codes<BITS, WORDS, FIRST, HIGH, false>(row, words, 32 / LANES * i + int(lane) / LANES);
    }
  }
}

// Quantizes the vector y, channels in order, and writes it to its row, as `store_shared` does.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES, int SCALE>
INLINE void store_with_feedback(
    device uint* row, const threadgroup float2* shared, const device float* G, uint lane) {
  constexpr int N = slices_of(D);
  constexpr bool EXACT = is_none(ROTATION);
  constexpr float LOWEST = (RULE == PAPER ? 0.0f : 0.5f) - float(1 << (BITS - 1));
  float y[N], t[N], level[N];
  UNROLL for (int i = 0; i < N; i++) {
    const int c = 32 * i + int(lane);
    const float2 pair = c < D ? shared[c / 2] : float2(0.0f, 0.0f);
    y[i] = c % 2 == 0 ? pair.x : pair.y;
    t[i] = y[i];
    level[i] = LOWEST;
  }
  ROLLED for (int low = D - GROUP; low >= 0; low -= GROUP) {
    // A damaged group has code 0 and a NaN scale. It passes nothing on, like one of zeros.
    bool damaged = is_damaged<D, GROUP>(t, low, lane);
    const float2 step =
        damaged ? float2(0.0f, 0.0f) : step_of_group<D, BITS, GROUP, RULE, EXACT>(t, low, lane);
    ROLLED for (int block = (low + GROUP) / 8 - 1; block >= low / 8; block--) {
      const float n = nearest_level<BITS, RULE, EXACT>(of_slice<N>(t, block / 4), step.x, step.y);
      UNROLL for (int i = 0; i < N; i++) {
        level[i] = i == block / 4 && int(lane) / 8 == block % 4 ? n : level[i];
      }
      const float e = step.x > 0.0f ? of_slice<N>(y, block / 4) - step.x * n : 0.0f;
      feed_back<D>(t, e, G, block, low, 8 * block, lane);
    }
    const float scale = stored_scale<D, GROUP, RULE>(t, level, step.x, low, lane);
    damaged = damaged || is_damaged<D, GROUP>(t, low, lane);
    const int next = low > 0 ? low / 8 : D / 8;  // the first group has none before it
    ROLLED for (int block = next; block < (low + GROUP) / 8; block++) {
      const float n = of_slice<N>(level, block / 4);
      const float e = step.x > 0.0f ? of_slice<N>(y, block / 4) - scale * n : 0.0f;
      feed_back<D>(t, e, G, block, 0, low, lane);
    }
    UNROLL for (int i = 0; i < N; i++) {
      const int c = 32 * i + int(lane) - low;
      level[i] = damaged && c >= 0 && c < GROUP ? LOWEST : level[i];
    }
    if (lane == 0) {
      halves_of(row + CODES)[SCALE + low / GROUP] =
          damaged ? ushort(0x7e00) : as_type<ushort>(half(scale));
    }
  }
  store_levels<D, BITS, RULE, FIRST, HIGH>(row, level, lane);
}

}  // namespace kvq
