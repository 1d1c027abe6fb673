"""``kv_cache`` of a ``config.json``, checked before it is used."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import NESTING, line, nested, printable, quoted
from ..format.spec import BITS, OFF, Spec

KEY = "kv_cache"  # of config.json
FORMAT, VERSION = "mlx_kvq", 1
_PATH = re.compile(r"(0|[1-9][0-9]{0,4})(?:\.([0-9]))?")
Layers = Mapping[tuple[int, ...], str]


class RepositoryError(ValueError):
    """A repository's cache cannot be used; one line says why."""


@dataclass(frozen=True)
class Section:
    """``kv_cache`` of a ``config.json``."""

    spec: Spec
    layers: Layers  # path of every packed cache -> a name of spec.BITS
    sha256: str | None = None  # of the calibration file; None with calibrate=off
    made: Mapping[str, str | int] = field(default_factory=dict)  # notes, not used

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "spec": str(self.spec),
            "seed": self.spec.seed,
            "layers": {".".join(map(str, path)): bits for path, bits in self.layers.items()},
            "calibration": None if self.sha256 is None else {"sha256": self.sha256},
            "made": dict(self.made),
        }

    @classmethod
    def parse(cls, given: object) -> "Section":
        """Raise RepositoryError if ``given``, from JSON, is not a section of this version."""
        if not isinstance(given, dict):
            raise RepositoryError(f"'{KEY}' in config.json is {quoted(given)}, not an object.")
        if nested(given):
            raise RepositoryError(
                f"'{KEY}' in config.json is nested more than {NESTING} levels deep."
            )
        if given.get("format") != FORMAT:
            raise RepositoryError(
                f"'format' of '{KEY}' is {quoted(given.get('format'))}, not '{FORMAT}'."
            )
        version = given.get("version")
        if type(version) is not int or version != VERSION:
            raise RepositoryError(
                f"it has format version {quoted(version)}; this mlx_kvq reads {VERSION}."
            )
        spec = _spec(given.get("spec"))
        if type(given.get("seed")) is not int or given["seed"] != spec.seed:
            raise RepositoryError(
                f"'seed' is {quoted(given.get('seed'))} and the spec's is {spec.seed}."
            )
        sha256 = _sha256(given.get("calibration"))
        if (sha256 is None) != (spec.calibrate == "off"):
            raise RepositoryError(
                f"its spec is '{spec}' and its calibration is "
                f"{'missing' if sha256 is None else 'there all the same'}."
            )
        return cls(spec, _layers(given.get("layers")), sha256, _made(given.get("made")))


def _spec(given: object) -> Spec:
    if not printable(given):
        raise RepositoryError(f"'spec' is {quoted(given)}, not a text such as 'int4-srft'.")
    try:
        spec = Spec.parse(given)  # type: ignore[arg-type]
    except ValueError as error:
        raise RepositoryError(line(error)) from None
    if spec is None:
        raise RepositoryError(f"its spec is '{OFF}', which is a model without a section.")
    return spec


def _layers(given: object) -> dict[tuple[int, ...], str]:
    if not isinstance(given, dict) or not given:
        raise RepositoryError(f"'layers' is {quoted(given)}, not an object of layers and bits.")
    layers = {}
    for name, bits in given.items():
        if not (match := _PATH.fullmatch(name)):
            raise RepositoryError(f"'layers' names {quoted(name)}, which is no layer.")
        if not isinstance(bits, str) or bits not in BITS:
            raise RepositoryError(
                f"layer {name} is said to have {quoted(bits)}; known: {', '.join(BITS)}."
            )
        layers[tuple(int(part) for part in match.groups() if part is not None)] = bits
    return layers


def _sha256(given: object) -> str | None:
    if given is None:
        return None
    digest = given.get("sha256") if isinstance(given, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise RepositoryError(f"'calibration' is {quoted(given)}, not an object with a sha256.")
    return digest


def _made(given: object) -> dict[str, str | int]:
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(
        printable(k) and (printable(v) or (type(v) is int and abs(v) < 1 << 63))
        for k, v in given.items()
    ):
        raise RepositoryError(f"'made' is {quoted(given)}, not an object of short texts.")
    return given
