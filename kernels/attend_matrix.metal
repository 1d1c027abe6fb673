// attend by matrix products: tiles of TK keys in threadgroup memory, products of 16 keys and 8 query
// rows (tile.metal). Between attend_begin.metal and attend_finish.metal or attend_store.metal.
//
// SLICE_VALUES (mlx_kvq/ops/gpu/tuning.py): sets of SIMD groups, as many as a lane's sums can be
//   cut into slices of eight, have one softmax. Each scores its own tile, and adds up one slice of
//   channels of the set's tiles, with three barriers a turn.
// HOLD_QUERIES, PREFETCH (mlx_kvq/ops/gpu/tuning.py): what stays in registers. At D = 128 it is
//   44 of them beside 32 for sums; a thread has 128 on Apple GPUs, 255 on NVIDIA's. Where it does
//   not, a turn of a loop reads again what it needs of the launch, and computes its addresses again
//   (kvq::unknown_zero): what compilers keep for all turns was half of the registers.
// Exact tokens come first, EXACT_KEYS (machine.*) of a SIMD group at a time, read from device memory
//   straight into operands: each is read once, so a copy in threadgroup memory would serve nobody.
// OWN_TILES: tiles of a SIMD group in threadgroup memory. With more than one the next ones are sent
//   there while it works on one (whole.metal), which takes no registers.
// Limits: NSG * OWN_TILES * TK * TILE_W words < 32 KB on Apple GPUs.
// Reasons: 8 query rows at the price of one, because at 4 bits the arithmetic per byte, not the
//   bytes, limits. Probabilities, with a value's scale, are fp16 (`exponent_of` in tile.metal).
// From here on a lane has two query rows: columns 2 * pair and 2 * pair + 1 of every product.
const auto pair_queries = queries + int(at.pair) * QUERY_PAIRS;
const auto pair_offsets = shared_offsets + int(at.pair) * (HOLD_QUERIES == 0 ? OFFSETS : 1);
const float2 held_factor = kvq::pair_of(query_scale, at);

// Finite, so that exp2(-inf - m) is 0 and never exp2(-inf + inf), also where all is masked.
const float2 lowest_logit = float2(-3e38f, -3e38f);
const float masked = as_type<float>(0xff800000u);
float2 m = lowest_logit;
float2 l = float2(0.0f, 0.0f);
float2 sums[V_TILES];
UNROLL for (int i = 0; i < V_TILES; i++) sums[i] = float2(0.0f, 0.0f);
constexpr bool SCALED = kvq::one_group(VD, V_READ, VG);
constexpr float PER_SUM = kvq::per_level(VD, V_READ, VG);
constexpr int STEP = kvq::key_step(TILE_W, TK);
int level = 0;
const kvq::counter slice = group % SLICES;
const kvq::counter zero = kvq::unknown_zero(length);
// Exact values are added as levels are.
const float as_levels = kvq::levels_lift<SCALED>(0) / PER_SUM;

if (EXACT) {
  const int exact_end = numbers[kvq::AT_EXACT_END];
  const int all_splits = numbers[kvq::AT_SPLITS];
  // With slices all SIMD groups stay together, also those that have no token.
  const int own = (NSG - 1 - int(group)) * all_splits;
  for (int set = numbers[kvq::AT_SPLIT] + (SLICES > 1 ? 0 : own); set * SET < exact_end;
       set += NSG * all_splits) {
    // Where registers are few, a turn computes its addresses again.
    const uint set_zero = HELD ? 0u : uint(kvq::unknown_zero(set));
    const auto own_at = HELD ? at : kvq::tile_position(lane + set_zero);
    const kvq::counter own_group = group + set_zero;
    const kvq::counter own_slice = HELD ? slice : own_group % SLICES;
    const int own_b = numbers[kvq::AT_BATCH];
    const int own_head = numbers[kvq::AT_KV_HEAD];
    const auto vectors = kvq::exact_vectors_of(
        kvq::exact_tokens_at<TAIL, FIRST>(numbers),
        tail + (own_b * tail_strides[0] + own_head * tail_strides[1] +
                (tail_shape[2] - 1) * tail_strides[2]),
        first + (own_b * first_strides[0] + own_head * first_strides[1]),
        int(tail_strides[2]), int(first_strides[2]));
    const int age = SET * (set + (SLICES > 1 ? own : 0));
    const int own_age = age + int(lane + set_zero) % SET;  // of the token that a lane tells of
    const auto own_token = vectors.tokens.at(own_age);
    const int offset = vectors.offset_of(own_age);
    float2 s[SET / 8];
    UNROLL for (int k = 0; k < SET / 8; k++) s[k] = float2(0.0f, 0.0f);
    if (SLICES == 1 || age < exact_end) {
      kvq::exact_scores<KD, K_READ, WHOLE, !SENT>(s, vectors, offset, queries, QUERY_PAIRS, own_at);
    }
    const float2 factor = HELD ? held_factor : kvq::pair_of(query_scale, own_at);
    float2 top = lowest_logit;
    UNROLL for (int k = 0; k < SET / 8; k++) {
      kvq::exact_token token;
      token.key = simd_shuffle(own_token.key, ushort(8 * k + int(own_at.row)));
      token.order = simd_shuffle(own_token.order, ushort(8 * k + int(own_at.row)));
      s[k] = float2(s[k].x * factor.x, s[k].y * factor.y);
      if (MASK != 0 && token.key >= 0) {
        const int64_t key_at = token.key * mask_strides[3];
        const auto x = mask[mask_rows[2 * own_at.pair] + key_at];
        const auto z = mask[mask_rows[2 * own_at.pair + 1] + key_at];
        if (MASK == 1) {
          s[k] = float2(x ? s[k].x : masked, z ? s[k].y : masked);
        } else {
          s[k] = float2(s[k].x + float(x) * kvq::log2_e(), s[k].y + float(z) * kvq::log2_e());
        }
      }
      bool seen[2];
      UNROLL for (int i = 0; i < 2; i++) {
        seen[i] = token.is_read<TAIL>(kvq::range_at(ranges, 2 * int(own_at.pair) + i));
      }
      s[k] = float2(seen[0] ? s[k].x : masked, seen[1] ? s[k].y : masked);
      top = float2(max(top.x, s[k].x), max(top.y, s[k].y));
    }
    top = float2(kvq::rows_max(top.x), kvq::rows_max(top.y));
    top = kvq::top_of_slices<SLICES>(maxima, top, own_group, own_at);
    if (simd_any(kvq::exceeds<SCALED>(top, m, level))) {
      kvq::raise<SCALED, V_TILES>(sums, m, l, level, top, level);
    }
    UNROLL for (int k = 0; k < SET / 8; k++) {
      const float2 p = float2(
          kvq::exact_probability(fast::exp2(s[k].x - m.x)),
          kvq::exact_probability(fast::exp2(s[k].y - m.y)));
      l = float2(l.x + p.x, l.y + p.y);
      s[k] = kvq::exact_operand(float2(as_levels * p.x, as_levels * p.y), own_at);
    }
    if (SLICES == 1) {
      UNROLL for (int k = 0; k < SET / 8; k++) {
        kvq::add_exact_values<KD, VD, V_READ, VG, SLICES, V_TILES>(
            sums, vectors, offset, 8 * k, s[k], own_at, 0);
      }
    } else {
      const auto shared_p = probabilities + int(lane + set_zero);
      UNROLL for (int k = 0; k < SET / 8; k++) {
        shared_p[own_group * kvq::probability_pairs(TK) + 32 * k] = s[k];
      }
      kvq::slices_barrier<SLICES>();
      ROLLED for (kvq::counter i = 0; i < SLICES + zero; i++) {
        const kvq::counter other = own_group - own_slice + i;
        const int its_age = SET * (set + (NSG - 1 - int(other)) * all_splits);
        if (its_age < exact_end) {
          const int its_offset = vectors.offset_of(its_age + int(lane + set_zero) % SET);
          UNROLL for (int k = 0; k < SET / 8; k++) {
            kvq::add_exact_values<KD, VD, V_READ, VG, SLICES, V_TILES>(
                sums, vectors, its_offset, 8 * k,
                shared_p[other * kvq::probability_pairs(TK) + 32 * k], own_at, own_slice);
          }
        }
      }
    }
  }
}
half2 query[HOLD_QUERIES != 0 ? Q_TILES : 1];
float2 offsets[HOLD_QUERIES != 0 ? OFFSETS : 1];
if (HOLD_QUERIES != 0) {
  UNROLL for (int i = 0; i < Q_TILES; i++) {
    query[i] = kvq::read_query<K_READ>(
        pair_queries, i / kvq::per_word(K_READ), i % kvq::per_word(K_READ), at);
  }
}
constexpr int GROUP = WHOLE ? KG : KD;
if (WHOLE && HOLD_QUERIES != 0) {
  UNROLL for (int g = 0; g < OFFSETS; g++) {
    offsets[g] = kvq::PRODUCTS_ARE_CHEAP != 0
        ? kvq::score_offset<K_READ, GROUP, HALF_STEP>(query, g)
        : kvq::score_offset<K_READ, GROUP, HALF_STEP>(pair_queries, g, at);
  }
} else if (WHOLE) {
  for (int g = group; g < OFFSETS; g += NSG) {
    const float2 x = kvq::score_offset<K_READ, GROUP, HALF_STEP>(pair_queries, g, at);
    if (at.row == 0) pair_offsets[g] = x;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
// With slices all SIMD groups stay together, also those that have no tile left.
const kvq::counter end_of_tiles = numbers[kvq::AT_TILE_END];
const auto split_rows = HELD ? head_rows
                             : rows + (numbers[kvq::AT_BATCH] * rows_strides[0] +
                                       numbers[kvq::AT_KV_HEAD] * rows_strides[1]);
if (!HELD) tile = kvq::counter(numbers[kvq::AT_TILE]) + group;
kvq::counter turn = 0;  // which of its tiles a SIMD group works on
for (; tile - (SLICES > 1 ? group : 0) < end_of_tiles;
     tile += NSG, turn = turn + 1 < OWN_TILES ? turn + 1 : 0) {
  const bool has_tile = SLICES == 1 || tile < end_of_tiles;
  kvq::slices_barrier<SLICES>();
  // Where registers are few, a turn computes its addresses again.
  const uint tile_zero = HELD ? 0u : uint(kvq::unknown_zero(int(tile)));
  const uint own_lane = lane + tile_zero;
  const auto own_at = HELD ? at : kvq::tile_position(own_lane);
  const kvq::counter own_group = group + tile_zero;
  const kvq::counter own_slice = HELD ? slice : own_group % SLICES;
  const auto own = kvq::words_of(memory) + (OWN_TILES * own_group + turn) * TILE;
  const auto own_queries = queries + own_at.pair * QUERY_PAIRS;
  const auto own_offsets = shared_offsets + own_at.pair * (HELD ? 1 : OFFSETS);
  float2 s[TK / 8];
  float2 top = lowest_logit;
  if (!has_tile) {
    UNROLL for (int i = 0; i < TK / 8; i++) s[i] = float2(masked, masked);
  } else {
    if (SENT) {
      const int ahead = int(tile) + (OWN_TILES - 1) * NSG;
      if (ahead < int(end_of_tiles)) {
        const kvq::counter free = turn == 0 ? OWN_TILES - 1 : turn - 1;
        kvq::send_rows<TK, KD, KB, VD, VB, W, TILE_W>(
            kvq::words_of(memory) + (OWN_TILES * own_group + free) * TILE,
            head_rows + int64_t(ahead) * (TK * W), length - ahead * TK, own_lane);
      }
      kvq::end_copy_group();
      kvq::wait_for_copies<OWN_TILES - 1>();
    } else if (PREFETCH != 0) {
      kvq::store_rows<TK, KD, KB, VD, VB, W, TILE_W>(own, stage, own_lane);
    } else {
      kvq::copy_rows<TK, KD, KB, VD, VB, W, TILE_W>(
          own, split_rows + tile * kvq::counter(TK * W),
          min(TK, numbers[kvq::AT_LENGTH] - int(tile) * TK), own_lane);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (PREFETCH != 0 && !SENT && tile + NSG < tile_end) {
      kvq::load_rows<TK, KD, KB, VD, VB, W, TILE_W>(
          stage,
          head_rows + int64_t(tile + NSG) * (TK * W),
          min(TK, length - int(tile + NSG) * TK),
          own_lane);
    }
    auto key_lift = kvq::no_lift();
    if (!WHOLE) {
      key_lift = kvq::lift_of<TK, TILE_W, TILE_CODES, 0, K_SCALES>(own, own_lane);
    }
    UNROLL for (int i = 0; i < TK / 8; i += 2) {
      kvq::scores<KD, K_READ, KG, HALF_STEP, TILE_W, TILE_CODES, STEP>(
          s[i], s[i + 1], own, i, query, offsets, own_queries, own_offsets, key_lift.operand, zero,
          own_at);
    }
    const int first_key = int(tile) * TK;
    const int own_low_edge = numbers[kvq::AT_LOW_EDGE];
    const int own_high_edge = numbers[kvq::AT_HIGH_EDGE];
    const int own_hole = numbers[kvq::AT_HOLE];
    const int own_hole_end = numbers[kvq::AT_HOLE_END];
    const bool edge = first_key < own_low_edge || first_key + TK > own_high_edge ||
        (EXACT && first_key < own_hole_end && first_key + TK > own_hole);
    const float2 factor = HELD ? held_factor : kvq::pair_of(query_scale, own_at);
    UNROLL for (int i = 0; i < TK / 8; i++) {
      s[i] = float2(s[i].x * (factor.x * key_lift.back), s[i].y * (factor.y * key_lift.back));
      const int key = first_key + int(kvq::tile_key<STEP>(i, own_at.row));
      if (MASK != 0 && key < numbers[kvq::AT_LENGTH]) {
        const int64_t key_at = key * mask_strides[3];
        const auto x = mask[mask_rows[2 * own_at.pair] + key_at];
        const auto y = mask[mask_rows[2 * own_at.pair + 1] + key_at];
        if (MASK == 1) {
          s[i] = float2(x ? s[i].x : masked, y ? s[i].y : masked);
        } else {
          s[i] = float2(s[i].x + float(x) * kvq::log2_e(), s[i].y + float(y) * kvq::log2_e());
        }
      }
    }
    if (edge) {
      int low[2], high[2];
      UNROLL for (int j = 0; j < 2; j++) {
        const auto range = kvq::range_at(ranges, 2 * int(own_at.pair) + j);
        low[j] = max(numbers[kvq::AT_ROWS_START], range.low);
        high[j] = range.high;
        if (TAIL) {
          const bool own_is_ring = numbers[kvq::AT_IDX] < numbers[kvq::AT_LENGTH];
          high[j] = min(high[j], own_is_ring ? numbers[kvq::AT_END] : range.oldest);
        }
      }
      UNROLL for (int i = 0; i < TK / 8; i++) {
        const int key = first_key + int(kvq::tile_key<STEP>(i, own_at.row));
        const bool in_row = !EXACT || key < own_hole || key >= own_hole_end;
        s[i] = float2(
            in_row && key >= low[0] && key < high[0] ? s[i].x : masked,
            in_row && key >= low[1] && key < high[1] ? s[i].y : masked);
      }
    }
    UNROLL for (int i = 0; i < TK / 8; i++) {
      top = float2(max(top.x, s[i].x), max(top.y, s[i].y));
    }
  }
  int own_level = 0;
  if (has_tile) {
    own_level = kvq::scales_level<TK, TILE_W, TILE_CODES, K_SCALES, VD / VG>(own, own_lane);
  }
  if (SLICES > 1) {
    if (own_lane == 0) levels[own_group] = own_level;
    top = float2(kvq::rows_max(top.x), kvq::rows_max(top.y));
    top = kvq::top_of_slices<SLICES>(maxima, top, own_group, own_at);
    UNROLL for (int i = 0; i < SLICES; i++) {
      own_level = max(own_level, levels[own_group - own_slice + i]);
    }
  }
  if (simd_any(own_level > level || kvq::exceeds<SCALED>(top, m, level))) {
    if (SLICES == 1) top = float2(kvq::rows_max(top.x), kvq::rows_max(top.y));
    kvq::raise<SCALED, V_TILES>(sums, m, l, level, top, max(level, own_level));
  }
  half2 p[TK / 8];
  UNROLL for (int i = 0; i < TK / 8; i++) {
    const float x = fast::exp2(s[i].x - m.x);
    const float y = fast::exp2(s[i].y - m.y);
    l = float2(l.x + x, l.y + y);
    p[i] = kvq::right_operand(half2(half(x), half(y)));
  }
  if (SLICES == 1) {
    UNROLL for (int i = 0; i < TK / 8; i += 2) {
      kvq::add_values<VD, V_READ, VG, HALF_STEP, TILE_W, TILE_V, TILE_CODES, K_SCALES, 1, STEP>(
          sums, own, i, p[i], p[i + 1], level, 0, own_at);
    }
  } else {
    const auto shared_p = kvq::halves_of_pairs(probabilities) + int(own_lane);
    UNROLL for (int i = 0; i < TK / 8; i++) shared_p[own_group * (4 * TK) + 32 * i] = p[i];
    kvq::slices_barrier<SLICES>();
    kvq::counter other = own_group - own_slice;
    const kvq::counter others =
        min(kvq::counter(other + SLICES), kvq::counter(end_of_tiles - (tile - own_group)));
    ROLLED for (; other < others; other++) {
      UNROLL for (int i = 0; i < TK / 8; i += 2) {
        kvq::add_values<
            VD, V_READ, VG, HALF_STEP, TILE_W, TILE_V, TILE_CODES, K_SCALES, SLICES, STEP>(
            sums, kvq::words_of(memory) + (OWN_TILES * other + turn) * TILE, i,
            shared_p[other * (4 * TK) + 32 * i], shared_p[other * (4 * TK) + 32 * i + 32], level,
            own_slice, own_at);
      }
    }
  }
}

// Merge the SIMD groups: common maximum, then sums added through the tiles' memory.
const float exponent = kvq::exponent_of<SCALED>(level);
const float smaller = fast::exp2(-exponent);
m = float2(m.x + exponent, m.y + exponent);
l = float2(smaller * kvq::rows_sum(l.x), smaller * kvq::rows_sum(l.y));
if (at.row == 0) {
  UNROLL for (int i = 0; i < 2; i++) {
    maxima[8 * group + 2 * int(at.pair) + i] = i == 0 ? m.x : m.y;
    totals[8 * group + 2 * int(at.pair) + i] = i == 0 ? l.x : l.y;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float2 top = lowest_logit;
UNROLL for (int g = 0; g < NSG; g++) {
  top.x = max(top.x, maxima[8 * g + 2 * int(at.pair)]);
  top.y = max(top.y, maxima[8 * g + 2 * int(at.pair) + 1]);
}
{
  const float unit = PER_SUM * smaller / kvq::levels_lift<SCALED>(level);
  const float2 f = float2(fast::exp2(m.x - top.x) * unit, fast::exp2(m.y - top.y) * unit);
  UNROLL for (int i = 0; i < V_TILES; i++) {
    sums[i] = float2(sums[i].x * f.x, sums[i].y * f.y);
  }
}
// merged [8 query rows][VD]: unnormalised sums in the rotated domain.
const auto merged = kvq::floats_of(memory) + MERGED * SUMS;
{
  const auto all = kvq::floats_of(memory) + int(lane);
  if (MERGED < NSG) {  // to the first half of the SIMD groups what the second half has
    if (group >= MERGED) {
      UNROLL for (int i = 0; i < V_TILES; i++) {
        all[((group - MERGED) * V_TILES + i) * 64] = sums[i].x;
        all[((group - MERGED) * V_TILES + i) * 64 + 32] = sums[i].y;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group < MERGED) {
      UNROLL for (int i = 0; i < V_TILES; i++) {
        sums[i].x += all[(group * V_TILES + i) * 64];
        sums[i].y += all[(group * V_TILES + i) * 64 + 32];
      }
    }
  }
  if (MERGED == SLICES) {
    if (group < SLICES) {
      UNROLL for (int i = 0; i < V_TILES; i++) {
        const int c = kvq::value_channel<VD, V_READ, VG, SLICES>(i, at.row, slice);
        if (c < VD) {
          merged[2 * int(at.pair) * VD + c] = sums[i].x;
          merged[(2 * int(at.pair) + 1) * VD + c] = sums[i].y;
        }
      }
    }
  } else {
    if (group < MERGED) {
      UNROLL for (int i = 0; i < V_TILES; i++) {
        all[(group * V_TILES + i) * 64] = sums[i].x;
        all[(group * V_TILES + i) * 64 + 32] = sums[i].y;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // A thread adds up a few neighbouring channels of a row.
    constexpr int RUN = kvq::value_run(VD, V_READ, VG);
    constexpr int FEW = RUN < 4 ? RUN : 4;
    constexpr int PARTS = V_TILES / FEW;
    for (int part = group; part < 2 * PARTS * SLICES; part += NSG) {
      const int row = part % 2, i = part / 2 % PARTS * FEW, of = part / 2 / PARTS;
      float x[FEW];
      UNROLL for (int e = 0; e < FEW; e++) x[e] = 0.0f;
      UNROLL for (int g = 0; g < MERGED / SLICES; g++) {
        UNROLL for (int e = 0; e < FEW; e++) {
          x[e] += all[((g * SLICES + of) * V_TILES + i + e) * 64 + 32 * row];
        }
      }
      const int c = kvq::value_channel<VD, V_READ, VG, SLICES>(i, at.row, of);
      if (c < VD) {
        UNROLL for (int e = 0; e < FEW; e++) merged[(2 * int(at.pair) + row) * VD + c + e] = x[e];
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
