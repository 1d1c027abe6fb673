"""Spec strings: every name and option, the way there and back, and what each mistake is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_kvq.format.format import make_format
from mlx_kvq.format.spec import (
    BITS,
    CALIBRATE,
    DENSE,
    OFF,
    OPTIONS,
    ROTATIONS,
    ROUNDINGS,
    SCALES,
    Spec,
    names,
)

NAMES = [f"{bits}-{rotation}" for bits in BITS for rotation in (*ROTATIONS, *DENSE)]
# fmt: off
WRONG = {
    "int6-srft": "unknown cache 'int6-srft'. Did you mean 'int8-srft'?",
    "int4-dct": "unknown cache 'int4-dct'.",
    "int4-": "unknown cache 'int4-'.",
    "int4-srft-x": "unknown cache 'int4-srft-x'. Did you mean 'int4-srft'?",
    "srft-int4": "unknown cache 'srft-int4'.",
    "fp32": "unknown cache 'fp32'.",
    "": "unknown cache ''.",
    ":seed=1": "unknown cache ''.",
    "int4-srft:sed=1": "unknown option 'sed'. Did you mean 'seed'? Known: group_size, seed,",
    "int4-srft:bits=4": "unknown option 'bits'. Known: group_size, seed,",
    "int4-srft:=1": "unknown option ''. Known: group_size, seed,",
    "int4-srft:seed": "option 'seed' needs 'seed=<value>'.",
    "int4-srft:seed=": "option 'seed' needs 'seed=<value>'.",
    "int4-srft:seed= ": "option 'seed' needs 'seed=<value>'.",
    "int4-srft:seed=1,seed=2": "option 'seed' is given twice.",
    "int4-srft:seed=1,scale=paper,seed=1": "option 'seed' is given twice.",
    "int4-srft:": "nothing follows the colon.",
    "int4-srft:,": "nothing follows the colon.",
    "int4-srft:scale=abs": "unknown scale 'abs'.",
    "int4-srft:scale=paprr": "Did you mean 'paper'? Known: search, absmax, paper.",
    "int4-srft:seed=x": "seed is an integer, got 'x'.",
    "int4-srft:seed=1.5": "seed is an integer, got '1.5'.",
    "int4-srft:seed=-1": "seed is 0 to 2**32 - 1, got -1.",
    "int4-srft:seed=4294967296": "seed is 0 to 2**32 - 1, got 4294967296.",
    "int4-srft:group_size=big": "group_size is an integer, got 'big'.",
    "int4-srft:group_size=12": "group_size is a multiple of 8, got 12.",
    "int4-srft:group_size=4": "group_size is a multiple of 8, got 4.",
    "int4-srft:group_size=0": "group_size is a multiple of 8, got 0.",
    "int4-srft:group_size=-32": "group_size is a multiple of 8, got -32.",
    "int4-srft:calibrate=no": "unknown calibrate 'no'. Known: auto, off.",
    "int4-srft:skip=x": "skip lists layers as 'first', 'last' or numbers joined by '+', got 'x'.",
    "int4-srft:skip=first+": "joined by '+', got ''.",
    "int4-srft:high=-1": "high lists layers as 'first', 'last' or numbers joined by '+', got '-1'.",
    "int4-srft:budget=x": "budget is 3 to 16 bits per value, got 'x'.",
    "int4-srft:budget=2.9": "budget is 3 to 16 bits per value, got 2.9.",
    "int4-srft:budget=nan": "budget is 3 to 16 bits per value, got nan.",
    "int4-srft:recent=few": "recent is an integer, got 'few'.",
    "int4-srft:recent=-1": "recent is 0 to 1024 tokens, got -1.",
    "int4-srft:recent=1025": "recent is 0 to 1024 tokens, got 1025.",
    "fp16:": "'fp16' takes no options.",
    "fp16:seed=1": "'fp16' takes no options.",
}
# fmt: on


def test_the_vocabulary():
    """Words of a spec are promised to users and stand in saved caches: none goes or changes."""
    bits = {"int4": (4, 4), "int8": (8, 8), "k8v4": (8, 4), "int3": (3, 3), "k4v3": (4, 3)}
    bits |= {"k5v4": (5, 4), "int5": (5, 5)}
    assert bits.items() <= BITS.items()
    assert {"srft", "srht", "none"} <= set(ROTATIONS)
    assert {"search", "absmax", "paper"} <= set(SCALES)
    assert {"group_size", "seed", "scale"} <= set(OPTIONS) <= set(vars(Spec("int4", "srft")))
    assert names() == ["fp16", *(n for n in NAMES if n.partition("-")[2] not in DENSE)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_alone_has_the_defaults(name):
    spec = Spec.parse(name)
    assert f"{spec.bits}-{spec.rotation}" == name == str(spec)
    assert (spec.group_size, spec.seed, spec.scale, spec.recent) == (None, 0, "search", 64)
    assert (spec.k_bits, spec.v_bits) == BITS[name.split("-")[0]]


@pytest.mark.parametrize(
    "recent, window, kept, others",
    [
        (64, None, 64, 64), (64, 1024, 64, 64), (64, 1023, 31, 63), (64, 512, 16, 32),
        (64, 128, 16, 16), (256, 512, 64, 128), (16, 512, 16, 16), (3, 512, 3, 3), (0, 512, 0, 0),
        (64, 1, 16, 16),
    ],
)  # fmt: skip
def test_a_layer_with_a_small_window_keeps_a_part_of_the_tail(recent, window, kept, others):
    """Of ``int4``, whose groups are smaller there, and of other caches."""
    assert Spec.parse(f"int4-srft:recent={recent},seed=7").recent_in(window) == kept
    for other in ("int8-srft:", "int3-srft:", "int4:group_size=32,", "int4:budget=5,"):
        assert Spec.parse(f"{other}recent={recent}").recent_in(window) == others, other


@pytest.mark.parametrize(
    "first, window, kept", [(4, None, 4), (4, 1024, 4), (4, 1023, 1), (1, 128, 1), (0, 128, 0)]
)
def test_a_layer_with_a_small_window_keeps_the_first_token_alone(first, window, kept):
    for bits in ("int4", "int8", "int4:group_size=64"):
        joint = "," if ":" in bits else ":"
        spec = Spec.parse(f"{bits}{joint}first={first}")
        assert spec.first_in(window) == kept
        assert make_format(spec, 128, window=window).first == kept


@pytest.mark.parametrize("window, group", [(None, 64), (1024, 64), (1023, 32), (128, 32)])
def test_int4_in_a_small_window_has_smaller_groups(window, group):
    assert make_format(Spec.parse("int4"), 128, window=window).layout.k_group == group
    for other in ("int4:group_size=64", "int4:budget=4.25", "int8", "k8v4", "k5v4", "int5"):
        layout = make_format(Spec.parse(other), 128, window=window).layout
        assert (layout.k_group, layout.v_group) == (64, 64), other


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("int4-srft:group_size=8", "group_size", 8),
        ("int8-srft:group_size=256", "group_size", 256),
        ("int4-srht:seed=0", "seed", 0),
        ("int4-srft:seed=4294967295", "seed", 2**32 - 1),
        ("int4-srft:recent=0", "recent", 0),
        ("int4-srft:recent=1024", "recent", 1024),
        *((f"k8v4-none:scale={scale}", "scale", scale) for scale in SCALES),
    ],
)
def test_every_option_sets_its_field_alone(text, field, value):
    spec = Spec.parse(text)
    plain = Spec.parse(text.partition(":")[0])
    assert getattr(spec, field) == value
    assert {f for f in vars(spec) if getattr(spec, f) != getattr(plain, f)} <= {field}


def test_options_in_any_order_and_with_spaces():
    want = Spec("int4", "srft", group_size=64, seed=7, scale="absmax")
    assert Spec.parse("int4-srft:group_size=64,seed=7,scale=absmax") == want
    assert Spec.parse("  int4-srft: scale = absmax , seed=7,group_size= 64 \n") == want


def test_a_spec_is_taken_as_it_is():
    spec = Spec("int4", "srft", seed=3)
    assert Spec.parse(spec) is spec


@pytest.mark.parametrize("text", [OFF, " fp16 "])
def test_off(text):
    assert Spec.parse(text) is None


layers = st.sampled_from(["first", "last"]) | st.integers(0, 99)
specs = st.builds(
    Spec,
    st.sampled_from(list(BITS)),
    st.sampled_from([*ROTATIONS, *DENSE]),
    group_size=st.none() | st.integers(1, 64).map(lambda n: 8 * n),
    seed=st.just(0) | st.integers(0, 2**32 - 1),
    scale=st.sampled_from(list(SCALES)),
    calibrate=st.sampled_from(list(CALIBRATE)),
    recent=st.just(16) | st.integers(0, 1024),
    skip=st.lists(layers, max_size=3).map(tuple),
    high=st.lists(layers, max_size=3).map(tuple),
    budget=st.none() | st.floats(4, 16),
    rounding=st.sampled_from(list(ROUNDINGS)),
)


@given(specs)
def test_str_and_back(spec):
    assert Spec.parse(str(spec)) == spec


@given(specs, specs)
def test_equal_strings_mean_equal_specs(a, b):
    assert (str(a) == str(b)) == (a == b) == (hash(a) == hash(b))


@given(st.text(max_size=30) | st.sampled_from(NAMES).flatmap(lambda n: st.text().map(n.__add__)))
def test_any_text_is_a_spec_or_a_value_error_that_quotes_it(text):
    try:
        Spec.parse(text)
    except ValueError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize("text", ["int4", "INT4", " Int4-SRFT ", "int4:seed=0"])
def test_short_names_and_either_case(text):
    assert Spec.parse(text) == Spec.parse("int4-srft")


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_told(text):
    with pytest.raises(ValueError) as info:
        Spec.parse(text)
    message = str(info.value)
    assert message.startswith(f"KV cache spec {text!r}: ")
    assert WRONG[text] in message
    if "unknown cache" in message:
        assert message.endswith(f" Known: {', '.join(names())}.")
    if "unknown option" in message:
        assert message.endswith(f" Known: {', '.join(OPTIONS)}.")


@pytest.mark.parametrize("given", [None, 4, b"int4-srft", ["int4-srft"], ("int4", "srft")])
def test_not_a_string(given):
    with pytest.raises(ValueError, match="is a string such as 'int4-srft', got") as info:
        Spec.parse(given)
    assert repr(given) in str(info.value)


def test_policy_options_and_the_way_back():
    text = "int4-srft:calibrate=off,skip=first+3,high=last,budget=4.75"
    spec = Spec.parse(text)
    assert (spec.calibrate, spec.skip, spec.high) == ("off", ("first", 3), ("last",))
    assert spec.budget == 4.75
    assert str(spec) == text
    assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("bits", "int6", "unknown bits 'int6'. Did you mean 'int8'? Known: int4, int8, k8v4, k5v4"),
        ("bits", 4, "unknown bits '4'."),
        ("rotation", "dct", "unknown rotation 'dct'."),
        ("scale", None, "unknown scale 'None'."),
        ("calibrate", True, "unknown calibrate 'True'."),
        ("rounding", "up", "unknown rounding 'up'."),
        ("group_size", 12, "group_size is a multiple of 8, got 12."),
        ("group_size", 32.0, "group_size is a multiple of 8, got 32.0."),
        ("group_size", 0, "group_size is a multiple of 8, got 0."),
        ("seed", -1, "seed is 0 to 2**32 - 1, got -1."),
        ("seed", True, "seed is 0 to 2**32 - 1, got True."),
        ("seed", "7", "seed is 0 to 2**32 - 1, got '7'."),
        ("skip", "first", "skip is a tuple such as ('first', 3), got 'first'."),
        ("skip", [0], "skip is a tuple such as ('first', 3), got [0]."),
        ("high", (-1,), "joined by '+', got -1."),
        ("high", ("middle",), "joined by '+', got 'middle'."),
        ("budget", 2, "budget is 3 to 16 bits per value, got 2."),
        ("budget", "5", "budget is 3 to 16 bits per value, got '5'."),
        ("budget", float("inf"), "budget is 3 to 16 bits per value, got inf."),
    ],
)
def test_a_spec_made_directly_is_checked_too(field, value, message):
    with pytest.raises(ValueError) as info:
        Spec(**({"bits": "int4", "rotation": "srft"} | {field: value}))
    assert message in str(info.value)
