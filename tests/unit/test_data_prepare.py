"""prepare: against megatron-core's builder, through kills and damage, and what it takes as input."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sentencepiece
import tokenizers
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from rich.console import Console

from llm_parallel.config.tree import DataConfig, Source
from llm_parallel.data import inputs
from llm_parallel.data import prepare as prepare_module
from llm_parallel.data.command import prepare_command
from llm_parallel.data.corpus import prepare_python_corpus, python_corpus, unigram_entropy
from llm_parallel.data.display import shown_progress
from llm_parallel.data.indexed import TokenFile
from llm_parallel.data.inputs import Input, Losses, Piece, documents, find_files, plan_shards
from llm_parallel.data.kinds import Kind
from llm_parallel.data.mix import check_token_files
from llm_parallel.data.prepare import PrepareConfig, PrepareReport, Progress, prepare
from llm_parallel.data.tokenizer import train_sentencepiece
from llm_parallel.errors import UserError
from tests.support.data_helpers import write_token_file

SOURCES = [path for path in sorted(Path(json.__file__).parents[1].glob("*.py")) if path.stat().st_size]
TEXTS = [path.read_bytes().decode() for path in SOURCES[:60]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_sentencepiece(TEXTS, 1000, tmp_path_factory.mktemp("tokenizer"), max_bytes=300_000))


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    content = "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, 1)
    elif path.suffix == ".zst":
        half = len(content) // 2
        content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    path.write_bytes(content)
    return path


def read_back(prefix: str | Path, tokenizer: str) -> list[str]:
    """Texts of a prepared set by megatron-core's reader and sentencepiece; every document has to end in one EOD."""
    model, texts = sentencepiece.SentencePieceProcessor(model_file=tokenizer), []
    for ids in IndexedDataset(str(prefix)):
        assert ids[-1] == model.eos_id() and model.eos_id() not in ids[:-1]
        texts.append(model.decode(ids[:-1].tolist()))
    return texts


def run(out: Path, tokenizer: str, *sources: Path | str, **options: Any) -> PrepareReport:
    options.setdefault("workers", 1)
    return prepare(PrepareConfig(tuple(map(str, sources)), str(out), tokenizer, **options))


@pytest.mark.parametrize("append_eod", [True, False])
def test_files_equal_those_of_megatron_byte_for_byte(tmp_path: Path, tokenizer: str, append_eod: bool) -> None:
    run(tmp_path / "ours", tokenizer, write_jsonl(tmp_path / "x.jsonl", TEXTS), append_eod=append_eod)
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(model.vocab_size()))
    for text in TEXTS:
        ids = model.encode(text) + [model.eos_id()] * append_eod
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_begin_with_the_begin_token_when_asked(tmp_path: Path, tokenizer: str, append_eod: bool) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS[:5])
    report = run(tmp_path / "o", tokenizer, source, prepend_bos=True, append_eod=append_eod)
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    end = [model.eos_id()] * append_eod
    wanted = [[model.bos_id(), *model.encode(text), *end] for text in TEXTS[:5]]
    assert [ids.tolist() for ids in IndexedDataset(str(tmp_path / "o"))] == wanted
    assert (report.prepend_bos, report.append_eod, report.tokens) == (True, append_eod, sum(map(len, wanted)))
    assert json.loads((tmp_path / "o.report.json").read_text())["prepend_bos"] is True


def test_a_tokenizer_without_a_begin_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, "a")).save(str(path))
    with pytest.raises(UserError, match=r"--prepend-bos: tokenizer .*tokenizer\.json has no token that begins a doc"):
        run(tmp_path / "o", str(path), write_jsonl(tmp_path / "x.jsonl", ["a"]), prepend_bos=True)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_json_lines_plain_and_compressed(tmp_path: Path, tokenizer: str, name: str) -> None:
    texts = [*TEXTS[:20], "", "naïve 日本語\u2028 line", *TEXTS[20:40]]
    report = run(tmp_path / "out", tokenizer, write_jsonl(tmp_path / name, texts, "content"), key="content")
    assert read_back(tmp_path / "out", tokenizer) == [text for text in texts if text]
    kept = [text for text in texts if text]
    assert report.documents == len(kept) and report.empty_documents == 1
    assert report.text_bytes == sum(len(text.encode()) for text in kept)
    assert report.tokens == TokenFile(tmp_path / "out").num_tokens
    assert report.bytes_per_token == report.text_bytes / report.tokens
    assert json.loads((tmp_path / "out.report.json").read_text())["tokens"] == report.tokens
    assert not (tmp_path / "out.parts").exists()


def test_folders_globs_and_files_in_order_each_once(tmp_path: Path, tokenizer: str) -> None:
    folder = tmp_path / "text"
    (folder / "b" / ".hidden").mkdir(parents=True)
    texts = {"z.txt": "last", "a.md": "first", "b/c.py": "code", "b/x.bin": "no ending known", "b/.y.txt": "hidden"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "b" / ".hidden" / "d.txt").write_text("hidden")
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"compressed"))
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    report = run(tmp_path / "folder", tokenizer, folder)
    assert read_back(tmp_path / "folder", tokenizer) == ["first", "compressed", "marked\r\n", "last", "code"]
    assert (report.skipped_files, report.files, report.forms) == (2, 5, {"text": 5})
    assert report.skipped == [
        (str(folder / "broken.txt"), "is a link to something that does not exist"),
        (
            str(folder / "latin.txt"),
            "is not UTF-8 (byte 0xef at position 3): it is binary or of another encoding; convert text to UTF-8",
        ),
    ]
    assert report.other_endings == {".bin": 1}
    run(tmp_path / "globs", tokenizer, folder / "z.txt", f"{folder}/*.txt", folder / "b" / "x.bin", f"{folder}/**/*.py")
    assert read_back(tmp_path / "globs", tokenizer) == ["last", "marked\r\n", "no ending known", "code"]
    run(tmp_path / "endings", tokenizer, folder, extensions=(".py", ".md"))
    assert read_back(tmp_path / "endings", tokenizer) == ["first", "code"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=20), st.integers(1, 200), st.booleans())
def test_cutting_json_lines_anywhere_loses_and_repeats_nothing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, newline_at_end: bool
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("cut") / "x.jsonl", texts)
    if not newline_at_end:
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    shards = plan_shards([Input(str(path), path.stat().st_size, Kind("lines"))], size)
    found = [text for shard in shards for piece in shard for text in documents(piece, "text", Losses(strict=True))]
    assert found == [text for text in texts if text]
    pieces = [piece for shard in shards for piece in shard]
    assert [piece.start for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    assert all(len(shard) == 1 for shard in shards) and pieces[-1].end == path.stat().st_size


def test_small_files_share_shards_and_large_json_lines_are_divided() -> None:
    sizes = {"a.txt": 10, "b.txt": 50, "c.txt": 60, "d.jsonl": 250, "e.txt": 0, "f.jsonl.gz": 500}
    forms = {"txt": Kind("text"), "jsonl": Kind("lines"), "gz": Kind("lines", "gzip")}
    shards = plan_shards([Input(name, size, forms[name.split(".")[-1]]) for name, size in sizes.items()], 100)
    assert [[(Path(piece.path).name, piece.start, piece.end) for piece in shard] for shard in shards] == [
        [("a.txt", 0, 10), ("b.txt", 0, 50)],
        [("c.txt", 0, 60)],
        [("d.jsonl", 0, 100)],
        [("d.jsonl", 100, 200)],
        [("d.jsonl", 200, 250), ("e.txt", 0, 0)],
        [("f.jsonl.gz", 0, 500)],
    ]


def large_input(folder: Path, megabytes: int = 6) -> Path:
    """JSON lines of real text that make that many shards."""
    repeated, texts = 0, []
    while sum(map(len, texts[-len(TEXTS) :])) * repeated < megabytes << 20:
        texts += [f"{repeated} {text}" for text in TEXTS]
        repeated += 1
    return write_jsonl(folder / "large.jsonl", texts)


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")]


@pytest.mark.processes
def test_any_number_of_processes_writes_the_same(tmp_path: Path, tokenizer: str) -> None:
    source = large_input(tmp_path, 3)
    seen: list[Progress] = []
    reports = [run(tmp_path / "one", tokenizer, source)]
    config = PrepareConfig((str(source),), str(tmp_path / "two"), tokenizer, workers=2)
    reports.append(prepare(config, seen.append))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [report.workers for report in reports] == [1, 2]
    assert reports[0].shards == reports[1].shards == len(seen) - 1 > 2
    assert [progress.tokens for progress in seen] == sorted(progress.tokens for progress in seen)
    assert (seen[0].bytes_done, seen[0].eta_s) == (0, None)
    assert seen[-1].bytes_done == seen[-1].bytes_total == source.stat().st_size and seen[-1].eta_s == 0
    assert (seen[-1].tokens, seen[-1].documents) == (reports[1].tokens, reports[1].documents)


KILLED = """
import sys
from llm_parallel.data.mix import check_token_files
from llm_parallel.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    source, out, tokenizer, workers = sys.argv[1:]
    prepare(PrepareConfig((source,), out, tokenizer, workers=int(workers), shard_megabytes=1))
"""


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_goes_on_without_redoing_finished_shards(tmp_path: Path, tokenizer: str, workers: int) -> None:
    source, parts = large_input(tmp_path), tmp_path / "out.parts"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, source, tmp_path / "out", tokenizer, str(workers)])
    deadline = time.monotonic() + 60
    while len(list(parts.glob("[0-9]*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= (2 if workers == 2 else 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(children, timeout=60)[1], "workers end with their parent"
    done = {path.name: path.stat() for path in parts.glob("[0-9]*")}
    finished = {name[:6] for name in done if name.endswith(".json")}
    assert not (tmp_path / "out.idx").exists() and not (tmp_path / "out.report.json").exists()
    with pytest.raises(UserError, match="does not exist"):
        TokenFile(tmp_path / "out")

    kept: list[bool] = []

    def watch(progress: Progress) -> None:
        assert progress.bytes_before > 0
        for name, before in done.items():
            if name[:6] in finished:
                now = (parts / name).stat()
                kept.append((now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns))

    config = PrepareConfig((str(source),), str(tmp_path / "out"), tokenizer, workers=1, shard_megabytes=1)
    report = prepare(config, watch)
    assert 2 <= report.shards_reused == len(finished) < report.shards
    assert kept and all(kept)
    run(tmp_path / "undisturbed", tokenizer, source)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_finished_files_are_left_alone_until_something_changes(tmp_path: Path, tokenizer: str) -> None:
    source, out = write_jsonl(tmp_path / "x.jsonl", TEXTS[:5]), tmp_path / "out"
    first = run(out, tokenizer, source)
    inode = Path(f"{out}.bin").stat().st_ino
    assert run(out, tokenizer, source) == first and Path(f"{out}.bin").stat().st_ino == inode
    write_jsonl(source, TEXTS[:6])
    assert run(out, tokenizer, source).documents == 6
    assert run(out, tokenizer, source, append_eod=False).tokens == TokenFile(out).num_tokens
    Path(f"{out}.idx").unlink()
    run(out, tokenizer, source, append_eod=False)
    assert TokenFile(out).num_documents == 6


def test_shards_of_other_inputs_are_not_taken_for_ours(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_jsonl(tmp_path / "x.jsonl", TEXTS[:5]), tmp_path / "out"
    monkeypatch.setattr(prepare_module, "_join", fail_with(RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        run(out, tokenizer, source)
    assert list((tmp_path / "out.parts").glob("[0-9]*.json"))
    monkeypatch.undo()
    write_jsonl(source, TEXTS[5:8])
    report = run(out, tokenizer, source)
    assert report.shards_reused == 0 and read_back(out, tokenizer) == TEXTS[5:8]


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_full_disk_is_one_sentence_and_loses_no_shard(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_jsonl(tmp_path / "x.jsonl", TEXTS[:5]), tmp_path / "out"
    opened = os.open

    def on_a_full_disk(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if Path(path).name.startswith(".out.bin."):  # where the joined tokens are first written
            (tmp_path / "full").symlink_to(path)
            return opened("/dev/full", os.O_WRONLY)
        return opened(path, flags, *more, **named)

    with monkeypatch.context() as patched:
        patched.setattr("os.open", on_a_full_disk)
        with pytest.raises(UserError, match=r"no space left on the disk.*run the same command again"):
            run(out, tokenizer, source)
    assert (tmp_path / "full").is_symlink()
    with pytest.raises(UserError, match=r"out\.idx does not exist"):
        TokenFile(out)
    report = run(out, tokenizer, source)
    assert report.shards_reused == report.shards == 1
    assert read_back(out, tokenizer) == TEXTS[:5]


def test_index_of_an_earlier_set_is_gone_before_its_tokens_are(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(out, tokenizer, write_jsonl(tmp_path / "x.jsonl", TEXTS[:5]))
    monkeypatch.setattr(prepare_module, "write_index", fail_with(RuntimeError("stopped")))
    with pytest.raises(RuntimeError, match="stopped"):
        run(out, tokenizer, write_jsonl(tmp_path / "y.jsonl", TEXTS[5:9]))
    with pytest.raises(UserError, match=r"out\.idx does not exist"):
        TokenFile(out)


def test_two_at_once_are_refused(tmp_path: Path, tokenizer: str) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS[:2])
    config = PrepareConfig((str(source),), str(tmp_path / "out"), tokenizer, workers=1)

    def second(_: Progress) -> None:
        with pytest.raises(UserError, match=r"another process is preparing .*out;"):
            prepare(config)

    prepare(config, second)


@pytest.mark.processes
def test_killed_worker_is_one_sentence(tmp_path: Path, tokenizer: str) -> None:
    source = large_input(tmp_path, 10)
    config = PrepareConfig((str(source),), str(tmp_path / "out"), tokenizer, workers=2)

    def kill_workers(progress: Progress) -> None:
        if progress.bytes_done:
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()

    with pytest.raises(UserError, match="a worker process of prepare was killed"):
        prepare(config, kill_workers)
    assert list((tmp_path / "out.parts").glob("[0-9]*.json")), "what was finished is kept"


SHORT = [f"text {n}" for n in range(30)]


def bad_line(tmp_path: Path, line: bytes, name: str = "x.jsonl") -> Path:
    good = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in SHORT)
    content = good + line + b"\n" + good
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "\xff\xfe"}', "is not UTF-8 .byte 0xff at position 11"),
        (b'{"text": "\\ud83d"}', "holds half of a surrogate pair"),
        (b'{"txt": "a"}', "has no text under 'text': its fields are 'txt'; name the field with --key txt"),
        (b'{"id": "7", "body": "a"}', "its fields are 'id', 'body'; name the field with --key body"),
        (b'{"text": 5}', "has no text under 'text' but a number"),
        (b'{"text": null}', "has no text under 'text' but null"),
        (b'{"text": ["a"]}', "has no text under 'text' but a list"),
        (b'["text"]', "has no text under 'text': it is no object but a list"),
        (b"\0" * 7, "is not JSON"),
    ],
)
def test_bad_lines_are_counted_and_named(tmp_path: Path, tokenizer: str, name: str, line: bytes, message: str) -> None:
    path = bad_line(tmp_path, line, name)
    report = run(tmp_path / "out", tokenizer, path)
    assert read_back(tmp_path / "out", tokenizer) == SHORT * 2
    assert report.bad_records == 1 and re.search(message, report.first_bad[0])
    assert report.first_bad[0].startswith(f"{path} line 31 ")
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", tokenizer, path, strict=True)
    assert str(caught.value) == report.first_bad[0]


def test_line_number_is_right_in_a_later_piece(tmp_path: Path) -> None:
    path = bad_line(tmp_path, b"{")
    middle = path.read_bytes().index(b"\n{\n") - 10
    with pytest.raises(UserError, match="line 31 is not JSON"):
        piece = Piece(str(path), middle, path.stat().st_size, Kind("lines"), whole=False)
        list(documents(piece, "text", Losses(strict=True)))


def test_bad_lines_of_all_shards_are_counted_and_five_shown(tmp_path: Path, tokenizer: str) -> None:
    path = large_input(tmp_path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = list(range(0, len(lines), 7))
    for n in bad:
        lines[n] = b'{"text"}\n'
    path.write_bytes(b"".join(lines))
    report = run(tmp_path / "out", tokenizer, path)
    assert report.shards > 1 and report.bad_records == len(bad)
    assert report.documents == len(lines) - len(bad)
    assert [int(said.split(" line ")[1].split()[0]) for said in report.first_bad] == [n + 1 for n in bad[:5]]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.md.gz", "x.md.zst"])
def test_damaged_compressed_files_are_named(tmp_path: Path, tokenizer: str, name: str) -> None:
    """Lines before the damage are read; a text is read whole or not at all."""
    path = write_jsonl(tmp_path / name, TEXTS[:20])
    content = path.read_bytes()
    for damaged, said in (
        (content[:-1], "data that ends early"),
        (content[: len(content) // 2], "data that ends early"),
        (b"\x00" * 20 + content[20:], "holds NUL bytes: it is binary"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=said):
            run(tmp_path / "out", tokenizer, path, strict=True)
        if "md" in name or damaged[0] == 0:
            with pytest.raises(UserError, match=said):
                run(tmp_path / "out", tokenizer, path)
        else:
            report = run(tmp_path / "out", tokenizer, path)
            assert re.search(rf"after line \d+ holds \w+ {said}", report.damaged[0])
            texts = read_back(tmp_path / "out", tokenizer)
            assert texts == TEXTS[: len(texts)] and len(texts) >= 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.txt", "does not exist and matches no file"),
        (lambda folder: folder / "*.jsonl", "does not exist and matches no file"),
        (lambda folder: folder, "holds no files that are read; endings taken"),
        (lambda folder: write_jsonl(folder / "x.jsonl", ["", ""]), "no document with text in 1 input files"),
        (
            lambda folder: write_jsonl(folder / "x.jsonl", []),
            r"none of the files given can be read: .*x\.jsonl is empty",
        ),
    ],
)
def test_empty_document_sets_are_refused(
    tmp_path: Path, tokenizer: str, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", tokenizer, make(tmp_path))
    assert not (tmp_path / "out.idx").exists()


def test_documents_too_large_for_a_tokenizer_are_refused(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "x.txt").write_bytes(b"word " * (1 << 18))
    with pytest.raises(UserError, match=r"x\.txt is one document of over 1 MiB"):
        run(tmp_path / "out", tokenizer, tmp_path / "x.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_files_are_named(tmp_path: Path, tokenizer: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS[:2])
    path.chmod(0)
    with pytest.raises(UserError, match=r"x\.jsonl cannot be opened: Permission denied"):
        run(tmp_path / "out", tokenizer, path)


def test_output_folder_that_is_a_file_is_named(tmp_path: Path, tokenizer: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", TEXTS[:2])
    with pytest.raises(UserError, match=r"cannot use .*x\.jsonl"):
        run(path / "out", tokenizer, path)


def test_a_file_that_may_not_be_opened_is_named(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser, as whom tests may run, may open every file."""
    locked_away = write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    opened = Path.open

    def refuse(path: Path, *more: Any, **named: Any) -> Any:
        if path == locked_away:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **named)

    monkeypatch.setattr(Path, "open", refuse)
    report = run(tmp_path / "o", tokenizer, locked_away, write_jsonl(tmp_path / "b.jsonl", TEXTS[2:4]))
    assert report.skipped == [(str(locked_away), "cannot be opened: Permission denied")]
    assert read_back(tmp_path / "o", tokenizer) == TEXTS[2:4]
    with pytest.raises(UserError, match=r"a\.jsonl cannot be opened: Permission denied"):
        run(tmp_path / "o", tokenizer, locked_away, strict=True)


def test_what_was_left_out_is_in_the_table(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "picture.png").touch()
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "a"}).encode() + b"\n")[:-4])
    bad_line(tmp_path, b"\n".join([b'{"txt": "a"}'] * 8))
    report = prepare_command([str(tmp_path)], str(tmp_path / "o" / "p"), tokenizer=tokenizer, workers=1)
    assert (report.bad_records, report.skipped_files, len(report.damaged)) == (8, 7, 1)
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for said in (
        "7 files not read",
        "0.txt and 6 more, each of which is empty",
        "endings not taken 1 .png",
        "1 damaged files",
        "8 bad records",
        "and 3 more in the report",
        "2 files (2 JSON lines)",
    ):
        assert said in printed


def test_command_trains_prepares_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", TEXTS)
    report = prepare_command([str(source)], str(tmp_path / "set" / "out"), train_vocab=700, workers=1)
    printed = capsys.readouterr().out
    assert f"{report.tokens:,}" in printed and f"{report.documents:,}" in printed and "bytes per token" in printed
    model = tmp_path / "set" / "tokenizer.model"
    assert read_back(tmp_path / "set" / "out", str(model)) == TEXTS
    before = model.stat().st_ino
    prepare_command([str(source)], str(tmp_path / "set" / "out"), train_vocab=700, workers=1)
    assert model.stat().st_ino == before, "trained once"
    prepare_command([str(source)], str(tmp_path / "set" / "out"), train_vocab=600, workers=1)
    assert model.stat().st_ino != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tokenizer and --train-vocab: neither given"),
        ({"tokenizer": "x", "train_vocab": 5}, "both given"),
        ({"tokenizer": "x", "workers": 0}, "--workers is 0"),
        ({"tokenizer": "x", "shard_megabytes": -1}, "--shard-megabytes is -1"),
        ({"train_vocab": 0}, "--train-vocab is 0"),
        ({"tokenizer": "missing.model"}, "tokenizer missing.model does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_command([str(write_jsonl(tmp_path / "x.jsonl", TEXTS[:2]))], str(tmp_path / "out"), **options)


@pytest.mark.processes
def test_user_error_of_a_worker_is_one_line_and_status_2(tmp_path: Path, tokenizer: str) -> None:
    """Through the installed command and a worker process, as a user meets it."""
    path = large_input(tmp_path, 3)
    with path.open("a") as handle:
        handle.write('{"text": 1}\n')
    command = [sys.executable, "-m", "llm_parallel.cli", "prepare", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--tokenizer", tokenizer, "--workers", "2", "--strict"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "has no text under" in done.stderr


def test_unigram_entropy_is_that_of_the_frequencies(tmp_path: Path) -> None:
    one = write_token_file(tmp_path / "one", [np.array([0, 0, 5], np.int32)])
    two = write_token_file(tmp_path / "two", [np.array([1], np.int32), np.array([0], np.int32)], np.uint16)
    assert unigram_entropy(one) == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
    shares = np.array([3, 1, 1]) / 5
    assert unigram_entropy(one, two) == pytest.approx(-(shares * np.log(shares)).sum())
    assert unigram_entropy(two, one) == unigram_entropy(one, two)


def test_python_corpus_is_the_library_without_installed_packages() -> None:
    files = python_corpus()
    assert Path(json.__file__).resolve() in [path.resolve() for path in files]
    assert not [path for path in files if "site-packages" in path.parts]
    assert len(files) > 300


def test_preparing_the_python_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm_parallel.data.corpus.python_corpus", lambda: SOURCES[:150])
    corpus = prepare_python_corpus(tmp_path, 800, workers=1)
    assert "unigram entropy" in corpus.describe() and "tokenising train: 100%" in capsys.readouterr().out
    train, held_out = (read_back(tmp_path / name, corpus.tokenizer) for name in ("train", "eval"))
    assert len(held_out) == 3 and not set(train) & set(held_out)
    expected = sorted(path.read_bytes().decode("utf-8-sig").replace("\u2581", " ") for path in SOURCES[:150])
    assert sorted(train + held_out) == expected
    ids = np.concatenate([chunk for name in ("train", "eval") for chunk in TokenFile(tmp_path / name).token_chunks()])
    shares = np.bincount(ids)[np.bincount(ids) > 0] / len(ids)
    assert corpus.unigram_entropy_nats == pytest.approx(-(shares * np.log(shares)).sum())
    report = json.loads((tmp_path / "corpus.report.json").read_text())
    assert report["unigram_entropy_nats"] == corpus.unigram_entropy_nats
    assert report["train"]["documents"] == 147


def test_model_vocabulary_must_hold_what_the_files_were_prepared_with(tmp_path: Path, tokenizer: str) -> None:
    run(tmp_path / "ours", tokenizer, write_jsonl(tmp_path / "x.jsonl", TEXTS[:2]))
    elsewhere = Source(path=write_token_file(tmp_path / "elsewhere", [np.array([500], np.int32)]))
    for data in (
        DataConfig(train=(elsewhere, Source(path=str(tmp_path / "ours")))),
        DataConfig(train=(elsewhere,), eval=(Source(path=str(tmp_path / "ours")),)),
    ):
        check_token_files(data, 1000)
        with pytest.raises(UserError, match=r"ours was prepared with .* of 1000 tokens, more than .*size=999"):
            check_token_files(data, 999)


@pytest.mark.parametrize("width", [60, 120])
def test_progress_on_a_terminal_is_a_bar(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with shown_progress("tokenising", console) as show:
        for done in (0, 50, 100):
            show(Progress(done, 100, 3 * done, 1000 * done, done / 10, 0))
    text = screen.getvalue()
    assert "tokenising" in text and "100%" in text and "100,000 tokens" in text and "…" not in text


def test_progress_elsewhere_is_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_parallel.data.display.LINE_INTERVAL_S", 0.0)
    screen = io.StringIO()
    with shown_progress("tokenising", Console(file=screen)) as show:
        show(Progress(40, 100, 5, 6000, 12.0, 20))
        show(Progress(100, 100, 9, 9000, 60.0, 20))
    # 20 of the 40 bytes were done before, so 20 took 12 s and 60 are left.
    assert screen.getvalue().splitlines() == [
        "tokenising: 40%, 5 documents, 6,000 tokens, 12 s, 36 s left",
        "tokenising: 100%, 9 documents, 9,000 tokens, 60 s",
    ]


def test_find_files_follows_the_order_of_inputs(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "b.txt"), str(tmp_path)])
    assert [file.path for file in found.files] == [str(tmp_path / name) for name in ("b.txt", "a.txt")]
    assert found.skipped == [(str(tmp_path / "b.txt"), "is given twice and read once")]
