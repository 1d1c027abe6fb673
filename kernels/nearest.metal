// Keys rounded to the nearest level, as `pack_vectors` does by itself. feedback.metal has the same
// function for keys rounded with feedback; mlx_kvq/ops/gpu/jit.py takes one of the two.
namespace kvq {

template <
    int V, int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES,
    int SCALE, int W>
INLINE void store_with_feedback(
    device uint*, threadgroup float2*, threadgroup float2*, int, const device float*, uint) {}

}  // namespace kvq
