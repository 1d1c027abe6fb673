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

// Two neighbouring factors; c is even, and so is every offset in a table.
inline float2 factor_pair(const device float* factors, int c) {
  return reinterpret_cast<const device float2*>(factors)[c / 2];
}

// z = (x - mu) * before, as the rotation wants it; x of any type and stride.
template <int D, int ROTATION, bool CENTRED, typename P>
inline void read_vector(
    thread float2* z,
    P x,
    int64_t stride,
    const device float* factors,
    uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  const int first = first_channel<D, ROTATION>(lane);
  if (stride == 1) {  // the offsets are constants
    UNROLL for (int a = 0; a < points_of(D); a++) {
      z[a] = float2(float(x[first + a * STEP]), float(x[first + a * STEP + 1]));
    }
  } else {
    UNROLL for (int a = 0; a < points_of(D); a++) {
      z[a] = float2(
          float(x[(first + a * STEP) * stride]), float(x[(first + a * STEP + 1) * stride]));
    }
  }
  UNROLL for (int a = 0; a < points_of(D); a++) {
    if (CENTRED) {
      const float2 mu = factor_pair(factors + 2 * D, first + a * STEP);
      z[a] = float2(z[a].x - mu.x, z[a].y - mu.y);
    }
    const float2 f = factor_pair(factors, first + a * STEP);
    z[a] = float2(z[a].x * f.x, z[a].y * f.y);
  }
}

// z *= after, in the order of channels that the rotation leaves.
template <int D, int ROTATION, bool CALIBRATED>
inline void scale_rotated(thread float2* z, const device float* factors, uint lane) {
  if (CALIBRATED) {
    const int first = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
    UNROLL for (int a = 0; a < points_of(D); a++) {
      const float2 f = factor_pair(factors + D, first + 2 * a);
      z[a] = float2(z[a].x * f.x, z[a].y * f.y);
    }
  }
}

// x -> lambda * R((x - mu) / sigma), as the rotation leaves it, or what another table's factors
// make of it; zeros where not `valid`.
template <int D, int ROTATION, bool CALIBRATED, bool CENTRED, typename T>
inline void rotate_vector(
    thread float2* z,
    const device T* x,
    int64_t stride,
    bool valid,
    const device float* table,
    int head,
    uint lane) {
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  UNROLL for (int a = 0; a < points_of(D); a++) z[a] = float2(0.0f, 0.0f);
  if (valid) {
    read_vector<D, ROTATION, CENTRED>(z, x, stride, factors, lane);
  }
  rotate<D, ROTATION>(z, table, lane);
  scale_rotated<D, ROTATION, CALIBRATED>(z, factors, lane);
}

// Where a lane's vector is: vector v of the SIMD group is row number first + v of [B, H, L].
struct vector_place {
  int v;
  bool valid;
  int row;
  int head;
  int64_t offset;  // of its first channel in a strided array
};

template <int D>
inline vector_place place_of(
    int first, int filled, int H, int L, int64_t by_batch, int64_t by_head, int64_t by_token,
    uint lane) {
  vector_place at;
  at.v = int(lane) / lanes_of(D);
  at.valid = at.v < filled;
  at.row = at.valid ? first + at.v : 0;
  at.head = at.row / L % H;
  at.offset = at.row / (H * L) * by_batch + at.head * by_head + at.row % L * by_token;
  return at;
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
// The lanes of one vector do it, in a SIMD group of which every lane is here; those that only
// repeat another's work do not `write`.
template <int D, int ROTATION, bool CALIBRATED, typename T, typename P>
inline void finish_row(
    device T* out,
    P sums,
    int64_t stride,
    float2 normal,
    const device float* table,
    int head,
    bool write,
    uint lane) {
  constexpr int STEP = point_step(D, ROTATION);
  const device float* factors = factors_of<D, ROTATION, CALIBRATED>(table, head);
  const device float* after = factors + (CALIBRATED ? D : 0);
  float2 z[points_of(D)];
  const int rotated = 2 * points_of(D) * rotated_block<D, ROTATION>(lane);
  UNROLL for (int a = 0; a < points_of(D); a++) {
    const int c = rotated + 2 * a;
    z[a] = float2(
        float(sums[c * stride]) * normal.x, float(sums[(c + 1) * stride]) * normal.x);
    if (CALIBRATED) {
      const float2 f = factor_pair(factors, c);
      z[a] = float2(z[a].x * f.x, z[a].y * f.y);
    }
  }
  rotate_back<D, ROTATION>(z, table, lane);
  if (write) {
    const int first = first_channel<D, ROTATION>(lane);
    UNROLL for (int a = 0; a < points_of(D); a++) {
      const int c = first + a * STEP;
      const float2 f = factor_pair(after, c);
      float2 o = float2(z[a].x * f.x, z[a].y * f.y);
      if (CALIBRATED) {
        const float2 mu = factor_pair(factors + 2 * D, c);
        o = float2(o.x + mu.x * normal.y, o.y + mu.y * normal.y);
      }
      out[c] = T(o.x);
      out[c + 1] = T(o.y);
    }
  }
}

}  // namespace kvq
