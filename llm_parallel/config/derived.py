"""Settings of other systems whose counterpart here follows from several values, as steps of gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Known = Callable[[str], Any]
"""The value of a field by its dotted name, as far as it is known."""


def _global_batch(value: Any, known: Known) -> tuple[str, Any, str]:
    micro, replicas = known("train.micro_batch_size"), known("parallel.dp") or 1
    return (
        "train.global_batch_size",
        value * micro * replicas,
        f"{value} x micro batch {micro} x parallel.dp {replicas}",
    )


def _warmup(value: Any, known: Known) -> tuple[str, Any, str]:
    if known("train.epochs") is not None:
        return "optim.warmup_fraction", value, "of the steps that train.epochs makes"
    steps = known("train.steps")
    return "optim.warmup_steps", round(value * steps), f"{value} x train.steps {steps}"


def _min_lr(value: Any, known: Known) -> tuple[str, Any, str]:
    lr = known("optim.lr")
    return "optim.min_lr", value * lr, f"{value} x optim.lr {lr}"


def _chunks(value: Any, known: Known) -> tuple[str, Any, str]:
    layers, stages = known("model.num_layers"), known("parallel.pp")
    if layers % (stages * value):
        raise ValueError(f"{value} layers do not divide the {layers // stages} of a stage")
    return "parallel.vpp", layers // (stages * value), f"model.num_layers {layers} / parallel.pp {stages} / {value}"


def _steps(value: Any, known: Known) -> tuple[str, Any, str]:
    size = known("train.global_batch_size")
    return "train.steps", value // size, f"{value} / train.global_batch_size {size}"


def _of_samples(target: str) -> Callable[[Any, Known], tuple[str, Any, str]]:
    """A number of samples as steps."""

    def derive(value: Any, known: Known) -> tuple[str, Any, str]:
        size = known("train.global_batch_size")
        return target, -(-value // size), f"{value} / train.global_batch_size {size}"

    return derive


def _beta(value: Any, known: Known) -> tuple[str, Any, str]:
    kind = known("method.kind")
    return f"method.{'kto' if kind == 'kto' else 'dpo'}.beta", value, f"method.kind is {kind or 'not given'}"


def _eval_samples(value: Any, known: Known) -> tuple[str, Any, str]:
    if not isinstance(value, int) or value < 1:
        raise ValueError("it must be a whole number over 0; data.eval_fraction=0 switches evaluations off")
    size = known("train.global_batch_size")
    return "train.eval_samples", value * size, f"{value} x train.global_batch_size {size}"


def _apart(value: Any, known: Known) -> tuple[str, Any, str]:
    if not isinstance(value, bool | int):
        raise ValueError("it must be true or false")
    how = "positions and attention begin anew at every document, and no token is predicted across a boundary"
    return "data.packing", "isolate" if value else known("data.packing"), how if value else "nothing else is asked for"


DATASET_DIR = "data"
"""Where LLaMA-Factory looks for dataset_info.json if it is not told."""


def _datasets(target: str) -> Callable[[Any, Known], tuple[str, Any, str]]:
    """LLaMA-Factory's names of data sets, with commas, as sources; its ``dataset_dir`` is their folder."""

    def derive(value: Any, known: Known) -> tuple[str, Any, str]:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(
                "it must be names of a dataset_info.json, with commas; conversations are named in chat.train, as "
                "{path: FILE}, or {path: DATASET_DIR, dataset: NAME}, and token files in data.train"
            )
        folder = known("dataset_dir")
        if folder is not None and not isinstance(folder, str):
            raise ValueError(f"dataset_dir = {folder} must be a folder with a dataset_info.json")
        folder = folder or DATASET_DIR
        said = f"data sets of {folder}/dataset_info.json"
        return target, [{"path": folder, "dataset": name.strip()} for name in names], said

    return derive


def _dataset_dir(value: Any, known: Known) -> tuple[str, Any, str]:
    """Where the data sets are; it has no field of its own, and says nothing without them."""
    if known("dataset") is None and known("eval_dataset") is None:
        raise ValueError(
            "it is the folder of a dataset_info.json, and no data set is named; give dataset: NAME, or name the "
            "conversations in chat.train"
        )
    target, name = ("chat.train", "dataset") if known("dataset") is not None else ("chat.eval", "eval_dataset")
    return _datasets(target)(known(name), known)


DERIVED: dict[str, Callable[[Any, Known], tuple[str, Any, str]]] = {
    "gradient_accumulation_steps": _global_batch,
    "accumulate_grad_batches": _global_batch,
    "warmup_ratio": _warmup,
    "lr_warmup_fraction": _warmup,
    "min_lr_ratio": _min_lr,
    "min_lr_factor": _min_lr,
    "num_layers_per_virtual_pipeline_stage": _chunks,
    "pipeline_parallel_layers_per_stage": _chunks,
    "train_samples": _steps,
    "lr_warmup_samples": _of_samples("optim.warmup_steps"),
    "lr_decay_samples": _of_samples("optim.decay_steps"),
    "pref_beta": _beta,
    "eval_iters": _eval_samples,
    "limit_val_batches": _eval_samples,
    "validation.steps": _eval_samples,
    "reset_position_ids": _apart,
    "eod_mask_loss": _apart,
    "dataset": _datasets("chat.train"),
    "eval_dataset": _datasets("chat.eval"),
    "dataset_dir": _dataset_dir,
}
"""Name of a setting → our field, its value, and how that was computed."""
