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

// What one group of channels works on: SLICES slices of a vector from number FIRST on, of which it has
// all channels if WHOLE; channels before it are in slices before number BEFORE.
template <int FIRST_SLICE, int SLICE_COUNT, int BEFORE_COUNT, bool IS_WHOLE>
struct slices_in {
  enum : int { FIRST = FIRST_SLICE, SLICES = SLICE_COUNT, BEFORE = BEFORE_COUNT };
  enum : bool { WHOLE = IS_WHOLE };
};

// Whether the group from channel `low` on has the lane's channel of its slice i.
template <typename S, int GROUP>
INLINE bool in_group(int i, int low, uint lane) {
  const int c = 32 * (S::FIRST + i) + int(lane) - low;
  return S::WHOLE || (c >= 0 && c < GROUP);
}

// Row 8 block + j of G [D, D] says what an error of channel j of the block adds to others: its
// elements for the lane's channels of COUNT slices from number `first` on.
template <int D, int COUNT>
INLINE void read_gains(thread float* g, const device float* G, int block, int first, uint lane) {
  UNROLL for (int i = 0; i < COUNT; i++) {
    const int c = min(32 * (first + i) + int(lane), D - 1);
    UNROLL for (int j = 0; j < 8; j++) g[8 * i + j] = G[(8 * block + j) * D + c];
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

// The step for the group of targets from channel `low` on, and its inverse; 0 for zeros.
template <typename S, int BITS, int GROUP, int RULE, bool EXACT>
INLINE float2 step_of_group(const thread float* t, int low, uint lane) {
  float top = 0.0f;
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    top = in_group<S, GROUP>(i, low, lane) ? max(top, fabs(t[i])) : top;
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
      if (in_group<S, GROUP>(i, low, lane)) {
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
    const thread float* t, const thread float* level, float step, int low, uint lane) {
  if (RULE != SEARCH) {
    return step;
  }
  float squares = 0.0f, length = 0.0f;
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    const bool own = in_group<S, GROUP>(i, low, lane);
    squares = own ? fma(t[i], t[i], squares) : squares;
    length = own ? fma(level[i], level[i], length) : length;
  }
  squares = simd_sum(squares);
  length = simd_sum(length);
  const float scale = square_root(squares * reciprocal(length));
  return step > 0.0f ? float(half(min(scale, 65504.0f))) : 0.0f;
}

// Whether the group from channel `low` on has a NaN or an infinity.
template <typename S, int GROUP>
INLINE bool is_damaged(const thread float* t, int low, uint lane) {
  bool damaged = false;
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    damaged = damaged || (in_group<S, GROUP>(i, low, lane) && !isfinite(t[i]));
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

// Rounds the group of channels from `low` on to levels: its targets t make up for the errors so far,
// and those before it for its own. S is its `slices_in`, `scale` its place in the row.
template <typename S, int D, int BITS, int GROUP, int RULE, bool EXACT>
INLINE void round_group(
    device ushort* scale, const thread float* all_y, thread float* all_t, thread float* all_levels,
    const device float* G, int low, uint lane) {
  constexpr float LOWEST = (RULE == PAPER ? 0.0f : 0.5f) - float(1 << (BITS - 1));
  const thread float* y = all_y + S::FIRST;
  thread float* t = all_t + S::FIRST;
  thread float* level = all_levels + S::FIRST;
  // A damaged group has code 0 and a NaN scale. It passes nothing on, like one of zeros.
  bool damaged = is_damaged<S, GROUP>(t, low, lane);
  const float2 step =
      damaged ? float2(0.0f, 0.0f) : step_of_group<S, BITS, GROUP, RULE, EXACT>(t, low, lane);
  const int last = (low + GROUP) / 8 - 1;
  float g[8 * S::SLICES], errors[8];
  read_gains<D, S::SLICES>(g, G, last, S::FIRST, lane);
  ROLLED for (int block = last; block >= low / 8; block--) {
    const int slice = block / 4 - S::FIRST;
    const float n = nearest_level<BITS, RULE, EXACT>(of_slice<S::SLICES>(t, slice), step.x, step.y);
    UNROLL for (int i = 0; i < S::SLICES; i++) {
      level[i] = i == slice && int(lane) / 8 == block % 4 ? n : level[i];
    }
    share_errors(errors, step.x > 0.0f ? of_slice<S::SLICES>(y, slice) - step.x * n : 0.0f, block);
    UNROLL for (int i = 0; i < S::SLICES; i++) {
      const int c = 32 * (S::FIRST + i) + int(lane);
      const bool open = c < 8 * block && in_group<S, GROUP>(i, low, lane);
      t[i] = open ? fed_back(t[i], g + 8 * i, errors) : t[i];
    }
    // For the next block, while the chain of this one goes on.
    read_gains<D, S::SLICES>(g, G, max(block - 1, 0), S::FIRST, lane);
  }
  const float stored = stored_scale<S, GROUP, RULE>(t, level, step.x, low, lane);
  damaged = damaged || is_damaged<S, GROUP>(t, low, lane);
  // Without the first group, which has none before it.
  ROLLED for (int block = low > 0 ? low / 8 : last + 1; block <= last; block++) {
    const int slice = block / 4 - S::FIRST;
    const float n = of_slice<S::SLICES>(level, slice);
    share_errors(errors, step.x > 0.0f ? of_slice<S::SLICES>(y, slice) - stored * n : 0.0f, block);
    UNROLL for (int i = 0; i < S::BEFORE; i++) {
      float own[8];
      read_gains<D, 1>(own, G, block, i, lane);
      all_t[i] = fed_back(all_t[i], own, errors);  // nobody reads what is rounded already
    }
  }
  UNROLL for (int i = 0; i < S::SLICES; i++) {
    level[i] = damaged && in_group<S, GROUP>(i, low, lane) ? LOWEST : level[i];
  }
  if (lane == 0) {
    *scale = damaged ? ushort(0x7e00) : as_type<ushort>(half(stored));
  }
}

// Rounds the first LEFT groups of whole slices, the last of them first. Which slices a group has is
// a constant: it works on no others.
template <int D, int BITS, int GROUP, int RULE, bool EXACT, int LEFT>
struct whole_groups {
  static INLINE void round(
      device ushort* scales, const thread float* y, thread float* t, thread float* level,
      const device float* G, uint lane) {
    constexpr int AT = (LEFT - 1) * GROUP / 32;
    round_group<slices_in<AT, GROUP / 32, AT, true>, D, BITS, GROUP, RULE, EXACT>(
        scales + LEFT - 1, y, t, level, G, 32 * AT, lane);
    whole_groups<D, BITS, GROUP, RULE, EXACT, LEFT - 1>::round(scales, y, t, level, G, lane);
  }
};

template <int D, int BITS, int GROUP, int RULE, bool EXACT>
struct whole_groups<D, BITS, GROUP, RULE, EXACT, 0> {
  static INLINE void round(
      device ushort*, const thread float*, thread float*, thread float*, const device float*, uint) {
  }
};

// Quantizes the vector y, channels in order, and writes it to its row, as `store_shared` does.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES, int SCALE>
INLINE void store_with_feedback(
    device uint* row, const threadgroup float2* shared, const device float* G, uint lane) {
  constexpr int N = slices_of(D);
  constexpr bool EXACT = is_none(ROTATION);
  constexpr bool WHOLE = GROUP % 32 == 0;
  constexpr float LOWEST = (RULE == PAPER ? 0.0f : 0.5f) - float(1 << (BITS - 1));
  float y[N], t[N], level[N];
  UNROLL for (int i = 0; i < N; i++) {
    const int c = 32 * i + int(lane);
    const float2 pair = c < D ? shared[c / 2] : float2(0.0f, 0.0f);
    y[i] = c % 2 == 0 ? pair.x : pair.y;
    t[i] = y[i];
    level[i] = LOWEST;
  }
  device ushort* scales = halves_of(row + CODES) + SCALE;
  whole_groups<D, BITS, GROUP, RULE, EXACT, WHOLE ? D / GROUP : 0>::round(
      scales, y, t, level, G, lane);
  ROLLED for (int low = WHOLE ? -1 : D - GROUP; low >= 0; low -= GROUP) {
    round_group<slices_in<0, N, N, false>, D, BITS, GROUP, RULE, EXACT>(
        scales + low / GROUP, y, t, level, G, low, lane);
  }
  store_levels<D, BITS, RULE, FIRST, HIGH>(row, level, lane);
}

}  // namespace kvq
