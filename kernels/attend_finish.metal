// End of attend with one split: normalise, invert the values' rotation, write the output.
const int rows_left =
    numbers[kvq::AT_HEADS] * numbers[kvq::AT_QUERIES] - numbers[kvq::AT_FIRST_ROW];
for (int r = group; r < min(8, rows_left); r += NSG) {
  const int own_b = numbers[kvq::AT_BATCH];
  const int own_head = numbers[kvq::AT_KV_HEAD];
  const int own_L = numbers[kvq::AT_QUERIES];
  // Or what the queries' rotation computed of the lane stays in registers until here.
  const uint own_lane = HELD ? lane : lane + uint(kvq::unknown_zero(own_L));
  const auto own_table =
      kvq::values_table<KD, ROTATION, K_CALIBRATED>(tables, numbers[kvq::AT_KV_HEADS]);
  const int row = numbers[kvq::AT_FIRST_ROW] + r;
  const int head = own_head * numbers[kvq::AT_HEADS] + kvq::quotient(row, own_L);
  const int token = row - kvq::quotient(row, own_L) * own_L;
  kvq::finish_query<KD, VD, ROTATION, K_CALIBRATED, K_CENTRED, V_CALIBRATED, SINKS, false>(
      out + ((int64_t(own_b) * q_shape[1] + head) * own_L + token) * VD,
      merged + r * VD,
      kvq::join_statistics<NSG>(maxima, totals, r),
      SINKS ? float(sinks[head]) : 0.0f,
      q + (own_b * q_strides[0] + head * q_strides[1] + token * q_strides[2]),
      q_strides[3],
      k_table,
      own_table,
      nullptr,
      own_head,
      scale,
      own_lane);
}
