// Keys rounded with feedback (mlx_kvq/format/feedback.py): blocks of eight channels from the last
// to the first, each towards what makes up for the errors so far. The arithmetic is that of
// `mlx_kvq.format.levels.quantize_with_feedback`.
//
// A SIMD group rounds V vectors side by side: a block waits for the one after it, and V such chains
// take little longer than one. What is done for a vector does not depend on V or on the others.
// Lane l has channels 32 i + l of a group of channels, in registers; what lies before the group
// waits in threadgroup memory, where errors and levels take the place of vectors and of targets.
namespace kvq {

constexpr int slices_of(int GROUP) {
  return (GROUP + 31) / 32;
}

// Whether the lane has a channel of this slice of a group.
template <int GROUP>
INLINE bool in_group(int slice, uint lane) {
  return 32 * slice + 32 <= GROUP || 32 * slice + int(lane) < GROUP;
}

// Sums of N numbers, or the largest, over all lanes, in every lane. Additions are in one order for
// all N. Where vectors are rounded side by side, so are these.
template <int N, bool SUM>
INLINE void reduce(thread float* x) {
  if (FED_AT_ONCE == 1) {
    UNROLL for (int i = 0; i < N; i++) x[i] = SUM ? simd_sum(x[i]) : simd_max(x[i]);
  } else {
    UNROLL for (int h = 1; h < 32; h *= 2) {
      UNROLL for (int i = 0; i < N; i++) {
        const float other = simd_shuffle_xor(x[i], ushort(h));
        x[i] = SUM ? x[i] + other : max(x[i], other);
      }
    }
  }
}

// Blocks whose gains are on their way at once: the chain of one block is shorter than the way of
// the next one's gains. Keys of a prompt find them nearer by. Registers are few without HOLD_TABLES.
constexpr int blocks_at_once(int V, int GROUP) {
  return HOLD_TABLES != 0 ? (V == 1 ? 4 : 2) : GROUP % 32 == 0 ? 2 : 1;
}

// Row 8 block + j of G [D, D] says what an error of channel j of the block adds to others: its
// element for the lane's channel of the 32 from number `first` on.
template <int D, int GROUP>
INLINE void read_gains(thread float* g, const device float* G, int block, int first, uint lane) {
  const uint own = lane + uint(unknown_zero(block));  // or compilers keep addresses for all blocks
  const uint at = uint(first) + own;
  const device float* from =
      G + (uint(8 * D * block) + (GROUP % 32 == 0 ? at : min(at, uint(D - 1))));
  UNROLL for (int j = 0; j < 8; j++) g[j] = from[j * D];
}

// Two sums, because the next block waits for this one.
INLINE float fed_back(float t, const thread float* g, const thread float* errors) {
  float even = fma(g[0], errors[0], t), odd = g[1] * errors[1];
  UNROLL for (int j = 2; j < 8; j += 2) {
    even = fma(g[j], errors[j], even);
    odd = fma(g[j + 1], errors[j + 1], odd);
  }
  return even + odd;
}

// EXACT as in `code_channels`.
template <int BITS, int RULE, bool EXACT>
INLINE float nearest_level(float x, float step, float inverse) {
  constexpr float MIDDLE = float(1 << (BITS - 1));
  const float q = EXACT ? (step > 0.0f ? x / step : 0.0f) : x * inverse;
  return RULE == PAPER ? clamp(rint(q), 1.0f - MIDDLE, MIDDLE - 1.0f)
                       : clamp(floor(q), -MIDDLE, MIDDLE - 1.0f) + 0.5f;
}

// What is left of y; fma, because compilers differ in whether they make one.
INLINE float error_of(float y, float step, float level) {
  return fma(-step, level, y);
}

// The steps for V vectors' targets of a group, t [V, slices], and their inverses; 0 for zeros.
template <int V, int BITS, int GROUP, int RULE, bool EXACT>
INLINE void find_steps(
    thread float* step, thread float* inverse, const thread float* t, uint lane) {
  constexpr int SLICES = slices_of(GROUP);
  float top[V];
  UNROLL for (int v = 0; v < V; v++) {
    top[v] = 0.0f;
    UNROLL for (int i = 0; i < SLICES; i++) {
      top[v] = in_group<GROUP>(i, lane) ? max(top[v], fabs(t[v * SLICES + i])) : top[v];
    }
  }
  reduce<V, false>(top);
  if (RULE != SEARCH) {
    constexpr int LEVELS = RULE == PAPER ? (1 << BITS) - 2 : (1 << BITS) - 1;
    UNROLL for (int v = 0; v < V; v++) {
      const bool some = top[v] >= smallest_half();
      step[v] = some ? scale_to_half(top[v] * (2.0f / float(LEVELS))) : 0.0f;
      inverse[v] = step[v] > 0.0f ? reciprocal(step[v]) : 0.0f;
    }
    return;
  }
  float sums[4 * V];  // dot and squared length of the levels, of two steps tried
  float tried[2 * V], by[2 * V];
  UNROLL for (int v = 0; v < V; v++) {
    const bool some = top[v] > least_top(BITS);
    const float whole = some ? reciprocal(0.25f * top[v]) : 0.0f;
    UNROLL for (int k = 0; k < 2; k++) {
      const float part = float(tried_scale(BITS, GROUP, k)) / tried_parts(BITS);
      tried[2 * v + k] = some ? top[v] * part : 0.0f;
      by[2 * v + k] = whole * (0.25f / part);
      float dot = 0.0f, length = 0.0f;
      UNROLL for (int i = 0; i < SLICES; i++) {
        if (in_group<GROUP>(i, lane)) {
          const float x = t[v * SLICES + i];
          const float level = nearest_level<BITS, RULE, EXACT>(x, tried[2 * v + k], by[2 * v + k]);
          dot = fma(x, level, dot);
          length = fma(level, level, length);
        }
      }
      sums[4 * v + 2 * k] = dot;
      sums[4 * v + 2 * k + 1] = length;
    }
  }
  reduce<4 * V, true>(sums);
  UNROLL for (int v = 0; v < V; v++) {
    const thread float* s = sums + 4 * v;
    const bool second = s[2] * s[2] * s[1] > s[0] * s[0] * s[3];
    step[v] = second ? tried[2 * v + 1] : tried[2 * v];
    inverse[v] = second ? by[2 * v + 1] : by[2 * v];
  }
}

// The scales that are stored: a searched one gives the levels, which lie at `level` [V, D] from the
// group's first channel on, the length of the targets.
template <int V, int D, int GROUP, int RULE>
INLINE void find_scales(
    thread float* scale, const thread float* step, const thread float* t,
    const threadgroup float* level, uint lane) {
  constexpr int SLICES = slices_of(GROUP);
  float sums[2 * V];
  UNROLL for (int v = 0; v < V; v++) {
    scale[v] = step[v];
    sums[2 * v] = 0.0f;
    sums[2 * v + 1] = 0.0f;
    UNROLL for (int i = 0; i < SLICES; i++) {
      if (RULE == SEARCH && in_group<GROUP>(i, lane)) {
        const float x = t[v * SLICES + i], n = level[v * D + 32 * i + int(lane)];
        sums[2 * v] = fma(x, x, sums[2 * v]);
        sums[2 * v + 1] = fma(n, n, sums[2 * v + 1]);
      }
    }
  }
  if (RULE == SEARCH) {
    reduce<2 * V, true>(sums);
    UNROLL for (int v = 0; v < V; v++) {
      const float s = square_root(sums[2 * v] * reciprocal(sums[2 * v + 1]));
      scale[v] = step[v] > 0.0f ? float(half(min(s, 65504.0f))) : 0.0f;
    }
  }
}

// Whether a vector's group has a NaN or an infinity.
template <int GROUP>
INLINE bool is_damaged(const thread float* t, uint lane) {
  constexpr int SLICES = slices_of(GROUP);
  bool damaged = false;
  UNROLL for (int i = 0; i < SLICES; i++) {
    damaged = damaged || (in_group<GROUP>(i, lane) && !isfinite(t[i]));
  }
  return simd_any(damaged);
}

// The gains for 32 channels of `count` blocks, COUNT at most, from number `last` of G downwards.
template <int D, int GROUP, int COUNT>
INLINE void read_blocks(
    thread float* g, const device float* G, int last, int count, int first, uint lane) {
  UNROLL for (int k = 0; k < COUNT; k++) {
    if (k < count) read_gains<D, GROUP>(g + 8 * k, G, last - k, first, lane);
  }
}

// Rounds a block of a slice to levels and feeds its errors to the slice, by the gains g, and to
// those before it in the group. As in `round_blocks`, but y and level begin with the slice.
template <int V, int D, int BITS, int GROUP, int RULE, bool EXACT>
INLINE void round_block(
    thread float* t, const thread float* step, const thread float* inverse,
    const threadgroup float* y, threadgroup float* level, const thread float* g,
    const device float* G, int low, int slice, int block, uint lane) {
  constexpr int SLICES = slices_of(GROUP);
  float e[V], errors[8 * V];
  UNROLL for (int v = 0; v < V; v++) {
    const float x = in_group<GROUP>(slice, lane) ? y[v * D + int(lane)] : 0.0f;
    const float n = nearest_level<BITS, RULE, EXACT>(t[v * SLICES + slice], step[v], inverse[v]);
    e[v] = step[v] > 0.0f ? error_of(x, step[v], n) : 0.0f;
    if (int(lane) / 8 == block) level[v * D + int(lane)] = n;
  }
  UNROLL for (int j = 0; j < 8; j++) {
    UNROLL for (int v = 0; v < V; v++) {
      errors[8 * v + j] = simd_shuffle(e[v], ushort(8 * block + j));
    }
  }
  UNROLL for (int v = 0; v < V; v++) {
    const float x = fed_back(t[v * SLICES + slice], g, errors + 8 * v);
    t[v * SLICES + slice] = int(lane) < 8 * block ? x : t[v * SLICES + slice];
  }
  UNROLL for (int i = 0; i < SLICES; i++) {
    if (i < slice) {
      float own[8];
      read_gains<D, GROUP>(own, G, low / 8 + 4 * slice + block, low + 32 * i, lane);
      UNROLL for (int v = 0; v < V; v++) {
        t[v * SLICES + i] = fed_back(t[v * SLICES + i], own, errors + 8 * v);
      }
    }
  }
}

// Rounds the blocks of a group from the last to the first, each towards its targets t [V, slices],
// which make up for the errors so far. y and level [V, D] begin with the group; g: gains of its
// last blocks.
template <int V, int D, int BITS, int GROUP, int RULE, bool EXACT>
INLINE void round_blocks(
    thread float* t, const thread float* step, const thread float* inverse,
    const threadgroup float* y, threadgroup float* level, thread float* g, const device float* G,
    int low, uint lane) {
  constexpr int SLICES = slices_of(GROUP), AHEAD = blocks_at_once(V, GROUP);
  UNROLL for (int slice = SLICES - 1; slice >= 0; slice--) {
    const int last = min(GROUP / 8 - 4 * slice, 4) - 1;
    ROLLED for (int block = last; block >= 0; block -= AHEAD) {
      if (block < last || slice < SLICES - 1) {
        read_blocks<D, GROUP, AHEAD>(
            g, G, low / 8 + 4 * slice + block, block + 1, low + 32 * slice, lane);
      }
      UNROLL for (int k = 0; k < AHEAD; k++) {
        if (k <= block) {
          round_block<V, D, BITS, GROUP, RULE, EXACT>(
              t, step, inverse, y + 32 * slice, level + 32 * slice, g + 8 * k, G, low, slice,
              block - k, lane);
        }
      }
    }
  }
}

// Adds to targets t [V, D] of the channels before number `low` what makes up for the group's errors
// e [V, D], which begins there.
template <int V, int D, int GROUP>
INLINE void feed_before(
    threadgroup float* t, const threadgroup float* e, const device float* G, int low, uint lane) {
  constexpr int MOST = HOLD_TABLES != 0 ? 4 : 1, BLOCKS = GROUP / 8;
  constexpr int AHEAD = BLOCKS % MOST == 0 ? MOST : BLOCKS % 2 == 0 && MOST > 1 ? 2 : 1;
  ROLLED for (int first = 0; first < low; first += 32) {
    const bool own = GROUP % 32 == 0 || first + int(lane) < low;
    float x[V];
    UNROLL for (int v = 0; v < V; v++) x[v] = own ? t[v * D + first + int(lane)] : 0.0f;
    ROLLED for (int block = 0; block < GROUP / 8; block += AHEAD) {
      float g[8 * AHEAD];
      UNROLL for (int i = 0; i < AHEAD; i++) {
        read_gains<D, GROUP>(g + 8 * i, G, low / 8 + block + i, first, lane);
      }
      UNROLL for (int i = 0; i < AHEAD; i++) {
        UNROLL for (int v = 0; v < V; v++) {
          float errors[8];
          UNROLL for (int j = 0; j < 8; j++) errors[j] = e[v * D + 8 * (block + i) + j];
          x[v] = fed_back(x[v], g + 8 * i, errors);
        }
      }
    }
    UNROLL for (int v = 0; v < V; v++) {
      if (own) t[v * D + first + int(lane)] = x[v];
    }
  }
}

// Rounds the group from channel `low` on of V vectors y [V, D] to levels, which take the place of
// its targets t [V, D]; targets before it then make up for its errors. scale: bits of fp16.
template <int V, int D, int BITS, int GROUP, int RULE, bool EXACT>
INLINE void round_group(
    thread ushort* scale, threadgroup float* y, threadgroup float* t, const device float* G,
    int low, uint lane) {
  constexpr float LOWEST = (RULE == PAPER ? 0.0f : 0.5f) - float(1 << (BITS - 1));
  constexpr int SLICES = slices_of(GROUP);
  float target[V * SLICES], step[V], inverse[V], stored[V];
  bool damaged[V];
  UNROLL for (int v = 0; v < V; v++) {
    UNROLL for (int i = 0; i < SLICES; i++) {
      const bool own = in_group<GROUP>(i, lane);
      target[v * SLICES + i] = own ? t[v * D + low + 32 * i + int(lane)] : 0.0f;
    }
    damaged[v] = is_damaged<GROUP>(target + v * SLICES, lane);
  }
  constexpr int AHEAD = blocks_at_once(V, GROUP);
  float g[8 * AHEAD];
  read_blocks<D, GROUP, AHEAD>(
      g, G, (low + GROUP) / 8 - 1, (GROUP / 8 - 1) % 4 + 1, low + 32 * (SLICES - 1), lane);
  find_steps<V, BITS, GROUP, RULE, EXACT>(step, inverse, target, lane);
  // A damaged group has code 0 and a NaN scale. It passes nothing on, like one of zeros.
  UNROLL for (int v = 0; v < V; v++) {
    step[v] = damaged[v] ? 0.0f : step[v];
    inverse[v] = damaged[v] ? 0.0f : inverse[v];
  }
  round_blocks<V, D, BITS, GROUP, RULE, EXACT>(
      target, step, inverse, y + low, t + low, g, G, low, lane);
  find_scales<V, D, GROUP, RULE>(stored, step, target, t + low, lane);
  UNROLL for (int v = 0; v < V; v++) {
    const bool later = is_damaged<GROUP>(target + v * SLICES, lane);
    damaged[v] = damaged[v] || later;
    scale[v] = damaged[v] ? ushort(0x7e00) : as_type<ushort>(half(stored[v]));
    UNROLL for (int i = 0; i < SLICES; i++) {
      const int at = v * D + low + 32 * i + int(lane);
      if (in_group<GROUP>(i, lane)) {
        y[at] = step[v] > 0.0f ? error_of(y[at], stored[v], t[at]) : 0.0f;
        t[at] = damaged[v] ? LOWEST : t[at];
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);  // all lanes read the errors
  feed_before<V, D, GROUP>(t, y + low, G, low, lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);  // and the targets, or the levels
}

// Writes the codes of `count` vectors' levels [V, D], vector v to row + v * W: a lane per word, or
// per unit of narrow codes.
template <int D, int BITS, int RULE, int FIRST, int HIGH, int W>
INLINE void store_levels(device uint* row, const threadgroup float* level, int count, uint lane) {
  constexpr float ZERO = float(1 << (BITS - 1)) - (RULE == PAPER ? 0.0f : 0.5f);
  constexpr int WIDE_BITS = wide_bits(BITS);
  constexpr int CODES_OF_WORD = 32 / WIDE_BITS;
  constexpr int WORDS = BITS == 3 ? 2 : BITS == 5 ? 4 : 1;  // that a lane writes
  constexpr int UNITS = D / (WORDS * CODES_OF_WORD);
  ROLLED for (int at = int(lane); at < count * UNITS; at += 32) {
    const int v = at / UNITS, unit = at % UNITS;
    uint words[WORDS];
    UNROLL for (int w = 0; w < WORDS; w++) {
      words[w] = 0;
      UNROLL for (int i = 0; i < CODES_OF_WORD; i++) {
        const float n = level[v * D + (unit * WORDS + w) * CODES_OF_WORD + i];
        words[w] |= uint(n + ZERO) << uint(WIDE_BITS * i);
      }
    }
    store_codes<BITS, WORDS, FIRST, HIGH, false>(row + v * W, words, unit * WORDS);
  }
}

// Quantizes vectors `shared`, channels in order, V at once, of which `count` are there, and writes
// them to rows, as `store_shared` does. `spare` is threadgroup memory for as many channels.
template <
    int V, int D, int BITS, int GROUP, int RULE, int ROTATION, int FIRST, int HIGH, int CODES,
    int SCALE, int W>
INLINE void store_with_feedback(
    device uint* row, threadgroup float2* shared, threadgroup float2* spare, int count,
    const device float* G, uint lane) {
  threadgroup float* y = reinterpret_cast<threadgroup float*>(shared);
  threadgroup float* t = reinterpret_cast<threadgroup float*>(spare);
  UNROLL for (int v = 0; v < V; v++) {
    for (int c = int(lane); c < D; c += 32) {
      if (v >= count) y[v * D + c] = 0.0f;
      t[v * D + c] = y[v * D + c];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  ROLLED for (int low = D - GROUP; low >= 0; low -= GROUP) {
    ushort scale[V];
    round_group<V, D, BITS, GROUP, RULE, is_none(ROTATION)>(scale, y, t, G, low, lane);
    UNROLL for (int v = 0; v < V; v++) {
      if (lane == 0 && v < count) {
        halves_of(row + v * W + CODES)[SCALE + low / GROUP] = scale[v];
      }
    }
  }
  store_levels<D, BITS, RULE, FIRST, HIGH, W>(row, t, min(count, V), lane);
  simdgroup_barrier(mem_flags::mem_threadgroup);  // the next vectors or rotation write here
}

}  // namespace kvq
