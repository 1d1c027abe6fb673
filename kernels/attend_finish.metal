// End of attend with one split: normalise, invert the values' rotation, write the output.
for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
  const int row = first_row + r;
  const int head = kv_head * heads + row / L;
  kvq::finish_query<KD, VD, ROTATION, K_CALIBRATED, K_CENTRED, V_CALIBRATED, SINKS>(
      out + ((int64_t(b) * q_shape[1] + head) * L + row % L) * VD,
      merged + r * VD,
      kvq::join_statistics<NSG>(maxima, totals, r),
      SINKS ? float(sinks[head]) : 0.0f,
      q + (b * q_strides[0] + head * q_strides[1] + row % L * q_strides[2]),
      q_strides[3],
      k_table,
      v_table,
      kv_head,
      scale,
      lane);
}
