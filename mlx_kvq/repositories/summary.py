"""``mlx_kvq inspect``: the cache of a converted repository, without the model's weights.

From a hub only the JSON files and ``kv_cache.safetensors`` are fetched. The model is built from
them, but not computed, to see whether the cache fits it.
"""

from mlx_lm import utils

from ..calibration.set import NAMES, CalibrationSet
from ..files import line, quoted, size
from ..model.loading import code_allowed, code_options
from ..model.report import Report, layer_ranges
from ..stock import Shapes
from . import repository
from .repository import FILE, Repository
from .section import KEY, VERSION

LAYERS = 10_000  # of a model, at most: each is made, before any weight


def find(name: str, revision: str | None = None) -> Repository:
    """The repository of a local folder or of the hub, whose small files are fetched. Raises
    ValueError if there is none, or it has no section."""
    try:
        folder = utils._download(name, revision=revision, allow_patterns=["*.json", FILE])
    except Exception as error:
        raise ValueError(
            f"'{name}' is no local repository, and not to be had: {line(error)}"
        ) from error
    config = repository.read_config(folder)
    if KEY not in config:
        raise ValueError(
            f"'{name}' has no '{KEY}' in its config.json: mlx_kvq convert adds one, in place with "
            f"'mlx_kvq convert --mlx-path {name}'."
        )
    text = config.get("text_config")
    for key, value in (config | (text if isinstance(text, dict) else {})).items():
        if "layer" in key and type(value) is int and value > LAYERS:
            raise ValueError(
                f"config.json of '{name}' says {quoted(value)} for {quoted(key)}: no model has "
                f"more than {LAYERS} layers."
            )
    return Repository(folder, config[KEY], name, revision)


def build(source: Repository, trust: bool = False):
    """The model of ``config.json``, with weights that are not computed. Raises ValueError if mlx-lm
    cannot build it."""
    try:
        code = code_options(utils.load_model, trust)
        with code_allowed(trust):
            model, _ = utils.load_model(source.folder, lazy=True, strict=False, **code)
    except Exception as error:
        raise ValueError(f"The model of '{source.name}' cannot be built: {line(error)}") from error
    model._mlx_kvq_repository = source
    return model


def describe(source: Repository, report: Report, shapes: Shapes) -> list[tuple[str, str]]:
    """(label, text) of every line above the table of ranges."""
    section = source.section
    made, spec = dict(section.made), section.spec
    fp16 = sum(2 * H * (Dk + Dv) for H, Dk, Dv in shapes.values())
    packed = sum(
        4 * report.packed[p[0]].layout.words * H if p in section.layers else 2 * H * (Dk + Dv)
        for p, (H, Dk, Dv) in shapes.items()
    )
    bits = {b: [p[0] for p, c in section.layers.items() if c == b] for b in section.layers.values()}
    weights = sorted(source.folder.glob("*.safetensors"))  # the calibration's file, too
    calibration = ""
    if source.calibration is not None:
        text, tokens, length = (made.pop(note, "?") for note in ("text", "tokens", "length"))
        calibration = f"{text}, {tokens} tokens in windows of {length}"
        if "positions" in made:
            calibration += f", for contexts of up to {made.pop('positions')}"
        calibration += "; SHA-256 "
        calibration += f"{(section.sha256 or '')[:16]}…, as it should be"
    lines = {
        "cache": f"{spec}, seed {spec.seed}, format {VERSION}",
        "layers": "; ".join(f"{b} in {layer_ranges(layers)}" for b, layers in bits.items()),
        "left": "; ".join(f"{layer}: {why}" for layer, why in report.left.items()),
        "token": f"{packed} bytes in all layers, fp16 {fp16}: {fp16 / packed:.2f} times fewer",
        "exact": f"{spec.exact}, beside the others" if spec.exact else "",
        "sizes": ", ".join(f"{line(path.name)} {size(path)}" for path in weights),
        "calibration": calibration,
        "made by": ", ".join(f"{k} {v}" for k, v in made.items()),
    }
    return [(label, text) for label, text in lines.items() if text]


def ranges(calibration: CalibrationSet) -> list[str]:
    """A table: least and largest μ, σ, λ of the keys and values of each layer."""
    rows = [["layer", "", "heads x D", *NAMES]]
    for path, layer in sorted(calibration.layers.items()):
        for side, c in layer.sides().items():
            spans = {
                n: f"{a.min().item():.3g} to {a.max().item():.3g}" for n, a in c.arrays().items()
            }
            shape = next((" x ".join(map(str, a.shape)) for a in c.arrays().values()), "-")
            row = [".".join(map(str, path)), side, shape]
            rows.append(row + [spans.get(name, "-") for name in NAMES])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
