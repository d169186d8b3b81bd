"""Conversations as files of tokens: written once by the process that starts a run, read by all of its processes.

A folder holds ``tokens.bin`` and ``tokens.idx`` (a document for each conversation, see ``indexed.py``), ``weights.bin``
(fp32, the weight of each token as a label), ``sources.bin`` (int32, the source of each conversation), ``lines.bin``
(int64, the number of its record in the source) and ``report.json`` (what was done). Its name is a hash of all that the
content depends on, so that the same conversations are prepared once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.chat import ChatEncoder
from llm_parallel.data.chat_tokens import ChatTokenizer
from llm_parallel.data.indexed import TokenFile
from llm_parallel.data.pack import Packer
from llm_parallel.data.samples import Sample
from llm_parallel.data.stream import derive_key
from llm_parallel.data.template import ChatTemplate, Refused
from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError

REPORT = "report.json"
HOLD_OUT = 1
"""The use of a derived key: which conversations are held out."""
Split = Literal["train", "eval"]


@dataclass(frozen=True)
class ChatData:
    """The conversations of a run as tokens. ``report``: what ``report.json`` holds; ``weights``: fp32 [tokens], of each
    token as a label; ``sources``, int32, and ``lines``, int64, of each conversation: its source in ``source_names`` and
    the number of its record there; ``stops``: ids of the tokens that end answers."""

    folder: Path
    report: dict[str, Any]
    tokens: TokenFile
    weights: NDArray[np.float32]
    sources: NDArray[np.int32]
    lines: NDArray[np.int64]

    @classmethod
    def open(cls, folder: str | Path) -> ChatData:
        """Opens a folder that ``prepare_conversations`` wrote. Raises UserError if it is damaged."""
        folder = Path(folder)
        try:
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / REPORT} cannot be read ({error}); remove {folder} and start again") from None
        tokens = TokenFile(folder / "tokens")
        columns = {
            "weights.bin": (np.float32, tokens.num_tokens),
            "sources.bin": (np.int32, tokens.num_documents),
            "lines.bin": (np.int64, tokens.num_documents),
        }
        found: list[Any] = []
        for name, (dtype, count) in columns.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else -1
            if size != count * np.dtype(dtype).itemsize:
                raise UserError(f"{path} is missing or damaged; remove {folder} and start again")
            found.append(np.memmap(path, dtype, "r"))
        return cls(folder, report, tokens, *found)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources of training, as metrics have them."""
        return tuple(self.report["source_names"])

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids of the tokens at which the model has to stop, the one that ends the answers here first."""
        return tuple(self.report["stops"])

    @cached_property
    def rows_per_epoch(self) -> int:
        """Samples of one pass over the training conversations; where a source has a fractional weight, of the first."""
        return self.training(0).packer.samples_of(0)

    @cached_property
    def held_out_rows(self) -> int:
        """Samples that hold each held-out conversation once."""
        return self.held_out().packer.samples_of(0) if len(self.numbers("eval")) else 0

    def numbers(self, split: Split) -> NDArray[np.int64]:
        """Numbers of the conversations that are trained on, or held out."""
        held = self._held_out
        return np.nonzero(held if split == "eval" else ~held)[0]

    def training(self, seed: int) -> ChatSamples:
        """Training samples without end, in an order that follows from the seed. Raises UserError if there are none."""
        numbers = self.numbers("train")
        if not len(numbers):
            raise UserError(
                f"chat.eval_fraction = {self.report['eval_fraction']} holds all conversations out, and none is left to "
                "train on; set it to 0 or give more conversations"
            )
        return self._samples(numbers, seed, shuffled=True)

    def held_out(self) -> ChatSamples:
        """Held-out samples in a random order, the same one again when all have been seen."""
        return self._samples(self.numbers("eval"), 0, shuffled=False)

    def questions(self, most: int) -> list[list[int]]:
        """Tokens of held-out conversations up to the last answer, of at most so many of them."""
        found = []
        for number in self.numbers("eval")[:most].tolist():
            ids, weights = self.conversation(number)
            silent = np.nonzero(weights == 0)[0]
            found.append(ids[: int(silent[-1]) + 1].tolist())
        return found

    def encode_prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """Tokens of questions as the user's turn, up to where the assistant answers. Raises UserError if the template
        refuses one."""
        if not questions:
            return []
        system = self.report["system"]
        first = [{"role": "system", "content": system}] if system else []
        try:
            return [self.encoder.prompt([*first, {"role": "user", "content": text}]).tolist() for text in questions]
        except Refused as error:
            raise UserError(f"the chat template refuses a question of chat.show_prompts: {error}") from None

    def conversation(self, number: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Ids and weights of a conversation's tokens."""
        start = int(self._starts[number])
        ids = self.tokens.tokens(number)
        return ids, self.weights[start : start + len(ids)]

    @cached_property
    def encoder(self) -> ChatEncoder:
        """What made these tokens."""
        report = self.report
        tokenizer = ChatTokenizer(load_tokenizer(report["tokenizer"]))
        template = ChatTemplate(
            report["template"], report["template_origin"], tokenizer.variables, date.fromisoformat(report["date"])
        )
        return ChatEncoder(tokenizer, template, report["train_on"], report["system"])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        lengths = self.tokens.document_lengths.astype(np.int64)
        return np.cumsum(lengths) - lengths

    @cached_property
    def _held_out(self) -> NDArray[np.bool_]:
        sources = np.asarray(self.sources)
        if len(self.report["weights"]) < len(self.report["files"]):
            return sources >= len(self.report["weights"])
        held = np.zeros(len(sources), np.bool_)
        for source in np.unique(sources).tolist():
            members = np.nonzero(sources == source)[0]
            count = round(self.report["eval_fraction"] * len(members))
            order = np.argsort(hashed(self.lines[members], derive_key(HOLD_OUT)), kind="stable")
            held[members[order[:count]]] = True
        return held

    def _samples(self, numbers: NDArray[np.int64], seed: int, shuffled: bool) -> ChatSamples:
        weights = self.report["weights"] if shuffled else [1.0] * len(self.report["files"])
        packer = Packer(
            self.tokens.document_lengths[numbers].astype(np.int64) - 1,
            self.report["seq_length"],
            seed,
            sources=np.asarray(self.sources[numbers], np.int64),
            weights=weights,
            together=self.report["packing"] == "best_fit",
            shuffled=shuffled,
        )
        return ChatSamples(self, numbers, packer)


class ChatSamples:
    """Samples by number (see ``loader.Samples``): whole conversations one after the other, which do not see each other,
    then padding of weight 0. The column ``source`` holds the source of each label."""

    isolate = True

    def __init__(self, data: ChatData, numbers: NDArray[np.int64], packer: Packer) -> None:
        self._data, self._numbers, self.packer = data, numbers, packer
        self._length, self._pad = data.report["seq_length"], data.report["pad"]

    def conversations(self, number: int) -> list[int]:
        """Numbers of the conversations that share a sample."""
        return self._numbers[self.packer.sample(number)].tolist()

    def sample(self, number: int) -> Sample:
        """Sample ``number``, from 0."""
        tokens = np.full(self._length, self._pad, np.int64)
        labels = np.full(self._length, self._pad, np.int64)
        weights, source = np.zeros(self._length, np.float32), np.zeros(self._length, np.float32)
        starts, at = [], 0
        for conversation in self.conversations(number):
            ids, own = self._data.conversation(conversation)
            part = slice(at, at + len(ids) - 1)
            # The last token is a label only: nothing is predicted from it.
            tokens[part], labels[part], weights[part] = ids[:-1], ids[1:], own[1:]
            source[part] = self._data.sources[conversation]
            starts.append(at)
            at = part.stop
        if at < self._length:
            starts.append(at)
        return Sample(tokens, labels, weights, np.array(starts, np.int32), {"source": source})


def hashed(numbers: NDArray[np.int64], key: int) -> NDArray[np.uint64]:
    """A number for each of ``numbers`` that looks random and follows from it and the uint64 ``key`` alone."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        return x ^ (x >> np.uint64(31))
