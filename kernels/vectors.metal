// Vectors in the registers of a SIMD group: read, centred, scaled and rotated; an output row
// rotated back, scaled, centred and written.
//
// A table (mlx_kvq/ops/gpu/tables.py) holds the FFT's twiddles and then channel factors. Of each
// calibrated head: D before the rotation, D after it, D of the centre. Uncalibrated: D signs for
// all heads, on the unrotated side.
namespace kvq {

template <int D, int ROTATION, bool CALIBRATED>
INLINE const device float* factors_of(const device float* table, int head) {
  constexpr int FIRST = channel_factors(D, ROTATION);
  return table + FIRST + (CALIBRATED ? head * 3 * D : 0);
}

// The values' table follows the keys', of H heads, in one array.
template <int D, int ROTATION, bool CALIBRATED>
INLINE const device float* values_table(const device float* tables, int H) {
  constexpr int FIRST = channel_factors(D, ROTATION);
  return tables + FIRST + (CALIBRATED ? H * 3 * D : D);
}

// Two neighbouring numbers at an address that is aligned to both.
INLINE float2 pair_at(const device float* x) {
  return *reinterpret_cast<const device float2*>(x);
}
// Two neighbouring factors; c is even, and so is every offset in a table.
INLINE float2 factor_pair(const device float* factors, int c) {
  return pair_at(factors + c);
}

// Reads a lane's channels of a vector of any type and stride, placed as before the rotation. `zero`
// is 0; in a loop, of another origin in each turn (`pack_vectors`).
template <int D, int ROTATION, typename T>
INLINE void read_points(
    thread float2* z, const device T* x, int64_t stride, int zero, uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  x += first_channel<D, ROTATION>(lane) * stride;
  if (stride == 1) {  // the offsets are constants
    if (reads_pairs(x)) {
      UNROLL for (int a = 0; a < points_of(D); a++) z[a] = read_pair(x + a * STEP);
    } else {
      UNROLL for (int a = 0; a < points_of(D); a++) {
        z[a] = float2(float(x[a * STEP]), float(x[a * STEP + 1]));
      }
    }
  } else {
    // Or compilers compute 64-bit offsets, as many as channels, before the loop.
    stride = zero == 0 ? stride : 1;
    UNROLL for (int a = 0; a < points_of(D); a++) {
      z[a] = float2(float(x[a * STEP * stride]), float(x[(a * STEP + 1) * stride]));
    }
  }
}

// A lane's factors of one head, in registers.
template <int D>
struct lane_factors {
  float2 before[points_of(D)];
  float2 after[points_of(D)];
  float2 mu[points_of(D)];  // -mu * before in `rotate_points`, mu on the way back
};

template <int D, int ROTATION, bool CENTRED>
INLINE void read_before(thread lane_factors<D>& f, const device float* factors, uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  factors += first_channel<D, ROTATION>(lane);
  UNROLL for (int a = 0; a < points_of(D); a++) {
    f.before[a] = factor_pair(factors, a * STEP);
    if (CENTRED) {
      const float2 mu = factor_pair(factors, 2 * D + a * STEP);
      f.mu[a] = float2(-mu.x * f.before[a].x, -mu.y * f.before[a].y);
    }
  }
}
template <int D, int ROTATION>
INLINE void read_after(thread lane_factors<D>& f, const device float* factors, uint lane) {
  factors += 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  UNROLL for (int a = 0; a < points_of(D); a++) f.after[a] = factor_pair(factors, D + 2 * a);
}

// Before a loop over vectors, as `read_table`.
template <int D, int ROTATION, bool CENTRED, bool SCALED>
INLINE void read_factors(thread lane_factors<D>& f, const device float* factors, uint lane) {
  if (HOLD_TABLES != 0) {
    read_before<D, ROTATION, CENTRED>(f, factors, lane);
    if (SCALED) read_after<D, ROTATION>(f, factors, lane);
  }
}

// z -> after * R((z - mu) * before), placed as after the rotation. Without mu unless CENTRED,
// without `after` unless SCALED. SWAPS: `swap` is threadgroup memory for `rotate_swapping`.
template <int D, int ROTATION, bool CENTRED, bool SCALED, bool SWAPS>
INLINE void rotate_points(
    thread float2* z,
    const thread lane_factors<D>& f,
    const thread lane_table<D>& w,
    const device float* table,
    const device float* factors,
    threadgroup float2* swap,
    uint lane) {
  lane_factors<D> own;
  if (HOLD_TABLES == 0) read_before<D, ROTATION, CENTRED>(own, factors, lane);
  const thread lane_factors<D>& g = HOLD_TABLES != 0 ? f : own;
  UNROLL for (int a = 0; a < points_of(D); a++) {
    const float2 b = g.before[a], c = CENTRED ? g.mu[a] : float2(0.0f, 0.0f);
    z[a] = float2(fma(z[a].x, b.x, c.x), fma(z[a].y, b.y, c.y));
  }
  if (SWAPS) {
    rotate_swapping<D>(z, w, table, swap, lane);
  } else {
    rotate<D, ROTATION>(z, w, table, lane);
  }
  if (SCALED) {
    if (HOLD_TABLES == 0) read_after<D, ROTATION>(own, factors, lane);
    UNROLL for (int a = 0; a < points_of(D); a++) {
      z[a] = float2(z[a].x * g.after[a].x, z[a].y * g.after[a].y);
    }
  }
}

// A query and what rotates it, in registers.
template <int D>
struct query_vector {
  float2 z[points_of(D)];
  lane_table<D> table;
  lane_factors<D> factors;
};

template <int D, int ROTATION, bool CALIBRATED, typename T>
INLINE void read_query_vector(
    thread query_vector<D>& query,
    const device T* x,
    int64_t stride,
    const device float* table,
    int head,
    uint lane) {
  read_points<D, ROTATION>(query.z, x, stride, 0, lane);
  read_table<D, ROTATION>(query.table, table, lane);
  read_factors<D, ROTATION, false, CALIBRATED>(
      query.factors, factors_of<D, ROTATION, CALIBRATED>(table, head), lane);
}
template <int D, int ROTATION, bool CALIBRATED>
INLINE void rotate_query(
    thread query_vector<D>& query, const device float* table, int head, uint lane) {
  rotate_points<D, ROTATION, false, CALIBRATED, false>(
      query.z, query.factors, query.table, table,
      factors_of<D, ROTATION, CALIBRATED>(table, head), nullptr, lane);
}

constexpr float log2_e() {
  return 1.44269504088896f;
}

// Logits are in units of log 2; m is their maximum, l the sum of exp2(logit - m). Returns the
// factor of the sums and the probability of the keys (less than 1 beside a sink).
INLINE float2 normalise(float m, float l) {
  // A query that may attend to nothing has l = 0 and gets 0; a NaN stays one.
  return l == 0.0f ? float2(0.0f, 0.0f) : float2(1.0f / l, 1.0f);
}
INLINE float2 normalise_with_sink(float m, float l, float sink) {
  const float top = max(m, sink);
  const float f = fast::exp2(m - top);
  const float total = l * f + fast::exp2(sink - top);
  return float2(f / total, l * f / total);
}

// Maximum and total of query row r from those of NSG SIMD groups, 8 rows each.
template <int NSG>
INLINE float2 join_statistics(
    const threadgroup float* maxima, const threadgroup float* totals, int r) {
  float top = maxima[r];
  for (int g = 1; g < NSG; g++) top = max(top, maxima[8 * g + r]);
  float total = 0.0f;
  for (int g = 0; g < NSG; g++) {
    total += totals[8 * g + r] * fast::exp2(maxima[8 * g + r] - top);
  }
  return float2(top, total);
}

// q . mu: the centre lowers every key's logit by it, but not a sink's.
template <int D, typename T>
INLINE float centre_logit(const device T* q, int64_t stride, const device float* factors, uint lane) {
  float dot = 0.0f;
  for (int c = int(lane); c < D; c += 32) {
    dot += float(q[c * stride]) * factors[2 * D + c];
  }
  return simd_sum(dot);
}

// What turns a KV head's sums into outputs, in registers.
template <int D>
struct output_factors {
  lane_table<D> table;
  float2 before[points_of(D)];  // of the rotation: 1 / lambda
  float2 after[points_of(D)];   // sigma
  float2 mu[points_of(D)];
};

// Asks for what the next function reads.
template <int D, int ROTATION, bool CALIBRATED>
INLINE void ask_for_output_factors(const device float* table, int head, uint lane) {
  constexpr int LINE = 32;  // floats
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  for (int i = LINE * int(lane); i < channel_factors(D, ROTATION); i += 32 * LINE) ask_for(table + i);
  for (int i = LINE * int(lane); i < (CALIBRATED ? 3 * D : D); i += 32 * LINE) ask_for(factors + i);
}
template <int D, int ROTATION, bool CALIBRATED>
INLINE void read_output_factors(
    thread output_factors<D>& f, const device float* table, int head, uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  const int rotated = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  const int first = first_channel<D, ROTATION>(lane);
  read_table<D, ROTATION>(f.table, table, lane);
  UNROLL for (int a = 0; a < points_of(D); a++) {
    f.after[a] = factor_pair(factors + (CALIBRATED ? D : 0), first + a * STEP);
    if (CALIBRATED) {
      f.before[a] = factor_pair(factors, rotated + 2 * a);
      f.mu[a] = factor_pair(factors + 2 * D, first + a * STEP);
    }
  }
}

// One row of attention's output: out = R^T(sums * normal.x / lambda) * sigma + mu * normal.y.
// All lanes of a SIMD group call it; lanes that repeat another lane's work do not `write`. Factors
// are `held`, or read where they are used.
template <int D, int ROTATION, bool CALIBRATED, bool HELD, typename T, typename P>
INLINE void finish_row(
    device T* out,
    P sums,
    float2 normal,
    const thread output_factors<D>* held,
    const device float* table,
    int head,
    bool write,
    uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  const device float* after = factors + (CALIBRATED ? D : 0);
  float2 z[points_of(D)];
  const int rotated = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  UNROLL for (int a = 0; a < points_of(D); a++) {
    const int c = rotated + 2 * a;
    z[a] = float2(sums[c] * normal.x, sums[c + 1] * normal.x);
    if (CALIBRATED) {
      const float2 f = HELD ? held->before[a] : factor_pair(factors, c);
      z[a] = float2(z[a].x * f.x, z[a].y * f.y);
    }
  }
  if (HELD) {
    rotate_back<D, ROTATION>(z, held->table, table, lane);
  } else {
    lane_table<D> w;
    read_table<D, ROTATION>(w, table, lane);
    rotate_back<D, ROTATION>(z, w, table, lane);
  }
  if (write) {
    const int first = first_channel<D, ROTATION>(lane);
    UNROLL for (int a = 0; a < points_of(D); a++) {
      const int c = first + a * STEP;
      const float2 f = HELD ? held->after[a] : factor_pair(after, c);
      z[a] = float2(z[a].x * f.x, z[a].y * f.y);
      if (CALIBRATED) {
        const float2 mu = HELD ? held->mu[a] : factor_pair(factors + 2 * D, c);
        z[a] = float2(z[a].x + mu.x * normal.y, z[a].y + mu.y * normal.y);
      }
    }
    keep_finite<points_of(D)>(out, z);
    UNROLL for (int a = 0; a < points_of(D); a++) write_two(out + first + a * STEP, z[a]);
  }
}

// The output of one query, from unnormalised sums and their statistics (`normalise`). `sink` is the
// head's logit, used if SINKS.
template <
    int KD, int VD, int ROTATION, bool K_CALIBRATED, bool K_CENTRED, bool V_CALIBRATED, bool SINKS,
    bool HELD, typename T, typename P>
INLINE void finish_query(
    device T* out,
    P sums,
    float2 statistics,
    float sink,
    const device T* q,
    int64_t q_stride,
    const device float* k_table,
    const device float* v_table,
    const thread output_factors<VD>* held,
    int kv_head,
    float scale,
    uint lane) {
  float2 normal;
  if (SINKS) {
    if (K_CENTRED) {
      const device float* factors = factors_of<KD, ROTATION, K_CALIBRATED>(k_table, kv_head);
      sink -= scale * centre_logit<KD>(q, q_stride, factors, lane);
    }
    normal = normalise_with_sink(statistics.x, statistics.y, sink * log2_e());
  } else {
    normal = normalise(statistics.x, statistics.y);
  }
  finish_row<VD, ROTATION, V_CALIBRATED, HELD>(
      out, sums, normal, held, v_table, kv_head, lane < uint(lanes_of(VD)), lane);
}

// What a rotated channel is in the tail, beside keys like these, and codes are made of.
template <typename T>
INLINE float as_kept(const device T*, float x) {
  return float(bfloat16_t(x));
}
INLINE float as_kept(const device float*, float x) {
  return x;
}

// Reads a lane's rotated channels of one vector, as `write_points` wrote them.
template <int D, int ROTATION, typename T>
INLINE void read_rotated(
    thread float2* z, const device T* x, int64_t stride, int zero, uint lane) {
  x += 2 * points_of(D) * rotated_block<D, ROTATION>(lane) * stride;
  stride = zero == 0 ? stride : 1;  // as in `read_points`
  UNROLL for (int a = 0; a < points_of(D); a++) {
    z[a] = float2(float(x[2 * a * stride]), float(x[(2 * a + 1) * stride]));
  }
}

// Writes a lane's rotated channels of one vector.
template <int D, int ROTATION, typename T>
INLINE void write_points(device T* out, const thread float2* z, uint lane) {
  out += 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  if (points_of(D) % 4 == 0) {
    UNROLL for (int i = 0; i < points_of(D) / 4; i++) {
      float y[8];
      UNROLL for (int a = 0; a < 4; a++) {
        y[2 * a] = z[4 * i + a].x;
        y[2 * a + 1] = z[4 * i + a].y;
      }
      write_eight(out + 8 * i, y);
    }
  } else {
    UNROLL for (int a = 0; a < points_of(D); a++) write_two(out + 2 * a, z[a]);
  }
}

// Threadgroup memory, in float2, that a SIMD group rotates its vectors through.
constexpr int swapped_points(int D, int ROTATION) {
  return swaps(D, ROTATION) ? vectors_of(D) * swap_points(D) : 0;
}

// Copies `tokens` vectors of CHANNELS channels, `by_token` apart: a thread every `copiers`-th eight
// channels, from number `copier` on.
template <int CHANNELS, typename T, typename S>
INLINE void copy_tokens(
    device T* to, const device S* from, int by_token, int tokens, int copier, int copiers) {
  constexpr int STEPS = HOLD_TABLES != 0 ? 4 : 1;  // loads in flight of a thread
  constexpr int EIGHTS = CHANNELS / 8;
  ROLLED for (int i = copier; i < tokens * EIGHTS; i += STEPS * copiers) {
    UNROLL for (int j = 0; j < STEPS; j++) {
      const int at = i + j * copiers;
      if (at < tokens * EIGHTS) {
        convert_eight(to + 8 * at, from + (at / EIGHTS * by_token + 8 * (at % EIGHTS)));
      }
    }
  }
}

// Keys or values of a head's L tokens, rotated, to `kept`, CHANNELS apart: every `workers`-th set of
// SET tokens, from set `worker` on, by one SIMD group.
template <
    int D, int ROTATION, bool CALIBRATED, bool SCALED, int SET, int CHANNELS, typename T, typename K>
INLINE void keep_vectors(
    device K* kept,
    const device T* x,
    int64_t by_token,
    int64_t stride,
    int L,
    int worker,
    int workers,
    threadgroup float2* swap,
    const device float* table,
    int head,
    uint lane) {
  const int v = int(lane) / lanes_of(D);
  lane_table<D> w;
  lane_factors<D> f;
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  ROLLED for (int first = worker * SET; first < L; first += workers * SET) {
    const int token = first + v;
    const bool valid = v < SET && token < L;
    // As in `pack_vectors`: what depends on it is not in registers between turns.
    const int zero = HOLD_TABLES != 0 ? 0 : unknown_zero(token);
    const uint own_lane = HOLD_TABLES != 0 ? lane : lane + uint(zero);
    float2 z[points_of(D)];
    UNROLL for (int a = 0; a < points_of(D); a++) z[a] = float2(0.0f, 0.0f);
    if (valid) {
      read_points<D, ROTATION>(z, x + token * by_token, stride, zero, own_lane);
    }
    read_table<D, ROTATION>(w, table, own_lane);
    read_factors<D, ROTATION, CALIBRATED, SCALED>(f, factors, own_lane);
    rotate_points<D, ROTATION, CALIBRATED, SCALED, swaps(D, ROTATION)>(
        z, f, w, table, factors, swap, own_lane);
    if (valid) {
      write_points<D, ROTATION>(kept + int64_t(token) * CHANNELS, z, own_lane);
    }
  }
}

}  // namespace kvq
