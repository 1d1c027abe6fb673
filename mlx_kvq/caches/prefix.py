"""Prompts that begin alike: caches of earlier ones, in memory and in a folder that outlives them.

mlx-lm's ``LRUPromptCache`` finds the cached prompt that shares most with a new one, and the seam on
it (``prompts.fetching``) knows from where a packed cache goes on exactly. :class:`PrefixCache` puts
both behind three calls for one model. :class:`StoredPrompts` is an ``LRUPromptCache`` over a
:class:`Folder`, for ``mlx_lm.server --prompt-cache-dir``.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.models import cache as stock

from .. import arguments
from ..files import line, replacing, safetensors_header
from ..stock import Identity, leaves, packable
from . import seams
from .attention import BLOCK
from .packed import PackedCache

PREFIX = "mlx_kvq-"  # of the files' names; no other file of a folder is ever touched
TOKENS, MODEL, CACHES = "mlx_kvq_tokens", "mlx_kvq_model", "mlx_kvq_caches"  # in their metadata
LEAST = BLOCK  # tokens; a shorter prompt is read again sooner than its file
GB = 1 << 30


def kind_of(caches: list) -> str:
    """What caches must be alike in to go on with each other's tokens: classes, bounds, formats."""
    parts = []
    for path, c in leaves(caches):
        size = getattr(c, "max_size", ""), getattr(c, "keep", "")
        packed = c.format.signature if isinstance(c, PackedCache) else ""
        parts.append(f"{path} {type(c).__name__} {size} {packed}")
    return sha256("\n".join(parts).encode()).hexdigest()[:24]


@dataclass
class _File:
    """A prompt-cache file of a folder, known by its header."""

    path: Path
    tokens: np.ndarray  # int64 [n]
    model: str
    kind: str


class Folder:
    """Prompt-cache files of one model and kind of cache, the newest ``max_bytes`` of them.

    Files are written with mlx-lm's ``save_prompt_cache``, whole or not at all. Those of other
    models, of other caches, and damaged ones are left alone and not used; of what makes no room
    the least recently used go, but only files that this class has named.

    Args:
        path (path): Made if it is not there.
        max_bytes (int): All files together.
        say: Told, in one line, what cannot be used.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, path: str | Path, max_bytes: int, say: Callable[[str], None]):
        self.path, self.max_bytes, self.say = Path(path).expanduser(), max_bytes, say
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are private
        self.files = [f for p in sorted(self.path.glob(f"{PREFIX}*.safetensors")) if (f := _of(p))]
        self._told = False

    def longest(self, model: str, kind: str, tokens: Sequence[int]) -> tuple[int, _File | None]:
        """Tokens that a prompt shares with the file that shares most, and that file."""
        prompt, best, found = np.asarray(tokens), 0, None
        others = 0
        for file in self.files:
            if (file.model, file.kind) != (model, kind):
                others += 1
            elif (shared := _shared(prompt, file.tokens)) > best:
                best, found = shared, file
        if others and not self._told:
            self._told = True
            self.say(f"{others} files in '{self.path}' are of another model or cache: not used")
        return best, found

    def load(self, file: _File) -> list | None:
        """The caches of a file, or None if it is gone or cannot be used."""
        try:
            caches = stock.load_prompt_cache(str(file.path))
            if kind_of(caches) != file.kind:
                raise ValueError("its caches are not what its header says")
            os.utime(file.path)
            return caches
        except Exception as error:  # of a damaged file mlx-lm raises what it stumbles over
            self.files.remove(file)
            if not isinstance(error, FileNotFoundError):
                self.say(f"'{file.path.name}' is not used: {line(error)}")
            return None

    def save(self, model: str, kind: str, tokens: Sequence[int], caches: list) -> None:
        """Keep the caches of these tokens; files of a beginning of them go."""
        ids = np.asarray(tokens, dtype=np.int64)
        name = sha256(f"{model} {kind} ".encode() + ids.tobytes()).hexdigest()[:32]
        path = self.path / f"{PREFIX}{name}.safetensors"
        if path.exists():
            return
        said = {TOKENS: " ".join(map(str, ids.tolist())), MODEL: model, CACHES: kind}
        try:
            with replacing(path) as part:
                stock.save_prompt_cache(str(part), caches, said)
        except (OSError, RuntimeError, ValueError) as error:
            self.say(f"a prompt cache could not be kept in '{self.path}': {line(error)}")
            return
        if all(c.is_trimmable() for c in caches):
            for file in list(self.files):
                n = file.tokens.size
                same = (file.model, file.kind) == (model, kind) and n < ids.size
                if same and _shared(ids, file.tokens) == n:
                    self._delete(file)
        self.files.append(_File(path, ids, model, kind))
        self._prune()

    def _prune(self) -> None:
        sizes = {}
        for file in self.files:
            try:
                info = file.path.stat()
            except OSError:
                continue
            sizes[file.path] = info.st_mtime, info.st_size
        self.files = [f for f in self.files if f.path in sizes]
        held = sum(n for _, n in sizes.values())
        for file in sorted(self.files, key=lambda f: sizes[f.path][0]):
            if held <= self.max_bytes:
                return
            held -= sizes[file.path][1]
            self._delete(file)

    def _delete(self, file: _File) -> None:
        self.files.remove(file)
        file.path.unlink(missing_ok=True)


def _of(path: Path) -> _File | None:
    """A file by its header; None if it is not one of ours."""
    try:
        said, _ = safetensors_header(path)
        said = {key.removeprefix("0."): text for key, text in said.items()}
        ids = np.array(said[TOKENS].split(), dtype=np.int64)
        return _File(path, ids, said[MODEL], said[CACHES])
    except (OSError, ValueError, KeyError, OverflowError):
        return None


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens from the beginning that two prompts share."""
    n = min(a.size, b.size)
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


class StoredPrompts(stock.LRUPromptCache):
    """mlx-lm's ``LRUPromptCache`` over a folder.

    Args:
        folder (Folder): Where long prompts are kept.
        model: Called for the nn.Module that prompts belong to; None switches the folder off.
        options: Of ``LRUPromptCache``.
    """

    def __init__(self, folder: Folder, model: Callable[[], nn.Module | None], **options: int):
        super().__init__(**options)
        self.folder, self.model = folder, model
        self._known: tuple[nn.Module, Identity] | None = None

    def _names(self) -> tuple[str, str] | None:
        """Identity of the model, and kind of its caches."""
        model = self.model()
        if model is None:
            return None
        if self._known is None or self._known[0] is not model:
            self._known = model, Identity(model, packable(model)[1])
        return self._known[1](), kind_of(stock.make_prompt_cache(model))

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list | None, list[int]]:
        names = self._names() if len(tokens) > LEAST and _are_ids(tokens) else None
        if names is not None:
            here = self._trie.search(model, tokens)
            known = max(here.common_prefix, len(here.exact or here.shorter or ()))
            shared, file = self.folder.longest(*names, tokens)
            more = file is not None and shared > max(known, LEAST - 1)
            if file and more and (caches := self.folder.load(file)) is not None:
                super().insert_cache(model, file.tokens.tolist(), caches)
        return super().fetch_nearest_cache(model, tokens)

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list, *, cache_type: str = "assistant"
    ) -> None:
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        names = self._names() if len(tokens) >= LEAST and _are_ids(tokens) else None
        if names is not None and kind_of(prompt_cache) == names[1]:
            self.folder.save(*names, tokens, prompt_cache)


def _to_stderr(line: str) -> None:
    print(f"[mlx_kvq] {line}", file=sys.stderr, flush=True)


def _are_ids(tokens: Sequence) -> bool:
    """Whether these are all of a prompt; mlx-lm's server puts images among them."""
    return all(isinstance(token, int) for token in tokens)


class PrefixCache:
    """Reuse of what prompts have in common, for one model, enabled or not.

        prefixes = mlx_kvq.PrefixCache(model, folder="~/.cache/my-prompts")
        for response in prefixes.stream_generate(tokenizer, prompt, max_tokens=100):
            print(response.text, end="")

    or, around a loop of your own, :meth:`fetch` before it and :meth:`insert` after it. A packed
    cache goes on from where the text is the one without reuse (docs/mlx_lm.md).

    Args:
        model (nn.Module): From ``mlx_lm.load``. What it is enabled with when a prompt is fetched
            counts; caches of another kind are not offered.
        max_size (int): Prompts in memory, at least 1.
        max_bytes (int): Of their caches, and of the files.
        folder (path, optional): Keeps prompts of 512 tokens and more beyond this process.
        say (optional): Told, in one line, what of the folder cannot be used. Default: to stderr.

    Raises:
        ValueError: If an argument is not one.
        OSError: If the folder cannot be made.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_size: int = 10,
        max_bytes: int = 8 * GB,
        folder: str | Path | None = None,
        say: Callable[[str], None] | None = None,
    ):
        arguments.model(model)
        arguments.integer("max_size", max_size)
        arguments.integer("max_bytes", max_bytes)
        seams.install(model)
        self.model = model
        options = {"max_size": max_size, "max_bytes": max_bytes}
        self._kept: stock.LRUPromptCache = stock.LRUPromptCache(**options)
        if folder is not None:
            files = Folder(folder, max_bytes, say or _to_stderr)
            self._kept = StoredPrompts(files, lambda: model, **options)

    def fetch(self, tokens: Sequence[int]) -> tuple[list, list[int]]:
        """Caches that hold a beginning of a prompt, as long as is known, and the other tokens.

        Args:
            tokens (sequence of int): The whole prompt, at least one token.

        Returns:
            (list, list of int): The caller's own caches, empty if nothing is known, and the tokens
            that are to be fed with them, at least one.
        """
        tokens = [int(token) for token in tokens]
        if not tokens:
            raise ValueError("A prompt has at least one token, got none.")
        caches, rest = self._kept.fetch_nearest_cache(self._key(), tokens)
        if caches is not None and not rest:  # the last token's logits are not kept
            taken = stock.trim_prompt_cache(caches, 1)
            caches, rest = (caches, tokens[-1:]) if taken else (None, tokens)
        return stock.make_prompt_cache(self.model) if caches is None else caches, list(rest)

    def insert(self, tokens: Sequence[int], caches: list) -> None:
        """Keep caches, which hold exactly these tokens; the caller feeds them no more."""
        self._kept.insert_cache(self._key(), [int(token) for token in tokens], caches)

    def stream_generate(self, tokenizer: Any, prompt: Any, **options: Any) -> Iterator[Any]:
        """mlx-lm's ``stream_generate`` that reads only what is new of a prompt, and keeps what it
        read and generated.

        Args:
            tokenizer: Of the model.
            prompt (str or list of int): As for mlx-lm.
            options: As for mlx-lm.
        """
        from mlx_lm import stream_generate

        if "prompt_cache" in options or "draft_model" in options:
            raise ValueError("PrefixCache has the prompt cache itself, and takes no draft model.")
        tokens = prompt if not isinstance(prompt, str) else _encoded(tokenizer, prompt)
        tokens = [int(token) for token in tokens]
        caches, rest = self.fetch(tokens)
        try:
            for response in stream_generate(
                self.model, tokenizer, rest, prompt_cache=caches, **options
            ):
                tokens.append(response.token)
                yield response
        finally:
            held = max(_held(caches), default=0)
            if held and held <= len(tokens):
                self.insert(tokens[:held], caches)

    def _key(self) -> str:
        return kind_of(stock.make_prompt_cache(self.model))


def _held(caches: list) -> Iterator[int]:
    """Tokens that caches have read."""
    for _, c in leaves(caches):
        if isinstance(n := getattr(c, "offset", 0), int):
            yield n


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    """As mlx-lm's ``stream_generate`` does it."""
    begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer.encode(prompt, add_special_tokens=not begins)
