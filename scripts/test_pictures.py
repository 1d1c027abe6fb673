"""Pictures and tables are those of the JSON in the repository."""

import re
from pathlib import Path

import pictures
import pytest


def test_every_picture_is_current():
    assert pictures.stale() == []


def test_a_change_is_found(tmp_path, monkeypatch):
    for name, (_, data) in pictures.PICTURES.items():
        (tmp_path / data).write_bytes((pictures.DATA / data).read_bytes() + b" ")
        assert pictures.stamped(pictures.IMAGES / name) == pictures.digest(data)
    (tmp_path / "old.png").write_bytes(b"")
    monkeypatch.setattr(pictures, "DATA", tmp_path)
    assert len(pictures.stale()) == len(pictures.PICTURES) >= 2
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    assert any("old.png is drawn by nothing" in line for line in pictures.stale())


@pytest.fixture(scope="module")
def models():
    return pictures.models()


def test_the_table_of_docs_memory(models):
    page = (pictures.ROOT / "docs" / "memory.md").read_text()
    assert pictures.with_table(page, pictures.fits_table()) == page


def test_the_table_of_readme(models):
    """`| Llama-3.1-8B | 16 GB | 39,168 | **129,792** | 4,864, **17,664** |`"""
    text = Path(pictures.ROOT, "README.md").read_text()
    found = 0
    for line in text.splitlines():
        cells = [re.sub(r"\*\*|\(.*?\)", "", c).strip() for c in line.strip("|").split("|")]
        if cells[0] not in models:
            continue
        model, memory, found = models[cells[0]], cells[1].replace(" ", ""), found + 1
        alone = [model.cell(c, memory).rstrip("*") for c in ("fp16", "int4-srft")]
        eight = [model.cell(c, memory, 8).rstrip("*") for c in ("fp16", "int4-srft")]
        assert cells[2:5] == [*alone, ", ".join(eight)], cells[0]
    assert found == len(models)
