"""What ``llm-parallel generate`` is asked; each field's docstring is the help of its option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_parallel.errors import UserError
from llm_parallel.generate.held import FEW_BITS, Held
from llm_parallel.options import argument, option


@dataclass(frozen=True)
class GenerateRequest:
    """A model, prompts or a file of them, and how tokens are drawn."""

    checkpoint: str = argument()
    """Run, checkpoints, iter_… or Hugging Face folder."""
    prompts: Sequence[str] = option((), name="--prompt")
    """Text to go on from; may be given several times. Or give --input."""
    chat: bool = option(False, flag=True)
    """Each --prompt is a user's message, which the model's chat template writes."""
    max_new_tokens: int = 64
    """Tokens to write."""
    temperature: float = 0.0
    """0 for the likeliest token each time (greedy)."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this share."""
    seed: int = 0
    """Seed of the drawing."""
    device: str = "auto"
    """auto, cpu or cuda."""
    weights: str = "saved"
    """How weights are held: saved (as in the folder), fp32, bf16, or on a CPU int8 or int4."""
    stop: Sequence[str] = option((), name="--stop")
    """Text before which an answer ends; may be given several times."""
    min_p: float = 0.0
    """Leave out tokens under this share of the likeliest one's."""
    repetition_penalty: float = 1.0
    """Over 1: tokens that occurred become less likely."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that it was written."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that was written."""
    input: Path | None = None
    """JSON lines with prompt, prompt_tokens or messages; the answers go to --output."""
    output: Path | None = None
    """File of answers with log-probabilities and reasons; a command that was killed goes on with it."""
    samples: int = 1
    """Answers to each line of --input."""
    best_of: int | None = None
    """Answers to make of each prompt, of which the likeliest by the mean log-probability of its tokens is given, or the
    --samples likeliest; not shown before it is complete."""
    top_log_probs: int = 0
    """Likeliest tokens to write to --output with each token."""
    max_running: int = 32
    """Answers to --input in work at a time, by each replica."""
    tp: int = 1
    """With --input: processes that share each layer (tensor parallelism)."""
    pp: int = 1
    """With --input: stages of layers, each on processes of its own (pipeline parallelism)."""
    dp: int = 1
    """With --input: replicas of the model, each of which answers a part of the prompts."""
    engine: str = "ours"
    """With --input: what answers, ours or an installed vllm, which gets the model as a Hugging Face folder."""
    engine_python: Path | None = None
    """With --engine vllm: python of the environment that has vLLM, by default LLM_PARALLEL_VLLM_PYTHON or this one."""
    hang_s: float = 600.0
    """With --input: seconds without progress after which a process is taken to hang, and the command ends."""
    logs: Path | None = None
    """With several processes: folder of their logs; by default a temporary one."""
    deterministic: bool = option(False, flag=True)
    """The same log-probabilities, to the last bit, whatever else runs; on a CPU, slower."""
    json_schema: Path | None = None
    """File of a JSON schema that answers must satisfy; {"type": "object"} for any JSON object."""
    regex: str | None = None
    """Regular expression that answers must match as a whole."""
    grammar: Path | None = None
    """File of a grammar (GBNF or Lark) that answers must follow."""
    choice: Sequence[str] = option((), name="--choice")
    """Text that is one of the possible answers; give several."""

    @property
    def num_processes(self) -> int:
        """Processes that answer a file."""
        return self.tp * self.pp * self.dp

    def held(self) -> Held:
        """How the model is to be held. Raises UserError."""
        return Held(self.device, self.weights, self.deterministic)

    def __post_init__(self) -> None:
        self.held()
        if bool(self.prompts) == (self.input is not None):
            given = "both" if self.prompts else "neither"
            raise UserError(f"{given} of --prompt and --input are given; give one of them")
        if self.input is not None and self.output is None:
            raise UserError("--input is given and --output is not; name the file for the answers")
        if self.chat and self.input is not None:
            raise UserError(
                "--chat is given with --input, whose lines say by messages what is a chat; leave --chat out"
            )
        for name in (
            "output",
            "samples",
            "top_log_probs",
            "max_running",
            "tp",
            "pp",
            "dp",
            "engine",
            "engine_python",
            "hang_s",
            "logs",
        ):
            if self.input is None and getattr(self, name) != getattr(type(self), name):
                option_name = name.replace("_", "-")
                raise UserError(f"--{option_name} is given without --input, which it belongs to; leave it out")
        for name in ("tp", "pp", "dp"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.hang_s <= 0:
            raise UserError(f"--hang-s is {self.hang_s}; it must be over 0")
        self._check_best_of()
        self._check_engine()
        forms = [
            name for name in ("json_schema", "regex", "grammar", "choice") if getattr(self, name) not in (None, ())
        ]
        if len(forms) > 1:
            named = " and ".join("--" + name.replace("_", "-") for name in forms)
            raise UserError(f"{named} are given together; an answer has one form, so give one of them")

    def _check_engine(self) -> None:
        if self.engine not in ("ours", "vllm"):
            raise UserError(f"--engine is {self.engine!r}; it must be ours or vllm")
        if self.engine == "ours":
            if self.engine_python is not None:
                raise UserError("--engine-python is given without --engine vllm, which it belongs to; leave it out")
            return
        unlike = {
            "--dp": self.dp > 1,
            "--deterministic": self.deterministic,
            f"--weights {self.weights}": self.weights in FEW_BITS,
            "a form of answers": bool(self.json_schema or self.regex or self.grammar or self.choice),
        }
        for name, given in unlike.items():
            if given:
                raise UserError(
                    f"{name} is given with --engine vllm, which does not take it here; leave one of them out"
                )

    def _check_best_of(self) -> None:
        if self.best_of is None:
            return
        if self.best_of < self.samples:
            raise UserError(
                f"--best-of is {self.best_of} and --samples is {self.samples}; it must be at least that many"
            )
        if self.temperature == 0 and self.best_of > 1:
            raise UserError(
                f"--best-of is {self.best_of} and --temperature is 0, which writes the same answer each time; give a "
                "--temperature over 0"
            )
