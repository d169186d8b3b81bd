"""Blame drills: short runs with one scenario whose culprit is known; who was removed is compared with it."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from llm_launch.drill_scenes import SCENES
from llm_launch.drill_stage import Device, Scene, Stage
from llm_launch.drill_verdicts import DEVICES, START_S, Finding, check_steps
from llm_launch.live_run import LiveRun, unix_time
from llm_launch.show import timeline


def blame_drill(run_file: Path, folder: Path, number: int, rng: random.Random, kinds: Sequence[str] = ()) -> Finding:
    """One scenario, drawn with the rank and the step, on four devices. kinds: those that are drawn from; all."""
    name = rng.choice(sorted(kinds or SCENES))
    rank, step = rng.randrange(DEVICES), rng.randrange(6, 16)
    finding = Finding(f"{number}: {name} at rank {rank} after step {step}")
    scene, began = SCENES[name], time.monotonic()
    if reason := scene.impossible():
        finding.skipped = reason
        return finding
    overrides = ["parallel.dp=4", f"train.steps={scene.steps}", "elastic.checksum_every_steps=1",
                 "elastic.probe_every_steps=2", "elastic.strikes=2", *scene.overrides]  # fmt: skip
    run = LiveRun.start(run_file, overrides, folder / f"blame-{number}", DEVICES, DEVICES)
    stage = Stage(run, rank, finding)
    try:
        run.reach(step, START_S)
        stage.begin()
        bad = scene.act(stage)
        _judge(stage, scene, bad, time.time())
    except (TimeoutError, OSError) as error:
        finding.wrong.append(str(error)[:2000])
    finally:
        stage.clean_up.close()
        run.close()
    if finding.wrong:
        finding.wrong += [line[:200] for line in timeline(run.run_dir)][-12:]
    finding.seconds = time.monotonic() - began
    return finding


def _judge(stage: Stage, scene: Scene, bad: list[Device], fault_s: float) -> None:
    """Compares the end of the run, its steps and who was removed with what has to be."""
    run, finding = stage.run, stage.finding
    status = run.wait(scene.end_s)
    finding.expect(status == scene.status, f"exit status {status} instead of {scene.status}")
    if scene.status:
        ended = unix_time(run.events("fail")[-1]) - fault_s if run.events("fail") else 99.0
        finding.expect(ended < 10.0, f"the run ended {ended:.1f} s after the mistake was planted")
    else:
        check_steps(finding, run, scene.steps)
        saved = run.saved_step()
        finding.expect(saved == scene.steps, f"the newest complete checkpoint is of step {saved}, not {scene.steps}")
    removed = [[event["node"], event["device"]] for event in run.events("remove")]
    for device in bad:
        finding.expect(device in removed, f"bad device {device} was not removed")
    for device in removed:
        finding.expect(device in bad, f"healthy device {device} was removed")
