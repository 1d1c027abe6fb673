// End of attend with several splits: for each query partial sums [splits, VD], unnormalised, in the
// rotated domain, and after them their maximum and total [splits, 2], all fp32: fp16 partial sums
// overflow on outlier values. One array, since each costs the host time. combine.metal goes on.
for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
  const int row = first_row + r;
  float row_top = maxima[r];
  for (int g = 1; g < NSG; g++) row_top = max(row_top, maxima[8 * g + r]);
  const auto sums =
      partial + ((int64_t(b) * q_shape[1] + kv_head * heads) * L + row) * (splits * (VD + 2));
  for (int c = int(lane); c < VD; c += 32) {
    sums[split * VD + c] = merged[r * VD + c];
  }
  if (lane == 0) {
    float row_total = 0.0f;
    for (int g = 0; g < NSG; g++) {
      row_total += totals[8 * g + r] * fast::exp2(maxima[8 * g + r] - row_top);
    }
    sums[splits * VD + 2 * split] = row_top;
    sums[splits * VD + 2 * split + 1] = row_total;
  }
}
