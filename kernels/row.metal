// Body: the parts of a packed row (mlx_kvq/format/layout.py), in words:
//   K codes | V codes | high bits of narrow codes | K scales | V scales.
// High bits, 16 to a half, and fp16 scales are padded by a zero half if they are odd.
constexpr int K_WORDS = KD * kvq::low_bits(KB) / 32;          // the values' codes begin here
constexpr int HIGHS = K_WORDS + VD * kvq::low_bits(VB) / 32;  // high bits begin here
constexpr int K_HALVES = kvq::is_narrow(KB) ? KD / 16 : 0;  // the values' high bits begin at this half
constexpr int HALVES = K_HALVES + (kvq::is_narrow(VB) ? VD / 16 : 0);
constexpr int CODES = HIGHS + (HALVES + 1) / 2;  // scales begin here
constexpr int K_SCALES = KD / KG;                // the values' scales begin at this half
constexpr int SCALES = K_SCALES + VD / VG;
constexpr int W = CODES + (SCALES + 1) / 2;
constexpr int K_READ = kvq::wide_bits(KB);       // bits of codes as they are read
constexpr int V_READ = kvq::wide_bits(VB);
