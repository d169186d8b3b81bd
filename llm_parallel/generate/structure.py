"""Answers of a given form: a JSON schema, a regular expression, a grammar or a list of choices.

The library llguidance (the extra ``structure``) says after each token which tokens may follow. The masks of a request
depend on its own tokens alone, so an answer that is interrupted and computed again, or one of several to a prompt, is
held to the same form; only the process that chooses tokens keeps track of it.
"""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError

Kind = Literal["json_schema", "regex", "grammar", "choice"]
NAMES: dict[Kind, str] = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar",
    "choice": "list of choices",
}
BLANKS = r"[\x20\x0A\x09]{0,20}"
"""Between the parts of JSON. A model that may write blanks without end sometimes does nothing else."""
KEPT_STRUCTURES = 64
GUIDED: dict[str, Kind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar"}
"""Names that vLLM gives the kinds, in ``structured_outputs`` and after ``guided_``."""


@dataclass(frozen=True)
class Structure:
    """The form of an answer. ``kind``, and as ``text`` a JSON schema, a regular expression (Rust's syntax, matched as a
    whole), a grammar (GBNF as llama.cpp has it, or Lark's as llguidance has it), or a JSON list of texts.

    The answer may end exactly where the form is complete, and must where nothing may follow. Properties of an object
    come in the order of the schema, and where only one text can go on, it is written with its usual tokens. Raises
    UserError for what is no such thing at all; what the library cannot enforce is found when the structure meets a
    tokenizer (``Structures.check``)."""

    kind: Kind
    text: str
    about: str = field(default="", compare=False)
    """What messages call it, if not by its kind and text."""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UserError(f"{NAMES[self.kind]} {self.text!r:.80} is no text; give a text")
        if self.kind in ("json_schema", "choice"):
            try:
                held = json.loads(self.text)
            except ValueError as error:
                raise UserError(f"{NAMES[self.kind]} {self.text[:80]!r} is no JSON: {error}") from None
            if self.kind == "choice":
                _check_choices(held)
            elif not isinstance(held, (dict, bool)):
                raise UserError(f"JSON schema {self.text[:80]!r} is no JSON object; give a schema such as {{}}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Structure:
        """JSON that a schema accepts; the schema as an object or as JSON."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """Text that a regular expression matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, grammar: str) -> Structure:
        """Text that follows from the rule ``root`` (GBNF) or ``start`` (Lark) of a grammar."""
        return cls("grammar", grammar)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Structure:
        """One of several texts."""
        _check_choices(texts)
        return cls("choice", json.dumps(list(texts)))

    @classmethod
    def from_request(cls, body: Mapping[str, Any]) -> Structure | None:
        """The structure that the body of an HTTP request asks for, None if it asks for none.

        Read are ``response_format`` of chat completions and ``text.format`` of responses (``text``, ``json_object``,
        ``json_schema``), and vLLM's ``structured_outputs`` with one of ``json``, ``regex``, ``choice``, ``grammar``, or
        those as ``guided_json`` and so on. ``tools`` are for ``tool_calls.tool_structure``. Raises UserError that names
        the field."""
        found: dict[str, Structure] = {}
        for name, given in _formats(body):
            structure = _of_format(name, given)
            if structure is not None:
                found[name] = structure
        for name, short, given in _guided(body):
            if given is not None:
                found[name] = _of_guided(name, short, given)
        if len(found) > 1:
            raise UserError(f"{' and '.join(found)} are given together; an answer has one structure, so give one")
        return next(iter(found.values()), None)


def _check_choices(texts: Any) -> None:
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) and one for one in texts):
        raise UserError(f"choice is {json.dumps(texts, default=str)[:80]}; give at least one text, and none empty")


def _formats(body: Mapping[str, Any]) -> list[tuple[str, Any]]:
    text = body.get("text")
    found = [("response_format", body.get("response_format"))]
    if isinstance(text, Mapping):
        found.append(("text.format", text.get("format")))
    return [(name, given) for name, given in found if given is not None]


def _of_format(name: str, given: Any) -> Structure | None:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure.json_object()
    if kind != "json_schema":
        shown = json.dumps(given, default=str)[:80]
        raise UserError(f"{name} is {shown}; its type must be text, json_object or json_schema")
    holder = given.get("json_schema", given)
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, (Mapping, bool)):
        where = "json_schema.schema" if "json_schema" in given else "schema"
        raise UserError(f"{name}.{where} is {json.dumps(schema, default=str)[:80]}; it must be a JSON schema")
    return Structure.json_schema(schema)


def _guided(body: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Field, short name and value of vLLM's fields."""
    held = body.get("structured_outputs")
    if held is not None and not isinstance(held, Mapping):
        raise UserError(f"structured_outputs is {json.dumps(held, default=str)[:80]}; it must be an object")
    held = held or {}
    wrong = [name for name, value in held.items() if name not in GUIDED and value not in (None, False)]
    if wrong:
        known = ", ".join(GUIDED)
        raise UserError(f"structured_outputs.{wrong[0]} is not known; give one of {known}")
    inside = [(f"structured_outputs.{short}", short, held.get(short)) for short in GUIDED]
    return inside + [(f"guided_{short}", short, body.get(f"guided_{short}")) for short in GUIDED]


def _of_guided(name: str, short: str, given: Any) -> Structure:
    kind = GUIDED[short]
    types: dict[str, Any] = {"json_schema": (Mapping, str, bool), "choice": (list, tuple)}
    if not isinstance(given, types.get(kind, str)):
        raise UserError(f"{name} is {json.dumps(given, default=str)[:80]}; it must be a {NAMES[kind]}")
    made: Structure = getattr(Structure, kind)(given)
    return made


class Structures:
    """Structures over one tokenizer's vocabulary, and how far each answer is in its own.

    vocabulary: the number of tokens that a mask is for; those beyond the tokenizer's are never allowed. Raises
    UserError if llguidance is missing or does not know the tokenizer's kind."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._tokenizer = _open_tokenizer(tokenizer)
        self._compiled: OrderedDict[Structure, Any] = OrderedDict()
        self._under_way: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()

    def check(self, structure: Structure) -> None:
        """Raises UserError for a structure that cannot be enforced as it is."""
        self._matcher(structure)

    def allowed(
        self, answer: Any, structure: Structure, written: Sequence[int], ends: Collection[int]
    ) -> NDArray[np.bool_]:
        """Which tokens may follow: bool [vocabulary].

        answer: the object that the state is kept for while it lives; written: its tokens so far; ends: tokens that end
        it, which are allowed exactly where the structure is complete. Nothing is allowed where no token of the
        vocabulary continues the structure, and where the library gives up (a grammar that is too ambiguous)."""
        state = self._under_way.get(answer)
        if state is None or state.taken != list(written[: len(state.taken)]):
            state = self._under_way[answer] = _State(self._matcher(structure).deep_copy(), [])
        if not state.take(written):
            # The library's automata have limits that the answers of a structure share; once more with fresh ones.
            self._compiled.pop(structure, None)
            state = self._under_way[answer] = _State(self._matcher(structure).deep_copy(), [])
            if not state.take(written):
                return np.zeros(self._vocabulary, np.bool_)
        mask = state.mask(self._vocabulary)
        may_end = state.matcher.is_accepting()
        for token in ends:
            if 0 <= token < self._vocabulary:
                mask[token] = may_end
        return mask

    def _matcher(self, structure: Structure) -> Any:
        matcher = self._compiled.get(structure)
        if matcher is None:
            matcher = self._compiled[structure] = _compile(structure, self._tokenizer)
            if len(self._compiled) > KEPT_STRUCTURES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(structure)
        return matcher


class _State:
    """One answer: the library's matcher and the tokens that it has taken."""

    def __init__(self, matcher: Any, taken: list[int]) -> None:
        self.matcher, self.taken = matcher, taken

    def take(self, written: Sequence[int]) -> bool:
        """Takes the tokens that are new. Returns whether the matcher is in order."""
        new = [int(token) for token in written[len(self.taken) :]]
        if new:
            self.matcher.consume_tokens(new)
            self.taken += new
        return not self.matcher.is_error()

    def mask(self, vocabulary: int) -> NDArray[np.bool_]:
        """bool [vocabulary]; without the library's own end token."""
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask = np.zeros(vocabulary, np.bool_)
        count = min(vocabulary, len(bits))
        mask[:count] = bits[:count]
        if self.matcher.is_error():
            mask[:] = False
        return mask


def _open_tokenizer(tokenizer: Tokenizer) -> Any:
    try:
        from llguidance import LLTokenizer
    except ImportError:
        raise UserError(
            "structures of answers need llguidance, which is not installed; pip install 'llm-parallel[structure]'"
        ) from None
    if not tokenizer.name.endswith(".json"):
        pieces: Any = _Pieces(tokenizer)
        return LLTokenizer(pieces, eos_token=[tokenizer.eod])
    try:
        return LLTokenizer(tokenizer.name, eos_token=[tokenizer.eod])
    except ValueError as error:
        raise UserError(
            f"tokenizer {tokenizer.name} cannot be used with structures of answers: {_reason(str(error))}"
        ) from None


class _Pieces:
    """A SentencePiece model as llguidance reads one: the bytes of each token, and which tokens are no text."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=tokenizer.name)
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eod, tokenizer.bos
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for number in range(model.vocab_size()):
            piece = model.id_to_piece(number)
            no_text = model.is_control(number) or model.is_unknown(number) or model.is_unused(number)
            if no_text or piece == "<0xFF>":  # llguidance marks special tokens by this byte, which no UTF-8 has
                self.special_token_ids.append(number)
                self.tokens.append(piece.encode())
            elif model.is_byte(number):
                self.tokens.append(bytes([int(piece[3:5], 16)]))
            else:
                self.tokens.append(piece.replace("\u2581", " ").encode())
        special = set(self.special_token_ids)
        self._numbers = {token: number for number, token in enumerate(self.tokens) if number not in special}
        self._longest = max(map(len, self._numbers))

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens whose bytes are exactly the text's: those of the model's own encoding, without the blank that it puts
        before a text, or else the longest ones from the left."""
        given = text.encode() if isinstance(text, str) else text
        mark = self._numbers.get(b"\x02")
        ids = self._tokenizer.encode("\x02" + given.decode("utf-8", "replace"))
        found = ids[ids.index(mark) + 1 :] if mark in ids else []
        return found if b"".join(self.tokens[number] for number in found) == given else self._longest_first(given)

    def _longest_first(self, left: bytes) -> list[int]:
        found = []
        while left:
            ends = range(min(self._longest, len(left)), 0, -1)
            end = next((end for end in ends if left[:end] in self._numbers), None)
            if end is None:
                break  # a vocabulary without all bytes
            found.append(self._numbers[left[:end]])
            left = left[end:]
        return found


def _compile(structure: Structure, tokenizer: Any) -> Any:
    from llguidance import LLMatcher, grammar_from

    try:
        if structure.kind == "json_schema":
            grammar = _schema_grammar(structure.text)
        else:
            grammar = grammar_from(structure.kind, structure.text)
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        failed, said = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
        reason = matcher.get_error() or (said[0] if failed or said else "")
    except ValueError as error:
        reason = str(error)
    if reason:
        what = structure.about or f"{NAMES[structure.kind]} {structure.text[:80]!r}"
        raise UserError(f"the {what} cannot be enforced: {_reason(reason)}; change it")
    return matcher


def _schema_grammar(text: str) -> str:
    """In the library's form. Keywords that it does not implement are errors, not ignored."""
    from llguidance import LLMatcher

    schema = json.loads(text)
    if schema is False:
        raise ValueError("the schema false accepts nothing")
    defaults: Any = {"whitespace_flexible": True, "whitespace_pattern": BLANKS}
    return LLMatcher.grammar_from_json_schema({} if schema is True else schema, defaults, {"lenient": False})


def _reason(message: str) -> str:
    """The part of a message of several lines that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (errors or lines or ["no reason is given"])[0].rstrip(".")
