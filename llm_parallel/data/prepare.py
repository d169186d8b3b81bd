"""Turns raw text into token files, in parallel; a run that was killed goes on from where it stopped.

The inputs are divided into shards; each finished shard leaves a record in ``PREFIX.parts`` and is never done again
while the inputs, the tokenizer and the options stay the same (their fingerprint is kept there). The last step joins the
shards into PREFIX.bin and PREFIX.idx, the latter renamed into place last, so a pair that exists is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from llm_parallel.data.indexed import REPORT_ENDING, token_dtype, write_index
from llm_parallel.data.inputs import SHOWN, Found, Input, Piece, find_files, plan_shards, sentence
from llm_parallel.data.kinds import FORM_NAMES
from llm_parallel.data.shards import ShardRecord, ShardWriter, start_worker, work
from llm_parallel.data.tokenizer import Tokenizer, load_tokenizer
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write, fsync_dir, locked, refuse_strangers

FORMAT = 2
"""To be incremented when the same inputs would give other files than before."""
MIN_SHARD_BYTES = 1 << 20
LISTED = 1000
"""Files that were not read are listed in the report up to this number, and counted beyond it."""
LEAST_SHARDS = 32
"""Small inputs are divided into about this many shards, so that processes end together and progress is smooth."""


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare."""

    inputs: tuple[str, ...]
    """Files, folders and globs: records (JSON lines, JSON, Parquet, Arrow, CSV), one document each, and text, one
    document a file; plain or compressed."""
    out: str
    """Prefix of the files to write."""
    tokenizer: str
    """SentencePiece .model, Hugging Face tokenizer.json, or a folder with one."""
    key: str = "text"
    """Field or column of a record that holds the text."""
    workers: int | None = None
    """Processes; all cores that this process may use if not given."""
    append_eod: bool = True
    """End every document with the end-of-document token."""
    shard_megabytes: int = 16
    """Largest size of a shard in megabytes of text: as much work is lost when a process is killed."""
    extensions: tuple[str, ...] | None = None
    """Endings taken from folders, ``inputs.TEXT_EXTENSIONS`` if not given."""
    prepend_bos: bool = False
    """Begin every document with the tokenizer's begin token."""
    strict: bool = False
    """Stop at the first record or named file that cannot be read, instead of leaving it out."""


@dataclass(frozen=True)
class Progress:
    """How far ``prepare`` is: bytes of input done and in total, documents and tokens written, seconds since the start,
    and bytes that an earlier run had done already."""

    bytes_done: int
    bytes_total: int
    documents: int
    tokens: int
    seconds: float
    bytes_before: int

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the speed so far, or None if nothing was done yet."""
        done = self.bytes_done - self.bytes_before
        return self.seconds / done * (self.bytes_total - self.bytes_done) if done else None


@dataclass(frozen=True)
class PrepareReport:
    """What was written; also in PREFIX.report.json. ``tokens_per_s`` counts only tokens that this run wrote itself.

    ``files`` were read, ``forms`` of them each (JSON lines, text …), and ``skipped_files`` were not, of which
    ``skipped`` has the first 1000 as (path, reason). ``other_endings`` counts the files of folders whose ending is not
    taken. ``bad_records`` were left out of files that were read, ``first_bad`` says where the first five are and
    why; ``damaged`` names files of which only the beginning was read."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    seconds: float
    tokens_per_s: float
    files: int
    forms: dict[str, int]
    skipped_files: int
    skipped: list[tuple[str, str]]
    other_endings: dict[str, int]
    empty_documents: int
    bad_records: int
    first_bad: list[str]
    damaged: list[str]
    append_eod: bool
    prepend_bos: bool
    shards: int
    shards_reused: int
    workers: int
    vocab_size: int
    dtype: str
    tokenizer: str
    tokenizer_fingerprint: str
    fingerprint: str


def prepare(config: PrepareConfig, progress: Callable[[Progress], None] | None = None) -> PrepareReport:
    """Writes ``out``.bin, ``out``.idx and ``out``.report.json, and calls ``progress`` after every shard.

    If they are there already, made from the same inputs with the same options, nothing is done. Raises UserError on bad
    inputs, if there is no text in them, if the disk is full, and if another process prepares the same files.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(config.tokenizer)
    if config.prepend_bos and tokenizer.bos is None:
        raise UserError(
            f"--prepend-bos: tokenizer {tokenizer.name} has no token that begins a document; leave --prepend-bos out"
        )
    prefix, parts = Path(config.out), Path(f"{config.out}.parts")
    with file_errors_explained(prefix):
        found = find_files(config.inputs, config.extensions, config.strict)
        shards = plan_shards(found.files, _shard_bytes(found.files, config.shard_megabytes))
        fingerprint = _fingerprint(config, found.files, shards, tokenizer)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with _alone(parts):
            if report := _finished(prefix, fingerprint):
                return report
            _keep_only(parts, fingerprint)
            bos = tokenizer.bos if config.prepend_bos else None
            writer = ShardWriter(parts, tokenizer.name, config.key, config.append_eod, bos, config.strict)
            run = _Run(writer, shards, started, progress)
            workers = min(config.workers or len(os.sched_getaffinity(0)), len(shards))
            run.tokenise(workers, tokenizer)
            report = _report(config, run, tokenizer, found, workers, fingerprint)
            if not report.documents:
                shutil.rmtree(parts)
                raise _no_text(config, report)
            _join(prefix, writer, run.records, tokenizer)
            with atomic_write(f"{prefix}{REPORT_ENDING}") as handle:
                json.dump(asdict(report), handle, indent=2)
            shutil.rmtree(parts)
            return report


@contextmanager
def file_errors_explained(prefix: Path, kept: str = ": finished shards are kept") -> Iterator[None]:
    """Turns errors of the file system that the user can mend, while ``prefix`` is prepared, into UserError. ``kept``:
    end of the sentence about a full disk."""
    try:
        yield
    except (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"cannot use {error.filename} to prepare {prefix}: {error.strerror}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left on the disk of {prefix.parent} while preparing {prefix}; make room and run the same "
            f"command again{kept}"
        ) from None


class _Run:
    """The shards of one call of ``prepare``, done and to do."""

    def __init__(
        self,
        writer: ShardWriter,
        shards: list[list[Piece]],
        started: float,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._writer, self._shards, self._started, self._progress = writer, shards, started, progress
        self._done = {number: record for number in range(len(shards)) if (record := writer.record(number))}
        self.reused = frozenset(self._done)
        self._total = sum(piece.end - piece.start for shard in shards for piece in shard)

    @property
    def records(self) -> list[ShardRecord]:
        """Records of all shards in order."""
        return [self._done[number] for number in range(len(self._shards))]

    @property
    def new_tokens(self) -> int:
        """Tokens that this run wrote itself."""
        return sum(record.tokens for number, record in self._done.items() if number not in self.reused)

    @property
    def seconds(self) -> float:
        """Seconds since ``prepare`` was called."""
        return time.monotonic() - self._started

    def tokenise(self, workers: int, tokenizer: Tokenizer) -> None:
        """Tokenises the shards that are left, in this process if one is enough."""
        left = [number for number in range(len(self._shards)) if number not in self._done]
        self._show()
        if min(workers, len(left)) <= 1:
            for number in left:
                self._add(number, self._writer.write(number, self._shards[number], tokenizer))
            return
        # Spawned, not forked: a fork would inherit locks that other threads of the caller may hold.
        context = get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(left)), context, start_worker, (self._writer,))
        try:
            # Large shards first, so that none is left alone at the end.
            left.sort(key=lambda number: -sum(piece.end - piece.start for piece in self._shards[number]))
            futures = {pool.submit(work, number, self._shards[number]): number for number in left}
            for future in as_completed(futures):
                self._add(futures[future], future.result())
        except BrokenProcessPool:
            raise UserError(
                "a worker process of prepare was killed (out of memory?); run the same command again with fewer "
                "workers: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _add(self, number: int, record: ShardRecord) -> None:
        self._done[number] = record
        self._show()

    def _show(self) -> None:
        if self._progress:
            done = self._done.values()
            self._progress(
                Progress(
                    sum(record.input_bytes for record in done),
                    self._total,
                    sum(record.documents for record in done),
                    sum(record.tokens for record in done),
                    self.seconds,
                    sum(self._done[number].input_bytes for number in self.reused),
                )
            )


def _shard_bytes(files: list[Input], megabytes: int) -> int:
    total = sum(file.size for file in files)
    return max(min(megabytes << 20, total // LEAST_SHARDS), MIN_SHARD_BYTES)


def _fingerprint(config: PrepareConfig, files: list[Input], shards: list[list[Piece]], tokenizer: Tokenizer) -> str:
    """Hash of everything that decides what the files will hold and how they are divided into shards."""
    content = [
        FORMAT,
        [(*file.identity, str(file.kind)) for file in files],
        len(shards),
        config.shard_megabytes,
        config.key,
        config.append_eod,
        config.prepend_bos,
        config.strict,
        tokenizer.fingerprint,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _alone(parts: Path) -> AbstractContextManager[None]:
    """Keeps a second ``prepare`` of the same files out while the body runs."""
    return locked(
        parts.with_name(f".{parts.name}.lock"),
        f"another process is preparing {parts.with_suffix('')}; wait for it or end it",
    )


def _finished(prefix: Path, fingerprint: str) -> PrepareReport | None:
    """The report of an earlier run, if its files are in place and would come out the same again; else None."""
    try:
        report = PrepareReport(**json.loads(Path(f"{prefix}{REPORT_ENDING}").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    in_place = Path(f"{prefix}.idx").is_file() and Path(f"{prefix}.bin").is_file()
    return report if in_place and report.fingerprint == fingerprint else None


def _keep_only(parts: Path, fingerprint: str) -> None:
    """Makes the folder of shards ready and deletes what a run with other inputs or options left there."""
    if parts.is_symlink():
        raise UserError(f"{parts} is a symbolic link where LLM Parallel needs its own folder; remove it")
    if parts.exists():
        refuse_strangers(parts, parts.stat())  # whose shards would be taken for ours
    mark = parts / "fingerprint"
    if not mark.is_file() or mark.read_text() != fingerprint:
        shutil.rmtree(parts, ignore_errors=True)
        with atomic_write(mark) as handle:
            handle.write(fingerprint)


def _join(prefix: Path, writer: ShardWriter, records: list[ShardRecord], tokenizer: Tokenizer) -> None:
    """Joins the shards into .bin and .idx. The old .idx is deleted first, so that it is never beside a new .bin."""
    idx = Path(f"{prefix}.idx")
    idx.unlink(missing_ok=True)
    fsync_dir(prefix.parent)
    with atomic_write(f"{prefix}.bin", "wb") as handle:
        for number in range(len(records)):
            with writer.path(number, "bin").open("rb") as part:
                shutil.copyfileobj(part, handle, 1 << 24)
    lengths = [np.fromfile(writer.path(number, "len"), np.int32) for number in range(len(records))]
    with atomic_write(idx, "wb") as handle:
        write_index(handle.write, token_dtype(tokenizer.vocab_size), lengths)


def _no_text(config: PrepareConfig, report: PrepareReport) -> UserError:
    """What to say when nothing was written."""
    why = [*(f"{path} {reason}" for path, reason in report.skipped), *report.first_bad]
    files = f"{report.files + report.skipped_files} input files ({', '.join(config.inputs)[:200]})"
    return UserError(f"no document with text in {files}" + "".join(f"; {reason}" for reason in why[:SHOWN]))


def _report(
    config: PrepareConfig, run: _Run, tokenizer: Tokenizer, found: Found, workers: int, fingerprint: str
) -> PrepareReport:
    records = run.records
    tokens = sum(record.tokens for record in records)
    text_bytes = sum(record.text_bytes for record in records)
    first = [bad for record in records for bad in record.first][:SHOWN]
    unread = [(path, reason) for record in records for path, reason in record.skipped]
    skipped = [*found.skipped, *unread]
    left = {path for path, _ in unread}
    forms = Counter(FORM_NAMES[file.kind.form] for file in found.files if file.path not in left)
    return PrepareReport(
        prefix=config.out,
        documents=sum(record.documents for record in records),
        tokens=tokens,
        text_bytes=text_bytes,
        bytes_per_token=text_bytes / max(tokens, 1),
        seconds=run.seconds,
        tokens_per_s=run.new_tokens / run.seconds,
        files=forms.total(),
        forms=dict(forms.most_common()),
        skipped_files=len(skipped),
        skipped=skipped[:LISTED],
        other_endings=dict(found.other_endings.most_common()),
        empty_documents=sum(record.empty for record in records),
        bad_records=sum(record.bad for record in records),
        first_bad=[sentence(*bad) for bad in first],
        damaged=[damage for record in records for damage in record.damaged],
        append_eod=config.append_eod,
        prepend_bos=config.prepend_bos,
        shards=len(records),
        shards_reused=len(run.reused),
        workers=workers,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size).name,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        fingerprint=fingerprint,
    )
