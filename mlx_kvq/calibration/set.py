"""The calibration of every layer of a model, and its file.

The file is safetensors with fp32 tensors ``layers.<layer>.<keys|values>.<mu|sigma|lam>``
[Hkv, D] and ``layers.<layer>.keys.metric`` [Hkv, D, D] (``layers.<layer>.<n>.…`` for the n-th
cache of a layer that has several), and JSON metadata about its making. Nothing in it is executed.
"""

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..files import TEXT, line, parse_json, printable, quoted, replacing, safetensors_header
from ..format.transform import Calibration
from ..stock import CachePath, Shapes

FILE_VERSION = 1
NAMES = ("mu", "sigma", "lam")
METRIC = "metric"
# Beyond these a file is damaged or not made by us: real key outliers reach some 10^3.
MU_LIMIT = 1e6
RATIO_LIMIT = 1e6
_TENSOR = re.compile(
    r"layers\.([0-9]{1,5})(?:\.([0-9]))?\.(?:(keys|values)\.(mu|sigma|lam)|(keys)\.(metric))"
)


@dataclass(frozen=True)
class LayerCalibration:
    """μ, σ, λ of one cache's keys and values."""

    keys: Calibration = Calibration()
    values: Calibration = Calibration()

    def sides(self) -> dict[str, Calibration]:
        return {"keys": self.keys, "values": self.values}


@dataclass(frozen=True)
class CalibrationSet:
    """A model's calibration.

    Args:
        layers (dict): Path of a cache -> :class:`LayerCalibration`. The path is ``(layer,)``,
            or ``(layer, n)`` for the n-th cache of a layer that has several.
        metadata (dict): How it was made; JSON values.
    """

    layers: Mapping[CachePath, LayerCalibration]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(self.arrays())

    def arrays(self) -> dict[str, mx.array]:
        """Tensor name -> fp32 [Hkv, D]."""
        return {
            f"layers.{'.'.join(map(str, path))}.{side}.{name}": a
            for path, layer in sorted(self.layers.items())
            for side, calibration in layer.sides().items()
            for name, a in calibration.arrays().items()
        }

    @property
    def digest(self) -> str:
        """Hash of all names, shapes and values, 16 hex digits."""
        digest = hashlib.sha256()
        for name, a in self.arrays().items():
            digest.update(f"{name}{a.shape}".encode() + np.array(a, dtype=np.float32).tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            ValueError: If ``path`` is no .safetensors file, or the metadata could not be read back.
            OSError: If the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"A calibration is a .safetensors file, got '{path}'.")
        _check_notes(self.metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "format": "mlx_kvq calibration",
            "version": str(FILE_VERSION),
            "metadata": json.dumps(dict(self.metadata), sort_keys=True),
        }
        with replacing(path) as part:
            try:
                mx.save_safetensors(str(part), self.arrays(), header)
            except RuntimeError as error:  # how MLX says that a disk is full
                raise OSError(errno.EIO, line(error), str(path)) from error

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationSet":
        """Read a file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not a calibration, is of another version or holds values that
                cannot be right; the message says which.
        """
        try:
            header, _ = safetensors_header(path)
            arrays: Any = mx.load(str(path), format="safetensors")
            mx.eval(arrays)
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no calibration '{path}'.") from None
        except Exception as error:
            raise ValueError(
                f"'{path}' is not a readable safetensors file: {line(error)}"
            ) from None
        try:
            return cls._parse(arrays, header)
        except ValueError as error:
            raise ValueError(f"Calibration '{path}': {line(error)}") from None

    @classmethod
    def _parse(cls, arrays: dict[str, mx.array], header: dict[str, str]) -> "CalibrationSet":
        if header.get("format") != "mlx_kvq calibration":
            raise ValueError("it is not marked as an mlx_kvq calibration.")
        if header.get("version") != str(FILE_VERSION):
            raise ValueError(
                f"it has format version {quoted(header.get('version'))}; this mlx_kvq reads "
                f"{FILE_VERSION}."
            )
        try:
            metadata = parse_json(header.get("metadata", ""))
        except ValueError as error:
            raise ValueError(f"its metadata {error}.") from None
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not a JSON object.")
        _check_notes(metadata)
        parts: dict[CachePath, dict[str, dict[str, mx.array]]] = {}
        for name, a in arrays.items():
            if not (match := _TENSOR.fullmatch(name)):
                raise ValueError(f"unknown tensor {quoted(name)}.")
            layer, place, *found = match.groups()
            side, which = filter(None, found)
            path = (int(layer),) if place is None else (int(layer), int(place))
            parts.setdefault(path, {"keys": {}, "values": {}})[side][which] = a
        layers = {
            path: LayerCalibration(*(Calibration(**side) for side in sides.values()))
            for path, sides in parts.items()
        }
        return cls(layers, metadata)

    def check(self, shapes: Shapes) -> None:
        """Raise ValueError unless this fits the caches of ``shapes``."""
        if missing := sorted(set(shapes) - set(self.layers)):
            raise ValueError(f"it has nothing for layer {missing[0][0]}, which is to be packed.")
        for path, (Hkv, *dims) in shapes.items():
            for (side, c), D in zip(self.layers[path].sides().items(), dims, strict=True):
                for name, a in c.arrays().items():
                    if a.shape != ((Hkv, D, D) if name == METRIC else (Hkv, D)):
                        raise ValueError(
                            f"{name} of the {side} of layer {path[0]} is {a.shape}, the model "
                            f"has {Hkv} KV heads of {D} channels."
                        )


def _check_notes(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError unless these can be printed: they go to the terminal and to model cards."""
    for key, value in metadata.items():
        if not printable(key) or (isinstance(value, str) and not printable(value)):
            raise ValueError(
                f"its metadata says {quoted(value)} for {quoted(key)}, which is no short text: at "
                f"most {TEXT} characters, none of them a control character."
            )


def validate(arrays: Mapping[str, mx.array]) -> None:
    """Raise ValueError if a tensor's values cannot be a calibration's."""
    if not arrays:
        raise ValueError("it holds no tensors.")
    for name, a in arrays.items():
        square = name.endswith(METRIC)
        if a.dtype != mx.float32 or a.ndim != 2 + square or a.size == 0:
            axes = "channels, channels" if square else "channels"
            raise ValueError(f"'{name}' is {a.dtype} {a.shape}, not float32 [heads, {axes}].")
        values = np.array(a)
        low, high = values.min(), values.max()
        if not np.isfinite(values).all():
            raise ValueError(f"'{name}' holds a NaN or an infinity.")
        if square:
            if a.shape[1] != a.shape[2] or not _is_moment(values):
                raise ValueError(f"'{name}' is not a matrix of second moments.")
        elif name.endswith(".mu"):
            if (most := max(-low, high)) > MU_LIMIT:
                raise ValueError(f"'{name}' reaches {most:.3g}, more than any key or value.")
        elif low <= 0:
            raise ValueError(f"'{name}' is not positive everywhere (least {low:.3g}).")
        elif low * RATIO_LIMIT < 1 or high > RATIO_LIMIT:
            raise ValueError(
                f"'{name}' spans {low:.3g} to {high:.3g}; scales lie within {1 / RATIO_LIMIT:g} to "
                f"{RATIO_LIMIT:g}."
            )


def _is_moment(M: np.ndarray) -> bool:
    """Symmetric and positive semidefinite, to rounding, [H, D, D]."""
    M = M.astype(np.float64)
    size = np.abs(M).max(axis=(1, 2))
    uneven = np.abs(M - M.swapaxes(1, 2)).max(axis=(1, 2))
    return bool(
        (uneven <= 1e-4 * size).all() and (np.linalg.eigvalsh(M)[:, 0] >= -1e-4 * size).all()
    )
