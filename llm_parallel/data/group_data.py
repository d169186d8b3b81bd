"""Preferences as files of tokens: written once by the process that starts a run, read by all of its processes.

A folder holds the files of ``chat_data.py``, with a document for each answer, which begins with its prompt, and for
each answer ``groups.bin`` (int64, the number of its group; answers of a group follow each other), ``scores.bin`` and
``margins.bin`` (fp32). The answers of a group share a sample.

Where a method needs answers to other prompts (``objectives/kto.py``), answer i's prompt is put before the answer of
another one, which follows from the data alone; the log-probabilities of these texts stand in files behind those of the
answers themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.chat_data import HOLD_OUT, ChatData, Split, hashed
from llm_parallel.data.group_rows import prompt_length
from llm_parallel.data.pack import Packer
from llm_parallel.data.samples import Sample
from llm_parallel.data.stream import derive_key
from llm_parallel.errors import UserError

COLUMNS: Mapping[str, Any] = {
    "weights": np.float32, "sources": np.int32, "lines": np.int64,
    "groups": np.int64, "scores": np.float32, "margins": np.float32,
}  # fmt: skip
"""Files beside the tokens: ``weights`` for each token, the others for each answer."""
MISMATCHED = ("kto",)
"""Methods that need answers to other prompts."""
VALUED = ("reward",)
"""Methods whose model reads an answer to its last token, and says one number there."""


@dataclass(frozen=True)
class GroupData:
    """The preferences of a run as tokens. chat: the answers as conversations; groups: int64, the group of each answer;
    scores, margins: fp32 of each answer; reference: fp32, a log-probability for every token of every answer and then of
    every mismatched one, where those are known."""

    chat: ChatData
    groups: NDArray[np.int64]
    scores: NDArray[np.float32]
    margins: NDArray[np.float32]
    reference: NDArray[np.float32] | None = None

    @classmethod
    def open(cls, folder: str | Path) -> GroupData:
        """Opens a folder that ``prepare_groups`` wrote. Raises UserError if it is damaged."""
        chat = ChatData.open(folder)
        found: list[Any] = []
        for name in ("groups", "scores", "margins"):
            path = Path(folder) / f"{name}.bin"
            size = path.stat().st_size if path.is_file() else -1
            if size != chat.tokens.num_documents * np.dtype(COLUMNS[name]).itemsize:
                raise UserError(f"{path} is missing or damaged; remove {folder} and start again")
            found.append(np.memmap(path, COLUMNS[name], "r"))
        return cls(chat, *found)

    @property
    def report(self) -> dict[str, Any]:
        """What ``report.json`` holds."""
        return self.chat.report

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.chat.folder

    @property
    def method(self) -> str:
        """What the data were prepared for."""
        return self.report["method"]

    def with_reference(self, values: NDArray[np.float32]) -> GroupData:
        """The data with log-probabilities of a reference."""
        assert len(values) == self.num_values
        return replace(self, reference=values)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return int(self.groups[-1]) + 1

    @property
    def num_values(self) -> int:
        """Tokens of all answers, and of all mismatched ones: the numbers that a column of log-probabilities has."""
        return self.chat.tokens.num_tokens + (int(self._mismatched_starts[-1]) if self.mismatches else 0)

    @property
    def mismatches(self) -> bool:
        """Whether the method needs answers to other prompts."""
        return self.method in MISMATCHED

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """Number of the first answer of each group, and the number of all answers."""
        begins = np.nonzero(np.diff(self.groups, prepend=-1))[0]
        return np.append(begins, len(self.groups))

    @cached_property
    def held_out_groups(self) -> NDArray[np.bool_]:
        """Whether each group is held out; groups of one record are together."""
        firsts = self.firsts[:-1]
        sources, lines = np.asarray(self.chat.sources)[firsts], np.asarray(self.chat.lines)[firsts]
        if len(self.report["weights"]) < len(self.report["files"]):
            return sources >= len(self.report["weights"])
        held = np.zeros(len(firsts), np.bool_)
        for source in np.unique(sources).tolist():
            members = np.nonzero(sources == source)[0]
            records = np.unique(lines[members])
            count = round(self.report["eval_fraction"] * len(records))
            chosen = records[np.argsort(hashed(records, derive_key(HOLD_OUT)), kind="stable")[:count]]
            held[members] = np.isin(lines[members], chosen)
        return held

    def numbers(self, split: Split) -> NDArray[np.int64]:
        """Numbers of the groups that are trained on, or held out."""
        held = self.held_out_groups
        return np.nonzero(held if split == "eval" else ~held)[0]

    def training(self, seed: int) -> GroupSamples:
        """Training samples without end, in an order that follows from the seed. Raises UserError if there are none."""
        numbers = self.numbers("train")
        if not len(numbers):
            raise UserError(
                f"chat.eval_fraction = {self.report['eval_fraction']} holds all preferences out, and none is left to "
                "train on; set it to 0 or give more"
            )
        return self._samples(numbers, seed, shuffled=True)

    def held_out(self) -> GroupSamples:
        """Held-out samples in a random order, the same one again when all have been seen."""
        return self._samples(self.numbers("eval"), 0, shuffled=False)

    def everything(self) -> GroupSamples:
        """Samples that hold every group once."""
        return self._samples(np.arange(self.num_groups), 0, shuffled=False)

    @cached_property
    def held_out_rows(self) -> int:
        """Samples that hold each held-out group once."""
        return self.held_out().packer.samples_of(0) if len(self.numbers("eval")) else 0

    @cached_property
    def liked(self) -> tuple[int, int]:
        """Training answers with a score over 0.5, and the others."""
        trained = np.repeat(~self.held_out_groups, np.diff(self.firsts))
        good = int((np.asarray(self.scores)[trained] > 0.5).sum())
        return good, int(trained.sum()) - good

    def answer(self, number: int) -> tuple[NDArray[Any], NDArray[np.float32], slice]:
        """Ids and weights of an answer's tokens, and their places in a column of log-probabilities."""
        ids, weights = self.chat.conversation(number)
        start = int(self._starts[number])
        return ids, weights, slice(start, start + len(ids))

    def mismatched(self, number: int) -> tuple[NDArray[Any], NDArray[np.float32], slice]:
        """The same of answer ``number``'s prompt with the answer to another one, of which the end is left out if it
        does not fit a sample."""
        own, weights = self.chat.conversation(number)
        other, others = self.chat.conversation(int(self._donors[number]))
        mine, theirs = prompt_length(weights), prompt_length(others)
        start, end = (int(self._mismatched_starts[place]) for place in (number, number + 1))
        ids = np.concatenate((own[:mine], other[theirs:]))[: end - start]
        joined = np.concatenate((weights[:mine], others[theirs:]))[: end - start]
        base = self.chat.tokens.num_tokens
        return ids, joined, slice(base + start, base + end)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        lengths = self.chat.tokens.document_lengths.astype(np.int64)
        return np.cumsum(lengths) - lengths

    @cached_property
    def _prompts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each answer the length of its prompt, and a number that is the same for the same prompt."""
        lengths = np.empty(len(self.groups), np.int64)
        known: dict[bytes, int] = {}
        same = np.empty(len(self.groups), np.int64)
        for number in range(len(self.groups)):
            ids, weights = self.chat.conversation(number)
            lengths[number] = prompt_length(weights)
            same[number] = known.setdefault(ids[: lengths[number]].tobytes(), len(known))
        return lengths, same

    @cached_property
    def _donors(self) -> NDArray[np.int64]:
        """For each answer the one whose text is put after its prompt: the same number of places before it, which is so
        large that answers to one prompt that follow each other have another's; where the prompt is the same by chance,
        the next one before that with another."""
        same = self._prompts[1]
        if len(np.unique(same)) == 1:
            raise UserError(
                "method.kind = kto compares with answers to other prompts, and all records have the same prompt; give "
                "records with several"
            )
        edges = np.nonzero(np.diff(same, prepend=-1))[0]
        step = int(np.diff(np.append(edges, len(same))).max())
        donors = (np.arange(len(same)) - step) % len(same)
        while len(wrong := np.nonzero(same[donors] == same)[0]):
            donors[wrong] = (donors[wrong] - 1) % len(same)
        return donors

    @cached_property
    def _mismatched_starts(self) -> NDArray[np.int64]:
        """Where each mismatched answer begins behind the answers, and where the last one ends."""
        prompts = self._prompts[0]
        answers = self.chat.tokens.document_lengths.astype(np.int64) - prompts
        lengths = np.minimum(prompts + answers[self._donors], self.report["seq_length"] + 1)
        return np.concatenate(([0], np.cumsum(lengths)))

    def _samples(self, numbers: NDArray[np.int64], seed: int, shuffled: bool) -> GroupSamples:
        lengths = self.chat.tokens.document_lengths.astype(np.int64) - 1 + int(self.method in VALUED)
        if self.mismatches:
            lengths = np.maximum(lengths, np.diff(self._mismatched_starts) - 1)
        by_group = np.add.reduceat(lengths, self.firsts[:-1])
        packer = Packer(
            by_group[numbers],
            self.report["seq_length"],
            seed,
            sources=np.asarray(self.chat.sources, np.int64)[self.firsts[:-1]][numbers],
            weights=self.report["weights"] if shuffled else [1.0] * len(self.report["files"]),
            together=self.report["packing"] == "best_fit",
            shuffled=shuffled,
        )
        return GroupSamples(self, numbers, packer)


class GroupSamples:
    """Samples by number (see ``loader.Samples``): the answers of whole groups one after the other, which do not see
    each other, then padding of weight 0. Facts: ``group``, the number of an answer's group within the sample from 1,
    ``score`` and ``margin``; the column ``reference`` where that is known."""

    isolate = True

    def __init__(self, data: GroupData, numbers: NDArray[np.int64], packer: Packer) -> None:
        self._data, self._numbers, self.packer = data, numbers, packer
        self._length, self._pad = data.report["seq_length"], data.report["pad"]

    @property
    def offers(self) -> tuple[str, ...]:
        """Columns and facts that the samples have."""
        reference = ("reference",) if self._data.reference is not None else ()
        return (*reference, "group", "score", "margin", *(("mismatched",) if self._data.mismatches else ()))

    def answers(self, number: int) -> list[int]:
        """Numbers of the answers that share a sample, group after group."""
        firsts = self._data.firsts
        groups = self._numbers[self.packer.sample(number)].tolist()
        return [answer for group in groups for answer in range(int(firsts[group]), int(firsts[group + 1]))]

    def places(self, number: int, mismatched: bool = False) -> list[tuple[slice, slice]]:
        """For each text of a sample: positions of its labels, and their places in a column of log-probabilities."""
        found, at = [], 0
        for answer in self.answers(number):
            ids, _, place = self._data.mismatched(answer) if mismatched else self._data.answer(answer)
            found.append((slice(at, at + len(ids) - 1), slice(place.start + 1, place.stop)))
            at += len(ids) - 1
        return found

    def sample(self, number: int) -> Sample:
        """Sample ``number``, from 0."""
        answers, data = self.answers(number), self._data
        found = self._row([data.answer(answer) for answer in answers])
        facts = {
            "group": np.cumsum(np.diff(data.groups[answers], prepend=-1) != 0),
            "score": data.scores[answers],
            "margin": data.margins[answers],
        }
        padding = np.zeros(len(found.document_starts) - len(answers), np.float32)
        whole = {name: np.append(values, padding).astype(np.float32) for name, values in facts.items()}
        beside = self._row([data.mismatched(answer) for answer in answers]) if data.mismatches else None
        return replace(found, facts=whole, mismatched=beside)

    def _row(self, texts: Sequence[tuple[NDArray[Any], NDArray[np.float32], slice]]) -> Sample:
        valued, reference = self._data.method in VALUED, self._data.reference
        tokens = np.full(self._length, self._pad, np.int64)
        labels = np.full(self._length, self._pad, np.int64)
        weights, column = np.zeros(self._length, np.float32), np.zeros(self._length, np.float32)
        starts, at = [], 0
        for ids, own, place in texts:
            part = slice(at, at + len(ids) - 1)
            # The last token is a label only, unless the model says its value after reading it.
            tokens[part], labels[part] = ids[:-1], ids[1:]
            if valued:
                tokens[part.stop], weights[part.stop] = ids[-1], 1.0
            else:
                weights[part] = own[1:]
            if reference is not None:
                column[part] = reference[place.start + 1 : place.stop]
            starts.append(at)
            at = part.stop + int(valued)
        if at < self._length:
            starts.append(at)
        columns = {} if reference is None else {"reference": column}
        return Sample(tokens, labels, weights, np.array(starts, np.int32), columns)
