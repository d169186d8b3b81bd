"""A table of input files and what ``prepare`` makes of each: read, named as not read, or read with records counted out.

`python -m tests.unit.test_input_table FILE` writes the table, with what the program really says, as Markdown.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import socket
import sqlite3
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import sentencepiece
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet

from llm_parallel.data.prepare import PrepareConfig, PrepareReport, prepare
from llm_parallel.data.tokenizer import train_sentencepiece
from llm_parallel.errors import UserError

TRUTH = ["Hello world", "naïve 日本語 😀", 'braces {"a": [1]}\nand "lines"']
GOOD = ["the good file"]
Make = Callable[[Path], list[Path]]


@dataclass(frozen=True)
class Case:
    """``make`` writes the inputs into a folder. ``texts`` are what has to be read, ``named`` what has to be said of
    files that are not read, ``bad`` what of records that are left out, ``damaged`` what of a file whose end cannot be
    read, ``refused`` what ends the command."""

    what: str
    make: Make
    texts: list[str] = field(default_factory=lambda: list(TRUTH))
    named: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    damaged: str = ""
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def one(name: str, content: bytes | str) -> Make:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return [folder / name]

    return make


def lines(texts: list[Any] = TRUTH, **dumps: Any) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}, **dumps).encode() + b"\n" for n, text in enumerate(texts))


def records(texts: list[str] = TRUTH) -> list[dict[str, Any]]:
    return [{"id": n, "text": text} for n, text in enumerate(texts)]


def table(column: Any, name: str = "text") -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": pyarrow.array(range(len(column))), name: column}), out, row_group_size=2)
    return out.getvalue()


def raw_strings(*values: bytes) -> pyarrow.StringArray:
    """Strings as a writer makes them that does not look whether they are UTF-8."""
    ends = np.cumsum([0, *map(len, values)]).astype(np.int32)
    buffers = pyarrow.py_buffer(ends.tobytes()), pyarrow.py_buffer(b"".join(values))
    return pyarrow.StringArray.from_buffers(len(values), *buffers)


def arrow(new: Callable[..., Any]) -> bytes:
    out, content = io.BytesIO(), pyarrow.table({"text": TRUTH})
    with new(out, content.schema) as writer:
        writer.write_table(content, max_chunksize=1)
    return out.getvalue()


def arrow_with_offsets(*offsets: int) -> bytes:
    """An Arrow stream of strings that lie where these numbers say."""
    buffers = pyarrow.py_buffer(np.array(offsets, np.int32).tobytes()), pyarrow.py_buffer(b"abcdefgh")
    column = pyarrow.StringArray.from_buffers(len(offsets) - 1, *buffers)
    out, schema = io.BytesIO(), pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.ipc.new_stream(out, schema) as writer:
        writer.write_batch(pyarrow.RecordBatch.from_arrays([column], schema=schema))
    return out.getvalue()


def linked(link: str, target: str, content: bytes) -> Make:
    def make(folder: Path) -> list[Path]:
        (folder / "blobs").mkdir()
        (folder / "blobs" / target).write_bytes(content)
        (folder / link).symlink_to(Path("blobs") / target)
        return [folder / link]

    return make


def saved_to_disk(folder: Path) -> list[Path]:
    (folder / "set").mkdir()
    (folder / "set" / "data-00000-of-00001.arrow").write_bytes(arrow(pyarrow.ipc.new_stream))
    (folder / "set" / "state.json").write_text(json.dumps({"_fingerprint": "1", "_split": None}, indent=2))
    return [folder / "set"]


def tree(folder: Path) -> list[Path]:
    contents: dict[str, str] = {"a/x.txt": TRUTH[0], "a/b/y.MD": TRUTH[1], "z.py": TRUTH[2], "a/.hidden.txt": "no"}
    contents |= {".git/config.txt": "no", "picture.png": "no", "package.json": json.dumps({"name": "x"}, indent=1)}
    for name, text in contents.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text(text, encoding="utf-8")
    return [folder / "tree"]


def twice(link: Callable[[Path, Path], Any] | None) -> Make:
    def make(folder: Path) -> list[Path]:
        (folder / "x.jsonl").write_bytes(lines())
        if link is None:
            return [folder / "x.jsonl", folder / "x.jsonl"]
        link(folder / "other.jsonl", folder / "x.jsonl")
        return [folder / "x.jsonl", folder / "other.jsonl"]

    return make


def pipe(folder: Path) -> list[Path]:
    os.mkfifo(folder / "x.jsonl")
    return [folder / "x.jsonl"]


def listening(folder: Path) -> list[Path]:
    with closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(os.path.relpath(folder / "x.jsonl"))  # names of sockets are short
    return [folder / "x.jsonl"]


def empty_folder(folder: Path) -> list[Path]:
    (folder / "x.jsonl").mkdir()
    return [folder / "x.jsonl"]


def pictures(folder: Path) -> list[Path]:
    (folder / "pictures").mkdir()
    for name in ("a.png", "b.png", "c.jpg"):
        (folder / "pictures" / name).write_bytes(b"x")
    return [folder / "pictures"]


def broken_link(folder: Path) -> list[Path]:
    (folder / "x.jsonl").symlink_to("gone")
    return [folder / "x.jsonl"]


def database(folder: Path) -> list[Path]:
    with closing(sqlite3.connect(folder / "x.db")) as opened:
        opened.execute("create table a (text)")
    return [folder / "x.db"]


def archive(mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        member = tarfile.TarInfo("x.jsonl")
        member.size = len(lines())
        tar.addfile(member, io.BytesIO(lines()))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("x.jsonl", lines())
    return out.getvalue()


def numpy_bytes() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


HALF = len(lines()) // 2
MANY = [
    f"document {n} " + str(hash_like) for n, hash_like in enumerate(np.random.default_rng(0).integers(0, 1 << 60, 9999))
]
LFS = b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 5\n"
PRETTY = b"\n".join(json.dumps(record, indent=2).encode() for record in records())
LONG = "a long line " * 200_000

READ = [
    Case("JSON lines", one("x.jsonl", lines())),
    Case("ending in capitals", one("X.JSONL", lines())),
    Case("no line end at the end", one("x.jsonl", lines()[:-1])),
    Case("lines end in CR LF", one("x.jsonl", lines().replace(b"\n", b"\r\n"))),
    Case("blank lines between", one("x.ndjson", lines().replace(b"\n", b"\n\n  \n"))),
    Case("UTF-8 with a byte order mark", one("x.jsonl", b"\xef\xbb\xbf" + lines(ensure_ascii=False))),
    Case("UTF-16 with a byte order mark", one("x.jsonl", lines(ensure_ascii=False).decode().encode("utf-16"))),
    Case("UTF-16, big-endian, JSON array", one("x.json", b"\xfe\xff" + json.dumps(records()).encode("utf-16-be"))),
    Case("UTF-32 with a byte order mark", one("x.jsonl", lines().decode().encode("utf-32"))),
    Case("link with an ending to a blob without (Hugging Face cache)", linked("x.jsonl", "0a1b2c", lines())),
    Case("the same, Parquet", linked("x.parquet", "0a1b2c", table(TRUTH))),
    Case("link without an ending to a file with one", linked("data", "x.jsonl", lines())),
    Case("the blob itself: JSON lines without an ending", one("0a1b2c", lines())),
    Case("JSON lines named .json (Megatron-LM's README)", one("x.json", lines())),
    Case("JSON lines named .json.gz (C4, Dolma)", one("c4-train.00000.json.gz", gzip.compress(lines()))),
    Case("JSON lines named .txt", one("x.txt", lines())),
    Case("JSON array on one line", one("x.json", json.dumps(records()))),
    Case("JSON array, pretty-printed", one("x.json", json.dumps(records(), indent=4))),
    Case("JSON array named .jsonl", one("x.jsonl", json.dumps(records()))),
    Case("JSON array without an ending, in gzip", one("blob", gzip.compress(json.dumps(records()).encode()))),
    Case("one JSON object, pretty-printed", one("x.json", json.dumps(records()[0], indent=1)), TRUTH[:1]),
    Case("JSON objects, pretty-printed, after each other", one("x.json", PRETTY)),
    Case("the same named .jsonl", one("x.jsonl", PRETTY)),
    Case("JSON objects on one line without a separator", one("x.json", lines().replace(b"\n", b""))),
    Case("JSON lines that end in commas", one("x.jsonl", lines().replace(b"\n", b",\n"))),
    Case("gzip of two members", one("x.jsonl.gz", gzip.compress(lines()[:HALF]) + gzip.compress(lines()[HALF:]))),
    Case("gzip, no line end at the end", one("x.jsonl.gz", gzip.compress(lines()[:-1]))),
    Case("gzip padded with zeros", one("x.jsonl.gz", gzip.compress(lines()) + bytes(1024))),
    Case(
        "zstd of two frames",
        one("x.jsonl.zst", zstandard.compress(lines()[:HALF]) + zstandard.compress(lines()[HALF:])),
    ),
    Case(
        "zstd with a skippable frame (pzstd)",
        one("x.jsonl.zst", b"\x50*M\x18\x01\0\0\0a" + zstandard.compress(lines())),
    ),
    Case("xz of two streams", one("x.jsonl.xz", lzma.compress(lines()[:HALF]) + lzma.compress(lines()[HALF:]))),
    Case("bzip2 of two streams", one("x.jsonl.bz2", bz2.compress(lines()[:HALF]) + bz2.compress(lines()[HALF:]))),
    Case("named .gz and not compressed", one("x.jsonl.gz", lines())),
    Case("gzip without .gz", one("x.jsonl", gzip.compress(lines()))),
    Case("Parquet of several row groups", one("x.parquet", table(TRUTH))),
    Case("Parquet without an ending", one("0a1b2c", table(TRUTH))),
    Case("Parquet, large strings", one("x.parquet", table(pyarrow.array(TRUTH, pyarrow.large_string())))),
    Case("Parquet, dictionary", one("x.parquet", table(pyarrow.array(TRUTH).dictionary_encode()))),
    Case("Parquet, bytes", one("x.parquet", table(pyarrow.array([text.encode() for text in TRUTH])))),
    Case("Parquet, another column", one("x.parquet", table(TRUTH, "content")), options={"key": "content"}),
    Case("Arrow file", one("x.arrow", arrow(pyarrow.ipc.new_file))),
    Case("folder of datasets' save_to_disk", saved_to_disk, named=("state.json gives no document: line 1 (record 1)",)),
    Case("CSV", one("x.csv", 'id,text\n0,Hello world\n1,naïve 日本語 😀\n2,"braces {""a"": [1]}\nand ""lines"""\n')),
    Case("TSV", one("x.tsv", 'id\ttext\n0\tHello world\n1\t"a\tb"\n'), ["Hello world", "a\tb"]),
    Case("CSV with semicolons", one("x.csv", "text;id\r\nHello world;0\r\n"), ["Hello world"]),
    Case("escaped surrogate pair", one("x.jsonl", rb'{"text": "\ud83d\ude00"}'), ["😀"]),
    Case("escaped NUL in a text", one("x.jsonl", rb'{"text": "a\u0000b"}'), ["a\0b"]),
    Case("other fields are lists and objects", one("x.jsonl", b'{"m": {"text": 1}, "l": [[1]], "text": "a"}'), ["a"]),
    Case("a line of 2.4 million characters", one("x.jsonl", lines([LONG, "b"])), [LONG, "b"]),
    Case("records without text", one("x.jsonl", lines(["", "a", ""])), ["a"]),
    Case("text", one("x.txt", "{Not} JSON.\r\n"), ["{Not} JSON.\r\n"]),
    Case("text that begins with a bracket", one("x.txt", '[1] Knuth\n[{"no"}]'), ['[1] Knuth\n[{"no"}]']),
    Case("text in UTF-16 with a byte order mark", one("x.txt", "naïve".encode("utf-16")), ["naïve"]),
    Case("text in UTF-8 with a byte order mark", one("x.txt", b"\xef\xbb\xbfnaive"), ["naive"]),
    Case("source code that is JSON too", one("x.py", '{"text": "a"}\n'), ['{"text": "a"}\n']),
    Case("text without an ending", one("LICENSE", "All rights"), ["All rights"]),
    Case(
        "folders in a folder",
        tree,
        [TRUTH[2], TRUTH[0], TRUTH[1]],
        ("package.json gives no",),
    ),
    Case("a file named twice", twice(None), named=("x.jsonl is given twice and read once",)),
    Case("a file and a link to it", twice(Path.symlink_to), named=("other.jsonl is the same file as x.jsonl",)),
    Case("a file and a hard link to it", twice(Path.hardlink_to), named=("other.jsonl is the same file as x.jsonl",)),
]

AROUND = b'{"text": "a"}\n%s\n{"text": "b"}\n'


def around(line: bytes, said: str, name: str = "x.jsonl") -> dict[str, Any]:
    """A bad line between two good ones."""
    return {"make": one(name, AROUND % line), "texts": ["a", "b"], "bad": (f"{name} line 2 {said}",)}


def cut(name: str, content: bytes, said: str, texts: list[str] = MANY) -> dict[str, Any]:
    return {"make": one(name, content), "texts": texts, "damaged": said}


WHOLE = lines(MANY)
STREAM = arrow(pyarrow.ipc.new_stream)
COUNTED = [
    Case("truncated line", **around(b'{"text": "cu', "is not JSON (character 10: Unterminated string)")),
    Case("broken JSON", **around(b'{"text" "c"}', "is not JSON (character 9: Expecting ':' delimiter)")),
    Case("two lines joined in the middle", **around(b'{"text": "c"}{"text": "d"}', "is not JSON (character 14: Extra")),
    Case("a byte that is not UTF-8", **around(b'{"text": "\xff"}', "is not UTF-8 (byte 0xff at position 11)")),
    Case("a surrogate in the bytes", **around(b'{"text": "\xed\xa0\x80"}', "is not UTF-8 (byte 0xed")),
    Case("half of an escaped surrogate pair", **around(rb'{"text": "\ud800"}', "holds half of a surrogate pair")),
    Case("null", **around(b'{"text": null}', "has no text under 'text' but null")),
    Case("a number", **around(b'{"text": 5}', "has no text under 'text' but a number")),
    Case("true", **around(b'{"text": true}', "has no text under 'text' but true or false")),
    Case("a list", **around(b'{"text": ["c"]}', "has no text under 'text' but a list")),
    Case("nested lists", **around(b'[["c"]]', "has no text under 'text': it is no object but a list")),
    Case("an object", **around(b'{"text": {"a": 1}}', "has no text under 'text' but an object")),
    Case(
        "another field", **around(b'{"body": "c"}', "has no text under 'text': its fields are 'body'; name the field")
    ),
    Case("an empty object", **around(b"{}", "has no text under 'text': it is empty")),
    Case("NUL bytes", **around(bytes(9), "is not JSON")),
    Case("100,000 brackets", **around(b"[" * 100_000, "is nested too deeply")),
    Case("a number of 5,000 digits", **around(b'{"a": ' + b"1" * 5000 + b"}", "is not read (Exceeds the limit")),
    Case("HTML", **around(b"<html>", "is not JSON (character 1: Expecting value)")),
    Case("the first line is broken", one("x.json", b'{"text": "cut\n' + lines()), bad=("x.json line 1 is not JSON",)),
    Case("gzip that ends early", **cut("x.jsonl.gz", gzip.compress(WHOLE)[:-99], "holds gzip data that ends early")),
    Case(
        "zstd that ends early", **cut("x.jsonl.zst", zstandard.compress(WHOLE)[:-9], "holds zstd data that ends early")
    ),
    Case("xz that ends early", **cut("x.jsonl.xz", lzma.compress(WHOLE)[:-9], "holds xz data that ends early")),
    Case("bzip2 that ends early", **cut("x.jsonl.bz2", bz2.compress(WHOLE * 4)[:-99], "holds bzip2 data that ends")),
    Case(
        "gzip with a changed byte",
        **cut("x.jsonl.gz", (packed := gzip.compress(WHOLE))[:90_000] + b"XY" + packed[90_002:], "may be wrong too"),
        bad=("is not JSON",),
    ),
    Case("gzip followed by something else", **cut("x.jsonl.gz", packed + b"rubbish", "holds damaged gzip data")),
    Case(
        "JSON array that ends early",
        one("x.json", json.dumps(records())[:-1]),
        damaged="x.json line 1 ends within a JSON array of which 3 elements were read",
    ),
    Case(
        "JSON array, broken within",
        one("x.json", b'[{"text": "a"},\n{"text": "b"},\n{"text" "c"},\n{"text": "d"}]'),
        ["a", "b"],
        damaged="x.json line 3 (record 3) is not JSON (Expecting ':' delimiter); nothing after",
    ),
    Case(
        "JSON array with a byte that is not UTF-8",
        one("x.json", b'[{"text": "a"}, {"text": "\xff"}, {"text": "b"}]'),
        ["a", "b"],
        bad=("x.json line 1 (record 2) holds bytes that are not UTF-8",),
    ),
    Case("Parquet with a null", one("x.parquet", table(["a", None, "b"])), ["a", "b"], bad=("x.parquet row 2 has no",)),
    Case(
        "Parquet with bytes that are not UTF-8",
        one("x.parquet", table(raw_strings(b"a", b"\xff", b"b"))),
        ["a", "b"],
        bad=("x.parquet row 2 holds bytes that are not UTF-8",),
    ),
    Case(
        "CSV row that is short", one("x.csv", "text,n\na,1\nc\nb,2\n"), ["a", "b"], bad=("x.csv line 3 has 1 fields",)
    ),
    Case("CSV, not UTF-8", one("x.csv", b"text\na\n\xff\nb\n"), ["a", "b"], bad=("x.csv line 3 holds bytes that",)),
    Case(
        "UTF-16, half a character",
        one("x.jsonl", '\ufeff{"text": "a"}\n'.encode("utf-16-le") + b"x"),
        ["a"],
        damaged="after line 1 is not UTF-16",
    ),
]


def unread(what: str, name: str, content: bytes | str, said: str) -> Case:
    return Case(what, one(name, content), [], (f"{name} {said}",))


UTF16 = "without a mark".encode("utf-16-le")
NAMED = [
    unread("empty file", "x.jsonl", b"", "is empty"),
    unread("empty, in gzip", "x.jsonl.gz", gzip.compress(b""), "is empty"),
    unread("only white space", "x.jsonl", b" \n\n", "holds no records"),
    unread("empty JSON array", "x.json", b"[]", "holds no records"),
    unread("Parquet without rows", "x.parquet", table(pyarrow.array([], pyarrow.string())), "holds no records"),
    unread(
        "Parquet without the column",
        "x.parquet",
        table(["a"], "content"),
        "has no column 'text'; its columns are 'id', 'content'; name the column with --key content",
    ),
    unread(
        "CSV without the column",
        "x.csv",
        "name,body\na,b\n",
        "has no column 'text'; its columns are 'name', 'body'; name the column with --key body",
    ),
    unread(
        "no record has the field",
        "x.jsonl",
        b'{"content": "a"}\n' * 9,
        "gives no document: none of its 9 records can be read; line 1 has no text",
    ),
    unread(
        "records within an object", "x.json", json.dumps({"data": records()}), "gives no document: line 1 has no text"
    ),
    unread(
        "a JSON string",
        "x.json",
        b'"text"',
        "gives no document: line 1 (record 1) has no text under 'text': it is no object",
    ),
    unread("truncated Parquet", "x.parquet", table(TRUTH)[:-9], "is truncated or damaged"),
    unread("Arrow whose offsets go back", "x.arrow", arrow_with_offsets(0, 6, 2, 8), "is truncated or damaged (Offset"),
    unread("truncated Arrow", "x.arrow", STREAM[:120], "is truncated or damaged ("),
    unread("Arrow file without its end", "x.arrow", arrow(pyarrow.ipc.new_file)[:-9], "is truncated or damaged ("),
    unread(
        "HTML named .parquet",
        "x.parquet",
        "<!DOCTYPE html>",
        "is named like Parquet and is none: it begins with '<!DOCTYPE html>'",
    ),
    unread("Git LFS pointer", "x.parquet", LFS, "is a Git LFS pointer and not the data itself; run `git lfs pull`"),
    unread("Parquet in gzip", "x.parquet.gz", gzip.compress(table(TRUTH)), "is Parquet inside gzip; decompress it"),
    unread("compressed twice", "x.jsonl.gz", gzip.compress(gzip.compress(lines())), "is compressed twice"),
    unread(
        "text in latin-1",
        "x.txt",
        "Où est".encode("latin-1"),
        "is not UTF-8 (byte 0xf9 at position 2): it is binary or of another encoding",
    ),
    unread(
        "the same without an ending", "README", "Où est".encode("latin-1") * 9, "is not UTF-8 (byte 0xf9 at position 2)"
    ),
    unread(
        "text in UTF-16 without a mark",
        "x.txt",
        UTF16,
        "holds NUL bytes: it is binary, or UTF-16 without a byte order mark",
    ),
    unread("JSON lines in UTF-16 without a mark", "x.jsonl", lines().decode().encode("utf-16-le"), "holds NUL bytes"),
    unread("text with NUL bytes", "x.md", b"a" * 600 + b"\0", "holds NUL bytes"),
    unread(
        "text in gzip that ends early", "x.txt.gz", gzip.compress(b"abc" * 999)[:-9], "holds gzip data that ends early"
    ),
    unread("lz4", "x.jsonl.lz4", b"\x04\x22\x4d\x18" + bytes(9), "is compressed with lz4"),
    unread("zip archive", "x.zip", zipped(), "is a zip archive; unpack it"),
    unread("tar archive", "x.tar", archive("w"), "is a tar archive; unpack it"),
    unread("tar archive in gzip", "x.tar.gz", archive("w:gz"), "is a tar archive; unpack it"),
    unread("PDF", "x.pdf", b"%PDF-1.7", "is a PDF; extract its text"),
    unread("numpy array", "x.npy", numpy_bytes(), "is a numpy array"),
    unread("Python pickle", "x.pkl", pickle.dumps(TRUTH, 4), "is a Python pickle"),
    unread("index of token files", "x.idx", b"MMIDIDX\0\0" + bytes(30), "is the index of token files"),
    Case("SQLite database", database, [], ("x.db is an SQLite database",)),
    Case("pipe", pipe, [], ("x.jsonl is a pipe and no regular file",)),
    Case("socket", listening, [], ("x.jsonl is a socket and no regular file",)),
]

REFUSED = [
    Case(
        "a file that does not exist", lambda folder: [folder / "x.jsonl"], refused="x.jsonl does not exist and matches"
    ),
    Case(
        "a glob without a match", lambda folder: [folder / "*.jsonl"], refused="*.jsonl does not exist and matches no f"
    ),
    Case("a link to nothing", broken_link, refused="x.jsonl is a link to gone, which does not exist"),
    Case("an empty folder named .jsonl", empty_folder, refused="x.jsonl holds no files that are read"),
    Case("a folder of pictures", pictures, refused="it holds 2 .png, 1 .jpg"),
]
CASES = [*READ, *COUNTED, *NAMED, *REFUSED]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(folder: Path) -> str:
    return str(train_sentencepiece(TRUTH * 20, 310, folder))


def run(folder: Path, tokenizer: str, inputs: list[Path], **options: Any) -> PrepareReport:
    config = PrepareConfig(tuple(map(str, inputs)), str(folder / "out" / "o"), tokenizer, workers=1, **options)
    return prepare(config)


def read_back(folder: Path, tokenizer: str) -> list[str]:
    """By megatron-core's reader and sentencepiece."""
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    return [model.decode(ids[:-1].tolist()) for ids in IndexedDataset(str(folder / "out" / "o"))]


def said_by(report: PrepareReport, folder: Path) -> list[str]:
    """Everything about files and records that are not in the token files, without the folder."""
    said = [*(f"{path} {reason}" for path, reason in report.skipped), *report.damaged, *report.first_bad]
    return [sentence.replace(f"{folder}/", "") for sentence in said]


def identify(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.what) for case in cases]


@pytest.mark.parametrize("case", identify([*READ, *COUNTED]))
def test_what_can_be_read_is_read_and_the_rest_is_said(tmp_path: Path, tokenizer: str, case: Case) -> None:
    inputs = case.make(tmp_path)
    report = run(tmp_path, tokenizer, inputs, **case.options)
    texts, expected = read_back(tmp_path, tokenizer), case.texts
    if expected is MANY:  # what comes before the damage
        assert len(texts) > 500
        expected = (MANY * 4)[: len(texts)]
    assert texts == expected or "wrong" in case.damaged
    said = said_by(report, tmp_path)
    wanted = [*case.named, *case.bad, *([case.damaged] if case.damaged else [])]
    for sentence in wanted:
        assert any(sentence in one_said for one_said in said), (sentence, said)
    assert bool(said) == bool(wanted)
    assert (report.bad_records > 0) == bool(case.bad) and (report.skipped_files > 0) == bool(case.named)
    assert len(report.damaged) == bool(case.damaged)
    if case.bad or case.damaged:
        with pytest.raises(UserError) as caught:
            run(tmp_path, tokenizer, inputs, strict=True, **case.options)
        assert str(caught.value) in [*report.first_bad, *report.damaged]


@pytest.mark.parametrize("case", identify(NAMED))
def test_what_is_not_read_is_named_and_the_run_goes_on(tmp_path: Path, tokenizer: str, case: Case) -> None:
    inputs = case.make(tmp_path)
    with pytest.raises(UserError) as caught:
        run(tmp_path, tokenizer, inputs, **case.options)
    assert case.named[0] in str(caught.value).replace(f"{tmp_path}/", "")
    (tmp_path / "good.jsonl").write_bytes(lines(GOOD))
    report = run(tmp_path, tokenizer, [*inputs, tmp_path / "good.jsonl"], **case.options)
    assert read_back(tmp_path, tokenizer) == GOOD
    assert (report.skipped_files, report.bad_records, report.files) == (1, 0, 1)
    assert case.named[0] in said_by(report, tmp_path)[0]


@pytest.mark.parametrize("case", identify(REFUSED))
def test_what_is_not_there_is_refused(tmp_path: Path, tokenizer: str, case: Case) -> None:
    with pytest.raises(UserError, match=re.escape(case.refused)):
        run(tmp_path, tokenizer, case.make(tmp_path), **case.options)


def outcomes() -> Iterator[tuple[str, str, str, str]]:
    """Input, what it is, what becomes of it, and what the program says."""
    with tempfile.TemporaryDirectory() as made:
        tokenizer = make_tokenizer(Path(made))
        for number, case in enumerate(CASES):
            folder = Path(made) / str(number)
            folder.mkdir()
            inputs = case.make(folder)
            names = " ".join(dict.fromkeys(path.name for path in inputs))
            try:
                report = run(folder, tokenizer, inputs, **case.options)
            except UserError as error:
                result, said = "refused, status 2", [str(error).replace(f"{folder}/", "")]
                if case in NAMED:
                    (folder / "good.jsonl").write_bytes(lines(GOOD))
                    report = run(folder, tokenizer, [*inputs, folder / "good.jsonl"], **case.options)
                    assert read_back(folder, tokenizer) == GOOD
                    result, said = "alone refused, status 2; beside a good file named", said_by(report, folder)
                yield names, case.what, result, " / ".join(said)
                continue
            equal = read_back(folder, tokenizer) == case.texts
            result = count(report.documents, "document") + (", equal to the truth" if equal else " before the damage")
            counts = [
                count(report.bad_records, "bad record"),
                count(len(report.damaged), "damaged file"),
                count(report.skipped_files, "file") + " named",
            ]
            counts = [what for what in counts if not what.startswith("0")]
            yield names, case.what, "; ".join([result, *counts]), " / ".join(said_by(report, folder))


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def main() -> None:
    rows = list(outcomes())
    table = [
        f"# {len(rows)} inputs of `prepare` and what it makes of them",
        "",
        "Written by `python -m tests.unit.test_input_table FILE`; `tests/unit/test_input_table.py` makes the inputs.",
        "",
        "| input | what it is | result | what is said |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows),
    ]
    Path(sys.argv[1]).write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
