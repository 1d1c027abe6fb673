"""An ESTIMATE of the kernels' time on Apple GPUs, where nothing has been measured yet.

    python -m tests.emulator.estimate_apple            # the tables of docs/performance.md, a minute
    python -m tests.emulator.estimate_apple --sweep    # numbers of splits, and where the cycles go
    python -m tests.emulator.estimate_apple --check    # beside times that others published
    python -m tests.emulator.estimate_apple --json docs/pictures/scale.json  # for scripts/scale.py

| module | holds |
|---|---|
| ``chips`` | Apple's chips, and how much of their nominal rates kernels reach |
| ``work`` | one launch's cycles and bytes, and the seconds they take on a chip |
| ``counting`` | cycles of what the emulator counts |
| ``linear`` | launches of any length, from two or three that were counted |
| ``kvq_kernels``, ``mlx_attention`` | work of our kernels, and of MLX's attention in fp16 |
| ``storing`` | time of storing tokens; the chain of keys with feedback |
| ``models`` | models, and the time of one decode step |
| ``tables``, ``published``, ``figures`` | what is printed, ``--check`` and ``--json`` |

The emulator runs the Metal kernels and counts what their threads do; MLX's own
attention, from the headers in its wheel, is run and counted likewise. Counts become time by the
instruction throughputs that philipturner/metal-benchmarks measured on M1:

- A core starts four instructions of 32 lanes a cycle. FMA, additions, comparisons, bitwise
  operations and selects take 1 cycle of that, a shuffle or ballot 2, a SIMD sum or maximum 14.5, an
  8x8x8 matrix product 20 (MetalFlashAttention's prompts run at 85 % of 16 on M1: 18.8).
- Shifts, integer products, conversions between integers and floats, rounding, exp2 and log2 go
  through one more pipeline, a quarter as wide (4 cycles; 6 a reciprocal, 8 a root), beside the
  others: the slower of the two counts.
- Few SIMD groups do not fill a core: 2.75 times the cycles with 4 of them, 1.6 with 8, none from
  24 on; fewer threadgroups than cores leave cores idle.
- Bytes: every input once, every output once, at a part of the chip's nominal bandwidth.
- What SIMD groups read, from caches as well: 64 bytes a cycle and core. MLX's attention reads a key
  once for each query head.
- A load or store is one instruction for 8 bytes of device memory, or 4 of threadgroup memory.

Every figure is a range:

- best: registers cost nothing; instructions and bytes overlap, the largest counts.
- worst: as many SIMD groups as registers allow, each spill and fill once a tile (Mesa's compiler,
  ``agx/table.json``: up to 255 registers, so that a core holds 12 SIMD groups, not 24), and what is
  read is not hidden behind so few: instructions and bytes are added. Caches give ``CACHED_OLD`` or
  ``CACHED_NEW`` bytes a cycle and core, and an Ultra ``APART`` of its bandwidth.

MLX's kernels take 47 to 123 registers (``exp`` compiled as ``exp2``), so that a core is full; on M1
and M2 alone, whose caches are small, their reads are added at worst as well. ``--check`` says how
far all this is from what others measured.

Rounding keys with feedback is a chain of D / 8 dependent blocks: its time is that of the latencies
on the chain (:func:`.storing.chain`), not of counted instructions.

Not in it: the price of a launch (about the same number of them, tests.support.launches), but as
part of ``LAYER``, threadgroup memory but for its instructions, address arithmetic beyond one
instruction each, and what newer chips do better than M1. The ratio of two kernels under the same
model is worth more than either.
"""
