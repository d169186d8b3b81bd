"""LLaMA-Factory's ``dataset_info.json``: where a data set lies, and how its fields and roles are called."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_parallel.config.tree_tune import ChatSource, Columns
from llm_parallel.data.kinds import RECORDS, ending
from llm_parallel.errors import UserError

NAME = "dataset_info.json"
SHOWN = 12
"""Names of data sets that a message lists."""
STATE, SPLITS = "state.json", "dataset_dict.json"
"""What ``save_to_disk`` writes beside the records of a data set, and beside the folders of its splits."""
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
WITHOUT_EFFECT = ("subset", "split", "folder", "file_sha1")
"""Keys that matter for data sets of a hub only, and a checksum."""
KNOWN = ("file_name", "formatting", "columns", "tags", "ranking", "num_samples", *HUBS, *WITHOUT_EFFECT)
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "messages",
    "system": "system",
    "tools": "tools",
}
"""Names of columns there, and what they are called in the run file."""
PREFERENCE_COLUMNS = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
"""The same of those that only training by preferences reads."""
REFUSED_COLUMNS = dict.fromkeys(("images", "videos", "audios"), "only text can be trained on")
PREFERENCES = ("pair", "label", "scores", "arena")
"""Formats of the run file that only training by preferences reads, and columns."""
PREFERRED = ("chosen", "rejected", "label", "responses", "scores", "ranks", "margin")
TAGS = {
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("tool", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
"""Tags that name a role: that role, and the name it has if the tag is not given."""


@dataclass(frozen=True)
class Opened:
    """The files of a source, how their records are read (``roles``: names of roles besides the usual ones), and what
    the user should know."""

    files: list[Path]
    format: str
    columns: Columns
    roles: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    limit: int | None = None
    """Records that are used, the first ones; None: all."""


def open_source(source: ChatSource, preferences: bool = False) -> Opened:
    """The files of a source of conversations, or of ``preferences``. Raises UserError."""
    if source.dataset is not None:
        return _declared(source, source.dataset, preferences)
    if source.format in PREFERENCES and not preferences:
        raise UserError(
            f"format of {source.path} is {source.format}, for training by preferences (llm-parallel prefer); give "
            "auto, alpaca, sharegpt, messages or completion"
        )
    wrong = [name for name in PREFERRED if getattr(source.columns, name) is not None and not preferences]
    if wrong:
        raise UserError(
            f"columns.{wrong[0]} of {source.path} is for training by preferences (llm-parallel prefer); leave it out"
        )
    return Opened(_files(Path(source.path)), source.format, source.columns)


def _files(path: Path) -> list[Path]:
    """A file, or the files of records in a folder and those below it."""
    if path.is_dir():
        inside = [one for one in sorted(path.rglob("*")) if ending(one.name) in RECORDS and one.is_file()]
        visible = [one for one in inside if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        files = [one for one in _of_saved(visible) if one.name != NAME]
        if not files:
            raise UserError(f"{path} holds no files of conversations, which end with {', '.join(RECORDS)}")
        return files
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file of conversations, or a folder of such files")
    return [path]


def _of_saved(files: Sequence[Path]) -> Iterator[Path]:
    """The files, and of a folder that ``save_to_disk`` of Hugging Face's datasets wrote those with its records: beside
    them lie the state of the data set, and caches of what was once computed from it."""
    held: dict[Path, set[str] | None] = {}
    for file in files:
        folder = file.parent
        if file.name == SPLITS:
            splits = sorted(one.parent.name for one in folder.glob(f"*/{STATE}"))
            raise UserError(
                f"{folder} holds the splits {', '.join(splits) or 'of a data set'}, some of which may not be meant for "
                f"training; give the folder of one of them"
            )
        if folder not in held:
            held[folder] = _named_by_state(folder / STATE)
        names = held[folder]
        if names is None or file.name in names:
            yield file


def _named_by_state(path: Path) -> set[str] | None:
    """Names of the files with the records of a saved data set; None where there is no such data set."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {one["filename"] for one in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _declared(source: ChatSource, name: str, preferences: bool) -> Opened:
    given = Path(source.path)
    path = given if given.name == NAME else given / NAME
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"dataset is {name!r}, but {path} does not exist; give the folder of that file in path"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(whole, dict) or name not in whole:
        names = list(whole) if isinstance(whole, dict) else []
        near = difflib.get_close_matches(name, names, 1)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        hint = f"; it has {', '.join(map(repr, names[:SHOWN])) or 'none'}{more}"
        hint = f"; did you mean {near[0]!r}?" if near else hint
        raise UserError(f"{path} has no data set {name!r}{hint}")
    info = whole[name]
    if not isinstance(info, dict):
        raise UserError(f"{path} describes {name!r} by something that is no object")
    place = f"{path} describes {name!r} with"
    _refuse(info, place, preferences)
    form = info.get("formatting", "alpaca")
    if form not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{place} the formatting {form!r}; known are 'alpaca', 'sharegpt' and 'openai'")
    file = path.parent / info["file_name"]
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise UserError(f"{place} the file_name {info['file_name']!r}, which lies outside its folder")
    files = _files(file)
    roles, turn = _tags(info.get("tags") or {}, place, form)
    columns = _columns(info.get("columns") or {}, place, preferences)
    if form == "sharegpt":
        columns.setdefault("messages", "conversations")
    ignored = [key for key in WITHOUT_EFFECT if key in info]
    notices = [f"{place} {', '.join(ignored)}, which has no effect on a file"] if ignored else []
    if limit := info.get("num_samples"):
        notices.append(f"{place} num_samples: of its records the first {limit:,} are used")
    form = "alpaca" if form == "alpaca" else "messages"
    return Opened(files, form, Columns(**columns, **turn), roles, tuple(notices), limit)


def _refuse(info: Mapping[str, Any], place: str, preferences: bool) -> None:
    for key in info:
        if key not in KNOWN:
            near = difflib.get_close_matches(key, KNOWN, 1)
            raise UserError(f"{place} the unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if info.get("ranking") and not preferences:
        raise UserError(
            f"{place} ranking, for training by preferences: `llm-parallel prefer` with method.kind=dpo; fine-tuning "
            "needs one answer for each question"
        )
    samples = info.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise UserError(f"{place} num_samples {samples!r}; give a whole number over 0")
    if not isinstance(info.get("file_name"), str):
        hub = next((key for key in HUBS if key in info), None)
        what = f"{hub} and no file_name; download it and give" if hub else "no file_name; give"
        raise UserError(f"{place} {what} the name of a file beside {NAME}")


def _columns(given: Mapping[str, str], place: str, preferences: bool) -> dict[str, str]:
    known, found = {**COLUMNS, **PREFERENCE_COLUMNS}, {}
    for key, column in given.items():
        if column is None:
            continue
        if key in REFUSED_COLUMNS:
            raise UserError(f"{place} the column {key!r}: {REFUSED_COLUMNS[key]}")
        if key in PREFERENCE_COLUMNS and not preferences:
            kind = "kto" if key == "kto_tag" else "dpo"
            raise UserError(
                f"{place} the column {key!r}: it is for training by preferences, `llm-parallel prefer` with "
                f"method.kind={kind}"
            )
        if key not in known:
            raise UserError(f"{place} the unknown column {key!r}; known are {', '.join(known)}")
        found[known[key]] = column
    return found


def _tags(given: Mapping[str, str], place: str, form: str) -> tuple[dict[str, str], dict[str, str]]:
    """Names of roles, and of the fields of a turn."""
    unknown = [key for key in given if key not in TAGS and key not in ("role_tag", "content_tag")]
    if unknown:
        raise UserError(f"{place} the unknown tag {unknown[0]!r}; known are role_tag, content_tag, {', '.join(TAGS)}")
    roles = {given.get(tag, usual).strip().lower(): role for tag, (role, usual) in TAGS.items()}
    if form == "alpaca":
        return roles, {}
    role, content = ("from", "value") if form == "sharegpt" else ("role", "content")
    return roles, {"role": given.get("role_tag", role), "content": given.get("content_tag", content)}
