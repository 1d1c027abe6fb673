// Quantization of rotated channels in the registers of a SIMD group: scales, codes, words.
//
// A lane has CH neighbouring channels of one group, which SPAN lanes share. If SPAN is a power of
// two, these lanes differ in the bits of MASK * (SPAN - 1); otherwise they are neighbours, from
// lane `first` on. The arithmetic is that of `mlx_kvq.format.levels.quantize`.
namespace kvq {

enum : int { SEARCH = 0, ABSMAX = 1, PAPER = 2 };  // template value RULE

template <int SPAN, int MASK, bool SUM>
INLINE float group_reduce(float x, uint first) {
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

constexpr float smallest_half() {
  return 1.0f / 16777216.0f;
}
// Rounded up to a multiple of fp16's smallest number, then to fp16. Rounded down, the smallest
// scales would clip the largest channel by a third.
INLINE float scale_to_half(float s) {
  return float(half(min(-floor(-16777216.0f * s) * smallest_half(), 65504.0f)));
}

// The two scales tried, in 750ths of a group's largest channel, in 350ths at 3 bits, or in 1550ths
// at 5 bits (mlx_kvq/format/levels.py).
constexpr int tried_scale(int BITS, int GROUP, int i) {
  return BITS == 3 ? (GROUP <= 32 ? 92 - 12 * i : GROUP <= 64 ? 86 - 10 * i : 84 - 14 * i)
      : BITS == 5  ? (GROUP <= 32 ? 100 - 3 * i : GROUP <= 64 ? 100 - 4 * i : 98 - 4 * i)
                   : (GROUP <= 32 ? 100 - 6 * i : GROUP <= 64 ? 96 - 7 * i : 93 - 7 * i);
}
constexpr float tried_parts(int BITS) {
  return BITS == 3 ? 350.0f : BITS == 5 ? 1550.0f : 750.0f;
}
// The largest channel is less than 8, or 4, of it. At 5 bits the other way serves both scales.
constexpr bool is_inside(int BITS, int tried) {
  return BITS == 3 ? 350.0f < 3.99f * float(tried) : BITS == 4 && 750.0f < 7.99f * float(tried);
}
// A group whose largest channel is not above this gets scale 0: a 7.5th (3.5th, 15.5th) of it is 0 in
// fp16.
constexpr float least_top(int BITS) {
  return tried_parts(BITS) / 100.0f / 33554432.0f;
}

// Codes n = floor(x / scale) + 2^(BITS - 1) in [0, LEVELS], or rint() by the paper's rule, packed
// into words; of 3 bits in nibbles, of 5 bits in bytes. `dot` and `length` gain the sums of
// x * level and level^2, level = n - 7.5; with 3 bits n is 4 larger for this, with 5 bits level is 8
// less.
// EXACT divides instead of multiplying by `inverse`: half-precision channels that were not rotated
// are often whole multiples of their scale, and all backends must agree about such ties.
// INSIDE: no code is out of range.
template <int CH, int BITS, int RULE, bool INSIDE, bool EXACT>
INLINE void code_channels(
    thread uint* words,
    thread float& dot,
    thread float& length,
    const thread float* x,
    float scale,
    float inverse) {
  constexpr int LEVELS = RULE == PAPER ? (1 << BITS) - 2 : (1 << BITS) - 1;  // steps of a scale
  constexpr int WIDE = wide_bits(BITS);
  constexpr int PER_WORD = 32 / WIDE;
  const float step = INSIDE ? inverse : inverse * (1.0f / float(LEVELS));
  UNROLL for (int w = 0; w < CH / PER_WORD; w++) {
    float codes[PER_WORD];
    UNROLL for (int i = 0; i < PER_WORD; i++) {
      const float y = x[w * PER_WORD + i];
      if (EXACT) {
        const float q = scale > 0.0f ? y / scale : 0.0f;
        const float low = float(LEVELS / 2 + (RULE == PAPER ? 0 : 1));
        const float n = RULE == PAPER ? rint(q) : floor(q);
        codes[i] = rounded_code(1.0f, clamp(n, -low, float(LEVELS / 2)) + low);
      } else if (INSIDE) {
        codes[i] = floor_code(y, step);
      } else {
        codes[i] = rounded_code(saturated(fma(y, step, 0.5f)), float(LEVELS));
      }
      if (BITS == 3 && (EXACT || !INSIDE)) codes[i] += 4.0f;
      const float level = BITS == 5 ? level_of(codes[i]) - 8.0f : level_of(codes[i]);
      dot = fma(y, level, dot);
      length = fma(level, level, length);
    }
    // The paper's codes begin at 1.
    constexpr uint ONES = WIDE == 4 ? 0x11111111u : 0x01010101u;
    words[w] = word_of<WIDE>(codes) + (RULE == PAPER ? ONES : 0u);
    if (BITS == 3) words[w] -= 0x44444444u;
  }
}

// Keeps the words whose levels have the smaller angle to x, by dot^2 / length.
template <int WORDS>
INLINE void keep_better(
    thread uint* words,
    thread float& best_dot,
    thread float& best_length,
    const thread uint* tried,
    float dot,
    float length,
    bool is_first) {
  const bool better = is_first || dot * dot * best_length > best_dot * best_dot * length;
  UNROLL for (int w = 0; w < WORDS; w++) words[w] = better ? tried[w] : words[w];
  best_dot = better ? dot : best_dot;
  best_length = better ? length : best_length;
}

// Writes CH * BITS / 32 words (of 3-bit codes CH / 8, of 5-bit codes CH / 4) and the bits of the group's fp16 scale.
// `zero` is 0, which no compiler knows: added to a loop's end, it keeps the loop from being unrolled.
template <int CH, int BITS, int RULE, int SPAN, int MASK, bool EXACT>
INLINE void quantize_channels(
    thread uint* words,
    thread ushort& scale_bits,
    const thread float* x,
    uint first,
    int zero) {
  constexpr int WORDS = CH * wide_bits(BITS) / 32;
  constexpr int GROUP = CH * SPAN;
  float top = 0.0f, squares = 0.0f;  // squares: NaN if a channel is; max() ignores NaN
  UNROLL for (int i = 0; i < CH; i++) {
    top = max(top, fabs(x[i]));
    squares = fma(x[i], x[i], squares);
  }
  top = group_reduce<SPAN, MASK, false>(top, first);
  squares = group_reduce<SPAN, MASK, true>(squares, first);
  float scale;
  if (RULE == SEARCH && BITS != 8) {
    // The better scale gives levels with the smaller angle to x. The stored scale gives these
    // levels the length of x. A reciprocal below 2^-126 would be 0.
    const bool some = top > least_top(BITS);
    const float inverse = some ? reciprocal(0.25f * top) : 0.0f;
    constexpr int A = tried_scale(BITS, GROUP, 0), B = tried_scale(BITS, GROUP, 1);
    constexpr float PARTS = tried_parts(BITS);
    // At 3 bits B is small and clips more often than not.
    constexpr bool A_INSIDE = is_inside(BITS, A) && (BITS != 3 || is_inside(BITS, B));
    constexpr bool B_INSIDE = is_inside(BITS, B);
    float best_dot = 0.0f, best_length = 1.0f;
    if (HOLD_TABLES == 0 && A_INSIDE == B_INSIDE) {  // one try at a time: registers are few
      ROLLED for (int i = 0; i < 2 + zero; i++) {
        uint tried[WORDS];
        float dot = 0.0f, length = 0.0f;
        code_channels<CH, BITS, RULE, A_INSIDE, EXACT>(
            tried, dot, length, x,
            some ? top * (i == 0 ? float(A) / PARTS : float(B) / PARTS) : 0.0f,
            inverse * (i == 0 ? 0.25f * PARTS / float(A) : 0.25f * PARTS / float(B)));
        keep_better<WORDS>(
            words, best_dot, best_length, tried, group_reduce<SPAN, MASK, true>(dot, first),
            group_reduce<SPAN, MASK, true>(length, first), i == 0);
      }
    } else {
      uint tried[2][WORDS];
      float dots[2] = {0.0f, 0.0f}, lengths[2] = {0.0f, 0.0f};
      code_channels<CH, BITS, RULE, A_INSIDE, EXACT>(
          tried[0], dots[0], lengths[0], x, some ? top * (float(A) / PARTS) : 0.0f,
          inverse * (0.25f * PARTS / float(A)));
      code_channels<CH, BITS, RULE, B_INSIDE, EXACT>(
          tried[1], dots[1], lengths[1], x, some ? top * (float(B) / PARTS) : 0.0f,
          inverse * (0.25f * PARTS / float(B)));
      UNROLL for (int i = 0; i < 2; i++) {
        keep_better<WORDS>(
            words, best_dot, best_length, tried[i], group_reduce<SPAN, MASK, true>(dots[i], first),
            group_reduce<SPAN, MASK, true>(lengths[i], first), i == 0);
      }
    }
    scale = some ? square_root(squares * reciprocal(best_length)) : 0.0f;
  } else {
    constexpr int LEVELS = RULE == PAPER ? (1 << BITS) - 2 : (1 << BITS) - 1;
    scale = top >= smallest_half() ? scale_to_half(top * (2.0f / float(LEVELS))) : 0.0f;
    float dot = 0.0f, length = 0.0f;
    code_channels<CH, BITS, RULE, false, EXACT>(
        words, dot, length, x, scale, scale > 0.0f ? reciprocal(scale) : 0.0f);
  }
  const bool finite = isfinite(top) && squares == squares;
  UNROLL for (int w = 0; w < WORDS; w++) words[w] = finite ? words[w] : 0u;
  scale_bits = finite ? as_type<ushort>(half(min(scale, 65504.0f))) : ushort(0x7e00);
}

// Whether a lane's 16 channels are whole groups or a part of one group.
constexpr bool groups_are_lanes(int D, int GROUP) {
  return points_of(D) == 8 && is_power(GROUP);
}

// Quantizes vectors in registers, if `groups_are_lanes`, and writes each to its lane's `row`: codes
// from word FIRST on, high bits of narrow codes from half HIGH on, scales from half SCALE after word
// CODES on. EVEN: rows have an even number of words.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES, int SCALE,
    bool EVEN>
INLINE void store_vectors(
    device uint* row, const thread float2* z, bool valid, int zero, uint lane) {
  constexpr int CH = GROUP < 16 ? GROUP : 16;
  constexpr int SPAN = GROUP / CH;
  constexpr int MASK = ROTATION == SRFT ? lanes_of(D) / SPAN : 1;
  constexpr int WORDS = CH * wide_bits(BITS) / 32;
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
    quantize_channels<CH, BITS, RULE, SPAN, MASK, is_none(ROTATION)>(words, scale, x, 0, zero);
    if (valid) {
      store_codes<BITS, WORDS, FIRST, HIGH, EVEN>(row, words, (block * (16 / CH) + part) * WORDS);
      if (block % SPAN == 0) {
        scales[SCALE + (block * (16 / CH) + part) / SPAN] = scale;
      }
    }
  }
}

// The same for any group, from threadgroup memory: y holds the SIMD group's vectors, channels in
// order; vector v goes to row + v * W. A lane takes the eight channels of a word or two; 32 lanes
// take as many whole groups as fit.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES, int SCALE,
    int W>
INLINE void store_shared(
    device uint* row,
    const threadgroup float2* y,
    int vectors,
    uint lane) {
  constexpr int SPAN = GROUP / 8;
  constexpr int AT_ONCE = 32 / SPAN;
  constexpr int WORDS = wide_bits(BITS) == 8 ? 2 : 1;
  const int mine = int(lane) / SPAN;
  const int part = int(lane) % SPAN;
  for (int g = 0; g < vectors * (D / GROUP); g += AT_ONCE) {
    const int group = g + mine;
    const int v = group / (D / GROUP);
    const int index = group % (D / GROUP);
    const bool valid = mine < AT_ONCE && v < vectors;
    float x[8];
    UNROLL for (int i = 0; i < 4; i++) {
      const int at = (v * D + index * GROUP) / 2 + 4 * part + i;
      const float2 pair = valid ? y[at] : float2(0.0f, 0.0f);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
    uint words[WORDS];
    ushort scale;
    quantize_channels<8, BITS, RULE, SPAN, 1, is_none(ROTATION)>(
        words, scale, x, uint(mine * SPAN) & 31u, unknown_zero(vectors));
    store_eight_codes<BITS, FIRST, HIGH>(row + v * W, words, index * SPAN + part, valid);
    if (valid && part == 0) {
      halves_of(row + v * W + CODES)[SCALE + index] = scale;
    }
  }
}

// The same for V vectors, rounded with feedback of their head's G (feedback.metal); nearest.metal's
// does nothing.
template <
    int V, int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES,
    int SCALE, int W>
INLINE void store_with_feedback(
    device uint* row, threadgroup float2* shared, threadgroup float2* spare, int count,
    const device float* G, uint lane);

// Vectors of a set that are rounded with feedback at once. FED_AT_ONCE: an enumerator of
// mlx_kvq/ops/gpu/jit.py.
constexpr int fed_at_once(int SET) {
  return SET < FED_AT_ONCE ? SET : FED_AT_ONCE;
}

// Threadgroup memory of a SIMD group that packs vectors, in float2: of vectors, which are swapped
// there or lie there, and last what rounds some with feedback.
constexpr int shared_points(int D, int GROUP, int ROTATION, int SET, bool FEEDBACK) {
  return (swaps(D, ROTATION)                      ? vectors_of(D) * swap_points(D)
              : groups_are_lanes(D, GROUP) && !FEEDBACK ? 0
                                                        : SET * D / 2) +
      (FEEDBACK ? fed_at_once(SET) * D / 2 : 0);
}

// Packs the keys or the values of a head's L tokens by one SIMD group: every `workers`-th set of
// SET tokens, from set `worker` on. x and rows begin with the head's first token; `shared` has
// shared_points. FEEDBACK: of the head's G, fp32 [D, D]. KEEPS: rotated vectors of tokens from
// `drop` on go to `kept`, KEPT channels apart. If `rotated`, x are such. `keys` is any of the
// keys: their type says what the tail has.
template <
    int D, int BITS, int GROUP, int RULE, int ROTATION, bool CALIBRATED, bool SCALED, int SET,
    int FIRST, int HIGH, int CODES, int SCALE, int W, bool KEEPS, int KEPT, bool FEEDBACK,
    typename R, typename T, typename K>
INLINE void pack_vectors(
    device uint* rows,
    const device R* keys,
    const device T* x,
    int64_t by_token,
    int64_t stride,
    int L,
    int worker,
    int workers,
    threadgroup float2* shared,
    const device float* table,
    int head,
    device K* kept,
    int drop,
    bool rotated,
    const device float* G,
    uint lane) {
  constexpr bool LANES = groups_are_lanes(D, GROUP) && !FEEDBACK;
  const int v = int(lane) / lanes_of(D);
  lane_table<D> w;
  lane_factors<D> f;
  read_table<D, ROTATION>(w, table, lane);
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  read_factors<D, ROTATION, CALIBRATED, SCALED>(f, factors, lane);
  float2 z[points_of(D)];
  UNROLL for (int a = 0; a < points_of(D); a++) z[a] = float2(0.0f, 0.0f);
  x += int64_t(worker * SET + v) * by_token;
  device uint* to = rows + int64_t(worker * SET + (LANES ? v : 0)) * W;
  for (int first = worker * SET; first < L; first += workers * SET) {
    const int token = first + v;
    const bool valid = v < SET && token < L;
    // 0, of another origin in each turn: what depends on it is not in registers between turns.
    const int zero = HOLD_TABLES != 0 ? 0 : unknown_zero(token);
    const uint own_lane = HOLD_TABLES != 0 ? lane : lane + uint(zero);
    if (HOLD_TABLES == 0) {
      UNROLL for (int a = 0; a < points_of(D); a++) z[a] = float2(0.0f, 0.0f);
    }
    if (rotated) {
      if (valid) read_rotated<D, ROTATION>(z, x, stride, zero, own_lane);
    } else {
      if (valid) {  // other lanes repeat what they have
        read_points<D, ROTATION>(z, x, stride, zero, lane);
      }
      rotate_points<D, ROTATION, CALIBRATED, SCALED, swaps(D, ROTATION)>(
          z, f, w, table, factors, shared, own_lane);
      UNROLL for (int a = 0; a < points_of(D); a++) {
        z[a] = float2(as_kept(keys, z[a].x), as_kept(keys, z[a].y));
      }
    }
    if (KEEPS && valid && token >= drop) {
      write_points<D, ROTATION>(kept + int64_t(token - drop) * KEPT, z, own_lane);
    }
    if (LANES) {
      store_vectors<D, BITS, GROUP, RULE, ROTATION, FIRST, HIGH, CODES, SCALE, W % 2 == 0>(
          to, z, valid, unknown_zero(L), own_lane);
    } else {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (valid) {
        UNROLL for (int a = 0; a < points_of(D); a++) {
          shared[v * D / 2 + rotated_block<D, ROTATION>(own_lane) * points_of(D) + a] = z[a];
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (FEEDBACK) {
        constexpr int MOST = fed_at_once(SET);
        constexpr int SPARE = shared_points(D, GROUP, ROTATION, SET, true) - MOST * D / 2;
        const int count = min(SET, L - first);
        ROLLED for (counter i = 0; i < counter(count); i += MOST) {
          if (MOST > 1 && count - int(i) == 1) {  // a single token waits for no others
            store_with_feedback<
                1, D, BITS, GROUP, RULE, ROTATION, FIRST, HIGH, CODES, SCALE, W>(
                to + i * W, shared + i * (D / 2), shared + SPARE, 1, G, own_lane);
          } else {
            store_with_feedback<
                MOST, D, BITS, GROUP, RULE, ROTATION, FIRST, HIGH, CODES, SCALE, W>(
                to + i * W, shared + i * (D / 2), shared + SPARE, count - int(i), G,
                own_lane);
          }
        }
      } else {
        store_shared<D, BITS, GROUP, RULE, ROTATION, FIRST, HIGH, CODES, SCALE, W>(
            to, shared, min(SET, L - first), own_lane);
      }
    }
    x += int64_t(workers * SET) * by_token;
    to += int64_t(workers * SET) * W;
  }
}

}  // namespace kvq
