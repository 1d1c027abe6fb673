"""Requests as the openai client and Open WebUI send them, to any server of that interface.

    python client.py http://127.0.0.1:8080/v1 [MODEL]

Runs where ``openai`` is installed (``try_host.py`` sees to that). One line a check, then JSON.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

PROMPTS = [
    "They walked along the river and",
    "Write one sentence about a small harbour town.",
    "It was a bright cold day when the letter came, and she read it twice before",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    },
}
TOKENS = 24


class Client:
    """The requests; each method is a check and returns what it saw, or raises."""

    def __init__(self, address: str, model: str | None):
        self.openai = OpenAI(base_url=address, api_key="none", timeout=300, max_retries=0)
        self.model = model or ""

    def ask(self, messages: list[dict], **options: Any) -> str:
        """A streamed answer, as chat programs read it."""
        options = {"max_tokens": TOKENS, "temperature": 0.0, "stream": True} | options
        made: Any = self.openai.chat.completions.create(
            model=self.model,
            messages=messages,
            **options,
        )
        if not options["stream"]:
            return made.choices[0].message.content or ""
        pieces = [c.delta.content or "" for part in made for c in part.choices]
        return "".join(pieces)

    def alone(self, prompt: str, **options: Any) -> str:
        return self.ask([{"role": "user", "content": prompt}], **options)

    def models(self) -> str:
        names = [m.id for m in self.openai.models.list().data]
        self.model = self.model or names[0]
        return f"{len(names)} listed"

    def three_at_once(self) -> str:
        with ThreadPoolExecutor(3) as pool:
            self.texts = list(pool.map(self.alone, PROMPTS))
        assert all(self.texts), f"an empty answer among {self.texts}"
        again = [self.alone(p) for p in PROMPTS]
        same = sum(a == b for a, b in zip(self.texts, again, strict=True))
        return f"{same} of 3 texts as alone"

    def follow_up(self) -> str:
        talk = [
            {"role": "user", "content": PROMPTS[0]},
            {"role": "assistant", "content": self.texts[0]},
            {"role": "user", "content": "And then?"},
        ]
        first, second = self.ask(talk), self.ask(talk)
        assert first, "an empty answer"
        return "the same text twice" if first == second else "another text the second time"

    def shared_beginning(self) -> str:
        """Prompts that part from a known one near the end, a short one and one of some hundred
        tokens, and the same ones when all of them is known."""
        same = 0
        for begin in (PROMPTS[2], " ".join(PROMPTS * 20)):
            self.alone(f"{begin}, and she laughed")
            asked = [self.alone(f"{begin}, but he went home") for _ in range(2)]
            assert all(asked), f"an empty answer among {asked}"
            same += asked[0] == asked[1]
        return f"{same} of 2 texts as when asked again"

    def eight_at_once(self) -> str:
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(self.alone, [f"{i}. {PROMPTS[i % 3]}" for i in range(8)]))
        assert all(texts), f"{texts.count('')} empty answers"
        return "8 answers"

    def stop_words(self) -> str:
        text = self.texts[0].strip()
        word = text[len(text) // 2 :][:3]
        cut = self.alone(PROMPTS[0], stop=[word])
        assert word not in cut, f"{word!r} is still in {cut!r}"
        return f"ends before {word!r}"

    def tools(self) -> str:
        self.alone("What is the weather in Rome?", tools=[TOOL], tool_choice="auto")
        return "taken"

    def title(self) -> str:
        """Open WebUI asks for a title of each conversation, whole and without ``max_tokens``."""
        options = {"stream": False, "max_completion_tokens": TOKENS}
        task = f"### Task:\nGenerate a concise title.\n### Chat History:\nUSER: {PROMPTS[0]}"
        assert self.alone(task, **options, max_tokens=TOKENS), "an empty answer"
        return "taken"


CHECKS = (
    "models",
    "three_at_once",
    "follow_up",
    "shared_beginning",
    "eight_at_once",
    "stop_words",
    "tools",
    "title",
)


def main(address: str, model: str | None = None) -> None:
    client, found = Client(address, model), {}
    for name in CHECKS:
        check: Callable[[], str] = getattr(client, name)
        try:
            found[name] = f"pass: {check()}"
        except Exception as error:
            found[name] = "missing: " + " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"{name:16} {found[name]}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
