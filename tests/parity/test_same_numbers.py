"""Log-probabilities of generated tokens and those of the training forward on the same tokens, through the training
schedule: to rounding, and bit for bit under ``kernels.deterministic``.

``python -m tests.parity.test_same_numbers`` prints the table of layouts, precisions and modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_parallel.config.tree import KernelsConfig, TrainConfig
from llm_parallel.generate.requests import Finished, Request
from tests.parity.test_generator import SMALL, answers, mixed_requests
from tests.support.harness import run_ranks
from tests.support.parity_models import RANDOM, our_config, random_folder

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


def scored(network: Any, found: list[Finished], made: list[Request]) -> dict[tuple[int, int], list[float]]:
    """Log-probabilities of the answers' tokens by the training forward, on processes of the last stage: texts beside
    each other in rows, which begin with them."""
    from llm_parallel.data.batch import Batch, Documents
    from llm_parallel.train.step import evaluate

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
    objective = Collected()
    evaluate(network, objective, batches)
    if not objective.losses:
        return {}
    losses = torch.cat(objective.losses)
    out = {}
    for answer, (row, start) in zip(found, places):
        first = start + len(prompts[answer.number]) - 1
        out[answer.number, answer.sample] = (-losses[row, first : first + len(answer.tokens)]).double().tolist()
    return out


def open_network(
    folder: str, rank: int, world_size: int, parallel: dict[str, Any], precision: str, deterministic: bool
) -> Any:
    from llm_parallel.config.rules import check_config
    from llm_parallel.model.gpt import build_policy
    from llm_parallel.model.hf import load_hf_weights
    from llm_parallel.parallel.groups import close_groups, open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform

    config = our_config(folder, WIDTH, **parallel)
    micro = 2 * parallel.get("pp", 1)
    train = TrainConfig(precision=precision, micro_batch_size=2, global_batch_size=2 * micro)
    config = config.model_copy(update={"kernels": KernelsConfig(deterministic=deterministic), "train": train})
    check_config(config, world_size, "cpu")
    close_groups(world=False)
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), config.seed)
    network = build_policy(config, groups)
    load_hf_weights(folder, network.models)
    return network


def compare_job(
    rank: int, world_size: int, folders: list[str], made: list[Request], parallel: dict[str, Any],
    precision: str, deterministic: bool, options: dict[str, int],
) -> list[tuple[list[Finished], dict]]:  # fmt: skip
    from llm_parallel.generate.engine import Generator, GeneratorOptions

    out = []
    for seed, folder in enumerate(folders):
        network = open_network(folder, rank, world_size, parallel, precision, deterministic)
        found = answers(Generator(network, GeneratorOptions(**options)), made, seed)
        out.append((found, scored(network, found, made)))
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
    folders: list[Path], parallel: dict[str, Any], precision: str, deterministic: bool, count: int = 12,
    options: dict[str, int] = SMALL,
) -> list[list[tuple[list[Finished], dict]]]:  # fmt: skip
    """For each folder what every process found."""
    job = [str(folder) for folder in folders], drawn(count), parallel, precision, deterministic, options
    by_rank = run_ranks(compare_job, processes_of(parallel), *job, timeout_s=900.0)
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
        for kind, by_rank in zip(KINDS, compare(folders, {}, precision, deterministic)):
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
    (one,) = compare([folder], {}, precision, True)
    for parallel in LAYOUTS[1:]:
        (by_rank,) = compare([folder], parallel, precision, True)
        assert answers_of(by_rank) == answers_of(one), parallel
        scores = {key: numbers for _, found in by_rank for key, numbers in found.items()}
        if "cp" not in parallel:  # of which a process has a part of each row
            assert all(list(answer.log_probs) == scores[answer.number, 0] for answer in answers_of(by_rank)), parallel


@pytest.mark.gloo
def test_two_shards_have_the_numbers_of_one(tmp_path: Path) -> None:
    folder = random_folder(EQUAL_IN_ALL, tmp_path)
    one, two = ([compare([folder], parallel, "fp32", True, 6)][0][0] for parallel in ({}, {"tp": 2}))
    assert answers_of(one) == answers_of(two) and differences(two)[0] == 0.0


def print_table() -> None:
    """Largest difference and equal numbers by mode, precision and layout, over two families and SmolLM2-135M."""
    import tempfile

    print("| model | layout | precision | mode | largest difference | equal | tokens |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        for kind in ("olmo2", "llama-3.1 tied"):
            folder = random_folder(kind, Path(made) / kind)
            for parallel in LAYOUTS:
                if "cp" in parallel:
                    continue
                for precision in ("fp32", "bf16"):
                    for deterministic in (False, True):
                        (by_rank,) = compare([folder], parallel, precision, deterministic, 16)
                        largest, equal, count = differences(by_rank)
                        layout = " ".join(f"{axis} {size}" for axis, size in parallel.items()) or "one process"
                        mode = "deterministic" if deterministic else "normal"
                        print(
                            f"| {kind} | {layout} | {precision} | {mode} | {largest:.1e} | {equal} | {count} |",
                            flush=True,
                        )


if __name__ == "__main__":
    print_table()
