// attend for one token of ROWS query heads a KV head, without matrix units: rows are read from device
// memory into registers, codes are multiplied as they are (dots.metal). Between attend_begin.metal
// and attend_finish.metal or attend_store.metal.
//
// A SIMD group takes a tile of 32 tokens at a time: lanes share a token for its score, then each lane
//   has one token for its probability, then lanes share a token for its value. Exact tokens are tiles
//   as well, the first ones. Rows are not copied to threadgroup memory.
// Reasons: an Apple GPU multiplies 8x8x8 in 20 cycles, whatever part of it is used: with 4 query heads
//   a KV head half of that is lost, with 2 three quarters. And operands have to be dequantized values.
// Registers: where they are few (HOLD_QUERIES is off), a turn of a loop computes its addresses again
//   (kvq::unknown_zero); queries are in registers only while keys are scored, maxima never.
// One word of a lane where two would spill registers of G13 (tests/emulator/agx_table.py).
constexpr bool FEW_REGISTERS = HOLD_QUERIES == 0 && ROWS * KD > 768 &&
    (MASK != 0 || kvq::is_narrow(KB) || kvq::is_narrow(VB));
constexpr int K_PER_LANE = kvq::score_words(KD, K_READ, KG, FEW_REGISTERS);
constexpr int K_CHANNELS = K_PER_LANE * kvq::codes_of_word(K_READ);
constexpr int K_PARTS = KD / K_CHANNELS;
constexpr int K_LANES = kvq::lanes_for(K_PARTS);
constexpr int K_AT_ONCE = 32 / K_LANES;  // tokens
constexpr int V_PER_LANE = kvq::value_words(VD, V_READ, VG, ROWS);
constexpr int V_CHANNELS = V_PER_LANE * kvq::codes_of_word(V_READ);
constexpr int V_PARTS = VD / V_CHANNELS;
constexpr int V_LANES = kvq::lanes_for(V_PARTS);
constexpr int V_AT_ONCE = 32 / V_LANES;
constexpr int UNIT = W % 2 == 0 ? 2 : 1;  // words that are read at once
constexpr int V_STEPS = V_LANES < 4 ? V_LANES : 4;  // in flight at once

threadgroup float vector_probabilities[NSG * TK * ROWS];
threadgroup float vector_offsets[K_LANES * ROWS];
if (group == 0 && int(lane) < K_LANES) {
  kvq::magic_offsets<ROWS, K_CHANNELS, KD, K_READ, HALF_STEP>(
      vector_offsets + lane * ROWS, queries, QUERY_PAIRS, kvq::counter(lane));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const float masked = as_type<float>(0xff800000u);
float l[ROWS], shares[ROWS], sums[ROWS * V_CHANNELS];
UNROLL for (int r = 0; r < ROWS; r++) {
  if (lane == 0) maxima[8 * group + r] = -3e38f;  // finite, so that exp2(-inf - m) is 0
  l[r] = 0.0f;
  shares[r] = 0.0f;
  UNROLL for (int i = 0; i < V_CHANNELS; i++) sums[r * V_CHANNELS + i] = 0.0f;
}

// Added to the ends of loops: compilers unroll those whose number of turns they know.
const kvq::counter zero = kvq::unknown_zero(length);
tile = kvq::counter(numbers[kvq::AT_TILE]) + group;
if (EXACT) {
  const kvq::counter end_of_exact =
      kvq::counter(min(numbers[kvq::AT_TILE_END], numbers[kvq::AT_EXACT_TILES]));
  for (; tile < end_of_exact; tile += NSG) {
    // Where registers are few, a turn computes its addresses again.
    const uint own_lane = HELD ? lane : lane + uint(kvq::unknown_zero(int(tile)));
    const auto own = kvq::part_of<K_LANES, K_PARTS>(own_lane);
    const auto own_value = kvq::part_of<V_LANES, V_PARTS>(own_lane);
    const int own_b = numbers[kvq::AT_BATCH];
    const int own_head = numbers[kvq::AT_KV_HEAD];
    const auto vectors = kvq::exact_vectors_of(
        kvq::exact_tokens_at<TAIL, FIRST>(numbers),
        tail + (own_b * tail_strides[0] + own_head * tail_strides[1] +
                (tail_shape[2] - 1) * tail_strides[2]),
        first + (own_b * first_strides[0] + own_head * first_strides[1]),
        int(tail_strides[2]), int(first_strides[2]));
    const int first_age = int(tile) * TK;
    const kvq::counter left = kvq::counter(vectors.tokens.end - first_age);  // tokens
    float s[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) s[r] = 0.0f;
    const kvq::counter k_steps = min(kvq::counter(K_LANES), (left + K_AT_ONCE - 1) / K_AT_ONCE);
    ROLLED for (kvq::counter step = 0; step < k_steps; step++) {
      const auto of = vectors.at(first_age + int(step * K_AT_ONCE + own.set));
      float score[ROWS];
      UNROLL for (int r = 0; r < ROWS; r++) score[r] = 0.0f;
      kvq::score_exact_part<ROWS, K_CHANNELS, KD>(score, of, queries, QUERY_PAIRS, own.turn);
      kvq::take_turn<ROWS, 1, K_LANES>(s, score, own.turn == step);
    }
    // From here on a lane has one token.
    const auto own_probabilities = vector_probabilities + group * (TK * ROWS);
    {
      const auto range = kvq::range_at(ranges, 0);
      const auto token = vectors.tokens.at(first_age + int(own.turn * K_AT_ONCE + own.set));
      const bool seen = token.is_read<TAIL>(range);
      UNROLL for (int r = 0; r < ROWS; r++) {
        s[r] *= query_scale[r];
        if (MASK != 0 && seen) {
          const auto x = mask[mask_rows[r] + token.key * mask_strides[3]];
          s[r] = MASK == 1 ? (x ? s[r] : masked) : s[r] + float(x) * kvq::log2_e();
        }
        s[r] = seen ? s[r] : masked;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's have been read
      kvq::probabilities_of<ROWS, V_CHANNELS>(
          own_probabilities + (own.turn * K_AT_ONCE + own.set) * ROWS, s, maxima + 8 * group, l,
          shares, sums, own_lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    const kvq::counter v_steps = min(kvq::counter(V_LANES), (left + V_AT_ONCE - 1) / V_AT_ONCE);
    ROLLED for (kvq::counter step = 0; step < v_steps; step++) {
      const kvq::counter of_tile = step * V_AT_ONCE + own_value.set;
      const auto of = vectors.at(first_age + int(of_tile));
      float y[V_CHANNELS];
      kvq::read_exact<VD, V_CHANNELS>(y, of + KD, int(own_value.part * V_CHANNELS));
      kvq::add_exact_value<ROWS, V_CHANNELS>(sums, y, own_probabilities + of_tile * ROWS);
    }
  }
}

for (; tile < kvq::counter(numbers[kvq::AT_TILE_END]); tile += NSG) {
  const int own_b = numbers[kvq::AT_BATCH];
  const int own_head = numbers[kvq::AT_KV_HEAD];
  const int own_length = numbers[kvq::AT_LENGTH];
  const int first_key =
      (int(tile) - numbers[kvq::AT_EXACT_TILES] + numbers[kvq::AT_FIRST_TILE]) * TK;
  const auto tile_rows = rows +
      (own_b * rows_strides[0] + own_head * rows_strides[1] + int64_t(first_key) * W);
  const kvq::counter last_row = kvq::counter((min(TK, own_length - first_key) - 1) * (W / UNIT));
  half query[ROWS * K_CHANNELS];
  const uint tile_lane = HELD ? lane : lane + uint(kvq::unknown_zero(int(tile)));
  kvq::read_queries<ROWS, K_CHANNELS, KD>(
      query, queries, QUERY_PAIRS, kvq::part_of<K_LANES, K_PARTS>(tile_lane).turn);
  float s[ROWS];
  UNROLL for (int r = 0; r < ROWS; r++) s[r] = 0.0f;
  ROLLED for (kvq::counter turn = 0; turn < K_LANES / 2 + zero; turn++) {
    const uint turn_lane = HELD ? lane : lane + uint(kvq::unknown_zero(int(turn)));
    const auto own = kvq::part_of<K_LANES, K_PARTS>(turn_lane);
    float score[2][ROWS];
    UNROLL for (int step = 0; step < 2; step++) {
      const kvq::counter key = (2 * turn + step) * K_AT_ONCE + own.set;
      const kvq::counter row = min(key * kvq::counter(W / UNIT), last_row);
      uint words[K_PER_LANE];
      kvq::read_codes<K_PER_LANE, KB, 0, 2 * HIGHS, UNIT>(words, tile_rows, row, own.part);
      const float scale = kvq::half_at<CODES, UNIT>(tile_rows, row, own.part * K_CHANNELS / KG);
      kvq::score_codes<ROWS, K_PER_LANE, K_READ>(
          score[step], words, scale, query, vector_offsets + own.turn * ROWS);
    }
    float folded[ROWS];
    kvq::fold<ROWS>(folded, score[0], score[1], turn_lane);
    kvq::take_turn<ROWS, 2, K_LANES>(s, folded, own.turn / 2 == turn);
  }
  // From here on a lane has one token.
  const uint own_lane = HELD ? lane : lane + uint(kvq::unknown_zero(int(tile)));
  const auto own = kvq::part_of<K_LANES, K_PARTS>(own_lane);
  const auto own_probabilities = vector_probabilities + group * (TK * ROWS);
  {
    const auto range = kvq::range_at(ranges, 0);
    const int key = first_key + int(own.turn * K_AT_ONCE + own.set);
    const int low = max(range.low, numbers[kvq::AT_ROWS_START]);
    int high = range.high;
    if (TAIL) {
      const bool own_is_ring = numbers[kvq::AT_IDX] < own_length;
      high = min(high, own_is_ring ? numbers[kvq::AT_END] : range.oldest);
    }
    const bool seen = key >= low && key < high &&
        (!EXACT || key < numbers[kvq::AT_HOLE] ||
         key >= numbers[kvq::AT_HOLE_END]);
    UNROLL for (int r = 0; r < ROWS; r++) {
      s[r] *= query_scale[r];
      if (MASK != 0 && seen) {
        const auto x = mask[mask_rows[r] + key * mask_strides[3]];
        s[r] = MASK == 1 ? (x ? s[r] : masked) : s[r] + float(x) * kvq::log2_e();
      }
      s[r] = seen ? s[r] : masked;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the last tile's have been read
    kvq::probabilities_of<ROWS, V_CHANNELS>(
        own_probabilities + (own.turn * K_AT_ONCE + own.set) * ROWS, s, maxima + 8 * group, l,
        shares, sums, own_lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  const auto own_value = kvq::part_of<V_LANES, V_PARTS>(
      HELD ? lane : lane + uint(kvq::unknown_zero(first_key)));
  ROLLED for (kvq::counter turn = 0; turn < V_LANES / V_STEPS + zero; turn++) {
    UNROLL for (int step = 0; step < V_STEPS; step++) {
      const kvq::counter key = (turn * V_STEPS + step) * V_AT_ONCE + own_value.set;
      const kvq::counter row = min(key * kvq::counter(W / UNIT), last_row);
      uint words[V_PER_LANE];
      kvq::read_codes<V_PER_LANE, VB, K_WORDS, 2 * HIGHS + K_HALVES, UNIT>(
          words, tile_rows, row, own_value.part);
      const float scale = kvq::half_at<CODES, UNIT>(
          tile_rows, row, K_SCALES + own_value.part * V_CHANNELS / VG);
      kvq::add_codes<ROWS, V_PER_LANE, V_READ>(
          sums, shares, words, scale, own_probabilities + key * ROWS);
    }
  }
}

// Merge lanes that share channels, then SIMD groups: common maximum, sums through memory.
UNROLL for (int r = 0; r < ROWS; r++) {
  l[r] = simd_sum(l[r]);
  if (lane == 0) totals[8 * group + r] = l[r];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
UNROLL for (int r = 0; r < ROWS; r++) {
  float top = -3e38f;
  UNROLL for (int g = 0; g < NSG; g++) top = max(top, maxima[8 * g + r]);
  const float f = fast::exp2(maxima[8 * group + r] - top);
  UNROLL for (int i = 0; i < V_CHANNELS; i++) {
    const float excess =
        kvq::magic_excess<V_READ, HALF_STEP, true>(i % (kvq::codes_of_word(V_READ) / 2));
    float x = fma(-excess, shares[r], sums[r * V_CHANNELS + i]) * f;
    UNROLL for (int bit = V_LANES; bit < 32; bit *= 2) x += simd_shuffle_xor(x, ushort(bit));
    sums[r * V_CHANNELS + i] = x;
  }
}
auto merged = kvq::floats_of(memory);
const bool writes = int(lane) < V_PARTS;
UNROLL for (int turn = 0; turn < 2; turn++) {
  const int at_sums = int(group) % (NSG / 2) * (ROWS * VD);
  if (writes && (int(group) < NSG / 2) == (turn == 1)) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      UNROLL for (int i = 0; i < V_CHANNELS; i++) {
        const int to = at_sums + r * VD + int(lane) * V_CHANNELS + i;
        const float x = sums[r * V_CHANNELS + i];
        merged[to] = turn == 0 ? x : merged[to] + x;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
// merged [ROWS][VD]: unnormalised sums in the rotated domain.
for (int c = 32 * int(group) + int(lane); c < ROWS * VD; c += 32 * NSG) {
  float x = merged[c];
  UNROLL for (int g = 1; g < NSG / 2; g++) x += merged[g * (ROWS * VD) + c];
  merged[c] = x;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
