// Packed vectors into the registers of a SIMD group, out of the rotation, and to memory, for
// restore_rows.metal.
namespace kvq {

// A lane's factors of the way back, from an output table.
template <int D, int ROTATION>
INLINE void read_rotated_factors(thread lane_factors<D>& f, const device float* factors, uint lane) {
  const int rotated = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  UNROLL for (int a = 0; a < points_of(D); a++) f.before[a] = factor_pair(factors, rotated + 2 * a);
}
template <int D, int ROTATION, bool CALIBRATED>
INLINE void read_output_factors(thread lane_factors<D>& f, const device float* factors, uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  const int first = first_channel<D, ROTATION>(lane);
  UNROLL for (int a = 0; a < points_of(D); a++) {
    f.after[a] = factor_pair(factors + (CALIBRATED ? D : 0), first + a * STEP);
    if (CALIBRATED) f.mu[a] = factor_pair(factors + 2 * D, first + a * STEP);
  }
}

// Reads a lane's channels of one row: codes from word FIRST, their high bits, if they have 3 or
// 5 bits, from half HIGH of the row, scales from half SCALE after word CODES.
template <
    int D, int BITS, int GROUP, int ROTATION, bool HALF_STEP, int FIRST, int HIGH, int CODES,
    int SCALE>
INLINE void read_levels(thread float2* z, const device uint* row, uint lane) {
  constexpr int READ = wide_bits(BITS);
  const int first = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  if (points_of(D) % 4 == 0) {
    UNROLL for (int i = 0; i < points_of(D) / 4; i++) {
      const int c = first + 8 * i;
      uint words[READ / 4];
      UNROLL for (int w = 0; w < READ / 4; w++) {
        words[w] = code_word<BITS, FIRST, HIGH>(row, c / (32 / READ) + w);
      }
      float x[8];
      eight_levels<READ, HALF_STEP>(x, words, row_scale(row + CODES, SCALE + c / GROUP));
      UNROLL for (int a = 0; a < 4; a++) z[4 * i + a] = float2(x[2 * a], x[2 * a + 1]);
    }
  } else {
    constexpr float middle = float(1 << (READ - 1)) - (HALF_STEP ? 0.5f : 0.0f);
    constexpr uint mask = uint((1 << READ) - 1);
    UNROLL for (int a = 0; a < points_of(D); a++) {  // two codes are never in two words
      const int c = first + 2 * a;
      const uint word = code_word<BITS, FIRST, HIGH>(row, c / (32 / READ)) >> uint(c * READ % 32);
      const float scale = row_scale(row + CODES, SCALE + c / GROUP);
      z[a] = float2(
          (float(word & mask) - middle) * scale, (float((word >> READ) & mask) - middle) * scale);
    }
  }
}

// Restores the keys or the values of a head's rows by one SIMD group: every `workers`-th set of as
// many rows as it holds vectors, from set `worker` on. Rows from `exact` on come from `tail`, whose
// first token is row `exact`; its tokens are `by_token` channels apart. Of the others, `firsts` rows
// from row `place` on come from `first`.
template <
    int D, int BITS, int GROUP, int ROTATION, bool CALIBRATED, bool HALF_STEP, int FIRST, int HIGH,
    int CODES, int SCALE, int W, bool TAIL, bool WITH_FIRST, typename T, typename S>
INLINE void restore_vectors(
    device T* out,
    const device uint* rows,
    int length,
    const device S* tail,
    int64_t by_token,
    int exact,
    const device S* first_tokens,
    int64_t by_first,
    int firsts,
    int place,
    int worker,
    int workers,
    const device float* table,
    int head,
    uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  constexpr int SET = vectors_of(D);
  const int v = int(lane) / lanes_of(D);
  const int first = first_channel<D, ROTATION>(lane);
  const int rotated = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  lane_table<D> w;
  lane_factors<D> f;
  read_table<D, ROTATION>(w, table, lane);
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  if (HOLD_TABLES != 0) {
    if (CALIBRATED) read_rotated_factors<D, ROTATION>(f, factors, lane);
    read_output_factors<D, ROTATION, CALIBRATED>(f, factors, lane);
  }
  for (int set = worker; set * SET < length; set += workers) {
    const int at = set * SET + v;
    // Where registers are few, a turn computes its addresses again.
    const uint own_lane = HOLD_TABLES != 0 ? lane : lane + uint(unknown_zero(at));
    const int row = min(at, length - 1);
    float2 z[points_of(D)];
    lane_factors<D> own;
    const thread lane_factors<D>& g = HOLD_TABLES != 0 ? f : own;
    const bool is_first = WITH_FIRST && row >= place && row < place + firsts;
    if ((TAIL && row >= exact) || is_first) {
      const device S* y = rotated +
          (TAIL && row >= exact ? tail + (row - exact) * by_token
                                : first_tokens + (row - place) * by_first);
      UNROLL for (int a = 0; a < points_of(D); a++) {
        z[a] = float2(float(y[2 * a]), float(y[2 * a + 1]));
      }
    } else {
      read_levels<D, BITS, GROUP, ROTATION, HALF_STEP, FIRST, HIGH, CODES, SCALE>(
          z, rows + int64_t(row) * W, own_lane);
    }
    if (CALIBRATED) {
      if (HOLD_TABLES == 0) read_rotated_factors<D, ROTATION>(own, factors, own_lane);
      UNROLL for (int a = 0; a < points_of(D); a++) {
        z[a] = float2(z[a].x * g.before[a].x, z[a].y * g.before[a].y);
      }
    }
    rotate_back<D, ROTATION>(z, w, table, own_lane);
    if (at < length) {
      device T* to = out + int64_t(at) * D + first;
      if (HOLD_TABLES == 0) read_output_factors<D, ROTATION, CALIBRATED>(own, factors, own_lane);
      UNROLL for (int a = 0; a < points_of(D); a++) {
        z[a] = float2(z[a].x * g.after[a].x, z[a].y * g.after[a].y);
        if (CALIBRATED) z[a] = float2(z[a].x + g.mu[a].x, z[a].y + g.mu[a].y);
      }
      keep_finite<points_of(D)>(out, z);
      UNROLL for (int a = 0; a < points_of(D); a++) write_two(to + a * STEP, z[a]);
    }
  }
}

// Copies L tokens of a chunk, `by_token` apart, channels `stride` apart, to the output.
template <int D, int ROTATION, typename T, typename S>
INLINE void copy_tokens(
    device T* out,
    const device S* x,
    int64_t by_token,
    int64_t stride,
    int L,
    int worker,
    int workers,
    uint lane) {
  constexpr int SET = vectors_of(D);
  const int first = first_channel<D, ROTATION>(lane);
  for (int set = worker; set * SET < L; set += workers) {
    const int token = set * SET + int(lane) / lanes_of(D);
    if (token < L) {
      float2 z[points_of(D)];
      read_points<D, ROTATION>(
          z, x + token * by_token, stride, HOLD_TABLES != 0 ? 0 : unknown_zero(token), lane);
      if (sizeof(S) > sizeof(T)) keep_finite<points_of(D)>(out, z);
      UNROLL for (int a = 0; a < points_of(D); a++) {
        write_two(out + int64_t(token) * D + first + a * point_step(D, ROTATION), z[a]);
      }
    }
  }
}

}  // namespace kvq
