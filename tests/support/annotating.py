"""The server of annotations on a thread of the test's process, and the records that it judges."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from llm_parallel.annotate.app import Desk, build_app
from llm_parallel.annotate.board import Board, BoardOptions, tasks_of
from llm_parallel.annotate.items import Item, read_items
from llm_parallel.jsonlines import JsonLines, read_jsonlines
from llm_parallel.serve.guard import LOOPBACK_NAMES, Access
from llm_parallel.serve.listen import listen


def write_answers(path: Path, prompts: int = 6, answers: int = 3) -> Path:
    """Prompts that differ, each with answers that say which place they have in the record."""
    lines = [
        {"prompt": f"Question {number}?", "responses": [f"answer {number}.{place}" for place in range(answers)],
         "models": [f"secret-{place}" for place in range(answers)]}
        for number in range(prompts)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def board_of(
    items: Sequence[Item], out: Path, options: BoardOptions, clock: Callable[[], float] = time.monotonic
) -> Board:
    """A board that goes on with what the file has."""
    log = JsonLines(out, sync=True)
    board = Board(tasks_of(items, options.mode)[0], options, log, clock)
    board.load(read_jsonlines(out))
    return board


@contextlib.contextmanager
def annotating(
    path: Path, out: Path, options: BoardOptions, token: str | None = None, port: int = 0
) -> Iterator[tuple[str, Board]]:
    """The address of a running server, and its board."""
    board = board_of(read_items(path), out, options)
    access = Access(() if token is None else (Access.digest(token),), LOOPBACK_NAMES)
    listener = listen("127.0.0.1", port)
    listener.listen(16)
    config = uvicorn.Config(build_app(Desk(board, path.name), access), log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", board
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def judged(out: Path) -> list[dict[str, Any]]:
    """The lines of a file of judgements."""
    return [json.loads(line) for line in out.read_text().splitlines()]
