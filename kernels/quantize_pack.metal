// quantize_pack: new keys and values [B, H, L, D] -> packed rows uint32 [B, H, L, W], one launch.
//
// Per vector: y = lambda * R((x - mu) / sigma), in bf16 if x are, as the tail has it; a scale per
// group, codes, packed (layout.py).
// Layout: k, v with any strides, read once; rows written once.
//   KEEPS: keep holds KEPT and ROWS. y of the newest tokens also goes to kept [B, H, KEPT, KD +
//   VD], newest last. Places for more than L tokens are filled from tail [B, H, R, KD + VD] if
//   TAIL, else with zeros. rows are [B, H, ROWS, W]: the new ones, then zeros.
//   ROTATED: 1 if k and v are y, from a tail; 2 if keep says so at run time, by IS_ROTATED.
//   FEEDBACK: feedback is fp32 [H, KD, KD], row j what an error of a key's channel j adds to the
//   channels before (feedback.metal).
// Grid: (any number, B * H) threadgroups of PAIRS pairs of SIMD groups. The even group of a pair
//   does keys, the odd one values, of sets of as many tokens as a SIMD group holds vectors (4 at D
//   = 128), with the head's factors and twiddles in registers.
// Limits: head sizes 32 to 256 with D / 2 = r * 2^m, r <= 9; PAIRS at most 4 (256 threads).
// Reasons: a vector on 8 lanes of 16 channels each, not on 32 of 4, because all 32 lanes then
//   quantize, in registers, and the FFT at D = 128 is two in-lane ones with a swap through
//   threadgroup memory between them: 141 instructions a vector, 156 with shuffles. Figures in
//   docs/performance.md.
// Source: arXiv 2605.05699, section 4 (one fused pass); levels and search are the project's.
constexpr int SET =
    kvq::vectors_of(KD) < kvq::vectors_of(VD) ? kvq::vectors_of(KD) : kvq::vectors_of(VD);
constexpr int K_SHARED = kvq::shared_points(KD, KG, ROTATION, SET, FEEDBACK);
constexpr int V_SHARED = kvq::shared_points(VD, VG, ROTATION, SET, false);

threadgroup float2 shared[PAIRS * (K_SHARED + V_SHARED) + 1];

const uint lane = thread_index_in_simdgroup;
const int pair = int(simdgroup_index_in_threadgroup >> 1);
const int H = k_shape[1];
const device float* k_table = tables;
const auto v_table = kvq::values_table<KD, ROTATION, K_CALIBRATED>(tables, H);
const int L = k_shape[2];
const int b = int(threadgroup_position_in_grid.y) / H;
const int h = int(threadgroup_position_in_grid.y) % H;
const int worker = int(threadgroup_position_in_grid.x) * PAIRS + pair;
const int workers = int(threadgroups_per_grid.x) * PAIRS;
const auto own = shared + pair * (K_SHARED + V_SHARED);
const int count = KEEPS ? keep[kvq::ROWS] : L;
const auto head_rows = rows + int64_t(threadgroup_position_in_grid.y) * count * W;
const int older = KEEPS ? keep[kvq::KEPT] - L : 0;  // older tokens kept; if < 0, new ones dropped
const auto head_kept =
    kept + int64_t(threadgroup_position_in_grid.y) * (older + L) * (KD + VD);
// All but the first pair copy older tokens: the first one is busy where there are few new ones.
const int copiers = max(workers - 1, 1) * 64;
const int copier = (workers > 1 ? worker - 1 : 0) * 64 + int(thread_position_in_threadgroup.x & 63u);
if (KEEPS && copier >= 0) {
  for (int i = L * W + copier; i < count * W; i += copiers) head_rows[i] = 0;
  if (TAIL) {
    kvq::copy_tokens<KD + VD>(
        head_kept,
        tail + (b * tail_strides[0] + h * tail_strides[1] + (tail_shape[2] - older) * tail_strides[2]),
        int(tail_strides[2]), older, copier, copiers);
  } else {
    for (int i = copier; i < older * (KD + VD) / 8; i += copiers) {
      kvq::zero_eight(head_kept + 8 * i);
    }
  }
}
const auto new_kept = head_kept + int64_t(max(older, 0)) * (KD + VD);
const int drop = max(-older, 0);
const bool rotated = ROTATED == 2 ? keep[kvq::IS_ROTATED] != 0 : ROTATED == 1;

if ((simdgroup_index_in_threadgroup & 1u) == 0) {
  kvq::pack_vectors<
      KD, KB, KG, RULE, ROTATION, K_CALIBRATED, K_SCALED, SET, 0, 2 * HIGHS, CODES, 0, W, KEEPS,
      KD + VD, FEEDBACK>(
      head_rows, k, k + (b * k_strides[0] + h * k_strides[1]), k_strides[2], k_strides[3], L,
      worker, workers, own, k_table, h, new_kept, drop, rotated, feedback + h * KD * KD, lane);
} else {
  kvq::pack_vectors<
      VD, VB, VG, RULE, ROTATION, V_CALIBRATED, V_SCALED, SET, K_WORDS, 2 * HIGHS + K_HALVES, CODES,
      K_SCALES, W, KEEPS, KD + VD, false>(
      head_rows, k, v + (b * v_strides[0] + h * v_strides[1]), v_strides[2], v_strides[3], L,
      worker, workers, own + K_SHARED, v_table, h, new_kept + KD, drop, rotated, feedback, lane);
  if (SCALES % 2 == 1 || HALVES % 2 == 1) {
    for (int i = worker * 32 + int(lane); i < L; i += workers * 32) {
      if (SCALES % 2 == 1) kvq::halves_of(head_rows + int64_t(i) * W + W - 1)[1] = 0;
      if (HALVES % 2 == 1) kvq::halves_of(head_rows + int64_t(i) * W + CODES - 1)[1] = 0;
    }
  }
}
