"""Records out of data files of every kind, against the values that were written."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llm_parallel.data import json_stream, kinds, readers
from llm_parallel.data.containers import Damaged
from llm_parallel.data.json_stream import JsonStream
from llm_parallel.data.kinds import Kind, judge
from llm_parallel.data.readers import Problems, rows
from llm_parallel.errors import UserError

TRUTH = [
    {"text": "plain", "n": 1},
    {"text": 'quotes " and \\ and {braces} [and] , commas\n', "n": 2},
    {"text": "naïve 日本語 😀 \u2028 \u0085", "n": [1, {"deep": None}]},
    {"text": "", "n": -1.5e-3},
    {"text": "x" * 3000, "n": 5},
]


def lines(values: list[Any] = TRUTH) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def table(values: list[Any] = TRUTH) -> pyarrow.Table:
    return pyarrow.table({"text": [v["text"] for v in values], "n": [str(v["n"]) for v in values]})


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    parquet.write_table(table(), out, row_group_size=2)
    return out.getvalue()


def arrow_bytes(new: Callable[..., Any]) -> bytes:
    out = io.BytesIO()
    with new(out, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    return out.getvalue()


def csv_bytes(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["text", "n"], *([value["text"], str(value["n"])] for value in TRUTH)])
    return out.getvalue().encode()


STRINGS = [{"text": value["text"], "n": str(value["n"])} for value in TRUTH]
HALF = len(lines()) // 2
# Name → content, the values it holds, and where the third of them is.
READ: dict[str, tuple[bytes, list[Any], str]] = {
    "x.jsonl": (lines(), TRUTH, "line 3"),
    "X.JSONL": (lines(), TRUTH, "line 3"),
    "no end.ndjson": (lines().rstrip(b"\n"), TRUTH, "line 3"),
    "returns.jsonl": (lines().replace(b"\n", b"\r\n"), TRUTH, "line 3"),
    "blank lines.jsonl": (lines().replace(b"\n", b"\n\n"), TRUTH, "line 5"),
    "mark.jsonl": (b"\xef\xbb\xbf" + lines(), TRUTH, "line 3"),
    "utf-16.jsonl": (lines().decode().encode("utf-16"), TRUTH, "line 3"),
    "utf-16-be.json": (b"\xfe\xff" + json.dumps(TRUTH).encode("utf-16-be"), TRUTH, "line 1 (record 3)"),
    "utf-32.jsonl": (lines().decode().encode("utf-32"), TRUTH, "line 3"),
    "lines.json": (lines(), TRUTH, "line 3"),
    "0a1b2c": (lines(), TRUTH, "line 3"),
    "lines.txt": (lines(), TRUTH, "line 3"),
    "array.json": (json.dumps(TRUTH).encode(), TRUTH, "line 1 (record 3)"),
    "unescaped.json": (json.dumps(TRUTH, ensure_ascii=False).encode(), TRUTH, "line 1 (record 3)"),
    "pretty.json": (json.dumps(TRUTH, indent=2).encode(), TRUTH, "line 10 (record 3)"),
    "array.jsonl": (json.dumps(TRUTH).encode(), TRUTH, "line 1 (record 3)"),
    "0a1b2d": (json.dumps(TRUTH, indent=1).encode(), TRUTH, "line 10 (record 3)"),
    "objects.json": ("\n".join(json.dumps(v, indent=1) for v in TRUTH).encode(), TRUTH, "line 9 (record 3)"),
    "objects.jsonl": ("\n".join(json.dumps(v, indent=1) for v in TRUTH).encode(), TRUTH, "line 9 (record 3)"),
    "joined.json": (lines().replace(b"\n", b""), TRUTH, "line 1 (record 3)"),
    "commas.json": (lines().replace(b"\n", b",\n"), TRUTH, "line 3 (record 3)"),
    "x.jsonl.gz": (gzip.compress(lines()), TRUTH, "line 3"),
    "members.json.gz": (gzip.compress(lines()[:HALF]) + gzip.compress(lines()[HALF:]), TRUTH, "line 3"),
    "padded.jsonl.gz": (gzip.compress(lines()) + bytes(512), TRUTH, "line 3"),
    "frames.jsonl.zst": (zstandard.compress(lines()[:HALF]) + zstandard.compress(lines()[HALF:]), TRUTH, "line 3"),
    "skippable.jsonl.zst": (b"\x50*M\x18\x04\0\0\0abcd" + zstandard.compress(lines()), TRUTH, "line 3"),
    "x.jsonl.xz": (lzma.compress(lines()[:HALF]) + lzma.compress(lines()[HALF:]), TRUTH, "line 3"),
    "x.jsonl.bz2": (bz2.compress(lines()[:HALF]) + bz2.compress(lines()[HALF:]), TRUTH, "line 3"),
    "gzip without an ending": (gzip.compress(json.dumps(TRUTH).encode()), TRUTH, "line 1 (record 3)"),
    "decompressed by the download.jsonl.gz": (lines(), TRUTH, "line 3"),
    "x.parquet": (parquet_bytes(), STRINGS, "row 3"),
    "0a1b2e": (parquet_bytes(), STRINGS, "row 3"),
    "file.arrow": (arrow_bytes(pyarrow.ipc.new_file), STRINGS, "row 3"),
    "data-00000-of-00001.arrow": (arrow_bytes(pyarrow.ipc.new_stream), STRINGS, "row 3"),
    "x.csv": (csv_bytes(","), STRINGS, "line 5"),
    "x.tsv.gz": (gzip.compress(csv_bytes("\t")), STRINGS, "line 5"),
    "semicolons.csv": (csv_bytes(";"), STRINGS, "line 5"),
}


@pytest.mark.parametrize("name", READ)
def test_records_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    content, values, third = READ[name]
    (tmp_path / name).write_bytes(content)
    found = list(rows(tmp_path / name))
    assert [row.value for row in found] == values
    assert found[2].where == f"{tmp_path / name} {third}"


@pytest.mark.parametrize(("link", "target"), [("x.jsonl", "0a1b"), ("0a1b", "x.jsonl")])
def test_a_link_may_have_the_ending_or_its_target(tmp_path: Path, link: str, target: str) -> None:
    """As in Hugging Face's cache, whose files are links to content without endings. The array on one line is what a
    name decides: it is one line of .jsonl, and elements of JSON elsewhere."""
    (tmp_path / target).write_bytes(b'["a"]\n["b"]\n')
    (tmp_path / link).symlink_to(tmp_path / target)
    assert [row.value for row in rows(tmp_path / link)] == [["a"], ["b"]]


LFS = b"version https://git-lfs.example/spec/v1\noid sha256:0\nsize 5\n"
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "is empty"),
    "empty.jsonl.gz": (gzip.compress(b""), "is empty"),
    "x.txt": (b"Hello [1] world", "is plain text and no table of records"),
    "quoted.txt": (b"[1] Knuth", "is plain text"),
    "x.zip": (b"PK\x03\x04" + bytes(50), "is a zip archive; unpack it"),
    "x.parquet": (b"<!DOCTYPE html>", "is named like Parquet and is none: it begins with '<!DOCTYPE html>'"),
    "pointer.parquet": (LFS, "is a Git LFS pointer"),
    "short.parquet": (parquet_bytes()[:100], "is truncated or damaged"),
    "x.parquet.gz": (gzip.compress(parquet_bytes()), "is Parquet inside gzip"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(lines())), "is compressed twice"),
    "no mark.jsonl": ('{"text": "a"}'.encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "latin-1": ("Où est".encode("latin-1") * 9, "is not UTF-8 (byte 0xf9 at position 2)"),
    "check.jsonl.gz": (gzip.compress(lines())[:-8] + bytes(8), "holds damaged gzip data (Error -3 while decompressing"),
    "damaged.jsonl.xz": (lzma.compress(lines())[:20], "holds xz data that ends early"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    content, said = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(rows(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name)) and said in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "is a folder and no file"), (tmp_path / "none", "cannot be read: No such file")):
        with pytest.raises(UserError, match=said):
            next(rows(path))


A, B = b'{"text": "a"}\n', b'{"text": "b"}\n'
# Name → content, the texts that are read, and the sentences about the rest.
COUNTED: dict[str, tuple[bytes, str, list[str]]] = {
    "cut.jsonl": (A + b'{"text": "cut\n' + B, "ab", ["line 2 is not JSON (character 10: Unterminated string)"]),
    "last cut.jsonl": (A + B + b'{"text": "cu', "ab", ["line 3 is not JSON (character 10: Unterminated string)"]),
    "byte.jsonl": (A + b'{"text": "\xff"}\n' + B, "ab", ["line 2 is not UTF-8 (byte 0xff at position 11)"]),
    "surrogate.jsonl": (A + b'{"text": "\\ud800"}\n' + B, "ab", [r"line 2 holds half of a surrogate pair (\ud800)"]),
    "surrogate bytes.jsonl": (A + b'{"text": "\xed\xa0\x80"}\n' + B, "ab", ["line 2 is not UTF-8"]),
    "zeros.jsonl": (A + bytes(9) + b"\n" + B, "ab", ["line 2 is not JSON"]),
    "zeros at the end.jsonl": (A + B + bytes(9), "ab", ["line 3 is not JSON"]),
    "deep.jsonl": (A + b"[" * 100_000 + b"\n" + B, "ab", ["line 2 is nested too deeply"]),
    "digits.jsonl": (A + b"1" * 5000 + b"\n" + B, "ab", ["line 2 is not read (Exceeds the limit"]),
    "first line.json": (b'{"text": "cut\n' + A + B, "ab", ["line 1 is not JSON"]),
    "array.json": (b"[" + A + b"," + B + b',{"text" "c"}]', "ab", ["line 3 (record 3) is not JSON (Expecting ':'"]),
    "open.json": (b"[" + A + b"," + B, "ab", ["line 3 ends within a JSON array of which 2 elements were read"]),
    "array byte.json": (b"[" + A + b',{"text": "\xff"},' + B + b"]", "ab", ["(record 2) holds bytes that are not UTF"]),
    "array surrogate.json": (b"[" + A + b',{"a": "\\udc00"},' + B + b"]", "ab", ["(record 2) holds half of a surrog"]),
    "twice.jsonl": (A + b'{"n": {"text": 1, "text": 2}}\n' + B, "ab", ["line 2 has the field 'text' twice, with diff"]),
    "twice the same.jsonl": (b'{"text": "a", "n": 1, "n": 1}\n' + B, "ab", []),
    "array twice.json": (
        b"[" + A + b',{"a": 1, "a": 2},' + B + b"]",
        "ab",
        ["(record 2) has the field 'a' twice, with"],
    ),
    "cut.jsonl.gz": (gzip.compress(A + B)[:-5], "ab", ["after line 2 holds gzip data that ends early"]),
    "rubbish.jsonl.gz": (gzip.compress(A + B) + b"rubbish", "ab", ["after line 2 holds damaged gzip data"]),
    "cut.jsonl.zst": (zstandard.compress(A + B) + zstandard.compress(A)[:-3], "ab", ["zstd data that ends early"]),
    "cut.jsonl.xz": (lzma.compress(A + B)[:-9], "ab", ["after line 2 holds xz data that ends early"]),
    "cut.jsonl.bz2": (bz2.compress(A + B) + bz2.compress(B)[:20], "ab", ["after line 2 holds bzip2 data that ends"]),
    "fields.csv": (b"text,n\na,1\nc\nb,2\n", "ab", ["line 3 has 1 fields, and the first line names 2 columns"]),
    "byte.csv": (b"text,n\na,1\n\xff,1\nb,2\n", "ab", ["line 3 holds bytes that are not UTF-8"]),
    "quote.csv": (b'text,n\na,1\nb,2\n"c', "ab", ["line 4 is not a row of CSV (unexpected end of data)"]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_bad_records_are_counted_and_the_rest_is_read(tmp_path: Path, name: str) -> None:
    content, texts, said = COUNTED[name]
    (tmp_path / name).write_bytes(content)
    problems = Problems()
    assert [row.value["text"] for row in rows(tmp_path / name, problems)] == list(texts)
    assert problems.count == len(said)
    for sentence, wanted in zip(problems.first, said):
        assert sentence.startswith(f"{tmp_path / name} ") and wanted in sentence
    if not said:
        return
    with pytest.raises(UserError) as caught:
        list(rows(tmp_path / name))
    assert str(caught.value) == problems.first[0]


def test_bytes_in_a_table_that_are_no_text_lose_their_row(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3)))
    texts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"a\xffb"))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    problems = Problems()
    assert [row.value["text"] for row in rows(tmp_path / "x.parquet", problems)] == ["a", "b"]
    assert problems.first == [f"{tmp_path / 'x.parquet'} row 2 holds bytes that are not UTF-8"]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_gives_objects_the_fields_that_they_were_written_with(tmp_path: Path, form: str) -> None:
    """All objects of a column have the same fields there, so that a tool's arguments would be every tool's."""
    calls = [
        {"name": "find", "arguments": {"what": "it", "where": {"here": 1}}},
        {"name": "stop", "arguments": {"at": 2}},
    ]
    written = [{"text": "a", "calls": calls, "n": None}, {"text": None, "calls": [calls[1], None], "n": {"x": 0}}]
    table, path = pyarrow.Table.from_pylist(written), tmp_path / f"x.{form}"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as out:
            out.write_table(table)
    assert [row.value for row in rows(path)] == written


def test_only_the_first_five_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(A + b"{\n" * 12)
    problems = Problems()
    assert problems.summary() is None
    assert len(list(rows(tmp_path / "x.jsonl", problems))) == 1
    assert problems.count == 12 and len(problems.first) == 5 and "line 6 " in problems.first[-1]
    summary = problems.summary()
    assert summary and summary.startswith("left out 12 records") and summary.endswith("; and 7 more")


def test_columns_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet_bytes())
    assert [row.value for row in rows(tmp_path / "x.parquet", columns=["n"])] == [{"n": v["n"]} for v in STRINGS]
    with pytest.raises(UserError, match=r"x\.parquet has no column 'content'; its columns are 'text', 'n'"):
        list(rows(tmp_path / "x.parquet", columns=["content"]))


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet_bytes())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"x\.parquet is a file of Parquet, which needs pyarrow; install it \(pip"):
        list(rows(tmp_path / "x.parquet"))


def test_a_line_that_is_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 2 << 20)
    (tmp_path / "x.jsonl").write_bytes(A + b'{"text": "' + b"x" * (5 << 20) + b'"}\n' + B)
    problems = Problems()
    assert [row.value["text"] for row in rows(tmp_path / "x.jsonl", problems)] == ["a", "b"]
    assert "line 2 is longer than" in problems.first[0]


def values_in(text: bytes, size: int) -> list[Any]:
    stream = JsonStream(iter([text[at : at + size] for at in range(0, len(text), size)]), no_problem)
    return [value for _, value in stream]


def no_problem(place: str, reason: str) -> None:
    raise AssertionError(f"{place} {reason}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_a_stream_gives_what_json_gives_however_it_is_cut(
    values: list[Any], size: int, indent: int | None, ascii_only: bool
) -> None:
    array = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert values_in(array, size) == values
    objects = [{"value": value} for value in values]
    each = " ".join(json.dumps(value, indent=indent) for value in objects).encode()
    assert values_in(each, size) == objects


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), min_size=1, max_size=4), st.data())
def test_a_cut_array_gives_its_first_elements_and_an_error(values: list[Any], data: st.DataObject) -> None:
    whole = json.dumps(values).encode()
    cut = whole[: data.draw(st.integers(1, len(whole) - 1))]
    found = []
    with pytest.raises(Damaged):
        for _, value in JsonStream(iter([cut]), no_problem):
            found.append(value)
    assert found == values[: len(found)]


def test_a_value_that_is_too_large_ends_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_VALUE_CHARACTERS", 1000)
    text = json.dumps([{"a": 1}, "x" * 5000]).encode()
    with pytest.raises(Damaged, match=r"line 1 \(record 2\) is over"):
        values_in(text, 100)


def test_a_large_value_is_not_parsed_again_for_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    class Counting(json.JSONDecoder):
        def raw_decode(self, *arguments: Any) -> Any:
            nonlocal tries
            tries += 1
            return super().raw_decode(*arguments)

    monkeypatch.setattr(json_stream.json, "JSONDecoder", Counting)
    assert values_in(json.dumps([["x" * 50] * 2000]).encode(), 100) == [["x" * 50] * 2000]
    assert 1 <= tries <= 12


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("x.jsonl", b'{"text": "' + b"x" * 200_000 + b'"}\n', "lines"),
        ("x.json", b'{"text": "' + b"x" * 200_000 + b'"}\n', "json"),
        ("x.jsonl", b'{\n"text": "' + b"x" * 200_000 + b'"}\n', "json"),
        ("x", b'{"text": "' + b"x" * 200_000 + b'"}\n', "lines"),
        ("x.txt", b"{x} is a set", "text"),
        ("x.md", b'{"a": 1}', "text"),
        ("x.py", b'{"a": 1}', "text"),
        ("x.txt", b'[{"a": 1}]', "json"),
    ],
)
def test_what_the_first_bytes_say(tmp_path: Path, name: str, content: bytes, form: kinds.Form) -> None:
    (tmp_path / name).write_bytes(content)
    assert judge(tmp_path / name) == Kind(form)
