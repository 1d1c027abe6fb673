// What differs between machines, Apple's side. machine.cuh is NVIDIA's side; all other sources are
// the same on both.
//
// A tile is spread over the 32 lanes of a SIMD group: each lane holds two neighbouring elements,
// (row, 2 * pair) and (row, 2 * pair + 1). The layout is that of simdgroup_matrix's
// thread_elements(), as MLX's own matrix kernels use it.
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")  // short of registers
// Metal's compiler is said to inline everything. If it did not, arrays of a caller that a function
// fills would be in memory and not in registers.
#define INLINE inline __attribute__((always_inline))

namespace kvq {

// Of loops. Signed ones are kept in 64 bits, beside themselves, for the pointers they are added to.
typedef uint counter;

// Whether a matrix product costs little more than a scalar one: here it is 20 cycles, and 128 of
// them before the first key were half of attend's time at 1K (tests/emulator/estimate_apple).
enum : int { PRODUCTS_ARE_CHEAP = 0 };

struct tile_lane {
  uint row;   // 0 to 7
  uint pair;  // 0 to 3, columns 2 * pair and 2 * pair + 1
};

INLINE tile_lane tile_position(uint lane) {
  tile_lane at;
  at.row = ((lane >> 2) & 4u) | ((lane >> 1) & 3u);
  at.pair = ((lane >> 2) & 2u) | (lane & 1u);
  return at;
}

// Some bits of a word among the bits of a constant.
INLINE uint masked_or(uint word, uint mask, uint bits) {
  return (word & mask) | bits;
}

// The lower halves of two words, and the upper ones.
INLINE uint lower_halves(uint a, uint b) {
  return (a & 0xffffu) | (b << 16);
}
INLINE uint upper_halves(uint a, uint b) {
  return (a >> 16) | (b & 0xffff0000u);
}

// Two neighbouring channels in one load, if the address is known to be aligned: it is not here.
template <typename T>
INLINE bool reads_pairs(const device T*) {
  return false;
}
template <typename T>
INLINE float2 read_pair(const device T* x) {
  return float2(float(x[0]), float(x[1]));
}

// Within a few units of the last place: enough for codes, which are whole numbers, and for scales,
// which are rounded to fp16. Divisions that all backends must agree about (`code_channels`, EXACT)
// and the softmax's, one a row, are exact ones.
INLINE float reciprocal(float x) {
  return fast::divide(1.0f, x);
}
INLINE float square_root(float x) {
  return fast::sqrt(x);
}
INLINE float saturated(float x) {
  return clamp(x, 0.0f, 1.0f);
}
// Codes: whole numbers.
INLINE float rounded_code(float a, float b) {  // the nearest to a * b
  return rint(a * b);
}
INLINE float floor_code(float a, float b) {  // floor(a * b) + 8, which is not negative
  return floor(a * b) + 8.0f;
}
INLINE float level_of(float code) {
  return code - 7.5f;
}
// A word of codes, the first one lowest. Sums in fp32 hold 16 bits exactly, and adding 2^23 puts
// these bits in place: faster than shifts and conversions.
template <int BITS>
INLINE uint word_of(const thread float* codes) {
  constexpr int HALF = 16 / BITS;
  float low = 0.0f, high = 0.0f;
  UNROLL for (int i = HALF - 1; i >= 0; i--) {
    low = fma(low, float(1 << BITS), codes[i]);
    high = fma(high, float(1 << BITS), codes[HALF + i]);
  }
  return (as_type<uint>(low + 8388608.0f) & 0xffffu) | (as_type<uint>(high + 8388608.0f) << 16);
}

// Reductions over the eight rows of a tile's column pair.
INLINE float rows_max(float x) {
  x = max(x, simd_shuffle_xor(x, 2));
  x = max(x, simd_shuffle_xor(x, 4));
  return max(x, simd_shuffle_xor(x, 16));
}

INLINE float rows_sum(float x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}

// The right operand of a product, from a tile in the common layout (row = k).
INLINE half2 right_operand(half2 tile) {
  return tile;
}

INLINE void multiply_tile(thread float2& c, half2 a, half2 b) {
  simdgroup_matrix<half, 8, 8> A, B;
  simdgroup_matrix<float, 8, 8> C;
  reinterpret_cast<thread half2&>(A.thread_elements()) = a;
  reinterpret_cast<thread half2&>(B.thread_elements()) = b;
  reinterpret_cast<thread float2&>(C.thread_elements()) = c;
  simdgroup_multiply_accumulate(C, A, B, C);
  c = reinterpret_cast<thread float2&>(C.thread_elements());
}

// The row of the right operand that a lane's component i belongs to.
INLINE uint operand_row(tile_lane at, int) {
  return at.row;
}

// [c0; c1] += [a00 a01; a10 a11] x [b0; b1]: a 16 x 16 by 16 x 8 product, fp32 accumulation.
INLINE void multiply(
    thread float2& c0,
    thread float2& c1,
    half2 a00,
    half2 a10,
    half2 a01,
    half2 a11,
    half2 b0,
    half2 b1) {
  multiply_tile(c0, a00, b0);
  multiply_tile(c1, a10, b0);
  multiply_tile(c0, a01, b1);
  multiply_tile(c1, a11, b1);
}
// The same, onto other sums.
INLINE void multiply_onto(
    thread float2& c0,
    thread float2& c1,
    float2 from0,
    float2 from1,
    half2 a00,
    half2 a10,
    half2 a01,
    half2 a11,
    half2 b0,
    half2 b1) {
  c0 = from0;
  c1 = from1;
  multiply(c0, c1, a00, a10, a01, a11, b0, b1);
}

// Asks for a line of memory that a load will need: there is no such instruction.
template <typename T>
INLINE void ask_for(const device T*) {}

// Copies to threadgroup memory are done when they begin: there is nothing to wait for.
INLINE void begin_copy(threadgroup uint* to, const device uint* from) {
  *reinterpret_cast<threadgroup uint4*>(to) = *reinterpret_cast<const device uint4*>(from);
}
INLINE void end_copy_group() {}
template <int GROUPS>
INLINE void wait_for_copies() {}

// Exact tokens of one turn, and which of eight a lane's component i of a left operand belongs to.
enum : int { EXACT_KEYS = 8 };
INLINE uint exact_key(tile_lane at, int i) {
  return 2 * at.pair + uint(i);
}
// Rotated queries as a right operand, where a lane's left one is channels `channel` + 8 * pair and two
// after that.
template <int D>
INLINE float2 exact_query(const threadgroup half2* queries, int pairs, int channel, tile_lane at) {
  const int c = channel + int(8 * (at.row >> 1) + 2 * (at.row & 1u));
  const half2 x = queries[int(at.pair) * pairs + (D % 32 == 0 ? c : min(c, D - 1))];
  return float2(float(x.x), float(x.y));
}
// A probability as its product has it, and two of each key as a right operand.
INLINE float exact_probability(float x) {
  return x;
}
INLINE float2 exact_operand(float2 p, tile_lane) {
  return p;
}
// c += a x b in fp32, 8 x 8 each.
template <int TILES, bool>
INLINE void multiply_exact(thread float2* c, const thread float2* a, float2 b) {
  UNROLL for (int i = 0; i < TILES; i++) {
    simdgroup_matrix<float, 8, 8> A, B, C;
    reinterpret_cast<thread float2&>(A.thread_elements()) = a[i];
    reinterpret_cast<thread float2&>(B.thread_elements()) = b;
    reinterpret_cast<thread float2&>(C.thread_elements()) = c[i];
    simdgroup_multiply_accumulate(C, A, B, C);
    c[i] = reinterpret_cast<thread float2&>(C.thread_elements());
  }
}

}  // namespace kvq
