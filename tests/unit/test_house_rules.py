"""CONTRIBUTING.md's rules that a machine can check. Each exception stands here with its reason."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.budgets import FILE, calibrate, parse

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llm_parallel", "kernels/llm_kernels", "launch/llm_launch")
TEXT_ENDINGS = {".py", ".pyi", ".md", ".toml", ".txt", ".yaml", ".yml", ".cpp", ".h", ".sh", ".json", ".csv", ""}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
MAX_PARAMETERS = 8

# path::qualified.name → why it may be longer than MAX_FUNCTION_LINES.
LONG_FUNCTIONS: dict[str, str] = {}
# path::qualified.name → why it may have more than MAX_PARAMETERS.
MANY_PARAMETERS: dict[str, str] = {}

# megatron-core stands behind these, so that a new version touches them alone: file → what it takes from there.
MEGATRON_FILES = {
    "llm_parallel/model/mcore_config.py": "its configuration",
    "llm_parallel/model/layer_spec.py": "layers and their slots",
    "llm_parallel/model/modules.py": "the protocols of the slots, and the layer",
    "llm_parallel/model/adapters.py": "adapters beside its linears, and how they are sharded",
    "llm_parallel/model/vocabulary_adapters.py": "the same for its embedding and its output projection",
    "llm_parallel/model/attention.py": "self-attention's projections",
    "llm_parallel/model/gpt.py": "the model",
    "llm_parallel/model/heads.py": "how a head's values are gathered, and its weight saved",
    "llm_parallel/model/init.py": "marks of sharded parameters",
    "llm_parallel/model/sequence.py": "the record of packed documents",
    "llm_parallel/parallel/groups.py": "process groups",
    "llm_parallel/parallel/boxes.py": "how parameters are sharded",
    "llm_parallel/parallel/engine.py": "data parallelism",
    "llm_parallel/parallel/mcore_optimizer.py": "gradient buffers and the optimizer, with their internals",
    "llm_parallel/parallel/platform.py": "the places that name CUDA",
    "llm_parallel/train/step.py": "the pipeline schedules",
    "llm_parallel/bench/contenders.py": "the peer that ours is measured beside",
}
MEGATRON_FOLDERS = ("llm_parallel/checkpoint/",)

# Internals of megatron-core's gradient buffers and optimizer, which one file may name.
OPTIMIZER_FILE = "llm_parallel/parallel/mcore_optimizer.py"
OPTIMIZER_INTERNALS = re.compile(
    r"chained_optimizers|shard_(fp32|float16)\w*groups|model_f\w+_groups|fp32_from_f\w+_groups|float16_groups"
    r"|model_param_gbuf_map|gbuf_ranges|_get_model_param_range_map|_copy_\w+_params\w*|parameter_state_dp_zero"
    r"|load_parameter_state_from_|param_state_sharding_type|numel_unpadded|grad_data|param_data|intra_dp_cp_group"
    r"|buckets"
)

OPTIONAL_PACKAGES = {"triton", "apex", "transformer_engine", "flash_attn", "transformers", "wandb", "prometheus_client"}


def in_sources(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return not any((part.startswith(".") and part != ".ci") or part == "__pycache__" for part in parts)


@cache
def package_files() -> tuple[Path, ...]:
    files = tuple(sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if in_sources(p)))
    assert len(files) > 20, "the walk finds the sources"
    return files


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_test(path: Path) -> bool:
    return path.name.startswith(("test_", "conftest")) or "tests" in path.relative_to(ROOT).parts


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(path: Path) -> Iterator[tuple[str, Definition, bool]]:
    """Qualified name, node, and whether people outside can name it, of each class and function."""

    def walk(node: ast.AST, prefix: str, public: bool) -> Iterator[tuple[str, Definition, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                reachable = public and not child.name.startswith("_")
                yield prefix + child.name, child, reachable
                yield from walk(child, f"{prefix}{child.name}.", reachable and isinstance(child, ast.ClassDef))
            else:
                yield from walk(child, prefix, public)

    yield from walk(tree_of(path), "", True)


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, node, _ in definitions(path):
        if not isinstance(node, ast.ClassDef):
            yield f"{name_of(path)}::{name}", node


def source_files() -> list[Path]:
    others = [
        p
        for folder in ("benchmarks", "csrc", "docs")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".cpp", ".h")
    ]
    return [*package_files(), *(p for p in others if in_sources(p)), ROOT / "setup.py"]


def test_files_are_short() -> None:
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in source_files() if not is_test(p)}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines; divide by what changes together: {long}"


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is compiled for a GPU."""
    return any("jit" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))


def test_functions_are_short() -> None:
    long = {}
    for path in package_files():
        for name, node in functions(path):
            limit = MAX_KERNEL_LINES if path.name == "kernel.py" or is_kernel(node) else MAX_FUNCTION_LINES
            # Documentation is not what makes a function hard to follow.
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            if lines > limit and not is_test(path) and name not in LONG_FUNCTIONS:
                long[name] = lines
    assert not long, f"longer than {MAX_FUNCTION_LINES} lines ({MAX_KERNEL_LINES} for kernels): {long}"


def test_functions_have_few_parameters() -> None:
    wide = {}
    for path in package_files():
        if name_of(path) == "llm_parallel/cli.py" or path.name in ("kernel.py", "op.py"):
            # typer makes an option of each parameter, a kernel gets every pointer and stride as one, and an operator's
            # options are keywords of its call, as in torch's own functions, and flat arguments of its schema.
            continue
        for name, node in functions(path):
            if is_kernel(node):
                continue
            arguments = node.args
            parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in parameters)
            if count > MAX_PARAMETERS and name not in MANY_PARAMETERS:
                wide[name] = count
    assert not wide, f"more than {MAX_PARAMETERS} parameters; group what belongs together in a dataclass: {wide}"


def test_exceptions_still_exist() -> None:
    names = {name for path in package_files() for name, _ in functions(path)}
    assert not (LONG_FUNCTIONS.keys() | MANY_PARAMETERS.keys()) - names, "an exception whose function is gone"
    assert not {name for name in MEGATRON_FILES if not (ROOT / name).exists()}


def test_kernels_and_launch_are_folders_not_packages() -> None:
    for folder in ("kernels", "launch"):
        assert not (ROOT / folder / "__init__.py").exists(), (
            f"{folder}/__init__.py shadows installed packages for every python -m started in the repository"
        )


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
        return node.attr in ("environ", "environb", "getenv", "putenv", "unsetenv")
    return (
        isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and any(a.name in ("environ", "getenv") for a in node.names)
    )


# Files that read it although they are not at the edge, and why.
READS_ENVIRONMENT = {
    "llm_parallel/tasks/secret.py": "an API key, which no record may hold; the run file names its variable",
}


def test_environment_is_read_at_the_edge_only() -> None:
    """Configuration, groups and state are passed as arguments; the environment is for the ways in."""
    found = []
    for path in package_files():
        at_the_edge = (
            path.name == "__main__.py" or name_of(path) == "llm_parallel/cli.py" or name_of(path).startswith("launch/")
        )
        if not at_the_edge and not is_test(path) and name_of(path) not in READS_ENVIRONMENT:
            found += [f"{name_of(path)}:{node.lineno}" for node in ast.walk(tree_of(path)) if reads_environment(node)]
    assert not found


# What is printed as it is, and why: everything else is for people, and goes through llm_parallel.lines, which divides
# it between words on a terminal.
PRINTS_ITSELF = {
    "llm_parallel/lines.py": "it is what the others use",
    "llm_parallel/help_page.py": "a page that is divided already",
    "llm_parallel/screen.py": "tables in a pipe",
    "llm_parallel/chat/screen.py": "text of a model, piece by piece",
    "llm_parallel/generate/command.py": "text of a model, whose line ends are its own",
    "llm_parallel/worker/launch.py": "a batch file",
    "llm_parallel/cli.py": "JSON, versions and paths, each on a line of its own",
}


def test_what_people_read_goes_through_one_place() -> None:
    found = []
    for path in package_files():
        name = name_of(path)
        if name in PRINTS_ITSELF or is_test(path) or name.startswith("kernels/"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo"):
                found.append(f"{name}:{node.lineno}")
    assert not found
    assert all((ROOT / name).exists() for name in PRINTS_ITSELF)


def imported_packages(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.split(".")[0]]
    return []


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Statements that importing the module runs: all but bodies of functions and of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_at_import(child)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    found = []
    for path in package_files():
        if name_of(path).startswith("llm_parallel/") and not is_test(path):
            for node in run_at_import(tree_of(path)):
                found += [f"{name_of(path)}: {name}" for name in imported_packages(node) if name in OPTIONAL_PACKAGES]
    assert not found


def test_megatron_core_stands_behind_few_files() -> None:
    found = set()
    for path in package_files():
        name = name_of(path)
        if name in MEGATRON_FILES or name.startswith(MEGATRON_FOLDERS) or is_test(path):
            continue
        if any("megatron" in imported_packages(node) for node in ast.walk(tree_of(path))):
            found.add(name)
    assert not found


def names_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name and string of a file that is neither a docstring nor a comment, with its line."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_one_file_names_the_internals_of_the_optimizer() -> None:
    found = []
    for path in package_files():
        if name_of(path) == OPTIMIZER_FILE or is_test(path) or not name_of(path).startswith("llm_parallel/"):
            continue
        for line, name in names_in(tree_of(path)):
            if OPTIMIZER_INTERNALS.fullmatch(name):
                found.append(f"{name_of(path)}:{line}: {name}")
    assert not found
    inside = {name for _, name in names_in(tree_of(ROOT / OPTIMIZER_FILE)) if OPTIMIZER_INTERNALS.match(name)}
    assert len(inside) > 10, "the pattern finds them where they are"


def test_what_is_public_is_documented() -> None:
    bare = []
    for path in package_files():
        if is_test(path):
            continue
        if ast.get_docstring(tree_of(path)) is None and path.name != "__init__.py":
            bare.append(name_of(path))
        for name, node, public in definitions(path):
            # forward is what a module computes, and its class says that.
            if public and node.name != "forward" and ast.get_docstring(node) is None:
                bare.append(f"{name_of(path)}::{name}")
    assert not bare, f"without a docstring: {bare}"


def text_files() -> list[Path]:
    skipped = {"runs", "data", "build", "dist"}
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        here = Path(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if in_sources(here / name) and not name.endswith(".egg-info") and not (here == ROOT and name in skipped)
        ]
        found += [here / name for name in names if Path(name).suffix in TEXT_ENDINGS and not name.startswith(".")]
    return found


# In pieces, so that this file does not hold what it forbids.
FORBIDDEN = [
    r"pythonhosted\." + "org",
    r"pypi\." + r"org/simple",
    r"registry\." + r"npmjs\.org",
    r"deb\.debian\." + "org",
    r"download\.pytorch\." + "org",
    r"(?<![\w.])/wo" + r"rk/",
    r"(?<![\w.])/opt/py" + "pi",
    r"(?<![\w.])/ro" + "ot/",
    r"(?<![\w.])/ho" + r"me/\w",
]


def matching_lines(patterns: list[str]) -> list[str]:
    pattern = re.compile("|".join(patterns))
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:80]}")
    return found


def test_no_registry_and_no_path_of_one_machine() -> None:
    assert not matching_lines(FORBIDDEN)


def test_what_is_left_to_do_has_a_reason() -> None:
    words = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"])
    assert not matching_lines([rf"\b(?:{words})\b(?!: \w+ \w+ \w+)"])


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("pip install -i https://files.python" + "hosted.org/x", True),
        ("open('/ro" + "ot/run')", True),
        ("see the /work" + "_dir option", False),
        ("checkpoints/work/x", False),
    ],
)
def test_forbidden_patterns_find_what_they_should(line: str, is_found: bool) -> None:
    assert bool(re.search("|".join(FORBIDDEN), line)) is is_found


@pytest.mark.processes
def test_what_is_refused_before_a_run_starts_is_refused_fast() -> None:
    """The checks before the processes of a run start load neither torch nor megatron-core."""
    program = (
        "import sys, llm_parallel.train.preflight, llm_parallel.worker.command, llm_parallel.planner.command\n"
        "print([m for m in ('torch', 'megatron.core', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]", "torch and megatron-core take two seconds and more"


@pytest.mark.processes
def test_command_line_starts_fast() -> None:
    """Under half a second of processor time, the interpreter included, on the machine that the tests' budgets are from;
    a slower or a busy one may take longer by as much as a fixed loop does."""
    program = (
        "import sys, llm_parallel.cli; print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    reference, shares = parse(FILE.read_text(encoding="utf-8")).calibration_s, []
    assert reference is not None
    for _ in range(3):
        speed = calibrate() / reference
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        shares.append((after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / speed)
        assert loaded.strip() == "[]", "torch alone takes two seconds"
    assert min(shares) < 0.5
