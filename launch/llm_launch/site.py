"""Site defaults of ``llm-parallel submit``: what is the same for every job of a cluster or a project, in a file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from llm_launch.agent_step import AgentStep
from llm_launch.submit_request import SubmitRequest
from llm_parallel.errors import UserError

FILE_NAME = "slurm.yaml"
OF_ONE_RUN = ("nodes", "spares", "min_nodes", "name", "array", "throttle", "behind", "after", "site")
"""Options that differ from run to run, so no default of a site makes sense."""
T = TypeVar("T", SubmitRequest, AgentStep)


def site_files(request: SubmitRequest, environment: Mapping[str, str]) -> list[Path]:
    """The files of site defaults that are there: the user's, then the project's, whose values win."""
    if request.site is not None:
        return [Path(request.site)]
    home = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".config"
    return [path for path in (Path(home) / "llm-parallel" / FILE_NAME, Path(FILE_NAME)) if path.is_file()]


def with_site(request: SubmitRequest, step: AgentStep, path: Path) -> tuple[SubmitRequest, AgentStep, list[str]]:
    """Both with what the file ``path`` gives for options that were not given, and the names of these. Of options that
    may be given often, those of the file come first.

    Raises UserError for a file that cannot be read, a key that is no option, or a value of another kind."""
    given = _read(path)
    request, of_request = _filled(request, given, path)
    step, of_step = _filled(step, given, path)
    return request, step, [*of_request, *of_step]


def _read(path: Path) -> dict[str, Any]:
    try:
        # All values as text: YAML would read the time 12:00:00 as a number of seconds.
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; it holds options of submit, as `partition: hopper`") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML; write options of submit as `partition: hopper`") from None
    if not tree:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold options of submit, one a line, as `partition: hopper`")
    known = {_key(name) for of in (SubmitRequest, AgentStep) for name in get_type_hints(of)} - {*OF_ONE_RUN}
    found = {}
    for name, value in tree.items():
        key = str(name).replace("-", "_")
        if key in OF_ONE_RUN:
            raise UserError(f"{path}: {name} differs from run to run; give it to submit as --{key.replace('_', '-')}")
        if key not in known:
            nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(f"{path}: {name} is no option of submit; the nearest is {nearest}")
        found[key] = value
    return found


def _key(field_name: str) -> str:
    return "sbatch" if field_name == "options" else field_name


def _filled(request: T, given: Mapping[str, Any], path: Path) -> tuple[T, list[str]]:
    hints = get_type_hints(type(request))
    changed: dict[str, Any] = {}
    for one in fields(request):
        if (key := _key(one.name)) not in given or given[key] in ("", "null", "~"):
            continue
        now: Any = getattr(request, one.name)
        value: Any = given[key]
        kinds = get_args(hints[one.name])
        if type(None) not in kinds:
            texts: Any = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path}: {key} must be a text or a list of texts, an item for each option or line")
            changed[one.name] = (*texts, *now)
        elif now is None:
            changed[one.name] = _value(value, kinds[0], f"{path}: {key}")
    return replace(request, **changed), [_key(name) for name in changed]


def _value(text: Any, kind: type, where: str) -> Any:
    if not isinstance(text, str):
        raise UserError(f"{where} must be one value")
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where} = {text} must be true or false")
        return text.lower() == "true"
    if kind is int:
        if not text.isascii() or not text.isdigit():
            raise UserError(f"{where} = {text} must be a whole number")
        return int(text)
    return text
