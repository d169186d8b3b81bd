"""What every drill has in common: what is wrong about a run, and whether its steps are all there."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_launch.live_run import LiveRun

DEVICES = 4
START_S = 180.0


@dataclass
class Finding:
    """One drill: what was done, what came out, what is wrong about it (nothing: it passed)."""

    scenario: str
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""
    """Why it could not be caused on this machine; empty if it was."""

    def expect(self, holds: bool, otherwise: str) -> None:
        """Notes ``otherwise`` as wrong unless it ``holds``."""
        if not holds:
            self.wrong.append(otherwise)


def check_steps(finding: Finding, run: LiveRun, steps: int) -> None:
    """Every step is there, in order, from its own samples, and no fault cost more than one."""
    made = run.steps()
    numbers = [record["step"] for record in made]
    finding.expect(set(numbers) == set(range(1, steps + 1)), f"steps are missing of {steps}")
    finding.expect(numbers == sorted(numbers), "steps before the last one were made again")
    again = len(numbers) - len(set(numbers))
    finding.expect(again <= len(run.events("detect")), f"{again} steps made again")
    batch = made[0]["train/samples"] // made[0]["step"] if made else 0
    finding.expect(all(r["train/samples"] == batch * r["step"] for r in made), "samples were lost or repeated")
