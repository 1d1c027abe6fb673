// attend: decode attention of a few queries straight from packed rows; each row is read once for
// all query heads of its KV head (up to 8 query rows; more take another threadgroup).
//
// This file begins the kernel: what a threadgroup is to do, and its queries, rotated. Then comes one
// of attend_matrix.metal and attend_vector.metal (if ROWS: that many query rows, one token), then
// attend_finish.metal (one split: the output) or attend_store.metal (partial sums).
//
// Layout: q [B, Hq, L, KD] with any strides; rows uint32 [B, Hkv, capacity, W] with any batch and
//   head strides, the whole buffer; a threadgroup's 8 query rows are rows of the KV head's
//   [Hq / Hkv * L], head first. info: length, bits of the softmax scale,
//   causal, window (0: none). starts, mask, sinks, tail and first are there if their constants say
//   so.
//   tables: of the keys and then of the values (mlx_kvq/ops/gpu/tables.py).
//   tail [B, Hkv, R, KD + VD]: rotated vectors of the newest tokens, the newest last. A query reads
//   the kvq::recent_of tokens up to its own, and those after it, from there, all others from rows.
//   The newest token's row is idx - 1; before row `keep` rows wrap around to the last one (a ring).
//   first [B, Hkv, F, KD + VD]: likewise the first tokens, read from there unless the tail has them.
//   The first one is at place first_at[b] (if PLACES, else of info) in the order of the tokens.
// Grid: (splits, Hkv * blocks of 8 query rows, B) threadgroups of NSG SIMD groups. A split is a
//   contiguous share of the tiles of TK tokens; its SIMD groups take tiles in turn, each with its
//   own online softmax; sums are merged at the end. The length
//   and the number of splits are run-time values: one compilation serves every context.
// Limits: as quantize_pack; NSG a power of two, 2 or more.
// Logits are in units of log 2. Queries are fp16 after division by their largest magnitude, so any
//   model's range fits; every sum is fp32.
// In threadgroup memory rows are wide: codes of 3 bits have 4 there.
constexpr int TILE_V = KD * K_READ / 32;           // the values' codes begin here
constexpr int TILE_CODES = TILE_V + VD * V_READ / 32;  // scales begin here
constexpr int TILE_W = TILE_CODES + W - CODES;
constexpr int TILE = TK * TILE_W;
constexpr int STAGE = kvq::stage_words<TK, KD, KB, VD, VB, W, TILE_W>();
constexpr int Q_TILES = kvq::key_slots(KD, K_READ) * kvq::per_word(K_READ);
constexpr int QUERY_PAIRS = 8 * Q_TILES + 1;  // one more, so that lanes are on banks of their own
constexpr bool SLICED = ROWS == 0 && SLICE_VALUES != 0;
constexpr int SLICES = SLICED ? kvq::value_slices(VD, V_READ, NSG) : 1;
constexpr int V_TILES = kvq::value_tiles(VD, V_READ) / SLICES;  // accumulators of a lane
constexpr bool WHOLE = ROWS == 0 && kvq::whole_slots(K_READ, KG);
constexpr int OFFSETS = WHOLE ? K_SCALES : 1;
constexpr int SUMS = 64 * V_TILES;  // floats of one SIMD group's accumulators
// A SIMD group's next tiles are on their way while it works on one: OWN_TILES - 1 of them to
// threadgroup memory, or if that is none, one to registers.
constexpr bool PREFETCHED = ROWS == 0 && PREFETCH != 0;
constexpr bool SENT = PREFETCHED && OWN_TILES > 1;
constexpr int MEMORY_TILES = ROWS > 0 ? 0 : NSG * OWN_TILES * TILE;
// SIMD groups whose sums are in memory at once at the end, and beside them all rows' sums.
constexpr int MERGED = kvq::merged_at_once(NSG, SLICES, SUMS, MEMORY_TILES);
constexpr int MEMORY_SUMS = ROWS > 0 ? NSG / 2 * ROWS * VD : MERGED * SUMS + 8 * VD;
constexpr bool EXACT = TAIL || FIRST;
constexpr int MEMORY = MEMORY_TILES > MEMORY_SUMS ? MEMORY_TILES : MEMORY_SUMS;

tile_memory(memory, (MEMORY + 3) / 4);
threadgroup half2 queries[4 * QUERY_PAIRS];  // in a word a channel of rows 2 * pair and + 1
threadgroup float2 shared_offsets[4 * (ROWS == 0 && HOLD_QUERIES == 0 ? OFFSETS : 1)];
threadgroup float query_scale[8];
threadgroup float maxima[8 * NSG];
threadgroup float totals[8 * NSG];
threadgroup float2 probabilities[SLICES > 1 ? NSG * kvq::probability_pairs(TK) : 1];
threadgroup int levels[SLICED ? NSG : 1];
threadgroup int numbers[kvq::NUMBERS];
threadgroup int ranges[3 * 8];  // of the query rows
threadgroup int64_t mask_rows[MASK != 0 ? 8 : 1];
constexpr bool HELD = HOLD_QUERIES != 0;  // in registers

const uint lane = thread_index_in_simdgroup;
const kvq::counter group = simdgroup_index_in_threadgroup;
const int split = int(threadgroup_position_in_grid.x);
const int splits = int(threadgroups_per_grid.x);
const int length = info[kvq::LENGTH];
// From shapes, which are there before `info` is: queries and tables are asked for at once.
const int kv_heads = rows_shape[1];
const int heads = q_shape[1] / kv_heads;
const int L = q_shape[2];
const float scale = as_type<float>(info[kvq::SCALE]);
const bool causal = info[kvq::CAUSAL] != 0;
const int window = info[kvq::WINDOW];
const int query_rows = heads * L;
const int blocks = (query_rows + 7) / 8;
const int b = int(threadgroup_position_in_grid.z);
const int kv_head = kvq::quotient(int(threadgroup_position_in_grid.y), blocks);
const device float* k_table = tables;
const auto v_table = kvq::values_table<KD, ROTATION, K_CALIBRATED>(tables, kv_heads);
const int first_row = (int(threadgroup_position_in_grid.y) - kv_head * blocks) * 8;
const int start = STARTS ? int(starts[b]) : 0;
const auto at = kvq::tile_position(lane);
// Asked for before `info` is there: a SIMD group's first query, and what will turn the outputs.
kvq::query_vector<KD> own_query;
if (PREFETCHED) {
  const int row = min(first_row + int(group), query_rows - 1), head = kvq::quotient(row, L);
  kvq::read_query_vector<KD, ROTATION, K_CALIBRATED>(
      own_query,
      q + (b * q_strides[0] + (kv_head * heads + head) * q_strides[1] +
           (row - head * L) * q_strides[2]),
      q_strides[3], k_table, kv_head, lane);
  if (group == 0) kvq::ask_for_output_factors<VD, ROTATION, V_CALIBRATED>(v_table, kv_head, lane);
}

// Which keys each position may attend to: [low, high), checked only in tiles at an edge.
const int offset = length - L;
// Rows of tokens that are read from the tail: in a ring [hole, idx) and those from `end` on,
// otherwise the last ones, by every query those from `end` on. Rows of first tokens, and of padding
// before them, are those before rows_start, and in a ring without kept tokens those that follow the newest one, [idx, hole_end).
const int least = TAIL ? info[kvq::RECENT] : 0;
const int grows = TAIL ? info[kvq::GROWS] : 0;
const int keep = EXACT ? info[kvq::KEEP] : 0;
// Of the last query and of the first one.
const int recent = TAIL ? min(kvq::recent_of(least, grows, length - start), length - keep) : 0;
const int recent_before = TAIL ? min(kvq::recent_of(least, grows, offset + 1 - start), length - keep) : 0;
const int idx = EXACT ? info[kvq::NEXT] : length;
const bool is_ring = EXACT && idx < length;
const int hole = is_ring ? max(keep, idx - recent) : length;
const int firsts = FIRST ? info[kvq::FIRSTS] : 0;
const int place = PLACES ? int(first_at[b]) : FIRST ? info[kvq::FIRST_AT] : 0;
const bool wraps = FIRST && is_ring && keep == 0;
const int hole_end = wraps ? min(length, idx + max(0, place + firsts)) : idx;
const int rows_start = FIRST ? max(start, place + firsts + (wraps ? idx - length : 0)) : start;
const int lowest = max(rows_start, window > 0 ? offset - window + 1 : 0);
const int low_edge = max(rows_start, window > 0 ? length - window : 0);
int high_edge = causal ? offset + 1 : length;
const int end = is_ring ? min(length, length - recent + idx - keep) : length - recent_before;
if (TAIL) high_edge = min(high_edge, is_ring ? end : offset + 1 - recent);

const auto head_rows = rows + (b * rows_strides[0] + kv_head * rows_strides[1]);
const int newest = TAIL ? min(recent + L - 1, length - keep) : 0;
const int first_tile = lowest / TK;
const auto exact = kvq::exact_tokens_of<TAIL, FIRST>(newest, firsts, place, length, keep, idx);
// With ROWS exact tokens are tiles as well, the first ones; `first_tile` comes after them.
const int exact_tiles = ROWS > 0 ? (exact.end + TK - 1) / TK : 0;
const int tiles = exact_tiles + max(0, (end + TK - 1) / TK - first_tile);
const int share = (tiles + splits - 1) / splits;
const int before_tiles = ROWS > 0 ? 0 : first_tile;
const int tile_end = before_tiles + min(tiles, (split + 1) * share);
kvq::counter tile = before_tiles + split * share + group;
uint stage[PREFETCHED && !SENT ? STAGE : 1];
if (SENT) {  // in flight while the queries are rotated
  UNROLL for (int i = 0; i < OWN_TILES - 1; i++) {
    const int ahead = int(tile) + i * NSG;
    if (ahead < tile_end) {
      kvq::send_rows<TK, KD, KB, VD, VB, W, TILE_W>(
          kvq::words_of(memory) + (OWN_TILES * group + i) * TILE,
          head_rows + int64_t(ahead) * (TK * W), length - ahead * TK, lane);
    }
    kvq::end_copy_group();
  }
} else if (PREFETCHED && tile < tile_end) {
  kvq::load_rows<TK, KD, KB, VD, VB, W, TILE_W>(
      stage, head_rows + int64_t(tile) * (TK * W), min(TK, length - int(tile) * TK), lane);
}

// Exact tokens are shared out in sets over splits, and over SIMD groups from the last one on, which
// has the fewest tiles.
constexpr int SET = kvq::EXACT_KEYS;
if (PREFETCHED && EXACT) {
  const int set = split + (NSG - 1 - int(group)) * splits;
  if (set * SET < exact.end) {
    const auto vectors = kvq::exact_vectors_of(
        exact,
        tail + (b * tail_strides[0] + kv_head * tail_strides[1] +
                (tail_shape[2] - 1) * tail_strides[2]),
        first + (b * first_strides[0] + kv_head * first_strides[1]),
        int(tail_strides[2]), int(first_strides[2]));
    kvq::ask_for_exact<KD + VD, SET>(vectors, set * SET, lane);
  }
}
if (group == NSG - 1) {
  if (lane < 8u) {
    const int row = min(first_row + int(lane), query_rows - 1);
    const int head = kvq::quotient(row, L), at_token = row - head * L;
    const auto range = kvq::range_of<TAIL>(
        offset + at_token, start, length, window, causal, is_ring, recent, keep, least, grows);
    ranges[3 * lane] = range.low;
    ranges[3 * lane + 1] = range.high;
    ranges[3 * lane + 2] = range.oldest;
    if (MASK != 0) {
      mask_rows[lane] = b * mask_strides[0] + (kv_head * heads + head) * mask_strides[1] +
          at_token * mask_strides[2];
    }
  }
  if (lane == 0) {
    numbers[kvq::AT_LENGTH] = length;
    numbers[kvq::AT_LOW_EDGE] = low_edge;
    numbers[kvq::AT_HIGH_EDGE] = high_edge;
    numbers[kvq::AT_HOLE] = hole;
    numbers[kvq::AT_HOLE_END] = hole_end;
    numbers[kvq::AT_ROWS_START] = rows_start;
    numbers[kvq::AT_END] = end;
    numbers[kvq::AT_NEWEST] = newest;
    numbers[kvq::AT_FIRST_BEGIN] = exact.begin;
    numbers[kvq::AT_EXACT_END] = exact.end;
    numbers[kvq::AT_PLACE] = place;
    numbers[kvq::AT_KEEP] = keep;
    numbers[kvq::AT_IDX] = idx;
    numbers[kvq::AT_BATCH] = b;
    numbers[kvq::AT_KV_HEAD] = kv_head;
    numbers[kvq::AT_HEADS] = heads;
    numbers[kvq::AT_QUERIES] = L;
    numbers[kvq::AT_FIRST_ROW] = first_row;
    numbers[kvq::AT_SPLIT] = split;
    numbers[kvq::AT_SPLITS] = splits;
    numbers[kvq::AT_TILE] = tile - group;
    numbers[kvq::AT_TILE_END] = tile_end;
    numbers[kvq::AT_EXACT_TILES] = exact_tiles;
    numbers[kvq::AT_FIRST_TILE] = first_tile;
    numbers[kvq::AT_KV_HEADS] = kv_heads;
  }
}
for (int r = group; r < (ROWS > 0 ? ROWS : 8); r += NSG) {
  const int row = first_row + r;
  float peak = 0.0f;
  if (row < query_rows) {
    if (!PREFETCHED || (NSG < 8 && r >= NSG)) {
      const int head = kvq::quotient(row, L);
      kvq::read_query_vector<KD, ROTATION, K_CALIBRATED>(
          own_query,
          q + (b * q_strides[0] + (kv_head * heads + head) * q_strides[1] +
               (row - head * L) * q_strides[2]),
          q_strides[3], k_table, kv_head, lane);
    }
    kvq::rotate_query<KD, ROTATION, K_CALIBRATED>(own_query, k_table, kv_head, lane);
    UNROLL for (int a = 0; a < kvq::points_of(KD); a++) {
      peak = max(peak, max(fabs(own_query.z[a].x), fabs(own_query.z[a].y)));
    }
    peak = simd_max(peak);
  } else {
    UNROLL for (int a = 0; a < kvq::points_of(KD); a++) own_query.z[a] = float2(0.0f, 0.0f);
  }
  const float inverse = peak > 1e-30f ? 1.0f / peak : 0.0f;
  if (lane < uint(kvq::lanes_of(KD))) {
    UNROLL for (int a = 0; a < kvq::points_of(KD); a++) {
      const int c = 2 * (kvq::rotated_block<KD, ROTATION>(lane) * kvq::points_of(KD) + a);
      kvq::store_query<K_READ, WHOLE>(
          queries + r / 2 * QUERY_PAIRS + c, r % 2, own_query.z[a], inverse);
    }
  }
  for (int c = KD + 2 * int(lane); c < 8 * Q_TILES; c += 64) {  // of the last word's channels
    kvq::store_query<K_READ, WHOLE>(
        queries + r / 2 * QUERY_PAIRS + c, r % 2, float2(0.0f, 0.0f), 0.0f);
  }
  if (lane == 0) {
    query_scale[r] = peak * scale * kvq::log2_e();
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
