"""Compile-time constants of the kernels for one kind of format."""

from dataclasses import dataclass

from ...format.format import Kind
from .. import memo
from . import tables
from .jit import Constants
from .machine import ROTATIONS

_RULES = {"search": 0, "absmax": 1, "paper": 2}


@dataclass(frozen=True)
class Plan:
    """Constants of each kernel, and ``pack_set``: tokens that a pair of SIMD groups packs or
    restores at once."""

    pack: Constants
    keep: Constants
    attend: Constants
    combine: Constants
    dequantize: Constants
    restore: Constants
    pack_set: int


def plan(kind: Kind) -> Plan:
    return memo.kernel(("plan", kind), lambda: _plan(kind))


def _plan(kind: Kind) -> Plan:
    lay = kind.layout
    (k_mu, k_sigma, k_lam), (v_mu, v_sigma, v_lam) = kind.keys, kind.values
    dims = (("KD", lay.k_dim), ("VD", lay.v_dim))
    codes = (("KB", lay.k_bits), ("VB", lay.v_bits), ("KG", lay.k_group), ("VG", lay.v_group))
    rotation = (
        ("ROTATION", ROTATIONS[kind.rotation]),
        ("K_CALIBRATED", k_mu or k_sigma or k_lam),
        ("V_CALIBRATED", v_mu or v_sigma or v_lam),
    )
    scaled = (("K_SCALED", k_lam), ("V_SCALED", v_lam))
    centred, levels = ("K_CENTRED", k_mu), ("HALF_STEP", kind.scale != "paper")
    rounding = ("RULE", _RULES[kind.scale]), ("FEEDBACK", kind.feedback)
    return Plan(
        pack=(*dims, *codes, *rotation, *scaled, *rounding),
        keep=(*dims, *rotation, *scaled),
        attend=(*dims, *codes, *rotation, centred, levels),
        combine=(*dims, *rotation, centred),
        dequantize=(*dims, *codes, levels),
        restore=(*dims, *codes, *rotation, levels),
        pack_set=32 // max(tables.lanes(D, wide=False) for D in (lay.k_dim, lay.v_dim)),
    )
