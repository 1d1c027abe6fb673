// Rows with codes of 3 bits (mlx_kvq/format/layout.py): of the values, and of the keys if KB is 3.
// They are read as 4-bit codes of the same levels, so only what loads and stores rows knows of
// them. The same functions as in whole.metal.
//
// A unit is 16 channels: a word of low bits, a half of high bits, two words of 4-bit codes.
namespace kvq {

// The half of high bits, the lower or the upper one of a word, as `widen` takes it: its bits again
// 15 places further up. Above 14 + 16 bits nobody looks.
INLINE uint lower_high_bits(uint word) {
  return masked_or(word, 0xffffu, word << 15);
}
INLINE uint upper_high_bits(uint word) {
  return masked_or(word >> 1, 0x7fff8000u, word >> 16);
}

INLINE uint widen_first(uint low, uint high) {
  return masked_or(low, 0x33333333u, (high & 0x11111111u) << 2) + 0x44444444u;
}
INLINE uint widen_second(uint low, uint high) {
  return masked_or(low >> 2, 0x33333333u, high & 0x44444444u) + 0x44444444u;
}

// The other way, from 3-bit codes in nibbles.
INLINE uint low_bits(uint first, uint second) {
  return masked_or(first, 0x33333333u, (second & 0x33333333u) << 2);
}
INLINE ushort high_bits(uint first, uint second) {
  const uint x = masked_or(second, 0x44444444u, (first >> 2) & 0x11111111u);
  return ushort((x | (x >> 15)) & 0xffffu);
}

// Word number `index` of a side's codes as they are read; they begin at word FIRST of the row, and
// high bits of 3-bit codes at half HIGH.
template <int BITS, int FIRST, int HIGH>
INLINE uint code_word(const device uint* row, int index) {
  if (BITS != 3) {
    return row[FIRST + index];
  }
  const uint low = row[FIRST + index / 2];
  const uint half_word = reinterpret_cast<const device ushort*>(row)[HIGH + index / 2];
  const uint high = lower_high_bits(half_word);
  return index % 2 == 0 ? widen_first(low, high) : widen_second(low, high);
}

// Writes a lane's words of codes, of which the first is number `index` of a side's; 3-bit codes in
// nibbles, of whole units.
template <int BITS, int WORDS, int FIRST, int HIGH, bool EVEN>
INLINE void store_codes(device uint* row, const thread uint* words, int index) {
  if (BITS != 3) {
    UNROLL for (int w = 0; w < WORDS; w++) row[FIRST + index + w] = words[w];
  } else {
    row[FIRST + index / 2] = low_bits(words[0], words[1 % WORDS]);
    halves_of(row)[HIGH + index / 2] = high_bits(words[0], words[1 % WORDS]);
  }
}

// Writes the codes of a lane's eight channels, number `eight` of a side's, if `valid`. Of 3 bits,
// neighbouring lanes have a unit's codes: one writes the low bits, the other one the high bits.
template <int BITS, int FIRST, int HIGH>
INLINE void store_eight_codes(device uint* row, const thread uint* words, int eight, bool valid) {
  if (BITS != 3) {
    constexpr int WORDS = BITS / 4 > 0 ? BITS / 4 : 1;
    if (valid) {
      UNROLL for (int w = 0; w < WORDS; w++) row[FIRST + eight * WORDS + w] = words[w];
    }
  } else {
    const uint other = simd_shuffle_xor(words[0], ushort(1));
    if (valid && eight % 2 == 0) {
      row[FIRST + eight / 2] = low_bits(words[0], other);
    } else if (valid) {
      halves_of(row)[HIGH + eight / 2] = high_bits(other, words[0]);
    }
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
// become words TO of its row in the tile. A lane takes so many neighbouring ones at once.
constexpr int units_at_once(int W, int LOW, int HIGH, int UNITS) {
  return UNITS % 4 == 0 && HIGH % 2 == 0 && both_divide(W, LOW, 4) == 4 ? 4
      : UNITS % 2 == 0 && both_divide(W, LOW, 2) == 2                   ? 2
                                                                        : 1;
}
constexpr int unit_words(int AT_ONCE) {  // of so many units
  return AT_ONCE + (AT_ONCE + 1) / 2;
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

template <int TK, int W, int LOW, int HIGH, int UNITS, int PASSES>
INLINE void load_units(
    thread uint* stage, const device uint* rows, int first, int valid, uint lane) {
  constexpr int N = units_at_once(W, LOW, HIGH, UNITS);
  constexpr int LANES = UNITS / N;
  UNROLL for (int i = 0; i < PASSES; i++) {
    const uint item = uint(first + 32 * i) + lane;
    const int row = int(item / uint(LANES)), at = int(item % uint(LANES));
    thread uint* s = stage + i * unit_words(N);
    UNROLL for (int j = 0; j < unit_words(N); j++) s[j] = 0;
    if (row < valid) {
      const device uint* from = rows + row * W;
      read_words<N>(s, from + LOW + at * N);
      if (N == 1) {
        s[1] = reinterpret_cast<const device ushort*>(from + HIGH)[at];
      } else {
        read_words<(N + 1) / 2>(s + N, from + HIGH + at * (N / 2));
      }
    }
  }
}
template <int TK, int W, int LOW, int HIGH, int UNITS, int TILE_W, int TO, int PASSES>
INLINE void store_units(threadgroup uint* tile, const thread uint* stage, int first, uint lane) {
  constexpr int N = units_at_once(W, LOW, HIGH, UNITS);
  constexpr int LANES = UNITS / N;
  constexpr int WIDTH = both_divide(TILE_W, TO, 2 * N);
  UNROLL for (int i = 0; i < PASSES; i++) {
    const uint item = uint(first + 32 * i) + lane;
    const int row = int(item / uint(LANES)), at = int(item % uint(LANES));
    const thread uint* s = stage + i * unit_words(N);
    uint words[2 * N];
    UNROLL for (int j = 0; j < N; j++) {
      const uint word = s[N + j / 2];
      const uint high = j % 2 == 0 ? lower_high_bits(word) : upper_high_bits(word);
      words[2 * j] = widen_first(s[j], high);
      words[2 * j + 1] = widen_second(s[j], high);
    }
    if (row < TK) write_words<2 * N, WIDTH>(tile + row * TILE_W + TO + at * (2 * N), words);
  }
}

// The parts of a row: words of wider keys, which are copied, then units, then scales. A unit has
// one word of low bits, so high bits begin at word copied_keys + units_of.
constexpr int copied_keys(int KD, int KB) {
  return KB == 3 ? 0 : KD * KB / 32;
}
constexpr int units_of(int KD, int KB, int VD) {
  return (KB == 3 ? KD / 16 : 0) + VD / 16;
}
constexpr int scale_words(int KD, int KB, int VD, int TILE_W) {
  return TILE_W - copied_keys(KD, KB) - 2 * units_of(KD, KB, VD);
}

// Loads of a lane for each part of a tile, and the words of its registers that hold them.
template <int TK, int KD, int KB, int VD, int W, int TILE_W, int PART>
constexpr int loads_of() {
  constexpr int K = copied_keys(KD, KB), U = units_of(KD, KB, VD);
  constexpr int S = scale_words(KD, KB, VD, TILE_W);
  return PART == 0  ? passes(TK, K, copied_at_once(W, 0, K, TILE_W, 0))
      : PART == 1 ? passes(TK, U, units_at_once(W, K, K + U, U))
                  : passes(TK, S, copied_at_once(W, W - S, S, TILE_W, TILE_W - S));
}
template <int TK, int KD, int KB, int VD, int W, int TILE_W, int PART>
constexpr int words_of_loads() {
  constexpr int K = copied_keys(KD, KB), U = units_of(KD, KB, VD);
  constexpr int S = scale_words(KD, KB, VD, TILE_W);
  return loads_of<TK, KD, KB, VD, W, TILE_W, PART>() *
      (PART == 0       ? copied_at_once(W, 0, K, TILE_W, 0)
           : PART == 1 ? unit_words(units_at_once(W, K, K + U, U))
                       : copied_at_once(W, W - S, S, TILE_W, TILE_W - S));
}
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
constexpr int stage_words() {
  return words_of_loads<TK, KD, KB, VD, W, TILE_W, 0>() +
      words_of_loads<TK, KD, KB, VD, W, TILE_W, 1>() +
      words_of_loads<TK, KD, KB, VD, W, TILE_W, 2>();
}

// A SIMD group's copy of a tile of TK rows, contiguous in memory, to wide rows of TILE_W words:
// into registers first, so that the next tile is on its way while this one is used. Each word is
// read once. Rows past `valid` have scales of zero, hence are finite.
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void load_rows(thread uint* stage, const device uint* rows, int valid, uint lane) {
  constexpr int K = copied_keys(KD, KB), U = units_of(KD, KB, VD);
  constexpr int S = scale_words(KD, KB, VD, TILE_W);
  if (K > 0) {
    load_words<TK, W, 0, K, TILE_W, 0, loads_of<TK, KD, KB, VD, W, TILE_W, 0>()>(
        stage, rows, 0, valid, lane);
    stage += words_of_loads<TK, KD, KB, VD, W, TILE_W, 0>();
  }
  load_units<TK, W, K, K + U, U, loads_of<TK, KD, KB, VD, W, TILE_W, 1>()>(
      stage, rows, 0, valid, lane);
  stage += words_of_loads<TK, KD, KB, VD, W, TILE_W, 1>();
  load_words<TK, W, W - S, S, TILE_W, TILE_W - S, loads_of<TK, KD, KB, VD, W, TILE_W, 2>()>(
      stage, rows, 0, valid, lane);
}

template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void store_rows(threadgroup uint* tile, const thread uint* stage, uint lane) {
  constexpr int K = copied_keys(KD, KB), U = units_of(KD, KB, VD);
  constexpr int S = scale_words(KD, KB, VD, TILE_W);
  if (K > 0) {
    store_words<TK, W, 0, K, TILE_W, 0, loads_of<TK, KD, KB, VD, W, TILE_W, 0>()>(
        tile, stage, 0, lane);
    stage += words_of_loads<TK, KD, KB, VD, W, TILE_W, 0>();
  }
  store_units<TK, W, K, K + U, U, TILE_W, K, loads_of<TK, KD, KB, VD, W, TILE_W, 1>()>(
      tile, stage, 0, lane);
  stage += words_of_loads<TK, KD, KB, VD, W, TILE_W, 1>();
  store_words<TK, W, W - S, S, TILE_W, TILE_W - S, loads_of<TK, KD, KB, VD, W, TILE_W, 2>()>(
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
  constexpr int K = copied_keys(KD, KB), U = units_of(KD, KB, VD);
  constexpr int S = scale_words(KD, KB, VD, TILE_W);
  constexpr int N = units_at_once(W, K, K + U, U);
  constexpr int AT_ONCE = N < 4 && passes(TK, U, N) > 1 ? 2 : 1;
  if (K > 0) copy_words<TK, W, 0, K, TILE_W, 0>(tile, rows, valid, lane);
  ROLLED for (int first = 0; first < TK * U / N; first += 32 * AT_ONCE) {
    uint stage[AT_ONCE * unit_words(N)];
    load_units<TK, W, K, K + U, U, AT_ONCE>(stage, rows, first, valid, lane);
    store_units<TK, W, K, K + U, U, TILE_W, K, AT_ONCE>(tile, stage, first, lane);
  }
  copy_words<TK, W, W - S, S, TILE_W, TILE_W - S>(tile, rows, valid, lane);
}

}  // namespace kvq
