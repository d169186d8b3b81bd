"""``llm-parallel annotate``: people judge answers on a page; their judgements become records to train on."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from llm_parallel.annotate.agreement import agreement, units_of
from llm_parallel.annotate.agreement import said as agreement_said
from llm_parallel.annotate.board import Board, BoardOptions, tasks_of
from llm_parallel.annotate.export import exported, verdicts, wins_of, write_files
from llm_parallel.annotate.export import said as export_said
from llm_parallel.annotate.items import Item, read_items
from llm_parallel.annotate.request import MODES, AnnotateRequest
from llm_parallel.data.chat_counts import some
from llm_parallel.errors import UserError
from llm_parallel.files import locked
from llm_parallel.jsonlines import JsonLines, read_jsonlines
from llm_parallel.lines import note, say
from llm_parallel.serve.guard import LOOPBACK_NAMES, Access
from llm_parallel.serve.listen import is_loopback, listen, written_address

NEEDED = ("fastapi", "uvicorn")


def annotate_command(request: AnnotateRequest) -> int:
    """Serves the page until it is asked to end, then writes the files for training; with ``export`` only these. Returns
    the exit status. Raises UserError."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"annotate needs {', '.join(missing)}, which is not installed; pip install 'llm-parallel[serve]'"
        )
    items = read_items(Path(request.file), request.prompts, note)
    out = request.records
    if request.export:
        if not out.is_file():
            raise UserError(
                f"{out} does not exist, so nothing was judged yet; give --out, or annotate without --export"
            )
        with _alone(out):
            _finish(request, items, _board(request, items, out))
        return 0
    listener = listen(request.host, request.port)
    try:
        with _alone(out):
            board = _board(request, items, out)
            _serve(request, board, listener)
            _finish(request, items, board)
    finally:
        listener.close()
    return 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds the file of judgements: two servers would hand out the same items, and one's would not know of the
    other's."""
    lock = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, f"another `llm-parallel annotate` writes {out}; end it, or give another --out"):
            yield
    except OSError as error:
        reason = "its folder is a file" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise UserError(f"{out} cannot be written ({reason}); give another --out") from None


def _board(request: AnnotateRequest, items: tuple[Item, ...], out: Path) -> Board:
    """The board with what was judged before. Raises UserError if nothing can be judged in this mode."""
    tasks, alone = tasks_of(items, request.mode)
    if alone:
        note(f"{request.file}: left out {some(alone, 'prompt')} with one answer, which has no other to compare with")
    if not tasks:
        raise UserError(f"{request.file} has no prompt with two different answers; --mode good-bad judges single ones")
    log = JsonLines(out, sync=True, remedy="make room there or give another --out")
    board = Board(
        tasks, BoardOptions(request.mode, request.overlap, request.lease_s, request.seed), log, time.monotonic
    )
    others = board.load(read_jsonlines(out))
    if others:
        note(f"{out}: {some(others, 'record')} of other items or of another mode, which stay there and do not count")
    return board


def _serve(request: AnnotateRequest, board: Board, listener: socket.socket) -> None:
    import uvicorn

    from llm_parallel.annotate.app import Desk, build_app
    from llm_parallel.annotate.server import AnnotationServer

    local = is_loopback(request.host)
    token = None if local else secrets.token_urlsafe(24)
    hosts = (*LOOPBACK_NAMES, request.host) if local else None
    access = Access(() if token is None else (Access.digest(token),), hosts, own_user=local)
    listener.listen(64)
    name = written_address(listener)
    if listener.getsockname()[0] in ("0.0.0.0", "::"):
        name = f"{socket.gethostname()}:{listener.getsockname()[1]}"
    address = f"http://{name}/" + (f"#token={token}" if token else "")
    done = len([one for one in board.judgements() if one.ranks is not None])
    say(
        f"{some(len(board.tasks), 'item')} of {request.file} to judge ({MODES[request.mode]}), {done:,} judgements "
        f"there already; they go to {request.records}"
    )
    say(f"open {address} and end with Ctrl-C")
    options = uvicorn.Config(
        build_app(Desk(board, Path(request.file).name), access),
        log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5, ws="none",
        proxy_headers=False,
    )  # fmt: skip
    AnnotationServer(options).run(sockets=[listener])


def _finish(request: AnnotateRequest, items: tuple[Item, ...], board: Board) -> None:
    """Says how far the annotators came and agree, and writes the files for training. Raises UserError."""
    judged, mode = board.judgements(), request.mode
    if not any(one.ranks is not None for one in judged):
        say(f"nothing is judged yet in {request.records}")
        return
    found = exported(items, board.tasks, judged, mode)
    try:
        files = write_files(found, request.records)
    except OSError as error:
        raise UserError(
            f"the files for training cannot be written beside {request.records} ({error.strerror}); make room there, "
            "and write them with --export"
        ) from None
    for text in (*export_said(found, len(items)), *agreement_said(agreement(units_of(board.tasks, judged, mode)))):
        say(text)
    for text in wins_of(verdicts(items, board.tasks, judged, mode)):
        say(text)
    for path in files:
        kind = path.suffixes[-2].removeprefix(".")
        say(f"{path}: {len(found.records[kind]):,} for {kind}")
