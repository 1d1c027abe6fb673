// Body: the parts of a packed row (mlx_kvq/format/layout.py), in words:
//   K codes | V codes | high bits of 3-bit codes | K scales | V scales.
// High bits, 16 to a half, and fp16 scales are padded by a zero half if they are odd.
constexpr int K_WORDS = KD * (KB == 3 ? 2 : KB) / 32;           // the values' codes begin here
constexpr int HIGHS = K_WORDS + VD * (VB == 3 ? 2 : VB) / 32;   // high bits begin here
constexpr int K_HALVES = KB == 3 ? KD / 16 : 0;  // the values' high bits begin at this half
constexpr int HALVES = K_HALVES + (VB == 3 ? VD / 16 : 0);
constexpr int CODES = HIGHS + (HALVES + 1) / 2;  // scales begin here
constexpr int K_SCALES = KD / KG;                // the values' scales begin at this half
constexpr int SCALES = K_SCALES + VD / VG;
constexpr int W = CODES + (SCALES + 1) / 2;
constexpr int K_READ = KB == 3 ? 4 : KB;         // bits of codes as they are read
constexpr int V_READ = VB == 3 ? 4 : VB;
