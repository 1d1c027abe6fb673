// Rows with narrow codes, of 3 or 5 bits (mlx_kvq/format/layout.py), of one side or of both. They are
// read as codes of 4 or 8 bits of the same levels, so only what loads and stores rows knows of them.
// The same functions as in whole.metal.
//
// A unit is 16 channels: words of low bits (one of 3-bit codes, two of 5-bit codes), a half of high
// bits, and twice as many words of wide codes.
//
// 5-bit codes become 8-bit codes on the way into a tile, not where they are used: a lane of attend
// uses a word of the tile once, so no work is repeated, and both products (tile.metal) stay as they
// are. Counted by hand, eight codes take 14 operations; 12 if the low bits were read as 4-bit codes
// are and 16 times the high bit were added to each operand. The price is room: in a tile keys are as
// long as those of 8 bits.
namespace kvq {

constexpr int low_words(int BITS) {  // of a unit
  return BITS == 5 ? 2 : 1;
}

// The half of high bits, the lower or the upper one of a word, as `widen` takes it: its bits again
// 15 places further up. Above 14 + 16 bits nobody looks.
INLINE uint lower_high_bits(uint word) {
  return masked_or(word, 0xffffu, word << 15);
}
INLINE uint upper_high_bits(uint word) {
  return masked_or(word >> 1, 0x7fff8000u, word >> 16);
}

// Word w of a unit's wide codes, from the word that has its low bits.
template <int BITS>
INLINE uint widen(uint low, uint high, int w) {
  if (BITS == 3) {
    const uint h = w == 0 ? (high & 0x11111111u) << 2 : high & 0x44444444u;
    return masked_or(w == 0 ? low : low >> 2, 0x33333333u, h) + 0x44444444u;
  }
  const uint h = w < 2 ? high << uint(4 - 2 * w) : high >> uint(2 * w - 4);
  return masked_or(w % 2 == 0 ? low : low >> 4, 0x0f0f0f0fu, h & 0x10101010u) + 0x70707070u;
}

// The other way, from 3-bit codes in nibbles or 5-bit codes in bytes.
template <int BITS>
INLINE uint low_bits(uint first, uint second) {
  return BITS == 3 ? masked_or(first, 0x33333333u, (second & 0x33333333u) << 2)
                   : masked_or(first, 0x0f0f0f0fu, (second & 0x0f0f0f0fu) << 4);
}
// Of two words: bits of the first pair of 5-bit words belong 4 places further down.
template <int BITS>
INLINE uint spread_high_bits(uint first, uint second) {
  return BITS == 3 ? masked_or(second, 0x44444444u, (first >> 2) & 0x11111111u)
                   : masked_or(first, 0x10101010u, (second & 0x10101010u) << 2);
}
INLINE ushort gathered(uint spread) {
  return ushort((spread | (spread >> 15)) & 0xffffu);
}

// Word number `index` of a side's codes as they are read; they begin at word FIRST of the row, and
// high bits of narrow codes at half HIGH.
template <int BITS, int FIRST, int HIGH>
INLINE uint code_word(const device uint* row, int index) {
  if (!is_narrow(BITS)) {
    return row[FIRST + index];
  }
  constexpr int WORDS = 2 * low_words(BITS);
  const uint half_word = reinterpret_cast<const device ushort*>(row)[HIGH + index / WORDS];
  return widen<BITS>(row[FIRST + index / 2], lower_high_bits(half_word), index % WORDS);
}

// The same of the row that begins at word `row`: one index of 32 bits, which a load adds to its base
// by itself.
template <int BITS, int FIRST, int HIGH>
INLINE uint code_word_at(const device uint* rows, counter row, counter index) {
  if (!is_narrow(BITS)) {
    return rows[row + (counter(FIRST) + index)];
  }
  constexpr counter WORDS = 2 * low_words(BITS);
  const uint half_word =
      reinterpret_cast<const device ushort*>(rows)[2 * row + (counter(HIGH) + index / WORDS)];
  const uint low = rows[row + (counter(FIRST) + index / 2)];
  return widen<BITS>(low, lower_high_bits(half_word), int(index % WORDS));
}

// Writes a lane's words of codes, of which the first is number `index` of a side's; narrow codes, of
// whole units, in nibbles or bytes.
template <int BITS, int WORDS, int FIRST, int HIGH, bool EVEN>
INLINE void store_codes(device uint* row, const thread uint* words, int index) {
  if (!is_narrow(BITS)) {
    UNROLL for (int w = 0; w < WORDS; w++) row[FIRST + index + w] = words[w];
  } else {
    constexpr int LOW = low_words(BITS);
    uint spread = 0;
    UNROLL for (int w = 0; w < LOW; w++) {
      const uint first = words[2 * w % WORDS], second = words[(2 * w + 1) % WORDS];
      row[FIRST + index / 2 + w] = low_bits<BITS>(first, second);
      spread = (spread >> 4) | spread_high_bits<BITS>(first, second);
    }
    halves_of(row)[HIGH + index / (2 * LOW)] = gathered(spread);
  }
}

// Writes the codes of a lane's eight channels, number `eight` of a side's, if `valid`. Of narrow
// codes, neighbouring lanes have a unit's: of 3 bits, one writes the low bits, the other one the high
// bits.
template <int BITS, int FIRST, int HIGH>
INLINE void store_eight_codes(device uint* row, const thread uint* words, int eight, bool valid) {
  if (!is_narrow(BITS)) {
    constexpr int WORDS = BITS / 4 > 0 ? BITS / 4 : 1;
    if (valid) {
      UNROLL for (int w = 0; w < WORDS; w++) row[FIRST + eight * WORDS + w] = words[w];
    }
  } else if (BITS == 3) {
    const uint other = simd_shuffle_xor(words[0], ushort(1));
    if (valid && eight % 2 == 0) {
      row[FIRST + eight / 2] = low_bits<BITS>(words[0], other);
    } else if (valid) {
      halves_of(row)[HIGH + eight / 2] = gathered(spread_high_bits<BITS>(other, words[0]));
    }
  } else {
    const uint own = spread_high_bits<BITS>(words[0], words[low_words(BITS) - 1]);
    const uint spread = eight % 2 == 0 ? own >> 4 : own;
    const uint other = simd_shuffle_xor(spread, ushort(1));
    if (valid) row[FIRST + eight] = low_bits<BITS>(words[0], words[low_words(BITS) - 1]);
    if (valid && eight % 2 == 0) halves_of(row)[HIGH + eight / 2] = gathered(spread | other);
  }
}

// N neighbouring words of a row, 1, 2 or 4, aligned to them.
template <int N>
INLINE void read_words(thread uint* words, const device uint* from) {
  if (N == 4) {
    const uint4 x = *reinterpret_cast<const device uint4*>(from);
    words[0] = x.x;
    words[1 % N] = x.y;
    words[2 % N] = x.z;
    words[3 % N] = x.w;
  } else if (N == 2) {
    const uint2 x = *reinterpret_cast<const device uint2*>(from);
    words[0] = x.x;
    words[1 % N] = x.y;
  } else {
    words[0] = from[0];
  }
}
// N words to a tile, in stores of WIDTH, aligned to them.
template <int N, int WIDTH>
INLINE void write_words(threadgroup uint* to, const thread uint* words) {
  UNROLL for (int i = 0; i < N; i += WIDTH) {
    if (WIDTH == 4) {
      *reinterpret_cast<threadgroup uint4*>(to + i) =
          uint4(words[i], words[(i + 1) % N], words[(i + 2) % N], words[(i + 3) % N]);
    } else if (WIDTH == 2) {
      *reinterpret_cast<threadgroup uint2*>(to + i) = uint2(words[i], words[(i + 1) % N]);
    } else {
      to[i] = words[i];
    }
  }
}

constexpr int both_divide(int a, int b, int most) {  // the largest of 4, 2, 1 up to `most`
  return most >= 4 && a % 4 == 0 && b % 4 == 0 ? 4 : most >= 2 && a % 2 == 0 && b % 2 == 0 ? 2 : 1;
}

// COUNT words of each of a tile's rows, from word FROM on, that become words TO of its rows in the
// tile as they are. A lane takes so many at once.
constexpr int copied_at_once(int W, int FROM, int COUNT, int TILE_W, int TO) {
  return both_divide(both_divide(W, FROM, 4), both_divide(COUNT, both_divide(TILE_W, TO, 4), 4), 4);
}
// UNITS units of each row, with low bits from word LOW on and high bits from word HIGH on, that
// become words TO of its row in the tile. A lane takes so many neighbouring ones at once: up to
// eight words of wide codes.
constexpr int units_at_once(int BITS, int W, int LOW, int HIGH, int UNITS) {
  return BITS == 5 ? (UNITS % 2 == 0 ? 2 : 1)
      : UNITS % 4 == 0 && HIGH % 2 == 0 && both_divide(W, LOW, 4) == 4 ? 4
      : UNITS % 2 == 0 && both_divide(W, LOW, 2) == 2                   ? 2
                                                                        : 1;
}
constexpr int unit_words(int BITS, int AT_ONCE) {  // of so many units
  return AT_ONCE * low_words(BITS) + (AT_ONCE + 1) / 2;
}
// Loads of a lane for a tile.
constexpr int passes(int TK, int COUNT, int AT_ONCE) {
  return (TK * COUNT / AT_ONCE + 31) / 32;
}

template <int TK, int W, int FROM, int COUNT, int TILE_W, int TO, int PASSES>
INLINE void load_words(
    thread uint* stage, const device uint* rows, int first, int valid, uint lane) {
  constexpr int N = copied_at_once(W, FROM, COUNT, TILE_W, TO);
  constexpr int LANES = COUNT > N ? COUNT / N : 1;  // of a row
  UNROLL for (int i = 0; i < PASSES; i++) {
    const uint item = uint(first + 32 * i) + lane;
    const int row = int(item / uint(LANES)), at = int(item % uint(LANES));
    UNROLL for (int j = 0; j < N; j++) stage[i * N + j] = 0;
    if (row < valid) read_words<N>(stage + i * N, rows + row * W + FROM + at * N);
  }
}
template <int TK, int W, int FROM, int COUNT, int TILE_W, int TO, int PASSES>
INLINE void store_words(threadgroup uint* tile, const thread uint* stage, int first, uint lane) {
  constexpr int N = copied_at_once(W, FROM, COUNT, TILE_W, TO);
  constexpr int LANES = COUNT > N ? COUNT / N : 1;
  UNROLL for (int i = 0; i < PASSES; i++) {
    const uint item = uint(first + 32 * i) + lane;
    const int row = int(item / uint(LANES)), at = int(item % uint(LANES));
    if (row < TK) write_words<N, N>(tile + row * TILE_W + TO + at * N, stage + i * N);
  }
}

template <int BITS, int TK, int W, int LOW, int HIGH, int UNITS, int PASSES>
INLINE void load_units(
    thread uint* stage, const device uint* rows, int first, int valid, uint lane) {
  constexpr int N = units_at_once(BITS, W, LOW, HIGH, UNITS);
  constexpr int LANES = UNITS / N;
  constexpr int LOWS = N * low_words(BITS);
  constexpr int WIDTH = both_divide(both_divide(W, LOW, 4), LOWS, 4);
  UNROLL for (int i = 0; i < PASSES; i++) {
    const uint item = uint(first + 32 * i) + lane;
    const int row = int(item / uint(LANES)), at = int(item % uint(LANES));
    thread uint* s = stage + i * unit_words(BITS, N);
    UNROLL for (int j = 0; j < unit_words(BITS, N); j++) s[j] = 0;
    if (row < valid) {
      const device uint* from = rows + row * W;
      UNROLL for (int j = 0; j < LOWS; j += WIDTH) {
        read_words<WIDTH>(s + j, from + LOW + at * LOWS + j);
      }
      if (N == 1) {
        s[LOWS] = reinterpret_cast<const device ushort*>(from + HIGH)[at];
      } else {
        read_words<(N + 1) / 2>(s + LOWS, from + HIGH + at * (N / 2));
      }
    }
  }
}
template <int BITS, int TK, int W, int LOW, int HIGH, int UNITS, int TILE_W, int TO, int PASSES>
INLINE void store_units(threadgroup uint* tile, const thread uint* stage, int first, uint lane) {
  constexpr int N = units_at_once(BITS, W, LOW, HIGH, UNITS);
  constexpr int LANES = UNITS / N;
  constexpr int LOWS = N * low_words(BITS), WIDE_WORDS = 2 * low_words(BITS);
  constexpr int WIDTH = both_divide(TILE_W, TO, 2 * LOWS);
  UNROLL for (int i = 0; i < PASSES; i++) {
    const uint item = uint(first + 32 * i) + lane;
    const int row = int(item / uint(LANES)), at = int(item % uint(LANES));
    const thread uint* s = stage + i * unit_words(BITS, N);
    uint words[2 * LOWS];
    UNROLL for (int j = 0; j < N; j++) {
      const uint word = s[LOWS + j / 2];
      const uint high = j % 2 == 0 ? lower_high_bits(word) : upper_high_bits(word);
      UNROLL for (int w = 0; w < WIDE_WORDS; w++) {
        words[j * WIDE_WORDS + w] = widen<BITS>(s[j * low_words(BITS) + w / 2], high, w);
      }
    }
    if (row < TK) write_words<2 * LOWS, WIDTH>(tile + row * TILE_W + TO + at * (2 * LOWS), words);
  }
}

// The parts of a row and of its copy in a tile, in words: the side whose codes are whole, if there
// is one, which is copied; units; and scales. Keys come first, so units begin after copied keys, and
// copied values after units. High bits begin after both.
constexpr int narrow_bits(int KB, int VB) {
  return is_narrow(KB) ? KB : VB;
}
constexpr int copied(int KD, int KB, int VD, int VB) {
  return !is_narrow(KB) ? KD * KB / 32 : !is_narrow(VB) ? VD * VB / 32 : 0;
}
constexpr int units_of(int KD, int KB, int VD, int VB) {
  return (is_narrow(KB) ? KD / 16 : 0) + (is_narrow(VB) ? VD / 16 : 0);
}
template <int KD, int KB, int VD, int VB, int W, int TILE_W>
struct row_parts {
  enum : int {
    BITS = narrow_bits(KB, VB),
    COPIED = copied(KD, KB, VD, VB),
    UNITS = units_of(KD, KB, VD, VB),
    LOWS = UNITS * low_words(BITS),
    LOW = is_narrow(KB) ? 0 : COPIED,        // units begin here, in the row and in the tile
    COPY_FROM = is_narrow(KB) ? LOWS : 0,    // the copied side in the row
    COPY_TO = is_narrow(KB) ? 2 * LOWS : 0,  // ... and in the tile
    HIGH = COPIED + LOWS,
    SCALES = TILE_W - COPIED - 2 * LOWS,
    FROM = W - SCALES,
    TO = TILE_W - SCALES,
    UNITS_AT_ONCE = units_at_once(BITS, W, LOW, HIGH, UNITS),
    COPIED_AT_ONCE = copied_at_once(W, COPY_FROM, COPIED, TILE_W, COPY_TO),
    SCALES_AT_ONCE = copied_at_once(W, FROM, SCALES, TILE_W, TO)
  };
};

// A SIMD group's copy of a tile of TK rows, contiguous in memory, to wide rows of TILE_W words:
// into registers first, so that the next tile is on its way while this one is used. Each word is
// read once. Rows past `valid` have scales of zero, hence are finite.
//
// Loads of a lane for each part of a tile, and the words of its registers that hold them.
template <int TK, typename P>
constexpr int copy_loads() {
  return passes(TK, P::COPIED, P::COPIED_AT_ONCE);
}
template <int TK, typename P>
constexpr int unit_loads() {
  return passes(TK, P::UNITS, P::UNITS_AT_ONCE);
}
template <int TK, typename P>
constexpr int scale_loads() {
  return passes(TK, P::SCALES, P::SCALES_AT_ONCE);
}
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
constexpr int stage_words() {
  typedef row_parts<KD, KB, VD, VB, W, TILE_W> P;
  return copy_loads<TK, P>() * P::COPIED_AT_ONCE +
      unit_loads<TK, P>() * unit_words(P::BITS, P::UNITS_AT_ONCE) +
      scale_loads<TK, P>() * P::SCALES_AT_ONCE;
}

template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void load_rows(thread uint* stage, const device uint* rows, int valid, uint lane) {
  typedef row_parts<KD, KB, VD, VB, W, TILE_W> P;
  if (P::COPIED > 0) {
    load_words<TK, W, P::COPY_FROM, P::COPIED, TILE_W, P::COPY_TO, copy_loads<TK, P>()>(
        stage, rows, 0, valid, lane);
    stage += copy_loads<TK, P>() * P::COPIED_AT_ONCE;
  }
  load_units<P::BITS, TK, W, P::LOW, P::HIGH, P::UNITS, unit_loads<TK, P>()>(
      stage, rows, 0, valid, lane);
  stage += unit_loads<TK, P>() * unit_words(P::BITS, P::UNITS_AT_ONCE);
  load_words<TK, W, P::FROM, P::SCALES, TILE_W, P::TO, scale_loads<TK, P>()>(
      stage, rows, 0, valid, lane);
}

template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void store_rows(threadgroup uint* tile, const thread uint* stage, uint lane) {
  typedef row_parts<KD, KB, VD, VB, W, TILE_W> P;
  if (P::COPIED > 0) {
    store_words<TK, W, P::COPY_FROM, P::COPIED, TILE_W, P::COPY_TO, copy_loads<TK, P>()>(
        tile, stage, 0, lane);
    stage += copy_loads<TK, P>() * P::COPIED_AT_ONCE;
  }
  store_units<P::BITS, TK, W, P::LOW, P::HIGH, P::UNITS, TILE_W, P::LOW, unit_loads<TK, P>()>(
      tile, stage, 0, lane);
  stage += unit_loads<TK, P>() * unit_words(P::BITS, P::UNITS_AT_ONCE);
  store_words<TK, W, P::FROM, P::SCALES, TILE_W, P::TO, scale_loads<TK, P>()>(
      tile, stage, 0, lane);
}

// The same without registers for a whole tile: up to 32 bytes of a lane in flight at once. With two
// loads of four units, G13 would spill more registers than int4 does (tests/emulator/agx_table.py).
template <int TK, int W, int FROM, int COUNT, int TILE_W, int TO>
INLINE void copy_words(threadgroup uint* tile, const device uint* rows, int valid, uint lane) {
  constexpr int N = copied_at_once(W, FROM, COUNT, TILE_W, TO);
  constexpr int AT_ONCE = N < 4 && passes(TK, COUNT, N) > 1 ? 2 : 1;
  ROLLED for (int first = 0; first < TK * COUNT / N; first += 32 * AT_ONCE) {
    uint stage[AT_ONCE * N];
    load_words<TK, W, FROM, COUNT, TILE_W, TO, AT_ONCE>(stage, rows, first, valid, lane);
    store_words<TK, W, FROM, COUNT, TILE_W, TO, AT_ONCE>(tile, stage, first, lane);
  }
}
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void copy_rows(threadgroup uint* tile, const device uint* rows, int valid, uint lane) {
  typedef row_parts<KD, KB, VD, VB, W, TILE_W> P;
  constexpr int N = P::UNITS_AT_ONCE, WORDS = unit_words(P::BITS, N);
  constexpr int AT_ONCE = WORDS < 4 && unit_loads<TK, P>() > 1 ? 2 : 1;
  if (P::COPIED > 0) {
    copy_words<TK, W, P::COPY_FROM, P::COPIED, TILE_W, P::COPY_TO>(tile, rows, valid, lane);
  }
  ROLLED for (int first = 0; first < TK * P::UNITS / N; first += 32 * AT_ONCE) {
    uint stage[AT_ONCE * WORDS];
    load_units<P::BITS, TK, W, P::LOW, P::HIGH, P::UNITS, AT_ONCE>(
        stage, rows, first, valid, lane);
    store_units<P::BITS, TK, W, P::LOW, P::HIGH, P::UNITS, TILE_W, P::LOW, AT_ONCE>(
        tile, stage, first, lane);
  }
  copy_words<TK, W, P::FROM, P::SCALES, TILE_W, P::TO>(tile, rows, valid, lane);
}

// Narrow codes become wide ones in registers, so none are sent: such a SIMD group has one tile.
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void send_rows(threadgroup uint* tile, const device uint* rows, int valid, uint lane) {
  copy_rows<TK, KD, KB, VD, VB, W, TILE_W>(tile, rows, min(TK, valid), lane);
}

}  // namespace kvq
