"""Any change of any file of a sealed checkpoint is found, and nothing else is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_parallel.checkpoint.integrity import SMALL_FILES, SUFFIX, damaged_files, expected, seal_file, seal_folder

FILES = {"__0_0.distcp": b"tensors" * 500, "__1_0.distcp": b"", "common.pt": b"counters", "tokenizer/a.json": b"{}"}


def sealed(folder: Path) -> Path:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        if path.suffix == ".distcp":
            seal_file(path)
    seal_folder(folder)
    return folder


def test_every_file_is_sealed_once(tmp_path: Path) -> None:
    sealed(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in expected(tmp_path)} == set(FILES)
    assert damaged_files(tmp_path) == []


def test_a_folder_that_nobody_sealed_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "common.pt").write_bytes(b"x")
    assert damaged_files(tmp_path) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_file_is_named(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = sealed(Path(name))
        victim = folder / data.draw(st.sampled_from(sorted(FILES)))
        content = bytearray(victim.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "grown", "gone"]))
        if kind == "flip" and content:
            at = data.draw(st.integers(0, 8 * len(content) - 1))
            content[at // 8] ^= 1 << at % 8
        elif kind == "cut" and content:
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            content += b"\0"
        victim.write_bytes(bytes(content))
        if kind == "gone":
            victim.unlink()
        parts = data.draw(st.integers(1, 5))
        assert [wrong for part in range(parts) for wrong in damaged_files(folder, part, parts)] == [victim.name]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_checksum_is_damage_too(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = sealed(Path(name))
        victim = folder / data.draw(st.sampled_from(["__0_0.distcp" + SUFFIX, SMALL_FILES]))
        content = victim.read_bytes()
        victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 4))])
        assert damaged_files(folder)
