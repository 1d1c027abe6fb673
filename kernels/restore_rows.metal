// restore: packed rows -> keys [B, H, length, KD] and values [B, H, length, VD] as the model made
// them, R^T(y / lambda) sigma + mu, for prefill: MLX's own attention then needs no rotated queries.
//
// Layout: rows uint32 [B, H, capacity, W], any batch and head strides; outputs row contiguous. If
//   TAIL, the last R rows, or all, are those of tail [B, H, R, KD + VD]. If FIRST, others from row
//   first_at[b] (if PLACES, else of info) on are those of first [B, H, F, KD + VD]. If CHUNK,
//   tokens of new_k and new_v [B, H, L, D], any strides, follow the rows in the outputs, as they
//   are.
// Grid: (any number, B * H) threadgroups of two pairs of SIMD groups. The even one of a pair does
//   keys, the odd one values, as in quantize_pack.metal.
// Limits: head sizes as quantize_pack. fp32 arithmetic, rounded once.
constexpr int PAIRS = 2;  // as in mlx_kvq/ops/gpu

const uint lane = thread_index_in_simdgroup;
const int length = info[kvq::LENGTH];
const int H = rows_shape[1];
const device float* k_table = tables;
const auto v_table = kvq::values_table<KD, ROTATION, K_CALIBRATED>(tables, H);
const int b = int(threadgroup_position_in_grid.y) / H;
const int h = int(threadgroup_position_in_grid.y) % H;
const int worker =
    int(threadgroup_position_in_grid.x) * PAIRS + int(simdgroup_index_in_threadgroup >> 1);
const int workers = int(threadgroups_per_grid.x) * PAIRS;
const auto head_rows = rows + (b * rows_strides[0] + h * rows_strides[1]);
const int exact = TAIL ? length - tail_shape[2] : length;
const auto head_tail = tail + (b * tail_strides[0] + h * tail_strides[1]);
const auto head_first = first + (b * first_strides[0] + h * first_strides[1]);
const int firsts = FIRST ? info[kvq::FIRSTS] : 0;
const int place = PLACES ? int(first_at[b]) : FIRST ? info[kvq::FIRST_AT] : 0;
const int L = CHUNK ? new_k_shape[2] : 0;
const int64_t to = int64_t(threadgroup_position_in_grid.y) * (length + L);

if ((simdgroup_index_in_threadgroup & 1u) == 0) {
  kvq::restore_vectors<
      KD, KB, KG, ROTATION, K_CALIBRATED, HALF_STEP, 0, 2 * HIGHS, CODES, 0, W, TAIL, FIRST>(
      keys + to * KD, head_rows, length, head_tail, tail_strides[2], exact, head_first,
      first_strides[2], firsts, place, worker, workers, k_table, h, lane);
  if (CHUNK) {
    kvq::copy_tokens<KD, ROTATION>(
        keys + (to + length) * KD, new_k + (b * new_k_strides[0] + h * new_k_strides[1]),
        new_k_strides[2], new_k_strides[3], L, worker, workers, lane);
  }
} else {
  kvq::restore_vectors<
      VD, VB, VG, ROTATION, V_CALIBRATED, HALF_STEP, K_WORDS, 2 * HIGHS + K_HALVES, CODES,
      K_SCALES, W, TAIL, FIRST>(
      values + to * VD, head_rows, length, head_tail + KD, tail_strides[2], exact, head_first + KD,
      first_strides[2], firsts, place, worker, workers, v_table, h, lane);
  if (CHUNK) {
    kvq::copy_tokens<VD, ROTATION>(
        values + (to + length) * VD, new_v + (b * new_v_strides[0] + h * new_v_strides[1]),
        new_v_strides[2], new_v_strides[3], L, worker, workers, lane);
  }
}
