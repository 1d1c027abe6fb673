"""The estimate beside times that others published (``--check``)."""

from typing import NamedTuple

import numpy as np

from mlx_kvq.format.spec import Spec

from .chips import M1_ULTRA, M2_ULTRA, M3_ULTRA, M4_MAX, M5_MAX, M5_PRO, Chip
from .kvq_kernels import KvqKernels
from .mlx_attention import MlxAttention
from .models import GEMMA_1B, GEMMA_4B, Model
from .tables import header, span
from .work import estimate

QWEN3_0_6B = Model("Qwen3 0.6B", (16, 8, 128), 0.6e9, 28)
QWEN3_8B = Model("Qwen3 8B", (32, 8, 128), 8.19e9, 36)
QWEN25_14B = Model("Qwen2.5 14B", (40, 8, 128), 14.8e9, 48)


class Attention(NamedTuple):
    """MLX's attention of one token as others measured it, launches in a row, K and V of several
    buffers in turn. From GB/s where those are given."""

    source: str
    chip: Chip
    heads: tuple[int, int, int]  # query, KV, D
    microseconds: dict[int, float]  # by tokens


# All of MLX 0.32.0 or a little later: kernels that read one key at a time; today's read four.
ATTENTION = [
    Attention("mlx#4077", M5_MAX, (32, 4, 128), {8192: 53.4, 16384: 87.6, 32768: 156.2}),
    Attention("mlx#4077", M5_MAX, (64, 8, 64), {8192: 73.5, 16384: 130.2, 32768: 244.0}),
    Attention("mlx#4076", M5_PRO, (32, 32, 128), {2048: 140.4, 8192: 476.0, 32768: 1910.8}),
    Attention("mlx#4076", M5_PRO, (32, 8, 128), {2048: 35.8, 8192: 127.6, 32768: 508.4}),
    Attention("mlx#4076", M5_PRO, (32, 4, 128), {2048: 32.3, 8192: 91.2, 32768: 353.2}),
    Attention("mlx#4076", M5_PRO, (64, 8, 64), {2048: 55.2, 8192: 148.5, 32768: 563.9}),
    Attention("mlx#3837", M1_ULTRA, (32, 4, 256), {100000: 2300.0}),
]


class Decoding(NamedTuple):
    """Tokens a second of a 4-bit model at short context by MLX."""

    source: str
    chip: Chip
    model: Model
    rate: float

    @property
    def left(self) -> float:
        """Seconds of a layer beside its weights."""
        return (1 / self.rate - self.model.weights_seconds(self.chip)) / self.model.layers


DECODING = [
    Decoding("mlx#2007", M4_MAX, GEMMA_1B, 308.2),
    Decoding("mlx#2007", M4_MAX, GEMMA_4B, 142.6),
    Decoding("Rapid-MLX#633", M3_ULTRA, QWEN3_0_6B, 387.6),
    Decoding("Rapid-MLX#634", M3_ULTRA, GEMMA_1B, 261.1),
    Decoding("Rapid-MLX#636", M3_ULTRA, QWEN3_8B, 112.9),
    Decoding("Rapid-MLX#630", M3_ULTRA, QWEN25_14B, 66.4),
]
# Tokens a second at short context and after 17,000 tokens (mlx#2007).
CONTEXT = [
    (M4_MAX, GEMMA_1B, 308.223, 284.337),
    (M4_MAX, GEMMA_4B, 142.64, 120.819),
]
# Tokens a second of Qwen3 0.6B with llama.cpp's attention over q8_0 keys and values, tuned, on M2
# Ultra: at short context, and by tokens of context (llama.cpp#26570).
Q8_0_SHORT, Q8_0 = 240.28, {8192: 175.74, 16384: 136.16, 32768: 98.94}


def check() -> None:
    attention_table()
    context_table()
    layers_table()
    quantized_table()


def attention_table() -> None:
    """MLX's attention by this model, beside what others measured."""
    header(
        "| from | chip | heads, D | tokens | measured µs | estimate µs | measured / best, worst |"
    )
    ratios = []
    for source, chip, (Hq, Hkv, D), times in ATTENTION:
        mlx = MlxAttention(Hq, Hkv, D)
        for T, measured in times.items():
            best, worst = estimate(mlx.attend(T, chip), chip)
            ratios.append(measured / best)
            print(
                f"| {source} | {chip.name} | {Hq} / {Hkv}, {D} | {T} | {measured:.1f} "
                f"| {span(best, worst)} | {measured / best:.2f}, {measured / worst:.2f} |",
                flush=True,
            )
    low, middle, high = np.quantile(ratios, (0, 0.5, 1))
    print(f"\nmeasured / best: median {middle:.2f}, {low:.2f} to {high:.2f}")


def context_table() -> None:
    """What a long context adds to a step."""
    print("\nWhat 17,000 tokens add to a step (mlx#2007), ms\n")
    header("| chip | model | measured | estimate |")
    for chip, model, short, long in CONTEXT:
        mlx = MlxAttention(*model.heads)

        def attention(T: int, _, chip=chip, mlx=mlx) -> tuple[float, float]:
            return estimate(mlx.attend(T, chip), chip)

        added = (model.over_layers(17000, attention) - model.over_layers(64, attention)) / 1e3
        measured = 1e3 / long - 1e3 / short
        print(f"| {chip.name} | {model.name} | {measured:.2f} | {span(*added)} |")


def layers_table() -> None:
    """What published rates leave for a layer beside the weights."""
    header("\n| from | chip | model | step, ms | weights, ms | the rest, µs a layer |")
    for row in DECODING:
        weights = 1e3 * row.model.weights_seconds(row.chip)
        print(
            f"| {row.source} | {row.chip.name} | {row.model.name} | {1e3 / row.rate:.2f} "
            f"| {weights:.2f} | {1e6 * row.left:.0f} |"
        )
    print(f"\nmedian {1e6 * np.median([row.left for row in DECODING]):.0f} µs a layer")


def quantized_table() -> None:
    """llama.cpp's attention over 8-bit keys and values beside the estimate of ours."""
    chip, model, spec = M2_ULTRA, QWEN3_0_6B, Spec.parse("int8-srft")
    assert spec is not None
    Hq, Hkv, D = model.heads
    kvq = KvqKernels(spec, Hq, Hkv, D)
    print(f"\n8-bit attention, {Hq} / {Hkv}, {D}, on {chip.name}, µs a layer\n")
    header("| tokens | llama.cpp, measured (#26570) | our int8, estimate |")
    for T, rate in Q8_0.items():
        measured = 1e6 * (1 / rate - 1 / Q8_0_SHORT) / model.layers
        print(f"| {T} | {measured:.0f} | {span(*estimate(kvq.attend(T), chip))} |")
