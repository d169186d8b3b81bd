"""Tokenizers: SentencePiece models and Hugging Face ``tokenizer.json`` behind one interface, and training of the
former."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, read_json

MODEL_NAME, JSON_NAME = "tokenizer.model", "tokenizer.json"
DECLARING_NAMES = ("special_tokens_map.json", "tokenizer_config.json")
END_TOKENS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Names that a tokenizer.json without a tokenizer_config.json beside it may give its end-of-document token."""
MAX_LINE_BYTES = 16384
TRAIN_BYTES = 10 << 20
"""Bytes of text that a tokenizer is trained on. A vocabulary of 8192 trained on all of 32 MB of Python, instead of this
much, saved 0.8 % of the tokens."""


class Tokenizer(Protocol):
    """Attributes: ``name`` (file), ``fingerprint`` (of its content), ``vocab_size`` (largest id + 1), ``eod`` (id that
    ends a document) and ``bos`` (id that begins one, or None)."""

    name: str
    fingerprint: str
    vocab_size: int
    eod: int
    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without ``bos`` and ``eod``."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of several texts, int32 each."""

    def decode(self, ids: Sequence[int], control: bool = False) -> str:
        """Text of ids. Control tokens give nothing, or their names if ``control``."""

    def token(self, number: int) -> str:
        """Name of one id in the vocabulary."""


class SentencePieceTokenizer:
    """A SentencePiece ``.model``; see Tokenizer. Raises UserError if the file is not such a model, or has no
    end-of-sentence token."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        content = path.read_bytes()
        try:
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, TypeError):
            raise UserError(f"tokenizer {path} is not a SentencePiece model") from None
        self.name, self.fingerprint = str(path), fingerprint_of(content)
        self.vocab_size: int = self._model.vocab_size()
        self.eod: int = self._model.eos_id()
        bos = self._model.bos_id()
        self.bos: int | None = bos if bos >= 0 else None
        if self.eod < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence token, which ends documents; train it with one")
        # Arrays straight from C++ where this version of sentencepiece has them (0.2.3 and later).
        self._arrays = hasattr(self._model, "EncodeAsNumpy")

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """See Tokenizer. In this thread only: ``prepare`` is parallel over processes."""
        if self._arrays:
            return [self._model.EncodeAsNumpy(text) for text in texts]
        return [np.array(self._model.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int], control: bool = False) -> str:
        """See Tokenizer."""
        numbers = [int(i) for i in ids]
        text = self._model.decode(numbers)
        if not control or not any(map(self._model.is_control, numbers)):
            return text
        shown, before = "", 0  # the library leaves control tokens out: each follows the text of all ids before it
        for at, number in enumerate(numbers):
            if self._model.is_control(number):
                so_far = self._model.decode(numbers[:at])
                shown, before = shown + so_far[before:] + self._model.id_to_piece(number), len(so_far)
        return shown + text[before:]

    def token(self, number: int) -> str:
        """See Tokenizer."""
        return self._model.id_to_piece(number)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; see Tokenizer. Its end-of-document token is the ``eos_token`` of the tokenizer_config.json
    beside it, or a token of a well-known name. As in transformers, a special token's name in a text gives that token.
    Raises UserError if there is no end-of-document token, or the file cannot be read."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._model = Fast.from_file(str(path))
        except Exception:  # the library raises bare Exception
            raise UserError(f"tokenizer {path} is not a Hugging Face tokenizer.json") from None
        self._model.no_truncation()
        self._model.no_padding()
        self.name, self.fingerprint = str(path), fingerprint_of(path.read_bytes())
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        declared = _declared_tokens(path.parent)
        self.bos = self._id_of([declared["bos_token"]])
        eod = self._id_of([declared["eos_token"], *END_TOKENS])
        if eod is None:
            raise UserError(
                f"tokenizer {path} does not say which token ends a document; put a tokenizer_config.json with "
                "eos_token beside it"
            )
        self.eod: int = eod
        self.prefix = self._prefix()

    def _prefix(self) -> list[int]:
        """Ids that the file's own template puts before a text, such as the begin token."""
        text = self.encode("a")
        whole = self._model.encode("a", add_special_tokens=True).ids
        starts = (at for at in range(len(whole) - len(text) + 1) if whole[at : at + len(text)] == text)
        return whole[: next(starts, 0)]

    def encode(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """See Tokenizer. In this thread only: ``prepare`` is parallel over processes."""
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Sequence[int], control: bool = False) -> str:
        """See Tokenizer."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=not control)

    def token(self, number: int) -> str:
        """See Tokenizer."""
        return self._model.id_to_token(number) or ""

    def _id_of(self, names: Iterable[str | None]) -> int | None:
        found = (self._model.token_to_id(name) for name in names if name)
        return next((number for number in found if number is not None), None)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a ``.model`` or ``tokenizer.json``, or the one in a folder.

    Raises UserError if there is none or it cannot be read.
    """
    path = tokenizer_file(path)
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def tokenizer_file(path: str | Path) -> Path:
    """The file of a tokenizer that is given as a file or as its folder (tokenizer.json first, since it knows added
    tokens). Raises UserError if there is none."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (JSON_NAME, MODEL_NAME) if (path / name).is_file()]
        if not found:
            raise UserError(f"tokenizer folder {path} holds neither {JSON_NAME} nor {MODEL_NAME}")
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tokenizer {path} does not exist; give a SentencePiece .model, a tokenizer.json or their folder"
        )
    return path


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises UserError if the tokenizer can give ids that the model's embedding has no row for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"model.vocab_size={model_vocab_size} is too small for tokenizer {tokenizer.name} of "
            f"{tokenizer.vocab_size} tokens; set model.vocab_size to {tokenizer.vocab_size} or more, or leave it out"
        )


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, out_dir: str | Path, max_bytes: int = TRAIN_BYTES, threads: int = 2
) -> Path:
    """Trains a tokenizer like Llama's (BPE, byte fallback, single digits, text left as it is) on the first
    ``max_bytes`` of ``texts`` and returns the path of ``out_dir``/tokenizer.model, which it replaces. Ids: 0 unknown, 1
    begin, 2 end.

    Raises UserError if there is too little text for such a vocabulary.
    """
    path = Path(out_dir) / MODEL_NAME
    with atomic_write(path, "wb") as handle:
        handle.write(sentencepiece_model(texts, vocab_size, max_bytes, threads))
    return path


def sentencepiece_model(texts: Iterable[str], vocab_size: int, max_bytes: int = TRAIN_BYTES, threads: int = 2) -> bytes:
    """Content of the file that ``train_sentencepiece`` writes. Raises UserError as that does."""
    from sentencepiece import SentencePieceTrainer

    lines = list(_lines(texts, max_bytes))
    if not lines:
        raise UserError("there is no text to train a tokenizer on; give inputs that hold some")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.9995,
            max_sentence_length=MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # "INTERNAL: file(line) [condition] What is wrong. What to do or what other option to set."
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2].partition(" or decrease")[0].rstrip(". ")
        raise UserError(f"a vocabulary of {vocab_size} does not fit {len(lines)} lines of text: {reason}") from None
    return model.getvalue()


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Lines of the texts (sentencepiece takes no line breaks), until their bytes are ``max_bytes``."""
    left = max_bytes
    for text in texts:
        for line in text.split("\n"):
            if line and "\0" not in line:
                left -= len(line.encode())
                yield line
        if left <= 0:
            return


def fingerprint_of(content: bytes) -> str:
    """A hash that tells one tokenizer file from another."""
    return hashlib.sha256(content).hexdigest()[:16]


def _declared_tokens(folder: Path) -> dict[str, str | None]:
    """``bos_token`` and ``eos_token`` as the configuration files of a Hugging Face folder name them."""
    tokens: dict[str, str | None] = {"bos_token": None, "eos_token": None}
    for name in DECLARING_NAMES:
        try:
            config: Any = read_json(folder / name)
        except (OSError, ValueError):
            continue
        for key in tokens:
            value = config.get(key) if isinstance(config, dict) else None
            tokens[key] = (value.get("content") if isinstance(value, dict) else value) or tokens[key]
    return tokens
