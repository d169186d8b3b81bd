"""Options of a command from the documented fields of a dataclass, as ``config/fields.py`` does for the configuration.

A command takes the dataclass as one parameter, and ``with_options`` gives typer an option for each field, with its
name, type and default, and the docstring under the field as help.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from llm_parallel.errors import UserError

_KEY = "option"
T = TypeVar("T")


@dataclass(frozen=True)
class _Style:
    """How a field appears on the command line, where that differs from the plain case."""

    name: str | None = None
    """Name instead of the field's: ``--ops`` of an option, ``run_dirs`` of an argument."""
    argument: bool = False
    """It is given by position."""
    flag: bool = False
    """A true-or-false option without its ``--no-`` form."""
    commas: bool = False
    """A list that is given as a text with commas, or as several."""
    hidden: bool = False
    """The command line does not give it."""
    read: Callable[[str], Any] | None = None
    """What makes its value of the text that was given; it raises UserError."""


def option(
    default: Any = MISSING,
    *,
    name: str | None = None,
    flag: bool = False,
    commas: bool = False,
    read: Callable[[str], Any] | None = None,
) -> Any:
    """A field that is an option under another ``name``, a ``flag`` without its ``--no-`` form, a list that is given as
    a text with ``commas``, or whose text ``read`` understands."""
    return field(default=default, metadata={_KEY: _Style(name=name, flag=flag, commas=commas, read=read)})


def argument(default: Any = MISSING, *, name: str | None = None) -> Any:
    """A field that is given by position."""
    return field(default=default, metadata={_KEY: _Style(name=name, argument=True)})


def not_an_option(**default: Any) -> Any:
    """A field that the command itself sets; two requests that differ only in it are equal. It takes ``default`` or
    ``default_factory``."""
    return field(**default, compare=False, metadata={_KEY: _Style(hidden=True)})


def documentation_of(request: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    tree = ast.parse(inspect.getsource(sys.modules[request.__module__]))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == request.__name__)
    found = {}
    for statement, below in pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[statement.target.id] = " ".join(str(below.value.value).split())
    return found


def to_json(request: Any) -> str:
    """A request as text, which ``from_json`` reads in another process. Fields that are no options are left out."""
    options = [one.name for one in fields(request) if not _style(one).hidden]
    return json.dumps({name: getattr(request, name) for name in options}, default=str)


def from_json(request: type[T], text: str) -> T:
    """The request that ``to_json`` wrote."""
    given, hints = json.loads(text), get_type_hints(request)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
        elif value is not None and Path in (hints[name], *get_args(hints[name])):
            given[name] = Path(value)
    return request(**given)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameters that are dataclasses, in the order of the fields."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    requests: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            requests[name] = hints[name]
            parameters += _parameters(hints[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        for name, request in requests.items():
            given[name] = request(**_taken(request, given))
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _style(of: Field[Any]) -> _Style:
    return of.metadata.get(_KEY, _Style())


def _parameter_name(of: Field[Any]) -> str:
    style = _style(of)
    return style.name if style.argument and style.name else of.name


def _parameters(request: type) -> list[inspect.Parameter]:
    import typer

    documentation, hints = documentation_of(request), get_type_hints(request)
    found = []
    for one in fields(request):
        style = _style(one)
        if style.hidden:
            continue
        names = [f"--{one.name.replace('_', '-')}"] if style.flag else [style.name] if style.name else []
        help_ = documentation[one.name]
        how: dict[str, Any] = {"help": help_}
        if style.read:
            how |= {"parser": _explained(style.read), "metavar": "NUMBER"}
        made: Any = typer.Argument(**how) if style.argument else typer.Option(*names, **how)
        annotation, default = hints[one.name], one.default
        if style.commas:
            annotation, default = list[str] | None, None
        elif get_origin(annotation) is Sequence:
            annotation, default = list[get_args(annotation)[0]] | None, one.default or None  # type: ignore[misc]
        found.append(
            inspect.Parameter(
                _parameter_name(one),
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=Annotated[annotation, made],
            )
        )
    return found


def _explained(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``read`` with what it raises as a mistake of usage, which names the option."""
    import typer

    def parse(text: Any) -> Any:
        try:
            return read(text) if isinstance(text, str) else text  # typer hands over the default as it is
        except UserError as error:
            raise typer.BadParameter(str(error)) from None

    return parse


def _taken(request: type, given: dict[str, Any]) -> Mapping[str, Any]:
    """Values of the request's fields, removed from what the command line gave."""
    values = {}
    for one in fields(request):
        style = _style(one)
        if style.hidden:
            continue
        value = given.pop(_parameter_name(one))
        if style.commas:
            value = tuple(name.strip() for text in value or () for name in text.split(",") if name.strip())
        elif isinstance(value, list) or (value is None and one.default == ()):
            value = tuple(value or ())
        values[one.name] = value
    return values
