"""The automatic calibration: from which text, within which time, and what is kept of it."""

import os
from pathlib import Path

import pytest
from mlx_lm import load

import mlx_kvq
from mlx_kvq import files
from mlx_kvq.calibration import automatic
from mlx_kvq.stock import identity
from tests.calibration.test_calibrate import Attention, Model, Words
from tests.support.float32 import MODELS


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_KVQ_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_the_tokenizer_that_a_model_was_loaded_with_is_known(kept):
    name = str(MODELS / "tiny-qwen2-8bit")
    model, _ = load(name)
    report = mlx_kvq.enable(model, "int4-srft", verbose=False)
    assert report.calibration.metadata["text"] == "built-in sample"
    assert report.calibration.metadata["model"] == name
    assert [p.name for p in kept.iterdir()] == [
        f"{identity(model)}-{automatic.VERSION}-sample.safetensors"
    ]


def test_text_is_found_before_random_tokens(kept):
    model = Model(Attention())
    random = automatic.automatic(model)
    text = automatic.automatic(model, Words())
    assert len(list(kept.iterdir())) == 2 and random.digest != text.digest
    assert automatic.automatic(model).digest == text.digest


def test_files_that_cannot_be_used_are_told_once(kept):
    model, lines = Model(Attention()), []
    kept.mkdir()
    for kind in ("sample", "random"):
        (kept / f"{identity(model)}-{automatic.VERSION}-{kind}.safetensors").write_bytes(b"no")
    automatic.automatic(model, say=lines.append)
    (line,) = lines
    assert line.startswith("calibrating again, the kept calibration cannot be used: ")


def test_what_was_made_in_another_way_is_not_used(kept):
    """Calibrations of windows of 1K were kept without a version in their name."""
    model = Model(Attention())
    automatic.automatic(model, Words())
    (file,) = kept.iterdir()
    file.write_bytes(b"no")
    file.rename(kept / f"{identity(model)}-sample.safetensors")
    lines = []
    found = automatic.automatic(model, Words(), lines.append)
    assert lines == ["no calibration for this model: calibrating on the built-in sample text, once"]
    assert found.metadata["positions"] == 8192 and len(list(kept.iterdir())) == 2


class Clock:
    """Each look at it is ``step`` seconds after the one before."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


@pytest.mark.parametrize(
    "each, tokens", [(0.001, 256), (0.01, 256), (0.25, 240), (0.4, 150), (2.0, 128)]
)
def test_a_slow_machine_reads_less(each, tokens, monkeypatch):
    """60 seconds of ``each`` per token; 256 tokens in the tests, where 2048 are read elsewhere."""
    monkeypatch.setattr(automatic.time, "perf_counter", Clock(128 * each))
    found = automatic.automatic(Model(Attention()), Words())
    assert found.metadata["tokens"] == tokens and found.metadata["length"] == tokens


def test_windows_do_not_depend_on_the_machine(kept, monkeypatch):
    monkeypatch.setattr(automatic, "SAMPLE_TOKENS", 1100)
    model, lines, found = Model(Attention()), [], []
    for each in (0.001, 0.049):
        monkeypatch.setattr(automatic.time, "perf_counter", Clock(128 * each))
        found.append(automatic.automatic(model, Words(), lines.append))
        next(kept.iterdir()).unlink()
    assert found[0].digest == found[1].digest and found[0].metadata["length"] == 1024
    assert lines[-1] == "reading 1100 tokens, about 54 s; Ctrl-C goes on with the first 128"


def test_of_two_processes_the_first_ones_calibration_is_kept(kept, monkeypatch):
    """The other one, which read less, uses it as well, as the next process will."""
    model, original = Model(Attention()), automatic.calibrate_tokens
    clock, first = Clock(0.1), []

    def overtaken(model, windows, **options):
        monkeypatch.setattr(automatic, "calibrate_tokens", original)
        first.append(automatic.automatic(model, Words()))
        clock.step = 1e3
        return original(model, windows, **options)

    monkeypatch.setattr(automatic, "calibrate_tokens", overtaken)
    monkeypatch.setattr(automatic.time, "perf_counter", clock)
    other = automatic.automatic(model, Words())
    assert other.metadata["tokens"] == 256
    assert other.digest == first[0].digest == automatic.automatic(model, Words()).digest


def test_ctrl_c_goes_on_with_what_was_read(kept, monkeypatch, capsys):
    calls = []
    original = automatic.calibrate_tokens

    def interrupted(model, windows, **options):
        calls.append(sum(w.size for w in windows))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(model, windows, **options)

    monkeypatch.setattr(automatic, "calibrate_tokens", interrupted)
    report = mlx_kvq.enable(Model(Attention()), "int4-srft", tokenizer=Words())
    assert calls == [128, 256] and report.calibration.metadata["tokens"] == 128
    assert "interrupted: going on with what the first 128 tokens gave" in capsys.readouterr().err
    assert not kept.exists()


@pytest.mark.parametrize("shift, bearable", [(0.0, True), (200.0, False)])
def test_ctrl_c_at_once_goes_on_uncalibrated_if_the_model_can(
    shift, bearable, kept, monkeypatch, capsys
):
    """``shift`` is a constant in all channels of the keys, as in Qwen2.5."""

    def interrupted(model, windows, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(automatic, "calibrate_tokens", interrupted)
    model = Model(Attention(shift=shift))
    gain = automatic.worst_gain(model, automatic.random_tokens(model)[:16])
    assert (gain < 10) if bearable else (gain > 1e3)
    if bearable:
        assert mlx_kvq.enable(model, "int4-srft", tokenizer=Words()).calibration is None
    else:
        with pytest.raises(KeyboardInterrupt):
            mlx_kvq.enable(model, "int4-srft", tokenizer=Words())
    said = "going on uncalibrated" if bearable else "this model cannot do without"
    assert f"interrupted: {said}, a logit's error is" in capsys.readouterr().err
    assert not kept.exists()


def test_the_folder_does_not_grow_for_ever(kept, monkeypatch):
    model = Model(Attention())
    automatic.automatic(model, Words())
    (file,) = kept.iterdir()
    size = file.stat().st_size
    for n, name in enumerate("xyz"):
        (kept / f"{name}-sample.safetensors").write_bytes(b"0" * size)
        os.utime(kept / f"{name}-sample.safetensors", (n, n))
    automatic.automatic(model, Words())  # is used, so it stays
    monkeypatch.setattr(automatic, "LARGEST_FOLDER", 3 * size)
    other = Model(Attention())
    other.embed.weight = other.embed.weight + 1
    automatic.automatic(other, Words())
    names = {p.name[0] for p in kept.iterdir()} & set("xyz")
    assert len(list(kept.iterdir())) == 3 and names == {"z"}
    assert files.prune(kept, 0) and not list(kept.iterdir())


def test_other_files_in_the_folder_are_left_alone(kept):
    kept.mkdir()
    (kept / "mine.txt").write_text("x")
    assert files.prune(kept, 0) == [] and Path(kept, "mine.txt").exists()
