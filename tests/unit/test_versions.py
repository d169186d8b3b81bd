"""Other packages' versions: what is known not to work is refused, and every name that we import exists."""

from __future__ import annotations

import ast
import importlib
from importlib import metadata
from pathlib import Path

import pytest

from llm_kernels import dispatch
from llm_parallel.config.tree import RunConfig
from llm_parallel.errors import UserError
from llm_parallel.train.preflight import check_kernels
from llm_parallel.versions import SUPPORTED, parse, refuse_unsupported

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("llm_parallel", "launch", "kernels", "benchmarks", "tests")


@pytest.mark.parametrize(
    ("package", "version"),
    [("megatron-core", "0.15.3"), ("megatron-core", "0.20.0rc1"), ("torch", "2.7.1+cu128"), ("numpy", "1.25.2")],
)
def test_versions_that_do_not_work_are_refused(package: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else real(name))
    with pytest.raises(
        UserError, match=rf"^{package} {version.replace('+', '.')} is installed.*pip install '{package}"
    ):
        refuse_unsupported()


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.19.2", "0.19.2+local"])
def test_versions_that_work_are_not(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "megatron-core" else "99.0")
    refuse_unsupported()


def test_a_package_that_is_missing_is_not_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    refuse_unsupported()


@pytest.mark.parametrize(
    ("text", "number"), [("2.13.0+cu130", (2, 13, 0)), ("2.9.0a0+git1", (2, 9, 0)), ("0.20.0rc1", (0, 20, 0))]
)
def test_versions_are_read(text: str, number: tuple[int, ...]) -> None:
    assert parse(text) == number


def test_the_declared_requirements_say_the_same() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for *_, requirement in SUPPORTED.values():
        assert f'"{requirement}"' in declared


def test_a_gpu_without_the_fused_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_fault", lambda: "triton 3.4.0 is installed, and the kernels need 3.6")
    said: list[str] = []
    check_kernels(RunConfig(), "cuda", said.append)
    assert len(said) == 1 and "3.4.0" in said[0] and "torch's own operators run" in said[0]
    check_kernels(RunConfig(), "cpu", said.append)
    assert len(said) == 1, "on a CPU they would not have run anyway"
    with pytest.raises(UserError, match=r"kernels.rope is triton, but triton 3.4.0 is installed"):
        check_kernels(RunConfig.model_validate({"kernels": {"rope": "triton"}}), "cuda")


def megatron_imports() -> list[tuple[str, str, str]]:
    """(file, module, name) of every import from megatron-core in our sources and tests, inside functions too."""
    found = []
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = path.relative_to(ROOT).as_posix()
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                found += [(where, str(node.module), alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                found += [(where, alias.name, "") for alias in node.names if alias.name.startswith("megatron.")]
    return found


def lacking(module: str, name: str) -> bool:
    """Whether the installed megatron-core has no such module, or no such name in it."""
    try:
        imported = importlib.import_module(module)
        if name and not hasattr(imported, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        assert (error.name or "").startswith("megatron"), error
        return True
    return False


def test_every_name_that_we_import_exists_in_this_megatron_core() -> None:
    imports = megatron_imports()
    assert len(imports) > 30, "the walk finds them"
    missing = [f"{where}: {module} {name}" for where, module, name in imports if lacking(module, name)]
    assert not missing, f"megatron-core {metadata.version('megatron-core')} lacks {missing}"
    assert lacking("megatron.core.parallel_state", "no_such_name") and lacking("megatron.core.no_such_module", "x")
