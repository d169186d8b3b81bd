"""The generator against transformers: requests of mixed lengths that arrive at random, in a cache that is too small for
all of them, are answered as each would be alone, with transformers' log-probabilities."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.config.tree import KernelsConfig
from llm_parallel.generate.requests import Finished, Reason, Request
from llm_parallel.generate.sampling import Sampling
from tests.support.harness import run_ranks
from tests.support.parity_models import RANDOM, load_hf, our_config, random_folder
from tests.support.smollm import smollm_folder

FOLLOWS_LENGTH = ("dynamic, longer than its context", "longrope")
KINDS = [kind for kind in RANDOM if kind not in FOLLOWS_LENGTH]
LAYOUTS = (
    ({"tp": 2, "pp": 2}, "olmo2"),
    ({"pp": 2, "vpp": 2}, "qwen3"),
    ({"dp": 2}, "mistral"),
)
SLOW_LAYOUTS = (
    ({"tp": 2}, "qwen3"),
    ({"pp": 2}, "smollm3"),
    ({"cp": 2}, "qwen2"),
    ({"tp": 4}, "grouped"),
    ({"tp": 2, "cp": 2, "dp": 2}, "llama with every bias"),
    ({"pp": 2, "dp": 2, "tp": 2}, "llama-3.1 tied"),
)
VOCABULARY = 301


def mixed_requests(count: int, seed: int, longest: int = 60, **settings: Any) -> list[Request]:
    """Prompts of 1 to ``longest`` tokens, some of which begin alike, for answers of 1 to 20 tokens."""
    draw = random.Random(seed)
    head = [draw.randrange(VOCABULARY) for _ in range(40)]
    made = []
    for number in range(count):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest))]
        prompt = (head[: draw.randint(0, 40)] + own)[:longest] if number % 3 == 0 else own
        ends = frozenset(draw.sample(range(VOCABULARY), 4))
        sampling = Sampling(max_new_tokens=draw.randint(1, 20), **settings)
        made.append(Request(number, tuple(prompt), sampling, ends, priority=draw.randint(0, 1)))
    return made


def answers(generator: Any, requests: list[Request], seed: int) -> list[Finished]:
    """Answers of this process's replica to requests that arrive at random, with some cancelled ones among them."""
    draw, finished = random.Random(seed), []
    own, replicas = generator.replica
    waiting = requests[own::replicas]
    while waiting or not generator.idle:
        for _ in range(draw.randint(0, 3)):
            if waiting:
                generator.submit(waiting.pop(0))
        if draw.random() < 0.1:
            lost = Request(10_000 + draw.randrange(10**9), (1, 2, 3), Sampling(max_new_tokens=9))
            generator.submit(lost)
            finished += generator.tick()
            generator.cancel(lost.number)
        finished += generator.tick()
    assert generator.scheduler.pool.used == 0
    return sorted((f for f in finished if f.number < 10_000), key=lambda f: (f.number, f.sample))


def open_generator(
    folder: str,
    rank: int,
    world_size: int,
    parallel: dict[str, Any],
    attention: Any = "auto",
    tokenizer: Any = None,
    **options: int,
) -> Any:
    from llm_parallel.config.rules import check_config
    from llm_parallel.generate.engine import Generator, GeneratorOptions
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    config = our_config(folder, 72, **parallel)  # which every size of tp divides
    config = config.model_copy(update={"kernels": KernelsConfig(attention=attention)})
    check_config(config, world_size, "cpu")
    close_groups(world=False)  # those of the model before
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), config.seed)
    network = build_policy(config, groups)
    load_hf_weights(folder, network.models)
    return Generator(network, GeneratorOptions(**options), tokenizer)


SMALL = {"max_running": 6, "pass_tokens": 24, "page_tokens": 4, "cache_tokens": 160}


def generate_job(
    rank: int,
    world_size: int,
    folders: list[str],
    made: list[Request],
    parallel: dict[str, Any],
    options: dict[str, int],
) -> list[list[Finished]]:
    return [
        answers(open_generator(folder, rank, world_size, parallel, **options), made, seed)
        for seed, folder in enumerate(folders)
    ]


def check_against_transformers(
    folder: Path, made: list[Request], found: list[Finished], tolerance: float = 2e-5
) -> None:
    """Each token is the likeliest after the tokens before it, and its log-probability that of transformers in fp64."""
    model = load_hf(folder, torch.float64).eval()
    assert [answer.number for answer in found] == [request.number for request in made]
    for request, answer in zip(made, found):
        text = torch.tensor([*request.prompt, *answer.tokens])
        with torch.no_grad():
            logits = model(text[None]).logits[0, len(request.prompt) - 1 : -1]
        log_probs = logits.log_softmax(-1)
        best, tokens = log_probs.max(-1)
        assert list(answer.tokens) == tokens.tolist()
        np.testing.assert_allclose(answer.log_probs, best.numpy(), atol=tolerance)
        ended = [place for place, token in enumerate(answer.tokens) if token in request.ends]
        if ended:
            assert ended == [len(answer.tokens) - 1] and answer.reason is Reason.STOP
        else:
            assert len(answer.tokens) == request.sampling.max_new_tokens and answer.truncated


@pytest.mark.gloo
def test_every_family_answers_as_transformers_does(tmp_path: Path) -> None:
    made = mixed_requests(24, 1)
    folders = [random_folder(kind, tmp_path / str(number)) for number, kind in enumerate(KINDS)]
    found = run_ranks(generate_job, 1, [str(folder) for folder in folders], made, {}, SMALL)[0]
    for folder, answers_ in zip(folders, found):
        check_against_transformers(folder, made, answers_)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("parallel", "kind"), [*LAYOUTS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_LAYOUTS)], ids=str
)
def test_every_layout_answers_as_transformers_does(parallel: dict[str, Any], kind: str, tmp_path: Path) -> None:
    made = mixed_requests(16, 2)
    folder = random_folder(kind, tmp_path)
    processes = int(np.prod([size for axis, size in parallel.items() if axis != "vpp"]))
    by_rank = [found for (found,) in run_ranks(generate_job, processes, [str(folder)], made, parallel, SMALL)]
    found = {answer.number: answer for answers_ in by_rank for answer in answers_}
    for answers_ in by_rank:  # all ranks of a replica have the same answers
        assert all(found[answer.number] == answer for answer in answers_)
    check_against_transformers(folder, made, [found[request.number] for request in made])


def batches_job(rank: int, world_size: int, folder: str, made: list[Request]) -> list[list[Finished]]:
    """The same requests in a small cache as they arrive, all at once in a large one, and one after the other."""
    large = {**SMALL, "max_running": 24, "cache_tokens": 4000}
    found = [answers(open_generator(folder, rank, world_size, {}, **options), made, 5) for options in (SMALL, large)]
    generator = open_generator(folder, rank, world_size, {}, **SMALL)
    return [*found, [answer for request in reversed(made) for answer in generator.run([request])][::-1]]


@pytest.mark.gloo
def test_a_drawn_answer_depends_on_its_request_alone(tmp_path: Path) -> None:
    made = [
        replace(request, n=1 + number % 3)
        for number, request in enumerate(mixed_requests(16, 4, temperature=1.2, top_p=0.9, repetition_penalty=1.1))
    ]
    folder = random_folder("grouped", tmp_path)
    first, *others = run_ranks(batches_job, 1, str(folder), made)[0]
    assert len({answer.tokens for answer in first}) > 20
    for found in others:
        found = sorted(found, key=lambda answer: (answer.number, answer.sample))
        for one, other in zip(first, found, strict=True):
            assert (one.number, one.sample, one.tokens, one.reason) == (
                other.number, other.sample, other.tokens, other.reason
            )  # fmt: skip
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


def best_job(rank: int, world_size: int, folder: str, made: list[Request]) -> tuple[list[Finished], ...]:
    """All answers, the two best ones of each request, and the same again with requests that are cancelled."""
    from llm_parallel.errors import UserError

    generator = open_generator(folder, rank, world_size, {}, **SMALL)
    every = generator.run([replace(request, n=5) for request in made])
    best = generator.run([replace(request, n=2, best_of=5) for request in made])
    for request in made:
        generator.submit(replace(request, n=2, best_of=5))
    cancelled = []
    for count in range(400):
        cancelled += generator.tick()
        if count == 3:
            for request in made:
                generator.cancel(request.number)
    assert generator.idle and not generator._made and not generator._best
    generator.on_token = lambda *_: None
    with pytest.raises(UserError, match="best_of of prompt 0 is 2, and tokens are wanted as they come"):
        generator.submit(replace(made[0], best_of=2))
    return every, best, cancelled


@pytest.mark.gloo
def test_the_best_answers_are_those_with_the_highest_mean_log_probability(tmp_path: Path) -> None:
    made = mixed_requests(8, 4, temperature=1.2)
    every, best, cancelled = run_ranks(best_job, 1, str(random_folder("grouped", tmp_path)), made)[0]
    for request in made:
        own = sorted((a for a in every if a.number == request.number), key=lambda a: -np.mean(a.log_probs))
        found = [answer for answer in best if answer.number == request.number]
        assert [answer.tokens for answer in found] == [answer.tokens for answer in own[:2]]
        assert [answer.sample for answer in found] == [0, 1]
        given = [answer for answer in cancelled if answer.number == request.number]
        assert [answer.sample for answer in given] == [0, 1]
    assert any(answer.reason is Reason.CANCELLED for answer in cancelled)


def kernels_job(rank: int, world_size: int, folder: str, made: list[Request]) -> list[list[Finished]]:
    """Answers by torch's attention, and by the operator on all parts at once, as on a GPU, in Triton's interpreter."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"
    options = {**SMALL, "max_running": 4}
    return [
        answers(open_generator(folder, rank, world_size, {}, attention=attention, **options), made, 7)
        for attention in ("torch", "triton")
    ]


@pytest.mark.gloo
def test_one_call_of_the_operator_for_all_parts_gives_the_same(tmp_path: Path) -> None:
    folder = random_folder("mistral", tmp_path)
    made = [replace(request, sampling=Sampling(max_new_tokens=2)) for request in mixed_requests(4, 7, longest=20)]
    for one, other in zip(*run_ranks(kernels_job, 1, str(folder), made)[0], strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


class Letters:
    """A tokenizer whose token 0 is the control token ``<end>`` and whose other tokens are letters."""

    def decode(self, ids: Any, control: bool = False) -> str:
        return "".join(chr(64 + token) if token else "<end>" * control for token in ids)


def stops_job(rank: int, world_size: int, folder: str) -> tuple[list[Finished], list[Finished], list[tuple]]:
    generator = open_generator(folder, rank, world_size, {}, tokenizer=Letters(), **SMALL)
    seen: list[tuple] = []
    generator.on_token = lambda *at: seen.append((*at[:2], at[2].token))
    free = Request(1, (7, 8, 9), Sampling(max_new_tokens=12))
    whole = generator.run([free])
    text = Letters().decode(whole[0].tokens, True)
    return whole, generator.run([replace(free, stop=(text[4:7], "never"))]), seen


@pytest.mark.gloo
def test_a_stop_string_ends_an_answer_with_the_token_that_completes_it(tmp_path: Path) -> None:
    folder = random_folder("llama-2", tmp_path)
    (whole,), (stopped,), seen = run_ranks(stops_job, 1, str(folder))[0]
    assert whole.reason is Reason.LENGTH and stopped.reason is Reason.STOP and not stopped.truncated
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    text, stop = (Letters().decode(answer.tokens, True) for answer in (whole, stopped))
    assert stop == text[: text.index(text[4:7]) + 3]
    assert seen == [(1, 0, token) for answer in (whole, stopped) for token in answer.tokens]


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("parallel", "processes"),
    [({}, 1), ({"pp": 2}, 2), ({"tp": 3}, 3), ({"pp": 2, "vpp": 3}, 2), ({"dp": 2}, 2), ({"tp": 3, "pp": 2}, 6)],
    ids=str,
)
def test_smollm_answers_as_transformers_does(parallel: dict[str, Any], processes: int) -> None:
    folder = smollm_folder()
    made = mixed_requests(64, 6)
    options = {"max_running": 16, "pass_tokens": 128, "page_tokens": 16, "cache_tokens": 1024}
    by_rank = run_ranks(generate_job, processes, [str(folder)], made, parallel, options, timeout_s=1500.0)
    found = {answer.number: answer for (answers_,) in by_rank for answer in answers_}
    # Its own fp32 logits are 6.9e-5 from those in fp64.
    check_against_transformers(folder, made, [found[request.number] for request in made], 7e-5)


FIVE = ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}, {"dp": 2})


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("parallel", [{}, *FIVE], ids=str)
def test_every_family_answers_64_requests_in_every_layout(parallel: dict[str, Any], tmp_path: Path) -> None:
    """Under sequence parallelism where there is tensor parallelism, as its default is."""
    made = mixed_requests(64, 8)
    folders = [random_folder(kind, tmp_path / str(number)) for number, kind in enumerate(RANDOM)]
    processes = int(np.prod([size for axis, size in parallel.items() if axis != "vpp"]))
    job = [str(folder) for folder in folders], made, parallel, SMALL
    by_rank = run_ranks(generate_job, processes, *job, timeout_s=1500.0)
    for number, (kind, folder) in enumerate(zip(RANDOM, folders)):
        found = {answer.number: answer for answers_ in by_rank for answer in answers_[number]}
        ordered = [found[request.number] for request in made]
        (check_by_generate if kind in FOLLOWS_LENGTH else check_against_transformers)(folder, made, ordered)


@pytest.mark.gloo
@pytest.mark.parametrize("kind", [FOLLOWS_LENGTH[0], pytest.param(FOLLOWS_LENGTH[1], marks=pytest.mark.slow)])
def test_frequencies_that_follow_the_length_are_transformers(kind: str, tmp_path: Path) -> None:
    """Prompts and answers on both sides of the original context, in chunks and with interruptions."""
    folder = random_folder(kind, tmp_path)
    made = mixed_requests(10, 3)
    check_by_generate(folder, made, run_ranks(generate_job, 1, [str(folder)], made, {}, SMALL)[0][0])


def check_by_generate(folder: Path, made: list[Request], found: list[Finished]) -> None:
    """Each answer is transformers' own, which computes every token with the frequencies of the text up to itself."""
    for request, answer in zip(made, found, strict=True):
        model = load_hf(folder, torch.float32).eval()  # anew, since it keeps the frequencies of a longer text
        prompt = torch.tensor([request.prompt])
        count, mask = len(answer.tokens), torch.ones_like(prompt)  # without it tokens 0 would be padding
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        assert list(answer.tokens) == out[0, len(request.prompt) :].tolist()


def looked_at_job(rank: int, world_size: int, folder: str, parallel: dict[str, Any]) -> list[Finished]:
    generator = open_generator(folder, rank, world_size, parallel, **SMALL)
    made = [replace(request, prompt_log_probs=3, embeds=True) for request in mixed_requests(8, 3)]
    return answers(generator, [*made, replace(made[0], number=99, n=2), *map(scored, mixed_requests(8, 3))], 3)


def scored(request: Request) -> Request:
    """The request as one for log-probabilities of the second half of its prompt, and of two tokens after it."""
    half = max(len(request.prompt) // 2, 1)
    settings = {"sampling": Sampling(max_new_tokens=1), "prompt_log_probs": 1, "scores_from": half}
    return replace(request, number=200 + request.number, candidates=(3, 7), **settings)


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("parallel", "processes"),
    [({}, 1), *(pytest.param({axis: 2}, 2, marks=pytest.mark.slow) for axis in ("tp", "pp"))],
    ids=str,
)
def test_prompts_are_scored_and_embedded_as_by_transformers(
    parallel: dict[str, int], processes: int, tmp_path: Path
) -> None:
    folder = random_folder("qwen3", tmp_path)
    found = run_ranks(looked_at_job, processes, str(folder), parallel)
    assert found[1:] == found[:-1]
    model = load_hf(folder, torch.float64).eval()
    by_number = {(answer.number, answer.sample): answer for answer in found[0]}
    for request in mixed_requests(8, 3):
        answer, text = by_number[request.number, 0], torch.tensor([request.prompt])
        with torch.no_grad():
            out = model(text, output_hidden_states=True)
        log_probs = out.logits[0].log_softmax(-1)
        wanted = log_probs[:-1].gather(1, text[0, 1:, None]).squeeze(1)
        np.testing.assert_allclose([score for score, _ in answer.prompt_scores], wanted.numpy(), atol=2e-5)
        best = log_probs[:-1].topk(3)
        assert [[token for token, _ in top] for _, top in answer.prompt_scores] == best.indices.tolist()
        again, half = by_number[200 + request.number, 0], max(len(request.prompt) // 2, 1)
        expected = [*wanted[half - 1 :], log_probs[-1, 3], log_probs[-1, 7]]
        np.testing.assert_allclose([score for score, _ in again.prompt_scores], torch.stack(expected), atol=2e-5)
        likeliest = log_probs.argmax(-1).tolist()
        assert [top[0][0] for _, top in again.prompt_scores[:-2]] == likeliest[half - 1 : -1]
        assert again.tokens == (likeliest[-1],) and not any(top for _, top in again.prompt_scores[-2:])
        mean = out.hidden_states[-1][0].mean(0)
        np.testing.assert_allclose(answer.embedding, mean.numpy(), atol=2e-5)
    assert len(by_number[99, 0].prompt_scores) == len(by_number[0, 0].prompt_scores)
    assert not by_number[99, 1].prompt_scores and not by_number[99, 1].embedding
