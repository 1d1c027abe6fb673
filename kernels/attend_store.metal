// End of attend with several splits: write partial sums for combine.metal or attend_join.cuh.
//
// partial [B, Hq, L, splits * (VD + 2)], fp32: sums [splits, VD], unnormalised, in the rotated domain,
// then maximum and total [splits, 2]. fp16 sums would overflow on outlier values. One array, because
// each array costs the host time.
for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
  const int row = first_row + r;
  const auto sums =
      partial + ((int64_t(b) * q_shape[1] + kv_head * heads) * L + row) * (splits * (VD + 2));
  for (int c = int(lane); c < VD; c += 32) {
    sums[split * VD + c] = merged[r * VD + c];
  }
  if (lane == 0) {
    const float2 statistics = kvq::join_statistics<NSG>(maxima, totals, r);
    sums[splits * VD + 2 * split] = statistics.x;
    sums[splits * VD + 2 * split + 1] = statistics.y;
  }
}
