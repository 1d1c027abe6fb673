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
  AT_FIRSTS, AT_PLACE, AT_KEEP, AT_IDX, AT_BATCH, AT_KV_HEAD, AT_HEADS, AT_QUERIES, AT_FIRST_ROW,
  AT_SPLIT, AT_SPLITS, AT_TILE, AT_TILE_END, AT_EXACT_TILES, AT_FIRST_TILE, AT_KV_HEADS, NUMBERS
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

// Exact tokens by age: of the tail, how many tokens are newer; then the first tokens.
struct exact_token {
  bool there;
  bool is_first;
  int place;  // of a first token, in the order of the tokens
  int key;
};
template <bool TAIL, bool FIRST>
struct exact_tokens {
  int newest;  // of the tail
  int count;
  int first_place;
  int length;
  int keep;
  int idx;
  INLINE bool is_ring() const thread {
    return idx < length;
  }
  INLINE exact_token at(int age) const thread {
    exact_token out;
    out.is_first = FIRST && (!TAIL || age >= newest);
    out.place = first_place + age - newest;
    out.there = age < count && (!out.is_first || (out.place >= 0 && out.place < length));
    if (out.is_first) {
      const int key = out.place + (is_ring() && out.place >= keep ? idx - keep : 0);
      out.key = key - (key >= length ? length - keep : 0);
    } else {
      const int key = idx - 1 - age;
      out.key = key + (key < keep ? length - keep : 0);
    }
    return out;
  }
};
template <bool TAIL, bool FIRST>
INLINE exact_tokens<TAIL, FIRST> exact_tokens_of(
    int newest, int firsts, int place, int length, int keep, int idx) {
  exact_tokens<TAIL, FIRST> out;
  out.newest = newest;
  out.count = newest + firsts;
  out.first_place = place;
  out.length = length;
  out.keep = keep;
  out.idx = idx;
  return out;
}

// Where its key and value are; `newest_at` is the place of the newest token's, `firsts_at` of the
// first one's, and strides are those of the arrays.
template <typename T>
INLINE const device T* exact_vectors(
    exact_token token, int age, int newest, const device T* newest_at, const device T* firsts_at,
    int64_t tail_stride, int64_t first_stride) {
  return token.is_first ? firsts_at + (age - newest) * first_stride : newest_at - age * tail_stride;
}
// Asks for them: 32 bytes a lane.
template <int CHANNELS, typename T>
INLINE void ask_for_vectors(const device T* x, uint lane) {
  constexpr int EACH = 32 / int(sizeof(T));
  if (int(lane) < CHANNELS / EACH) ask_for(x + EACH * lane);
}

// A lane's COUNT neighbouring channels of a vector of D, from number `first` on; zeros past D.
template <int D, int COUNT, typename T>
INLINE void read_exact(thread float* x, const device T* in, int first) {
  if (COUNT % 8 == 0 && D % 64 == 0) {
    UNROLL for (int i = 0; i < COUNT / 8; i++) read_eight(x + 8 * i, in + first + 8 * i);
  } else {
    UNROLL for (int i = 0; i < COUNT; i++) x[i] = first + i < D ? float(in[first + i]) : 0.0f;
  }
}

// The same threadgroup memory holds tiles, then the sums that SIMD groups add up.
INLINE threadgroup uint* words_of(threadgroup uint4* memory) {
  return reinterpret_cast<threadgroup uint*>(memory);
}
INLINE threadgroup float* floats_of(threadgroup uint4* memory) {
  return reinterpret_cast<threadgroup float*>(memory);
}

}  // namespace kvq
