// combine: merge the splits' partial sums, invert the values' rotation, write the output.
//
// Layout: partial [B, Hq, L, splits * (VD + 2)] from attend_store; out [B, Hq, L, VD] in the
//   query's dtype. info, tables and sinks as in attend.
// Grid: one threadgroup of NSG SIMD groups per output row. SIMD groups take splits in turn, AHEAD
//   of them in flight; their sums are added in threadgroup memory and the first SIMD group inverts
//   the rotation.
// Limits: as attend.
threadgroup float merged[NSG * VD];

const uint lane = thread_index_in_simdgroup;
const int group = int(simdgroup_index_in_threadgroup);
const int heads = info[kvq::HEADS];
const int L = info[kvq::QUERIES];
const float scale = as_type<float>(info[kvq::SCALE]);
const int row = int(threadgroup_position_in_grid.x);
const int splits = partial_shape[3] / (VD + 2);
const int head = row / L % q_shape[1];
const int kv_head = head / heads;
const auto row_partial = partial + int64_t(row) * partial_shape[3];
const auto row_statistics = row_partial + splits * VD;
const device float* k_table = tables;
const auto v_table = kvq::values_table<KD, ROTATION, K_CALIBRATED>(tables, q_shape[1] / heads);

float top = -3e38f;
for (int s = int(lane); s < splits; s += 32) top = max(top, row_statistics[2 * s]);
top = simd_max(top);
float total = 0.0f;
for (int s = int(lane); s < splits; s += 32) {
  total += row_statistics[2 * s + 1] * fast::exp2(row_statistics[2 * s] - top);
}
total = simd_sum(total);

constexpr int PAIRS = (VD / 2 + 31) / 32;  // of channels, of a lane
float2 sums[PAIRS];
UNROLL for (int i = 0; i < PAIRS; i++) sums[i] = float2(0.0f, 0.0f);
for (int s = group; s < splits; s += NSG * AHEAD) {
  float2 ahead[AHEAD][PAIRS];
  float factors[AHEAD];
  UNROLL for (int j = 0; j < AHEAD; j++) {
    const int from = min(s + j * NSG, splits - 1);
    const float f = fast::exp2(row_statistics[2 * from] - top);
    factors[j] = s + j * NSG < splits ? f : 0.0f;
    UNROLL for (int i = 0; i < PAIRS; i++) {
      const int c = min(2 * (32 * i + int(lane)), VD - 2);
      ahead[j][i] = kvq::pair_at(row_partial + int64_t(from) * VD + c);
    }
  }
  UNROLL for (int j = 0; j < AHEAD; j++) {
    UNROLL for (int i = 0; i < PAIRS; i++) {
      sums[i] = float2(
          sums[i].x + factors[j] * ahead[j][i].x, sums[i].y + factors[j] * ahead[j][i].y);
    }
  }
}
UNROLL for (int i = 0; i < PAIRS; i++) {
  const int c = 2 * (32 * i + int(lane));
  if (c < VD) {
    merged[group * VD + c] = sums[i].x;
    merged[group * VD + c + 1] = sums[i].y;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int c = int(thread_position_in_threadgroup.x); c < VD; c += 32 * NSG) {
  float x = merged[c];
  UNROLL for (int g = 1; g < NSG; g++) x += merged[g * VD + c];
  merged[c] = x;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (group == 0) {
  kvq::finish_query<KD, VD, ROTATION, K_CALIBRATED, K_CENTRED, V_CALIBRATED, SINKS, false>(
      out + int64_t(row) * VD,
      merged,
      float2(top, total),
      SINKS ? float(sinks[head]) : 0.0f,
      q + (row / (q_shape[1] * L) * q_strides[0] + head * q_strides[1] + row % L * q_strides[2]),
      q_strides[3],
      k_table,
      v_table,
      nullptr,
      kv_head,
      scale,
      lane);
}
