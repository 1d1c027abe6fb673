"""Models, and the time of one decode step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .chips import Chip
from .kvq_kernels import KvqKernels
from .mlx_attention import MlxAttention
from .storing import token_feedback
from .work import estimate

# Of a layer in a step of one token, seconds beside its weights, attention and the token stored: the
# median of what published rates of 4-bit models at short context leave (``--check``).
LAYER = 70e-6


@dataclass(frozen=True)
class Model:
    """Heads (query, KV, D), parameters, layers that see everything, layers with a window, and the
    window."""

    name: str
    heads: tuple[int, int, int]
    parameters: float
    full: int
    windowed: int = 0
    window: int = 0

    @property
    def layers(self) -> int:
        return self.full + self.windowed

    def weights_seconds(self, chip: Chip) -> float:
        """Of reading the weights, 4.5 bits each, at the bandwidth that is reached."""
        return self.parameters * 4.5 / 8 / chip.bytes_per_second

    def over_layers(
        self, T: int, time: Callable[[int, int | None], tuple[float, float]]
    ) -> np.ndarray:
        """Sum of ``time(keys, window)``, best and worst, over the layers at a context of T."""
        layers = ((self.full, T, None), (self.windowed, min(T, self.window), self.window))
        return np.sum([n * np.array(time(*keys)) for n, *keys in layers if n], axis=0)


QWEN_1_5B = Model("Qwen2.5-1.5B", (12, 2, 128), 1.54e9, 28)
LLAMA_8B = Model("Llama-3.1-8B", (32, 8, 128), 8.03e9, 32)
GEMMA_1B = Model("Gemma 3 1B", (4, 1, 256), 1.0e9, 4, 22, 512)
GEMMA_4B = Model("Gemma 3 4B", (8, 4, 256), 3.88e9, 5, 29, 1024)
MODELS = (QWEN_1_5B, LLAMA_8B, GEMMA_1B)  # of the tables


def step(
    model: Model, kvq: KvqKernels, mlx: MlxAttention, chip: Chip, T: int
) -> list[tuple[float, float]]:
    """Milliseconds of a token's step at best and at worst, fp16 and int4: weights in 4 bits at the
    bandwidth that is reached, attention, the token stored, and ``LAYER``."""

    def fp16(keys: int, _) -> tuple[float, float]:
        return estimate(mlx.attend(keys, chip), chip)

    def int4(keys: int, window: int | None) -> tuple[float, float]:
        kernels = kvq.within(window)
        attention = estimate(kernels.attend(keys), chip)
        return tuple(np.add(attention, token_feedback(kernels, chip, keys)))

    before = 1e3 * (model.weights_seconds(chip) + model.layers * LAYER)
    return [tuple(before + model.over_layers(T, time) / 1e3) for time in (fp16, int4)]
