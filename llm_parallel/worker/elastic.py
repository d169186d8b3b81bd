"""One worker of an elastic run: trains generation after generation in one process.

Between generations the process keeps its imports, its device and its place; groups, model and data are built anew and
the state comes from memory. Forked from a zygote (llm_launch/zygote.py), which calls ``worker_main``.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from llm_launch.member import Assignment, Member
from llm_launch.progress import Marker, ProgressPage
from llm_launch.states import Outcome
from llm_parallel.checkpoint.copies import CopyLost, LocalSource, RemoteSource, Source, restore
from llm_parallel.checkpoint.state import TrainState
from llm_parallel.config.load import load_config
from llm_parallel.errors import UserError
from llm_parallel.files import open_to_append
from llm_parallel.lines import note
from llm_parallel.parallel.engine import POLICY, Models, network_of
from llm_parallel.quiet import quiet_libraries
from llm_parallel.train.loop import run_training
from llm_parallel.train.run import Place, Run
from llm_parallel.train.step import StepOutcome
from llm_parallel.train.step_settings import global_batch_size
from llm_parallel.train.watch import Resumed, Watch
from llm_parallel.tune.methods import method_of
from llm_parallel.worker.copying import Copying
from llm_parallel.worker.probe import DeviceProbe, Stopwatch, Suspect, odd_one_out, weights_checksum
from llm_parallel.worker.store import ControllerStore


class ElasticWatch(Watch):
    """Connects one generation's training to the launcher: copies of the state, comparisons of replicas, tests of the
    device, progress."""

    uneven = True

    def __init__(self, member: Member, assignment: Assignment) -> None:
        self.member, self.assignment = member, assignment
        self.copying = Copying(member, assignment, 0)
        self._config: Any = None
        self._probe: DeviceProbe | None = None
        self._own_loss = 0.0
        self._stopwatch: Any = None

    def restore(self, models: Models) -> Resumed | None:
        """Restores the state from the memory of the nodes that the assignment names."""
        wanted = self.assignment.restore
        if wanted is None:
            return None
        groups = network_of(models[POLICY]).groups
        mesh, at = groups.mesh, groups.at
        sources = self._sources(wanted, (at.dp * mesh.cp + at.cp + 0.5) / (mesh.dp * mesh.cp))
        changed: list[str] = []
        state = restore(models, sources, changed.extend)
        return Resumed(state, f"step {state.step} from memory", changed)

    def _sources(self, wanted: dict[str, Any], place: float) -> list[Callable[[], Source]]:
        """Copies of the processes that held the same part of the model, in the order in which they probably hold what
        this process needs. ``place``: this process's place among the replicas, from 0 to 1; copies are listed in the
        order of replicas, however many there were."""
        step, generation = wanted["step"], wanted["generation"]
        found: list[Callable[[], Source]] = []
        for rank, kind, host, port in wanted["sources"]:
            if (host, port) != self.assignment.here:
                found.append(partial(RemoteSource, (host, port), self.member.secret, kind, generation, rank, step))
            else:
                name = f"{kind}/g{generation:06d}_r{rank:06d}"
                found.append(partial(LocalSource, Path(self.member.copies_dir) / name, step))
        nearest = sorted(range(len(found)), key=lambda number: abs((number + 0.5) / len(found) - place))
        return [found[number] for number in nearest]

    def opened(self, run: Run) -> None:
        """Makes the first copy of this generation while its first step runs."""
        self._config = run.config.elastic
        self._probe = DeviceProbe(run.engine.groups.platform.device) if self._config.probe_every_steps else None
        self.member.describe_collectives = _collectives
        self.member.device_is_idle = partial(_is_idle, run.engine.groups.platform.device)
        self._stopwatch = Stopwatch(run.engine.groups.platform.device)
        run.engine.before_reduction.append(self._stopwatch.stop)
        for engine in run.engines.values():
            engine.network.before_micro_batch.append(self._leave_if_given_up)
        self.survives_failed_saves = self._config.replicate_every_steps > 0
        self.copying = Copying(self.member, self.assignment, self._config.replicate_every_steps)
        self.copying.open(run)
        self.member.marker.begin(self.assignment.generation, run.state.step)
        self.member.send({"is": "training", "step": run.state.step})

    def _leave_if_given_up(self) -> None:
        """Raises before the next micro batch if the generation was given up, since the next generation begins only
        after all have left."""
        if self.member.aborted:
            raise ConnectionError("the generation was given up")

    def before_step(self, run: Run) -> None:
        """Compares the replicas and tests the device where due."""
        self._inject(run, "raise", "flip", "stall", "hold")
        step, config = run.state.step + 1, self._config
        if config.checksum_every_steps and step % config.checksum_every_steps == 0:
            for engine in run.engines.values():
                engine.parameters_up_to_date()
            self._compare(run, step)
        self._inject(run, "nan")  # after the comparison of weights, so that it first shows in this step's products
        if self._probe is not None and step % config.probe_every_steps == 0:
            self.member.marker.probe_s = self._probe.run()
            self.member.marker.own_s = self._stopwatch.mean_s()
        size = global_batch_size(run.config.train, run.state.consumed_samples)
        self._stopwatch.start(run.layout.num_micro_batches(size, run.groups.at.dp))

    def _compare(self, run: Run, step: int) -> None:
        groups = run.engine.groups
        mesh = groups.mesh
        replicas = mesh.dp * mesh.cp
        if replicas == 1:
            return
        own = weights_checksum(run.models).to(groups.platform.device)
        all_of_them = [torch.empty_like(own) for _ in range(replicas)]
        dist.all_gather(all_of_them, own, group=groups.collection.dp_cp)
        sums = [int(value) for value in all_of_them]
        odd = odd_one_out(sums, groups.at.dp * mesh.cp + groups.at.cp)
        # All leave together: those that agree must not go on into a step that the others do not make.
        anywhere, ours = groups.sum_over_world(float(len(set(sums)) > 1), float(odd))
        if anywhere:
            text = f"weights before step {step} differ between replicas: checksums {[hex(value) for value in sums]}"
            raise Suspect("disagrees" if odd else "", text + ("" if ours else "; no majority says who is right"))

    def before_agreement(self, own_loss: float) -> None:
        """Waits until the copy of the last step is complete, before any process can finish this one."""
        self._own_loss = own_loss
        self.copying.finish()

    def wants_to_pause(self) -> bool:
        """Whether the launcher plans another layout."""
        return self.member.asked_to_pause

    def judged(self, run: Run, outcome: StepOutcome, size: int) -> None:
        """NaN from some replicas only may be a device's fault: the step is made again elsewhere first."""
        replicas = run.groups.mesh.dp * run.groups.mesh.cp
        step = run.state.step + 1
        if not 0 < outcome.not_finite < replicas or step in self.assignment.believe or not self.copying.works:
            return
        mine = not math.isfinite(self._own_loss)
        first = run.state.consumed_samples
        raise Suspect(
            "not finite" if mine else "",
            f"the loss of {outcome.not_finite} of {replicas} replicas is not finite at step {step}",
            step,
            (first, first + size - 1),
        )

    def after_step(self, run: Run) -> None:
        """Reports progress and starts the next copy."""
        self.member.marker.stepped(run.state.step)
        self.copying.after_step(run, self, self.member.asked_to_pause)

    @contextmanager
    def long(self) -> Iterator[None]:
        """Suspends the search for hangs during work that is longer than a step."""
        self.member.marker.busy(True)
        try:
            yield
        finally:
            self.member.marker.busy(False)

    def close(self) -> None:
        """Ends the copying; finished copies stay."""
        self.member.describe_collectives = dict
        self.copying.close()

    def _inject(self, run: Run, *kinds: str) -> None:
        """Causes faults of a drill that only the process itself can cause."""
        if not self._config.drills:
            return
        from llm_parallel.worker import faults

        given = self.member.faults()
        for fault in given:
            assert fault["kind"] in faults.KINDS, f"no process can cause the fault {fault['kind']!r} in itself"
        faults.before_step([fault for fault in given if fault["kind"] in kinds], run)


def _collectives() -> dict[str, Any]:
    """Collectives entered so far, by group."""
    counts: dict[str, Any] = {}
    for group in list(distributed_c10d._world.pg_map):
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) > 1:
            counts[f"{group.group_desc} {ranks}"] = group._get_sequence_number_for_group()
    return counts


def _is_idle(device: torch.device) -> bool:
    """Whether a device has done all that it was given. A processor has none of its own to do while its process stands
    still; of a GPU's work only the stream of the model is looked at, which waits for the others."""
    if device.type != "cuda":
        return True
    try:
        return torch.cuda.default_stream(device).query()
    except RuntimeError:  # an error of the device, which the main thread will meet
        return False


def train_generation(member: Member, assignment: Assignment, run_file: str) -> TrainState:
    """One generation, from forming its groups to its end."""
    config = load_config(run_file, assignment.overrides, notice=lambda _: None)
    store = ControllerStore(member, assignment.generation)
    watch = ElasticWatch(member, assignment)
    place = Place(assignment.rank, assignment.world_size, assignment.local_rank, store, assignment.elapsed_s)
    try:
        return run_training(config, place, lambda: member.asked_to_stop, watch, method_of(config))
    finally:
        watch.close()


def _log_to(run_dir: Path, rank: int, terminal: int) -> None:
    """Sends standard error to the log of this process's rank; only rank 0 writes to the terminal. Where no log can be
    opened, as on a full disk or in a folder that was deleted, the text goes to the node's log."""
    path = run_dir / "logs" / f"rank_{rank}.log"
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = open_to_append(path)
    except OSError as error:
        note(f"{path} cannot be opened ({error.strerror}); rank {rank} goes on in this log")
        log = os.dup(2)
    os.dup2(log, 2)
    os.dup2(terminal if rank == 0 else log, 1)
    os.close(log)


def run_generation(member: Member, assignment: Assignment, run_file: str, run_dir: Path, terminal: int) -> bool:
    """Trains one generation and reports how it ended; returns whether the process may be used again."""
    _log_to(run_dir, assignment.rank, terminal)
    try:
        state = train_generation(member, assignment, run_file)
    except Suspect as error:
        member.leave(Outcome.FAILED, error, suspect=error.kind, step=error.step, samples=error.samples)
    except UserError as error:
        member.leave(Outcome.FAILED, error)
    except BaseException as error:  # torch's CheckpointException is one
        if not isinstance(error, Exception) and type(error).__name__ != "CheckpointException":
            raise
        _leave_after(member, error)
        return not _poisoned(error)
    else:
        config_steps = load_config(run_file, assignment.overrides, notice=lambda _: None).train.steps
        finished = state.finished(config_steps)
        paused = not finished and not member.asked_to_stop and member.asked_to_pause
        done = Outcome.FINISHED if finished else Outcome.STOPPED
        member.leave(Outcome.PAUSED if paused else done, step=state.step)
    return True


def _leave_after(member: Member, error: BaseException) -> None:
    if member.aborted:
        member.leave(Outcome.ABORTED)
    elif isinstance(error, CopyLost):
        member.leave(Outcome.ABORTED, error, copy_lost=list(error.copy) if error.copy else None)
    else:
        member.leave(Outcome.FAILED, error)


def _poisoned(error: BaseException) -> bool:
    """Whether the process must end: an error on the device leaves its CUDA context unusable."""
    return torch.cuda.is_initialized() and "CUDA error" in str(error)


def worker_main(control: socket.socket, environment: Mapping[str, str]) -> int:
    """Body of a forked worker: trains one assignment after another until the run is over; returns the exit status."""
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_dir = Path(environment["LLM_PARALLEL_RUN_DIR"])
    page = ProgressPage(int(environment["LLM_PARALLEL_PROGRESS_FD"]))
    member = Member(
        control,
        Marker(page, int(environment["LLM_PARALLEL_SLOT"])),
        node=environment["LLM_PARALLEL_NODE"],
        copies_dir=environment["LLM_PARALLEL_REPLICA_DIR"],
        secret=environment["LLM_PARALLEL_SECRET"],
    )
    signal.signal(signal.SIGTERM, lambda *_: member.request_stop())
    terminal = os.dup(1)
    member.abort_collectives = _abort_nccl
    member.start()
    while (assignment := member.next_assignment()) is not None:
        if not run_generation(member, assignment, environment["LLM_PARALLEL_RUN_FILE"], run_dir, terminal):
            return 1
        gc.collect()  # megatron-core's modules refer to each other in circles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return 0


def _abort_nccl() -> None:
    """Ends NCCL collectives that wait for a peer that is gone."""
    if torch.cuda.is_initialized() and dist.is_initialized() and dist.get_backend() == "nccl":
        distributed_c10d._abort_process_group()
