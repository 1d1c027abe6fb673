// The two products of attend_vector.metal, scalar by scalar: a query row or two at the price of what
// they need, where matrix units take that of eight.
//
// Keys: K_LANES lanes share a token, each has `score_words` words of its codes. Their parts are added
// up for as many sets of tokens as there are lanes, so that a lane ends with the whole score of one
// token. Values: V_LANES lanes share a token, each has `value_words` words and keeps its channels'
// sums for every query row.
//
// A code costs a mask and no conversion: OR-ing n into the bits of fp16 1024 (or of 64, four bits
// further up) makes 1024 + n (or 64 + n), which an FMA takes as it is. What that adds is one number
// for a lane and a query row, taken off before the first key and after the last value. Values of 4
// bits take 64 alone: their sums go on over many tokens, and 1024 would cost them four more bits.
namespace kvq {

constexpr int codes_of_word(int BITS) {
  return 32 / BITS;
}
constexpr int lanes_for(int parts) {  // a power of two
  int n = 1;
  while (n < parts) n *= 2;
  return n;
}
// Words of a lane, one or two: they share a scale, and all lanes of a token have as many. One if
// `one`, unless a token has more words than lanes.
constexpr int score_words(int D, int BITS, int GROUP, bool one) {
  return D * BITS / 32 % 2 == 0 && GROUP % (2 * codes_of_word(BITS)) == 0 &&
      (!one || D * BITS > 1024) ? 2 : 1;
}
// With 32 sums of a lane at most, unless a token has more words than lanes.
constexpr int value_words(int D, int BITS, int GROUP, int rows) {
  int n = 1;
  while (D * BITS / 32 % (2 * n) == 0 && GROUP % (2 * n * codes_of_word(BITS)) == 0 &&
         (D * BITS / 32 / n > 32 ||
          (2 * n * codes_of_word(BITS) * rows <= 32 && D * BITS / 32 / n > 4))) {
    n *= 2;
  }
  return n;
}

// Of the tokens that are read at once: which one (`set`), and which part of it, a lane has. Lanes
// past the last part have that one. `turn`: in which turn a lane's own token is scored.
struct lane_part {
  counter set;
  counter part;
  counter turn;
};
template <int LANES, int PARTS>
INLINE lane_part part_of(uint lane) {
  lane_part out;
  out.turn = counter(lane % uint(LANES));
  out.part = min(out.turn, counter(PARTS - 1));
  out.set = counter(lane / uint(LANES));
  return out;
}

// Codes i and i + codes_of_word / 2 of a word, each with its magic number.
template <int BITS, bool VALUES>
INLINE half2 magic_codes(uint word, int i) {
  if (BITS == 8) {
    return as_type<half2>(masked_or(i == 0 ? word : word >> 8, 0x00ff00ffu, 0x64006400u));
  }
  if (VALUES || i % 2 == 1) {
    const uint at_four = i == 0 ? word << 4 : word >> uint(4 * (i - 1));
    return as_type<half2>(masked_or(at_four, 0x00f000f0u, 0x54005400u));
  }
  return as_type<half2>(masked_or(i == 0 ? word : word >> 8, 0x000f000fu, 0x64006400u));
}
// By how much code number i of a word is then above its level.
template <int BITS, bool HALF_STEP, bool VALUES>
INLINE float magic_excess(int i) {
  const float middle = float(1 << (BITS - 1)) - (HALF_STEP ? 0.5f : 0.0f);
  return middle + (BITS == 4 && (VALUES || i % 2 == 1) ? 64.0f : 1024.0f);
}

// Part number `part`, of N words, of a row's codes as they are read. A row begins at unit `row` of
// `rows`, units of UNIT words.
template <int N, int BITS, int FIRST, int HIGH, int UNIT>
INLINE void read_codes(thread uint* words, const device uint* rows, counter row, counter part) {
  if (!is_narrow(BITS) && UNIT == 2 && N % 2 == 0 && FIRST % 2 == 0) {
    UNROLL for (int i = 0; i < N / 2; i++) {
      const uint2 x = reinterpret_cast<const device uint2*>(
          rows)[row + (counter(FIRST / 2 + i) + part * counter(N / 2))];
      words[2 * i] = x.x;
      words[(2 * i + 1) % N] = x.y;
    }
  } else {
    UNROLL for (int i = 0; i < N; i++) {
      words[i] = code_word_at<BITS, FIRST, HIGH>(rows, row * UNIT, part * N + counter(i));
    }
  }
}

// Half number `index` behind a row's codes.
template <int CODES, int UNIT>
INLINE float half_at(const device uint* rows, counter row, counter index) {
  return float(
      reinterpret_cast<const device half*>(rows)[row * (2 * UNIT) + (counter(2 * CODES) + index)]);
}

// Row r's channel c of the rotated queries, a half of a pair of rows.
INLINE half query_at(const threadgroup half2* queries, int pairs, int r, counter c) {
  return reinterpret_cast<const threadgroup half*>(queries + r / 2 * pairs + c)[r % 2];
}

// A lane's channels of the queries' rows, [ROWS][CHANNELS], zeros past D.
template <int ROWS, int CHANNELS, int D>
INLINE void read_queries(
    thread half* query, const threadgroup half2* queries, int pairs, counter part) {
  const bool there = part * CHANNELS < counter(D);
  const counter first = there ? part * CHANNELS : 0;
  UNROLL for (int i = 0; i < CHANNELS; i++) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      const half x = query_at(queries, pairs, r, first + i);
      query[r * CHANNELS + i] = there ? x : half(0.0f);
    }
  }
}

// Minus what the magic numbers add to a lane's part of a score, for each row.
template <int ROWS, int CHANNELS, int D, int BITS, bool HALF_STEP>
INLINE void magic_offsets(
    threadgroup float* offset, const threadgroup half2* queries, int pairs, counter part) {
  const bool there = part * CHANNELS < counter(D);
  const counter first = there ? part * CHANNELS : 0;
  UNROLL for (int r = 0; r < ROWS; r++) {
    float sum = 0.0f;
    UNROLL for (int i = 0; i < CHANNELS; i++) {
      const float excess = magic_excess<BITS, HALF_STEP, false>(i % (codes_of_word(BITS) / 2));
      sum = fma(float(query_at(queries, pairs, r, first + i)), excess, sum);
    }
    offset[r] = there ? -sum : 0.0f;
  }
}

// A lane's part of a token's scores, from its words.
template <int ROWS, int WORDS, int BITS>
INLINE void score_codes(
    thread float* x,
    const thread uint* words,
    float scale,
    const thread half* query,
    const threadgroup float* offset) {
  constexpr int CODES = codes_of_word(BITS);
  UNROLL for (int r = 0; r < ROWS; r++) x[r] = offset[r];
  UNROLL for (int w = 0; w < WORDS; w++) {
    UNROLL for (int i = 0; i < CODES / 2; i++) {
      const half2 c = magic_codes<BITS, false>(words[w], i);
      UNROLL for (int r = 0; r < ROWS; r++) {
        const thread half* q = query + (r * WORDS + w) * CODES + i;
        x[r] = fma(float(c.x), float(q[0]), x[r]);
        x[r] = fma(float(c.y), float(q[CODES / 2]), x[r]);
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) x[r] *= scale;
}

// Adds the same of an exact token's key, from its channels.
template <int ROWS, int CHANNELS, int D, typename T>
INLINE void score_exact_part(
    thread float* x, const device T* key, const threadgroup half2* queries, int pairs,
    counter part) {
  constexpr int PART = CHANNELS % 8 == 0 ? 8 : CHANNELS;  // in registers at once
  if (part * CHANNELS < counter(D)) {
    ROLLED for (counter first = part * CHANNELS; first < (part + 1) * CHANNELS; first += PART) {
      float y[PART];
      read_exact<D, PART>(y, key, int(first));
      UNROLL for (int i = 0; i < PART; i++) {
        UNROLL for (int r = 0; r < ROWS; r++) {
          x[r] = fma(float(query_at(queries, pairs, r, first + i)), y[i], x[r]);
        }
      }
    }
  }
}

// Adds up what neighbouring lanes have of two tokens: the even lane has the first one's sum then,
// the odd lane the second one's.
template <int ROWS>
INLINE void fold(
    thread float* x, const thread float* first, const thread float* second, uint lane) {
  const bool odd = (lane & 1u) != 0;
  UNROLL for (int r = 0; r < ROWS; r++) {
    const float other = odd ? first[r] : second[r];
    x[r] = (odd ? second[r] : first[r]) + simd_shuffle_xor(other, ushort(1));
  }
}

// Adds up what LANES lanes have, DONE of them already, for those whose turn it is.
template <int ROWS, int DONE, int LANES>
INLINE void take_turn(thread float* s, const thread float* part, bool own_turn) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    float x = part[r];
    UNROLL for (int bit = DONE; bit < LANES; bit *= 2) x += simd_shuffle_xor(x, ushort(bit));
    s[r] = own_turn ? x : s[r];
  }
}

// sums += a token's values times probabilities, of a lane's words; `shares` adds up what the magic
// numbers were multiplied by.
template <int ROWS, int WORDS, int BITS>
INLINE void add_codes(
    thread float* sums,
    thread float* shares,
    const thread uint* words,
    float scale,
    const threadgroup float* p) {
  constexpr int CODES = codes_of_word(BITS);
  float share[ROWS];
  UNROLL for (int r = 0; r < ROWS; r++) {
    share[r] = p[r] * scale;
    shares[r] += share[r];
  }
  UNROLL for (int w = 0; w < WORDS; w++) {
    UNROLL for (int i = 0; i < CODES / 2; i++) {
      const half2 c = magic_codes<BITS, true>(words[w], i);
      UNROLL for (int r = 0; r < ROWS; r++) {
        thread float* sum = sums + (r * WORDS + w) * CODES + i;
        sum[0] = fma(float(c.x), share[r], sum[0]);
        sum[CODES / 2] = fma(float(c.y), share[r], sum[CODES / 2]);
      }
    }
  }
}

template <int ROWS, int CHANNELS>
INLINE void add_exact_value(thread float* sums, const thread float* y, const threadgroup float* p) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int i = 0; i < CHANNELS; i++) {
      sums[r * CHANNELS + i] = fma(p[r], y[i], sums[r * CHANNELS + i]);
    }
  }
}

// Makes the largest of all lanes' scores the maximum that sums and totals refer to, and gives the
// lane's probabilities.
template <int ROWS, int CHANNELS>
INLINE void probabilities_of(
    threadgroup float* p,
    const thread float* s,
    threadgroup float* m,
    thread float* l,
    thread float* shares,
    thread float* sums,
    uint lane) {
  bool above = false;
  UNROLL for (int r = 0; r < ROWS; r++) above = above || s[r] > m[r];
  if (simd_any(above)) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      const float top = max(m[r], simd_max(s[r]));
      const float f = fast::exp2(m[r] - top);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (lane == 0) m[r] = top;
      l[r] *= f;
      shares[r] *= f;
      UNROLL for (int i = 0; i < CHANNELS; i++) sums[r * CHANNELS + i] *= f;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int r = 0; r < ROWS; r++) {
    const float x = fast::exp2(s[r] - m[r]);
    p[r] = x;
    l[r] += x;
  }
}

}  // namespace kvq
