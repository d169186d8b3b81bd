"""LoRA against Hugging Face's PEFT on the same weights: gradients, AdamW steps, logits, and files both ways."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.harness import run_ranks
from tests.support.in_process import in_process
from tests.support.parity_models import load_hf, our_config, random_folder

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.gloo

ROWS, LENGTH, LR, STEPS = 4, 24, 1e-2, 3
MODULES = {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "some, rsLoRA": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
    "DoRA": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "use_dora": True,
    },
    "pattern": {"r": 4, "lora_alpha": 16, "target_modules": r".*\.(k_proj|o_proj|gate_proj|down_proj)"},
    "vocabulary": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "output whole": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "embed_tokens"],
        "modules_to_save": ["lm_head"],
    },
    "tied, whole": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "tied, vocabulary": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
TARGETS = {
    "all": tuple(MODULES),
    "some, rsLoRA": ("q", "v", "up"),
    "DoRA": ("q", "v", "o", "up", "down"),
    "pattern": ("k", "o", "gate", "down"),
    "vocabulary": ("q", "embed_tokens", "lm_head"),
    "whole": ("v",),
    "output whole": ("v", "embed_tokens"),
    "tied, whole": ("v",),
    "tied, vocabulary": ("q", "embed_tokens", "lm_head"),
}


def tokens_of(step: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(step).integers(0, 301, (ROWS, LENGTH + 1)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with two key/value groups."""
    return random_folder("grouped", tmp_path_factory.mktemp("base"))


def adapted(base: Path, kind: str, folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """PEFT's model with a second factor that is not zero, and its files."""
    torch.manual_seed(1)
    model = peft.get_peft_model(load_hf(base, dtype), peft.LoraConfig(**deepcopy(KINDS[kind]), task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0.0, 0.1)
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    model.save_pretrained(folder)
    return model


def theirs(model: Any, steps: int = STEPS) -> dict[str, Any]:
    """Gradients of the first step, the losses of all, and the logits after them."""
    trained = {
        name.replace(".default", "").replace("vector.weight", "vector").replace(".modules_to_save", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses, first = [], {}
    for step in range(steps):
        tokens = tokens_of(step)
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        first = first or {name: p.grad.clone().numpy() for name, p in trained.items()}
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model(input_ids=tokens_of(9)[:, :-1]).logits.numpy()
    return {"gradients": first, "losses": losses, "logits": logits}


def of_kind(base: Path, kind: str, folder: Path) -> Path:
    """The model for a kind of adapters: with tied embeddings, or as it is."""
    if not kind.startswith("tied"):
        return base
    model = load_hf(base, torch.float32)
    tied = type(model)(type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True}))
    tied.load_state_dict(model.state_dict() | {"lm_head.weight": model.state_dict()["model.embed_tokens.weight"]})
    tied.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder with adapters on all projections."""
    folder = tmp_path_factory.mktemp("written")
    adapted(base, "all", folder, torch.float32)
    return folder


def adapter_config(kind: str, folder: Path | None) -> dict[str, Any]:
    settings = KINDS[kind]
    return {
        "rank": settings["r"],
        "alpha": settings["lora_alpha"],
        "rank_stabilized": settings.get("use_rslora", False),
        "dora": settings.get("use_dora", False),
        "targets": TARGETS[kind],
        "modules_to_save": tuple(settings.get("modules_to_save", ())),
        "load": folder and str(folder),
    }


def rounded_folder(base: Path, kind: str, folder: Path) -> Path:
    """The model with the matrices of its layers as they are in few bits, one by one as Hugging Face has them."""
    from llm_parallel.model.quant import QuantizedMatrix

    model = load_hf(base, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                rows, columns = parameter.shape
                matrix = QuantizedMatrix(kind, rows, range(columns), columns, parameter.device, None)  # type: ignore[arg-type]
                parameter.copy_(matrix.copy_(parameter).values(torch.float32))
    model.save_pretrained(folder)
    return folder


def ours(
    rank: int,
    world_size: int,
    base: str,
    adapter: dict[str, Any],
    parallel: dict[str, Any],
    run_dir: str,
    steps: int = STEPS,
) -> dict[str, Any]:
    """The same of ours, from PEFT's files; the gradients by PEFT's names, of one process. Saves a checkpoint."""
    from llm_parallel.checkpoint.base import load_adapters, load_base
    from llm_parallel.checkpoint.state import TrainState
    from llm_parallel.checkpoint.store import CheckpointStore
    from llm_parallel.config.tree import CheckpointConfig, OptimConfig, TrainConfig
    from llm_parallel.config.tree_tune import AdapterConfig
    from llm_parallel.data.batch import Batch
    from llm_parallel.generate.forward import pipeline_logits
    from llm_parallel.model.adapters import adapters_of
    from llm_parallel.model.peft_files import peft_tensors, peft_vocabulary_tensors, peft_whole_tensor
    from llm_parallel.model.tensors import canonical_parameters
    from llm_parallel.model.vocabulary_adapters import WEIGHTS, vocabulary_adapters
    from llm_parallel.parallel.groups import open_groups
    from llm_parallel.parallel.layout import Layout
    from llm_parallel.parallel.platform import open_platform
    from llm_parallel.train.open import likelihood, policy_engine
    from llm_parallel.train.step import apply_gradient, forward_backward

    config = our_config(base, LENGTH, **parallel)
    config = config.model_copy(
        update={
            "run_dir": run_dir,
            "adapter": AdapterConfig(**adapter),
            "optim": OptimConfig(lr=LR, weight_decay=0.0, beta2=0.95, clip_grad=0.0),
            "train": TrainConfig(global_batch_size=ROWS, micro_batch_size=ROWS),
            "checkpoint": CheckpointConfig(load=base),
        }
    )
    groups = open_groups(Layout.from_config(config, world_size), rank, open_platform("cpu"), 0)
    engine = policy_engine(config, groups)
    load_base(base, engine.network)
    load_adapters(adapter["load"], engine.network)
    engine.optimizer.reload_model_params()
    losses, first = [], {}
    for step in range(steps):
        tokens = tokens_of(step)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(ROWS, LENGTH))
        outcome = forward_backward(engine, likelihood(config), [batch])
        if step == 0 and world_size == 1:
            for layer, linear, found in adapters_of(engine.models):
                tensors = (found.a, found.b, *([] if found.m is None else [found.m]))
                gradients = [tensor.main_grad for tensor in tensors]
                first |= peft_tensors(config.model, config.adapter, layer, linear, *gradients)
            for name, found in vocabulary_adapters(engine.models):
                first |= peft_vocabulary_tensors(config.model, name, found.a.main_grad, found.b.main_grad)
            by_name = dict(canonical_parameters(engine.models[0]))
            for name in config.adapter.modules_to_save:
                if WEIGHTS[name] in by_name:
                    first |= peft_whole_tensor(config.model, name, by_name[WEIGHTS[name]].main_grad)
            first = {name: gradient.clone().numpy() for name, gradient in first.items()}
        apply_gradient(engine, outcome, LR, 0.0)
        losses.append(outcome.loss)
    store = CheckpointStore(Path(run_dir) / "checkpoints", config.checkpoint, config, groups)
    store.save({"policy": engine}, TrainState(step=STEPS), blocking=True)
    engine.parameters_up_to_date()
    with torch.no_grad():
        logits = pipeline_logits(engine.models, tokens_of(9)[:, :-1])
    return {"gradients": first, "losses": losses, "logits": None if logits is None else logits.numpy()}


SLOW = ("pattern", "whole", "vocabulary", "tied, whole", "output whole")
GRADIENTS = ["all", "some, rsLoRA", "DoRA", "tied, vocabulary"]


@pytest.mark.parametrize("kind", [*GRADIENTS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_gradients_steps_and_logits_are_pefts(kind: str, base: Path, tmp_path: Path) -> None:
    """From PEFT's files, which thus are read. Adam divides a gradient by its size, so that the rounding of small ones
    grows: PEFT itself in fp32 says how far logits may be from its own in fp64."""
    base = of_kind(base, kind, tmp_path / "tied")
    model = adapted(base, kind, tmp_path / "peft")
    in_fp32 = theirs(deepcopy(model).float())["logits"]
    expected = theirs(model)
    rounding = np.abs(in_fp32 - expected["logits"]).max()
    settings = adapter_config(kind, tmp_path / "peft")
    found = run_ranks(ours, 1, str(base), settings, {}, str(tmp_path / "run"))[0]
    assert found["gradients"].keys() == expected["gradients"].keys()
    worst = 0.0
    for name, gradient in expected["gradients"].items():
        distance = np.linalg.norm(found["gradients"][name] - gradient) / np.linalg.norm(gradient)
        worst = max(worst, distance)
        assert distance <= 1e-5, name
    difference = np.abs(found["logits"] - expected["logits"]).max()
    losses = np.abs(np.array(found["losses"]) / expected["losses"] - 1).max()
    logits = f"logits after {STEPS} steps {difference:.1e}, PEFT's own in fp32 {rounding:.1e}"
    print(f"| {kind} | gradients {worst:.1e} | losses {losses:.1e} | {logits} |")
    assert losses <= 1e-5
    assert difference <= 1e-4 + 4 * rounding
    from llm_parallel.config.tree_tune import AdapterConfig
    from llm_parallel.model.flops import adapter_parameters

    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(our_config(str(base), LENGTH).model, AdapterConfig(**settings)) == count


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_base_in_few_bits_is_peft_on_its_values(kind: str, base: Path, tmp_path: Path) -> None:
    """NF4 in two ranks, whose blocks are not those of one rank; merged, it is the model that was trained."""
    expected = theirs(adapted(rounded_folder(base, kind, tmp_path / "rounded"), "all", tmp_path / "peft"))
    settings = adapter_config("all", tmp_path / "peft") | {"base": kind}
    ranks = 2 if kind == "nf4" else 1
    found = run_ranks(ours, ranks, str(base), settings, {"tp": ranks}, str(tmp_path / "run"))[0]
    losses = np.abs(np.array(found["losses"]) / expected["losses"] - 1).max()
    print(f"| {kind} | losses {losses:.1e} |")
    assert losses <= 1e-5
    for name, gradient in expected["gradients"].items() if ranks == 1 else ():
        distance = np.linalg.norm(found["gradients"][name] - gradient) / np.linalg.norm(gradient)
        assert distance <= 1e-5, name
    done = in_process("convert", tmp_path / "run", tmp_path / "merged", "--merge")
    assert done.returncode == 0, done.stderr
    assert f"were merged in {kind}, as in training; they differ from those of " in done.stdout
    with torch.no_grad():
        logits = load_hf(tmp_path / "merged", torch.float32)(tokens_of(9)[:, :-1]).logits
    assert np.abs(logits.numpy() - expected["logits"]).max() <= 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"tp": 4}, {"pp": 2}],
    ids=lambda parallel: "-".join(f"{name}{size}" for name, size in parallel.items()) or "alone",
)
@pytest.mark.parametrize("family", ["grouped", "llama with every bias"])
def test_ten_steps_of_dora_are_pefts_in_layouts(family: str, parallel: dict[str, Any], tmp_path: Path) -> None:
    """With more ranks than groups, and with biases, which magnitudes do not multiply."""
    base = random_folder(family, tmp_path / "base")
    expected = theirs(adapted(base, "DoRA", tmp_path / "peft"), 10)
    settings = adapter_config("DoRA", tmp_path / "peft")
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("cp", 1)
    for found in run_ranks(ours, ranks, str(base), settings, parallel, str(tmp_path / "run"), 10):
        worst = np.abs(np.array(found["losses"]) / expected["losses"] - 1).max()
        print(f"| {family} | {parallel} | losses {worst:.1e} |")
        assert worst <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 2}], ids=["tp2-pp2", "tp4", "pp2"])
@pytest.mark.parametrize("kind", ["tied, whole", "tied, vocabulary", "output whole"])
def test_steps_on_the_vocabulary_are_pefts_in_layouts(
    kind: str, parallel: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    base = of_kind(base, kind, tmp_path / "tied")
    expected = theirs(adapted(base, kind, tmp_path / "peft"), 6)
    settings = adapter_config(kind, tmp_path / "peft")
    ranks = parallel.get("tp", 1) * parallel.get("pp", 1)
    for found in run_ranks(ours, ranks, str(base), settings, parallel, str(tmp_path / "run"), 6):
        worst = np.abs(np.array(found["losses"]) / expected["losses"] - 1).max()
        print(f"| {kind} | {parallel} | losses {worst:.1e} |")
        assert worst <= 1e-5


@pytest.mark.slow
def test_more_ranks_than_groups_read_pefts_files_too(base: Path, tmp_path: Path) -> None:
    expected = theirs(adapted(base, "some, rsLoRA", tmp_path / "peft"))
    settings = adapter_config("some, rsLoRA", tmp_path / "peft")
    found = run_ranks(ours, 4, str(base), settings, {"tp": 4}, str(tmp_path / "run"))[0]
    assert np.abs(np.array(found["losses"]) / expected["losses"] - 1).max() <= 1e-5


ROUND_TRIPS = ("some, rsLoRA", "tied, vocabulary", "tied, whole", "output whole", "vocabulary")


@pytest.mark.parametrize("kind", ["all", "DoRA", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ROUND_TRIPS)])
def test_peft_and_transformers_read_what_we_write(kind: str, base: Path, tmp_path: Path) -> None:
    """PEFT our adapters, transformers the merged model, and ``generate``'s loader all three."""
    base = of_kind(base, kind, tmp_path / "tied")
    adapted(base, kind, tmp_path / "peft", torch.float32)
    settings = adapter_config(kind, tmp_path / "peft")
    wanted = run_ranks(ours, 1, str(base), settings, {}, str(tmp_path / "run"))[0]["logits"]
    written, merged = tmp_path / "written", tmp_path / "merged"
    for target, options in ((written, ()), (merged, ("--merge",))):
        done = in_process("convert", tmp_path / "run", target, *options)
        assert done.returncode == 0, done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith("largest logit difference")]
        assert float(line.partition(": ")[2].split()[0]) <= 1e-4, line
    tokens = tokens_of(9)[:, :-1]
    with torch.no_grad():
        by_peft = peft.PeftModel.from_pretrained(load_hf(base, torch.float32), written)(input_ids=tokens).logits
        alone = load_hf(merged, torch.float32)(tokens).logits
    assert np.abs(by_peft.numpy() - wanted).max() <= 1e-4
    assert np.abs(alone.numpy() - wanted).max() <= 1e-4
    done = in_process("convert", written, tmp_path / "again", "--merge")
    assert done.returncode == 0, done.stderr


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("ranks", {"rank_pattern": {"q_proj": 2}}, 'rank_pattern = {"q_proj": 2}'),
    ("alphas", {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ("other whole modules", {"modules_to_save": ["norm"]}, 'modules_to_save = ["norm"]'),
    ("layers", {"layers_to_transform": [0]}, "layers_to_transform"),
    ("bias", {"bias": "all"}, 'bias = "all"'),
    ("transposed", {"fan_in_fan_out": True}, "fan_in_fan_out"),
    ("another method", {"peft_type": "IA3"}, 'peft_type = "IA3"'),
    ("another start", {"init_lora_weights": "pissa"}, "init_lora_weights"),
    ("rank 0", {"r": 0}, "has r = 0; it must be over 0"),
]


@pytest.mark.parametrize(("settings", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_would_compute_something_else_is_refused(
    settings: dict[str, Any], words: str, written: Path, tmp_path: Path
) -> None:
    from llm_parallel.errors import UserError
    from llm_parallel.model.peft_files import PeftFolder

    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=r"adapter_config.json has ") as error:
        PeftFolder(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_adapters_for_another_model_or_place_are_refused(base: Path, tmp_path: Path) -> None:
    from llm_parallel.errors import UserError
    from llm_parallel.model.peft_files import PeftFolder

    adapted(base, "all", tmp_path / "one", torch.float32)
    model = our_config(str(base), LENGTH).model
    with pytest.raises(UserError, match="has adapters for 4 layers, and the model has 3"):
        PeftFolder(tmp_path / "one").check(model.model_copy(update={"num_layers": 3}))
    with pytest.raises(
        UserError, match=r"gate_proj.lora_B.weight .* has shape \[160, 4\], and the model needs \[128, 4\]"
    ):
        PeftFolder(tmp_path / "one").check(model.model_copy(update={"ffn_hidden_size": 128}))
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", use_dora=True)
    peft.get_peft_model(load_hf(base, torch.float32), settings).save_pretrained(tmp_path / "head")
    with pytest.raises(UserError, match=r"has .*lm_head.*, a magnitude of lm_head \(use_dora\), which adapters on it"):
        PeftFolder(tmp_path / "head")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="is not a complete PEFT adapter"):
        PeftFolder(tmp_path / "one")
