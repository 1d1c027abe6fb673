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

// What one group of channels works on: SLICES slices of a vector, of which it has all channels if
// WHOLE, and BEFORE slices with the channels before it.
template <int SLICE_COUNT, int BEFORE_COUNT, bool IS_WHOLE>
struct slices_in {
  enum : int { SLICES = SLICE_COUNT, BEFORE = BEFORE_COUNT };
  enum : bool { WHOLE = IS_WHOLE };
};

// Whether a group has channel `at` of those from its first one on.
template <typename S, int GROUP>
INLINE bool in_group(int at) {
  return S::WHOLE || (at >= 0 && at < GROUP);
}

// Row 8 block + j of G [D, D] says what an error of channel j of the block adds to others: its
// elements for the lane's channels of COUNT slices from number `first` on.
template <int D, int COUNT>
INLINE void read_gains(thread float* g, const device float* G, int block, int first, uint lane) {
  const uint own = lane + uint(unknown_zero(block));  // or compilers keep addresses for all blocks
  UNROLL for (int i = 0; i < COUNT; i++) {
    const uint at = uint(32 * (first + i)) + own;
    const device float* from = G + (uint(8 * D * block) + (D % 32 == 0 ? at : min(at, uint(D - 1))));
    UNROLL for (int j = 0; j < 8; j++) g[8 * i + j] = from[j * D];
  }
}

// The errors e of a block's channels, in every lane.
INLINE void share_errors(thread float* errors, float e, int block) {
  UNROLL for (int j = 0; j < 8; j++) errors[j] = simd_shuffle(e, ushort(8 * (block % 4) + j));
}

// Two sums, because the next block waits for this one.
INLINE float fed_back(float t, const thread float* g, const thread float* errors) {
  float even = fma(g[0], errors[0], t), odd = g[1] * errors[1];
  UNROLL for (int j = 2; j < 8; j += 2) {
    even = fma(g[j], errors[j], even);
    odd = fma(g[j + 1], errors[j + 1], odd);
  }
  return even + odd;
}

// EXACT as in `code_channels`.
template <int BITS, int RULE, bool EXACT>
INLINE float nearest_level(float x, float step, float inverse) {
  constexpr float MIDDLE = float(1 << (BITS - 1));
  const float q = EXACT ? (step > 0.0f ? x / step : 0.0f) : x * inverse;
  return RULE == PAPER ? clamp(rint(q), 1.0f - MIDDLE, MIDDLE - 1.0f)
                       : clamp(floor(q), -MIDDLE, MIDDLE - 1.0f) + 0.5f;
}

// The step for a group's targets, and its inverse; 0 for zeros. The lane's first channel is number
// `at` of the group.
template <typename S, int BITS, int GROUP, int RULE, bool EXACT>
INLINE float2 step_of_group(const thread float* t, int at) {
  float top = 0.0f;
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    top = in_group<S, GROUP>(at + 32 * i) ? max(top, fabs(t[i])) : top;
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
    UNROLL for (int i = 0; i < S::SLICES; i++) {
      if (in_group<S, GROUP>(at + 32 * i)) {
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
template <typename S, int GROUP, int RULE>
INLINE float stored_scale(
    const thread float* t, const thread float* level, float step, int at) {
  if (RULE != SEARCH) {
    return step;
  }
  float squares = 0.0f, length = 0.0f;
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    const bool own = in_group<S, GROUP>(at + 32 * i);
    squares = own ? fma(t[i], t[i], squares) : squares;
    length = own ? fma(level[i], level[i], length) : length;
  }
  squares = simd_sum(squares);
  length = simd_sum(length);
  const float scale = square_root(squares * reciprocal(length));
  return step > 0.0f ? float(half(min(scale, 65504.0f))) : 0.0f;
}

// Whether the group has a NaN or an infinity.
template <typename S, int GROUP>
INLINE bool is_damaged(const thread float* t, int at) {
  bool damaged = false;
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    damaged = damaged || (in_group<S, GROUP>(at + 32 * i) && !isfinite(t[i]));
  }
  return simd_any(damaged);
}

// Writes the codes of levels of COUNT slices from number `first` on: a lane per unit of narrow codes,
// or per word.
template <int D, int COUNT, int BITS, int RULE, int FIRST, int HIGH>
INLINE void store_levels(device uint* row, const thread float* level, int first, uint lane) {
  constexpr float ZERO = float(1 << (BITS - 1)) - (RULE == PAPER ? 0.0f : 0.5f);
  constexpr int WIDE = wide_bits(BITS);
  constexpr int LANES = 32 / WIDE;                          // that have a word
  constexpr int WORDS = BITS == 3 ? 2 : BITS == 5 ? 4 : 1;  // that a lane writes
  UNROLL for (int i = 0; i < COUNT; i++) {
    uint words[WORDS];
    words[0] = uint(level[i] + ZERO) << (uint(WIDE) * (lane & uint(LANES - 1)));
    UNROLL for (int h = 1; h < LANES; h *= 2) words[0] |= simd_shuffle_xor(words[0], ushort(h));
    UNROLL for (int w = 1; w < WORDS; w++) {
      words[w] = simd_shuffle_xor(words[0], ushort(w * LANES));
    }
    if (32 * (first + i) + int(lane) < D && lane % uint(LANES * WORDS) == 0) {
      store_codes<BITS, WORDS, FIRST, HIGH, false>(
          row, words, 32 / LANES * (first + i) + int(lane) / LANES);
    }
  }
}

// Rounds the group of channels from `low` on to levels. y, t, level are its slices S, from number
// `first` on, of the vector, of the targets that make up for the errors so far, and of the levels;
// targets in `before` then make up for the group's errors.
template <typename S, int D, int BITS, int GROUP, int RULE, bool EXACT>
INLINE void round_group(
    device ushort* scale, const thread float* y, thread float* t, thread float* level,
    thread float* before, const device float* G, int low, int first, uint lane) {
  constexpr float LOWEST = (RULE == PAPER ? 0.0f : 0.5f) - float(1 << (BITS - 1));
  const int at = 32 * first + int(lane) - low;
  // A damaged group has code 0 and a NaN scale. It passes nothing on, like one of zeros.
  bool damaged = is_damaged<S, GROUP>(t, at);
  const float2 step =
      damaged ? float2(0.0f, 0.0f) : step_of_group<S, BITS, GROUP, RULE, EXACT>(t, at);
  const int last = (low + GROUP) / 8 - 1;
  float g[8 * S::SLICES], errors[8];
  read_gains<D, S::SLICES>(g, G, last, first, lane);
  ROLLED for (int block = last; block >= low / 8; block--) {
    const int slice = block / 4 - first;
    const float n = nearest_level<BITS, RULE, EXACT>(of_slice<S::SLICES>(t, slice), step.x, step.y);
    UNROLL for (int i = 0; i < S::SLICES; i++) {
      level[i] = i == slice && int(lane) / 8 == block % 4 ? n : level[i];
    }
    share_errors(errors, step.x > 0.0f ? of_slice<S::SLICES>(y, slice) - step.x * n : 0.0f, block);
    UNROLL for (int i = 0; i < S::SLICES; i++) {
      const bool open = low + at + 32 * i < 8 * block && in_group<S, GROUP>(at + 32 * i);
      t[i] = open ? fed_back(t[i], g + 8 * i, errors) : t[i];
    }
    // For the next block, while the chain of this one goes on.
    read_gains<D, S::SLICES>(g, G, max(block - 1, 0), first, lane);
  }
  const float stored = stored_scale<S, GROUP, RULE>(t, level, step.x, at);
  damaged = damaged || is_damaged<S, GROUP>(t, at);
  // Without the first group, which has none before it.
  ROLLED for (int block = low > 0 ? low / 8 : last + 1; block <= last; block++) {
    const int slice = block / 4 - first;
    const float n = of_slice<S::SLICES>(level, slice);
    share_errors(errors, step.x > 0.0f ? of_slice<S::SLICES>(y, slice) - stored * n : 0.0f, block);
    UNROLL for (int i = 0; i < S::BEFORE; i++) {
      const int number = S::WHOLE ? first - S::BEFORE + i : i;
      if (number >= 0) {  // nobody reads what is rounded already
        float own[8];
        read_gains<D, 1>(own, G, block, number, lane);
        before[i] = fed_back(before[i], own, errors);
      }
    }
  }
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    level[i] = damaged && in_group<S, GROUP>(at + 32 * i) ? LOWEST : level[i];
  }
  if (lane == 0) {
    *scale = damaged ? ushort(0x7e00) : as_type<ushort>(half(stored));
  }
}

// Quantizes the vector y, channels in order, and writes it to its row, as `store_shared` does.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES, int SCALE>
INLINE void store_with_feedback(
    device uint* row, const threadgroup float2* shared, const device float* G, uint lane) {
  constexpr int N = slices_of(D);
  constexpr bool EXACT = is_none(ROTATION);
  constexpr bool WHOLE = GROUP % 32 == 0;
  constexpr int OWN = WHOLE ? GROUP / 32 : N;  // slices of a group
  constexpr int BEFORE = WHOLE ? N - OWN : N;
  constexpr float LOWEST = (RULE == PAPER ? 0.0f : 0.5f) - float(1 << (BITS - 1));
  float y[N], t[N], level[OWN];
  UNROLL for (int i = 0; i < N; i++) {
    const int c = 32 * i + int(lane);
    const float2 pair = c < D ? shared[c / 2] : float2(0.0f, 0.0f);
    y[i] = c % 2 == 0 ? pair.x : pair.y;
    t[i] = y[i];
  }
  UNROLL for (int i = 0; i < OWN; i++) level[i] = LOWEST;
  device ushort* scales = halves_of(row + CODES) + SCALE;
  // Where a group has whole slices they are the last ones of the arrays: once it is rounded, those
  // before it take their place.
  ROLLED for (int low = D - GROUP; low >= 0; low -= GROUP) {
    round_group<slices_in<OWN, BEFORE, WHOLE>, D, BITS, GROUP, RULE, EXACT>(
        scales + low / GROUP, y + (N - OWN), t + (N - OWN), level, t, G, low,
        WHOLE ? low / 32 : 0, lane);
    if (WHOLE) {
      store_levels<D, OWN, BITS, RULE, FIRST, HIGH>(row, level, low / 32, lane);
      UNROLL for (int i = N - 1; i >= OWN; i--) {
        y[i] = y[i - OWN];
        t[i] = t[i - OWN];
      }
    }
  }
  if (!WHOLE) {
    store_levels<D, OWN, BITS, RULE, FIRST, HIGH>(row, level, 0, lane);
  }
}

}  // namespace kvq
