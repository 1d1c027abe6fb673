"""The tables of docs/performance.md, and numbers of splits (``--sweep``)."""

from .chips import CHIPS
from .kvq_kernels import KvqKernels
from .mlx_attention import MlxAttention
from .models import Model, step
from .storing import prompt_seconds, token_feedback, token_nearest
from .work import estimate

SPLITS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def span(low: float, high: float, digits: int = 3) -> str:
    """A range, rounded."""
    a, b = (f"{x:.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}" for x in (low, high))
    return a if a == b else f"{a} to {b}"


def header(columns: str) -> None:
    """The first two lines of a table in Markdown."""
    print(columns)
    print("|---" * (columns.count("|") - 1) + "|")


def decoding_table(model: Model, kvq: KvqKernels, mlx: MlxAttention, contexts: list[int]) -> None:
    """Attention of one token, and a whole step."""
    Hq, Hkv, D = model.heads
    print(f"\n**{model.name}, {Hq} / {Hkv} heads of {D}, weights in 4 bits**\n")
    header(
        "| chip | tokens | attention, µs: fp16 | int4 | fp16 / int4 | a step, ms: fp16 | int4 "
        "| fp16 / int4 |"
    )
    for chip in CHIPS:
        for T in contexts:
            attention = (estimate(mlx.attend(T, chip), chip), estimate(kvq.attend(T), chip))
            cells = []
            for fp16, int4 in (attention, step(model, kvq, mlx, chip, T)):
                ratio = f"{fp16[0] / int4[1]:.2f} to {fp16[1] / int4[0]:.2f}"
                cells += [span(*fp16), span(*int4), ratio]
            print(f"| {chip.name} | {T} | {' | '.join(cells)} |")
    print(f"\n{dominating(kvq, max(contexts))}")


def dominating(kvq: KvqKernels, T: int) -> str:
    """Which assumption alone moves the estimate most, by chip."""
    found = []
    launches = kvq.attend(T)
    for chip in CHIPS:
        best = sum(w.best(chip) for w in launches)
        few = sum(max(w.seconds(chip, registers=True)) for w in launches)
        added = sum(sum(w.seconds(chip)) for w in launches)
        found.append(
            f"{chip.name}: registers alone {few / best:.2f} times the best, "
            f"instructions and bytes one after the other alone {added / best:.2f}"
        )
    return f"What moves the estimate at {T} tokens. {'; '.join(found)}."


def storing_table(model: Model, kvq: KvqKernels, mlx: MlxAttention) -> None:
    """What storing takes, keys to the nearest level and with feedback."""
    print(f"\nStoring, {kvq.Hkv} / D = {kvq.D}\n")
    header(
        "| chip | a token at 32K, µs a layer: nearest | feedback | of a step, % | a prompt, ns a "
        "token and layer: nearest | feedback | of reading it, % |"
    )
    L = 32768
    nearest, feedback = kvq.prompt(L), kvq.prompt(L, feedback=True)
    for chip in CHIPS:
        one = token_feedback(kvq, chip, L)
        whole = step(model, kvq, mlx, chip, L)[1]
        of_step = [100 * model.layers * x / 1e3 / y for x, y in zip(one, whole, strict=True)]
        many_nearest = [x * 1e3 / L for x in estimate([nearest], chip)]
        many = [1e9 * x / L for x in prompt_seconds(kvq, feedback, chip, L)]
        reading = 2 * model.parameters / chip.flops
        of_reading = [100 * model.layers * x / 1e9 / reading for x in many]
        print(
            f"| {chip.name} | {span(*token_nearest(kvq, chip, L))} | {span(*one)} "
            f"| {span(*of_step, 2)} | {span(*many_nearest)} | {span(*many)} "
            f"| {span(*of_reading, 2)} |"
        )


def splits_table(kvq: KvqKernels, contexts: list[int]) -> None:
    """What each number of splits would take, and a threadgroup's work apart from its keys."""
    print(f"\n{kvq.Hq} q / {kvq.Hkv} kv heads, D = {kvq.D}, microseconds by number of splits")
    for name, line in (("one split", kvq.finish), ("several", kvq.store)):
        (key, key_rest, _), (exact, exact_rest, _), part = line.key, line.exact, line.part
        print(
            f"\n{name}: cycles of a SIMD group per key {key:.0f} (one pipeline: {key_rest:.0f}), "
            f"per exact token {exact:.0f} ({exact_rest:.0f}), per split {part.main:.0f} "
            f"({part.rest:.0f})"
        )
    header(f"\n| chip | tokens | {' | '.join(map(str, SPLITS))} | as launched |")
    for chip in CHIPS:
        for T in contexts:
            cells = [
                f"{estimate(kvq.attend(T, parts=n), chip)[0]:.1f}" if 16 * n <= T else ""
                for n in SPLITS
            ]
            print(f"| {chip.name} | {T} | {' | '.join(cells)} | {kvq.parts(T)} |")
