"""The routes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from llm_parallel.lines import note
from llm_parallel.serve.answers import Service
from llm_parallel.serve.chat import chat_completion
from llm_parallel.serve.completions import completion
from llm_parallel.serve.embeddings import embeddings
from llm_parallel.serve.errors import ApiError
from llm_parallel.serve.fields import Fields, parse_body
from llm_parallel.serve.guard import Access, Guard, State
from llm_parallel.serve.page import page, page_headers
from llm_parallel.serve.responses import response
from llm_parallel.serve.stream import ClientGone
from llm_parallel.serve.wanted import WITHOUT_EFFECT

BODY_S = 60.0
"""Time that a client has to send the body of its request."""
THREADS = 4
DRAINED = 4
"""A body that is too long is read on up to so many times the limit, so that the client sees the error and not a
connection that breaks."""
IGNORED_HEADER = "x-llm-parallel-ignored"
Route = Callable[[HttpRequest, Fields, Service, dict[str, str]], Awaitable[Response]]
ROUTES: dict[str, Route] = {
    "/v1/chat/completions": chat_completion,
    "/v1/completions": completion,
    "/v1/responses": response,
    "/v1/embeddings": embeddings,
}


@dataclass(frozen=True)
class AppOptions:
    """access: who may ask; max_body_bytes: of one request; log: whether each request is logged, without its content."""

    access: Access
    max_body_bytes: int
    log: bool


def build_app(service: Service, options: AppOptions, state: State) -> ASGIApp:
    """The application, which starts the generator's thread when it starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Templates and tokenizers run there. As many threads as asyncio makes by itself would only take memory.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "text"))
        service.driver.start()
        yield

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(HTTPException, _http_error)
    for path, route in ROUTES.items():
        app.add_api_route(path, _endpoint(route, service, options, state), methods=["POST"], response_model=None)
    _add_simple_routes(app, service)
    if options.access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=[IGNORED_HEADER],
        )
    return Guard(app, options.access, state, service.driver.metrics, options.log)


def _add_simple_routes(app: FastAPI, service: Service) -> None:
    served, driver = service.served, service.driver

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.describe(name) for name in served.names]}

    async def model(name: str) -> dict[str, Any]:
        served.adapter(name)
        return served.describe(name)

    async def health() -> Response:
        if driver.failure is not None:
            raise ApiError(503, "the generator has failed; the server is ending")
        return JSONResponse({"status": "ok", "model": served.names[0]})

    async def metrics() -> Response:
        content, kind = driver.metrics.page()
        return Response(content, media_type=kind)

    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)

    async def root() -> Response:
        return HTMLResponse(page(), headers=page_headers())

    app.add_api_route("/", root, methods=["GET"], response_model=None)


def _endpoint(route: Route, service: Service, options: AppOptions, state: State) -> Callable[[HttpRequest], Any]:
    async def answer(http: HttpRequest) -> Response:
        fields = Fields(parse_body(await _read_body(http, options.max_body_bytes)))
        headers: dict[str, str] = {}
        made = await route(http, fields, service, headers)
        ignored = sorted(map(_printable, fields.unknown(WITHOUT_EFFECT)))
        if ignored:
            made.headers[IGNORED_HEADER] = ", ".join(ignored)[:1000]
            _say_once(ignored, state)
        return made

    # Annotations of this module are texts, and FastAPI would look for them in another scope.
    answer.__annotations__ = {"http": HttpRequest, "return": Response}
    return answer


def _printable(name: str) -> str:
    """A field's name, which a client chose, as it may stand in a header and in a log."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name)[:64]


def _say_once(names: list[str], state: State) -> None:
    fresh = [name for name in names if name not in state.said]
    if fresh and len(state.said) < 100:
        state.said.update(fresh)
        note(f"[fields of requests that are ignored: {', '.join(fresh)}]")


async def _read_body(http: HttpRequest, most: int) -> bytes:
    """The body of a request. Raises ApiError if it is too long or does not come."""
    try:
        return await asyncio.wait_for(_read_within(http, most), BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body of the request did not come within {BODY_S:.0f} s") from None
    except ClientDisconnect:
        raise ClientGone from None


async def _read_within(http: HttpRequest, most: int) -> bytes:
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > DRAINED * most:
            break
    if size > most:
        told = http.headers.get("content-length", f"over {most}")
        raise ApiError(413, f"the body of the request has {told[:20]} bytes, and the server takes {most}; send less")
    return b"".join(parts)


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _gone(_: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = http.url.path[:80]
    messages = {
        404: f"there is no {_printable_path(path)} here; the server has {', '.join(ROUTES)} and /v1/models",
        405: f"{http.method[:10]} is not answered at {_printable_path(path)}; use another method",
    }
    told = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
    return JSONResponse(told.body(), told.status, dict(error.headers or {}))


def _printable_path(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_./-]", "?", path)
