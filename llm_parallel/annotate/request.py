"""What ``llm-parallel annotate`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.options import argument, option

MODES: Mapping[str, str] = {
    "best": "the best of all answers",
    "ranking": "all answers from the best to the worst",
    "pair": "the better one of two answers",
    "good-bad": "each answer by itself, good or bad",
}
"""Ways of judging."""


@dataclass(frozen=True)
class AnnotateRequest:
    """Answers, and how people judge them."""

    file: str = argument()
    """File of prompts with responses, answers of generate, or the folder of a run in rounds."""
    prompts: Path | None = None
    """For answers of generate: the file that was answered."""
    out: Path | None = None
    """File of judgements, to which lines are added; by default beside the answers. What was judged before counts."""
    mode: str = "best"
    """best (of all answers), ranking (of all answers), pair (the better of two) or good-bad (each answer by itself)."""
    overlap: int = 1
    """Annotators who judge each item."""
    export: bool = option(False, flag=True)
    """Write the files for training from what was judged, and end; without it they are written when the server ends."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only."""
    port: int = 8010
    """Port to listen on; 0 for a free one."""
    seed: int = 0
    """Of the order in which answers are shown, which each annotator has another of."""
    lease_s: float = 900.0
    """Seconds for which an item stays with an annotator whose page is closed; then others get it."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"--mode is {self.mode}; it must be {', '.join(MODES)}")
        if self.overlap < 1:
            raise UserError(f"--overlap is {self.overlap}; it must be at least 1")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}; it must be 0 to 65535")
        if not self.lease_s > 0:
            raise UserError(f"--lease-s is {self.lease_s}; it must be over 0")

    @property
    def records(self) -> Path:
        """The file of judgements."""
        if self.out is not None:
            return self.out
        path = Path(self.file)
        return path / "annotations.jsonl" if path.is_dir() else path.with_suffix(".annotations.jsonl")
