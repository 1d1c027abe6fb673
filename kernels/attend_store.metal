// End of attend with several splits: partial sums [B, Hq, L, splits, VD], unnormalised, in the
// rotated domain, with their maximum and total [B, Hq, L, splits, 2], all fp32: fp16 partial sums
// overflow on outlier values. combine.metal goes on.
for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
  const int row = first_row + r;
  float row_top = maxima[r];
  for (int g = 1; g < NSG; g++) row_top = max(row_top, maxima[8 * g + r]);
  const int64_t to =
      ((int64_t(b) * q_shape[1] + kv_head * heads) * L + row) * splits + split;
  for (int c = int(lane); c < VD; c += 32) {
    partial[to * VD + c] = merged[r * VD + c];
  }
  if (lane == 0) {
    float row_total = 0.0f;
    for (int g = 0; g < NSG; g++) {
      row_total += totals[8 * g + r] * fast::exp2(maxima[8 * g + r] - row_top);
    }
    statistics[2 * to] = row_top;
    statistics[2 * to + 1] = row_total;
  }
}
