"""Reward models that judge answers, in the processes and the layout of the run that samples them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_parallel.data.prompts import Prompt
from llm_parallel.parallel.engine import Network
from llm_parallel.train.beside import adapter_in, model_in
from llm_parallel.train.run import Run
from llm_parallel.tune.ppo import load_beside, network_beside
from llm_parallel.tune.round_batches import Rows, Text
from llm_parallel.tune.round_files import Answered
from llm_parallel.tune.score import outputs_of_rows

REWARD = "reward"
"""What the names of the models that judge begin with, among those of a run that are not trained."""
Values = Mapping[int, float]
"""What reward models say of one answer, by the number of the judge."""


class RewardModels:
    """The judges of a run that are reward models. Each is loaded when it is asked first. ``pad``: a token for what is
    no text."""

    def __init__(self, run: Run, pad: int) -> None:
        self._run, self._pad = run, pad
        judges = enumerate(run.config.method.rollout.judges)
        self._folders = {number: judge.folder for number, judge in judges if judge.kind == "reward_model"}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._folders)

    def values(self, answers: Sequence[tuple[Prompt, Answered]]) -> list[Values]:
        """What each model says of each prompt with its answer, at the last token, in the order in which they are given.
        The answers must be the same on every process. Collective."""
        run = self._run
        if not answers or not self:
            return [{} for _ in answers]
        # The value of a text stands where its last token is read. So that one gets a label, which is not looked at.
        texts = [Text((*prompt.tokens, *answer.tokens), (self._pad,), {}) for prompt, answer in answers]
        length = run.config.data.seq_length_tokens
        if max(text.length for text in texts) > length:  # by the one token
            length += 2 * run.layout.cp * run.layout.tp
        rows = Rows.pack(texts, length)
        found = {
            number: outputs_of_rows(self._network(number), rows, run.layout, self._pad) for number in self._folders
        }
        return [{number: float(said[place][0]) for number, said in found.items()} for place in range(len(texts))]

    def _network(self, number: int) -> Network:
        name, path, run = f"{REWARD} {number}", self._folders[number], self._run
        assert path is not None
        if name not in run.besides:
            network = network_beside(run.config, model_in(path), run.groups, adapter_in(path))
            for text in load_beside(path, network, run.config.checkpoint.verify):
                run.metrics.message(text)
            network.set_training(False)
            run.besides[name] = network
        return run.besides[name]
