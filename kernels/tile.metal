// A tile of packed rows in threadgroup memory, and its two products with queries and
// probabilities on the matrix units. Every operand is unpacked by a mask and a magic number, so
// a code costs no conversion: OR-ing n into the bits of fp16 1024 makes 1024 + n (or 1024 + 16 n,
// from the upper nibble of a byte).
//
// Keys: scores [16 keys x 8 queries]. A lane (row, pair) reads words 4 * slot + pair of keys row
// and row + 8; which channel meets which column of the product is free as long as the queries
// agree (`query_channel`). Codes go in raw, 1024 and all; fp32 sums start from minus what the
// offsets will add (`score_offset`), and a group's scale multiplies its finished sum.
// A group that is not whole slots (128 / bits channels) is dequantized before the product.
//
// Values: [channels x 16 keys] x [16 keys x 8 queries]. A lane reads 16-bit units of four keys,
// pairs two keys in a word, and takes the middle off; the scale multiplies the probability, where all
// channels of a product share a group (`value_units_are`), else the level. Sums are fp32.
//
// Which keys meet which rows of a product, and which channels which rows of the sums, is free as
// well. Both are chosen so that the 32 lanes of a load are on 32 banks of threadgroup memory.
namespace kvq {

constexpr int per_word(int BITS) {
  return 16 / BITS;  // half2 operands from one word
}
constexpr int key_slots(int D, int BITS) {
  return (D * BITS / 32 + 3) / 4;
}
constexpr bool whole_slots(int BITS, int GROUP) {
  return GROUP % (128 / BITS) == 0;
}
constexpr int value_units(int D, int BITS) {
  return (D * BITS / 16 + 7) / 8;  // of one lane
}
constexpr int value_tiles(int D, int BITS) {
  return value_units(D, BITS) * per_word(BITS);
}

// A tile's keys in blocks of eight, as products take them. Rows of W words: keys STEP apart are 4
// banks apart, or 12, 20, 28, so that eight rows of four words are on different banks.
constexpr int key_step(int W, int TK) {
  return W % 8 == 4 ? 1 : W * 2 % 8 == 4 ? 2 : W * 4 % 8 == 4 && TK >= 32 ? 4 : 1;
}
template <int STEP>
INLINE counter tile_key(int block, counter row) {
  return counter(8 * STEP * (block / STEP) + block % STEP) + counter(STEP) * row;
}

// How the values' channels are shared out: a product's eight rows take eight neighbouring words, or
// 16-bit units where a group ends within these.
constexpr bool by_words(int D, int BITS, int GROUP) {
  return D * BITS / 16 % 16 == 0 && (GROUP % (256 / BITS) == 0 || GROUP == D);
}
// Whether these are of one group, so that its scale multiplies a probability.
constexpr bool one_group(int D, int BITS, int GROUP) {
  return by_words(D, BITS, GROUP) || GROUP % (128 / BITS) == 0 || GROUP == D;
}
// What sums of levels are to be multiplied by.
constexpr float per_level(int D, int BITS, int GROUP) {
  return one_group(D, BITS, GROUP) ? 0.5f : 1.0f;
}
// Accumulators of a lane that are neighbouring channels.
constexpr int value_run(int D, int BITS, int GROUP) {
  return by_words(D, BITS, GROUP) ? 32 / BITS : 16 / BITS;
}

// Slices of the values' channels (SLICE_VALUES of mlx_kvq/ops/gpu/tuning.py): as many SIMD groups
// share their probabilities, and each adds up one slice of all their tiles. A lane keeps eight
// accumulators or more, and a slice is whole words.
constexpr int value_slices(int D, int BITS, int NSG) {
  int n = 1;
  while (2 * n <= NSG && D * BITS / 16 % 8 == 0 && value_units(D, BITS) % (4 * n) == 0 &&
         value_tiles(D, BITS) >= 16 * n) {
    n *= 2;
  }
  return n;
}
// Probabilities of a SIMD group in threadgroup memory: fp16 ones of a tile, or fp32 ones of exact
// tokens.
constexpr int probability_pairs(int TK) {
  return 2 * TK;
}
INLINE threadgroup half2* halves_of_pairs(threadgroup float2* pairs) {
  return reinterpret_cast<threadgroup half2*>(pairs);
}

// What the SIMD groups of one set of slices wait at.
template <int SLICES>
INLINE void slices_barrier() {
  if (SLICES == 1) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// The largest of what the SIMD groups of one set of slices have. The next call needs a barrier
// before it.
template <int SLICES>
INLINE float2 top_of_slices(threadgroup float* maxima, float2 top, counter group, tile_lane at) {
  if (SLICES > 1) {
    if (at.row == 0) {
      maxima[8 * group + 2 * at.pair] = top.x;
      maxima[8 * group + 2 * at.pair + 1] = top.y;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const threadgroup float* of = maxima + 8 * (group - group % SLICES) + 2 * at.pair;
    UNROLL for (int i = 0; i < SLICES; i++) {
      top = float2(max(top.x, of[8 * i]), max(top.y, of[8 * i + 1]));
    }
  }
  return top;
}

// How large a tile's value scales are says how probabilities and values become fp16 operands that
// neither overflow nor lose bits. The level of a SIMD group's sums only rises: 0 while no scale is
// above 1, 1 up to 2^7, 2. If SCALED, probabilities are multiplied by scales: they are made 2^11, 2^4
// or 2^-5 times as large. Else levels are: these are made 2^7, 1 or 2^-9 times as large, and
// probabilities 2^4 times.
template <bool SCALED>
INLINE float exponent_of(int level) {
  return !SCALED || level == 1 ? 4.0f : level == 0 ? 11.0f : -5.0f;
}
template <bool SCALED>
INLINE float levels_lift(int level) {
  return SCALED || level == 1 ? 1.0f : level == 0 ? 128.0f : 0.001953125f;
}

// A probability is 2^(logit - m) with the enlargement in m. It may exceed that by 2^SLACK: sums are
// rescaled only where a logit is larger, as few are after the first tiles.
enum : int { SLACK = 4 };
template <bool SCALED>
INLINE bool exceeds(float2 top, float2 m, int level) {
  const float most = exponent_of<SCALED>(level) + float(SLACK);
  return top.x > m.x + most || top.y > m.y + most;
}
// Makes the logit `top`, or the one so far, what probabilities refer to, and `to_level` the level.
template <bool SCALED, int TILES>
INLINE void raise(
    thread float2* sums, thread float2& m, thread float2& l, thread int& level, float2 top,
    int to_level) {
  const float was = exponent_of<SCALED>(level), is = exponent_of<SCALED>(to_level);
  const float2 to = float2(max(m.x + was, top.x) - is, max(m.y + was, top.y) - is);
  const float2 f = float2(fast::exp2(m.x - to.x), fast::exp2(m.y - to.y));
  const float lift = SCALED ? 1.0f : levels_lift<SCALED>(to_level) / levels_lift<SCALED>(level);
  l = float2(l.x * f.x, l.y * f.y);
  UNROLL for (int i = 0; i < TILES; i++) {
    sums[i] = float2(sums[i].x * (f.x * lift), sums[i].y * (f.y * lift));
  }
  m = to;
  level = to_level;
}

// Of NSG SIMD groups with `sums` words each, how many have them in memory at once at the end, which
// holds `tiles` words anyway: all, or half where they do not fit or one set is left then.
constexpr int merged_at_once(int NSG, int SLICES, int sums, int tiles) {
  return NSG / 2 < SLICES || (NSG / 2 > SLICES && NSG * sums <= (tiles > 6144 ? tiles : 6144))
      ? NSG
      : NSG / 2;
}

INLINE half2 constant_pair(uint bits) {
  return as_type<half2>(bits | (bits << 16));
}

// Codes i and i + per_word of a word, plus 1024; times 16 if `is_upper(i)`.
constexpr bool is_upper(int BITS, int i) {
  return BITS == 4 && i % 2 == 1;
}
template <int BITS>
INLINE half2 raw_codes(uint word, int i) {
  if (BITS == 8) {
    return as_type<half2>(masked_or(i == 0 ? word : word >> 8, 0x00ff00ffu, 0x64006400u));
  }
  const uint mask = i % 2 == 0 ? 0x000f000fu : 0x00f000f0u;
  return as_type<half2>(masked_or(i < 2 ? word : word >> 8, mask, 0x64006400u));
}

// Codes minus 2^(BITS - 1), exactly.
template <int BITS>
INLINE half2 centred_codes(uint word, int i) {
  const half2 raw = raw_codes<BITS>(word, i);
  if (BITS == 8) {
    return raw + constant_pair(0xe480u);  // -1152
  }
  if (is_upper(BITS, i)) {
    return fma(raw, constant_pair(0x2c00u), constant_pair(0xd480u));  // / 16 - 72
  }
  return raw + constant_pair(0xe408u);  // -1032
}

// Twice the levels of codes i and i + per_word, exactly: from one bit further up, so that the middle,
// also of half-step levels, is a whole number.
template <int BITS, bool HALF_STEP>
INLINE half2 doubled_levels(uint word, int i) {
  const uint from = i < per_word(BITS) / 2 ? word << 1 : word >> 7;
  if (BITS == 8) {
    const half2 raw = as_type<half2>(masked_or(from, 0x01fe01feu, 0x64006400u));
    return raw + constant_pair(HALF_STEP ? 0xe4ffu : 0xe500u);  // -1279, -1280
  }
  const uint mask = is_upper(BITS, i) ? 0x01e001e0u : 0x001e001eu;
  const half2 raw = as_type<half2>(masked_or(from, mask, 0x64006400u));
  if (is_upper(BITS, i)) {
    return fma(raw, constant_pair(0x2c00u), constant_pair(HALF_STEP ? 0xd4f0u : 0xd500u));
  }
  return raw + constant_pair(HALF_STEP ? 0xe40fu : 0xe410u);  // -1039, -1040
}

// Minus what `raw_codes` adds to a level, in two exact summands: the magic number ...
INLINE half2 minus_magic() {
  return constant_pair(0xe400u);
}
// ... and the middle: 7.5 and 16 * 7.5 (half-step levels), or 8 and 16 * 8; 127.5 or 128.
template <int BITS, bool HALF_STEP>
INLINE half2 minus_middle(int i) {
  if (BITS == 8) {
    return constant_pair(HALF_STEP ? 0xd7f8u : 0xd800u);
  }
  if (is_upper(BITS, i)) {
    return constant_pair(HALF_STEP ? 0xd780u : 0xd800u);
  }
  return constant_pair(HALF_STEP ? 0xc780u : 0xc800u);
}

// Row `k` of the queries' operand number `i` of a slot holds this channel (it may be past D).
template <int BITS>
INLINE uint query_channel(counter slot, int i, uint k) {
  const uint word = uint(slot) * 4 + k / 2;
  return word * uint(32 / BITS) + uint(i) + k % 2 * uint(per_word(BITS));
}

INLINE half scale_at(const threadgroup uint* scales, counter index) {
  return reinterpret_cast<const threadgroup half*>(scales)[index];
}

// Dequantized fp16 operands of keys would overflow where a scale is above 2^8, and lose bits where
// all are below 2^-10; such a tile's operands are made 2^-7 or 2^10 times as large, and the other
// factor takes it back. COUNT scales from number FIRST on, of KEYS keys, are looked at.
struct tile_lift {
  half2 operand;
  float back;
};

INLINE tile_lift no_lift() {
  tile_lift out;
  out.operand = constant_pair(0x3c00u);  // 1
  out.back = 1.0f;
  return out;
}

// The largest of COUNT scales from number FIRST on that a lane looks at, in its bits: positive
// halves are in the order of these.
template <int KEYS, int W, int CODES, int FIRST, int COUNT>
INLINE uint largest_scale(const threadgroup uint* tile, uint lane) {
  constexpr int LANES = KEYS < 32 ? 32 / KEYS : 1;  // of one key
  uint largest = 0;
  UNROLL for (int first = 0; first < KEYS; first += 32 / LANES) {
    const threadgroup uint* row = tile + (first + int(lane) / LANES) * W;
    UNROLL for (int i = 0; i < (COUNT + LANES - 1) / LANES; i++) {
      const int index = min(i * LANES + int(lane) % LANES, COUNT - 1);
      largest = max(largest, uint(as_type<ushort>(scale_at(row + CODES, FIRST + index))));
    }
  }
  return largest;
}

// The level that a tile's values need.
template <int KEYS, int W, int CODES, int FIRST, int COUNT>
INLINE int scales_level(const threadgroup uint* tile, uint lane) {
  const uint largest = largest_scale<KEYS, W, CODES, FIRST, COUNT>(tile, lane);
  return simd_any(largest > 0x5800u) ? 2 : simd_any(largest > 0x3c00u) ? 1 : 0;
}
template <int KEYS, int W, int CODES, int FIRST, int COUNT>
INLINE tile_lift lift_of(const threadgroup uint* tile, uint lane) {
  const uint largest = largest_scale<KEYS, W, CODES, FIRST, COUNT>(tile, lane);
  tile_lift out = no_lift();
  if (simd_any(largest > 0x5c00u)) {
    out.operand = constant_pair(0x2000u);  // 2^-7
    out.back = 128.0f;
  } else if (!simd_any(largest > 0x1400u)) {
    out.operand = constant_pair(0x6400u);  // 2^10
    out.back = 0.0009765625f;
  }
  return out;
}

// Two neighbouring channels of a query, to the component of these channels' words. Channels that
// meet raw upper codes, the odd ones, are divided by 16 if WHOLE.
template <int BITS, bool WHOLE>
INLINE void store_query(threadgroup half2* out, int component, float2 z, float factor) {
  threadgroup half* halves = reinterpret_cast<threadgroup half*>(out) + component;
  halves[0] = half(z.x * factor);
  const half odd = half(z.y * factor);
  halves[2] = WHOLE && BITS == 4 ? half(float(odd) * 0.0625f) : odd;
}

// The queries' operand number `i` of a slot, from those of a lane's pair of query rows.
template <int BITS>
INLINE half2 read_query(const threadgroup half2* queries, counter slot, int i, tile_lane at) {
  return right_operand(queries[query_channel<BITS>(slot, i, at.row)]);
}

// Minus the sum, over a group, of queries times what raw codes are too large by.
template <int BITS, int GROUP, bool HALF_STEP>
INLINE float2 score_offset(const threadgroup half2* queries, int group, tile_lane at) {
  // The eight rows of a column pair share the channels; those of a row are all upper codes or
  // none, since a row's channels are eight apart.
  const bool upper = BITS == 4 && (at.row & 1u) != 0;
  const float middle = float(1 << (BITS - 1)) - (HALF_STEP ? 0.5f : 0.0f);
  const float excess = 1024.0f + (upper ? 16.0f : 1.0f) * middle;
  float2 c = float2(0.0f, 0.0f);
  UNROLL for (int i = 0; i < GROUP; i += 8) {
    const half2 x = queries[group * GROUP + i + int(at.row)];
    c = float2(fma(float(x.x), excess, c.x), fma(float(x.y), excess, c.y));
  }
  return float2(-rows_sum(c.x), -rows_sum(c.y));
}
// The same by matrix products, from operands in registers.
template <int BITS, int GROUP, bool HALF_STEP>
INLINE float2 score_offset(const thread half2* operands, int group) {
  constexpr int P = per_word(BITS);
  constexpr int TILES = GROUP / (128 / BITS) * P;
  float2 c = float2(0.0f, 0.0f), unused = float2(0.0f, 0.0f);
  UNROLL for (int i = 0; i < TILES; i += 2) {
    const half2 b0 = operands[group * TILES + i];
    const half2 b1 = operands[group * TILES + i + 1];
    const half2 a0 = minus_middle<BITS, HALF_STEP>(i % P);
    const half2 a1 = minus_middle<BITS, HALF_STEP>((i + 1) % P);
    const half2 magic = minus_magic();
    multiply(c, unused, magic, magic, magic, magic, b0, b1);
    multiply(c, unused, a0, a0, a1, a1, b0, b1);
  }
  return c;
}

template <int BITS>
INLINE half2 query_operand(
    const thread half2* held, const threadgroup half2* queries, counter slot, int i, tile_lane at) {
  if (HOLD_QUERIES != 0) {
    return held[slot * per_word(BITS) + i];
  }
  return read_query<BITS>(queries, slot, i, at);
}

// Adds to the scores of two keys what one group of channels has.
template <int BITS, int GROUP, int CODES>
INLINE void add_group(
    thread float2& s0,
    thread float2& s1,
    const threadgroup uint* upper,
    const threadgroup uint* lower,
    const thread half2* held_queries,
    const threadgroup half2* queries,
    float2 offset,
    counter group,
    tile_lane at) {
  constexpr int P = per_word(BITS);
  constexpr int PER_GROUP = GROUP * BITS / 128 > 0 ? GROUP * BITS / 128 : 1;
  float2 c0, c1;
  UNROLL for (int j = 0; j < PER_GROUP; j++) {
    const counter slot = group * PER_GROUP + j;
    const uint a = upper[4 * slot + at.pair];
    const uint b = lower[4 * slot + at.pair];
    UNROLL for (int i = 0; i < P; i += 2) {
      const bool begins = j == 0 && i == 0;
      multiply_onto(
          c0,
          c1,
          begins ? offset : c0,
          begins ? offset : c1,
          raw_codes<BITS>(a, i),
          raw_codes<BITS>(b, i),
          raw_codes<BITS>(a, i + 1),
          raw_codes<BITS>(b, i + 1),
          query_operand<BITS>(held_queries, queries, slot, i, at),
          query_operand<BITS>(held_queries, queries, slot, i + 1, at));
    }
  }
  const float scale0 = float(scale_at(upper + CODES, group));
  const float scale1 = float(scale_at(lower + CODES, group));
  s0 = float2(s0.x + scale0 * c0.x, s0.y + scale0 * c0.y);
  s1 = float2(s1.x + scale1 * c1.x, s1.y + scale1 * c1.y);
}

// Scores of the tile's keys of a block (s0) and of the next one (s1), those of a lane's row, for
// queries 2 * pair and 2 * pair + 1. W words a row; scales begin at word CODES. Operands and offsets
// are in registers if HOLD_QUERIES (an enumerator of mlx_kvq/ops/gpu/jit.py), else in threadgroup
// memory.
template <int D, int BITS, int GROUP, bool HALF_STEP, int W, int CODES, int STEP>
INLINE void scores(
    thread float2& s0,
    thread float2& s1,
    const threadgroup uint* tile,
    int block,
    const thread half2* held_queries,
    const thread float2* held_offsets,
    const threadgroup half2* queries,
    const threadgroup float2* offsets,
    half2 lift,
    counter zero,
    tile_lane at) {
  constexpr int P = per_word(BITS);
  constexpr int WORDS = D * BITS / 32;
  constexpr int SLOTS = key_slots(D, BITS);
  const threadgroup uint* upper = tile + tile_key<STEP>(block, at.row) * W;
  const threadgroup uint* lower = tile + tile_key<STEP>(block + 1, at.row) * W;
  s0 = float2(0.0f, 0.0f);
  s1 = float2(0.0f, 0.0f);
  if (whole_slots(BITS, GROUP) && HOLD_QUERIES != 0) {
    UNROLL for (int group = 0; group < D / GROUP; group++) {
      add_group<BITS, GROUP, CODES>(
          s0, s1, upper, lower, held_queries, queries, held_offsets[group], group, at);
    }
  } else if (whole_slots(BITS, GROUP)) {
    ROLLED for (counter group = 0; group < D / GROUP + zero; group++) {
      add_group<BITS, GROUP, CODES>(
          s0, s1, upper, lower, held_queries, queries, offsets[group], group, at);
    }
  } else {
    UNROLL for (int slot = 0; slot < SLOTS; slot++) {
      // Past the last word, any finite operand will do: its query is zero.
      const int word = min(4 * slot + int(at.pair), WORDS - 1);
      const int group = word * (32 / BITS) / GROUP;
      const uint a = upper[word];
      const uint b = lower[word];
      const half scale0 = scale_at(upper + CODES, group);
      const half scale1 = scale_at(lower + CODES, group);
      const half2 step0 = half2(scale0, scale0) * lift;
      const half2 step1 = half2(scale1, scale1) * lift;
      const half2 middle = constant_pair(HALF_STEP ? 0x3800u : 0u);  // 0.5
      UNROLL for (int i = 0; i < P; i += 2) {
        multiply(
            s0,
            s1,
            fma(centred_codes<BITS>(a, i), step0, middle * step0),
            fma(centred_codes<BITS>(b, i), step1, middle * step1),
            fma(centred_codes<BITS>(a, i + 1), step0, middle * step0),
            fma(centred_codes<BITS>(b, i + 1), step1, middle * step1),
            query_operand<BITS>(held_queries, queries, slot, i, at),
            query_operand<BITS>(held_queries, queries, slot, i + 1, at));
      }
    }
  }
}

// Channel of a lane's accumulator `tile` of a slice (it may be past D).
template <int D, int BITS, int GROUP, int SLICES>
INLINE int value_channel(int tile, uint row, counter slice) {
  constexpr int RUN = value_run(D, BITS, GROUP);
  constexpr int RUNS = value_tiles(D, BITS) / SLICES / RUN;
  return (8 * (int(slice) * RUNS + tile / RUN) + int(row)) * RUN + tile % RUN;
}

// Numbers `index` of the scales that begin at two words: of the two keys that a lane's components of
// a right operand belong to, or of two keys of its left one.
INLINE half2 scale_pair(const threadgroup uint* a, const threadgroup uint* b, counter index) {
  const uint x = a[index / 2], y = b[index / 2];
  return as_type<half2>(index % 2 == 0 ? lower_halves(x, y) : upper_halves(x, y));
}

// sums += values x probabilities of 16 keys; p0 and p1 are right operands of a block's keys and of
// the next one's. Value codes begin at word FIRST; the values' scales are number SCALE on, from word
// CODES.
template <
    int D, int BITS, int GROUP, bool HALF_STEP, int W, int FIRST, int CODES, int SCALE, int SLICES,
    int STEP>
INLINE void add_values(
    thread float2* sums,
    const threadgroup uint* tile,
    int block,
    half2 p0,
    half2 p1,
    int level,
    counter slice,
    tile_lane at) {
  constexpr int P = per_word(BITS);
  constexpr int ALL = D * BITS / 16;
  constexpr int UNITS = value_units(D, BITS) / SLICES;
  constexpr bool WORDS = by_words(D, BITS, GROUP);
  constexpr bool SCALED = one_group(D, BITS, GROUP);  // probabilities are
  constexpr int CHANNELS = 8 * value_run(D, BITS, GROUP);  // of a product's rows
  constexpr int TOGETHER = WORDS ? 2 : 1;  // units
  const threadgroup uint* keys[4];
  UNROLL for (int k = 0; k < 4; k++) {
    keys[k] = tile + tile_key<STEP>(block + k / 2, 2 * at.pair + uint(k % 2)) * W;
  }
  const threadgroup uint* operand_scales[4];
  UNROLL for (int k = 0; k < 4; k++) {
    operand_scales[k] =
        tile + tile_key<STEP>(block + k / 2, operand_row(at, k % 2)) * W + CODES;
  }
  const half2 middle = constant_pair(HALF_STEP ? 0x3800u : 0u);  // 0.5
  const half lifted = half(levels_lift<SCALED>(level));
  const half2 lift = half2(lifted, lifted);
  half2 scaled[2] = {p0, p1};
  half2 step[2], shift[2];
  UNROLL for (int unit = 0; unit < UNITS; unit += TOGETHER) {
    const counter part = slice * (UNITS / TOGETHER) + unit / TOGETHER;
    if (SCALED) {
      const counter group = GROUP == D ? counter(0) : part * CHANNELS / GROUP;
      if (unit == 0 || (GROUP != D && unit / TOGETHER * CHANNELS % GROUP == 0)) {
        scaled[0] = p0 * scale_pair(operand_scales[0], operand_scales[1], SCALE + group);
        scaled[1] = p1 * scale_pair(operand_scales[2], operand_scales[3], SCALE + group);
      }
    } else {
      const counter u = min(counter(8 * part + at.row), counter(ALL - 1));
      UNROLL for (int k = 0; k < 2; k++) {
        step[k] = scale_pair(
                      keys[2 * k] + CODES, keys[2 * k + 1] + CODES, SCALE + u * P / GROUP) *
            lift;
        shift[k] = middle * step[k];
      }
    }
    uint pairs[TOGETHER][2];
    if (WORDS) {
      UNROLL for (int k = 0; k < 2; k++) {
        const uint a = keys[2 * k][FIRST + 8 * part + at.row];
        const uint b = keys[2 * k + 1][FIRST + 8 * part + at.row];
        pairs[0][k] = lower_halves(a, b);
        pairs[TOGETHER - 1][k] = upper_halves(a, b);
      }
    } else {
      const counter u = min(counter(8 * part + at.row), counter(ALL - 1));
      UNROLL for (int k = 0; k < 2; k++) {
        const uint a = reinterpret_cast<const threadgroup ushort*>(keys[2 * k] + FIRST)[u];
        const uint b = reinterpret_cast<const threadgroup ushort*>(keys[2 * k + 1] + FIRST)[u];
        pairs[0][k] = a | (b << 16);
      }
    }
    UNROLL for (int h = 0; h < TOGETHER; h++) {
      UNROLL for (int i = 0; i < P; i += 2) {
        half2 a[4];
        UNROLL for (int k = 0; k < 4; k++) {
          a[k] = SCALED ? doubled_levels<BITS, HALF_STEP>(pairs[h][k / 2], i + k % 2)
                        : fma(centred_codes<BITS>(pairs[h][k / 2], i + k % 2), step[k / 2],
                              shift[k / 2]);
        }
        const int to = (unit + h) * P + i;
        multiply(sums[to], sums[to + 1], a[0], a[1], a[2], a[3], scaled[0], scaled[1]);
      }
    }
  }
}

// Exact tokens, EXACT_KEYS at a time: products of fp32, since vectors may be of any magnitude (on
// NVIDIA GPUs of tf32, which holds bf16 and queries exactly). A lane has eight neighbouring channels
// of 32 of keys `row` and `row + 8`, two in each product; FEW: no more than that in flight. `offset`
// is that of the token whose number is the lane's (`exact_vectors`) ...
template <int D, int BITS, bool WHOLE, bool FEW, typename V>
INLINE void exact_scores(
    thread float2* s, const thread V& vectors, int offset, const threadgroup half2* queries,
    int pairs, tile_lane at) {
  constexpr float ODD = WHOLE && BITS == 4 ? 16.0f : 1.0f;  // which `store_query` took off
  constexpr int KEYS = EXACT_KEYS / 8;
  constexpr int BLOCKS = (D + 31) / 32;
  constexpr int AT_ONCE = !FEW && BLOCKS % 2 == 0 ? 2 : 1;
  typename V::pointer keys[KEYS];
  UNROLL for (int k = 0; k < KEYS; k++) {
    keys[k] = vectors.at_offset(simd_shuffle(offset, ushort(8 * k + int(at.row))));
  }
  float2 odd[KEYS];
  UNROLL for (int k = 0; k < KEYS; k++) s[k] = odd[k] = float2(0.0f, 0.0f);
  ROLLED for (int block = 0; block < BLOCKS; block += AT_ONCE) {
    UNROLL for (int i = 0; i < AT_ONCE; i++) {
      const int of_block = 32 * (block + i);
      float y[KEYS][8];
      UNROLL for (int k = 0; k < KEYS; k++) {
        read_exact<D, 8>(y[k], keys[k], of_block + 8 * int(at.pair));
      }
      UNROLL for (int j = 0; j < 8; j++) {
        if (j % 4 < 2) {
          float2 a[KEYS];
          UNROLL for (int k = 0; k < KEYS; k++) a[k] = float2(y[k][j], y[k][j + 2]);
          const float2 b = exact_query<D>(queries, pairs, of_block + j, at);
          multiply_exact<KEYS, V::IS_FLOAT>(j % 2 == 0 ? s : odd, a, b);
        }
      }
    }
  }
  UNROLL for (int k = 0; k < KEYS; k++) {
    s[k] = float2(fma(ODD, odd[k].x, s[k].x), fma(ODD, odd[k].y, s[k].y));
  }
}
// ... and then its channels of keys `exact_key` of eight, times probabilities, a right operand. Values
// begin at channel BEGIN of a token's vector.
template <int BEGIN, int D, int BITS, int GROUP, int SLICES, int TILES, typename V>
INLINE void add_exact_values(
    thread float2* sums, const thread V& vectors, int offset, int first_key, float2 p, tile_lane at,
    counter slice) {
  constexpr int RUN = value_run(D, BITS, GROUP);
  typename V::pointer tokens[2];
  UNROLL for (int k = 0; k < 2; k++) {
    tokens[k] = vectors.at_offset(simd_shuffle(offset, ushort(first_key + int(exact_key(at, k)))));
  }
  UNROLL for (int i = 0; i < TILES; i += RUN) {
    const int first = value_channel<D, BITS, GROUP, SLICES>(i, at.row, slice);
    float y[2][RUN];
    UNROLL for (int k = 0; k < 2; k++) read_exact<D, RUN>(y[k], tokens[k] + BEGIN, first);
    UNROLL for (int j = 0; j < RUN; j += 2) {
      float2 a[2];
      UNROLL for (int k = 0; k < 2; k++) a[k] = float2(y[0][j + k], y[1][j + k]);
      multiply_exact<2, V::IS_FLOAT>(sums + i + j, a, p);
    }
  }
}

}  // namespace kvq
