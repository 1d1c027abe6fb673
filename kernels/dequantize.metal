// dequantize: packed rows -> keys [B, H, length, KD] and values [B, H, length, VD], still rotated,
// in the query's dtype, for prefill's fused attention.
//
// Layout: rows uint32 [B, H, capacity, W], any batch and head strides; outputs row contiguous. If
//   TAIL, the last R rows, or all, are those of tail [B, H, R, KD + VD]. If FIRST, others from row
//   first_at[b] (if PLACES, else of info) on are those of first [B, H, F, KD + VD].
// Grid: (length / STEPS * (KD + VD) / 8, H, B) threads. A thread makes eight channels of STEPS
//   rows: one word of 4-bit or two words of 8-bit codes each, or half a unit of 3-bit codes.
//   Neighbouring threads write neighbouring 16 bytes in half precision; with a store per channel the
//   kernel took 0.42 TB/s of an H100's 3.
// Limits: head sizes are multiples of 8, length * (KD + VD) / 8 is below 2^31. fp32 arithmetic,
//   rounded once.
constexpr int EIGHTS = (KD + VD) / 8;
constexpr int STEPS = 4;  // as in mlx_kvq/ops/gpu

const int length = info[kvq::LENGTH];
const int h = int(threadgroup_position_in_grid.y);
const int b = int(threadgroup_position_in_grid.z);
const int i = int(threadgroup_position_in_grid.x) * 256 + int(thread_position_in_threadgroup.x);
const int row = i / EIGHTS * STEPS;
const int eight = i % EIGHTS;
const auto head = rows + (b * rows_strides[0] + h * rows_strides[1]);
const int64_t to = (int64_t(b) * rows_shape[1] + h) * length;
const int exact = TAIL ? length - tail_shape[2] : length;  // from this row on
const auto end = tail +
    (b * tail_strides[0] + h * tail_strides[1] - int64_t(exact) * tail_strides[2] + 8 * eight);
const int firsts = FIRST ? info[kvq::FIRSTS] : 0;
const int place = PLACES ? int(first_at[b]) : FIRST ? info[kvq::FIRST_AT] : 0;
const auto begin = first +
    (b * first_strides[0] + h * first_strides[1] - int64_t(place) * first_strides[2] + 8 * eight);
float x[8];
if (eight < KD / 8) {
  uint words[STEPS][K_READ / 4];
  float scales[STEPS];
  UNROLL for (int j = 0; j < STEPS; j++) {
    const auto from = head + int64_t(min(row + j, length - 1)) * W;
    UNROLL for (int w = 0; w < K_READ / 4; w++) {
      words[j][w] = kvq::code_word<KB, 0, 2 * HIGHS>(from, eight * (K_READ / 4) + w);
    }
    scales[j] = kvq::row_scale(from + CODES, eight * 8 / KG);
  }
  UNROLL for (int j = 0; j < STEPS; j++) {
    if (TAIL && row + j >= exact && row + j < length) {
      kvq::convert_eight(keys + ((to + row + j) * KD + 8 * eight), end + (row + j) * tail_strides[2]);
    } else if (FIRST && row + j >= place && row + j < min(place + firsts, length)) {
      kvq::convert_eight(
          keys + ((to + row + j) * KD + 8 * eight), begin + (row + j) * first_strides[2]);
    } else if (row + j < length) {
      kvq::eight_levels<K_READ, HALF_STEP>(x, words[j], scales[j]);
      kvq::write_eight(keys + ((to + row + j) * KD + 8 * eight), x);
    }
  }
} else {
  const int v = eight - KD / 8;
  uint words[STEPS][V_READ / 4];
  float scales[STEPS];
  UNROLL for (int j = 0; j < STEPS; j++) {
    const auto from = head + int64_t(min(row + j, length - 1)) * W;
    UNROLL for (int w = 0; w < V_READ / 4; w++) {
      words[j][w] = kvq::code_word<VB, K_WORDS, 2 * HIGHS + K_HALVES>(from, v * (V_READ / 4) + w);
    }
    scales[j] = kvq::row_scale(from + CODES, K_SCALES + v * 8 / VG);
  }
  UNROLL for (int j = 0; j < STEPS; j++) {
    if (TAIL && row + j >= exact && row + j < length) {
      kvq::convert_eight(values + ((to + row + j) * VD + 8 * v), end + (row + j) * tail_strides[2]);
    } else if (FIRST && row + j >= place && row + j < min(place + firsts, length)) {
      kvq::convert_eight(
          values + ((to + row + j) * VD + 8 * v), begin + (row + j) * first_strides[2]);
    } else if (row + j < length) {
      kvq::eight_levels<V_READ, HALF_STEP>(x, words[j], scales[j]);
      kvq::write_eight(values + ((to + row + j) * VD + 8 * v), x);
    }
  }
}
