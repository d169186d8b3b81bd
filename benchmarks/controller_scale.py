"""Runs the launcher's protocol at the size of a cluster: the real controller, with agents that only answer it.

    python benchmarks/controller_scale.py [--nodes 2048] [--devices 8] [--save]

Every agent is a real authenticated connection; its workers exist as messages only. Measured are the time from the last
agent's arrival to a whole assignment, and from the loss of a node to the next one, and what went over the wire.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import resource
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from llm_launch import wire
from llm_launch.absence import Absence
from llm_launch.controller import Controller
from llm_parallel.bench.environment import chip_name, commit
from llm_parallel.config.tree import RunConfig

SPEAKERS = 2


class Speaker:
    """An agent that starts no processes."""

    def __init__(self, number: int, devices: int, secret: str, heartbeat_s: float, counts: Counter[str]) -> None:
        self.number, self.devices, self.secret, self.counts = number, devices, secret, counts
        self.heartbeat_s = heartbeat_s
        self.ranks: dict[int, int] = {}
        self.before: list[tuple[int, int]] = []
        self.generation = 0

    async def run(self, port: int) -> None:
        """Runs until the controller ends it."""
        channel = await wire.connect("127.0.0.1", port, self.secret)
        name = f"n{self.number:05d}"

        def tell(message: dict[str, Any]) -> None:
            message = {**message, "node": name}
            self.counts["sent"] += 1
            self.counts["sent bytes"] += len(wire.encode(message))
            channel.send(message)

        tell({"is": "hello", "host": "127.0.0.1", "devices": list(range(self.devices)), "copies": ["127.0.0.1", 1],
              "pid": 0})  # fmt: skip
        for device in range(self.devices):
            tell({"is": "worker", "device": device, "pid": 1, "number": 0, "generation": 0})
        beat = asyncio.create_task(self._beat(tell))
        try:
            while (message := await channel.receive()) is not None:
                self.counts["received"] += 1
                self.counts["received bytes"] += len(wire.encode(message))
                if message["is"] == "end":
                    break
                self._answer(message, tell)
        except OSError:
            pass
        finally:
            beat.cancel()

    def _answer(self, message: dict[str, Any], tell: Any) -> None:
        if message["is"] == "assign":
            device = message["device"]
            if message["generation"] != self.generation:
                self.before = [(self.generation, rank) for rank in self.ranks.values()]
                self.generation, self.ranks = message["generation"], {}
            self.ranks[device] = message["rank"]
            tell({"is": "training", "device": device, "step": 1, "generation": self.generation})
        elif message["is"] == "abort":
            for device in self.ranks:
                tell({"is": "left", "device": device, "outcome": "aborted",
                      "generation": self.generation})  # fmt: skip
        elif message["is"] == "inventory":
            # Own copies, and those of the nodes before, of which one may be the lost one's.
            held = [{"kind": "own", "generation": self.generation, "rank": rank, "steps": [9, 10]}
                    for rank in self.ranks.values()]  # fmt: skip
            held += [{**entry, "kind": "kept", "rank": entry["rank"] - self.devices} for entry in held
                     if entry["rank"] >= self.devices]  # fmt: skip
            tell({"is": "inventory", "entries": held})

    async def _beat(self, tell: Any) -> None:
        step = 1
        while True:
            await asyncio.sleep(self.heartbeat_s)
            step += 1
            progress = {device: [self.generation, step, 0.1, 1.0, 0.0, 0.1, 1.0] for device in self.ranks}
            tell({"is": "beat", "progress": progress})


def speak(numbers: range, devices: int, secret: str, heartbeat_s: float, port: int, results: Any) -> None:
    """Runs many agents in one process."""

    async def all_of_them() -> None:
        counts: Counter[str] = Counter()
        speakers = [Speaker(number, devices, secret, heartbeat_s, counts) for number in numbers]
        await asyncio.gather(*(speaker.run(port) for speaker in speakers))
        results.put(dict(counts))

    asyncio.run(all_of_them())


class Given:
    """A starter for agents that are started elsewhere."""

    host = "127.0.0.1"

    def __init__(self, nodes: int, devices: int) -> None:
        self.secret = wire.new_secret()
        self.expected = {f"n{number:05d}": devices for number in range(nodes)}

    def begin(self, port: int) -> None:
        """Does nothing, since the agents come by themselves."""

    def start(self, node: str) -> None:
        """Does nothing, so a lost agent stays lost."""

    def look(self) -> list[Absence]:
        """None."""
        return []

    def condemn(self, node: str, reason: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


async def drill(controller: Controller, nodes: int, heartbeat_s: float) -> dict[str, float]:
    """Seconds until all agents have their first assignment, and from the loss of a node until all have the next one."""
    running = asyncio.create_task(controller.run())
    fleet = controller.fleet

    async def until(condition: Any, what: str) -> float:
        deadline = time.monotonic() + 400
        while not condition():
            assert not running.done() and time.monotonic() < deadline, what
            await asyncio.sleep(0.01)
        return time.monotonic()

    arrived = await until(lambda: controller.fleet.attendance.settled(controller.starter.expected), "agents")
    trained = await until(lambda: fleet.phase.value == "training", "training")
    await asyncio.sleep(3 * heartbeat_s)
    lost = fleet.roster.nodes[f"n{nodes // 2:05d}"]
    began = time.monotonic()
    assert lost.channel is not None
    lost.channel.close()
    generation = fleet.generation
    again = await until(lambda: fleet.generation > generation and fleet.phase.value == "training", "recovery")
    controller.stop()
    for node in fleet.roster.alive():
        node.send({"is": "end", "keep": False})
    await asyncio.sleep(2.0)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return {"first assignment_s": trained - arrived, "node lost to training_s": again - began}


def main() -> None:
    """Runs the simulation, prints the result, and saves it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2048)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--heartbeat-s", type=float, default=5.0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/controller_scale_DATE.json")
    arguments = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    nodes, devices, beat_s = arguments.nodes, arguments.devices, arguments.heartbeat_s
    world = nodes * devices
    config = RunConfig.model_validate({
        "model": {"preset": "llama3-405b", "num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248,
                  "num_attention_heads": 128, "num_query_groups": 8, "vocab_size": 128256,
                  "max_seq_length_tokens": 8192},
        "data": {"seq_length_tokens": 8192},
        "parallel": {"tp": 8, "pp": 16 if world >= 256 else 2,
                     "stage_layers": [8] * 14 + [7] * 2 if world >= 256 else None},
        "train": {"global_batch_size": world, "precision": "bf16"},
        "elastic": {"heartbeat_s": beat_s, "lost_after_s": 120.0, "wait_s": 600.0},
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        starter = Given(nodes, devices)

        async def simulate() -> tuple[dict[str, float], Counter[str]]:
            controller = Controller(config, Path(name), starter, "cuda")
            port = await controller.listen("127.0.0.1")
            results = multiprocessing.get_context("spawn").Queue()
            share = -(-nodes // SPEAKERS)
            processes = [
                multiprocessing.get_context("spawn").Process(
                    target=speak,
                    args=(range(first, min(first + share, nodes)), devices, starter.secret, beat_s, port, results),
                )
                for first in range(0, nodes, share)
            ]
            for process in processes:
                process.start()
            times = await drill(controller, nodes, beat_s)
            controller.close()
            total: Counter[str] = Counter()
            for _ in processes:
                total.update(await asyncio.to_thread(results.get, True, 60))
            for process in processes:
                process.join(20)
                process.kill()
            return times, total

        times, counts = asyncio.run(simulate())
    per_agent = {name: value / nodes for name, value in counts.items()}
    print(f"{nodes} agents with {devices} devices each, {world} ranks, on {chip_name()}:")
    print(", ".join(f"{name} {value:.3f}" for name, value in times.items()))
    print("per agent over the whole run: " + ", ".join(f"{name} {value:,.0f}" for name, value in per_agent.items()))
    if arguments.save:
        record = {"command": "python benchmarks/controller_scale.py", "chip": chip_name(), "commit": commit(),
                  "date": date.today().isoformat(), "nodes": nodes, "devices": devices, "seconds": times,
                  "per_agent": per_agent}  # fmt: skip
        path = Path(__file__).parent / "results" / f"controller_scale_{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
