"""``--help`` without boxes: names and descriptions below each other, divided between words at the terminal's width.

typer draws panels of columns, which cut the names of options where the terminal is not wide enough for all columns, and
where there is no terminal at all. On a wide terminal the panels stay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from llm_parallel.errors import UserError
from llm_parallel.lines import note, terminal_width, wrapped

PANELS_FROM = 100
"""Columns from which no panel cuts a name (tests/unit/test_command_help.py holds it)."""


_TRAIN = (
    "`llm-parallel sft RUN.yaml` fine-tunes on conversations, `llm-parallel prefer RUN.yaml` on preferences and "
    "rewards, and `llm-parallel pretrain RUN.yaml` on texts"
)
_PREFER = "`llm-parallel prefer RUN.yaml` with method.kind={}"
_EXPORT = "`llm-parallel convert RUN FOLDER` writes a Hugging Face folder, with --merge one that has the adapters in it"
_PAGE = "`llm-parallel serve MODEL` has a chat page for the browser, and OpenAI's interface"
_PREPARE = "`llm-parallel prepare` turns raw text into token files, and takes the options of Megatron-LM's script"
_VERSIONS = "`llm-parallel --version` shows all versions"
ELSEWHERE = {
    **dict.fromkeys(("train", "finetune", "fine_tune", "run"), _TRAIN),
    **dict.fromkeys(("export", "merge", "merge_lora", "merge_and_unload"), _EXPORT),
    **dict.fromkeys(("webchat", "webui", "api", "vllm_serve", "deploy"), _PAGE),
    **dict.fromkeys(("preprocess", "preprocess_data", "preprocess_data_fast", "tokenize"), _PREPARE),
    **dict.fromkeys(("version", "env"), _VERSIONS),
    **{kind: _PREFER.format(kind) for kind in ("dpo", "kto", "rrhf", "reward", "grpo", "ppo", "reject")},
    "rm": _PREFER.format("reward"),
    "rloo": _PREFER.format("grpo and method.grpo.leave_one_out=true"),
    "pretrain_gpt": "`llm-parallel pretrain RUN.yaml` takes its arguments after the run file, which may be empty",
    "inference": "`llm-parallel generate`, `llm-parallel chat` and `llm-parallel serve` use a model",
    "eval": "`llm-parallel evaluate MODEL` measures a model on benchmarks",
    "download": "nothing is downloaded; get a folder with Hugging Face's `hf download`, and name it in checkpoint.load",
    "help": "`llm-parallel --help` lists the commands, and `llm-parallel COMMAND --help` explains one",
}
"""Commands of LLaMA-Factory, axolotl, torchtune, TRL and Megatron-LM, with underscores, and what to call here."""


class Command(TyperCommand):
    """A command whose help is this page where the panels do not fit."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page, or has typer draw its panels."""
        text = _page_here(self, ctx)
        super().format_help(ctx, formatter) if text is None else formatter.write(text)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the command line, and says which options it gives more than once although only the last one counts."""
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for one in dict.fromkeys(order):
            single = one.param_type_name == "option" and not getattr(one, "multiple", False)
            if single and order.count(one) > 1 and not ctx.resilient_parsing:
                note(f"{one.opts[0]} is given {order.count(one)} times; the last one counts")
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A group of commands whose help is this page where the panels do not fit."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Writes the page, or has typer draw its panels."""
        text = _page_here(self, ctx)
        super().format_help(ctx, formatter) if text is None else formatter.write(text)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called. Raises UserError with what to do for one that another system has."""
        name = args[0].rpartition("/")[2].removesuffix(".py").replace("-", "_") if args else ""
        if name in ELSEWHERE and self.get_command(ctx, args[0]) is None:
            raise UserError(f"{args[0]} is no command here: {ELSEWHERE[name]}")
        return super().resolve_command(ctx, args)


def _page_here(command: Any, ctx: Any) -> str | None:
    width = terminal_width(sys.stdout)
    return page(command, ctx, width) if width is None or width < PANELS_FROM else None


def show_version(wanted: bool) -> None:
    """Prints the installed versions, if they are asked for, and ends."""
    if wanted:
        from llm_parallel.metrics.run import installed_versions

        typer.echo("\n".join(f"{name} {version}" for name, version in installed_versions().items()))
        raise typer.Exit


OTHER_NAMES: dict[str, dict[str, str]] = {
    "evaluate": {
        "model": "the model's folder or address is given first, without an option",
        "model_args": "the model's folder or address is given first, without an option",
        "num_fewshot": "it is --shots",
        "apply_chat_template": "it is --chat",
        "system_instruction": "it is --system",
        "output_path": "it is --out",
        "batch_size": "it is --max-running",
        "gen_kwargs": "it is --new-tokens",
        "samples": "documents are drawn by --limit and --seed",
        "include_path": "the YAML file of a task stands in --tasks itself",
        "log_samples": "samples are always written, into --out",
        "use_cache": "answers are always kept, in --out",
        "confirm_run_unsafe_code": "programs run in a sandbox; see --sandbox",
    }
}
"""What options of the program that a command stands beside are called in the command, for those who know the other."""


def explain_usage(error: Exception) -> None:
    """Prints what is wrong about a command line, as one sentence. Raises any other error again.

    typer has had the exceptions of click and its own copies of them, so they are told by their methods."""
    message = getattr(error, "format_message", None)
    if message is None:
        raise error
    text, context = message(), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the page, unless typer drew its panels
        print(text, end="\n" if text else "")
        return
    more = f"; see `{context.command_path} --help`" if context is not None else ""
    known = OTHER_NAMES.get(getattr(context, "info_name", None) or "", {})
    unknown = str(getattr(error, "option_name", "") or "").lstrip("-").replace("-", "_")
    if unknown in known:
        text = f"No such option: --{unknown}; here {known[unknown]}"
    note(f"error: {text.rstrip('.')}{more}")


def page(command: Any, ctx: Any, width: int | None) -> str:
    """The whole text; ``width``: columns of the terminal, None where lines may be as long as they are."""
    text = "\n".join(_lines(command, ctx)) + "\n"
    return text if width is None else wrapped(text, width, hang=0)


def _lines(command: Any, ctx: Any) -> Iterator[str]:
    shown = [one for one in command.get_params(ctx) if not getattr(one, "hidden", False)]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    what = ["COMMAND ..."] if hasattr(command, "list_commands") else map(argument_name, arguments)
    yield " ".join([f"Usage: {ctx.command_path}", *(["[OPTIONS]"] if options else []), *what])
    yield ""
    yield " ".join((command.help or "").split())
    if arguments:
        yield "\nArguments:"
        for one in arguments:
            yield from _entry(argument_name(one), one)
    if options:
        yield "\nOptions:"
        for one in options:
            # click keeps the names of its own --help in a set, whose order changes from one process to the next.
            names = [*sorted(one.opts, key=lambda name: not name.startswith("--")), *one.secondary_opts]
            yield from _entry(f"{', '.join(names)} {kind_of(one)}".rstrip(), one)
    if hasattr(command, "list_commands"):
        yield from _commands(command, ctx)
    for at, paragraph in enumerate((command.epilog or "").split("\n\n")):
        yield f"\n{paragraph}" if at == 0 else f"  {paragraph}" if paragraph.startswith("llm-parallel") else paragraph


def _commands(group: Any, ctx: Any) -> Iterator[str]:
    panels: dict[str, list[Any]] = {}
    for name in group.list_commands(ctx):
        one = group.get_command(ctx, name)
        panel = getattr(one, "rich_help_panel", None)
        panels.setdefault(panel if isinstance(panel, str) else "Commands", []).append(one)
    for panel, members in panels.items():
        yield f"\n{panel}:"
        for one in members:
            yield f"  {one.name}"
            yield f"    {' '.join((one.short_help or one.help or '').split())}"


def argument_name(argument: Any) -> str:
    """How an argument is written in a command."""
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def kind_of(option: Any) -> str:
    """What an option takes, in capitals. typer has had parsers of two kinds: click's, and one of its own."""
    if option.is_flag:
        return ""
    own = getattr(option, "type_descriptor", None)
    kind = option.metavar or (_python_kind(own.annotation) if own else option.type.name)
    return kind.upper().replace("INTEGER", "INT") + (" ..." if option.multiple else "")


def default_of(option: Any) -> str | None:
    """The value that an option has where it is not given; None if there is none worth saying."""
    default = option.default() if callable(option.default) else option.default
    if default in (None, "", (), []) or default is False:
        return None
    return option.opts[0] if option.is_flag else str(getattr(default, "value", default))


def _python_kind(annotation: Any) -> str:
    names = {int: "int", float: "float", str: "text"}
    return next((names[kind] for kind in (annotation, *get_args(annotation)) if kind in names), "value")


def _entry(title: str, option: Any) -> Iterator[str]:
    default = default_of(option)
    said = " [required]" if option.required else f" [default: {default}]" if default is not None else ""
    yield f"  {title}"
    yield f"    {' '.join((option.help or '').split())}{said}"
