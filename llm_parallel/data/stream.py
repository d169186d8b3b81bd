"""One source of text as an endless sequence of samples, each found without reading those before it.

The documents of an epoch are shuffled and concatenated, lap follows lap, and sample window k covers tokens
[k L, k L + L] of that stream, so each token of a lap is predicted exactly once. The windows that begin in one lap are
shuffled among themselves. Both shuffles are permutations keyed by (seed, source, epoch), so nothing is stored but one
small index per epoch in use (csrc/epoch.h). A lap is an epoch, unless the stream goes on where one with other settings
stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llm_parallel import _C
from llm_parallel.data.epochs import Epochs, derive_key
from llm_parallel.errors import UserError


@dataclass(frozen=True)
class Run:
    """Tokens [start, start + length) of epoch ``number``."""

    epochs: Epochs
    number: int
    start: int
    length: int

    def followed_by(self, other: Run) -> bool:
        """Whether the other run begins where this one ends."""
        return (self.epochs, self.number, self.start + self.length) == (other.epochs, other.number, other.start)


@dataclass(frozen=True)
class Window:
    """tokens, labels: int64 [L]. int32 positions in [0, L): ``starts``, where a document or a part of one begins
    (position 0 is not listed); ``crossings``, whose label belongs to another document; ``excluded``, whose label must
    not be learned since its document is held out."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    starts: NDArray[np.int32]
    crossings: NDArray[np.int32]
    excluded: NDArray[np.int32]


class Lap(Protocol):
    """Tokens of one epoch, numbered from 0 in the epoch's order."""

    @property
    def number(self) -> int:
        """Number of the epoch."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""

    def runs(self, start: int, length: int) -> list[Run]:
        """The runs that make up tokens [start, start + length) of the lap."""


@dataclass(frozen=True)
class Tail:
    """An epoch from token ``offset`` on."""

    epochs: Epochs
    number: int
    offset: int = 0

    @property
    def tokens(self) -> int:
        """See ``Lap``."""
        return self.epochs.tokens - self.offset

    def runs(self, start: int, length: int) -> list[Run]:
        """See ``Lap``."""
        return [Run(self.epochs, self.number, self.offset + start, length)]


class Remainder:
    """What windows have left of a lap: it is cut at ``first``, ``first + length`` and so on, and ``left`` numbers the
    windows that were not taken. Windows stand in the lap's order, so that neighbours stay together; the last one ends
    with the lap."""

    def __init__(self, lap: Lap, first: int, length: int, left: _C.Rest) -> None:
        self.number = lap.number
        self._lap, self._first, self._length, self._left = lap, first, length, left
        end = first + (left.element(left.count - 1) + 1) * length if left.count else 0
        self.tokens = left.count * length - max(0, end - lap.tokens)

    def runs(self, start: int, length: int) -> list[Run]:
        """See ``Lap``."""
        found: list[Run] = []
        while length:
            place, inside = divmod(start, self._length)
            begin = self._first + self._left.element(place) * self._length + inside
            taken = min(length, self._length - inside, self._lap.tokens - begin)
            found += self._lap.runs(begin, taken)
            start, length = start + taken, length - taken
        return found


class Stream:
    """Samples of ``length`` + 1 tokens. ``before``: laps that come before whole epochs from number ``epoch`` on;
    ``turn``: how often the settings of the source changed before.

    Raises UserError if an epoch has too few tokens for one sample.
    """

    def __init__(self, epochs: Epochs, length: int, before: Sequence[Lap] = (), epoch: int = 0, turn: int = 0) -> None:
        self.epochs, self.length = epochs, length
        self._before, self._epoch, self._turn = tuple(before), epoch, turn
        self._starts = list(accumulate((lap.tokens for lap in self._before), initial=0))
        if epochs.tokens <= length:
            raise UserError(self._too_short())

    @property
    def tokens(self) -> int:
        """Tokens of a whole epoch."""
        return self.epochs.tokens

    def read(self, number: int) -> Window:
        """Sample ``number``, from 0."""
        lap, first, last = self._windows_of(self._lap_at(number * self.length))
        place = number - first
        if self.epochs.shuffled:
            key = derive_key(self.epochs.key, self._lap(lap).number, 1 + self._turn)
            place = _C.permute(place, last - first, key)
        return self._window(lap, (first + place) * self.length - self._start(lap))

    def continued(self, taken: int, epochs: Epochs, length: int) -> Stream:
        """The stream after the first ``taken`` samples of this one, with samples of another length.

        Every token of the epoch in use that they left comes once, and then follow whole epochs; if ``epochs`` differ
        from this stream's, these are theirs, and tokens of the first of them that a window took already come again,
        which are fewer than ``length`` of this stream and of each before it."""
        lap, first, last = self._windows_of(self._lap_at(taken * self.length))
        here = self._lap(lap)
        key = derive_key(self.epochs.key, here.number, 1 + self._turn)
        left = _C.Rest(last - first, key, taken - first)
        rest = Remainder(here, first * self.length - self._start(lap), self.length, left)
        # The last window runs into the next lap; if it was taken, so were those tokens.
        last_is_left = left.element(left.count - 1) == last - first - 1
        position = self._start(lap + 1) if last_is_left else last * self.length
        following = self._lap_at(position)
        after = self._lap(following)
        before: list[Lap] = [rest]
        epoch = after.number
        if epochs is self.epochs:
            assert isinstance(after, Tail)
            before.append(replace(after, offset=after.offset + position - self._start(following)))
            epoch += 1
        return Stream(epochs, length, before, epoch, self._turn + 1)

    def left_after(self, taken: int) -> tuple[int, int, float]:
        """After ``taken`` samples: number of the epoch in use, from 0; about how many of its tokens no sample had; and
        the expected length in tokens of the parts between those that were taken."""
        lap, first, last = self._windows_of(self._lap_at(taken * self.length))
        left = self._start(lap + 1) - max(taken * self.length, self._start(lap))
        parts = 1 + (taken - first) * (last - taken) / (last - first)
        return self._lap(lap).number, left, left / parts

    def _lap(self, lap: int) -> Lap:
        if lap < len(self._before):
            return self._before[lap]
        return Tail(self.epochs, self._epoch + lap - len(self._before))

    def _start(self, lap: int) -> int:
        """Tokens before a lap."""
        whole = max(0, lap - len(self._before))
        return self._starts[min(lap, len(self._before))] + whole * self.tokens

    def _lap_at(self, token: int) -> int:
        """The lap that holds a token."""
        for lap in range(len(self._before)):
            if token < self._starts[lap + 1]:
                return lap
        return len(self._before) + (token - self._starts[-1]) // self.tokens

    def _windows_of(self, lap: int) -> tuple[int, int, int]:
        """A lap, the first window that begins in it, and the first that begins after it."""
        return lap, -(-self._start(lap) // self.length), -(-self._start(lap + 1) // self.length)

    def _window(self, lap: int, start: int) -> Window:
        """``length`` tokens and their labels, from token ``start`` of a lap on."""
        tokens, labels = [], []
        starts: list[int] = []
        crossings: list[int] = []
        excluded: list[int] = []
        filled = 0
        runs = self._runs(lap, start, self.length + 1)
        for run, following in zip(runs, [*runs[1:], None]):
            inside = min(run.length, self.length - filled)
            if not inside:  # the token after the window, which is but a label
                break
            starts.append(filled)
            text = np.empty(inside + 1, np.int64)
            ends_epoch = run.start + inside == run.epochs.tokens
            at = 0
            for document, begin, count in run.epochs.pieces(run.number, run.start, inside + (not ends_epoch)):
                text[at : at + count] = run.epochs.file.tokens(document, begin, count)
                if at:
                    if at < inside:
                        starts.append(filled + at)
                    crossings.append(filled + at - 1)
                if run.epochs is not self.epochs and not self.epochs.selection.contains(document):
                    excluded.extend(range(filled + max(at - 1, 0), filled + at + count - 1))
                at += count
            if ends_epoch:
                assert following is not None
                text[-1] = _first_token(following)
                crossings.append(filled + inside - 1)
            tokens.append(text[:-1])
            labels.append(text[1:])
            filled += inside
        assert filled == self.length
        one = len(tokens) == 1
        return Window(
            tokens[0] if one else np.concatenate(tokens),
            labels[0] if one else np.concatenate(labels),
            np.array(starts[1:], np.int32),
            np.array(crossings, np.int32),
            np.array(excluded, np.int32),
        )

    def _runs(self, lap: int, start: int, length: int) -> list[Run]:
        """The runs of ``length`` tokens from token ``start`` of a lap on, as long as they can be."""
        found: list[Run] = []
        while length:
            here = self._lap(lap)
            taken = min(length, here.tokens - start)
            for run in here.runs(start, taken) if taken else ():
                if found and found[-1].followed_by(run):
                    found[-1] = replace(found[-1], length=found[-1].length + run.length)
                else:
                    found.append(run)
            lap, start, length = lap + 1, 0, length - taken
        return found

    def _too_short(self) -> str:
        file, selection = self.epochs.file, self.epochs.selection
        need = f"fewer than one sample needs (data.seq_length_tokens + 1 = {self.length + 1})"
        if selection.part == "eval":
            return (
                f"data.eval_fraction={selection.fraction:g} holds {self.tokens} tokens of {file.prefix} out "
                f"for evaluation, {need}; hold out more, set it to 0, or name held-out files in data.eval"
            )
        return f"{file.prefix} has {self.tokens} tokens to use, {need}; add text" + (
            f" or lower data.seq_length_tokens to at most {self.tokens - 1}" if self.tokens > 1 else ""
        )


def _first_token(run: Run) -> int:
    ((document, begin, _),) = run.epochs.pieces(run.number, run.start, 1)
    return int(run.epochs.file.tokens(document, begin, 1)[0])
