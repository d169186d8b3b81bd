"""Log-probabilities of generated tokens and those of the training forward on the same tokens, through the training
schedule: to rounding, and bit for bit under ``kernels.deterministic``.

``python -m tests.parity.test_same_numbers [MODEL …]`` prints the table of layouts, precisions and modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.config.tree import KernelsConfig, TrainConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.generate.requests import Finished, Request
from tests.parity.test_generator import SMALL, answers, mixed_requests
from tests.support.harness import run_ranks
from tests.support.parity_models import RANDOM, load_hf, our_config, random_folder
from tests.support.smollm import smollm_folder

FOLLOWS_LENGTH = ("dynamic, longer than its context", "longrope")
KINDS = [kind for kind in RANDOM if kind not in FOLLOWS_LENGTH]
WIDTH = 96


class Collected:
    """An objective that keeps the losses of each label."""

    unit, reads, statistics, ratios = "token", (), (), {}
    weighted_in_model, loss_options = False, {}

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def __call__(self, batch: Any, groups: Any, output: Any) -> Any:
        from llm_parallel.objectives.base import Terms

        self.losses.append(output.detach())
        return Terms(output.sum() * 0.0, torch.ones((), dtype=torch.int32))


def scored(engine: Any, found: list[Finished], made: list[Request]) -> dict[tuple[int, int], list[float]]:
    """Log-probabilities of the answers' tokens in a training step, on processes of the last stage. Texts stand beside
    each other in rows, which begin with them."""
    from llm_parallel.data.batch import Batch, Documents
    from llm_parallel.train.step import evaluate, forward_backward

    prompts = {request.number: request.prompt for request in made}
    texts = [[*prompts[answer.number], *answer.tokens] for answer in found]
    places, rows, starts = [], [[]], [[]]
    for text in texts:
        if len(rows[-1]) + len(text) > WIDTH:
            rows.append([])
            starts.append([])
        places.append((len(rows) - 1, len(rows[-1])))
        starts[-1].append(len(rows[-1]))
        rows[-1] += text
    if len(rows) % 4:
        more = 4 - len(rows) % 4  # whole micro batches, two of them for each interleaved stage
        rows, starts = rows + [[1]] * more, starts + [[0]] * more
    tokens = torch.tensor([row + [0] * (WIDTH - len(row)) for row in rows])
    labels = torch.roll(tokens, -1, 1)
    batches = [
        Batch(tokens[at : at + 2], labels[at : at + 2], torch.ones(2, WIDTH), Documents(tuple(
            torch.tensor([*begin, *([len(row)] if len(row) < WIDTH else [])], dtype=torch.int32)
            for begin, row in zip(starts[at : at + 2], rows[at : at + 2])
        )))
        for at in range(0, len(rows), 2)
    ]  # fmt: skip
    step, evaluation = Collected(), Collected()
    evaluate(engine.network, evaluation, batches)
    engine.network.set_training(True)
    forward_backward(engine, step, batches)
    if not step.losses:
        return {}
    losses = torch.cat(step.losses)
    assert torch.equal(losses, torch.cat(evaluation.losses))
    out = {}
    for answer, (row, start) in zip(found, places):
        first = start + len(prompts[answer.number]) - 1
        out[answer.number, answer.sample] = (-losses[row, first : first + len(answer.tokens)]).double().tolist()
    return out


@dataclass(frozen=True)
class How:
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    deterministic: bool = True
    adapter: AdapterConfig | None = None


def open_engine(folder: str, rank: int, world_size: int, how: How) -> Any:
    from llm_parallel.checkpoint.base import load_base
    from llm_parallel.config.rules import check_config
    from llm_parallel.model.adapters import adapters_of
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.model.init import normal_rows
    from llm_parallel.parallel.engine import build_engine
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    config = our_config(folder, WIDTH, **how.parallel)
    replicas = 4 * how.parallel.get("pp", 1) * how.parallel.get("dp", 1)
    train = TrainConfig(precision=how.precision, micro_batch_size=2, global_batch_size=replicas)
    kernels = KernelsConfig(deterministic=how.deterministic)
    config = config.model_copy(update={"kernels": kernels, "train": train, "adapter": how.adapter})
    if how.adapter is not None:
        config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"load": folder})})
    check_config(config, world_size, "cpu")
    close_groups(world=False)
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), config.seed)
    network = build_policy(config, groups)
    if how.adapter is None:
        load_hf_weights(folder, network.models)
    else:
        load_base(folder, network)
        for layer, linear, adapter in adapters_of(network.models):
            with torch.no_grad():  # alike in every layout but for the order of rows, which tensor parallelism divides
                adapter.b.copy_(normal_rows(layer, linear, range(adapter.b.shape[0]), adapter.b.shape[1]) * 0.05)
    return build_engine(network, config.optim, config.parallel)


def compare_job(
    rank: int, world_size: int, folders: list[str], made: list[Request], how: How, options: dict[str, int]
) -> list[tuple[list[Finished], dict]]:
    from llm_parallel.generate.engine import Generator, GeneratorOptions

    out = []
    for seed, folder in enumerate(folders):
        engine = open_engine(folder, rank, world_size, how)
        found = answers(Generator(engine, GeneratorOptions(**options)), made, seed)
        out.append((found, scored(engine, found, made)))
    return out


def differences(by_rank: list[tuple[list[Finished], dict]]) -> tuple[float, int, int]:
    """Largest difference, and how many of how many tokens are equal, over all processes that have numbers."""
    pairs = [
        (answer.log_probs, scores[answer.number, answer.sample]) for found, scores in by_rank if scores
        for answer in found
    ]  # fmt: skip
    generated, trained = (np.concatenate([np.asarray(pair[side]) for pair in pairs]) for side in (0, 1))
    return float(np.abs(generated - trained).max()), int((generated == trained).sum()), len(generated)


LAYOUTS = (
    {},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": False},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": False},
    {"pp": 2, "vpp": 2},
    {"cp": 2},
    {"dp": 2},
)
EQUAL_IN_ALL = "olmo2"
"""A family with a norm over the heads of all ranks."""


def processes_of(parallel: dict[str, Any]) -> int:
    return int(np.prod([size for axis, size in parallel.items() if axis in ("tp", "pp", "cp", "dp")]))


def drawn(count: int) -> list[Request]:
    """Requests whose answers are drawn from the model's own distribution, which training scores."""
    return mixed_requests(count, 1, temperature=1.0)


def compare(
    folders: list[Path], how: How, count: int = 12, options: dict[str, int] = SMALL
) -> list[list[tuple[list[Finished], dict]]]:
    """For each folder what every process found."""
    job = [str(folder) for folder in folders], drawn(count), how, options
    by_rank = run_ranks(compare_job, processes_of(how.parallel), *job, timeout_s=900.0)
    return [[found[number] for found in by_rank] for number in range(len(folders))]


def answers_of(by_rank: list[tuple[list[Finished], dict]]) -> list[Finished]:
    return sorted({answer.number: answer for found, _ in by_rank for answer in found}.values(), key=lambda a: a.number)


@pytest.mark.gloo
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_family_has_the_numbers_of_training(precision: str, tmp_path: Path) -> None:
    """Without the mode to rounding; with it to the last bit, in chunks of prompts, after interruptions, and from pages
    that requests share."""
    folders = [random_folder(kind, tmp_path / str(number)) for number, kind in enumerate(KINDS)]
    for deterministic in (False, True):
        for kind, by_rank in zip(KINDS, compare(folders, How({}, precision, deterministic))):
            largest, equal, count = differences(by_rank)
            if deterministic:
                assert (largest, equal) == (0.0, count), kind
            elif precision == "fp32":
                assert largest < 2e-5 and equal < count, kind


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_layout_has_the_same_numbers_to_the_last_bit(precision: str, tmp_path: Path) -> None:
    """Tokens drawn, their log-probabilities, and those of training."""
    folder = random_folder(EQUAL_IN_ALL, tmp_path)
    (one,) = compare([folder], How({}, precision))
    for parallel in LAYOUTS[1:]:
        (by_rank,) = compare([folder], How(parallel, precision))
        assert answers_of(by_rank) == answers_of(one), parallel
        scores = {key: numbers for _, found in by_rank for key, numbers in found.items()}
        if "cp" not in parallel:  # of which a process has a part of each row
            assert all(list(answer.log_probs) == scores[answer.number, 0] for answer in answers_of(by_rank)), parallel


@pytest.mark.gloo
def test_two_shards_have_the_numbers_of_one(tmp_path: Path) -> None:
    folder = random_folder(EQUAL_IN_ALL, tmp_path)
    one, two = (compare([folder], How(parallel), 6)[0] for parallel in ({}, {"tp": 2}))
    assert answers_of(one) == answers_of(two) and differences(two)[0] == 0.0


ADAPTED = (
    {},
    {"targets": ("q", "v", "down"), "base": "int8"},
    {"targets": ("o", "gate", "up"), "base": "nf4"},
)


@pytest.mark.gloo
@pytest.mark.parametrize(
    "parallel",
    [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}))],
    ids=str,
)
def test_adapters_have_the_numbers_of_training(parallel: dict[str, Any], tmp_path: Path) -> None:
    """Beside whole weights and weights in few bits."""
    folder = random_folder("qwen2", tmp_path)
    for settings in ADAPTED:
        adapter = AdapterConfig(rank=4, **settings)
        for deterministic in (False, True):
            for precision in ("fp32", "bf16") if deterministic else ("fp32",):
                (by_rank,) = compare([folder], How(parallel, precision, deterministic, adapter), 6)
                largest, equal, count = differences(by_rank)
                assert (largest, equal) == (0.0, count) if deterministic else largest < 2e-5, (largest, equal, count)


def bank_job(rank: int, world_size: int, folder: str, adapters: dict[str, str], parallel: Any) -> list[Finished]:
    """Answers by the model and by adapters on it that requests name, in the same passes."""
    from llm_parallel.config.tree import ParallelConfig
    from llm_parallel.generate.engine import Generator, GeneratorOptions
    from llm_parallel.generate.load import Member, load_model
    from llm_parallel.parallel.groups import close_groups

    close_groups(world=False)
    member = Member(rank, rank, world_size, ParallelConfig(**parallel))
    loaded = load_model(folder, "cpu", deterministic=True, member=member, adapters=adapters)
    names = [None, *adapters]
    made = [
        replace(request, adapter=names[request.number % len(names)], stream=request.number // len(names))
        for request in drawn(12)
    ]
    return answers(Generator(loaded.network, GeneratorOptions(**SMALL), bank=loaded.bank), made, 0)


def alone_job(rank: int, world_size: int, folder: str, adapters: dict[str, str]) -> list[list[Finished]]:
    """Those answers, and then of the model and of each adapter its own, one after the other."""
    from llm_parallel.generate.engine import Generator
    from llm_parallel.generate.load import load_model
    from llm_parallel.parallel.groups import close_groups

    found = [bank_job(rank, world_size, folder, adapters, {})]
    for place, path in enumerate([folder, *adapters.values()]):
        close_groups(world=False)
        generator = Generator(load_model(path, "cpu", deterministic=True).network)
        made = [replace(one, stream=one.number // 3) for one in drawn(12) if one.number % 3 == place]
        found.append([answer for request in made for answer in generator.run([request])])
    return found


@pytest.mark.gloo
def test_adapters_that_requests_name_have_the_same_numbers(tmp_path: Path) -> None:
    """In any batch to the last bit those of the adapter alone, which are those of training."""
    folder, adapters = bank_folders(tmp_path)
    ((found, *alone),) = run_ranks(alone_job, 1, folder, adapters)
    for place, own in enumerate(alone):
        assert [one for one in found if one.number % 3 == place] == own, ["base", *adapters][place]


@pytest.mark.slow
@pytest.mark.gloo
def test_adapters_that_requests_name_have_the_same_numbers_in_every_layout(tmp_path: Path) -> None:
    folder, adapters = bank_folders(tmp_path)
    (one,) = run_ranks(bank_job, 1, folder, adapters, {})
    for parallel in ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}):
        for found in run_ranks(bank_job, processes_of(parallel), folder, adapters, parallel):
            assert found == one, parallel


def bank_folders(path: Path) -> tuple[str, dict[str, str]]:
    """A model whose projections have biases, and two adapters on it."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    folder = random_folder("llama with every bias", path / "base")
    targets = {"one": ["q_proj", "o_proj", "down_proj"], "two": ["v_proj", "gate_proj", "up_proj"]}
    for seed, (name, of) in enumerate(targets.items()):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=4 + seed, target_modules=of, lora_alpha=16, task_type="CAUSAL_LM")
        made = peft.get_peft_model(load_hf(folder, torch.float32), settings)
        for parameter_name, parameter in made.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, 0.0, 0.3)
        made.save_pretrained(path / name)
    return str(folder), {name: str(path / name) for name in targets}


SMOLLM = "SmolLM2-135M"


def print_table(kinds: Sequence[str] = ("olmo2", "llama-3.1 tied", SMOLLM)) -> None:
    """Largest difference and equal numbers by layout, precision and mode."""
    import tempfile

    print("| model | layout | precision | mode | largest difference | equal | tokens |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for kind in kinds:
            folder = smollm_folder() if kind == SMOLLM else random_folder(kind, Path(made) / kind)
            layouts = ({}, {"tp": 3}, {"pp": 2}) if kind == SMOLLM else LAYOUTS
            for parallel, precision, deterministic in product(layouts, ("fp32", "bf16"), (False, True)):
                if "cp" in parallel:  # of whose rows a process has a part
                    continue
                (by_rank,) = compare([folder], How(parallel, precision, deterministic), 16 if kind != SMOLLM else 6)
                largest, equal, count = differences(by_rank)
                layout = " ".join(f"{axis} {size}" for axis, size in parallel.items()) or "one process"
                mode = "deterministic" if deterministic else "normal"
                row = kind, layout, precision, mode, f"{largest:.1e}", str(equal), str(count)
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    import sys

    print_table(*([sys.argv[1:]] if sys.argv[1:] else []))
