"""Many clients at once against a real server: random requests, some cancelled, some malformed, and every second a
client process that is killed while it reads.

    python benchmarks/serve_soak.py [--clients 200] [--seconds 300] [--folder MODEL] [--out FILE.md]

Every answer must be complete or a clear error. Afterwards no page, answer, task, descriptor or thread may be left that
was not there before, and memory must have come to rest: its largest value in the last quarter of the time is at most 1
percent above that of the quarter before (asked of runs of two minutes and more; every size of pass must have come).
Without ``--folder``, the model is a random one of 0.02 M parameters, so that the server and not the model is what is
loaded. The exit status is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.malformed import CHAT, EMBED, MALFORMED, MESSAGES, RESPONSES, TEXT
from tests.support.served import running_server, served_folder

KILLED = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
body = b'{"prompt": "x", "max_tokens": 400, "ignore_eos": true, "stream": true, "n": 2}'
s.sendall(b"POST /v1/completions HTTP/1.1\\r\\nhost: localhost\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body) + body)
s.recv(100)
time.sleep(60)
"""
ANSWER_S = 120.0


@dataclass
class Seen:
    """What happened. broken: answers that were neither complete nor a clear error."""

    counts: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def some_request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A request that can be answered."""
    long = draw.choice((4, 16, 48))
    common: dict[str, Any] = {"stream": draw.random() < 0.6, "seed": draw.randrange(1000)}
    text = "".join(draw.choice("abcdefgh ") for _ in range(draw.choice((1, 20, 150))))
    kind = draw.random()
    if kind < 0.4:
        messages = [{"role": "user", "content": text}]
        return CHAT, {"messages": messages, "max_tokens": long, "n": draw.choice((1, 1, 3)), **common}
    if kind < 0.75:
        more: dict[str, Any] = {"stop": [text[:1], "qz"]} if draw.random() < 0.3 else {}
        return TEXT, {"prompt": text, "max_tokens": long, "ignore_eos": not more, **more, **common}
    if kind < 0.85:
        return TEXT, {"prompt": [text, "y"], "max_tokens": 1, "echo": True, "logprobs": 2}
    if kind < 0.95:
        return RESPONSES, {"input": MESSAGES, "max_output_tokens": long, **common}
    return EMBED, {"input": [text, "z"]}


class Client:
    """One client, which asks until the time is up."""

    def __init__(self, base: str, number: int, seen: Seen) -> None:
        at = urlsplit(base)
        self._host, self._port, self._seen = at.hostname, at.port, seen
        self._draw = random.Random(number)

    async def run(self, until: float) -> None:
        """Asks one request after the other."""
        while time.monotonic() < until:
            kind = self._draw.random()
            try:
                if kind < 0.1:
                    await asyncio.wait_for(self._malformed(), ANSWER_S)
                else:
                    await asyncio.wait_for(self._good(leaves=kind < 0.25), ANSWER_S)
            except Exception as error:
                self._seen.broken.append(f"{type(error).__name__}: {error}"[:200])
            await asyncio.sleep(self._draw.random() * 0.05)

    async def _malformed(self) -> None:
        path, body, status, _ = self._draw.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        got, _, answer = await self._whole(path, content)
        if got != status or "message" not in json.loads(answer)["error"]:
            self._seen.broken.append(f"malformed {path} {content[:60]!r}: {got}, not {status}")
        self._seen.counts["malformed requests refused"] += 1

    async def _good(self, leaves: bool) -> None:
        path, body = some_request(self._draw)
        content = json.dumps(body).encode()
        if leaves:
            await self._leave(path, content)
        elif body.get("stream"):
            await self._stream(path, content)
        else:
            status, head, answer = await self._whole(path, content)
            if status == 429:
                await self._come_back(head)
            elif status == 200 and json.loads(answer):
                self._seen.counts["whole answers"] += 1
            else:
                self._seen.broken.append(f"{path}: status {status}: {answer[:100]!r}")

    async def _open(self, path: str, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return reader, writer

    async def _whole(self, path: str, content: bytes) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await self._open(path, content)
        try:
            status, head = await _head(reader)
            return status, head, await _body(reader, head)
        finally:
            writer.close()

    async def _leave(self, path: str, content: bytes) -> None:
        reader, writer = await self._open(path, content)
        if self._draw.random() < 0.5:
            await reader.read(200)
        else:
            await asyncio.sleep(self._draw.random() * 0.1)
        writer.transport.abort()
        self._seen.counts["clients that left"] += 1

    async def _stream(self, path: str, content: bytes) -> None:
        started = time.monotonic()
        reader, writer = await self._open(path, content)
        try:
            status, head = await _head(reader)
            if status == 429:
                await _body(reader, head)
                await self._come_back(head)
                return
            if status != 200:
                self._seen.broken.append(f"{path}: stream with status {status}")
                return
            last, data = None, b""
            while line := await reader.readline():
                if b"data: " in line:
                    now = time.monotonic()
                    has_text = b'"content": "' in line or b'"text": "' in line or b'"delta": "' in line
                    if has_text and b'"content": ""' not in line and b'"text": ""' not in line:
                        (self._seen.first_token if last is None else self._seen.per_token).append(
                            now - (last or started)
                        )
                        last = now
                    data = line
                    if b'"error": {' in line:
                        self._seen.broken.append(f"{path}: an error in a stream: {line[:200]!r}")
            ended = b"[DONE]" in data or b"response.completed" in data or b"response.incomplete" in data
            if not ended:
                self._seen.broken.append(f"{path}: a stream ends with {data[:120]!r}")
            self._seen.counts["streamed answers"] += 1
        finally:
            writer.close()

    async def _come_back(self, head: dict[str, str]) -> None:
        self._seen.counts["asked to come back (429)"] += 1
        await asyncio.sleep(int(head["retry-after"]) * self._draw.random())


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await reader.readline()).split()[1])
    found = {}
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(": ")
        found[name.lower()] = value
    return status, found


async def _body(reader: asyncio.StreamReader, head: dict[str, str]) -> bytes:
    return await reader.readexactly(int(head["content-length"]))


async def kill_clients(base: str, until: float, seen: Seen) -> None:
    """Every second a process that reads a stream is killed."""
    at = urlsplit(base)
    arguments = [sys.executable, "-S", "-c", KILLED, str(at.hostname), str(at.port)]
    while time.monotonic() < until:
        child = subprocess.Popen(arguments)
        await asyncio.sleep(1.0)
        child.kill()
        child.wait()
        seen.counts["clients killed"] += 1


def state_of(base: str, process: psutil.Process) -> dict[str, float]:
    """What the server holds."""
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        page = answer.read().decode()
    found = {}
    for name in ("pages_used", "running", "queue", "tasks"):
        found[name] = next(
            float(line.split()[1]) for line in page.splitlines() if line.startswith(f"llm_parallel_{name} ")
        )
    found |= {"descriptors": process.num_fds(), "threads": process.num_threads()}
    return found | {"memory, MB": round(process.memory_info().rss / 2**20, 1)}


async def soak(
    base: str, clients: int, seconds: float, seen: Seen, memory: list[float], process: psutil.Process
) -> None:
    """Runs all clients."""
    until = time.monotonic() + seconds

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(1.0)

    all_clients = [Client(base, number, seen).run(until) for number in range(clients)]
    await asyncio.gather(*all_clients, kill_clients(base, until, seen), watch())


def percentiles(values: list[float]) -> str:
    """50, 90, 99 and 100 % in milliseconds, as cells of a table."""
    if len(values) < 2:
        return "· | · | · | ·"
    at = statistics.quantiles(values, n=100, method="inclusive")
    return " | ".join(f"{1000 * value:.0f}" for value in (at[49], at[89], at[98], max(values)))


def by_minute(memory: list[float]) -> list[float]:
    """The largest of each 60 values, one a second."""
    return [max(memory[start : start + 60]) for start in range(0, len(memory), 60)]


def quarters(memory: list[float]) -> tuple[float, float]:
    """The largest value of the third quarter, and of the last."""
    count = len(memory)
    return max(memory[count // 2 : 3 * count // 4]), max(memory[3 * count // 4 :])


def at_rest(memory: list[float]) -> bool:
    """Whether the last quarter is at most 1 % above the one before."""
    before, last = quarters(memory)
    return last <= 1.01 * before


def report(seen: Seen, before: dict[str, float], after: dict[str, float], memory: list[float], command: str) -> str:
    """The result as Markdown."""
    lines = ["# Soak of `llm-parallel serve`", "", f"`{command}`", "", "| what | count |", "| --- | ---: |"]
    lines += [f"| {name} | {count} |" for name, count in sorted(seen.counts.items())]
    lines += [f"| answers that were neither complete nor a clear error | {len(seen.broken)} |", ""]
    lines += ["| time, ms | 50 % | 90 % | 99 % | largest |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| to the first token | {percentiles(seen.first_token)} |"]
    lines += [f"| between pieces of a stream | {percentiles(seen.per_token)} |", ""]
    lines += ["| the server holds | before | after |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {before[name]:g} | {after[name]:g} |" for name in before]
    lines += ["", f"Largest memory in each minute, MB: {', '.join(f'{one:.0f}' for one in by_minute(memory))}."]
    if len(memory) >= 4:
        before_last, last = quarters(memory)
        said = "came to rest" if at_rest(memory) else "was still growing"
        lines += [f"In the last quarter it was at most {last:.0f}, in the one before {before_last:.0f}: it {said}."]
    return "\n".join([*lines, *(f"- {one}" for one in seen.broken[:20])]) + "\n"


def main() -> int:
    """Runs the soak and prints the report; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    limits = ["--max-running", "32", "--max-queue", "128", "--cache-tokens", "8192", "--max-request-mb", "0.1"]
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or served_folder(Path(made) / "small")
        with running_server(folder, limits) as server:
            process, seen, memory = psutil.Process(server.process.pid), Seen(), list[float]()
            warm = Seen()
            asyncio.run(soak(server.base, 20, 5.0, warm, [], process))
            time.sleep(3.0)
            before = state_of(server.base, process)
            asyncio.run(soak(server.base, given.clients, given.seconds, seen, memory, process))
            time.sleep(5.0)
            after = state_of(server.base, process)
            status = server.end()
            log = server.log
    command = f"python benchmarks/serve_soak.py --clients {given.clients} --seconds {given.seconds:g}"
    text = report(seen, before, after, memory, command)
    print(text)
    if given.out:
        given.out.write_text(text)
    held = all(after[name] <= before[name] for name in ("pages_used", "running", "queue", "tasks", "threads"))
    fine = held and not seen.broken and status == 0 and "error" not in log.lower()
    # A few connections may wait for their end when the descriptors are counted.
    fine = fine and after["descriptors"] <= before["descriptors"] + 4
    fine = fine and (given.seconds < 120 or at_rest(memory))
    if not fine:
        print(f"FAILED: exit status of the server {status}\n{log[-2000:]}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
