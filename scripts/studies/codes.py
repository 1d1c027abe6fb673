"""Texts with codes in them, for recall at any length of context."""

import re
from dataclasses import dataclass

from mlx_kvq.measure.evaluate import read_recall

CODES = 8  # in one text
FACT = re.compile(r"The pass key of (\w+) is (\d+)\.")
SAID = "\nThe pass key of {} is {}.\n"
QUESTION = "\nAs stated, the pass key of {} is"


@dataclass
class Codes:
    """A text with codes in it, and what is asked about it."""

    ids: list[int]
    questions: list[tuple[str, str]]  # what is asked, what is to be written


def facts_of(path: str) -> list[tuple[str, str]]:
    """(name, code) of a file of prompts as ``mlx_kvq evaluate --recall`` takes, each name once.
    Raises ValueError if there are too few."""
    found = {n: c for item in read_recall(path) for n, c in FACT.findall(item["prompt"])}
    if len(found) < CODES:
        raise ValueError(f"{path} holds {len(found)} codes ({FACT.pattern}), {CODES} are needed.")
    return list(found.items())


def codes_of(
    tokenizer, facts: list[tuple[str, str]], texts: dict[str, list[int]], n: int, tokens: int
) -> list[Codes]:
    """``n`` texts of ``tokens`` tokens, each with ``CODES`` codes, one in the middle of each of as
    many parts. Raises ValueError if a text is too short."""
    found, names = [], list(texts)
    for i in range(n):
        some = [facts[(i * CODES + j) % len(facts)] for j in range(CODES)]
        said = [tokenizer.encode(SAID.format(*f), add_special_tokens=False) for f in some]
        name, around = names[i % len(names)], tokens - sum(map(len, said))
        ids = texts[name]
        if not CODES <= around <= len(ids):
            raise ValueError(
                f"{name} has {len(ids)} tokens: no text of {tokens} with {CODES} codes."
            )
        start = (i // len(names)) * around % (len(ids) - around + 1)
        cuts = [start + (2 * j + 1) * around // (2 * CODES) for j in range(CODES)]
        whole = ids[start : cuts[0]]
        for fact, a, b in zip(said, cuts, [*cuts[1:], start + around], strict=True):
            whole = whole + fact + ids[a:b]
        found.append(Codes(whole, [(QUESTION.format(name), code) for name, code in some]))
    return found
