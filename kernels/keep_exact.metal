// keep_exact: the exact tail moved on by new keys and values [B, H, L, D]; one launch, that of a decode
// step.
//
// kept [B, H, KEPT, KD + VD], the newest token last: y = lambda * R((x - mu) / sigma) of the new tokens;
//   older ones from tail [B, H, R, KD + VD]. keep holds KEPT, at least L.
// Layout: k, v with any strides.
// Grid: (any number, B * H) threadgroups of PAIRS pairs of SIMD groups. The first pair takes a set of
//   as many tokens as a SIMD group holds vectors, the even group keys, the odd one values; the
//   others take further sets and copy older tokens.
// Limits: those of quantize_pack.
// Reasons: a row is not read before its token leaves the tail. quantize_pack makes up to 64 rows at once of
//   what the tail has, the same bits as a prompt's: a search for scales, or a chain of feedback, is
//   paid once in as many steps.
constexpr int SET =
    kvq::vectors_of(KD) < kvq::vectors_of(VD) ? kvq::vectors_of(KD) : kvq::vectors_of(VD);
constexpr int K_SHARED = kvq::swapped_points(KD, ROTATION);
constexpr int V_SHARED = kvq::swapped_points(VD, ROTATION);
constexpr int CHANNELS = KD + VD;

threadgroup float2 shared[PAIRS * (K_SHARED + V_SHARED) + 1];

const uint lane = thread_index_in_simdgroup;
const int pair = int(simdgroup_index_in_threadgroup >> 1);
const int H = k_shape[1];
const int L = k_shape[2];
const int b = int(threadgroup_position_in_grid.y) / H;
const int h = int(threadgroup_position_in_grid.y) % H;
const int worker = int(threadgroup_position_in_grid.x) * PAIRS + pair;
const int workers = int(threadgroups_per_grid.x) * PAIRS;
const auto own = shared + pair * (K_SHARED + V_SHARED);
const int older = keep[kvq::KEPT] - L;  // tokens of the tail that stay
const auto head_kept =
    kept + int64_t(threadgroup_position_in_grid.y) * keep[kvq::KEPT] * CHANNELS;
// All but the first pair copy older tokens: the first one is busy with a single new token.
const int copiers = max(workers - 1, 1) * 64;
const int copier = (workers > 1 ? worker - 1 : 0) * 64 + int(thread_position_in_threadgroup.x & 63u);
if (copier >= 0) {
  kvq::copy_tokens<CHANNELS>(
      head_kept,
      tail + (b * tail_strides[0] + h * tail_strides[1] + (tail_shape[2] - older) * tail_strides[2]),
      int(tail_strides[2]), older, copier, copiers);
}
const auto new_kept = head_kept + int64_t(older) * CHANNELS;
if ((simdgroup_index_in_threadgroup & 1u) == 0) {
  kvq::keep_vectors<KD, ROTATION, K_CALIBRATED, K_SCALED, SET, CHANNELS>(
      new_kept, k + (b * k_strides[0] + h * k_strides[1]), k_strides[2], k_strides[3], L, worker,
      workers, own, tables, h, lane);
} else {
  kvq::keep_vectors<VD, ROTATION, V_CALIBRATED, V_SCALED, SET, CHANNELS>(
      new_kept + KD, v + (b * v_strides[0] + h * v_strides[1]), v_strides[2], v_strides[3], L, worker,
      workers, own + K_SHARED, kvq::values_table<KD, ROTATION, K_CALIBRATED>(tables, H), h, lane);
}
