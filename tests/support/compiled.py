"""Kernels that Metal compiles for a model, from loading it to the seventieth token.

    python -m tests.support.compiled            # those of the bundled models

No GPU is needed: the emulator's stand-in gives the source that MLX would hand to Metal's compiler,
and nothing runs: outputs are zeros, and the trials, which are part of the list, pass. Compiled is
each source once, and MLX makes another one of a kernel where an input is of another dtype or, of
fewer than 8 elements, in another address space.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import BatchGenerator, generate_step

import mlx_kvq
from mlx_kvq.calibration.fit import calibrate_tokens
from mlx_kvq.ops import trial
from tests.emulator import Counters, arrays, emulated, standin

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
TOKENS = 70
# Optional parts of a kernel by the constant that says whether it has them.
PARTS = ("TAIL", "ROTATED", "CHUNK", "STARTS", "SINKS", "MASK")
_PARTS = re.compile(rf"^constexpr (?:bool|int) ({'|'.join(PARTS)}) = (?:true|[12]);", re.M)


@contextmanager
def compiling() -> Iterator[dict[str, list[str]]]:
    """Inside, what would be compiled is noted: kernel and its parts -> sources, in order."""
    found: dict[str, list[str]] = {}

    def note(source, inputs, shapes, dtypes, grid, threadgroup, **_):
        match = re.search(r"kvq_(\w+?)_[0-9a-f]{12}", source)
        assert match is not None
        given = set(_PARTS.findall(source))
        label = " ".join([match[1], *(part.lower() for part in PARTS if part in given)])
        sources = found.setdefault(label, [])
        if source not in sources:
            sources.append(source)
        made = [arrays.empty_output(s, d, 0) for s, d in zip(shapes, dtypes, strict=True)]
        return made, Counters(match[1])

    run, apart = standin.run, trial._apart
    try:
        standin.run, trial._apart = note, lambda *_: 0.0
        with emulated():
            yield found
    finally:
        standin.run, trial._apart = run, apart


def one(model, prompt: int) -> None:
    """A prompt of so many tokens, and the tokens after it."""
    for _ in generate_step(mx.ones((prompt,), mx.int32), model, max_tokens=TOKENS):
        pass


def many(model, *batches: list[int]) -> None:
    """As mlx_lm.server answers: requests with prompts of these lengths, each batch of them while
    those before are being answered."""
    waiting = list(batches)
    server = BatchGenerator(model, max_tokens=TOKENS)
    steps = 0
    while any(server.next()) or waiting:
        if waiting and steps % 5 == 0:
            server.insert([[1] * n for n in waiting.pop(0)])
        steps += 1
    server.close()


SITUATIONS: dict[str, Callable] = {
    "a short prompt": lambda model: one(model, 30),
    "a long prompt": lambda model: one(model, 530),
    "a batch": lambda model: many(model, [300, 200, 280]),
    "a server": lambda model: many(model, [30, 60], [530, 520], [140, 20, 30, 40], [30, 30, 30]),
}


def kernels(name: str, work: Callable, spec: str = "int4-srft") -> dict[str, list[str]]:
    """What a process compiles that enables a bundled model and then does this."""
    model = load(str(MODELS / name))[0]
    model.set_dtype(mx.float32)  # on a CPU faster by far; the same kernels
    calibration = calibrate_tokens(model, [mx.arange(16)], progress=False)
    with compiling() as found:
        mlx_kvq.enable(model, spec, calibration=calibration, verbose=False)
        work(model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-cache", default="int4-srft")
    args = parser.parse_args()
    print("| model | situation | compiled | kernels |\n|---|---|--:|---|")
    for name in sorted(path.name for path in MODELS.iterdir() if path.is_dir()):
        for situation, work in SITUATIONS.items():
            found = kernels(name, work, args.kv_cache)
            named = (f"{k} (× {len(s)})" if len(s) > 1 else k for k, s in found.items())
            count = sum(map(len, found.values()))
            print(f"| {name} | {situation} | {count} | {', '.join(named)} |", flush=True)


if __name__ == "__main__":
    main()
