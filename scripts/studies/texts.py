"""Windows of a text, for the studies."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx


def windows_of(tokenizer, path: str, n: int, tokens: int) -> mx.array:
    """The first ``n`` windows of a file, token ids [n, tokens]."""
    ids = tokenizer.encode(Path(path).read_text(encoding="utf-8")[: 16 * n * tokens])
    return mx.array(ids[: n * tokens]).reshape(n, tokens)


@dataclass
class Document:
    text: str  # the name of the file
    ids: list[int]


def bos_of(tokenizer) -> list[int]:
    """What a sequence begins with: the BOS token, where the tokenizer adds one."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def documents_of(tokenizer, texts: dict[str, list[int]], n: int, tokens: int) -> list[Document]:
    """Up to ``n`` pieces of each text's tokens, as far apart as can be, ``tokens`` long each."""
    start = bos_of(tokenizer)
    size, found = tokens - len(start), []
    for name, ids in texts.items():
        fit = min(n, len(ids) // size)
        stride = len(ids) // fit if fit else 0
        found += [Document(name, start + ids[i * stride :][:size]) for i in range(fit)]
    return found
