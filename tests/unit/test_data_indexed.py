"""Token files against megatron-core's own reader and writer, and every way in which they can be damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from llm_parallel.data import indexed
from llm_parallel.data.indexed import HEADER, TokenFile, token_dtype, write_index
from llm_parallel.errors import UserError
from tests.support.data_helpers import write_token_file

RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 60000, length).astype(np.int32) for length in (5, 0, 1, 300, 7, 0, 64)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_equal_those_of_megatron_byte_for_byte(tmp_path: Path, dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_token_file(tmp_path / "ours", DOCUMENTS, dtype)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_both_readers_read_the_same(tmp_path: Path, dtype: type) -> None:
    prefix = write_token_file(tmp_path / "x", DOCUMENTS, dtype)
    ours, theirs = TokenFile(prefix), IndexedDataset(prefix)
    assert ours.num_documents == len(theirs) == len(DOCUMENTS)
    assert ours.num_tokens == sum(map(len, DOCUMENTS))
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours.document_lengths, [len(document) for document in DOCUMENTS])
    for number, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(ours.tokens(number), document)
        if len(document):
            np.testing.assert_array_equal(ours.tokens(number), theirs[number])
    np.testing.assert_array_equal(ours.tokens(3, 10, 20), DOCUMENTS[3][10:30])
    np.testing.assert_array_equal(np.concatenate(list(ours.token_chunks(50))), np.concatenate(DOCUMENTS))


def test_index_in_chunks_is_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_token_file(tmp_path / "x", DOCUMENTS, np.uint16)
    lengths = np.array([len(document) for document in DOCUMENTS], np.int32)
    monkeypatch.setattr(indexed, "CHUNK", 3)
    written = bytearray()
    write_index(written.extend, np.dtype(np.uint16), [lengths[:2], lengths[2:2], lengths[2:]])
    assert bytes(written) == Path(f"{prefix}.idx").read_bytes()
    assert TokenFile(prefix).num_tokens == lengths.sum()


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 65536, 128256])
def test_type_is_the_one_megatron_would_choose(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def damaged(tmp_path: Path, ending: str, change: bytes | slice | None, at: int = 0) -> str:
    """A good pair of which one file is deleted (None), cut (slice) or overwritten at a byte."""
    prefix = write_token_file(tmp_path / "x", DOCUMENTS, np.uint16)
    path = Path(f"{prefix}.{ending}")
    content = bytearray(path.read_bytes())
    if change is None:
        path.unlink()
        return prefix
    if isinstance(change, slice):
        content = content[change]
    else:
        content[at : at + len(change)] = change
    path.write_bytes(content)
    return prefix


LENGTHS_AT, OFFSETS_AT = HEADER.size, HEADER.size + 4 * len(DOCUMENTS)


@pytest.mark.parametrize(
    ("ending", "change", "at", "message"),
    [
        ("idx", None, 0, r"x\.idx does not exist"),
        ("bin", None, 0, r"x\.bin does not exist"),
        ("idx", b"GARBAGE!!", 0, "is not a megatron index"),
        ("idx", slice(0), 0, "is not a megatron index"),
        ("idx", slice(20), 0, "truncated to 20 bytes"),
        ("idx", slice(-1), 0, "truncated or damaged"),
        ("idx", slice(60), 0, "truncated or damaged"),
        ("idx", struct.pack("<Q", 2), 9, "has version 2"),
        ("idx", b"\x07", 17, "unknown token type 7"),
        ("idx", b"\x04", 17, "do not follow each other"),
        ("idx", struct.pack("<Q", 1 << 60), 18, "truncated or damaged"),
        ("idx", struct.pack("<i", 6), LENGTHS_AT, "do not follow each other"),
        ("idx", struct.pack("<i", 65), LENGTHS_AT + 4 * 6, r"x\.bin has 754 bytes where its index announces 756"),
        ("idx", struct.pack("<i", -5), LENGTHS_AT, "do not follow each other"),
        ("idx", struct.pack("<q", 8), OFFSETS_AT + 8, "do not follow each other"),
        ("bin", slice(-2), 0, "has 752 bytes where its index announces 754"),
        ("bin", slice(0), 0, "has 0 bytes where its index announces 754"),
    ],
)
def test_damage_is_one_clear_sentence(
    tmp_path: Path, ending: str, change: bytes | slice | None, at: int, message: str
) -> None:
    prefix = damaged(tmp_path, ending, change, at)
    with pytest.raises(UserError, match=message) as caught:
        TokenFile(prefix)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_beyond_the_index_are_refused(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "x", DOCUMENTS, np.uint16)
    with Path(f"{prefix}.bin").open("ab") as handle:
        handle.write(b"\0\0")
    with pytest.raises(UserError, match="has 756 bytes where its index announces 754"):
        TokenFile(prefix)


def test_negative_lengths_are_refused_even_if_they_add_up(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "x", [np.zeros(27, np.int32)], np.uint16)
    with Path(f"{prefix}.idx").open("wb") as handle:
        write_index(handle.write, np.dtype(np.uint16), [np.array([10, -3, 20], np.int32)])
    with pytest.raises(UserError, match="do not follow each other"):
        TokenFile(prefix)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    prefix = write_token_file(tmp_path / "x", DOCUMENTS, np.uint16)
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError):
            TokenFile(prefix)


@pytest.mark.parametrize(("documents", "message"), [([], "lists no documents"), ([np.zeros(0)] * 3, "holds no tokens")])
def test_empty_document_set_is_refused(tmp_path: Path, documents: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenFile(write_token_file(tmp_path / "x", documents))


def test_a_pair_of_multimodal_data_is_named(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/m.bin", dtype=np.int32, multimodal=True)
    for _ in range(3):
        builder.add_document(torch.tensor([1, 2, 3, 4]), [4], [1])
    builder.finalize(f"{tmp_path}/m.idx")
    with pytest.raises(UserError, match="multimodal data"):
        TokenFile(tmp_path / "m")
