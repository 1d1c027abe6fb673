// What differs between machines, NVIDIA's side: Metal's words in CUDA, and the 8x8 matrix tile.
// machine.metal is Apple's side. Both have SIMD groups of 32 lanes.
//
// MLX puts this before the kernel and after its own includes (fp16, bf16, cooperative groups);
// it compiles with every function on the device by default.
#define device
#define constant const
#define thread
#define threadgroup
#define tile_memory(name, size) extern __shared__ uint4 name[]  // the launch gives it its size
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define INLINE inline  // nvcc inlines all of it by itself

#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define simdgroups_per_threadgroup (blockDim.x >> 5)
#define thread_position_in_threadgroup threadIdx
#define threads_per_threadgroup blockDim
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_position_in_grid \
  make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \
             blockIdx.z * blockDim.z + threadIdx.z)

typedef unsigned int uint;
typedef unsigned short ushort;
typedef __nv_bfloat16 bfloat16_t;

#define float2(x, y) make_float2(x, y)
#define uint2(x, y) make_uint2(x, y)
#define uint4(x, y, z, w) make_uint4(x, y, z, w)
#define half2(x, y) __halves2half2(x, y)

template <typename To, typename From>
inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  union {
    From from;
    To to;
  } both = {x};
  return both.to;
}
template <>
inline uint as_type<uint, __half2>(__half2 x) {
  return reinterpret_cast<uint&>(x);
}
template <>
inline __half2 as_type<__half2, uint>(uint x) {
  return reinterpret_cast<__half2&>(x);
}
template <>
inline ushort as_type<ushort, __half>(__half x) {
  return __half_as_ushort(x);
}
template <>
inline __half as_type<__half, ushort>(ushort x) {
  return __ushort_as_half(x);
}
template <>
inline ushort as_type<ushort, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat16_as_ushort(x);
}

inline __half2 fma(__half2 a, __half2 b, __half2 c) {
  return __hfma2(a, b, c);
}
inline float clamp(float x, float low, float high) {
  return fminf(fmaxf(x, low), high);
}

namespace fast {
inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace fast

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}
inline void simdgroup_barrier(mem_flags) {
  __syncwarp();
}
template <typename T>
inline T simd_shuffle(T x, ushort lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
template <typename T>
inline T simd_shuffle_xor(T x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
inline bool simd_any(bool x) {
  return __any_sync(0xffffffffu, x);
}
inline float simd_sum(float x) {
  UNROLL for (int i = 16; i > 0; i /= 2) x += simd_shuffle_xor(x, i);
  return x;
}
inline float simd_max(float x) {
  UNROLL for (int i = 16; i > 0; i /= 2) x = fmaxf(x, simd_shuffle_xor(x, i));
  return x;
}

namespace kvq {

typedef int counter;

enum : int { PRODUCTS_ARE_CHEAP = 1 };

struct tile_lane {
  uint row;
  uint pair;
};

inline tile_lane tile_position(uint lane) {
  return {lane >> 2, lane & 3u};
}

// One instruction; the compiler makes two of (word & mask) | bits with two constants.
inline uint masked_or(uint word, uint mask, uint bits) {
  uint out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

// The lower halves of two words, and the upper ones.
inline uint lower_halves(uint a, uint b) {
  return __byte_perm(a, b, 0x5410u);
}
inline uint upper_halves(uint a, uint b) {
  return __byte_perm(a, b, 0x7632u);
}

// Two neighbouring channels in one load, where the address allows it.
template <typename T>
inline bool reads_pairs(const T* x) {
  return reinterpret_cast<uint64_t>(x) % (2 * sizeof(T)) == 0;
}
inline float2 read_pair(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}
inline float2 read_pair(const __half* x) {
  return __half22float2(*reinterpret_cast<const __half2*>(x));
}
inline float2 read_pair(const __nv_bfloat16* x) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(x));
}

inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline float square_root(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
inline float saturated(float x) {
  return __saturatef(x);  // no instruction of its own
}
// Codes: whole numbers n, kept as 2^23 + n, in whose lowest bits n is. Rounding through an addition
// is four times as fast as rint().
inline float rounded_code(float a, float b) {  // the nearest to a * b
  return __fmaf_rn(a, b, 8388608.0f);
}
inline float floor_code(float a, float b) {  // floor(a * b) + 8, which is not negative
  return __fmaf_rd(a, b, 8388616.0f);
}
// n - 7.5 in one instruction, and exact: the product is 2^23 + 7.5.
inline float level_of(float code) {
  return __fmaf_rn(-31.0f, 270600.5f, code);
}
// Codes of a word, the first one lowest.
template <int BITS>
inline uint word_of(const float* codes) {
  uint word = 0;
  UNROLL for (int i = 32 / BITS - 1; i >= 0; i--) word = (word << BITS) + as_type<uint>(codes[i]);
  return word - (BITS == 4 ? 0xfb000000u : 0x4b000000u);
}

inline float rows_max(float x) {
  UNROLL for (int i = 4; i < 32; i *= 2) x = fmaxf(x, simd_shuffle_xor(x, i));
  return x;
}

inline float rows_sum(float x) {
  UNROLL for (int i = 4; i < 32; i *= 2) x += simd_shuffle_xor(x, i);
  return x;
}

// mma.sync wants its right operand by columns: a transposed tile.
inline __half2 right_operand(__half2 tile) {
  uint out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(as_type<uint>(tile)));
  return as_type<__half2>(out);
}

// The row of the right operand that a lane's component i belongs to.
inline uint operand_row(tile_lane at, int i) {
  return 2 * at.pair + uint(i);
}

// [c0; c1] += [a0; a1] x b, before Ampere.
inline void multiply_half(float2& c0, float2& c1, __half2 a0, __half2 a1, __half2 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c0.x), "+f"(c0.y), "+f"(c1.x), "+f"(c1.y)
      : "r"(as_type<uint>(a0)), "r"(as_type<uint>(a1)), "r"(as_type<uint>(b)));
}

// [c0; c1] = [from0; from1] + [a00 a01; a10 a11] x [b0; b1].
inline void multiply_onto(
    float2& c0,
    float2& c1,
    float2 from0,
    float2 from1,
    __half2 a00,
    __half2 a10,
    __half2 a01,
    __half2 a11,
    __half2 b0,
    __half2 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(c0.x), "=f"(c0.y), "=f"(c1.x), "=f"(c1.y)
      : "r"(as_type<uint>(a00)), "r"(as_type<uint>(a10)), "r"(as_type<uint>(a01)),
        "r"(as_type<uint>(a11)), "r"(as_type<uint>(b0)), "r"(as_type<uint>(b1)), "f"(from0.x),
        "f"(from0.y), "f"(from1.x), "f"(from1.y));
#else
  c0 = from0;
  c1 = from1;
  multiply_half(c0, c1, a00, a10, b0);
  multiply_half(c0, c1, a01, a11, b1);
#endif
}
inline void multiply(
    float2& c0,
    float2& c1,
    __half2 a00,
    __half2 a10,
    __half2 a01,
    __half2 a11,
    __half2 b0,
    __half2 b1) {
  multiply_onto(c0, c1, c0, c1, a00, a10, a01, a11, b0, b1);
}

// Asks for a line of memory that a load will need.
template <typename T>
inline void ask_for(const T* x) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(x));
}

// Whether `count` threadgroups, this one the last, have called this; `arrived` is 0 before the first
// and after the last. What any of them wrote before a barrier before this is there for the last one
// after a barrier. One acquire-release operation: __threadfence() before and after an atomicInc are
// two sequentially consistent fences, and took longer.
inline bool is_last_to_arrive(const uint* arrived, uint count) {
  uint before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(arrived), "r"(count - 1)
               : "memory");
  return before == count - 1;
}

// Asynchronous copies of 16 bytes to threadgroup memory, in groups in the order of their beginning.
inline void begin_copy(uint* to, const uint* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   uint(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#endif
}
inline void end_copy_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GROUPS>  // that may still be on their way
inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Exact tokens of one turn, and which of eight a lane's component i of a left operand belongs to.
enum : int { EXACT_KEYS = 16 };
inline uint exact_key(tile_lane at, int i) {
  return at.pair + 4 * uint(i);
}
// Rotated queries as a right operand, where a lane's left one is channels `channel` + 8 * pair and two
// after that.
template <int D>
inline float2 exact_query(const __half2* queries, int pairs, int channel, tile_lane at) {
  const int c = channel + 8 * int(at.pair);
  const __half* x = reinterpret_cast<const __half*>(
      queries + int(at.row / 2) * pairs + (D % 32 == 0 ? c : min(c, D - 3)));
  return float2(__half2float(x[at.row % 2]), __half2float(x[4 + at.row % 2]));
}
// A probability as its product has it, in tf32, and two of each key as a right operand.
inline float exact_probability(float x) {
#if __CUDA_ARCH__ >= 800
  uint y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return as_type<float>(y);
#else
  return x;
#endif
}
inline float2 exact_operand(float2 p, tile_lane at) {
  float x[2];
  UNROLL for (int i = 0; i < 2; i++) {
    const ushort from = 4 * (at.pair + 4 * uint(i)) + at.row / 2;
    const float even = simd_shuffle(p.x, from), odd = simd_shuffle(p.y, from);
    x[i] = at.row % 2 == 0 ? even : odd;
  }
  return float2(x[0], x[1]);
}
// [c0; c1] += [a0; a1] x b, 16 x 8 by 8 x 8.
inline void multiply_tf32(float2* c, const float2* a, float2 b) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0].x), "+f"(c[0].y), "+f"(c[1].x), "+f"(c[1].y)
      : "r"(as_type<uint>(a[0].x)), "r"(as_type<uint>(a[1].x)), "r"(as_type<uint>(a[0].y)),
        "r"(as_type<uint>(a[1].y)), "r"(as_type<uint>(b.x)), "r"(as_type<uint>(b.y)));
#else
  const uint lane = thread_index_in_simdgroup;
  UNROLL for (int k = 0; k < 8; k++) {
    const ushort of_a = (lane & 28u) + uint(k) % 4, of_b = 8 * (lane & 3u) + uint(k) % 4;
    const float y = k < 4 ? b.x : b.y;
    const float even = simd_shuffle(y, of_b), odd = simd_shuffle(y, ushort(of_b + 4));
    UNROLL for (int i = 0; i < 2; i++) {
      const float x = simd_shuffle(k < 4 ? a[i].x : a[i].y, of_a);
      c[i] = float2(c[i].x + x * even, c[i].y + x * odd);
    }
  }
#endif
}
// c += a x b. TWICE: what tf32 loses of an fp32 number is added as well.
template <int TILES, bool TWICE>
inline void multiply_exact(float2* c, const float2* a, float2 b) {
  static_assert(TILES == 2, "a product has 16 rows");
  if (TWICE) {
    float2 high[2], low[2];
    UNROLL for (int i = 0; i < 2; i++) {
      high[i] = float2(as_type<float>(as_type<uint>(a[i].x) & 0xffffe000u),
                       as_type<float>(as_type<uint>(a[i].y) & 0xffffe000u));
      low[i] = float2(a[i].x - high[i].x, a[i].y - high[i].y);
    }
    multiply_tf32(c, high, b);
    multiply_tf32(c, low, b);
  } else {
    multiply_tf32(c, a, b);
  }
}

}  // namespace kvq
