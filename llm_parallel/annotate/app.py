"""What the page asks the server: the next item, judgements, skips and their undoing, progress and agreement.

All of it runs on one event loop, so that nothing is handed out twice at once; a judgement is on the disk before the
page hears of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llm_parallel.annotate.agreement import agreement, units_of
from llm_parallel.annotate.board import Board, Task, annotator_name
from llm_parallel.annotate.items import text_of
from llm_parallel.annotate.page import annotation_page
from llm_parallel.annotate.request import MODES
from llm_parallel.errors import UserError
from llm_parallel.serve.errors import ApiError, wrong
from llm_parallel.serve.fields import parse_body
from llm_parallel.serve.guard import Access

MOST_BYTES = 1 << 16
"""Of a request's body."""
Action = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Desk:
    """The actions of the page. title: what is annotated."""

    board: Board
    title: str

    def start(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the page needs to know once."""
        mode = self.board.options.mode
        return {"title": self.title, "mode": mode, "asked": MODES[mode], **self.next(name, body)}

    def next(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The item to judge now, if there is one, and the progress."""
        task = self.board.next(name, again=body.get("again") is True)
        return {"task": None if task is None else self._shown(name, task), "progress": self.board.progress(name)}

    def judge(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Takes a judgement; answers with the next item."""
        ranks, seconds = body.get("ranks"), body.get("seconds")
        if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
            raise wrong("ranks must be a list of whole numbers, one for each answer in the order in which it is shown")
        took = round(seconds, 1) if isinstance(seconds, (int, float)) and math.isfinite(seconds) else None
        self.board.judge(name, str(body.get("task")), ranks, took)
        return self.next(name, body)

    def skip(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leaves an item to others; answers with the next one."""
        self.board.skip(name, str(body.get("task")))
        return self.next(name, {})

    def undo(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Takes the last judgement or skip back; answers with its item."""
        undone = self.board.undo(name) is not None
        return {"undone": undone, **self.next(name, body)}

    def hold(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keeps an item that is still looked at from others."""
        self.board.hold(name, str(body.get("task")))
        return {}

    def agreement(self, name: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """How far all annotators agree."""
        judged = self.board.judgements()
        found = agreement(units_of(self.board.tasks, judged, self.board.options.mode))
        people: dict[str, int] = {}
        for one in judged:
            people[one.annotator] = people.get(one.annotator, 0) + (one.ranks is not None)
        kappas = [[*names, _number(kappa), count] for names, (kappa, count) in found.kappa.items()]
        return {
            "units": found.units,
            "raw": _number(found.raw),
            "alpha": _number(found.alpha),
            "kappas": kappas,
            "people": people,
            "progress": self.board.progress(name),
        }

    def _shown(self, name: str, task: Task) -> Mapping[str, Any]:
        """A task as the page shows it: nothing in it says what wrote which answer."""
        answers = [text_of(task.item.answers[task.answers[place]]) for place in self.board.order(name, task)]
        prompt = [{"role": one["role"], "text": text_of(({**one, "role": "assistant"},))} for one in task.item.prompt]
        return {"id": task.id, "prompt": prompt, "answers": answers}


ACTIONS = ("start", "next", "judge", "skip", "undo", "hold", "agreement")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def build_app(desk: Desk, access: Access) -> ASGIApp:
    """The application. ``access``: who may ask."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, UserError, HTTPException):
        app.add_exception_handler(kind, _told)
    for name in ACTIONS:
        route = _endpoint(getattr(desk, name))
        app.add_api_route(f"/api/{name}", route, methods=["POST"], response_model=None)

    async def root() -> Response:
        text, headers = annotation_page()
        return HTMLResponse(text, headers=dict(headers))

    app.add_api_route("/", root, methods=["GET"], response_model=None)
    return _Door(app, access)


def _endpoint(action: Action) -> Callable[[HttpRequest], Any]:
    async def answer(http: HttpRequest) -> Response:
        body = parse_body(await _read(http))
        made = action(annotator_name(body.get("annotator")), body)
        return JSONResponse(dict(made), headers={"cache-control": "no-store"})

    answer.__annotations__ = {"http": HttpRequest, "return": Response}
    return answer


async def _read(http: HttpRequest) -> bytes:
    # A page of another server can send a form or plain text without being asked first, but not this type.
    if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "the body must be sent as application/json")
    content = b""
    async for part in http.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise ApiError(413, f"the body has more than {MOST_BYTES} bytes")
    return content


async def _told(_: HttpRequest, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return JSONResponse(error.body(), error.status, error.headers())
    if isinstance(error, HTTPException):
        told = ApiError(error.status_code, "there is nothing here; open the address that the command has printed")
        return JSONResponse(told.body(), told.status)
    status = 507 if str(error).startswith("cannot write") else 400
    return JSONResponse(ApiError(status, str(error)).body(), status)


class _Door:
    """Lets in who may ask. The page itself holds nothing secret."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                headers = self._access.check_scope(scope)
                if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and scope["path"] != "/":
                    raise ApiError(403, "pages of other servers may not ask this one")
            except ApiError as error:
                answer = JSONResponse(error.body(), error.status, {**error.headers(), "connection": "close"})
                await answer(scope, receive, send)
                return
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        await self._app(scope, receive, send)
