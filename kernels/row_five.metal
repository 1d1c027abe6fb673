// Body: as row.metal, where a side has codes of 5 bits and no side codes of 3:
//   K codes | V codes | high bits of 5-bit codes | K scales | V scales.
// A body of its own, so that the text of attend and dequantize for other formats, which was checked
// and timed on GPUs, stays as it is.
constexpr int K_WORDS = KD * (KB == 5 ? 4 : KB) / 32;          // the values' codes begin here
constexpr int HIGHS = K_WORDS + VD * (VB == 5 ? 4 : VB) / 32;  // high bits begin here
constexpr int K_HALVES = KB == 5 ? KD / 16 : 0;  // the values' high bits begin at this half
constexpr int HALVES = K_HALVES + (VB == 5 ? VD / 16 : 0);
constexpr int CODES = HIGHS + (HALVES + 1) / 2;  // scales begin here
constexpr int K_SCALES = KD / KG;                // the values' scales begin at this half
constexpr int SCALES = K_SCALES + VD / VG;
constexpr int W = CODES + (SCALES + 1) / 2;
constexpr int K_READ = KB == 5 ? 8 : KB;         // bits of codes as they are read
constexpr int V_READ = VB == 5 ? 8 : VB;
