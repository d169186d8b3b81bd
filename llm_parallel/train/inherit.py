"""What a run takes from the model that ``checkpoint.load`` names: sizes and tokenizer that the run file leaves out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_parallel.checkpoint.folders import find_checkpoint, step_of
from llm_parallel.checkpoint.run_file import copy_tokenizer, read_config
from llm_parallel.config.tree import ModelConfig, RunConfig
from llm_parallel.data.tokenizer import JSON_NAME, MODEL_NAME, Tokenizer, fingerprint_of, load_tokenizer, tokenizer_file
from llm_parallel.errors import UserError
from llm_parallel.files import folder_in_whole, turn
from llm_parallel.model.hf_config import hf_config_to_model
from llm_parallel.model.hf_files import check_weight_files, is_hf_folder, is_peft_folder, read_hf_config


@dataclass(frozen=True)
class Held:
    """The model in a folder, and its tokenizer if it has one."""

    model: ModelConfig
    tokenizer: str | None
    folder: str


def inherited(config: RunConfig, notice: Callable[[str], None]) -> RunConfig:
    """The configuration with every field of ``model`` that is not given, and ``data.tokenizer`` if it is not given,
    from the folder that ``checkpoint.load`` names; ``notice`` is told. Raises UserError for a folder that holds no
    model."""
    folder = config.checkpoint.load
    if folder is None:
        return config
    if not Path(folder).exists():
        if config.data.tokenizer is None and config.model.vocab_size is None:
            raise UserError(
                f"checkpoint.load = {folder} does not exist; give the path of a run or of a Hugging Face folder "
                "here: models are not downloaded"
            )
        return config  # the files that are missing are named together later
    given = config.model.model_fields_set
    wants_tokenizer = config.data.tokenizer is None
    if given >= set(ModelConfig.model_fields) - {"preset"} and not wants_tokenizer:
        return config
    return with_model_of(config, held_in(folder), notice)


def with_model_of(config: RunConfig, held: Held, notice: Callable[[str], None]) -> RunConfig:
    """The same with the model of a folder that is known already."""
    given = config.model.model_fields_set
    changes: dict[str, Any] = {}
    if config.model.preset is None and not given >= set(ModelConfig.model_fields) - {"preset"}:
        kept = {name: getattr(config.model, name) for name in given}
        changes["model"] = ModelConfig.model_validate(held.model.model_dump() | kept)
        said = f" but for {', '.join(sorted(given))}, which the run file gives" if given else ""
        notice(f"model: as in {held.folder}{said}")
    if config.data.tokenizer is None and held.tokenizer is not None:
        changes["data"] = config.data.model_copy(update={"tokenizer": held.tokenizer})
        notice(f"data.tokenizer: {held.tokenizer}")
    return config.model_copy(update=changes)


def with_own_tokenizer(config: RunConfig, notice: Callable[[str], None]) -> RunConfig:
    """The configuration with a copy of the tokenizer in the run folder: every checkpoint of the run needs it, and the
    file that ``data.tokenizer`` names may be removed or replaced meanwhile. ``notice`` is told of the copy where that
    is sure to happen: of a tokenizer in a checkpoint, which the run that it belongs to removes
    (``checkpoint.keep_last``). Raises UserError if the copy cannot be written."""
    path, run_dir = config.data.tokenizer, Path(config.run_dir)
    if path is None or not Path(path).exists() or Path(path).resolve().parent == run_dir.resolve():
        return config
    target = run_dir / f"tokenizer-{fingerprint_of(tokenizer_file(path).read_bytes())[:8]}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with turn(run_dir / ".tokenizer.lock"):
            if not target.is_dir():
                with folder_in_whole(target) as making:
                    copy_tokenizer(Path(path), making)
                if any(step_of(parent) is not None for parent in Path(path).resolve().parents):
                    notice(f"data.tokenizer: copied to {target}, since the checkpoint {path} may be removed by its run")
    except OSError as error:
        raise UserError(
            f"run_dir = {run_dir} cannot be written ({error.strerror}); give a folder that can be"
        ) from None
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(target)})})


def other_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> str | None:
    """A sentence about tokens of ``data.tokenizer``, which is given opened, that are others in the tokenizer of the
    model that ``checkpoint.load`` names; None if there are none, or that model has no tokenizer here."""
    folder = config.checkpoint.load
    changed = changed_tokens(folder, tokenizer) if folder is not None else 0
    if not changed:
        return None
    return (
        f"data.tokenizer = {config.data.tokenizer} is another one than that of checkpoint.load = {folder}: {changed:,} "
        f"of its {tokenizer.vocab_size:,} tokens are other texts there, and the model has to learn them anew; leave "
        "data.tokenizer out to keep the model's"
    )


def changed_tokens(folder: str, tokenizer: Tokenizer) -> int:
    """How many tokens stand for other texts in the tokenizer of the model in ``folder``; 0 if it has none here."""
    held = held_in(folder).tokenizer
    if held is None or not Path(held).exists():
        return 0
    theirs = load_tokenizer(held)
    if theirs.fingerprint == tokenizer.fingerprint:
        return 0
    both = min(theirs.vocab_size, tokenizer.vocab_size)
    return sum(theirs.token(number) != tokenizer.token(number) for number in range(both))


def held_in(folder: str) -> Held:
    """What a Hugging Face folder, a run or a checkpoint holds. Raises UserError if that is no model."""
    if is_hf_folder(folder):
        check_weight_files(folder)
        found = any((Path(folder) / name).is_file() for name in (JSON_NAME, MODEL_NAME))
        return Held(hf_config_to_model(read_hf_config(folder)), folder if found else None, folder)
    saved = read_config(find_checkpoint(folder))
    return Held(saved.model, saved.data.tokenizer, folder)


NOT_OF_WEIGHTS = ("preset", "max_seq_length_tokens", "init_std", "value_head")
"""Fields of a model in which a reference may differ from what is held to it."""


def check_reference(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if the model that ``method.reference.load`` names is another one than the run's: of other sizes,
    or with other texts for its tokens, whose log-probabilities would be those of other texts."""
    folder = config.method.reference.load
    if folder is None or is_peft_folder(folder):  # adapters without a model are refused by name where they are loaded
        return
    model = held_in(folder).model
    for name, own in config.model:
        if name not in NOT_OF_WEIGHTS and getattr(model, name) != own:
            raise UserError(
                f"method.reference.load = {folder} has model.{name} = {getattr(model, name)}, and the model that is "
                f"trained has {own}; give a reference of the same sizes, such as the model that training begins with"
            )
    changed, size = changed_tokens(folder, tokenizer), tokenizer.vocab_size
    if changed:
        raise UserError(
            f"method.reference.load = {folder} has another tokenizer than data.tokenizer = {config.data.tokenizer}: "
            f"{changed:,} of its {size:,} tokens are other texts; give a reference with the same tokenizer"
        )
