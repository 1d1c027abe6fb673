// quantize_pack: new keys and values [B, H, L, D] -> packed rows uint32 [B, H, L, W], one launch.
//
// Per vector: y = lambda * R((x - mu) / sigma), a scale per group, codes, packed (layout.py).
// Layout: k, v with any strides, read once; rows written once.
// Grid: threadgroups of PAIRS pairs of SIMD groups. The even one of a pair does the keys of SET
//   rows in a row, the odd one their values: as many as a SIMD group holds vectors, 4 at D = 128.
// Limits: head sizes 32 to 256 with D / 2 = r * 2^m, r <= 9; PAIRS at most 4 (256 threads).
// Reasons: a vector on 8 lanes of 16 channels each, not on 32 of 4, because all 32 lanes then
//   quantize, in registers, and the FFT has 3 stages of shuffles, not 5. With a SIMD group per
//   vector 2.0 ns a vector (H100, D = 128); figures of this version in docs/performance.md.
// Source: arXiv 2605.05699, section 4 (one fused pass); levels and search are the project's.
constexpr int K_WORDS = KD * KB / 32;
constexpr int CODES = K_WORDS + VD * VB / 32;
constexpr int SCALES = KD / KG + VD / VG;
constexpr int W = CODES + (SCALES + 1) / 2;
constexpr int SET =
    kvq::vectors_of(KD) < kvq::vectors_of(VD) ? kvq::vectors_of(KD) : kvq::vectors_of(VD);
constexpr int K_SHARED = kvq::groups_are_lanes(KD, KG) ? 0 : SET * KD;
constexpr int V_SHARED = kvq::groups_are_lanes(VD, VG) ? 0 : SET * VD;

threadgroup float shared[PAIRS * (K_SHARED + V_SHARED) + 1];

const uint lane = thread_index_in_simdgroup;
const int pair = int(simdgroup_index_in_threadgroup >> 1);
const int H = k_shape[1];
const int L = k_shape[2];
const int count = k_shape[0] * H * L;
const int first = (int(threadgroup_position_in_grid.x) * PAIRS + pair) * SET;
const int filled = min(SET, count - first);  // in the last threadgroup perhaps none
const auto own = shared + pair * (K_SHARED + V_SHARED);

if ((simdgroup_index_in_threadgroup & 1u) == 0) {
  const auto at =
      kvq::place_of<KD>(first, filled, H, L, k_strides[0], k_strides[1], k_strides[2], lane);
  kvq::pack_vectors<KD, KB, KG, RULE, ROTATION, K_CALIBRATED, 0, CODES, 0, W>(
      rows, k, k_strides[3], at, first, filled, own, k_table, lane);
} else {
  const auto at =
      kvq::place_of<VD>(first, filled, H, L, v_strides[0], v_strides[1], v_strides[2], lane);
  kvq::pack_vectors<VD, VB, VG, RULE, ROTATION, V_CALIBRATED, K_WORDS, CODES, KD / KG, W>(
      rows, v, v_strides[3], at, first, filled, own + K_SHARED, v_table, lane);
  if (SCALES % 2 == 1) {
    for (int i = int(lane); i < filled; i += 32) {
      kvq::halves_of(rows + int64_t(first + i) * W + W - 1)[1] = 0;
    }
  }
}
