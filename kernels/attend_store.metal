// End of attend with several splits: write partial sums for combine.metal or attend_join.cuh.
//
// partial [B, Hq, L, splits * (VD + 2)], fp32: sums [splits, VD], unnormalised, in the rotated
// domain, then maximum and total [splits, 2]. fp16 sums would overflow on outlier values. One
// array, because each array costs the host time.
const int rows_left =
    numbers[kvq::AT_HEADS] * numbers[kvq::AT_QUERIES] - numbers[kvq::AT_FIRST_ROW];
for (int r = group; r < min(8, rows_left); r += NSG) {
  const int own_heads = numbers[kvq::AT_HEADS];
  const int own_L = numbers[kvq::AT_QUERIES];
  const int own_split = numbers[kvq::AT_SPLIT];
  const int own_splits = numbers[kvq::AT_SPLITS];
  const int row = numbers[kvq::AT_FIRST_ROW] + r;
  const int64_t head =
      int64_t(numbers[kvq::AT_BATCH]) * q_shape[1] + numbers[kvq::AT_KV_HEAD] * own_heads;
  const auto sums = partial + (head * own_L + row) * (own_splits * (VD + 2));
  for (int c = int(lane); c < VD; c += 32) {
    sums[own_split * VD + c] = merged[r * VD + c];
  }
  if (lane == 0) {
    const float2 statistics = kvq::join_statistics<NSG>(maxima, totals, r);
    sums[own_splits * VD + 2 * own_split] = statistics.x;
    sums[own_splits * VD + 2 * own_split + 1] = statistics.y;
  }
}
