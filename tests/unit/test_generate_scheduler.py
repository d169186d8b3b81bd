"""The scheduler against a cache that remembers which tokens each slot was computed from, and against each request
answered alone."""

from __future__ import annotations

import random
from collections import deque
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.generate.draw import Choice
from llm_parallel.generate.pages import PagePool
from llm_parallel.generate.requests import Finished, Reason, Request, best_answers, check_fits
from llm_parallel.generate.sampling import Sampling
from llm_parallel.generate.scheduler import Limits, Part, Scheduler

PAGE, PAGES, END = 4, 12, 0


def next_token(tokens: tuple[int, ...], sample: int) -> int:
    """A model: any function of the tokens so far, which ends now and then."""
    return blake2b(bytes(tokens) + bytes([255, sample]), digest_size=2).digest()[0] % 9


def alone(request: Request, sample: int) -> tuple[int, ...]:
    tokens = request.prompt
    for _ in range(request.sampling.max_new_tokens):
        tokens += (next_token(tokens, sample),)
        if tokens[-1] in request.ends:
            break
    return tokens[len(request.prompt) :]


class Cache:
    """What the device would hold: for each slot, the tokens that its key was computed from."""

    def __init__(self, pages: int) -> None:
        self.slots: list[tuple[int, ...] | None] = [None] * (pages * PAGE)

    def run(self, parts: list[Part]) -> list[Choice]:
        """Stores the keys of all parts, as a layer does, and then reads those that each part attends to."""
        for part in parts:
            tokens = tuple(part.sequence.tokens)
            for position in range(part.start, part.start + part.count):
                self.slots[self.place(part, position)] = tokens[: position + 1]
        choices = []
        for part in parts:
            tokens = tuple(part.sequence.tokens)
            for position in range(part.start + part.count):
                assert self.slots[self.place(part, position)] == tokens[: position + 1], "another sequence's key"
            assert part.chooses == (part.start + part.count == len(tokens))
            if part.chooses:
                choices.append(Choice(next_token(tokens, part.sequence.sample), -1.0))
        return choices

    def place(self, part: Part, position: int) -> int:
        return part.sequence.pages[position // PAGE] * PAGE + position % PAGE


def check_pool(pool: PagePool, sequences: list[Any]) -> None:
    """Every page is used by exactly the sequences that list it, and none is lost."""
    users = [0] * pool.num_pages
    for sequence in sequences:
        assert len(set(sequence.pages)) == len(sequence.pages)
        for page in sequence.pages:
            users[page] += 1
    assert users == pool._users
    free, kept, used = set(pool._free.nonzero()[0].tolist()), set(pool._kept), {p for p, n in enumerate(users) if n}
    assert not (free & kept or free & used or kept & used) and len(free | kept | used) == pool.num_pages
    assert len(free) == pool._num_free


def most_urgent_waits(scheduler: Scheduler) -> bool:
    """Whether, after a round, of all sequences that are not finished the one that no other may precede neither has
    pages nor is its token being computed."""
    unfinished = [sequence for made in scheduler._siblings.values() for sequence in made]
    first = min(unfinished, key=lambda sequence: sequence.urgency, default=None)
    return first is not None and first.wave is None and not first.in_flight


requests = st.builds(
    lambda head, tail, new, n, priority: {
        "prompt": (*range(1, head + 1), *tail),
        "new": new,
        "n": n,
        "priority": priority,
    },
    st.integers(1, 14),
    st.lists(st.integers(1, 3), max_size=12),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(0, 2),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), requests), min_size=1, max_size=10),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 8),
    st.sets(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4),
    st.sets(st.integers(0, 40), max_size=2),
)
def test_every_request_is_answered_as_if_it_were_alone(
    arriving: list[tuple[int, dict]],
    waves: int,
    max_running: int,
    more: int,
    cancels: set[tuple[int, int]],
    changes: set[int],
) -> None:
    scheduler = Scheduler(Limits(PAGES, PAGE, max_running, max_running + more), waves)
    cache, made, finished, round_ = Cache(PAGES), [], [], 0
    queue, waited = deque(arriving), 0
    pending: list[tuple[list[Part], list[Choice]]] = [([], [])] * waves
    for round_ in range(4000):
        while queue and queue[0][0] <= round_:
            wanted = queue.popleft()[1]
            sampling = Sampling(max_new_tokens=wanted["new"])
            made.append(
                Request(
                    len(made), wanted["prompt"], sampling, frozenset([END]), n=wanted["n"], priority=wanted["priority"]
                )
            )
            scheduler.submit(made[-1])
        for at, number in cancels:
            if at == round_:
                scheduler.cancel(number)
        if round_ in changes:  # of the weights, which make all keys worthless
            scheduler.start_over()
            cache.slots = [None] * len(cache.slots)
        finished += scheduler.take_cancelled()
        for wave in range(waves):
            finished += scheduler.apply(*pending[wave])
            parts = scheduler.plan(wave)
            assert sum(part.count for part in parts) <= max_running + more
            assert len({part.sequence for part in parts}) == len(parts)
            # Stages run passes in the order of the plans; the answers come when the wave's turn comes again.
            pending[wave] = (parts, cache.run(parts))
            check_pool(scheduler.pool, [s for wave in scheduler._running for s in wave])
            assert scheduler.num_running <= max_running
        # Where waves share the sequences evenly, those of the other waves have to become fewer first.
        waited = waited + 1 if most_urgent_waits(scheduler) else 0
        assert waited <= (1 if waves == 1 else 46 * max_running), "the most urgent sequence waits"
        if not queue and scheduler.idle:
            break
    assert scheduler.idle, "a request starves"
    for wave in range(waves):
        assert not scheduler.apply(*pending[wave])
    assert scheduler.pool.used == 0 and scheduler.pool.available == PAGES
    assert sorted((f.number, f.sample) for f in finished) == [(r.number, n) for r in made for n in range(r.n)]
    for found in finished:
        expected = alone(made[found.number], found.sample)
        if found.reason is Reason.CANCELLED:
            assert found.tokens == expected[: len(found.tokens)] and found.truncated
        else:
            assert found.tokens == expected and len(found.log_probs) == len(expected)
            assert found.truncated == (expected[-1] != END)


def run_all(scheduler: Scheduler, cache: Cache) -> tuple[list[Finished], int]:
    """Answers to everything, and how many tokens ran."""
    finished, ran = [], 0
    while not scheduler.idle:
        parts = scheduler.plan()
        ran += sum(part.count for part in parts)
        finished += scheduler.apply(parts, cache.run(parts))
    return finished, ran


def test_answers_to_one_prompt_compute_its_pages_once() -> None:
    scheduler = Scheduler(Limits(100, PAGE, 16, 64))
    prompt = tuple([1, 2, 3] * 13 + [4])
    scheduler.submit(Request(0, prompt, Sampling(max_new_tokens=1), n=16))
    finished, ran = run_all(scheduler, Cache(100))
    assert len(finished) == 16
    assert ran == 40 + 15 * PAGE, "all but the last page, of which a token must run to choose the next one"


def test_a_prompt_that_was_answered_is_not_computed_again_until_the_weights_change() -> None:
    scheduler = Scheduler(Limits(100, PAGE, 4, 64))
    prompt = tuple([1, 2, 3] * 13 + [4])
    ran, cache = [], Cache(100)
    for number in range(3):
        if number == 2:
            scheduler.pool.forget()
        scheduler.submit(Request(number, prompt, Sampling(max_new_tokens=1)))
        ran.append(run_all(scheduler, cache)[1])
    assert ran == [40, PAGE, 40]


def test_the_salt_keeps_equal_tokens_apart() -> None:
    scheduler = Scheduler(Limits(100, PAGE, 4, 64), salt=lambda length: bytes([length > 20]))
    ran, cache = [], Cache(100)
    for number, length in enumerate((16, 20, 32, 36)):
        scheduler.submit(Request(number, (5,) * length, Sampling(max_new_tokens=1)))
        ran.append(run_all(scheduler, cache)[1])
    assert ran == [16, 4, 32, 4]


def test_a_more_urgent_request_interrupts_others() -> None:
    scheduler = Scheduler(Limits(PAGES, PAGE, 2, 8))
    for number in range(3):
        scheduler.submit(Request(number, (1, 2, 3), Sampling(max_new_tokens=20), priority=int(number == 2)))
        if number == 1:
            scheduler.apply(scheduler.plan(), [Choice(5, -1.0)] * 2)
    assert {part.sequence.request.number for part in scheduler.plan()} == {0, 2}


def test_a_more_urgent_prompt_goes_before_the_rest_of_a_long_one() -> None:
    """Of two waves too, in each of which a long prompt takes whole passes."""
    for waves in (1, 2):
        scheduler, cache = Scheduler(Limits(100, PAGE, 4, 8), waves), Cache(100)
        for number in range(waves):
            scheduler.submit(Request(number, tuple([1 + number] * 50), Sampling(max_new_tokens=1)))
        for wave in range(waves):
            parts = scheduler.plan(wave)
            assert [part.count for part in parts] == [8] and not cache.run(parts)
        scheduler.submit(Request(7, (5,) * 12, Sampling(max_new_tokens=2), priority=1))
        for planned in ([(7, 8)], [(7, 4), (0, 4)], [(7, 1), (0, 7)]):
            parts = scheduler.plan()
            assert [(part.sequence.request.number, part.count) for part in parts] == planned
            scheduler.apply(parts, cache.run(parts))


def test_a_thousand_requests_leave_nothing_behind() -> None:
    draw, cache = random.Random(0), Cache(PAGES)
    scheduler, finished, number = Scheduler(Limits(PAGES, PAGE, 4, 16)), 0, 0
    while number < 1000 or not scheduler.idle:
        for _ in range(draw.randint(0, 4) if number < 1000 else 0):
            prompt = tuple(draw.randint(1, 3) for _ in range(draw.randint(1, 20)))
            scheduler.submit(Request(number, prompt, Sampling(max_new_tokens=draw.randint(1, 6)), frozenset([END])))
            number += 1
        if draw.random() < 0.3:
            scheduler.cancel(draw.randrange(max(number - 20, 0), number + 1))
        finished += len(scheduler.take_cancelled())
        parts = scheduler.plan()
        finished += len(scheduler.apply(parts, cache.run(parts)))
    assert finished == number and scheduler.pool.available == PAGES
    assert len(scheduler.pool._by_digest) == len(scheduler.pool._digests) <= PAGES
    assert not scheduler.num_waiting and not scheduler.num_running and not scheduler._siblings


def test_sequences_stay_in_one_piece_of_memory() -> None:
    pool = PagePool(64, PAGE)
    sequences: list[list[int]] = [[] for _ in range(4)]
    for _ in range(6):
        for pages in sequences:
            pages.append(pool.take(pages[-1] if pages else None))
    assert all(pages == list(range(pages[0], pages[0] + 6)) for pages in sequences)


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(3, (1,) * 30, Sampling(max_new_tokens=3)), "max_seq_length_tokens 32"),
        (Request(3, (1,) * 10, Sampling(max_new_tokens=15)), "cache holds, 24"),
        (Request(3, (1, 50), Sampling(max_new_tokens=1)), "token 50.*0 to 49"),
        (Request(3, (1,), Sampling(max_new_tokens=1, logit_bias=((-1, 2.0),))), "logit_bias.*token -1"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(request_: Request, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_fits(request_, 32, 24, 50)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-9, 0), max_size=3), st.sampled_from([Reason.STOP, Reason.CANCELLED])), min_size=1
    ),
    st.data(),
)
def test_the_best_of_several_answers(given: list[tuple[list[float], Reason]], data: Any) -> None:
    n = data.draw(st.integers(1, len(given)))
    made = [
        Finished(7, place, tuple(range(len(numbers))), tuple(numbers), (), reason, ((place, ()),) * (place == 0))
        for place, (numbers, reason) in enumerate(given)
    ]
    found = best_answers(data.draw(st.permutations(made)), n)
    assert [one.sample for one in found] == list(range(n))
    assert [bool(one.prompt_scores) for one in found] == [True] + [False] * (n - 1)
    mean = lambda one: sum(one.log_probs) / len(one.log_probs) if one.log_probs else float("-inf")  # noqa: E731
    whole = sorted((mean(one) for one in made if one.reason is Reason.STOP), reverse=True)
    assert [mean(one) for one in found if one.reason is Reason.STOP] == whole[:n]
    assert sum(one.reason is Reason.CANCELLED for one in found) == max(n - len(whole), 0)


@pytest.mark.parametrize("wrong", [{"prompt": ()}, {"n": 0}, {"stop": ("",)}, {"n": 3, "best_of": 2}])
def test_malformed_requests_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="prompt 7"):
        Request(**{"number": 7, "prompt": (1,), **wrong})


@pytest.mark.parametrize("waves", (2, 3, 4))
def test_waiting_requests_are_spread_over_the_waves_at_once(waves: int) -> None:
    """As many as fit, in the first pass of each wave: no wave waits until the others have caught up one by one. A
    wave takes no more than its share of them, or the other stages would have nothing to do."""
    scheduler = Scheduler(Limits(400, PAGE, 48, 48 * PAGE), waves)
    for number in range(60):
        scheduler.submit(Request(number, (1, 2), Sampling(max_new_tokens=4), frozenset([END])))
    planned = [len(scheduler.plan(wave)) for wave in range(waves)]
    assert planned == [48 // waves] * waves

    few_pages = Scheduler(Limits(24, PAGE, 48, 48 * PAGE), waves)  # two of each: one to grow into
    for number in range(60):
        few_pages.submit(Request(number, (1, 2), Sampling(max_new_tokens=4), frozenset([END])))
    assert [len(few_pages.plan(wave)) for wave in range(waves)] == [12 // waves] * waves
