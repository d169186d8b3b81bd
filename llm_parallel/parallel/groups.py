"""Process groups of a layout: torch.distributed and megatron-core's parallel state."""

from __future__ import annotations

import datetime
import hashlib
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from llm_launch.local import meeting_here
from llm_parallel.parallel.layout import Layout
from llm_parallel.parallel.mesh import Coordinates, Mesh
from llm_parallel.parallel.platform import Platform, seed_everything


@dataclass(frozen=True)
class Groups:
    """What one process needs to know to talk to the others. ``collection`` is megatron-core's set of groups."""

    mesh: Mesh
    rank: int
    at: Coordinates
    collection: Any
    platform: Platform

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes what is written once for the whole run."""
        return self.rank == 0

    @property
    def reports_loss(self) -> bool:
        """Whether this process is the one per replica and context shard whose loss counts."""
        return self.at.pp == self.mesh.pp - 1 and self.at.tp == 0

    def sum_over_world(self, *values: float) -> list[float]:
        """Sums of fp64 scalars over all processes, in one collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.platform.device)
        dist.all_reduce(total)
        return total.tolist()

    def of_first_rank(self, value: Any) -> Any:
        """What the first process passes, on all processes."""
        box = [value]
        if self.mesh.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def loopback_store(host: str, port: int, rank: int, world_size: int, timeout_s: float = 1800.0) -> dist.Store:
    """The store of processes of one machine, which listens at its loopback address ``host`` alone. torch's env://
    rendezvous listens at all addresses, and believes everyone who connects. Raises OSError if the port is taken."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if rank:
        return dist.TCPStore(host, port, world_size, False, timeout)
    with socket.create_server((host, port), backlog=1024) as listener:
        held = listener.detach()
    return dist.TCPStore(host, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=held)


def store_here(rank: int, world_size: int, timeout_s: float = 1800.0) -> dist.Store | None:
    """The store of processes that ``launch_local`` started on this machine; None for those that something else started,
    which meet by torch's env:// rendezvous."""
    where = meeting_here() if world_size > 1 else None
    return None if where is None else loopback_store(*where, rank, world_size, timeout_s)


def open_groups(
    layout: Layout,
    rank: int,
    platform: Platform,
    seed: int,
    timeout_s: float = 1800.0,
    store: dist.Store | None = None,
) -> Groups:
    """Creates all groups. If torch.distributed is not initialized, the processes meet by ``store``, else by
    ``store_here``, else by torch's env:// rendezvous; a single process needs none. ``seed`` seeds torch and
    megatron-core's tensor-parallel generators."""
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=timeout_s)
        device_id = platform.device if platform.is_cuda else None
        if layout.world_size == 1:
            store = dist.HashStore()
        elif store is None:
            store = store_here(rank, layout.world_size, timeout_s)
        if store is not None:
            where: dict[str, Any] = {"store": store, "rank": rank, "world_size": layout.world_size}
            dist.init_process_group(platform.backend, timeout=timeout, device_id=device_id, **where)
        else:
            dist.init_process_group(platform.backend, timeout=timeout, device_id=device_id)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        distributed_timeout_minutes=max(1, int(timeout_s // 60)),
        # The distributed optimizer gathers its state over gloo when a checkpoint is made; on CPU the groups are gloo.
        create_gloo_process_groups=platform.is_cuda,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    seed_everything(seed)
    return Groups(layout.mesh, rank, layout.coordinates(rank), collection, platform)


def seed_step(seed: int, step: int, groups: Groups) -> None:
    """Seeds the generators for one step of a model with dropout. Ranks that see the same tokens have the same default
    generator; a run that is resumed in its layout drops what it would have dropped."""
    at = groups.at
    place = f"{seed}/{step}/{at.dp}/{at.cp}/{at.pp}"
    seed_everything(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=4).digest(), "little") >> 1)


def close_groups(world: bool = True) -> None:
    """Forgets the groups of the layout, so that another can be opened; with ``world`` torch.distributed ends too."""
    parallel_state.destroy_model_parallel()
    if not world:
        return
    if dist.is_initialized():
        dist.destroy_process_group()
    else:
        # torch names groups by a counter that also counts a group that could not be formed. A process that was not
        # there then gives the next group another name, and the two would wait for each other for ever.
        distributed_c10d._world.group_count = 0
