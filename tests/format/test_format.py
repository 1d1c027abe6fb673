"""Formats and their signatures: what a saved cache is, and which ones are refused."""

import copy
import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_kvq.format.format import VERSION, Format, make_format, parse_signature
from mlx_kvq.format.spec import BITS, DENSE, ROTATIONS, SCALES, Spec
from mlx_kvq.format.transform import Calibration, Transform
from tests.support import oracle

PLAIN = "mlx_kvq/1;int4-srft;scale=search;seed=0;dims=64,64;groups=32,32"
FIELDS = ("mu", "sigma", "lam")
SOME_FIELDS = [c for n in (1, 2, 3) for c in itertools.combinations(FIELDS, n)]


def calibration(*fields: str, D: int = 64) -> Calibration:
    """Of two heads, each with its own numbers."""
    normal = np.random.default_rng(D).standard_normal((3, 2, D)).astype(np.float32)
    arrays = dict(
        zip(FIELDS, (normal[0], np.exp(0.5 * normal[1]), np.exp(0.5 * normal[2])), strict=True)
    )
    return Calibration(**{field: mx.array(arrays[field]) for field in fields})


def calibrated() -> Format:
    keys, values = calibration("mu", "sigma"), calibration("lam")
    return make_format(Spec.parse("int4-srft"), 64, keys=keys, values=values)


def test_the_signature_is_frozen():
    """Saved caches carry it: any change of the text makes them unreadable."""
    assert VERSION == 1
    before = "int4-srft:group_size=32,recent=16"  # the defaults of 0.1.0
    plain = "int4-srft:group_size=32,recent=0,first=0"
    assert make_format(Spec.parse(plain), 64).signature == PLAIN
    fmt = make_format(Spec.parse(f"{before},first=0"), 64)
    assert fmt.signature == f"{PLAIN};recent=16"  # what was saved before there were first tokens
    fmt = make_format(Spec.parse(before), 64)
    assert (fmt.signature, fmt.of_rows) == (f"{PLAIN};recent=16;first=4", f"{PLAIN};recent=16")
    fmt = make_format(Spec.parse("k8v4-srht:group_size=64,seed=7,scale=paper"), 256, 128)
    assert fmt.signature == (
        "mlx_kvq/1;k8v4-srht;scale=paper;seed=7;dims=256,128;groups=64,64;recent=64;first=4"
    )
    mu = Calibration(mu=mx.arange(128, dtype=mx.float32).reshape(2, 64))
    fmt = make_format(Spec.parse(before), 64, keys=mu)
    assert fmt.signature == f"{PLAIN};recent=16;first=4;calibration=ef34f5bad13d702a"


@pytest.mark.parametrize("rotation", [*ROTATIONS, *DENSE])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sizes", [(64, 64, None, None), (128, 64, 16, 32), (256, 256, 256, 16)])
@pytest.mark.parametrize("seed, recent", [(0, 16), (2**32 - 1, 0), (1, 1024)])
def test_signature_and_back(bits, rotation, scale, sizes, seed, recent):
    k_dim, v_dim, k_group, v_group = sizes
    spec = Spec(bits, rotation, seed=seed, scale=scale, recent=recent)
    fmt = make_format(spec, k_dim, v_dim, k_group=k_group, v_group=v_group)
    back = parse_signature(fmt.signature)
    assert back.signature == fmt.signature
    assert (back.spec, back.layout, back.scale) == (spec, fmt.layout, fmt.scale)
    default = [32 if b == 3 else 64 for b in BITS[bits]]
    assert (fmt.layout.k_group, fmt.layout.v_group) == (
        k_group or default[0],
        v_group or default[1],
    )
    for name in "keys", "values":
        a, b = getattr(fmt, name), getattr(back, name)
        assert (a.rotation, a.seed, a.stream, a.dim) == (b.rotation, b.seed, b.stream, b.dim)


def test_group_size_of_the_spec_comes_back_too():
    """As the layers' groups: the spec itself may have asked for a default."""
    fmt = make_format(Spec.parse("int4-srft:group_size=16"), 64)
    assert parse_signature(fmt.signature).layout == fmt.layout
    assert "groups=16,16" in fmt.signature


@pytest.mark.parametrize("fields", SOME_FIELDS, ids="-".join)
@pytest.mark.parametrize("sides", [("keys",), ("values",), ("keys", "values")], ids="-".join)
def test_signature_and_back_with_calibration(fields, sides):
    parameters = {side: calibration(*fields) for side in sides}
    fmt = make_format(Spec.parse("int8-srft:seed=3"), 64, **parameters)
    assert fmt.signature.count(";calibration=") == 1
    back = parse_signature(fmt.signature, fmt.arrays)
    assert back.signature == fmt.signature
    for a, b in zip(fmt.arrays, back.arrays, strict=True):
        assert (a is None) == (b is None)
        assert a is None or mx.array_equal(a, b)
    kept = [a is not None for a in back.arrays]
    assert kept == [side in sides and field in fields for side in ("keys", "values")
                    for field in FIELDS]  # fmt: skip


def test_whatever_changes_the_bytes_changes_the_signature():
    base = "int4-srft:group_size=32,seed=1,scale=absmax"
    texts = [base, base.replace("srft", "srht"), base.replace("srft", "none")]
    texts += [base.replace("int4", bits) for bits in BITS if bits != "int4"]
    texts += [base.replace("32", "64")]
    texts += [base.replace("=1", "=2"), base.replace("absmax", "paper")]
    texts += [base.replace("absmax", "search"), f"{base},recent=0", f"{base},recent=3"]
    formats = [make_format(Spec.parse(text), 64) for text in texts]
    spec = Spec.parse(base)
    formats += [make_format(spec, 64, 128), make_format(spec, 128, 64), make_format(spec, 128)]
    formats += [make_format(spec, 64, k_group=8), make_format(spec, 64, v_group=8)]
    for side, fields in itertools.product(("keys", "values"), SOME_FIELDS):
        formats.append(make_format(spec, 64, **{side: calibration(*fields)}))
    mu = np.array(calibration("mu").mu)
    mu[1, 63] = np.nextafter(mu[1, 63], np.float32(9))
    formats.append(make_format(spec, 64, keys=Calibration(mu=mx.array(mu))))
    assert len({fmt.signature for fmt in formats}) == len(formats)


def damages():
    good = list(calibrated().arrays)

    def changed(at, array):
        return [array if i == at else a for i, a in enumerate(good)]

    last_bit = np.array(good[0])
    last_bit[1, 5] = np.nextafter(last_bit[1, 5], np.float32(9))
    return {
        "nothing given": None,
        "one array lost": changed(1, None),
        "one array too many": changed(2, good[0]),
        "the last bit of a number": changed(0, mx.array(last_bit)),
        "a NaN": changed(0, good[0] * mx.nan),
        "heads swapped": changed(0, good[0][::-1]),
        "one head lost": changed(0, good[0][:1]),
        "all arrays of another shape": [a if a is None else a.reshape(1, 128) for a in good],
        "all arrays flat": [a if a is None else a.flatten() for a in good],
        "two arrays swapped": [good[1], good[0], *good[2:]],
        "keys and values swapped": good[3:] + good[:3],
    }


@pytest.mark.parametrize("damage", damages())
def test_damaged_calibration_is_refused(damage):
    signature = calibrated().signature
    assert parse_signature(signature, calibrated().arrays).signature == signature
    with pytest.raises(ValueError, match="calibration does not belong to its signature") as info:
        parse_signature(signature, damages()[damage])
    assert repr(signature) in str(info.value)


@pytest.mark.parametrize("shape", [(2, 32), (64,), (1, 2, 64)])
def test_calibration_of_another_head_size_is_refused(shape):
    with pytest.raises(ValueError) as info:
        make_format(Spec.parse("int4-srft"), 64, values=Calibration(sigma=mx.ones(shape)))
    want = f"The calibration of the values has sigma {shape}; for head size 64 "
    assert str(info.value).startswith(want)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_calibration_counts_in_float32(dtype):
    half = {f: a.astype(dtype) for f, a in vars(calibration(*FIELDS)).items() if a is not None}
    fmt = make_format(Spec.parse("int4-srft"), 64, keys=Calibration(**half))
    full = {f: a.astype(mx.float32) for f, a in half.items()}
    assert fmt.signature == make_format(fmt.spec, 64, keys=Calibration(**full)).signature
    assert {a.dtype for a in fmt.arrays if a is not None} == {mx.float32}


def test_calibration_without_a_mention_in_the_signature_is_refused():
    with pytest.raises(ValueError, match="calibration does not belong to its signature"):
        parse_signature(PLAIN, calibrated().arrays)


@pytest.mark.parametrize("version", ["0", "2", "10"])
def test_other_versions_are_refused(version):
    with pytest.raises(ValueError) as info:
        parse_signature(PLAIN.replace("/1;", f"/{version};"))
    want = f"The cache was written in format version {version}; this mlx_kvq reads 1."
    assert str(info.value) == want


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "mlx_kvq",
        "mlx_kvq/1",
        "x" + PLAIN,
        PLAIN + "\n",
        PLAIN + ";",
        PLAIN + ";calibration=",
        PLAIN + ";calibration=0123",
        PLAIN.replace(";scale=search", ""),
        PLAIN.replace("=64,64", "=64"),
        PLAIN.replace("seed=0", "seed=-1"),
        PLAIN.replace("int4", "INT4"),
        PLAIN.replace(";", ","),
        "y" * 1000,
        None,
        1,
    ],
)
def test_nonsense_is_refused(nonsense):
    with pytest.raises(ValueError, match="is not the signature of an mlx_kvq cache.$") as info:
        parse_signature(nonsense)
    assert len(str(info.value)) < 160


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("int4", "int6", "unknown cache 'int6-srft'"),
        ("srft", "dct", "unknown cache 'int4-dct'"),
        ("int4-srft", "fp16", "'fp16' takes no options"),
        ("search", "best", "unknown scale 'best'"),
        ("seed=0", "seed=4294967296", "seed is 0 to 2"),
        ("dims=64", "dims=60", "head size 60 is not a multiple of 8"),
        ("groups=32", "groups=24", "group_size=24 does not divide head size 64"),
        ("groups=32,32", "groups=0,0", "group_size=0 does not divide head size 64"),
        ("groups=32,32", "groups=32,4", "group_size=4 does not divide head size 64"),
        ("int4-srft;scale=search;seed=0;dims=64", "int4-srht;scale=search;seed=0;dims=96", "srht"),
    ],
)
def test_signatures_of_formats_that_do_not_exist_are_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        parse_signature(PLAIN.replace(old, new, 1))


def test_layers_share_a_format():
    spec = Spec.parse("int4-srft:seed=5")
    fmt = make_format(spec, 64)
    assert make_format(Spec.parse("int4-srft:seed=5"), 64) is fmt
    assert make_format(spec, 64, 64) is fmt
    assert copy.deepcopy(fmt) is fmt
    assert copy.deepcopy({"of a cache": [fmt]})["of a cache"][0] is fmt
    assert parse_signature(fmt.signature) is parse_signature(fmt.signature)
    others = [make_format(spec, 64, 128), make_format(spec, 128), make_format(spec, 64, k_group=8)]
    others += [make_format(Spec.parse("int4-srft:seed=6"), 64), make_format(spec, 64, v_group=8)]
    assert len({id(other) for other in [fmt, *others]}) == 6


def test_a_calibrated_layer_does_not_share():
    spec, keys = Spec.parse("int4-srft:seed=5"), calibration("mu")
    fmt = make_format(spec, 64, keys=keys)
    assert make_format(spec, 64, keys=keys) is not fmt
    assert make_format(spec, 64) is not fmt
    assert make_format(spec, 64).arrays is None


@pytest.mark.parametrize(
    "text, k_dim, v_dim, message",
    [
        ("int4-srft", 60, 64, "head size 60 is not a multiple of 8"),
        ("int4-srft", 64, 100, "head size 100 is not a multiple of 8"),
        ("int4-srft", 0, 64, "a head size is a whole number from 1 to 65536, not 0"),
        ("int4-srft", 64, -8, "a head size is a whole number from 1 to 65536, not -8"),
        ("int4-none", 64, 10**12, f"a head size is a whole number from 1 to 65536, not {10**12}"),
        ("int4-srft", 64.0, 64, "a head size is a whole number from 1 to 65536, not 64.0"),
        ("int4-srft", 64, 8192, "head size 8192 is not a multiple of 8 from 8 to 4096"),
        ("int4-srft", 64, 65, "srft needs an even head size, not 65"),
        ("int4-srht", 80, 64, "srht needs a head size that is a power of two, not 80"),
        ("int4-srht", 64, 96, "srht needs a head size that is a power of two, not 96"),
        ("int4-srft:group_size=32", 128, 80, "group_size=32 does not divide head size 80"),
        ("int4-none:group_size=24", 64, 96, "group_size=24 does not divide head size 64"),
    ],
)
def test_head_sizes_that_do_not_fit(text, k_dim, v_dim, message):
    with pytest.raises(ValueError, match=message):
        make_format(Spec.parse(text), k_dim, v_dim)


def test_one_number_of_heads():
    both = {"keys": Calibration(mu=mx.zeros((2, 64))), "values": Calibration(mu=mx.zeros((3, 64)))}
    with pytest.raises(ValueError, match="^The calibrations of keys and values are of 2 and 3 KV "):
        make_format(Spec.parse("int4-srft"), 64, **both)


def test_what_is_no_spec():
    with pytest.raises(ValueError, match="^A spec is a Spec, as Spec.parse returns, got 'int4-"):
        make_format("int4-srft", 64)


@pytest.mark.parametrize("rotation", ["srft", "srht", "none"])
@pytest.mark.parametrize("fields", [(), *SOME_FIELDS], ids="-".join)
def test_transforms(rotation, fields):
    """forward is the oracle's; query carries q · (x - μ) over; output is the way back."""
    c = calibration(*fields)
    transform = Transform(rotation, 9, 1, 64, c)
    params = [None if a is None else np.array(a) for a in (c.mu, c.sigma, c.lam)]
    x, q = np.random.default_rng(3).standard_normal((2, 3, 2, 5, 64)).astype(np.float32)
    y = transform.forward(mx.array(x))
    np.testing.assert_allclose(y, oracle.forward(x, rotation, 9, 1, *params), atol=2e-5)
    centred = x if c.mu is None else x - params[0][:, None]
    logits = (transform.query(mx.array(q)) * y).sum(axis=-1)
    np.testing.assert_allclose(logits, (q * centred).sum(axis=-1), atol=2e-4)
    np.testing.assert_allclose(transform.output(y), x, atol=2e-5)


def test_query_heads_use_the_calibration_of_their_kv_head():
    c = calibration("mu", "sigma", "lam")
    transform = Transform("srft", 0, 0, 64, c)
    x = mx.array(np.random.default_rng(4).standard_normal((1, 6, 1, 64)).astype(np.float32))
    for method in transform.query, transform.output:
        together = method(x)
        for h in range(2):  # query heads 0 ... 2 and 3 ... 5
            alone = Calibration(c.mu[h, None], c.sigma[h, None], c.lam[h, None])
            one = getattr(Transform("srft", 0, 0, 64, alone), method.__name__)
            mine = slice(3 * h, 3 * h + 3)
            np.testing.assert_allclose(together[:, mine], one(x[:, mine]), atol=1e-5)


def with_metric() -> Calibration:
    D = 64
    a = np.random.default_rng(3).standard_normal((2, D, 3 * D))
    c = calibration("mu", "sigma", "lam")
    metric = mx.array((a @ a.swapaxes(1, 2) / (3 * D)).astype(np.float32))
    return Calibration(c.mu, c.sigma, c.lam, metric)


@pytest.mark.parametrize(
    "spec, changed",
    [
        ("int4-srft:rounding=feedback", True),
        ("int3-srft:rounding=feedback", True),
        ("k5v4-srft:rounding=feedback", True),
        ("int4-srft", False),
        ("k8v4-srft", False),
    ],
)
def test_feedback_changes_sigma_of_short_keys_once(spec, changed):
    """Half-way between the balanced scale and the keys' standard deviation, of geometric mean 1;
    what a signature describes has been changed already."""
    keys, values = with_metric(), calibration("mu")
    fmt = make_format(Spec.parse(spec), 64, keys=keys, values=values)
    sigma = np.array(fmt.keys.calibration.sigma)
    if changed:
        given = np.array(keys.sigma, np.float64)
        q2 = np.einsum("hdd->hd", np.array(keys.metric, np.float64))
        wanted = np.sqrt(given * given**2 * np.sqrt(q2))
        wanted /= np.exp(np.log(wanted).mean(axis=-1, keepdims=True))
        np.testing.assert_allclose(sigma, wanted, rtol=1e-5)
        assert abs(sigma / np.array(keys.sigma) - 1).max() > 0.1
    else:
        np.testing.assert_array_equal(sigma, np.array(keys.sigma))
    assert (fmt.feedback is not None, len(fmt.arrays)) == (changed, 7 if changed else 6)
    again = fmt
    for _ in range(2):
        again = parse_signature(again.signature, again.arrays)
        assert again.signature == fmt.signature
        for a, b in zip(again.arrays, fmt.arrays, strict=True):
            assert (a is None and b is None) or mx.array_equal(a, b)
        assert again.spec.rounding == ("feedback" if changed else "auto")
        assert not changed or mx.array_equal(again.feedback, fmt.feedback)


@pytest.mark.parametrize(
    "spec, keys", [("k8v4-srft", with_metric()), ("int4-srft", calibration("sigma"))]
)
def test_feedback_that_has_nothing_to_weigh_is_nearest_rounding(spec, keys):
    """8-bit keys, and keys without a metric."""
    fmt = make_format(Spec.parse(f"{spec}:rounding=feedback"), 64, keys=keys)
    assert fmt.feedback is None
    assert mx.array_equal(fmt.keys.calibration.sigma, keys.sigma)
    assert fmt.signature == make_format(Spec.parse(spec), 64, keys=keys).signature


def test_a_metric_alone_says_how_many_heads():
    fmt = make_format(Spec.parse("int4-srft"), 64, keys=Calibration(metric=with_metric().metric))
    assert (fmt.heads, make_format(Spec.parse("int4-srft"), 64).heads) == (2, None)


@pytest.mark.parametrize("sizes", ["64,64;groups=32,8192", "8192,64;groups=32,32"])
def test_sizes_that_no_model_has_are_refused(sizes):
    signature = PLAIN.replace("64,64;groups=32,32", sizes)
    with pytest.raises(ValueError, match="up to 4096"):
        parse_signature(signature)


def test_a_saved_metric_needs_feedback_and_feedback_a_metric():
    fmt = make_format(Spec.parse("int4-srft:rounding=feedback"), 64, keys=with_metric())
    with pytest.raises(ValueError, match="damaged"):
        parse_signature(fmt.signature, fmt.arrays[:6])
    plain = make_format(Spec.parse("int4-srft"), 64, keys=with_metric())
    with pytest.raises(ValueError, match="damaged"):
        parse_signature(plain.signature, [*plain.arrays, with_metric().metric])
