// End of attend with several splits on CUDA, after attend_store.metal: the last threadgroup of a
// query block to finish merges the partial sums. A second launch would cost about 17 us of host
// time through MLX, more than this merge.
//
// `arrivals` holds a zero for each query block; atomicInc resets it for the next call. Metal has no
// fence for device memory between threadgroups on all systems that MLX supports: Apple GPUs take
// the second launch (combine.metal).
threadgroup bool is_last;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (threadIdx.x == 0) {
  __threadfence();  // of what all have written: the barrier puts it before this
  uint* arrived = const_cast<uint*>(arrivals) + blockIdx.z * gridDim.y + blockIdx.y;
  is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  __threadfence();
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (is_last) {
  constexpr int CHANNELS = (VD + 31) / 32;
  // Loads in flight: each has the latency of L2. Up to 19 splits are usual (`splits` of
  // mlx_kvq/ops/gpu/tuning.py).
  constexpr int AHEAD = CHANNELS > 2 ? 20 : 32;
  for (int r = group; r < min(8, query_rows - first_row); r += NSG) {
    const int row = first_row + r;
    const int head = kv_head * heads + kvq::quotient(row, L);
    const int token = row - kvq::quotient(row, L) * L;
    const int64_t at_row = (int64_t(b) * q_shape[1] + kv_head * heads) * L + row;
    const float* row_partial = partial + at_row * (splits * (VD + 2));
    const float* row_statistics = row_partial + splits * VD;
    float row_top = -3e38f, row_total = 0.0f;
    float row_sums[CHANNELS];
    UNROLL for (int i = 0; i < CHANNELS; i++) row_sums[i] = 0.0f;
    ROLLED for (int first = 0; first < splits; first += AHEAD) {
      // Maximum and total of a lane's split, and a channel of each split: asked for together.
      const int count = min(AHEAD, splits - first);
      const bool mine = int(lane) < count;
      const float own_top = mine ? __ldcg(row_statistics + 2 * (first + int(lane))) : -3e38f;
      const float own_total = mine ? __ldcg(row_statistics + 2 * (first + int(lane)) + 1) : 0.0f;
      const float* from = row_partial + first * VD + int(lane);
      float ahead[AHEAD][CHANNELS];
      UNROLL for (int j = 0; j < AHEAD; j++) {
        UNROLL for (int i = 0; i < CHANNELS; i++) {
          ahead[j][i] = j < count && 32 * i + int(lane) < VD ? __ldcg(from + j * VD + 32 * i) : 0.0f;
        }
      }
      const float new_top = max(row_top, simd_max(own_top));
      const float back = fast::exp2(row_top - new_top);
      const float f = fast::exp2(own_top - new_top);
      row_total = row_total * back + f * own_total;
      UNROLL for (int i = 0; i < CHANNELS; i++) row_sums[i] *= back;
      UNROLL for (int j = 0; j < AHEAD; j++) {
        const float g = j < count ? simd_shuffle(f, ushort(j)) : 0.0f;
        UNROLL for (int i = 0; i < CHANNELS; i++) row_sums[i] += g * ahead[j][i];
      }
      row_top = new_top;
    }
    row_total = simd_sum(row_total);
    UNROLL for (int i = 0; i < CHANNELS; i++) {
      const int c = 32 * i + int(lane);
      if (c < VD) merged[r * VD + c] = row_sums[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    kvq::finish_query<KD, VD, ROTATION, K_CALIBRATED, K_CENTRED, V_CALIBRATED, SINKS>(
        out + ((int64_t(b) * q_shape[1] + head) * L + token) * VD,
        merged + r * VD,
        float2(row_top, row_total),
        SINKS ? float(sinks[head]) : 0.0f,
        q + (b * q_strides[0] + head * q_strides[1] + token * q_strides[2]),
        q_strides[3],
        k_table,
        v_table,
        kv_head,
        scale,
        lane);
  }
}
