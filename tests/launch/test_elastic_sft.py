"""Fine-tuning loses a process and then a node, and ends with the losses of the undisturbed run: all weights, adapters,
and adapters on matrices in four bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_parallel.errors import EXIT_STOPPED
from tests.integration.test_sft import write_run
from tests.launch.elastic_runs import (
    BATCH,
    ENDLESS,
    FAULT_AT,
    LIMIT_S,
    assert_steps_are_whole,
    runs_of,
    undisturbed,
    worst,
)
from tests.support import four_digits
from tests.support.commands import train_in_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.slow]
LAYOUT = ("parallel.tp=2", "parallel.dp=2")
KINDS: dict[str, tuple[dict[str, Any] | None, int]] = {
    "full": (None, 32),
    "lora": ({"rank": 4}, 32),
    "qlora": ({"rank": 4, "base": "nf4"}, 32),
    "full, 8-bit moments": (None, 8),
    "dora in 4 bits, 8-bit moments": ({"rank": 32, "base": "nf4", "dora": True}, 8),
}
"""The adapter, and the bits of AdamW's moments."""


@pytest.mark.parametrize(("adapter", "bits"), KINDS.values(), ids=KINDS)
def test_a_killed_worker_and_a_lost_node_change_no_loss(
    tmp_path: Path, adapter: dict[str, Any] | None, bits: int
) -> None:
    """The killed worker costs nothing, to the last bit; half the devices sum in another order."""
    four_digits.write_conversations(tmp_path / "train.jsonl", 400)
    train_in_ranks(write_run(tmp_path, train={"steps": 2}, optim={"warmup_steps": 0}), 1)
    run_file = write_run(
        tmp_path,
        chat={"eval_fraction": 0.0, "show_answers": 0},
        train={"global_batch_size": BATCH, "micro_batch_size": 2},
        optim={"schedule": "constant", "moment_bits": bits},
        checkpoint={"load": str(tmp_path / "run")},
        **({} if adapter is None else {"adapter": adapter}),
    )
    with runs_of(run_file) as start:
        run = start(*LAYOUT, ENDLESS, name="disturbed")
        run.reach(FAULT_AT, LIMIT_S)
        run.first_step_after(run.cause("kill", 1), LIMIT_S)
        run.reach(run.steps()[-1]["step"] + 3, LIMIT_S)
        at = run.steps()[-1]["step"]
        run.first_step_after(run.cause("node", 3), LIMIT_S)
        run.reach(run.steps()[-1]["step"] + 3, LIMIT_S)
        run.stop()
        assert run.wait() == EXIT_STOPPED
        assert [event["layout"] for event in run.events("form")][:3] == [
            "TP 2 + SP x PP 1 x DP 2",
            "TP 2 + SP x PP 1 x DP 2",
            "TP 2 + SP x PP 1 x DP 1",
        ]
        assert_steps_are_whole(run.steps(), len(run.events("detect")))
        losses = undisturbed(start, run.steps()[-1]["step"], *LAYOUT)
        assert worst(run, losses, last=at) == 0.0
        assert worst(run, losses, first=at) <= 1e-5
