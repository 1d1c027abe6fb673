"""``mlx_kvq fit``: how much context fits into a machine's memory, from a model's config alone."""

import argparse
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models import cache as stock

from ..files import line
from ..format.format import make_format, recent_at
from ..format.spec import OFF, Spec
from ..measure import plots
from ..measure.baselines import KV_BITS, KV_GROUP
from ..repositories.repository import Repository, read_config
from ..repositories.summary import LAYERS, build
from ..stock import head_sizes, is_packable, kinds_of, leaves, own_caches
from .options import cache, size

CACHES = [
    OFF, "kv8", "kv4", "int8-srft", "k8v4-srft", "k5v4-srft", "int4-srft", "k4v3-srft", "int3-srft"
]  # fmt: skip
SEQUENCES = (1, 2, 4, 8, 16, 32)
STEP = 256  # tokens by which caches grow
RESERVE = 3 << 29


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="A repository, local or on the hub: its config.json is read.")
    parser.add_argument(
        "--memory",
        type=size,
        help="Of the machine, such as 16GB. Default: this machine's, if it is a Mac.",
    )
    parser.add_argument(
        "--weight-bits",
        type=int,
        choices=[2, 3, 4, 5, 6, 8, 16],
        help="Of the weights, if they are to be quantized in groups of 64. Default: as they are.",
    )
    parser.add_argument(
        "--reserve",
        type=size,
        default=RESERVE,
        help="Kept for computing a prompt's chunk and for MLX's buffers (default: 1.5GB).",
    )
    parser.add_argument(
        "--kv-cache", nargs="+", type=cache(*KV_BITS), default=CACHES, metavar="SPEC"
    )
    parser.add_argument("--plot", metavar="FILE", help="Draw memory over context (.png, .svg).")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Build a model of the repository's own."
    )


def run(args: argparse.Namespace) -> None:
    if args.plot:
        plots.check(args.plot)
    limit, why = wired(args.memory)
    try:
        folder = utils._download(
            args.model, allow_patterns=["config.json", "model.safetensors.index.json"]
        )
    except Exception as error:
        raise ValueError(f"'{args.model}' cannot be had: {line(error)}") from error
    config = read_config(folder)
    if any("layer" in k and type(n) is int and n > LAYERS for k, n in config.items()):
        raise ValueError(f"config.json of '{args.model}' has more than {LAYERS} layers.")
    model = build(Repository(folder, None, args.model), args.trust_remote_code)
    weights, how = weight_bytes(model, folder, config, args.weight_bits)
    kept = layers_of(model)
    most = longest(config)
    left = limit - weights - args.reserve
    made_for = f"made for {most:,} tokens" if most else "no limit in config.json"
    lines = {
        "model": f"{Path(args.model).name}, {len(kept)} key/value caches, {made_for}",
        "memory": why,
        "weights": f"{gb(weights)}, {how}",
        "reserve": f"{gb(args.reserve)} for a prompt's chunk and MLX's buffers (--reserve)",
        "caches": f"{gb(max(left, 0))} are left for them",
    }
    for label, text in lines.items():
        print(f"{label:8} {text}")
    if left <= 0:
        raise ValueError("The weights alone do not fit: take fewer --weight-bits or more memory.")
    found, notes = {}, []
    for name in args.kv_cache:
        try:
            found[name] = Plan(kept, name)
        except ValueError as error:
            notes.append(f"{name}: {error}")
    columns = ["cache", "bytes/token", *map(str, SEQUENCES)]
    print(f"\n| {' | '.join(columns)} |\n|---{'|--:' * (len(columns) - 1)}|")
    for name, plan in found.items():
        cells = [plan.cell(left, n, most) for n in SEQUENCES]
        print(f"| {name} | {plan.token:,.0f} | {' | '.join(cells)} |")
    notes.append(
        "Tokens of context of each of so many sequences. *: the model's own limit, elsewhere "
        "memory binds. –: mlx-lm does not batch its quantized cache."
    )
    print("\n" + "\n".join(notes))
    if args.plot:
        draw(found, weights + args.reserve, limit, most, f"{lines['model']}; {why}", args.plot)


def gb(n: float) -> str:
    """As memory is sold: 1 GB is 1024³ bytes."""
    return f"{n / (1 << 30):.3g} GB"


def wired(memory: int | None) -> tuple[int, str]:
    """Bytes that a process may wire, and why. macOS's default is two thirds of the memory up to
    36 GB and three quarters above (docs/memory.md); newer versions allow more."""
    if memory is None:
        if not mx.metal.is_available():
            raise ValueError("Of which machine? Give --memory, such as --memory 16GB.")
        own = int(mx.device_info()["max_recommended_working_set_size"])
        return own, f"{gb(own)}, as this machine says (max_recommended_working_set_size)"
    part, share = (2 / 3, "2/3") if memory <= 36 << 30 else (3 / 4, "3/4")
    text = f"{gb(memory)}, of which macOS lets a process wire {share} by default: "
    return int(memory * part), text + gb(memory * part)


def number(given: object, key: str, otherwise: float = 0) -> float:
    """A positive number out of a file, if it says one."""
    value = given.get(key) if isinstance(given, dict) else None
    return value if isinstance(value, int | float) and 0 < value < 1e15 else otherwise


def weight_bytes(model, folder: Path, config: dict, bits: int | None) -> tuple[int, str]:
    """Of all weights, and how that is known."""
    if bits is None:
        index = folder / "model.safetensors.index.json"
        metadata = read_config(folder, index.name).get("metadata") if index.exists() else None
        if total := number(metadata, "total_size"):
            return int(total), "as model.safetensors.index.json says"
        if total := sum(p.stat().st_size for p in folder.glob("model*.safetensors")):
            return total, "the size of its files"
    given = None if bits else config.get("quantization")
    bits, group = bits or int(number(given, "bits", 16)), int(number(given, "group_size", 64))
    packed = 16.0 if bits == 16 else bits + 32 / group
    arrays: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore
    total = sum(
        w.size * (packed if w.ndim > 1 and w.shape[-1] % group == 0 else 16) for _, w in arrays
    )
    return int(total / 8), f"counted from config.json, {bits} bits"


@dataclass(frozen=True)
class Layer:
    """One cache of a model: KV heads, head sizes of keys and values, tokens kept at most."""

    heads: int
    k_dim: int
    v_dim: int
    window: int | None
    packable: bool

    @property
    def fp16(self) -> int:
        return 2 * self.heads * (self.k_dim + self.v_dim)


def layers_of(model) -> list[Layer]:
    """The caches of a model that hold keys and values; nothing is computed."""
    own, shapes = dict(leaves(own_caches(model))), head_sizes(model, own_caches(model))
    kinds = kinds_of(shapes)
    return [
        Layer(
            *shape,
            getattr(own[p], "max_size", None),
            is_packable(own[p], kinds[p[0]]) and not kinds[p[0]].latent,
        )
        for p, shape in shapes.items()
    ]


def longest(config: dict) -> int | None:
    """Tokens that a model was made for. YaRN's factor is of an original length; llama3's is
    contained in max_position_embeddings."""
    inner = config.get("text_config")
    text = config | (inner if isinstance(inner, dict) else {})
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    scaled = number(rope, "factor") * number(rope, "original_max_position_embeddings")
    return int(max(number(text, "max_position_embeddings"), scaled)) or None


class Plan:
    """What one kind of cache takes for one model.

    Raises:
        ValueError: If the model cannot have it.
    """

    def __init__(self, layers: list[Layer], name: str):
        self.name = name
        # Bytes of a token, of one that is kept exactly besides, and the window, of each layer.
        self.spec = Spec.parse(name) if name not in KV_BITS else None
        self.layers = [
            (self._token(layer), layer.fp16 * self._packs(layer), layer.window) for layer in layers
        ]
        # A second copy of one layer: fp16's while it grows, a packed one's unpacked for a prompt.
        self.copy = max((layer.fp16 for layer in layers if layer.window is None), default=0)

    @property
    def token(self) -> float:
        """Bytes of a token in all layers."""
        return sum(token for token, _, _ in self.layers)

    def _packs(self, layer: Layer) -> bool:
        return self.spec is not None and layer.packable

    def _token(self, layer: Layer) -> float:
        if self.name in KV_BITS:
            if layer.window is not None:
                raise ValueError(f"mlx-lm cannot quantize a {stock.RotatingKVCache.__name__}.")
            if layer.k_dim % KV_GROUP or layer.v_dim % KV_GROUP:
                raise ValueError(f"mlx-lm quantizes groups of {KV_GROUP} channels.")
            return layer.fp16 / 16 * (KV_BITS[self.name] + 32 / KV_GROUP)
        if self.spec is None or not layer.packable:
            return layer.fp16
        made = make_format(self.spec, layer.k_dim, layer.v_dim, window=layer.window)
        return 4 * layer.heads * made.layout.words

    def _exact(self, tokens: int, window: int | None) -> int:
        """Tokens of a context that are kept exactly besides."""
        if self.spec is None:
            return 0
        return recent_at(self.spec.recent_in(window), tokens) + self.spec.first_in(window)

    def bytes(self, tokens: int, sequences: int) -> float:
        held = 0.0
        for token, exact, window in self.layers:
            n = min(tokens, window or tokens)
            held += n * token + self._exact(n, window) * exact
        return sequences * held + self.copy * (tokens if tokens > STEP else 0)

    def context(self, left: float, sequences: int) -> int:
        """Tokens of each sequence that fit, in the steps by which caches grow."""
        steps = range(1 << 16)
        return STEP * (bisect_right(steps, left, key=lambda n: self.bytes(n * STEP, sequences)) - 1)

    def cell(self, left: float, sequences: int, most: int | None) -> str:
        if self.name in KV_BITS and sequences > 1:
            return "–"
        fits = max(0, self.context(left, sequences))
        return f"{most:,}*" if most and fits >= most else f"{fits:,}"


def draw(plans: dict, before: float, limit: float, most: int | None, title: str, path: str) -> None:
    """Memory of weights, reserve and one sequence's cache over its tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    ends = [min(plan.context(limit - before, 1), most or 1 << 30) for plan in plans.values()]
    T = max(STEP, *(most or 0, *ends) if most and most < 2 * max(ends) else ends)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, plan in plans.items():
        x = [T * i // 64 for i in range(65)]
        y = [(before + plan.bytes(t, 1)) / (1 << 30) for t in x]
        axes.plot(x, y, color=plots.color_of(name, list(plans)), label=name)
    axes.axhline(limit / (1 << 30), color="red", lw=0.8, ls="--", label="may be wired")
    axes.set_ylim(0, 1.25 * limit / (1 << 30))
    axes.set_xlim(0, T)
    axes.set_xticks(range(0, T + 1, 1 << max(8, (T // 6).bit_length())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t / 1024:.0f}K"))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("GB: weights, reserve, cache")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.set_title(title.replace("; ", "\n"), fontsize=8)
    figure.savefig(path, dpi=150)
