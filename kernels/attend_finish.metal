// End of attend with one split: normalise, invert the values' rotation, write the output.
for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
  const int row = first_row + r;
  float row_top = maxima[r];
  for (int g = 1; g < NSG; g++) row_top = max(row_top, maxima[8 * g + r]);
  float row_total = 0.0f;
  for (int g = 0; g < NSG; g++) {
    row_total += totals[8 * g + r] * fast::exp2(maxima[8 * g + r] - row_top);
  }
  const int head = kv_head * heads + row / L;
  const float sink = kvq::sink_logit<KD, ROTATION, K_CALIBRATED, K_CENTRED, SINKS>(
      SINKS ? float(sinks[head]) : 0.0f,
      q + (b * q_strides[0] + head * q_strides[1] + row % L * q_strides[2]),
      q_strides[3],
      k_table,
      kv_head,
      scale,
      lane);
  const float2 normal = kvq::normalise(row_top, row_total, SINKS, sink);
  kvq::finish_row<VD, ROTATION, V_CALIBRATED>(
      out + ((int64_t(b) * q_shape[1] + head) * L + row % L) * VD,
      merged + r * VD,
      1,
      normal,
      v_table,
      kv_head,
      lane < uint(kvq::lanes_of(VD)),
      lane);
}
