"""Checks and information before any process starts: configuration, files, vocabulary, data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_parallel.config.rules import check_chat_inputs, check_config, check_inputs, num_processes
from llm_parallel.config.tree import RunConfig, TrainConfig
from llm_parallel.data.chat_data import ChatData
from llm_parallel.data.chat_files import prepare_conversations
from llm_parallel.data.group_data import GroupData
from llm_parallel.data.group_files import prepare_groups
from llm_parallel.data.mix import MixtureRow, check_token_files, mixture_table, tokenizer_of_reports
from llm_parallel.data.pack import Packer
from llm_parallel.data.prompts import Prompts, prepare_prompts
from llm_parallel.data.samples import SampleSource
from llm_parallel.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.parallel.layout import Layout
from llm_parallel.tasks.open import open_judge
from llm_parallel.tasks.readings import check_records
from llm_parallel.train.beside import check_beside
from llm_parallel.train.inherit import Held, check_reference, inherited, other_tokenizer, with_model_of
from llm_parallel.train.leftovers import unused_conversations
from llm_parallel.train.step_settings import steps_for, total_samples

MANY_STEPS = 10**9
OVERSHOOT = 1.05
"""A run may have so many times the epochs that were asked for before it is said."""
NVIDIA_DEVICE = Path("/dev/nvidia0")


def expected_device(config: RunConfig) -> str:
    """``cuda`` or ``cpu``; torch is asked only about a GPU that is wanted and not seen."""
    if config.device == "cpu":
        return "cpu"
    if NVIDIA_DEVICE.exists():
        return "cuda"
    if config.device == "auto":
        return "cpu"
    import torch  # takes two seconds; a GPU may have another device file, as under WSL

    return "cuda" if torch.cuda.is_available() else "cpu"


def preflight(
    config: RunConfig,
    world_size: int | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> RunConfig:
    """The configuration with the vocabulary filled in from the tokenizer, after every check that needs no process.

    ``world_size``: number of processes if they are already started; ``notice`` is called with what could not be
    checked. A run that begins copies what may vanish to its folder after this (``with_own_tokenizer``). Raises
    UserError.
    """
    config = with_value_head(inherited(without_own_load(config, notice), notice))
    config = with_reported_tokenizer(config, notice)
    processes = world_size or num_processes(config)
    device = expected_device(config)
    train = config.train
    if train.epochs is not None:  # until the conversations are counted, train.steps may be any number
        train = train.model_copy(update={"steps": MANY_STEPS})
    check_config(config.model_copy(update={"train": train}), processes, device)  # type: ignore[arg-type]
    check_kernels(config, device, notice)
    config = check_data(config, notice)
    check_config(config, processes, device)  # type: ignore[arg-type]  # the data may have decided train.steps
    return config


def preflight_job(
    config: RunConfig,
    gpus: int,
    processes: int,
    notice: Callable[[str], None] = lambda _: None,
    promised: Held | None = None,
) -> RunConfig:
    """The same for a job of ``processes`` processes on nodes with ``gpus`` GPUs each, of which this machine is none:
    whether their GPUs run the kernels is found there. ``promised``: the model that another job will have left in
    ``checkpoint.load`` by then. Raises UserError."""
    if config.device == "cuda" and not gpus:
        raise UserError(
            "device = cuda, and --gpus-per-node 0 asks for nodes without GPUs; give --gpus-per-node, or device=cpu"
        )
    if config.device == "cpu" and gpus:
        notice(f"device = cpu: the {gpus} GPUs of each node that --gpus-per-node asks for are not used")
    device = "cuda" if gpus and config.device != "cpu" else "cpu"
    config = without_own_load(config, notice)
    config = with_value_head(inherited(config, notice) if promised is None else with_model_of(config, promised, notice))
    config = with_reported_tokenizer(config, notice)
    check_config(config, processes, device, uneven=True)  # type: ignore[arg-type]
    if device == "cpu":
        check_kernels(config, device, notice)
    config = check_data(config, notice, promised is None)
    check_config(config, num_processes(config), device)  # type: ignore[arg-type]  # what its start will check
    return config


def with_reported_tokenizer(config: RunConfig, notice: Callable[[str], None]) -> RunConfig:
    """The configuration with the tokenizer that made the token files, where it names neither one nor a vocabulary."""
    if config.data.tokenizer is not None or config.model.vocab_size is not None or config.reads_chat:
        return config
    found = tokenizer_of_reports(config.data)
    if found is None:
        return config
    notice(f"data.tokenizer = {found}, with which {config.data.train[0].path} was prepared")
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": found})})


def without_own_load(config: RunConfig, notice: Callable[[str], None]) -> RunConfig:
    """The configuration without a ``checkpoint.load`` that names the run's own folder, as Megatron-LM's ``--save`` and
    ``--load`` are usually the same."""
    load, run_dir = config.checkpoint.load, Path(config.run_dir)
    if load is None or Path(load).resolve() not in {path.resolve() for path in (run_dir, run_dir / "checkpoints")}:
        return config
    notice(f"checkpoint.load = {load} is left out: a run goes on by itself from the checkpoints of its run_dir")
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"load": None})})


def check_data(config: RunConfig, notice: Callable[[str], None] = lambda _: None, there: bool = True) -> RunConfig:
    """The configuration with its vocabulary, after every check of tokenizer and data. ``there``: whether the model that
    ``checkpoint.load`` names is there, and its tokenizer can be compared. Raises UserError."""
    if config.reads_chat:
        return check_conversations(config, notice, there)
    if config.train.epochs is not None:
        raise UserError(
            f"train.epochs = {config.train.epochs:g} counts passes over conversations, for `llm-parallel sft`; give "
            "train.steps, of which `llm-parallel pretrain --dry-run` shows the epochs of every source"
        )
    check_inputs(config)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer is not None else None
    config = with_vocabulary(config, tokenizer)
    if there and tokenizer is not None and (differs := other_tokenizer(config, tokenizer)):
        notice(differs)
    assert config.model.vocab_size is not None
    for text in check_token_files(config.data, config.model.vocab_size, tokenizer):
        notice(text)
    SampleSource(config.data, config.seed, "train").close()
    if config.data.eval or config.data.eval_fraction:
        SampleSource(config.data, config.seed, "eval").close()
    return config


def check_conversations(
    config: RunConfig, notice: Callable[[str], None] = lambda _: None, there: bool = True
) -> RunConfig:
    """The configuration of a run over conversations or preferences with its vocabulary, its steps and the folder of
    their tokens, which are written if they are not there. Raises UserError."""
    check_chat_inputs(config)
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer)
    if there and (differs := other_tokenizer(config, tokenizer)):
        notice(differs)
    check_reference(config, tokenizer)
    data: GroupData | ChatData | Prompts
    if config.collects:
        open_judge(config.method.rollout.judges)
        check_beside(config, tokenizer)
        data = prepare_prompts(config, notice)
        check_records(config.method.rollout.judges, data.asked())
    elif config.prefers:
        data = prepare_groups(config, notice)
        check_preferences(config, data, notice)
    else:
        data = prepare_conversations(config, notice)
    if not isinstance(data, Prompts):
        check_held_out(config, data.held_out_rows, notice)
    if unused := unused_conversations(Path(config.run_dir), data.folder):
        notice(unused)
    chat = config.chat.model_copy(update={"prepared": str(data.folder)})
    train = config.train
    if train.epochs is not None and not isinstance(data, Prompts):
        train = with_steps(train, data.training(config.seed).packer, notice)
    checkpoint = config.checkpoint
    if "load_optimizer" not in checkpoint.model_fields_set:  # fine-tuning has a schedule of its own
        checkpoint = checkpoint.model_copy(update={"load_optimizer": False})
    return config.model_copy(update={"chat": chat, "train": train, "checkpoint": checkpoint})


def check_held_out(config: RunConfig, rows: int, notice: Callable[[str], None]) -> None:
    """Says what evaluations judge of the ``rows`` samples that are held out. Raises UserError if there are none, and
    the run is to end by them."""
    train, fraction = config.train, config.chat.eval_fraction
    if rows > train.eval_samples:
        notice(
            f"an evaluation judges {train.eval_samples:,} of {rows:,} samples of what is held out, the same ones every "
            "time; train.eval_samples says how many"
        )
    if rows or config.chat.eval or not fraction or train.eval_interval_steps is None:
        return
    nothing = f"chat.eval_fraction = {fraction:g} of the records here is less than one, so nothing is held out"
    if train.early_stop_evaluations is None:
        notice(f"{nothing} and evaluations judge nothing; a larger chat.eval_fraction or chat.eval would change that")
        return
    raise UserError(
        f"{nothing}, and train.early_stop_evaluations = {train.early_stop_evaluations} needs evaluations; make "
        "chat.eval_fraction larger, or give chat.eval"
    )


def with_steps(train: TrainConfig, packer: Packer, notice: Callable[[str], None]) -> TrainConfig:
    """The settings with the steps of ``train.epochs``, the last of which is a whole batch."""
    epochs = train.epochs
    assert epochs is not None
    steps = steps_for(train, packer.samples_before(epochs))
    if "steps" in train.model_fields_set and train.steps != steps:
        notice(f"train.steps = {train.steps} is replaced by {steps}, which are train.epochs = {epochs:g}")
    train = train.model_copy(update={"steps": steps})
    epoch, place = packer.locate(total_samples(train))
    made = epoch + place / packer.samples_of(epoch)
    if made > OVERSHOOT * epochs:
        notice(
            f"train.epochs = {epochs:g} ends within step {steps:,}, whose batch of {train.global_batch_size:,} "
            f"samples is made whole: the run has {made:.2f} epochs; a smaller train.global_batch_size comes nearer"
        )
    return train


def check_preferences(config: RunConfig, data: GroupData, notice: Callable[[str], None]) -> None:
    """Says what follows from preferences for the run's method. Raises UserError if it cannot learn from them."""
    data.training(config.seed)
    if config.trains == "kto":
        good, bad = data.liked
        if not good or not bad:
            raise UserError(
                f"method.kind = kto learns from answers that were liked and from others, and of the {good + bad:,} "
                f"here {'none was' if not good else 'all were'} liked; give both kinds"
            )
        weights = "desirable_weight", "undesirable_weight"
        if all(getattr(config.method.kto, name) is None for name in weights):
            notice(
                f"{good:,} answers were liked and {bad:,} not; method.kto.desirable_weight = {max(bad / good, 1):.3g} "
                f"and method.kto.undesirable_weight = {max(good / bad, 1):.3g} let both kinds weigh the same"
            )
    if config.trains == "reward" and config.method.reward.margins and not data.margins.any():
        raise UserError(
            "method.reward.margins is true, and no record has a margin; give records with one, or set it to false"
        )


def with_value_head(config: RunConfig) -> RunConfig:
    """The configuration with ``model.value_head`` as the method needs it. Raises UserError if it has another."""
    if config.trains == "reward":
        return config.model_copy(update={"model": config.model.model_copy(update={"value_head": True})})
    if config.model.value_head:
        raise UserError(
            f"model.value_head = true is for method.kind = reward, and method.kind = {config.trains} trains "
            "log-probabilities, which such a model has none of; give a language model"
        )
    return config


def check_kernels(config: RunConfig, device: str, notice: Callable[[str], None] = lambda _: None) -> None:
    """Raises UserError if a kernel is asked for that can't run on ``device``; ``notice`` is called if a GPU must run
    without kernels that ``auto`` would choose."""
    wanted = [f"kernels.{name}" for name, choice in config.kernels.model_dump().items() if choice == "triton"]
    wanted += ["optim.implementation"] * (config.optim.implementation == "triton")
    if not wanted and (device == "cpu" or "auto" not in config.kernels.model_dump().values()):
        return
    from llm_kernels import dispatch  # imports torch, two seconds

    fault = dispatch.triton_fault()
    if fault and not wanted:
        notice(f"{fault}: torch's own operators run in place of the fused kernels")
        return
    if fault:
        raise UserError(f"{wanted[0]} is triton, but {fault}; or take torch")
    if wanted and device == "cpu" and not dispatch.interpreting():
        raise UserError(
            f"{wanted[0]} is triton, which needs a GPU; take torch or auto (TRITON_INTERPRET=1 in the environment runs "
            "the kernels slowly on a CPU, for checks)"
        )


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer | None = None) -> RunConfig:
    """Takes ``model.vocab_size`` from the tokenizer (``tokenizer`` if it is open already) where it is not given;
    ``check_config`` demands one of them.

    Raises UserError if they do not fit."""
    if config.data.tokenizer is not None:
        tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
        size = config.model.vocab_size or tokenizer.vocab_size
        check_vocabulary(tokenizer, size)
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    return config


def mixture(config: RunConfig) -> list[MixtureRow]:
    """Tokens and epochs of each training source over the whole run."""
    return mixture_table(config.data, config.seed, total_samples(config.train))


def rank_table(layout: Layout) -> list[str]:
    """One line per process: coordinates and layers. The first 64 of a larger job."""
    lines = []
    for rank in range(min(layout.world_size, 64)):
        at = layout.coordinates(rank)
        layers = [layout.layers(at.pp, stage) for stage in range(layout.vpp)]
        held = ", ".join(f"{part.start}-{part.stop - 1}" for part in layers)
        lines.append(f"rank {rank:>3}: tp {at.tp} cp {at.cp} dp {at.dp} pp {at.pp}, layers {held}")
    if layout.world_size > 64:
        lines.append(f"… and {layout.world_size - 64} more")
    return lines
