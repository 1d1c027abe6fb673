// The rotation F and its transpose, one vector of D channels by M lanes of a SIMD group, in fp32
// registers; a SIMD group holds 32 / M vectors at once.
//
// srft: the real FFT of D channels as a complex FFT of N = D / 2 points z[n] = x[2n] + i x[2n+1].
// N = R * M: M lanes (a power of two) hold R points each, lane l holds n = a * M + l for a < R.
// An in-lane DFT of size R, one twiddle, M-point butterflies by simd_shuffle_xor (decimation in
// frequency, so lane l ends with the bit-reversed index), then the split that pairs k with N - k.
// A lane ends with 2 R channels in a row. The transpose runs the same steps backwards with
// conjugate twiddles. Results are sqrt(2 D) times too long.
// srht: Hadamard butterflies, sqrt(D) times too long; lane l holds n = R * l + a. none: the same
// placement, no arithmetic. The channel factors (vectors.metal) divide by these lengths.
//
// Twiddles come from the host in float64, rounded once (`rotation_table` in
// mlx_kvq/ops/gpu/tables.py, which this file's offsets must match); half precision or fast sines
// here would cost quality.
namespace kvq {

enum : int { SRFT = 0, SRHT = 1 };  // template value ROTATION; 2 is none
constexpr bool is_none(int ROTATION) {
  return ROTATION == 2;
}

// Lanes that share a vector. WIDE (an enumerator of mlx_kvq/ops/gpu/jit.py): as many as divide D /
// 2, for a single vector that others wait for. Otherwise few, because shuffles cost more than
// arithmetic, but at most eight points a lane if D allows it.
constexpr int lanes_of(int D) {
  int m = 1;
  while ((WIDE != 0 || D / 2 / m > 8) && D / 2 / m % 2 == 0 && m < 32) m *= 2;
  return m;
}
constexpr int points_of(int D) {
  return D / 2 / lanes_of(D);
}
constexpr int vectors_of(int D) {
  return 32 / lanes_of(D);
}
constexpr int log2_of(int m) {
  return (m > 1) + (m > 2) + (m > 4) + (m > 8) + (m > 16);
}
constexpr bool is_power(int n) {
  return (n & (n - 1)) == 0;
}

// Parts of a table, in floats: stage twiddles [m - 2][M], lane twiddles [R - 1][M],
// split twiddles [R][M], roots [R], all complex; then the channels' factors.
constexpr int lane_twiddles(int D) {
  return 2 * lanes_of(D) * (lanes_of(D) > 4 ? log2_of(lanes_of(D)) - 2 : 0);
}
constexpr int split_twiddles(int D) {
  return lane_twiddles(D) + 2 * lanes_of(D) * (points_of(D) - 1);
}
constexpr int roots(int D) {
  return split_twiddles(D) + D;
}
constexpr int channel_factors(int D, int ROTATION) {
  return ROTATION == SRFT ? roots(D) + 2 * points_of(D) : 0;
}

// 0, of a number that is not negative, which no compiler knows: loops to it stay loops, and what
// depends on it is computed where it stands and not before a loop.
INLINE int unknown_zero(int n) {
  return min(n, 0);
}

INLINE float2 complex_product(float2 a, float2 b) {
  return float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

template <bool CONJUGATE>
INLINE float2 conjugated(float2 w) {
  return float2(w.x, CONJUGATE ? -w.y : w.y);
}

// A lane's twiddles, in registers.
template <int D>
struct lane_table {
  float2 stage[5];  // stages over two and four lanes need none
  float2 turn[points_of(D)];
  float2 split[points_of(D)];
};

template <int D>
INLINE void read_stages(thread float2* stage, const device float* table, uint lane) {
  constexpr int M = lanes_of(D), STAGES = log2_of(M) - 2;
  const device float2* pairs = reinterpret_cast<const device float2*>(table);
  UNROLL for (int s = 0; s < STAGES; s++) stage[s] = pairs[s * M + int(lane & uint(M - 1))];
}
template <int D>
INLINE void read_turns(thread float2* turn, const device float* table, uint lane) {
  constexpr int M = lanes_of(D), FIRST = lane_twiddles(D);
  const device float2* pairs =
      reinterpret_cast<const device float2*>(table + FIRST) + int(lane & uint(M - 1));
  UNROLL for (int k = 1; k < points_of(D); k++) turn[k] = pairs[(k - 1) * M];
}
template <int D>
INLINE void read_splits(thread float2* split, const device float* table, uint lane) {
  constexpr int M = lanes_of(D), FIRST = split_twiddles(D);
  const device float2* pairs =
      reinterpret_cast<const device float2*>(table + FIRST) + int(lane & uint(M - 1));
  UNROLL for (int k = 0; k < points_of(D); k++) split[k] = pairs[k * M];
}

// Before a loop over vectors. HOLD_TABLES (an enumerator of mlx_kvq/ops/gpu/jit.py): twiddles and
// channel factors stay in registers; otherwise each vector reads them again, where it uses them.
template <int D, int ROTATION>
INLINE void read_table(thread lane_table<D>& w, const device float* table, uint lane) {
  if (ROTATION == SRFT && HOLD_TABLES != 0) {
    read_stages<D>(w.stage, table, lane);
    read_turns<D>(w.turn, table, lane);
    read_splits<D>(w.split, table, lane);
  }
}

template <int M>
INLINE uint reverse_lane(uint lane) {
  uint out = 0;
  UNROLL for (int bit = 1; bit < M; bit *= 2) {
    out = (out << 1) | (lane & 1u);
    lane >>= 1;
  }
  return out;
}

// Before the rotation a lane's point a is channels first_channel + point_step * a and the next ...
template <int D, int ROTATION>
INLINE int first_channel(uint lane) {
  constexpr int M = lanes_of(D);
  return 2 * (ROTATION == SRFT ? 1 : points_of(D)) * int(lane & uint(M - 1));
}
constexpr int point_step(int D, int ROTATION) {
  return ROTATION == SRFT ? 2 * lanes_of(D) : 2;
}

// ... after it, channels 2 * a and 2 * a + 1 of this block of 2 * points_of(D).
template <int D, int ROTATION>
INLINE int rotated_block(uint lane) {
  constexpr int M = lanes_of(D);
  return int(ROTATION == SRFT ? reverse_lane<M>(lane & uint(M - 1)) : lane & uint(M - 1));
}

// v times exp(-2 pi i e / 8), conjugate for the transpose.
template <bool INVERSE>
INLINE float2 eighth_turn(float2 v, int e) {
  const float c = 0.70710678118654752f;
  const float y = INVERSE ? -v.y : v.y;  // conjugate in, conjugate out
  float2 w = float2(v.x, y);
  if (e == 1) w = float2(c * (v.x + y), c * (y - v.x));
  if (e == 2) w = float2(y, -v.x);
  if (e == 3) w = float2(c * (y - v.x), -c * (v.x + y));
  return float2(w.x, INVERSE ? -w.y : w.y);
}

// In-lane DFT of R points.
template <int D, bool INVERSE>
INLINE void dft(thread float2* z, const device float* table) {
  constexpr int R = points_of(D);
  if (is_power(R)) {  // 1, 2, 4 or 8
    UNROLL for (int h = R / 2; h > 0; h /= 2) {
      UNROLL for (int a = 0; a < R; a++) {
        if ((a & h) == 0) {
          const float2 u = z[a], v = z[(a | h) % R];
          z[a] = float2(u.x + v.x, u.y + v.y);
          z[(a | h) % R] = eighth_turn<INVERSE>(float2(u.x - v.x, u.y - v.y), a % h * (4 / h));
        }
      }
    }
    UNROLL for (int a = 0; a < R; a++) {
      const int b = R == 8 ? (a & 1) * 4 + (a & 2) + (a >> 2) : R == 4 ? (a & 1) * 2 + (a >> 1) : a;
      if (a < b) {
        const float2 u = z[a];
        z[a] = z[b];
        z[b] = u;
      }
    }
  } else {
    float2 x[R];
    UNROLL for (int a = 0; a < R; a++) x[a] = z[a];
    UNROLL for (int k = 1; k < R; k++) {
      z[0] = float2(z[0].x + x[k].x, z[0].y + x[k].y);
      z[k] = x[0];
    }
    UNROLL for (int j = 1; j < R; j++) {
      const float2 w =
          conjugated<INVERSE>(reinterpret_cast<const device float2*>(table)[roots(D) / 2 + j]);
      UNROLL for (int k = 1; k < R; k++) {
        UNROLL for (int a = 1; a < R; a++) {
          if (a * k % R == j) {
            const float2 p = complex_product(x[a], w);
            z[k] = float2(z[k].x + p.x, z[k].y + p.y);
          }
        }
      }
    }
    // R that is not prime: products a * k that are whole turns.
    UNROLL for (int k = 1; k < R; k++) {
      UNROLL for (int a = 1; a < R; a++) {
        if (a * k % R == 0) {
          z[k] = float2(z[k].x + x[a].x, z[k].y + x[a].y);
        }
      }
    }
  }
}

template <int D, bool INVERSE>
INLINE void lane_turn(
    thread float2* z, const thread lane_table<D>& w, const device float* table, uint lane) {
  float2 own[points_of(D)];
  if (HOLD_TABLES == 0) read_turns<D>(own, table, lane);
  const thread float2* turn = HOLD_TABLES != 0 ? w.turn : own;
  UNROLL for (int k = 1; k < points_of(D); k++) {
    z[k] = complex_product(z[k], conjugated<INVERSE>(turn[k]));
  }
}

// One butterfly over lanes that differ in bit h. The upper lane's result is then turned: by a
// twiddle if h > 2, by none or a quarter if h is 2, not if h is 1.
template <int D, bool INVERSE>
INLINE void stage(thread float2* z, float2 turn, uint lane, int h) {
  constexpr int R = points_of(D);
  const float side = (lane & uint(h)) != 0 ? -1.0f : 1.0f;
  const float2 w = conjugated<INVERSE>(turn);
  const bool quarter = h == 2 && (lane & 3u) == 3u;
  UNROLL for (int a = 0; a < R; a++) {
    float2 v = z[a];
    if (INVERSE) {
      v = h > 2 ? complex_product(v, w) : quarter ? float2(-v.y, v.x) : v;
    }
    const float re = simd_shuffle_xor(v.x, ushort(h));
    const float im = simd_shuffle_xor(v.y, ushort(h));
    v = float2(fma(side, v.x, re), fma(side, v.y, im));
    if (!INVERSE) {
      v = h > 2 ? complex_product(v, w) : quarter ? float2(v.y, -v.x) : v;
    }
    z[a] = v;
  }
}

// Point k of the DFT of real channels from points k and N - k of the complex one, or back.
template <bool INVERSE>
INLINE float2 joined(float2 v, float2 other, float2 turn) {
  const float2 u = conjugated<INVERSE>(turn);
  const float odd = v.x - other.x, even = v.y + other.y;
  return float2(
      fma(odd, u.x, fma(-even, u.y, v.x + other.x)), fma(odd, u.y, fma(even, u.x, v.y - other.y)));
}
INLINE float2 joined_zero(float2 v) {
  const float c = 1.41421356237309505f;
  return float2(c * (v.x + v.y), c * (v.x - v.y));
}

// Pairs k with N - k: DFT of complex points <-> DFT of real channels.
template <int D, bool INVERSE>
INLINE void split(
    thread float2* z, const thread lane_table<D>& w, const device float* table, uint lane) {
  constexpr int M = lanes_of(D);
  constexpr int R = points_of(D);
  float2 own[R];
  if (HOLD_TABLES == 0) read_splits<D>(own, table, lane);
  const thread float2* turn = HOLD_TABLES != 0 ? w.split : own;
  const uint l = lane & uint(M - 1);
  // Negation of the bit-reversed index flips every bit below the highest one that is set.
  uint below = l | (l >> 1);
  below |= below >> 2;
  below |= below >> 4;
  const uint partner = lane ^ (below >> 1);
  float2 y[R];
  UNROLL for (int k = 0; k < R; k++) {
    const float2 v = z[k];
    const float2 p = z[(R - k) % R];
    float re, im;
    if (k == 0) {
      re = simd_shuffle(p.x, ushort(partner));
      im = simd_shuffle(p.y, ushort(partner));
    } else if (M > 1) {
      re = simd_shuffle_xor(p.x, ushort(M - 1));
      im = simd_shuffle_xor(p.y, ushort(M - 1));
    } else {
      re = p.x;
      im = p.y;
    }
    y[k] = joined<INVERSE>(v, float2(re, im), turn[k]);
  }
  if (l == 0) y[0] = joined_zero(z[0]);
  UNROLL for (int k = 0; k < R; k++) z[k] = y[k];
}

// The Hadamard transform; its own transpose.
template <int D>
INLINE void hadamard(thread float2* z, uint lane) {
  constexpr int M = lanes_of(D);
  constexpr int R = points_of(D);
  UNROLL for (int a = 0; a < R; a++) {
    z[a] = float2(z[a].x + z[a].y, z[a].x - z[a].y);
  }
  UNROLL for (int h = 1; h < R; h *= 2) {
    UNROLL for (int a = 0; a < R; a++) {
      if ((a & h) == 0) {
        const float2 u = z[a], v = z[(a | h) % R];
        z[a] = float2(u.x + v.x, u.y + v.y);
        z[(a | h) % R] = float2(u.x - v.x, u.y - v.y);
      }
    }
  }
  UNROLL for (int h = 1; h < M; h *= 2) {
    const float side = (lane & uint(h)) != 0 ? -1.0f : 1.0f;
    UNROLL for (int a = 0; a < R; a++) {
      const float re = simd_shuffle_xor(z[a].x, ushort(h));
      const float im = simd_shuffle_xor(z[a].y, ushort(h));
      z[a] = float2(re + side * z[a].x, im + side * z[a].y);
    }
  }
}

// z, placed as before the rotation, becomes F z, placed as after it.
template <int D, int ROTATION>
INLINE void rotate(
    thread float2* z, const thread lane_table<D>& w, const device float* table, uint lane) {
  if (ROTATION == SRFT) {
    constexpr int M = lanes_of(D);
    float2 own[5];
    if (HOLD_TABLES == 0) read_stages<D>(own, table, lane);
    const thread float2* turn = HOLD_TABLES != 0 ? w.stage : own;
    dft<D, false>(z, table);
    lane_turn<D, false>(z, w, table, lane);
    UNROLL for (int s = 0; (M >> 1 >> s) > 0; s++) {
      stage<D, false>(z, turn[s], lane, M >> 1 >> s);
    }
    split<D, false>(z, w, table, lane);
  } else if (ROTATION == SRHT) {
    hadamard<D>(z, lane);
  }
}

// The same if a vector has as many lanes as a lane has points: lanes and points swap places through
// threadgroup memory, so that both DFTs are in-lane. Rows of R + 1 points avoid bank conflicts.
constexpr bool swaps(int D, int ROTATION) {
  return ROTATION == SRFT && WIDE == 0 && lanes_of(D) == points_of(D);
}
constexpr int swap_points(int D) {  // of a vector
  return lanes_of(D) * (points_of(D) + 1);
}

template <int D>
INLINE void rotate_swapping(
    thread float2* z,
    const thread lane_table<D>& w,
    const device float* table,
    threadgroup float2* swap,
    uint lane) {
  constexpr int R = points_of(D);
  const int l = int(lane) % R;
  const int block = int(reverse_lane<R>(uint(l)));
  swap += int(lane) / R * swap_points(D);
  dft<D, false>(z, table);
  lane_turn<D, false>(z, w, table, lane);
  UNROLL for (int k = 0; k < R; k++) swap[k * (R + 1) + l] = z[k];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLL for (int a = 0; a < R; a++) z[a] = swap[l * (R + 1) + a];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  dft<D, false>(z, table);
  UNROLL for (int k = 0; k < R; k++) swap[k * (R + 1) + l] = z[k];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float2 own[R];
  if (HOLD_TABLES == 0) read_splits<D>(own, table, lane);
  const thread float2* turn = HOLD_TABLES != 0 ? w.split : own;
  UNROLL for (int k = 0; k < R; k++) {
    const float2 v = swap[block * (R + 1) + k];
    const int row = k == 0 ? (R - block) % R : R - 1 - block;
    z[k] = joined<false>(v, swap[row * (R + 1) + (R - k) % R], turn[k]);
    if (k == 0 && l == 0) z[0] = joined_zero(v);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// z, placed as after the rotation, becomes F^T z, placed as before it.
template <int D, int ROTATION>
INLINE void rotate_back(
    thread float2* z, const thread lane_table<D>& w, const device float* table, uint lane) {
  if (ROTATION == SRFT) {
    constexpr int M = lanes_of(D);
    float2 own[5];
    if (HOLD_TABLES == 0) read_stages<D>(own, table, lane);
    const thread float2* turn = HOLD_TABLES != 0 ? w.stage : own;
    split<D, true>(z, w, table, lane);
    UNROLL for (int s = log2_of(M) - 1; s >= 0; s--) {
      stage<D, true>(z, turn[s], lane, M >> 1 >> s);
    }
    lane_turn<D, true>(z, w, table, lane);
    dft<D, true>(z, table);
  } else if (ROTATION == SRHT) {
    hadamard<D>(z, lane);
  }
}

}  // namespace kvq
