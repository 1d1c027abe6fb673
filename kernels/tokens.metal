// Which tokens a query of attend reads, and from where: ranges of keys, exact tokens by age, and the
// integers of a launch that its loops need.
namespace kvq {

// Newest tokens that a query reads exactly as the last of `tokens` (Format.recent_at).
INLINE int recent_of(int least, int grows, int tokens) {
  return tokens < grows ? least : tokens / 2 < grows ? 2 * least : 4 * least;
}

// a / b, which takes no time for one token and one block of query rows.
INLINE int quotient(int a, int b) {
  return b == 1 ? a : a / b;
}

// Integers of attend's launch that its loops need, in threadgroup memory: registers are few.
enum : int {
  AT_LENGTH, AT_LOW_EDGE, AT_HIGH_EDGE, AT_HOLE, AT_HOLE_END, AT_ROWS_START, AT_END, AT_NEWEST,
  AT_FIRST_BEGIN, AT_EXACT_END, AT_PLACE, AT_KEEP, AT_IDX, AT_BATCH, AT_KV_HEAD, AT_HEADS,
  AT_QUERIES, AT_FIRST_ROW, AT_SPLIT, AT_SPLITS, AT_TILE, AT_TILE_END, AT_EXACT_TILES,
  AT_FIRST_TILE, AT_KV_HEADS, NUMBERS
};
// Of a lane's two query rows.
INLINE float2 pair_of(const threadgroup float* x, tile_lane at) {
  return float2(x[2 * at.pair], x[2 * at.pair + 1]);
}

// Which keys the query at a position may attend to: [low, high). Its tail begins with `oldest`, a
// key, or in a ring the place of a token.
struct query_range {
  int low;
  int high;
  int oldest;
};
template <bool TAIL>
INLINE query_range range_of(
    int position, int start, int length, int window, bool causal, bool is_ring, int recent,
    int keep, int least, int grows) {
  query_range out;
  out.low = max(start, window > 0 ? position - window + 1 : 0);
  out.high = causal ? position + 1 : length;
  out.oldest = !TAIL  ? length
      : is_ring       ? length - recent
                      : max(keep, position + 1 - recent_of(least, grows, position + 1 - start));
  return out;
}
INLINE query_range range_at(const threadgroup int* ranges, int query) {
  query_range out;
  out.low = ranges[3 * query];
  out.high = ranges[3 * query + 1];
  out.oldest = ranges[3 * query + 2];
  return out;
}

// Exact tokens by age: of the tail, how many tokens are newer; then the first tokens, as many as are
// there. Ages beyond these, and between both, have no token.
struct exact_token {
  int key;    // -1: none
  int order;  // what its query's `oldest` is compared with: a first token's is negative
  // Whether a query reads it from here, and may attend to it.
  template <bool TAIL>
  INLINE bool is_read(query_range range) const thread {
    const bool in_tail = order >= range.oldest, before_it = !TAIL || ~order < range.oldest;
    return key >= range.low && key < range.high && (order < 0 ? before_it : in_tail);
  }
};
template <bool TAIL, bool FIRST>
struct exact_tokens {
  int newest;  // of the tail
  int begin;   // ages of the first tokens
  int end;
  int first_place;  // of the one of age `newest`, in the order of the tokens
  int length;
  int keep;
  int idx;
  INLINE bool is_first(int age) const thread {
    return FIRST && (!TAIL || age >= newest);
  }
  INLINE bool is_there(int age) const thread {
    return age < end && (!is_first(age) || age >= begin);
  }
  INLINE exact_token at(int age) const thread {
    const bool first = is_first(age), is_ring = idx < length;
    const int place = first_place + age - newest;
    const int of_first = place + (is_ring && place >= keep ? idx - keep : 0);
    const int of_tail = idx - 1 - age;
    const int key = first ? of_first - (of_first >= length ? length - keep : 0)
                          : of_tail + (of_tail < keep ? length - keep : 0);
    exact_token out;
    out.key = is_there(age) ? key : -1;
    out.order = first ? ~place : is_ring ? 0x7fffffff : key;
    return out;
  }
};
// `firsts` of them from place `place` on, of which some may be in padding, or still to come.
template <bool TAIL, bool FIRST>
INLINE exact_tokens<TAIL, FIRST> exact_tokens_of(
    int newest, int firsts, int place, int length, int keep, int idx) {
  exact_tokens<TAIL, FIRST> out;
  out.newest = newest;
  out.begin = newest + (FIRST ? max(0, -place) : 0);
  const int end = newest + (FIRST ? min(firsts, length - place) : 0);
  out.end = end > out.begin ? end : newest;
  out.first_place = place;
  out.length = length;
  out.keep = keep;
  out.idx = idx;
  return out;
}
// The same in a loop, from the launch's integers.
template <bool TAIL, bool FIRST>
INLINE exact_tokens<TAIL, FIRST> exact_tokens_at(const threadgroup int* numbers) {
  exact_tokens<TAIL, FIRST> out;
  out.newest = numbers[AT_NEWEST];
  out.begin = numbers[AT_FIRST_BEGIN];
  out.end = numbers[AT_EXACT_END];
  out.first_place = numbers[AT_PLACE];
  out.length = numbers[AT_LENGTH];
  out.keep = numbers[AT_KEEP];
  out.idx = numbers[AT_IDX];
  return out;
}

// A lane's COUNT neighbouring channels of a vector of D, from number `first` on; zeros past D.
template <int D, int COUNT, typename T>
INLINE void read_exact(thread float* x, const device T* in, int first) {
  if (COUNT % 8 == 0 && D % 8 == 0) {
    UNROLL for (int i = 0; i < COUNT; i += 8) {
      if (D % 64 == 0 || first + i < D) {
        read_eight(x + i, in + first + i);
      } else {
        UNROLL for (int j = 0; j < 8; j++) x[i + j] = 0.0f;
      }
    }
  } else {
    UNROLL for (int i = 0; i < COUNT; i++) x[i] = first + i < D ? float(in[first + i]) : 0.0f;
  }
}

// Where their vectors are, a key and then a value each: `newest_at` is the place of the newest
// token's, `firsts_at` of the first one's, and strides are those of the arrays.
template <bool TAIL, bool FIRST, typename T>
struct exact_vectors {
  typedef const device T* pointer;
  enum : bool { IS_FLOAT = sizeof(T) == 4 };
  exact_tokens<TAIL, FIRST> tokens;
  const device T* newest_at;
  const device T* firsts_at;
  int tail_stride;
  int first_stride;
  // Where one is, in one integer that lanes can hand on. For an age without a token, that of another
  // one: there is one, and nothing else is sure to be finite.
  INLINE int offset_of(int age) const thread {
    const int other = TAIL && tokens.newest > 0 ? 0 : tokens.begin;
    const int own = tokens.is_there(age) ? age : other;
    const int of_first = 2 * (own - tokens.newest) * first_stride + 1;
    return tokens.is_first(own) ? of_first : -2 * own * tail_stride;
  }
  INLINE pointer at_offset(int offset) const thread {
    return (!TAIL || (FIRST && (offset & 1) != 0) ? firsts_at : newest_at) + (offset >> 1);
  }
  INLINE pointer at(int age) const thread {
    return at_offset(offset_of(age));
  }
};
template <bool TAIL, bool FIRST, typename T>
INLINE exact_vectors<TAIL, FIRST, T> exact_vectors_of(
    exact_tokens<TAIL, FIRST> tokens, const device T* newest_at, const device T* firsts_at,
    int tail_stride, int first_stride) {
  exact_vectors<TAIL, FIRST, T> out;
  out.tokens = tokens;
  out.newest_at = newest_at;
  out.firsts_at = firsts_at;
  out.tail_stride = tail_stride;
  out.first_stride = first_stride;
  return out;
}
// Asks a SIMD group for those of KEYS tokens, from one of `age` on: a lane for a part of one.
template <int CHANNELS, int KEYS, typename V>
INLINE void ask_for_exact(const thread V& vectors, int age, uint lane) {
  constexpr int LANES = 32 / KEYS;  // of one token
  constexpr int EACH = 32 / (V::IS_FLOAT ? 4 : 2);  // channels
  const auto of = vectors.at(age + int(lane) / LANES);
  for (int c = int(lane) % LANES * EACH; c < CHANNELS; c += LANES * EACH) ask_for(of + c);
}

// The same threadgroup memory holds tiles, then the sums that SIMD groups add up.
INLINE threadgroup uint* words_of(threadgroup uint4* memory) {
  return reinterpret_cast<threadgroup uint*>(memory);
}
INLINE threadgroup float* floats_of(threadgroup uint4* memory) {
  return reinterpret_cast<threadgroup float*>(memory);
}

}  // namespace kvq
