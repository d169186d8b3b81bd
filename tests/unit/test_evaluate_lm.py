"""Texts and settings of lm-eval as our engine's requests, with answers that a made-up model gives."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from llm_parallel.data.tokenizer import load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.evaluate.record import Outcome, Record
from llm_parallel.generate.requests import Finished, Reason, Request
from llm_parallel.generate.sampling import Sampling
from tests.support import made_up_model

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'llm-parallel[evaluate]')", allow_module_level=True)

WORDS = ["<s>", "</s>", "a", "b", "c", "d", "e", ".", ";"]
BEGIN, END = 0, 1


log_probs = partial(made_up_model.log_probs, vocabulary=len(WORDS))


class Asked:
    """Keeps what was asked. writes: the tokens of every answer."""

    def __init__(self, writes: tuple[int, ...] = ()) -> None:
        self.requests: list[Request] = []
        self._writes = writes

    def run(self, work: Any) -> list[Outcome]:
        self.requests += work.requests
        return [made_up_model.answered(request, len(WORDS), self._writes) for request in work.requests]


def model(
    folder: Path, runner: Asked, context: int = 8, begin: tuple[int, ...] = (BEGIN,), ends: tuple[int, ...] = (END,)
) -> Any:
    from llm_parallel.evaluate.lm import EngineLM, Texts

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(WORDS[:2])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return EngineLM(Texts(load_tokenizer(folder), begin, frozenset(ends), context), runner, {})


def asking(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="task")


def ids(text: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in text.split())


def test_the_begin_token_stands_before_a_text_once(tmp_path: Path) -> None:
    lm = model(tmp_path, Asked())
    assert lm.tok_encode("a b") == [BEGIN, 2, 3]
    assert lm.tok_encode("a b", add_special_tokens=False) == [2, 3]
    assert lm.tok_encode("<s> a b") == [BEGIN, 2, 3]
    assert model(tmp_path, Asked(), begin=()).tok_encode("a b") == [2, 3]


def test_a_continuation_without_a_context_follows_the_begin_token(tmp_path: Path) -> None:
    runner = Asked()
    ((found, _),) = model(tmp_path, runner).loglikelihood([asking("", "b c")])
    assert [request.prompt for request in runner.requests] == [(BEGIN, 3)]
    assert found == pytest.approx(log_probs((BEGIN,))[3] + log_probs((BEGIN, 3))[4])


def test_texts_that_are_longer_than_the_context_are_counted(tmp_path: Path) -> None:
    lm = model(tmp_path, Asked(), context=6, begin=())
    lm.loglikelihood([asking("a b c d", " e a b")])  # of which the last token is not run
    assert lm.truncated == {}
    lm.loglikelihood([asking("a b c d e", " a b c")])
    assert lm.truncated == {"task": 1}


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11])
def test_each_token_of_a_long_text_counts_once(length: int, tmp_path: Path) -> None:
    """The first window holds as many tokens as fit; each later one holds as many new ones, after those before them that
    still fit."""
    context, text = 4, tuple(2 + (3 * place) % 5 for place in range(length))
    lm = model(tmp_path, Asked(), context, begin=())
    (found,) = lm.loglikelihood_rolling([asking(" ".join(WORDS[token] for token in text))])
    wanted = 0.0
    for begin in range(0, length, context):
        end = min(begin + context, length)
        row = (BEGIN, *text[: end - 1]) if begin == 0 else text[end - context - 1 : end - 1]
        for place in range(begin, end):
            wanted += float(log_probs(row[: len(row) - (end - 1 - place)])[text[place]])
    assert found == pytest.approx(wanted)


def test_settings_of_an_answer(tmp_path: Path) -> None:
    runner = Asked((2, 3, END))
    lm = model(tmp_path, runner, context=8)
    how = {"until": [".", ";"], "max_gen_toks": 3, "do_sample": False}
    assert lm.generate_until([asking("a b c d e a b c", how), asking("", how)]) == [" a b", "a b"]
    long, empty = runner.requests
    assert long.prompt == ids("e a b c d e a b c")[-5:], "the prompt's end and the answer fit into the context"
    assert empty.prompt == (BEGIN,)
    assert long.sampling.max_new_tokens == 3 and long.sampling.temperature == 0.0
    assert set(long.stop) >= {".", ";"} and long.ends == {END}
    assert lm.truncated == {"task": 1}
    assert model(tmp_path, runner, begin=()).generate_until([asking("", how)]) == ["a b"]
    assert runner.requests[-1].prompt == (BEGIN,), "an empty text is continued from the begin token"


@pytest.mark.parametrize("stop", [".", ";"])
def test_an_answer_ends_before_the_first_stop_string(stop: str, tmp_path: Path) -> None:
    lm = model(tmp_path, Asked((2, WORDS.index(stop), 3)))
    (found,) = lm.generate_until([asking("a", {"until": [".", ";"], "max_gen_toks": 3})])
    assert found.strip() == "a"


def test_a_plain_token_that_ends_answers_is_not_shown(tmp_path: Path) -> None:
    lm = model(tmp_path, Asked((2, WORDS.index("."))), ends=(END, WORDS.index(".")))
    (found,) = lm.generate_until([asking("a", {"until": [], "max_gen_toks": 3})])
    assert found.strip() == "a"


def test_answers_that_are_drawn_to_one_prompt_differ(tmp_path: Path) -> None:
    runner = Asked()
    lm = model(tmp_path, runner)
    drawn, likeliest = {"until": [], "temperature": 0.7, "do_sample": True}, {"until": [], "do_sample": False}
    settings = [{**one, "max_gen_toks": 2} for one in (drawn, drawn, likeliest, likeliest)]
    lm.generate_until([asking("a b", one) for one in settings])
    assert [request.stream for request in runner.requests] == [0, 1, None, None]


def test_programs_outside_the_sandbox_are_refused_before_anything_runs() -> None:
    from llm_parallel.evaluate.harness import Settings, run_harness

    unsafe: Any = SimpleNamespace(leaves=[SimpleNamespace(UNSAFE_CODE=True, task_name="mbpp")], items=[])
    with pytest.raises(UserError, match="mbpp runs programs of answers outside the sandbox; leave it out"):
        run_harness(None, unsafe, Settings())  # type: ignore[arg-type]


def test_the_harness_gets_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_parallel.evaluate import harness

    given: dict[str, Any] = {}

    def simple_evaluate(**what: Any) -> dict[str, Any]:
        given.update(what)
        return {"configs": {}}

    monkeypatch.setattr(harness.lm_eval, "simple_evaluate", simple_evaluate)
    documents = SimpleNamespace(task_name="one", eval_docs=list(range(10)))
    tasks: Any = SimpleNamespace(leaves=[documents], items=["one"], found=[])
    harness.run_harness(None, tasks, harness.Settings(4, 1, 7, chat=True, system="Be brief."))  # type: ignore[arg-type]
    assert given["apply_chat_template"] is True and given["system_instruction"] == "Be brief."
    assert given["gen_kwargs"] == {"max_gen_toks": 7} and len(set(given["samples"]["one"])) == 4
    assert given["random_seed"] is given["numpy_random_seed"] is given["torch_random_seed"] is None


class OneByOne:
    """A generator that answers the request that came first, with its number of tokens."""

    def __init__(self) -> None:
        self.limits = SimpleNamespace(max_running=2, num_pages=2, page_tokens=4)
        self.scheduler = SimpleNamespace(num_computed=0)
        self.submitted: list[Request] = []
        self._waiting: list[Request] = []

    @property
    def idle(self) -> bool:
        return not self._waiting

    def checked(self, request: Request) -> Request:
        return request

    def submit(self, request: Request) -> None:
        self.submitted.append(request)
        self._waiting.append(request)
        assert len(self._waiting) <= 6, "no more than two that run and twice as many that wait"

    def tick(self) -> list[Finished]:
        request = self._waiting.pop(0)
        return [Finished(request.number, 0, (len(request.prompt),), (0.0,), ((),), Reason.LENGTH)]


def test_requests_run_in_the_order_of_their_tokens_and_each_once() -> None:
    """So that neighbours begin alike; outcomes come in the order in which they were asked for."""
    from llm_parallel.evaluate.runner import Runner, Work

    prompts = [(7, 1), (3, 9, 9), (7,), (3, 9), (5, 5, 5), (3, 9), (1,), (7, 1, 2), (2, 2)]
    generator: Any = OneByOne()
    control: Any = SimpleNamespace(share=lambda commands: commands)
    runner = Runner(generator, control, Record(None, "mark"))
    made = [Request(0, prompt, Sampling(max_new_tokens=1)) for prompt in prompts]
    found = runner.run(Work(made, ["task"] * len(made)))
    assert [request.prompt for request in generator.submitted] == sorted(set(prompts))
    assert [outcome.tokens for outcome in found] == [(len(prompt),) for prompt in prompts]
    assert runner.run(Work(made, ["task"] * len(made))) == found and len(generator.submitted) == len(set(prompts))


def test_an_evaluation_within_training_is_left_if_any_process_was_asked_to_stop() -> None:
    from llm_parallel.evaluate.runner import Work
    from llm_parallel.evaluate.together import GivenUp, Together

    generator: Any = OneByOne()
    generator.replica, generator.groups = (0, 1), SimpleNamespace(at=SimpleNamespace(tp=0, pp=0))
    for stops in (False, True):
        channel: Any = SimpleNamespace(
            tell=lambda message: message, everybodys=lambda said, stops=stops: [said, (stops, [])]
        )
        together = Together(generator, channel, lambda: False)
        work = Work([Request(0, (1, 2), Sampling(max_new_tokens=1))], ["task"])
        if stops:
            with pytest.raises(GivenUp):
                together.run(work)
        else:
            assert [outcome.tokens for outcome in together.run(work)] == [(2,)]


def test_a_request_that_the_cache_has_no_room_for_is_refused_and_not_cut() -> None:
    """The room depends on the memory of the moment, and scores must not."""
    from llm_parallel.evaluate.runner import Runner, Work
    from llm_parallel.evaluate.together import Together

    generator: Any = OneByOne()
    generator.replica = (0, 1)
    several = [Request(0, (2,) * length, Sampling(max_new_tokens=1)) for length in (7, 8)]
    runner = Runner(generator, SimpleNamespace(share=lambda commands: commands), Record(None, "mark"))  # type: ignore[arg-type]
    runner.run(Work(several[:1], ["task"]))
    said = (
        "a request of task has 9 tokens with its answer, and the cache holds 8; give --cache-tokens if there is memory"
    )
    with pytest.raises(UserError, match=said):
        runner.run(Work(several, ["other", "task"]))
    with pytest.raises(UserError, match=r"of task has 9 tokens .* holds 8; half of the free memory has no room for it"):
        Together(generator, None, lambda: False).run(Work(several, ["other", "task"]))  # type: ignore[arg-type]
    assert len(generator.submitted) == 1


@pytest.mark.parametrize(("free_tokens", "wanted"), [(10**6, 64 * 512), (4000, 1000), (1400, 512), (900, 464), (8, 16)])
def test_the_cache_holds_a_whole_context_if_half_of_the_memory_does(
    free_tokens: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default a quarter of what is free, in whole pages of 16 tokens."""
    from llm_parallel.generate import engine

    monkeypatch.setattr(engine.LayerCache, "bytes_per_token", lambda _: 10)
    platform = SimpleNamespace(free_bytes=lambda: 10 * free_tokens, is_cuda=True, device="cpu")
    groups = SimpleNamespace(platform=platform, mesh=SimpleNamespace(world_size=1))
    model = SimpleNamespace(model_config=SimpleNamespace(max_seq_length_tokens=512))
    network: Any = SimpleNamespace(models=[model], groups=groups)
    found = engine._num_pages(network, engine.GeneratorOptions())
    assert 16 * found == pytest.approx(wanted, abs=16) and 16 * found >= min(wanted, free_tokens // 2)


def test_prompts_are_cut_to_the_models_context_or_to_a_smaller_one() -> None:
    from llm_parallel.evaluate.open import context_of
    from llm_parallel.evaluate.request import EvaluateRequest

    assert context_of(EvaluateRequest("m"), 512) == 512
    assert context_of(EvaluateRequest("m", context=128, cache_tokens=64), 512) == 128
    with pytest.raises(UserError, match="--context is 513, and the model's is 512 tokens; give at most that"):
        context_of(EvaluateRequest("m", context=513), 512)
    with pytest.raises(UserError, match="--context is 0; it must be at least 1"):
        EvaluateRequest("m", context=0)
