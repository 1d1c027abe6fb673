// Rows whose codes, of 4 or 8 bits, are stored as they are read. narrow.metal has the same
// functions for rows with codes of 3 bits; mlx_kvq/ops/gpu/jit.py takes one of the two.
namespace kvq {

// Word number `index` of a side's codes as they are read; they begin at word FIRST of the row, and
// high bits of 3-bit codes at half HIGH.
template <int BITS, int FIRST, int HIGH>
INLINE uint code_word(const device uint* row, int index) {
  return row[FIRST + index];
}

// The same of the row that begins at word `row`: one index of 32 bits, which a load adds to its base
// by itself.
template <int BITS, int FIRST, int HIGH>
INLINE uint code_word_at(const device uint* rows, counter row, counter index) {
  return rows[row + (counter(FIRST) + index)];
}

// Writes a lane's words of codes, of which the first is number `index` of a side's. EVEN: rows have
// an even number of words.
template <int BITS, int WORDS, int FIRST, int HIGH, bool EVEN>
INLINE void store_codes(device uint* row, const thread uint* words, int index) {
  device uint* to = row + FIRST + index;
  if (EVEN && WORDS % 2 == 0) {  // rows of an even number of words are aligned to two
    UNROLL for (int w = 0; w < WORDS; w += 2) {
      reinterpret_cast<device uint2*>(to)[w / 2] = uint2(words[w], words[(w + 1) % WORDS]);
    }
  } else {
    UNROLL for (int w = 0; w < WORDS; w++) to[w] = words[w];
  }
}

// Writes the codes of a lane's eight channels, number `eight` of a side's, if `valid`.
template <int BITS, int FIRST, int HIGH>
INLINE void store_eight_codes(device uint* row, const thread uint* words, int eight, bool valid) {
  constexpr int WORDS = BITS / 4;
  if (valid) {
    UNROLL for (int w = 0; w < WORDS; w++) row[FIRST + eight * WORDS + w] = words[w];
  }
}

constexpr int load_width(int W) {  // words a load; rows are whole loads
  return W % 4 == 0 ? 4 : W % 2 == 0 ? 2 : 1;
}
// Words of a lane's registers that hold its part of a tile.
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
constexpr int stage_words() {
  return (TK * W / load_width(W) + 31) / 32 * load_width(W);
}

template <int WORDS, int WIDTH>
INLINE void load_tile(thread uint* stage, const device uint* rows, int valid, uint lane) {
  constexpr int LOADS = (WORDS / WIDTH + 31) / 32;
  UNROLL for (int i = 0; i < LOADS; i++) {
    const int at = (32 * i + int(lane)) * WIDTH;
    thread uint* s = stage + i * WIDTH;
    UNROLL for (int j = 0; j < WIDTH; j++) s[j] = 0;
    if (at < valid) {
      if (WIDTH == 4) {
        const uint4 x = *reinterpret_cast<const device uint4*>(rows + at);
        s[0] = x.x;
        s[1 % WIDTH] = x.y;
        s[2 % WIDTH] = x.z;
        s[3 % WIDTH] = x.w;
      } else if (WIDTH == 2) {
        const uint2 x = *reinterpret_cast<const device uint2*>(rows + at);
        s[0] = x.x;
        s[1 % WIDTH] = x.y;
      } else {
        s[0] = rows[at];
      }
    }
  }
}

template <int WORDS, int WIDTH>
INLINE void store_tile(threadgroup uint* tile, const thread uint* stage, int count, uint lane) {
  constexpr int LOADS = (WORDS / WIDTH + 31) / 32;
  UNROLL for (int i = 0; i < LOADS; i++) {
    const int at = (32 * i + int(lane)) * WIDTH;
    if (at < count) {
      const thread uint* s = stage + i * WIDTH;
      if (WIDTH == 4) {
        *reinterpret_cast<threadgroup uint4*>(tile + at) =
            uint4(s[0], s[1 % WIDTH], s[2 % WIDTH], s[3 % WIDTH]);
      } else if (WIDTH == 2) {
        *reinterpret_cast<threadgroup uint2*>(tile + at) = uint2(s[0], s[1 % WIDTH]);
      } else {
        tile[at] = s[0];
      }
    }
  }
}

// A SIMD group's copy of a tile of TK rows, contiguous in memory: into registers first, so that the
// next tile is on its way while this one is used. Rows past `valid` are zero, hence finite.
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void load_rows(thread uint* stage, const device uint* rows, int valid, uint lane) {
  load_tile<TK * W, load_width(W)>(stage, rows, valid * W, lane);
}

template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void store_rows(threadgroup uint* tile, const thread uint* stage, uint lane) {
  store_tile<TK * W, load_width(W)>(tile, stage, TK * W, lane);
}

// The same without registers for a whole tile: COUNT loads of a lane in flight at once.
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void copy_rows(threadgroup uint* tile, const device uint* rows, int valid, uint lane) {
  constexpr int COUNT = 2;
  constexpr int WIDTH = load_width(W);
  constexpr int WORDS = TK * W;
  constexpr int PART = 32 * WIDTH * COUNT;  // words
  ROLLED for (int first = 0; first < WORDS; first += PART) {
    uint stage[WIDTH * COUNT];
    load_tile<PART, WIDTH>(stage, rows + first, valid * W - first, lane);
    store_tile<PART, WIDTH>(tile + first, stage, min(PART, WORDS - first), lane);
  }
}

// A tile of TK rows, on its way to threadgroup memory while the SIMD group goes on
// (`wait_for_copies`); the last one and one that is not aligned are there at once.
template <int TK, int KD, int KB, int VD, int VB, int W, int TILE_W>
INLINE void send_rows(threadgroup uint* tile, const device uint* rows, int valid, uint lane) {
  if (valid >= TK && reinterpret_cast<uint64_t>(rows) % 16 == 0) {
    constexpr int COPIES = TK * W / 4;
    UNROLL for (int i = 0; i < (COPIES + 31) / 32; i++) {
      if (32 * i + 32 <= COPIES || 32 * i + int(lane) < COPIES) {
        begin_copy(tile + 4 * lane + 128 * i, rows + 4 * lane + 128 * i);
      }
    }
  } else {
    copy_rows<TK, KD, KB, VD, VB, W, TILE_W>(tile, rows, min(TK, valid), lane);
  }
}

}  // namespace kvq
