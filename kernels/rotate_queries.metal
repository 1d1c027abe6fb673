// rotate_queries: queries [B, Hq, L, KD] -> R(q sigma) / lambda, same shape and dtype, for prefill's
// fused attention in the rotated domain.
//
// Layout: x with any strides; out row contiguous. info: query heads per KV head.
// Grid: threadgroups of 4 SIMD groups, each of which does as many vectors as it holds.
// Limits: head sizes as quantize_pack. fp32 arithmetic, rounded once.
const uint lane = thread_index_in_simdgroup;
const int Hq = x_shape[1];
const int L = x_shape[2];
const int count = x_shape[0] * Hq * L;
const int first = (int(threadgroup_position_in_grid.x) * 4 + int(simdgroup_index_in_threadgroup)) *
    kvq::vectors_of(KD);
const auto at = kvq::place_of<KD>(
    first, count, Hq, L, x_strides[0], x_strides[1], x_strides[2], lane);
float2 z[kvq::points_of(KD)];
kvq::rotate_vector<KD, ROTATION, K_CALIBRATED>(
    z, x + at.offset, x_strides[3], at.valid, table, at.head / info[kvq::HEADS], lane);
if (at.valid) {
  kvq::keep_finite<kvq::points_of(KD)>(out, z);
  kvq::write_points<KD, ROTATION>(out + int64_t(at.row) * KD, z, lane);
}
