"""The terminal chat without a model or a terminal: commands, files, what is left out, what a text may do."""

from __future__ import annotations

import io
import json
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llm_parallel.chat.backend import Interrupt, LeftOut, Note, Text
from llm_parallel.chat.blocks import Blocks
from llm_parallel.chat.commands import HELP, Line, help_text, params_text, parse, with_params
from llm_parallel.chat.conversation import Conversation, fitting, load, save
from llm_parallel.chat.keyboard import history_path, open_history
from llm_parallel.chat.request import ChatRequest, Settings
from llm_parallel.chat.screen import THEME, MarkdownScreen
from llm_parallel.chat.session import Session
from llm_parallel.errors import UserError
from llm_parallel.printable import CONTROL, Pieces, printable


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("  \n", None),
        ("hello /quit\n", Line(None, "hello /quit")),
        ("//etc/hosts", Line(None, "/etc/hosts")),
        ("/quit", Line("quit", "")),
        ("/retry", Line("regenerate", "")),
        ("/system be\nbrief ", Line("system", "be\nbrief")),
        ("/save a b.json", Line("save", "a b.json")),
    ],
)
def test_lines_are_messages_or_commands(line: str, meaning: Line | None) -> None:
    assert parse(line) == meaning


@pytest.mark.parametrize(
    ("line", "words"),
    [("/sav x", "/save"), ("/frob", "/help"), ("/quit x", "'x'"), ("/save", "/save conversation.json")],
)
def test_wrong_commands_are_named(line: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        parse(line)


def test_settings_are_set_reset_and_refused() -> None:
    settings = with_params(Settings(), "temperature=0.5, max-tokens=7 seed=3")
    assert settings == Settings(temperature=0.5, max_new_tokens=7, seed=3)
    assert with_params(settings, "temperature=") == Settings(max_new_tokens=7, seed=3)
    defaults = {"temperature": 0.7, "top_p": 1, "max_new_tokens": 9, "seed": "the server's"}
    shown = params_text(replace(settings, seed=None), defaults).splitlines()
    assert shown == ["temperature=0.5", "top_p=1 (default)", "max_new_tokens=7", "seed: the server's"]
    for wrong in ("temperature=hot", "seed=1.5", "top_p=2", "temperature=nan", "colour=1", "seed"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            with_params(settings, wrong)


def test_how_a_model_is_held_is_checked_before_it_is_loaded() -> None:
    from llm_parallel.chat.command import chat_command
    from llm_parallel.generate.request import GenerateRequest
    from llm_parallel.serve.request import ServeRequest

    for weights in ("int8", "int4"):
        assert ChatRequest("folder", weights=weights).held().weights == weights
        for make in (GenerateRequest, ServeRequest):
            more = {"prompts": ("a",)} if make is GenerateRequest else {}
            with pytest.raises(UserError, match=f"weights is {weights} and deterministic is given"):
                make("folder", weights=weights, deterministic=True, **more)
    for make in (GenerateRequest, ServeRequest, ChatRequest):
        more = {"prompts": ("a",)} if make is GenerateRequest else {}
        with pytest.raises(UserError, match="weights is 'int3'; it must be one of saved, fp32, bf16, int8, int4"):
            make("folder", weights="int3", **more)
    with pytest.raises(UserError, match=r"--weights is given, and http://x is a server"):
        chat_command(ChatRequest("http://x", weights="int8"))


@given(st.text(st.sampled_from("a\r\n\x1b\x9b[31m\x07\u202e\x00\t\u2028\ud800é"), max_size=30), st.data())
def test_no_control_character_is_left_however_a_text_is_divided(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    pieces = Pieces()
    assert "".join([*map(pieces.take, parts), pieces.end()]) == printable(text)
    assert not CONTROL.search(printable(text)) and "\x1b" not in printable(text)


@given(st.lists(st.sampled_from(["a\n", "\n", "```\n", "- b\n", "  c\n", "1. d\n", "~~~ x\n", "#"]), max_size=14))
def test_blocks_lose_nothing_and_do_not_depend_on_the_pieces(lines: list[str]) -> None:
    text = "".join(lines)
    whole, single = Blocks(), Blocks()
    blocks = whole.take(text)
    assert blocks == [block for letter in text for block in single.take(letter)] and whole.rest == single.rest
    assert "".join([*blocks, whole.rest]).replace("\n", "") == text.replace("\n", "")


def test_files_hold_openais_messages(tmp_path: Path) -> None:
    path = tmp_path / "new" / "one.json"
    conversation = Conversation("Be brief.")
    conversation.ask("a\u00e9?")
    conversation.take_answer("b")
    save(conversation, path)
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "Be brief."}
    assert load(path).all() == conversation.all()
    save(conversation, path)  # over another conversation
    (tmp_path / "other").write_text("{}")
    with pytest.raises(UserError, match="holds no conversation"):
        save(conversation, tmp_path / "other")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    path.write_text(json.dumps(parts))
    assert load(path).messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    "content", ["", "[", "3", "{}", '[{"role": "king", "content": ""}]', '[{"role": "user"}]', "[1]", "[" * 5000]
)
def test_files_that_are_no_conversation_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        load(tmp_path / "x.json")


def test_the_oldest_turns_are_left_out_and_never_the_system_message_or_the_question() -> None:
    messages = [{"role": "system", "content": "s"}]
    for number in range(4):
        messages += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
    messages.append({"role": "user", "content": "q4"})
    for room in range(2, 11):
        kept = fitting(messages, lambda some, room=room: len(some) <= room)
        assert kept is not None
        assert kept[0][0]["role"] == "system" and kept[0][1]["role"] == "user" and kept[0][-1]["content"] == "q4"
        assert kept[1] == len(messages) - len(kept[0]) and len(kept[0]) == (room if room % 2 == 0 else room - 1)
    assert fitting(messages, lambda some: len(some) < 2) is None


class Echo:
    """Answers with how many messages it sees and the settings. fails: it does so after a first piece."""

    title, system, remark = "echo", None, None
    defaults: dict[str, object] = dict.fromkeys(("temperature", "top_p", "max_new_tokens", "seed"), "its own")
    fails = False

    def models(self) -> list[str]:
        return ["echo"]

    def choose(self, name: str) -> bool:
        return name == "echo"

    def answer(
        self, messages: Sequence[Any], settings: Settings, tries: int, interrupt: Interrupt
    ) -> Iterator[LeftOut | Text | Note]:
        yield LeftOut(2)
        yield Text(f"{len(messages)} messages, ")
        if self.fails:
            raise UserError("it broke")
        yield Text(f"try {tries}, {messages[-1]['content']}")
        yield Note("a note")

    def close(self) -> None: ...

    def reopen(self) -> None: ...


class Shown:
    """A screen in memory."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.change: str | None = None

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def answer(self) -> Iterator[Any]:
        yield lambda piece: None

    def ask(self, text: str, /) -> str | None:
        return self.change


def refuse(name: str, before: Any) -> Any:
    raise UserError(f"{name} does not exist")


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    shown, backend = Shown(), Echo()
    session = Session(backend, refuse, shown, Conversation(), Settings())
    texts = lambda: [message["content"] for message in session.conversation.all()]  # noqa: E731
    for line in ("/regenerate", "/edit x", "/model nowhere", "/load /nowhere"):
        with pytest.raises(UserError):
            session.take(line)
    assert session.take("/system Be brief.") and session.take("one")
    assert texts() == ["Be brief.", "one", "2 messages, try 0, one"]
    assert sum("2 messages are left out" in text for text in shown.said) == 1 and "[a note]" in shown.said
    session.take("/regenerate")
    assert texts()[-1] == "2 messages, try 1, one"
    assert sum("2 messages are left out" in text for text in shown.said) == 1, "it is said when it changes"
    session.take("/edit two")
    assert texts() == ["Be brief.", "two", "2 messages, try 0, two"]
    session.take("/edit")
    assert "/edit TEXT" in shown.said[-1]
    shown.change = "three"
    session.take("/edit")
    assert texts()[1] == "three"
    session.take(f"/save {tmp_path}/c.json")
    before = texts()
    session.take("/new")
    assert texts() == ["Be brief."] and session.take(f"/load {tmp_path}/c.json") and texts() == before
    session.take("/system off")
    assert texts() == before[1:] and session.conversation.system is None
    session.take("/params temperature=0")
    assert session.settings.temperature == 0.0 and "top_p: its own" in shown.said[-1]
    assert session.take("/help") and all(f"/{name}" in shown.said[-1] for name in HELP)
    assert session.take("/model echo") and not session.take("/quit")
    assert len(max(help_text().splitlines(), key=len)) <= 80


def test_an_answer_that_breaks_off_stays_and_a_question_without_one_goes() -> None:
    shown, backend = Shown(), Echo()
    session = Session(backend, refuse, shown, Conversation(), Settings())
    backend.fails = True
    with pytest.raises(UserError, match="it broke"):
        session.take("one")
    assert [message["role"] for message in session.conversation.messages] == ["user", "assistant"]
    session.conversation.messages.pop()
    backend.fails = False
    session.take("two")
    assert session.conversation.messages[0]["content"] == "two"
    assert "the question before had no answer and is left out" in shown.said


def test_the_history_is_its_owners(tmp_path: Path, capsys: Any) -> None:
    path = history_path({"XDG_STATE_HOME": str(tmp_path)})
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o644)
    history = open_history(path)
    history.append_string("a\nb")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "+a\n+b" in path.read_text()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    open_history(path).append_string("secret")
    assert "cannot be written" in capsys.readouterr().err and not (tmp_path / "elsewhere").exists()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("no_color", [False, True])
def test_markdown_on_a_narrow_terminal_sends_no_sequence_of_the_models(no_color: bool) -> None:
    """Escapes as they are, and as entities that Markdown turns into characters; links hide no address."""
    file = io.StringIO()
    console = Console(
        file=file, theme=THEME, width=60, height=20, force_terminal=True, no_color=no_color, color_system="standard"
    )
    hostile = (
        "**bold** \x1b]0;title\x07 \x9b31m &#27;[31m &#155;31m &#8238;txt\n\n[here](http://bad.example/x) "
        + "long words " * 30
        + "\n\n```python\nx = '\x1b[2J'\n```\n- one\n- two\n"
    )
    with MarkdownScreen(console, lambda _: None).answer() as show:
        for letter in hostile:
            show(letter)
    text = file.getvalue()
    left = re.sub(r"\x1b\[(\?25[hl]|[0-9;]*[mAK]|[0-9]*G)", "", text).replace("\r", "\n")
    assert not CONTROL.search(left), repr(CONTROL.search(left))
    assert "title" not in re.findall(r"\x1b\][^\x07]*", text) and "\x1b]" not in text
    assert not no_color or not re.search(r"\x1b\[(?:\d+;)*(3[0-7]|9[0-7]|38|48)", text)
    assert "http://bad.example/x" in left and "bold" in left
    assert max(map(len, left.splitlines())) <= 60
