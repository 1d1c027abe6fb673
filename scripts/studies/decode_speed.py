"""Decoding end to end from caches filled with random vectors, so that no prompt has to be read.

    python scripts/studies/decode_speed.py llama-3.1-8b --weight-bits 4 1,4096 1,32768 16,8192

A model of the shape with random weights; items are batch and tokens. Caches are those that users of
mlx-lm get, and decoding is in its rhythm (``mlx_kvq.measure.model_speed``); contenders take turns,
round by round. Milliseconds a token, and × the first cache: medians, and second lowest to second
highest. Contents are random: no operation's time depends on them.
"""

import argparse
import statistics
from types import SimpleNamespace

import mlx.core as mx

from mlx_kvq.measure import model_speed
from mlx_kvq.measure.baselines import padded
from mlx_kvq.measure.contenders import CHUNK
from mlx_kvq.measure.shapes import SHAPES

SECONDS = 0.8  # of a round


class Filled(model_speed.Run):
    """A generation whose prompt is random vectors."""

    def prefill(self) -> float:
        self.cache = []
        mx.clear_cache()
        B, L = self.tokens.shape[0], self.tokens.shape[1] - 1
        self.cache = self.contender.batch(B)
        with padded(self.cache, B, L):
            for first in range(0, L, CHUNK):
                n = min(CHUNK, L - first)
                for cache, layer in zip(self.cache, self.contender.model.layers, strict=True):
                    cache.update_and_fetch(*self._vectors(layer.self_attn, B, n))
                mx.eval([c.state for c in self.cache])
                mx.clear_cache()
        self.y = self._next(self.tokens[:, L:])
        mx.eval(self.y)
        return 0.0

    def _vectors(self, attention, B: int, n: int) -> list[mx.array]:
        dim = getattr(attention, "head_dim", None) or round(attention.scale**-2)
        shape = (B, attention.n_kv_heads, n, dim)
        return [mx.random.normal(shape).astype(mx.float16) for _ in range(2)]


def measure(made: dict, B: int, T: int, rounds: int) -> list[str]:
    """A line for each cache."""
    tokens = model_speed.prompts(next(iter(made.values())).model, B, T)
    runs = {name: Filled(contender, tokens) for name, contender in made.items()}
    for run in runs.values():
        run.prefill()
        run.decode(2)  # compiles
        run.steps = max(4, min(40, int(SECONDS / run.decode(3))))
        run.decode(run.steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run.decode(run.steps))
    base, lines = next(iter(times.values())), []
    for name, t in times.items():
        quotients = sorted(a / b for a, b in zip(base, t, strict=True))
        size = sum(c.nbytes for c in runs[name].cache)
        lines.append(
            f"batch {B}, {T} tokens, {name}: {_spread([1e3 * x for x in t])} ms, "
            f"{B / statistics.median(t):.0f} tokens/s, {_spread(quotients)} x, {size / 1e6:.0f} MB"
        )
    return lines


def _spread(x: list[float]) -> str:
    x, second = sorted(x), min(1, len(x) - 1)
    return f"{statistics.median(x):.2f} ({x[second]:.2f} to {x[-1 - second]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("items", nargs="+", metavar="BATCH,TOKENS")
    parser.add_argument("--weight-bits", type=int, help="by default float16 weights")
    parser.add_argument("--kv-cache", nargs="+", default=["fp16", "int4-srft"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    asked = {"shape": args.shape, "model": None, "weight_bits": args.weight_bits}
    made = model_speed.entries(SimpleNamespace(**asked, dtype="float16", kv_cache=args.kv_cache))
    for item in args.items:
        B, T = map(int, item.split(","))
        for line in measure(made, B, T, args.rounds):
            print(line, flush=True)
        mx.clear_cache()


if __name__ == "__main__":
    main()
