"""Answers requests with the weights of a network, in any layout, between two training steps or without training.

Each replica (data-parallel and context-parallel ranks alike) is a generator of its own. All processes of a replica make
the same calls with the same requests, plan the same passes, and learn the chosen tokens by one small broadcast a pass.
With a pipeline, one pass for each stage is under way at a time; the tokens of a pass are taken up when its turn comes
again, by when the last stage has chosen them.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError
from llm_parallel.generate.adapters import AdapterBank
from llm_parallel.generate.answer import StopStrings
from llm_parallel.generate.draw import NO_TOKEN, Choice, Draw, choose_tokens
from llm_parallel.generate.extras import Extras
from llm_parallel.generate.layers import PlainChunk
from llm_parallel.generate.paged import LayerCache, Pass, Rotation, make_pass
from llm_parallel.generate.requests import Finished, Request, best_answers, check_fits
from llm_parallel.generate.scheduler import Draft, Limits, Part, Scheduler
from llm_parallel.generate.structure import Structures
from llm_parallel.parallel.engine import Engine, Network, network_of

CACHE_SHARE = 0.25
"""Of the free memory, for the cache if its size is not given."""


@dataclass(frozen=True)
class GeneratorOptions:
    """max_running: answers in work at a time; pass_tokens: tokens of one pass, prompts in chunks; page_tokens: tokens
    of a page of the cache; cache_tokens: tokens that the cache holds, by default as many as ``max_running`` texts of
    the model's full context, if a quarter of the free memory is enough for them; one such text may take a half."""

    max_running: int = 64
    pass_tokens: int = 512
    page_tokens: int = 16
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "page_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.pass_tokens < self.max_running:
            raise UserError(
                f"pass_tokens is {self.pass_tokens} and max_running is {self.max_running}; a pass must have room for "
                "one token of each answer"
            )
        if self.cache_tokens is not None and self.cache_tokens < self.page_tokens:
            raise UserError(f"cache_tokens is {self.cache_tokens}; it must be at least page_tokens, {self.page_tokens}")


@dataclass
class _Running:
    """A pass under way. extras: what it gives beside tokens; choices: of the last stage, on the process that chooses,
    and the scores of prompts behind them; chosen: the same as a tensor, where others must hear of them; sums: of hidden
    states; sent: broadcasts of both."""

    parts: list[Part]
    info: Pass
    extras: Extras | None = None
    choices: list[Choice] | None = None
    chosen: Tensor | None = None
    sums: Tensor | None = None
    sent: list[dist.Work | None] = field(default_factory=list)

    @property
    def num_chosen(self) -> int:
        """Rows of ``chosen``."""
        return sum(part.chooses for part in self.parts) + (len(self.extras.scored) if self.extras else 0)

    @property
    def num_sums(self) -> int:
        """Rows of ``sums``."""
        return len(self.extras.pooled) if self.extras else 0

    @property
    def width(self) -> int:
        """Numbers of one choice: token and log-probability, and the same for the likeliest ones."""
        tops = [part.sequence.request.sampling.top_log_probs for part in self.parts]
        return 2 + 2 * max(*tops, self.extras.width if self.extras else 0)


class Generator:
    """Continuous batching over a network. All processes of the run make one; those of a replica make the same calls.

    tokenizer: needed for requests with ``stop`` or ``structure``; on_token: called with the number and sample of an
    answer and its next choice.
    bank: the adapters that requests may name.
    """

    def __init__(
        self,
        model: Network | Engine,
        options: GeneratorOptions | None = None,
        tokenizer: Tokenizer | None = None,
        on_token: Callable[[int, int, Choice], None] | None = None,
        bank: AdapterBank | None = None,
    ) -> None:
        options = options or GeneratorOptions()
        self._model, network = model, network_of(model)
        self.groups, self._models = network.groups, network.models
        self.model_config = self._models[0].model_config
        self._tokenizer, self.on_token = tokenizer, on_token
        self._structures: Structures | None = None
        self._bank = bank
        self._best: dict[int, Request] = {}
        self._made: dict[int, list[Finished]] = {}
        self._deterministic = self._models[0].config.kernels.deterministic
        self._pp, self._device = self.groups.mesh.pp, self.groups.platform.device
        num_pages = _num_pages(network, options)
        self.limits = Limits(num_pages, options.page_tokens, options.max_running, options.pass_tokens)
        self._rotation = Rotation(self.model_config, self._device)
        # Nothing here refers back to this object, so that its cache goes with it, and not when garbage is collected.
        self.scheduler = Scheduler(self.limits, self._pp, StopStrings(tokenizer), self._rotation.salt)
        self._caches = [LayerCache.of_chunk(chunk, num_pages, options.page_tokens) for chunk in self._models]
        self._passes: list[_Running | None] = [None] * self._pp
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        self.is_stale = False
        if isinstance(model, Engine):
            _mark_stale_after_steps(model, self)
        self.refresh()

    @property
    def replica(self) -> tuple[int, int]:
        """Number of this process's replica, and how many there are."""
        at, mesh = self.groups.at, self.groups.mesh
        return at.dp * mesh.cp + at.cp, mesh.dp * mesh.cp

    @property
    def idle(self) -> bool:
        """Whether all answers have been returned."""
        return self.scheduler.idle and not any(self._passes)

    @property
    def has_room(self) -> bool:
        """Whether a further request would be in work at once, as far as their number goes."""
        return not self.scheduler.num_waiting and self.scheduler.num_running < self.limits.max_running

    def refresh(self) -> None:
        """Takes up weights that have changed: waits for those that are still being gathered and forgets all keys. All
        processes of the run call this after a training step, before the next ``tick``."""
        if isinstance(self._model, Engine):
            self._model.parameters_up_to_date()
        self.scheduler.start_over()
        with torch.inference_mode():
            self._chunks = [PlainChunk(model, caches, self._bank) for model, caches in zip(self._models, self._caches)]
        self.is_stale = False

    def close(self) -> None:
        """Gives up the cache, for those whose own objects refer to this one in circles. Nothing is asked afterwards."""
        self._caches, self._chunks = [], []

    def submit(self, request: Request) -> None:
        """Takes a request. Raises UserError as ``checked`` does."""
        self.scheduler.submit(self.checked(request))
        if request.num_made > request.n:
            self._best[request.number] = request

    def checked(self, request: Request) -> Request:
        """The request as it is taken. Raises UserError for one that the model or the cache has no room for, or whose
        structure cannot be enforced."""
        vocabulary = self.model_config.vocab_size
        assert vocabulary is not None
        cache_tokens = self.limits.num_pages * self.limits.page_tokens
        check_fits(request, self.model_config.max_seq_length_tokens, cache_tokens, vocabulary)
        if request.adapter is not None and (self._bank is None or request.adapter not in self._bank.names):
            raise UserError(f"adapter of prompt {request.number} is {request.adapter!r}, which is not loaded")
        if request.stop and self._tokenizer is None:
            raise UserError(f"stop of prompt {request.number} is given, and the model has no tokenizer to find it with")
        if request.num_made > request.n and self.on_token is not None:
            raise UserError(
                f"best_of of prompt {request.number} is {request.best_of}, and tokens are wanted as they come; the "
                "best answer is known only at the end, so leave one of them out"
            )
        return request if request.structure is None else self._with_structure(request, vocabulary)

    def _with_structure(self, request: Request, vocabulary: int) -> Request:
        """The request, in which some token ends the answer. Every process checks the structure, so that all refuse."""
        if self._tokenizer is None:
            raise UserError(
                f"structure of prompt {request.number} is given, and the model has no tokenizer to follow it"
            )
        if self._structures is None:
            self._structures = Structures(self._tokenizer, vocabulary)
        assert request.structure is not None
        self._structures.check(request.structure)
        has_end = any(token < vocabulary for token in request.ends)
        return request if has_end else replace(request, ends=frozenset([self._tokenizer.eod]))

    def cancel(self, number: int) -> None:
        """Ends the unfinished answers to a request; ``tick`` returns them with the reason ``cancelled``."""
        self.scheduler.cancel(number)

    def run(self, requests: Sequence[Request]) -> list[Finished]:
        """Answers of this replica, in the order of the requests, of which every replica takes its part. All processes
        of the run call this with the same requests."""
        if self.is_stale:
            self.refresh()
        own, replicas = self.replica
        mine = requests[own::replicas]
        for request in mine:
            self.submit(request)
        finished = [answer for answers in self.ticks() for answer in answers]
        places = {request.number: place for place, request in enumerate(mine)}
        return sorted(finished, key=lambda answer: (places[answer.number], answer.sample))

    def ticks(self) -> Iterator[list[Finished]]:
        """``tick`` until all is answered."""
        while not self.idle:
            yield self.tick()

    def tick(self) -> list[Finished]:
        """One pass for each pipeline stage; prompts, chunks and single tokens together. Returns what was finished."""
        assert not self.is_stale, "the weights have changed; call refresh() on all processes first"
        finished = self.scheduler.take_cancelled()
        # The mode that platform.py installs on a CPU is for megatron-core, which is not called here.
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for wave in range(self._pp):
                finished += self._settle(wave)
                parts = self.scheduler.plan(wave)
                if parts:
                    pages, paging = self.limits.page_tokens, self._chunks[0].paging
                    info = make_pass(parts, pages, self._rotation, self._device, paging)
                    self._passes[wave] = _Running(parts, info, Extras.of(parts))
                    self._run(0, wave)
            for stage in range(1, len(self._chunks)):
                for wave in range(self._pp):
                    self._run(stage, wave)
            if self._pp == 1:
                finished += self._settle(0)
        return [answer for each in finished for answer in self._given(each)]

    def _given(self, answer: Finished) -> list[Finished]:
        """The answer; of a request for the best of several, these when the last one is finished."""
        request = self._best.get(answer.number)
        if request is None:
            return [answer]
        made = self._made.setdefault(answer.number, [])
        made.append(answer)
        if len(made) < request.num_made:
            return []
        del self._best[answer.number], self._made[answer.number]
        return best_answers(made, request.n)

    def _run(self, stage: int, wave: int) -> None:
        """One model chunk's part of a pass."""
        running, chunk = self._passes[wave], self._chunks[stage]
        if running is None:
            return
        pipeline, at = self.groups.collection.pp, self.groups.at.pp
        hidden = None
        if not chunk.is_first:
            shape = len(running.info.tokens), self.model_config.hidden_size
            hidden = torch.empty(shape, dtype=chunk.model.numerics.dtype, device=self._device)
            dist.recv(hidden, group=pipeline, group_src=(at - 1) % self._pp)
        if self._bank is not None:
            self._bank.select(running.parts, self._device)
        out = chunk(hidden, running.info)
        if chunk.is_last:
            self._choose(running, chunk, out)
            return
        work = dist.isend(out, group=pipeline, group_dst=(at + 1) % self._pp)
        assert work is not None
        self._sends.append((work, out))
        while self._sends and (self._sends[0][0].is_completed() or len(self._sends) > 4 * len(self._chunks)):
            self._sends.popleft()[0].wait()

    def _choose(self, running: _Running, chunk: PlainChunk, x: Tensor) -> None:
        """Chooses on one process of the last stage, and sends."""
        extras, rows = running.extras, running.info.last_rows
        if extras is not None and extras.scored:
            rows = torch.cat((rows, torch.tensor(extras.scored_rows, device=rows.device)))
        logits = chunk.logits(x.index_select(0, rows))
        if self.groups.at.tp > 0:
            return
        draws = [self._draw(part.sequence) for part in running.parts if part.chooses]
        if running.num_chosen:
            choices = choose_tokens(logits[: len(draws)], draws, self._deterministic) if draws else []
            choices += extras.scores(logits[len(draws) :], self._deterministic) if extras is not None else []
            running.choices = choices
            if self.groups.mesh.tp * self._pp > 1:
                running.chosen = _packed(choices, running.width).to(self._device)
                running.sent.append(self._broadcast(running.chosen, wait=False))
        if extras is not None and extras.pooled:
            running.sums = extras.sums(chunk.norm(x))
            running.sent.append(self._broadcast(running.sums, wait=False))

    def _draw(self, draft: Draft) -> Draw:
        request, allowed = draft.request, None
        if request.structure is not None:
            assert self._structures is not None
            allowed = self._structures.allowed(draft, request.structure, draft.written, request.ends)
        return Draw(request.sampling, request.draw_stream, draft.sample, draft.tokens, len(request.prompt), allowed)

    def _broadcast(self, chosen: Tensor, wait: bool) -> dist.Work | None:
        mesh = self.groups.mesh
        if mesh.tp * mesh.pp == 1:
            return None
        source = (mesh.pp - 1) * mesh.tp
        return dist.broadcast(chosen, group=self.groups.collection.mp, group_src=source, async_op=not wait)

    def _settle(self, wave: int) -> list[Finished]:
        """Takes up the tokens of the wave's last pass."""
        running, self._passes[wave] = self._passes[wave], None
        if running is None:
            return []
        choices, sums = self._received(running)
        count = len(choices) - (len(running.extras.scored) if running.extras else 0)
        if running.extras is not None:
            running.extras.keep_scores(running.parts, choices[count:])
            if sums is not None:
                running.extras.keep_sums(sums)
        if not count:
            return []
        choices = choices[:count]
        if self.on_token is not None:
            for part, choice in zip((part for part in running.parts if part.chooses), choices):
                if not part.sequence.ended and choice.token != NO_TOKEN:
                    self.on_token(part.sequence.request.number, part.sequence.sample, choice)
        return self.scheduler.apply(running.parts, choices)

    def _received(self, running: _Running) -> tuple[list[Choice], Tensor | None]:
        """What the process that chooses has sent, or on that process has at hand."""
        choices, sums = running.choices, running.sums
        for work in running.sent:
            if work is not None:
                work.wait()
        if choices is None and running.num_chosen:
            chosen = torch.empty(running.num_chosen, running.width, dtype=torch.float64, device=self._device)
            self._broadcast(chosen, wait=True)
            choices = [_unpacked(row) for row in chosen.tolist()]
        if sums is None and running.num_sums:
            sums = torch.empty(running.num_sums, self.model_config.hidden_size, device=self._device)
            self._broadcast(sums, wait=True)
        return choices or [], sums


def _mark_stale_after_steps(engine: Engine, generator: Generator) -> None:
    """Weakly, so that the engine does not keep a generator's cache alive."""
    reference = weakref.ref(generator)

    def mark() -> None:
        alive = reference()
        if alive is None:
            engine.after_step.remove(mark)
        else:
            alive.is_stale = True

    engine.after_step.append(mark)


def _packed(choices: Sequence[Choice], width: int) -> Tensor:
    """fp64 [choices, width], which holds token ids exactly; -1 where a choice has fewer."""
    rows = [[choice.token, choice.log_prob, *(x for pair in choice.top for x in pair)] for choice in choices]
    return torch.tensor([row + [-1.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def _unpacked(row: Sequence[float]) -> Choice:
    pairs = zip(row[2::2], row[3::2])
    return Choice(int(row[0]), row[1], tuple((int(token), log_prob) for token, log_prob in pairs if token >= 0))


def _num_pages(network: Network, options: GeneratorOptions) -> int:
    """Pages of the cache, the same on all processes."""
    models, groups = network.models, network.groups
    if options.cache_tokens is not None:
        return options.cache_tokens // options.page_tokens
    context = models[0].model_config.max_seq_length_tokens
    share = CACHE_SHARE * groups.platform.free_bytes()
    if not groups.platform.is_cuda:
        share /= groups.mesh.world_size  # which may all be on this machine
    fits = torch.tensor(int(share / LayerCache.bytes_per_token(models)), device=groups.platform.device)
    if groups.mesh.world_size > 1:
        dist.all_reduce(fits, op=dist.ReduceOp.MIN)
    at_least = max(min(context, 2 * int(fits)), options.page_tokens)
    tokens = min(options.max_running * context, max(int(fits), at_least))
    return -(-tokens // options.page_tokens)
