// quantize_pack: new keys and values [B, H, L, D] -> packed rows uint32 [B, H, L, W], one launch.
//
// Per vector: y = lambda * R((x - mu) / sigma), a scale per group, codes, packed (layout.py).
// Layout: k, v with any strides, read once; rows written once, in whole words.
// Grid: a threadgroup packs ROWS rows with 2 * ROWS SIMD groups: the even one of a pair rotates
//   and quantizes the key, the odd one the value, so a decode step waits for one vector, not two.
// Limits: head sizes 32 to 256 with D / 2 = r * 2^m, r <= 9; ROWS at most 4 (256 threads).
// Source: arXiv 2605.05699, section 4 (one fused pass); levels and search are the project's.
constexpr int K_WORDS = KD * KB / 32;
constexpr int CODES = K_WORDS + VD * VB / 32;
constexpr int SCALES = KD / KG + VD / VG;
constexpr int W = CODES + (SCALES + 1) / 2;
constexpr int DMAX = KD > VD ? KD : VD;

threadgroup float rotated[ROWS * 2 * DMAX];
threadgroup uint packed[ROWS * W];

const uint lane = thread_index_in_simdgroup;
const int slot = int(simdgroup_index_in_threadgroup >> 1);
const int H = k_shape[1];
const int L = k_shape[2];
const int count = k_shape[0] * H * L;
const int first = int(threadgroup_position_in_grid.x) * ROWS;
const int row = min(first + slot, count - 1);  // the last threadgroup may repeat a row
const int b = row / (H * L);
const int h = row / L % H;
const int l = row % L;

auto y = rotated + int(simdgroup_index_in_threadgroup) * DMAX;
auto words = packed + slot * W;
auto scales = kvq::halves_of(words + CODES);

if ((simdgroup_index_in_threadgroup & 1u) == 0) {
  const auto x = k + (b * k_strides[0] + h * k_strides[1] + l * k_strides[2]);
  kvq::rotate_vector<KD, ROTATION, K_CALIBRATED>(y, x, k_strides[3], k_table, h, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  kvq::quantize_vector<KD, KB, KG, RULE>(y, words, scales, lane);
} else {
  const auto x = v + (b * v_strides[0] + h * v_strides[1] + l * v_strides[2]);
  kvq::rotate_vector<VD, ROTATION, V_CALIBRATED>(y, x, v_strides[3], v_table, h, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  kvq::quantize_vector<VD, VB, VG, RULE>(y, words + K_WORDS, scales + KD / KG, lane);
  if (SCALES % 2 == 1 && lane == 0) {
    scales[SCALES] = 0;
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);
const int filled = min(ROWS, count - first) * W;
for (int i = int(thread_position_in_threadgroup.x); i < filled; i += 64 * ROWS) {
  rows[int64_t(first) * W + i] = packed[i];
}
