"""``llm-parallel serve``."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from llm_launch.local import launch_local
from llm_parallel.errors import UserError
from llm_parallel.generate.engine import Generator, GeneratorOptions
from llm_parallel.generate.load import Member
from llm_parallel.lines import note, say
from llm_parallel.options import to_json
from llm_parallel.parallel.groups import close_groups
from llm_parallel.serve.answers import Service
from llm_parallel.serve.driver import Driver
from llm_parallel.serve.followers import Control, follow
from llm_parallel.serve.guard import LOOPBACK_NAMES, Access, State, digests
from llm_parallel.serve.listen import is_loopback, listen, written_address
from llm_parallel.serve.models import Limits, Names, Served
from llm_parallel.serve.open import OpenedModel, newer_checkpoint, open_model
from llm_parallel.serve.request import ServeRequest

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve_command(request: ServeRequest, keys_of_environment: str = "") -> int:
    """Serves until it is asked to end; returns the exit status. Raises UserError."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}, which is not installed; pip install 'llm-parallel[serve]'")
    keys = read_keys(request.api_key_file, keys_of_environment)
    if request.num_processes == 1:
        return serve_here(request, keys, Member())
    logs = request.logs or Path(tempfile.mkdtemp(prefix="llm-parallel-serve-"))
    note(f"[{request.num_processes} processes; their logs are in {logs}]")
    content = to_json(replace(request, logs=logs))
    status = launch_local(request.num_processes, ["-m", "llm_parallel.serve", content], logs)
    if status == 0 and request.logs is None:
        shutil.rmtree(logs, ignore_errors=True)
    return status


def serve_here(request: ServeRequest, keys: Sequence[str], member: Member) -> int:
    """One process of a server: rank 0 speaks HTTP, the others follow it. Returns the exit status. Raises UserError."""
    if member.rank > 0:
        opened = open_model(request, member.rank, member.local_rank)
        control = Control(opened.loaded.network.groups)
        follow(control, _generator(request, opened), opened.load)
        return 0
    listener = listen(request.host, request.port)
    try:
        opened = open_model(request)
        try:
            return _serve(request, opened, keys, listener)
        finally:
            close_groups()
    finally:
        listener.close()


def _generator(request: ServeRequest, opened: OpenedModel) -> Generator:
    options = GeneratorOptions(
        max_running=request.max_running, pass_tokens=request.pass_tokens, cache_tokens=request.cache_tokens
    )
    return Generator(opened.loaded.network, options, opened.tokenizer, bank=opened.loaded.bank)


def read_keys(path: Path | None, environment: str) -> list[str]:
    """The keys of a file and of the environment. Raises UserError for a file that cannot be read or holds none."""
    found = [key.strip() for key in environment.split(",") if key.strip()]
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(
                f"--api-key-file {path} cannot be read: {reason}; give a file with a key on each line"
            ) from None
        in_file = [line for line in lines if line and not line.startswith("#")]
        if not in_file:
            raise UserError(f"--api-key-file {path} holds no key; write one on each line")
        found += in_file
    return found


def access_of(request: ServeRequest, keys: Sequence[str]) -> Access:
    """Who may ask. Says it if everyone on the network may."""
    if not is_loopback(request.host) and not keys:
        note(f"warning: --host {request.host} lets other machines in, and no key is asked for; give --api-key-file")
    hosts = (*LOOPBACK_NAMES, request.host) if is_loopback(request.host) else None
    return Access(digests(keys), hosts, tuple(request.allow_origin), own_user=hosts is not None and not keys)


def _serve(request: ServeRequest, opened: OpenedModel, keys: Sequence[str], listener: socket.socket) -> int:
    from llm_parallel.serve.app import AppOptions, build_app
    from llm_parallel.serve.metrics import Metrics
    from llm_parallel.serve.server import Server

    loaded = opened.loaded
    control = Control(loaded.network.groups)
    generator = _generator(request, opened)
    cache = generator.limits.num_pages * generator.limits.page_tokens
    context = min(loaded.config.model.max_seq_length_tokens, cache)
    assert loaded.config.model.vocab_size is not None
    limits = Limits(context, loaded.config.model.vocab_size)
    name = request.name or model_name(request.checkpoint)
    served = Served(opened, limits, {name: None, **{adapter: adapter for adapter in request.adapters()}})
    driver = Driver(generator, control, Metrics(), request.max_queue, opened.load)
    state = State()
    service = Service(served, driver, Names(opened.tokenizer))
    app_options = AppOptions(access_of(request, keys), int(request.max_request_mb * (1 << 20)), request.log_requests)
    app = build_app(service, app_options, state)
    address = listener.getsockname()
    server = Server(app, request.host, address[1], driver, state, request.finish_s)
    if request.reload_s is not None:
        if opened.folder is None:
            raise UserError(f"--reload-s is given, and {request.checkpoint} holds no checkpoints; leave it out")
        server.watch = partial(watch_run, request.checkpoint, opened.folder, request.reload_s, driver)
    listener.listen(1024)
    say(f"{name} is served at http://{written_address(listener)}/v1 ({context} tokens of context)")
    server.run(sockets=[listener])
    driver.stop()
    driver.join(30.0)
    return 1 if driver.failure is not None else 0


async def watch_run(path: str, loaded: Path, every_s: float, driver: Driver) -> None:
    """Takes up a run's checkpoints as they appear."""
    while True:
        await asyncio.sleep(every_s)
        newest = await asyncio.to_thread(newer_checkpoint, path, loaded)
        if newest is not None:
            loaded = newest
            driver.load(str(newest))


def model_name(checkpoint: str) -> str:
    """The name of a model by its folder: that of the run for a checkpoint in it."""
    path = Path(checkpoint).absolute()
    while path.name == "checkpoints" or path.name.startswith("iter_"):
        path = path.parent
    return path.name or "model"
