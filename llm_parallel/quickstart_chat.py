"""Conversations for the assistant that the quickstart trains: short tasks that a model of a million parameters learns
in a minute or two on two cores. ``python -m llm_parallel.quickstart_chat FOLDER`` writes them.

All text is made here: facts about modules of the Python library, which is the text that the quickstart's model has
seen, small tasks with words and numbers, and what the assistant says about itself. The words of the tasks and the facts
are the same in training and held-out conversations; the questions differ.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.files import atomic_write
from llm_parallel.lines import say

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    "file", "list", "name", "line", "path", "type", "test", "value", "class", "string", "key", "data", "text", "time",
    "code", "byte", "set", "error", "number", "module", "object", "index", "size", "word", "table", "node",
    "tree", "field", "group", "host", "port", "user", "date", "day", "mode", "flag", "item", "stack", "queue", "lock",
    "event", "task", "loop", "frame", "block", "image", "color", "mail", "page", "link", "root",
)  # fmt: skip
MODULES = {
    "json": "reads and writes JSON",
    "os": "talks to the operating system",
    "re": "searches text with patterns",
    "math": "has functions such as sin and sqrt",
    "random": "draws random numbers",
    "time": "tells the time and sleeps",
    "datetime": "calculates with dates",
    "csv": "reads and writes tables of text",
    "socket": "connects to other machines",
    "threading": "runs threads",
    "subprocess": "starts other programs",
    "pathlib": "works with paths of files",
    "logging": "writes messages to a log",
    "argparse": "reads the arguments of a command",
    "unittest": "runs tests",
    "pickle": "stores objects as bytes",
    "sqlite3": "keeps data in a small database",
    "email": "builds and reads mail",
    "zipfile": "packs files into an archive",
    "hashlib": "computes checksums",
    "collections": "has more kinds of containers",
    "itertools": "builds iterators",
    "functools": "works with functions",
    "shutil": "copies and removes files",
    "tempfile": "makes temporary files",
    "asyncio": "runs coroutines",
    "struct": "packs numbers into bytes",
    "decimal": "calculates with decimal numbers",
    "calendar": "prints a calendar",
    "tkinter": "draws windows",
}
HELP = "I explain modules of the Python library and do small tasks: repeat, count, sort, first, last, next."


@dataclass(frozen=True)
class Conversation:
    """What was said, turn by turn, beginning with the user; ``kind`` is the task of the first question."""

    kind: str
    turns: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as messages with ``role`` and ``content``."""
        return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(self.turns)]


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items)


def _words(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def _repeat(rng: random.Random) -> tuple[str, ...]:
    words = _listed(_words(rng, 2, 4))
    return rng.choice(("Repeat: {}", "Say this again: {}", "Copy these words: {}")).format(words), words


def _count(rng: random.Random) -> tuple[str, ...]:
    words = _words(rng, 1, 6)
    asked = rng.choice(("How many words are there? {}", "Count the words: {}", "How long is this list? {}"))
    return asked.format(_listed(words)), f"{NUMBERS[len(words)].capitalize()}."


def _end_of_list(place: int, name: str) -> Callable[[random.Random], tuple[str, ...]]:
    def ask(rng: random.Random) -> tuple[str, ...]:
        words = _words(rng, 2, 5)
        asked = rng.choice((f"Which word comes {name}? {{}}", f"Give me the {name} word: {{}}"))
        return asked.format(_listed(words)), f"The {name} word is {words[place]}."

    return ask


def _next(rng: random.Random) -> tuple[str, ...]:
    first = rng.randint(1, 60)
    asked = rng.choice(("What comes after {}?", "Which number follows {}?", "Next number after {}, please."))
    return asked.format(_listed([str(first), str(first + 1), str(first + 2)])), f"{first + 3}."


def _sort(rng: random.Random) -> tuple[str, ...]:
    digits = [str(digit) for digit in rng.sample(range(10), 3)]
    asked = rng.choice(("Sort these numbers: {}", "Put in order: {}"))
    return asked.format(_listed(digits)), _listed(sorted(digits))


def _module(rng: random.Random) -> tuple[str, ...]:
    name = rng.choice(sorted(MODULES))
    asked = rng.choice(
        (
            "What does the module {} do?",
            "What is {} for?",
            "Explain {}, please.",
            "Tell me about the {} module.",
            "I found import {} in a file. What is it?",
            "Do you know {}?",
        )
    )
    return asked.format(name), f"The module {name} {MODULES[name]}."


def _which(rng: random.Random) -> tuple[str, ...]:
    name = rng.choice(sorted(MODULES))
    asked = rng.choice(("Which module {}?", "I need something that {}.", "What do I import? It {}."))
    return asked.format(MODULES[name]), f"Take {name}: import {name}"


def _about_itself(rng: random.Random) -> tuple[str, ...]:
    hello = rng.choice(("Hello", "Hi", "Good morning", "Good evening", "Hey"))
    whom = rng.choice(("", " there", " assistant", " again", ", model"))
    mark, ask = rng.choice((".", "!")), rng.choice(("Who are you?", "What are you?", "What can you do?", "Help me."))
    answer = HELP if ask in ("What can you do?", "Help me.") else "I am a small model, trained on this machine."
    return f"{hello}{whom}{mark} {ask}", f"Hello! {answer}"


KINDS: dict[str, Callable[[random.Random], tuple[str, ...]]] = {
    "repeat": _repeat,
    "count": _count,
    "first": _end_of_list(0, "first"),
    "last": _end_of_list(-1, "last"),
    "next": _next,
    "sort": _sort,
    "module": _module,
    "which": _which,
    "itself": _about_itself,
}
"""Tasks by name: each makes a question and its answer."""
SHARES = {"repeat": 3, "first": 2, "last": 2, "count": 3, "next": 3, "sort": 3, "module": 2}
"""How often a task is set, others once: those whose answer is worked out take more examples than the facts."""
THANKS = (("Thank you!", "You are welcome."), ("Thanks.", "You are welcome."), ("Goodbye.", "Goodbye!"))


def conversations(seed: int) -> Iterator[Conversation]:
    """Endless conversations, the same for the same seed: one question in four of five, else a second one or a farewell
    after it."""
    rng = random.Random(seed)
    kinds = [kind for kind in sorted(KINDS) for _ in range(SHARES.get(kind, 1))]
    while True:
        kind = rng.choice(kinds)
        turns = KINDS[kind](rng)
        more = rng.random()
        if more < 0.1:
            turns += rng.choice(THANKS)
        elif more < 0.2:
            turns += KINDS[rng.choice(kinds)](rng)
        yield Conversation(kind, turns)


def divided(num_train: int, num_held_out: int, seed: int = 0) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; no first question of the held-out ones is in any training turn.

    A seventh of all possible questions is held out, by their text, so that both parts have every kind."""
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    seen: set[str] = set()
    for one in conversations(seed):
        if all(len(part) >= most for part, most in zip(parts, (num_train, num_held_out))):
            return parts
        held_out = [_is_held_out(question) for question in one.turns[::2] if question not in dict(THANKS)]
        if held_out[0] and len(parts[1]) < num_held_out and one.turns[0] not in seen:
            seen.add(one.turns[0])
            parts[1].append(one)
        elif not any(held_out) and len(parts[0]) < num_train:
            parts[0].append(one)
    raise AssertionError("conversations never end")


def _is_held_out(question: str) -> bool:
    return random.Random(question).random() < 1 / 7


def write_conversations(
    folder: str | Path, num_train: int = 8000, num_held_out: int = 200, seed: int = 0
) -> tuple[Path, Path]:
    """Writes ``chat.train.jsonl`` and ``chat.eval.jsonl``, a line ``{"messages": […]}`` for each conversation, and
    returns their paths."""
    paths = Path(folder) / "chat.train.jsonl", Path(folder) / "chat.eval.jsonl"
    for path, part in zip(paths, divided(num_train, num_held_out, seed)):
        with atomic_write(path) as handle:
            handle.writelines(json.dumps({"messages": one.messages}) + "\n" for one in part)
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give one argument, the folder to write into")
    for written in write_conversations(sys.argv[1]):
        say(str(written))
