// End of attend with several splits on CUDA, after attend_store.metal: the last threadgroup of a
// query block to finish merges the partial sums. A second launch would cost about 17 us of host
// time through MLX, more than this merge.
//
// `arrivals` holds a zero for each query block; the last threadgroup leaves it so for the next call.
// Metal has no fence for device memory between threadgroups on all systems that MLX supports: Apple
// GPUs take the second launch (combine.metal).
threadgroup bool is_last;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (threadIdx.x == 0) {
  is_last = kvq::is_last_to_arrive(arrivals + blockIdx.z * gridDim.y + blockIdx.y, gridDim.x);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (is_last) {
  constexpr int PAIRS = (VD + 63) / 64;  // of channels, of a lane
  // Loads in flight: each has the latency of L2. Up to 19 splits are usual (`splits` of
  // mlx_kvq/ops/gpu/tuning.py).
  constexpr int AHEAD = PAIRS > 1 ? 20 : 32;
  for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
    const int row = first_row + r;
    const int head = kv_head * heads + kvq::quotient(row, L);
    const int token = row - kvq::quotient(row, L) * L;
    const int64_t at_row = (int64_t(b) * q_shape[1] + kv_head * heads) * L + row;
    const float* row_partial = partial + at_row * (splits * (VD + 2));
    const float2* row_statistics = reinterpret_cast<const float2*>(row_partial + splits * VD);
    float row_top = -3e38f, row_total = 0.0f;
    float2 row_sums[PAIRS];
    UNROLL for (int i = 0; i < PAIRS; i++) row_sums[i] = float2(0.0f, 0.0f);
    ROLLED for (int first = 0; first < splits; first += AHEAD) {
      // Maximum and total of a lane's split, and channels of each split: asked for together.
      const int count = min(AHEAD, splits - first);
      float2 own = float2(-3e38f, 0.0f);
      if (int(lane) < count) own = __ldcg(row_statistics + first + int(lane));
      const float2* from = reinterpret_cast<const float2*>(row_partial + first * VD) + int(lane);
      float2 ahead[AHEAD][PAIRS];
      UNROLL for (int j = 0; j < AHEAD; j++) {
        UNROLL for (int i = 0; i < PAIRS; i++) {
          ahead[j][i] = float2(0.0f, 0.0f);
          if (j < count && 64 * i + 2 * int(lane) < VD) {
            ahead[j][i] = __ldcg(from + j * (VD / 2) + 32 * i);
          }
        }
      }
      const float new_top = max(row_top, simd_max(own.x));
      const float back = fast::exp2(row_top - new_top);
      const float f = fast::exp2(own.x - new_top);
      row_total = row_total * back + f * own.y;
      UNROLL for (int i = 0; i < PAIRS; i++) {
        row_sums[i] = float2(row_sums[i].x * back, row_sums[i].y * back);
      }
      UNROLL for (int j = 0; j < AHEAD; j++) {
        const float g = j < count ? simd_shuffle(f, ushort(j)) : 0.0f;
        UNROLL for (int i = 0; i < PAIRS; i++) {
          row_sums[i].x += g * ahead[j][i].x;
          row_sums[i].y += g * ahead[j][i].y;
        }
      }
      row_top = new_top;
    }
    kvq::output_factors<VD> output;
    kvq::read_output_factors<VD, ROTATION, V_CALIBRATED>(output, v_table, kv_head, lane);
    row_total = simd_sum(row_total);
    UNROLL for (int i = 0; i < PAIRS; i++) {
      const int c = 64 * i + 2 * int(lane);
      if (c < VD) {
        merged[r * VD + c] = row_sums[i].x;
        merged[r * VD + c + 1] = row_sums[i].y;
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    kvq::finish_query<KD, VD, ROTATION, K_CALIBRATED, K_CENTRED, V_CALIBRATED, SINKS, true>(
        out + ((int64_t(b) * q_shape[1] + head) * L + token) * VD,
        merged + r * VD,
        float2(row_top, row_total),
        SINKS ? float(sinks[head]) : 0.0f,
        q + (b * q_strides[0] + head * q_strides[1] + token * q_strides[2]),
        q_strides[3],
        k_table,
        v_table,
        &output,
        kv_head,
        scale,
        lane);
  }
}
