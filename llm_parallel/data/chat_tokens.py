"""Tokens of a rendered conversation: its text is encoded as a whole, and what people typed never becomes a special
token.

Special tokens that stand in a message are replaced by characters of a private range of Unicode before the template sees
it (``escape``). What the template wrote itself is then recognised as usual, and the typed text is put back. Where both
occur in one conversation, a copy of the tokenizer in which special tokens have other names encodes it, so that the same
text has the same tokens as anywhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_parallel.data.tokenizer import Tokenizer
from llm_parallel.errors import UserError

PRIVATE = re.compile("[\U00100000-\U0010ffff]")
"""Characters that stand for something else on the way from a message to tokens; no message may hold one."""
TYPED, RENAMED, FILL = 0x100000, 0x108000, "\U0010f000"
MOST_NAMES = 0x6F00
NO_NAME = re.compile(r"\s*|<0x[0-9A-F]{2}>")
CONFIG_NAMES = ("special_tokens_map.json", "tokenizer_config.json")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Encoded:
    """ids int32 [n]; starts, ends int64 [n]: the characters of the text that each token stands for."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def covering(self, start: int, end: int) -> slice:
        """The tokens that hold any of the characters [start, end)."""
        first = int(np.searchsorted(self.ends, start, "right"))
        return slice(first, max(first, int(np.searchsorted(self.starts, end, "left"))))


class _Model(Protocol):
    def encode(self, text: str) -> Encoded: ...

    def without_names(self, names: Mapping[str, str]) -> Callable[[str], Encoded]: ...


class ChatTokenizer:
    """A tokenizer as templates need it. ``special``: ids of its special tokens by name; ``added``: ids of all tokens
    that are found in a text before it is encoded, by name; ``variables``: what a template may call them
    (``bos_token``); ``pad``: the id that fills samples."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        path = Path(tokenizer.name)
        self.tokenizer, self.folder = tokenizer, path.parent
        self._model: _JsonModel | _PieceModel
        self._model = _JsonModel(path) if path.suffix == ".json" else _PieceModel(path)
        self.added, flagged = self._model.added, self._model.flagged
        self.variables = declared_names(self.folder)
        names = {number: name for name, number in self.added.items()}
        for key, number in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eod)):
            if number in names:
                self.variables.setdefault(key, names[number])
        flagged |= {name for name in self.variables.values() if name in self.added}
        self.special = {name: number for name, number in self.added.items() if name in flagged}
        self.eos = tokenizer.eod
        self.pad = self.added.get(self.variables.get("pad_token", ""), tokenizer.eod)
        if len(self.added) > MOST_NAMES:
            raise UserError(
                f"tokenizer {tokenizer.name} has {len(self.added)} added tokens; conversations can be prepared with up "
                f"to {MOST_NAMES}"
            )
        self._order = {name: place for place, name in enumerate(self.added)}

    def name_of(self, number: int) -> str | None:
        """Name of an added token."""
        return self._names.get(number)

    def escaper(self, also: Iterable[str] = ()) -> Callable[[str], str]:
        """A function that replaces names of special tokens, and of the added tokens ``also``, by private characters of
        the same number."""
        more = frozenset(also)
        names = [name for name in self.added if name in self.special or name in more]
        if not names:
            return lambda text: text
        found = re.compile(_any_of(names))
        return lambda text: found.sub(lambda match: self._alias(TYPED, match.group()), text)

    def encode(self, text: str) -> Encoded:
        """Tokens of a rendered text, in which private characters stand for names that were typed."""
        if not PRIVATE.search(text):
            return self._model.encode(text)
        first = self._model.encode(text)
        written = sorted({int(number) for number in np.unique(first.ids) if int(number) in self._names})
        renamed = list(text)
        for number in written:
            name = self._names[number]
            for place in np.nonzero(first.ids == number)[0].tolist():
                start = text.find(name, int(first.starts[place]), int(first.ends[place]))
                if start >= 0:
                    renamed[start : start + len(name)] = self._alias(RENAMED, name)
        typed = "".join(renamed)
        for place, name in enumerate(self._order):
            if chr(TYPED + place) in typed:
                typed = typed.replace(self._alias(TYPED, name), name)
        return self._encode_renamed(typed)

    def restore(self, text: str) -> str:
        """The text with the names that were typed in their places."""
        for place, name in enumerate(self._order) if PRIVATE.search(text) else ():
            if chr(TYPED + place) in text:
                text = text.replace(self._alias(TYPED, name), name)
        return text

    @cached_property
    def _names(self) -> dict[int, str]:
        return {number: name for name, number in self.added.items()}

    @cached_property
    def _encode_renamed(self) -> Callable[[str], Encoded]:
        return self._model.without_names({name: self._alias(RENAMED, name) for name in self.added})

    def _alias(self, base: int, name: str) -> str:
        return chr(base + self._order[name]) + FILL * (len(name) - 1)


class _JsonModel:
    """A tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        self._model = _unlimited(Fast.from_file(str(path)))
        # Blanks, and the bytes of characters that are not in the vocabulary, are no names even if they are declared so.
        declared = sorted(self._model.get_added_tokens_decoder().items())
        tokens = [(number, token) for number, token in declared if not NO_NAME.fullmatch(token.content)]
        self.added = {token.content: number for number, token in tokens}
        self.flagged = {token.content for _, token in tokens if token.special}

    def encode(self, text: str) -> Encoded:
        return self._encoded(self._model, text)

    def without_names(self, names: Mapping[str, str]) -> Callable[[str], Encoded]:
        from tokenizers import Tokenizer as Fast

        content = json.loads(self._model.to_str())
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename_pieces(content["model"], names, {token["id"] for token in content["added_tokens"]})
        content["post_processor"] = None
        renamed = _unlimited(Fast.from_str(json.dumps(content)))
        for name, number in self.added.items():
            assert renamed.token_to_id(names[name]) == number, name
        return lambda text: self._encoded(renamed, text)

    def _encoded(self, model: Any, text: str) -> Encoded:
        found = model.encode(text, add_special_tokens=False)
        spans = np.array(found.offsets, np.int64).reshape(-1, 2)
        return _widened(np.array(found.ids, np.int32), spans[:, 0], spans[:, 1])


class _PieceModel:
    """A SentencePiece model. Its control tokens have no text; here their names in a rendered text stand for them, and
    what lies between two of them is encoded by itself."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_proto=path.read_bytes())
        size = self._model.vocab_size()
        self.added = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        self.flagged = set(self.added)
        probe = self._proto("é")
        self._bytes = max((piece.end for piece in probe.pieces), default=0) == 2

    def encode(self, text: str) -> Encoded:
        return self._encode(text, {name: name for name in self.added})

    def without_names(self, names: Mapping[str, str]) -> Callable[[str], Encoded]:
        return lambda text: self._encode(text, names)

    def _encode(self, text: str, names: Mapping[str, str]) -> Encoded:
        ids, starts, ends = [], [], []
        at = 0
        by_alias = {alias: self.added[name] for name, alias in names.items()}
        parts = re.split(f"({_any_of(list(by_alias))})", text) if by_alias else [text]
        for part in parts:
            if part in by_alias:
                ids.append(by_alias[part])
                starts.append(at)
                ends.append(at + len(part))
            elif part:
                place = self._places(part)
                for piece in self._proto(part).pieces:
                    ids.append(piece.id)
                    starts.append(at + int(place[piece.begin]))
                    ends.append(at + int(place[piece.end]))
            at += len(part)
        return _widened(np.array(ids, np.int32), np.array(starts, np.int64), np.array(ends, np.int64))

    def _places(self, text: str) -> NDArray[np.int64]:
        """Number of characters before each offset of the library, which counts bytes in some of its versions."""
        if not self._bytes or text.isascii():
            return np.arange(len(text) + 1)
        begins = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        return np.concatenate([[0], np.cumsum(begins)])

    def _proto(self, text: str) -> Any:
        try:
            return self._model.encode(text, return_type="proto")
        except (TypeError, ValueError):  # sentencepiece before 0.2.3
            return self._model.encode(text, out_type="immutable_proto")  # type: ignore[arg-type]


def declared_names(folder: Path) -> dict[str, str]:
    """Special tokens by the names that templates use for them, as a Hugging Face folder's files declare them."""
    found: dict[str, str] = {}
    for name in CONFIG_NAMES:
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in NAMED if isinstance(config, dict) else ():
            value = config.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[key] = content
    return found


def _unlimited(model: Any) -> Any:
    model.no_truncation()
    model.no_padding()
    return model


def _rename_pieces(model: dict[str, Any], names: Mapping[str, str], ids: set[int]) -> None:
    """Gives added tokens their aliases in the vocabulary too, so that no other text can be one of them."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        for name, alias in names.items():
            if vocabulary.get(name) in ids:
                vocabulary[alias] = vocabulary.pop(name)
    elif isinstance(vocabulary, list):
        for number in ids:
            if number < len(vocabulary):
                vocabulary[number][0] = names.get(vocabulary[number][0], vocabulary[number][0])
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def _widened(ids: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Encoded:
    """Tokens without characters of their own, such as all bytes of a character but its last, take the characters of the
    token after them that begins there, so that both columns ascend."""
    for place in np.nonzero(starts == ends)[0][::-1]:
        if place + 1 < len(ids) and starts[place + 1] == starts[place]:
            ends[place] = ends[place + 1]
    return Encoded(ids, starts, np.maximum.accumulate(ends) if len(ends) else ends)


def _any_of(names: list[str]) -> str:
    """A regular expression for the longest of ``names`` at a place, without trying one name after the other."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for character in name:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern(tree)


def _pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _pattern(below) for character, below in sorted(node.items()) if character]
    if not branches:
        return ""
    group = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return f"{group}?" if "" in node else group
