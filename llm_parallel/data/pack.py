"""Which conversations share a sample: best-fit decreasing over the lengths of an epoch, the same however often it is
asked for.

All samples of an epoch are planned at once. Conversations of the same length change places from epoch to epoch, and so
do the samples; both follow from the seed and the epoch's number alone, so that a run that was stopped goes on with the
sample that comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_parallel import _C
from llm_parallel.data.stream import derive_key
from llm_parallel.errors import UserError

ORDER, ROWS, PHASE = 1, 2, 3
"""The uses of a derived key."""
CACHED_EPOCHS = 2
LEAST_IN_EPOCH, MOST_IN_EPOCH = 1e-3, 1 << 28
"""Conversations of an epoch, each as often as it is seen: with fewer, most epochs are empty and each is looked through;
planning so many takes about 10 GB."""


@dataclass(frozen=True)
class Plan:
    """Samples of one epoch: sample i holds the conversations ``items[starts[i] : starts[i + 1]]``."""

    items: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """The conversations of a sample."""
        return self.items[self.starts[number] : self.starts[number + 1]]


def best_fit(counts: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best-fit decreasing: longest first, each into the sample with the least room that holds it.

    counts[l]: how many items have length l, from 1 to ``size``. Returns for each item, longest first, its sample, int64
    [items], and the number of items of each sample, int64 [samples].

    Samples with the same room are filled together: a sample that takes one item of a length takes as many of that
    length as fit before another sample is looked at, so each length visits each amount of room at most once.
    """
    room: dict[int, list[NDArray[np.int64]]] = {}
    placed: list[NDArray[np.int64]] = []
    samples = 0
    for length in np.nonzero(counts)[0][::-1].tolist():
        left = int(counts[length])
        for free in sorted(free for free in room if free >= length):
            if not left:
                break
            bins = np.concatenate(room.pop(free))
            each = free // length
            full, rest = divmod(left, each)
            taken = bins[:full]
            placed.append(np.repeat(taken, each))
            _put(room, free - each * length, taken)
            left -= each * len(taken)
            if len(bins) > full:
                if rest:
                    placed.append(np.repeat(bins[full : full + 1], rest))
                    _put(room, free - rest * length, bins[full : full + 1])
                    left = 0
                _put(room, free, bins[full + bool(rest) :])
        if left:
            each = size // length
            full, rest = divmod(left, each)
            opened = np.arange(samples, samples + full + bool(rest))
            samples += len(opened)
            placed.append(np.repeat(opened[:full], each))
            _put(room, size - each * length, opened[:full])
            if rest:
                placed.append(np.repeat(opened[full:], rest))
                _put(room, size - rest * length, opened[full:])
    of_items = np.concatenate(placed) if placed else np.zeros(0, np.int64)
    return of_items, np.bincount(of_items, minlength=samples)


def _put(room: dict[int, list[NDArray[np.int64]]], free: int, samples: NDArray[np.int64]) -> None:
    if free and len(samples):
        room.setdefault(free, []).append(samples)


def shuffled(size: int, key: int) -> NDArray[np.int64]:
    """``range(size)`` in a random order that depends on the uint64 ``key`` alone: SplitMix64's numbers, sorted."""
    with np.errstate(over="ignore"):
        x = (np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


class Packer:
    """The endless sequence of samples of a set of conversations.

    lengths: of each conversation, from 1 to ``size``; sources and weights: how often a conversation of a source is seen
    in one epoch. With whole weights every epoch has the same number of samples. With a weight of k + f every epoch has
    k times all and another share f of the source's conversations: over n epochs each is seen floor or ceil of n (k + f)
    times, and the number of samples of an epoch follows from the lengths of those it has. ``together``: several
    conversations share a sample; ``shuffled``: False keeps one order, the same in every epoch. That is a random one
    too, since the plan begins with the longest conversations, and files with one source: the first samples stand for
    all.

    Raises UserError on weights with which an epoch has no conversation, or more than can be planned."""

    def __init__(
        self,
        lengths: NDArray[np.int64],
        size: int,
        seed: int,
        *,
        sources: NDArray[np.int64] | None = None,
        weights: Sequence[float] = (1.0,),
        together: bool = True,
        shuffled: bool = True,
    ) -> None:
        assert len(lengths) and int(lengths.min()) >= 1 and int(lengths.max()) <= size, "lengths"
        self._lengths, self._size, self._seed = np.asarray(lengths, np.int64), size, seed
        self._together, self._shuffled = together, shuffled
        self._per_epoch = np.asarray(weights, np.float64)[sources if sources is not None else 0]
        if sources is None:
            self._per_epoch = np.full(len(lengths), float(weights[0]))
        seen = float(self._per_epoch.sum())
        if shuffled and not LEAST_IN_EPOCH <= seen <= MOST_IN_EPOCH:
            raise UserError(
                f"chat.train.N.weight, of each source, lets an epoch see {seen:.3g} conversations, of the "
                f"{len(lengths):,} that there are; give weights with which it sees from 1 to {MOST_IN_EPOCH:,}"
            )
        whole = bool((self._per_epoch == np.floor(self._per_epoch)).all())
        self._constant = whole or not shuffled
        self._phase = None if self._constant else self._phases(sources)
        self._pattern: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._ends: list[int] = []
        self._plans: dict[int, Plan] = {}

    def samples_of(self, epoch: int) -> int:
        """Number of samples of an epoch."""
        return self._end(epoch) - (self._end(epoch - 1) if epoch else 0)

    def samples_before(self, epochs: float) -> int:
        """Number of samples of so many epochs, rounded up within the last."""
        whole = int(epochs)
        before = self._end(whole - 1) if whole else 0
        part = epochs - whole
        return before + (int(np.ceil(round(part * self.samples_of(whole), 6))) if part else 0)

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch of sample ``number``, and its number within the epoch."""
        if self._constant:
            return divmod(number, self._end(0))
        while not self._ends or self._ends[-1] <= number:
            self._end(len(self._ends))
        epoch = int(np.searchsorted(self._ends, number, "right"))
        return epoch, number - (self._ends[epoch - 1] if epoch else 0)

    def sample(self, number: int) -> NDArray[np.int64]:
        """Conversations that share sample ``number``."""
        epoch, place = self.locate(number)
        plan = self.plan(epoch)
        key = derive_key(self._seed, epoch if self._shuffled else 0, ROWS)
        return plan.row(_C.permute(place, len(plan), key))

    def filled(self, number: int) -> int:
        """Sum of the lengths of the conversations that share sample ``number``."""
        return int(self._lengths[self.sample(number)].sum())

    def plan(self, epoch: int) -> Plan:
        """All samples of an epoch, before they are shuffled."""
        epoch = epoch if self._shuffled else 0
        if epoch not in self._plans:
            while len(self._plans) >= CACHED_EPOCHS:
                del self._plans[min(self._plans)]
            self._plans[epoch] = self._made(epoch)
        return self._plans[epoch]

    def _end(self, epoch: int) -> int:
        """Number of samples of the epochs up to this one."""
        if self._constant:
            if not self._ends:
                self._ends = [len(self.plan(0))]
            return self._ends[0] * (epoch + 1)
        while len(self._ends) <= epoch:
            taken = self.copies(len(self._ends))
            if self._together:
                counts = np.bincount(self._lengths, weights=taken, minlength=self._size + 1)
                samples = len(best_fit(np.rint(counts).astype(np.int64), self._size)[1])
            else:
                samples = int(taken.sum())
            self._ends.append(samples + (self._ends[-1] if self._ends else 0))
        return self._ends[epoch]

    def copies(self, epoch: int) -> NDArray[np.int64]:
        """How often each conversation is in an epoch."""
        if self._phase is None:
            return np.maximum(np.rint(self._per_epoch), 1).astype(np.int64)
        before = np.floor(epoch * self._per_epoch + self._phase)
        return (np.floor((epoch + 1) * self._per_epoch + self._phase) - before).astype(np.int64)

    def _phases(self, sources: NDArray[np.int64] | None) -> NDArray[np.float64]:
        """For each conversation a number of [0, 1), evenly spread over those of its source in a random order."""
        found = np.empty(len(self._lengths))
        of = np.zeros(len(found), np.int64) if sources is None else sources
        for source in np.unique(of).tolist():
            members = np.nonzero(of == source)[0]
            order = shuffled(len(members), derive_key(self._seed, PHASE, source))
            found[members[order]] = (np.arange(len(members)) + 0.5) / len(members)
        return found

    def _made(self, epoch: int) -> Plan:
        items = np.repeat(np.arange(len(self._lengths)), self.copies(epoch))
        if self._shuffled:
            items = items[shuffled(len(items), derive_key(self._seed, epoch, ORDER))]
        if not self._together:
            return Plan(items, np.arange(len(items) + 1))
        order = items[np.argsort(-self._lengths[items], kind="stable")]
        pattern = self._pattern
        if pattern is None:
            of_items, per_sample = best_fit(np.bincount(self._lengths[items], minlength=self._size + 1), self._size)
            pattern = np.argsort(of_items, kind="stable"), np.concatenate([[0], np.cumsum(per_sample)])
            self._pattern = pattern if self._constant else None
        return Plan(order[pattern[0]], pattern[1])
