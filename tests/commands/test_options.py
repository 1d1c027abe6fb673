"""What can be typed for a cache, a length and a size of memory, and what mistakes are told."""

import argparse

import pytest

from mlx_kvq import cli
from mlx_kvq.commands import options
from mlx_kvq.format.spec import OPTIONS, names
from mlx_kvq.plugin.option import Argparse

KNOWN = """
Known:
fp16
int4-srft int4-srht int4-none
int8-srft int8-srht int8-none
k8v4-srft k8v4-srht k8v4-none
k5v4-srft k5v4-srht k5v4-none
int5-srft int5-srht int5-none
int3-srft int3-srht int3-none
k4v3-srft k4v3-srht k4v3-none"""


@pytest.mark.parametrize(
    "text, spec",
    [
        ("int4", "int4-srft"),
        ("int8", "int8-srft"),
        ("k8v4:recent=32", "k8v4-srft:recent=32"),
        ("INT4-SRFT", "int4-srft"),
        ("Int4:Scale=Paper", "int4-srft:scale=paper"),
        (" FP16 ", "fp16"),
        *((name, name) for name in names()),
    ],
)
def test_names(text, spec):
    assert options.cache()(text) == spec


@pytest.mark.parametrize(
    "text, said",
    [
        *((t, f"there is no '{t.lower()}' here. The nearest is 'int4-srft'." + KNOWN)
          for t in ("q4_0", "Q4_K_M", "4", "kv4", "4bit", "nf4", "iq4_nl", "turboquant", "turbo4")),
        *((t, f"there is no '{t}' here. The nearest is 'int8-srft'." + KNOWN)
          for t in ("q8_0", "8", "kv8", "8bit", "fp8")),
        *((t, f"there is no '{t}' here. The nearest is 'int3-srft'." + KNOWN)
          for t in ("q3_0", "3", "kv3", "3bit", "turbo3")),
        *((t, f"there is no '{t}' here. The nearest is 'int5-srft'." + KNOWN)
          for t in ("q5_0", "5", "kv5", "5bit")),
        *((t, f"there is no '{t}' here. The nearest is 'fp16'." + KNOWN)
          for t in ("f16", "bf16", "none")),
        ("int6-srft", "KV cache spec 'int6-srft': unknown cache 'int6-srft'. Did you mean "
                      "'int8-srft'?" + KNOWN),
        ("int4:seed=x", "KV cache spec 'int4:seed=x': seed is an integer, got 'x'."),
        ("int4:sed=1", "KV cache spec 'int4:sed=1': unknown option 'sed'. Did you mean "
                       "'seed'? Known: group_size, seed, scale, calibrate, skip, high, budget, "
                       "rounding, recent, first."),
    ],
)  # fmt: skip
def test_mistakes(text, said):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        options.cache()(text)
    assert str(error.value) == said


def test_baselines_are_names_where_they_can_be_had():
    parse = options.cache("kv4", "kv8")
    assert parse("KV4") == "kv4"
    with pytest.raises(argparse.ArgumentTypeError, match="k4v3-none\nkv4 kv8$"):
        parse("kv5")


@pytest.mark.parametrize(
    "text, tokens", [("1K", 1024), ("32k", 32768), ("1_000", 1000), ("0", 0), ("-2k", -2048)]
)
def test_lengths(text, tokens):
    assert options.length(text) == tokens


def test_lengths_are_taken_for_every_number_of_mlx_lms_commands(capsys):
    parser = Argparse().ArgumentParser()
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument_group("more").add_argument("--max-tokens", type=int)
    args = parser.parse_args(["--max-kv-size", "32K", "--max-tokens", "1k"])
    assert (args.max_kv_size, args.max_tokens) == (32768, 1024)
    with pytest.raises(SystemExit):
        parser.parse_args(["--max-kv-size", "1Q"])
    said = (
        "argument --max-kv-size: it is a whole number such as 4096 or 32K (32 times 1024), got '1Q'"
    )
    assert said in capsys.readouterr().err


def test_help_explains_the_options(capsys):
    with pytest.raises(SystemExit):
        Argparse().ArgumentParser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in OPTIONS)


@pytest.mark.parametrize("command", ["evaluate", "benchmark", "convert", "pack-cache", "fit"])
@pytest.mark.parametrize(
    "text, said",
    [
        (
            "turboquant",
            "there is no 'turboquant' here. The nearest is 'int4-srft'.\nKnown:\nfp16\n",
        ),
        ("int4-srfft", "Did you mean 'int4-srft'?\nKnown:\nfp16\nint4-srft"),
        ("int4-srft:group=32", "unknown option 'group'"),
    ],
)
def test_every_command_takes_the_same_names(command, text, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--kv-cache", text])
    assert exit_.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, n",
    [
        ("16GB", 16 << 30),
        ("16", 16 << 30),
        ("0.5 gb", 1 << 29),
        ("512MB", 1 << 29),
        ("8GiB", 8 << 30),
    ],
)
def test_memory(text, n):
    assert options.size(text) == n


@pytest.mark.parametrize("text", ["", "x", "16XB", "-1GB"])
def test_memory_that_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="like 16GB, got"):
        options.size(text)
