"""Windows of a text, for the studies."""

from pathlib import Path

import mlx.core as mx


def windows_of(tokenizer, path: str, n: int, tokens: int) -> mx.array:
    """The first ``n`` windows of a file, token ids [n, tokens]."""
    ids = tokenizer.encode(Path(path).read_text(encoding="utf-8")[: 16 * n * tokens])
    return mx.array(ids[: n * tokens]).reshape(n, tokens)
