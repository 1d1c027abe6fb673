// Vectors on their way through a table's channel factors (mlx_kvq/tables.py): a SIMD group reads,
// centres and scales a vector before the rotation, and finishes an output row after it.
//
// Factors of a calibrated head: D before the rotation, D after it, D of the centre; uncalibrated:
// D signs, shared by all heads, on the unrotated side.
namespace kvq {

template <int D, int ROTATION, bool CALIBRATED>
inline const device float* factors_of(const device float* table, int head) {
  return table + channel_factors(D, ROTATION) + (CALIBRATED ? head * 3 * D : 0);
}

// z = (x - mu) * before, placed by point_index.
template <int D, bool CENTRED, typename T>
inline void read_vector(
    thread float2* z,
    const device T* x,
    int64_t stride,
    const device float* factors,
    uint lane) {
  UNROLL for (int a = 0; a < points_of(D); a++) {
    const int c = 2 * int(point_index<D>(lane, a));
    float re = float(x[c * stride]);
    float im = float(x[(c + 1) * stride]);
    if (CENTRED) {
      re -= factors[2 * D + c];
      im -= factors[2 * D + c + 1];
    }
    z[a] = float2(re * factors[c], im * factors[c + 1]);
  }
}

// z *= after, placed by rotated_index.
template <int D, int ROTATION, bool CALIBRATED>
inline void scale_rotated(thread float2* z, const device float* factors, uint lane) {
  if (CALIBRATED) {
    UNROLL for (int a = 0; a < points_of(D); a++) {
      const int c = 2 * int(rotated_index<D, ROTATION>(lane, a));
      z[a] = float2(z[a].x * factors[D + c], z[a].y * factors[D + c + 1]);
    }
  }
}

// What a row of sums is multiplied with, and the probability that fell on keys, given the
// maximum m of its logits and the sum l of exp2(logit - m); logits in units of log 2.
inline float2 normalise(float m, float l, bool with_sink, float sink) {
  if (with_sink) {
    const float top = max(m, sink);
    const float f = fast::exp2(m - top);
    const float total = l * f + fast::exp2(sink - top);
    return float2(f / total, l * f / total);
  }
  // A query that may attend to nothing has l = 0 and gets 0; a NaN stays one.
  return l == 0.0f ? float2(0.0f, 0.0f) : float2(1.0f / l, 1.0f);
}

// q . mu: what the centre took off every logit, which a sink's logit does not have.
template <int D, typename T>
inline float centre_logit(const device T* q, int64_t stride, const device float* factors, uint lane) {
  float dot = 0.0f;
  for (int c = int(lane); c < D; c += 32) {
    dot += float(q[c * stride]) * factors[2 * D + c];
  }
  return simd_sum(dot);
}

// A sink's logit beside the keys' logits, in units of log 2.
template <int D, int ROTATION, bool CALIBRATED, bool CENTRED, bool SINKS, typename T>
inline float sink_logit(
    float sink,
    const device T* q,
    int64_t stride,
    const device float* table,
    int kv_head,
    float scale,
    uint lane) {
  if (!SINKS) {
    return 0.0f;
  }
  float logit = sink;
  if (CENTRED) {
    const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, kv_head);
    logit -= scale * centre_logit<D>(q, stride, factors, lane);
  }
  return logit * 1.44269504088896f;
}

// One row of attention's output: out = R^T(sums * factor / lambda) * sigma + mu * probability.
template <int D, int ROTATION, bool CALIBRATED, typename T>
inline void finish_row(
    device T* out,
    const threadgroup float* sums,
    float2 normal,
    const device float* table,
    int head,
    uint lane) {
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  const device float* after = factors + (CALIBRATED ? D : 0);
  float2 z[points_of(D)];
  UNROLL for (int a = 0; a < points_of(D); a++) {
    const int c = 2 * int(rotated_index<D, ROTATION>(lane, a));
    z[a] = float2(sums[c] * normal.x, sums[c + 1] * normal.x);
    if (CALIBRATED) {
      z[a] = float2(z[a].x * factors[c], z[a].y * factors[c + 1]);
    }
  }
  rotate_back<D, ROTATION>(z, table, lane);
  if (lane < uint(lanes_of(D / 2))) {
    UNROLL for (int a = 0; a < points_of(D); a++) {
      const int c = 2 * int(point_index<D>(lane, a));
      float re = z[a].x * after[c];
      float im = z[a].y * after[c + 1];
      if (CALIBRATED) {
        re += factors[2 * D + c] * normal.y;
        im += factors[2 * D + c + 1] * normal.y;
      }
      out[c] = T(re);
      out[c + 1] = T(im);
    }
  }
}

}  // namespace kvq
