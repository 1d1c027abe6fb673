// Body: the parts of a packed row (mlx_kvq/format/layout.py), in words:
//   K codes | V codes | K scales | V scales, of fp16, and a zero half if they are odd.
constexpr int K_WORDS = KD * KB / 32;            // the values' codes begin here
constexpr int CODES = K_WORDS + VD * VB / 32;    // scales begin here
constexpr int K_SCALES = KD / KG;                // the values' scales begin at this half
constexpr int SCALES = K_SCALES + VD / VG;
constexpr int W = CODES + (SCALES + 1) / 2;
