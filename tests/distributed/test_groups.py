"""Groups that could not be formed leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.harness import run_ranks

pytestmark = pytest.mark.gloo


def fails_first_then_forms(rank: int, world_size: int, folder: str) -> float:
    """Rank 0 waits in vain for a process that never comes, as when another dies while a generation forms."""
    import torch
    import torch.distributed as dist

    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    dist.destroy_process_group()
    layout, platform = Layout(dp=world_size), open_platform("cpu")
    if rank == 0:
        with pytest.raises(RuntimeError):
            open_groups(layout, 0, platform, 0, timeout_s=1.0, store=dist.FileStore(f"{folder}/first", world_size))
        close_groups()
    groups = open_groups(layout, rank, platform, 0, timeout_s=20.0, store=dist.FileStore(f"{folder}/then", world_size))
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.collection.dp)
    close_groups()
    return total.item()


def test_a_process_that_failed_to_form_meets_one_that_is_new(tmp_path: Path) -> None:
    assert run_ranks(fails_first_then_forms, 2, str(tmp_path)) == [2.0, 2.0]
