"""Compiles kernels for sm_80 and sm_90 without a GPU and reads what ptxas made of them.

Registers and shared memory come from the cubin, spills and serialized products from what ptxas says, instructions from
the disassembly; all three programs are part of the Triton wheel. Counts of instructions are not cycles. Must run in a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ARCHS = (80, 90)
OPERATORS = (
    "rms_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy", "attention", "adamw", "paged_attention",
)  # fmt: skip
# CUDA C++ Programming Guide, table of technical specifications: shared memory of an SM and of a block, warps, blocks.
_LIMITS = {80: (164 * 1024, 163 * 1024, 64, 32), 90: (228 * 1024, 227 * 1024, 64, 32)}
CLASSES = {
    "hgmma": r"^HGMMA",
    "hmma": r"^HMMA",
    "tma": r"^UTMALDG|^UBLKCP",
    "setmaxnreg": r"^USETMAXREG",
    "wide": r"^(LDG|STG|LDGSTS)\b.*128",
    "narrow": r"^(LDG|STG|LDGSTS)\b(?!.*128)",
    "local": r"^(LDL|STL)",
    "wait": r"^WARPGROUP\.DEPBAR",
    "load": r"^(LDG|LDGSTS)\b",
    "barrier": r"^BAR\b",
}
Instruction = tuple[int, str, str]  # address, opcode, operands
Place = tuple[str, int, int]  # operator, architecture, number among the operator's cases
# What ptxas says where it has put a wait after every HGMMA, so that none of them overlaps with anything.
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized (due to .+?)(?: in (?:the )?function|$)", re.M)


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration, with arguments as at a launch.

    arguments: "*bf16" is a pointer aligned to 16 bytes, an int what the launcher would pass (specialised as Triton
    does), "i32" or "fp32" a scalar of which nothing is known; constexpr parameters have their values. wants: "wide"
    (global accesses of 128 bits; up to ``narrow_allowed`` smaller ones for numbers per row), "tensor_core" (HMMA on
    sm_80, HGMMA on sm_90; "any_tensor_core": either), "specialized" (warps with registers of their own, setmaxnreg). No
    spill and no serialized HGMMA are always wanted.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    wants: frozenset[str] = frozenset()
    maxnreg: int | None = None
    narrow_allowed: int = 6
    gluon: bool = False


@dataclass
class Report:
    """What ptxas made of one case. ``length`` counts all instructions, ``loop_length`` and ``loop`` those of the steady
    innermost loop; ``loads_in_flight`` is explained at the function; ``problems`` is what was wanted and isn't;
    ``serialized`` is ptxas' reason for a wait after every HGMMA."""

    name: str
    arch: int
    num_warps: int
    compile_s: float = 0.0
    registers: int = 0
    spill_bytes: int = 0
    serialized: str = ""
    shared_bytes: int = 0
    occupancy: float = 0.0
    length: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    loads_in_flight: int = 0
    loop_length: int = 0
    loop: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inspect(case: AotCase, arch: int, dump: Path | None = None) -> Report:
    """Compiles one case for one architecture. A failure to compile is a problem of the report, not an exception."""
    report = Report(case.name, arch, case.num_warps)
    start = time.perf_counter()
    try:
        with _silent_stderr(), redirect_stdout(StringIO()) as said:
            compiled = _compile(case, arch)
    except Exception as error:  # any pass of the compiler may fail in its own way
        report.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}")
        return report
    report.compile_s = round(time.perf_counter() - start, 2)
    listing, usage = _disassemble(compiled.asm["cubin"])
    instructions, labels = _parse(listing)
    report.num_warps = compiled.metadata.num_warps
    report.registers, report.shared_bytes = usage, compiled.metadata.shared
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said.getvalue())
    assert spilled, f"ptxas does not say what it spilled: {said.getvalue()!r}"
    report.spill_bytes = sum(map(int, spilled))
    report.serialized = "; ".join(serialized(said.getvalue()))
    report.occupancy = occupancy(arch, report.registers, report.num_warps, report.shared_bytes)
    report.length = sum(1 for _, opcode, _ in instructions if opcode != "NOP")  # which fill up the last 128 bytes
    report.instructions = _mix(instructions)
    loop = _steady_loop(instructions, labels)
    report.loop_length, report.loop = len(loop), {name: count for name, count in _mix(loop).items() if count}
    report.loads_in_flight = loads_in_flight(loop * 2 if report.loop.get("load") else instructions)
    report.problems = _problems(case, report) + narrow_strides(compiled.asm["source" if case.gluon else "ttir"])
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"\W+", "_", f"{case.name}_sm{arch}")
        (dump / f"{stem}.sass").write_text(listing)
        for kind in ("ttgir", "ptx"):
            (dump / f"{stem}.{kind}").write_text(compiled.asm[kind])
    return report


def occupancy(arch: int, registers: int, num_warps: int, shared_bytes: int) -> float:
    """Resident warps as a fraction of what an SM can hold."""
    shared_of_sm, _, warps_of_sm, blocks_of_sm = _LIMITS[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are dealt out in units of 256
    by_registers = (65536 // 4 // per_warp) * 4 // num_warps
    by_shared = shared_of_sm // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_registers, by_shared, warps_of_sm // num_warps, blocks_of_sm) * num_warps / warps_of_sm


def _problems(case: AotCase, report: Report) -> list[str]:
    found = []
    if report.spill_bytes:
        found.append(f"spills {report.spill_bytes} bytes")
    if report.serialized:
        found.append(f"every HGMMA is waited for: ptxas serialized them {report.serialized}")
    if report.shared_bytes > _LIMITS[report.arch][1]:
        found.append(f"wants {report.shared_bytes} bytes of shared memory")
    counts = report.instructions
    if "wide" in case.wants and (not counts["wide"] or counts["narrow"] > case.narrow_allowed):
        found.append(f"{counts['narrow']} global accesses are narrower than 128 bits, {counts['wide']} are not")
    core = "hgmma" if report.arch >= 90 else "hmma"
    if "tensor_core" in case.wants and not counts[core]:
        found.append(f"no {core.upper()}")
    if "any_tensor_core" in case.wants and not counts["hgmma"] + counts["hmma"]:
        found.append("no HMMA, no HGMMA")
    if "specialized" in case.wants and not counts["setmaxnreg"]:
        found.append("no setmaxnreg")
    return found


def serialized(said: str) -> list[str]:
    """Why ptxas put a wait after every HGMMA, from what it said; nothing if it did not."""
    return sorted(set(_SERIALIZED.findall(said)))


def narrow_strides(ttir: str) -> list[str]:
    """What is wrong with a kernel that computes with a stride of 32 bits before it has 64: a million tokens times some
    thousand columns do not fit."""
    narrow = {name: name for name in re.findall(r"(%\w*stride\w*): i32", ttir)}
    for result, operation, operands in re.findall(r"(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)", ttir):
        used = next((narrow[name] for name in re.findall(r"%\w+", operands) if name in narrow), None)
        if used and operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            narrow[result] = used
        elif used and operation != "arith.extsi":
            return [f"{used[1:]} enters {operation} with 32 bits"]
    return []


def _compile(case: AotCase, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    assert hasattr(kernel, "arg_names"), "TRITON_INTERPRET is set: kernels were made for the interpreter"
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = case.arguments.get(name, parameter.default)
        kind, aligned = _argument_kind(value, parameter.is_constexpr)
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source_class = ASTSource
    if case.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        source_class = GluonASTSource
    triton.knobs.compilation.always_compile = True  # the table has compile times
    triton.knobs.nvidia.dump_ptxas_log = True  # to standard output: the cubin itself does not tell of spills
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    source = source_class(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _argument_kind(value: Any, is_constexpr: bool) -> tuple[str, bool]:
    """Type of an argument in a signature, and whether it is known to be divisible by 16."""
    if is_constexpr or value is None or (value == 1 and not isinstance(value, (bool, str, float))):
        return "constexpr", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    kind, _, qualifier = value.partition(":")
    return kind, (kind[0] == "*" and qualifier != "unaligned") or qualifier == "16"


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """A failing compiler pass prints the whole module, from C++."""
    keep, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(null)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassemble(cubin: bytes) -> tuple[str, int]:
    """SASS listing, and registers per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.check_output([_tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.DEVNULL)
        usage = subprocess.check_output(
            [_tool("cuobjdump"), "-res-usage", file.name], text=True, stderr=subprocess.DEVNULL
        )
    match = re.search(r"REG:(\d+)", usage)
    assert match, usage
    return listing, int(match.group(1))


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """(address, opcode, operands) of every instruction, and the address of every label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"^\s*(\.L_\S+):", line)
        if label:
            pending.append(label.group(1))
            continue
        match = re.match(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if match:
            address = int(match.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            instructions.append((address, match.group(2), match.group(3)))
    return instructions, labels


def _mix(instructions: Sequence[Instruction]) -> dict[str, int]:
    return {
        name: sum(1 for _, opcode, _ in instructions if re.search(pattern, opcode)) for name, pattern in CLASSES.items()
    }


def _steady_loop(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Instruction]:
    """The innermost loop with the most tensor-core instructions, of equals the shortest: the one that runs most."""
    loops = []
    for address, opcode, operands in instructions:
        target = re.search(r"`\((\.L_\S+?)\)", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target.group(1), address) < address:
            loops.append((labels[target.group(1)], address))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[i for i in instructions if start <= i[0] <= end] for start, end in inner]
    if not bodies:
        return []
    mixes = [_mix(body) for body in bodies]
    return bodies[max(range(len(bodies)), key=lambda i: (mixes[i]["hgmma"] + mixes[i]["hmma"], -len(bodies[i])))]


def loads_in_flight(instructions: Sequence[Instruction]) -> int:
    """The most global loads of a thread that are on their way at once, in the order of the listing: a load to registers
    ends where one of them is next named, one to shared memory (LDGSTS) where its group is waited for."""
    registers: list[set[int]] = []
    groups: list[int] = [0]
    most = 0
    for _, opcode, operands in instructions:
        named = {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}
        registers = [waiting for waiting in registers if not waiting & named]
        if re.match(r"LDG\b", opcode):
            width = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
            first = re.search(r"\bR(\d+)\b", operands)
            assert first, operands
            registers.append(set(range(int(first.group(1)), int(first.group(1)) + width)))
        elif opcode.startswith("LDGSTS"):
            groups[-1] += 1
        elif opcode == "LDGDEPBAR":
            groups.append(0)
        elif opcode.startswith("DEPBAR.LE"):
            kept = int(operands.rstrip(" ;").rsplit(",", 1)[1], 16)
            groups = groups[len(groups) - 1 - kept :] if kept < len(groups) - 1 else groups
        most = max(most, len(registers) + sum(groups))
    return most


def cases(operators: Sequence[str] = OPERATORS, arch: int = 90) -> list[AotCase]:
    """All cases of the operators for one architecture."""
    return [case for name in operators for case in import_module(f"llm_kernels.{name}.bench").aot_cases(arch)]


def _inspect_place(place: Place, dump: Path | None) -> Report:
    operator, arch, index = place
    return inspect(cases([operator], arch)[index], arch, dump)


def places(operators: Sequence[str], archs: Sequence[int]) -> dict[Place, AotCase]:
    """Every case by its place."""
    return {(name, arch, i): case for arch in archs for name in operators for i, case in enumerate(cases([name], arch))}


def inspect_places(work: Sequence[Place], jobs: int, dump: Path | None = None) -> list[Report]:
    """Reports of these cases, compiled by ``jobs`` processes: fresh ones, or this one where it is one job."""
    if jobs == 1:
        return [_inspect_place(place, dump) for place in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_inspect_place, work, [dump] * len(work)))


def inspect_all(operators: Sequence[str], archs: Sequence[int], jobs: int, dump: Path | None = None) -> list[Report]:
    """Reports of all cases."""
    return inspect_places(list(places(operators, archs)), jobs, dump)


def table(reports: Sequence[Report]) -> str:
    """The reports as a Markdown table."""
    names = (
        "kernel, sm, warps, registers, spill B, shared KiB, occupancy, 128-bit, narrower, tensor core, loop, waits, s"
    )
    lines = ["| " + names.replace(",", " |") + " |", "|" + " --- |" * 13]
    for r in reports:
        c = r.instructions or dict.fromkeys(CLASSES, 0)
        core = f"{c['hgmma']} HGMMA" if c["hgmma"] else f"{c['hmma']} HMMA" if c["hmma"] else ""
        if c["setmaxnreg"]:
            core += f", {c['setmaxnreg']} setmaxnreg"
        per_loop = r.loop.get("hgmma", 0) + r.loop.get("hmma", 0)
        loop = f"{r.loop_length}" + (f" per {per_loop}" if per_loop else "")
        waits = f"{r.loop.get('wait', 0)} per {r.loop['hgmma']}" if r.loop.get("hgmma") else ""
        lines.append(
            f"| {r.name} | {r.arch} | {r.num_warps} | {r.registers} | {r.spill_bytes} | {r.shared_bytes / 1024:.0f} | "
            f"{r.occupancy:.0%} | {c['wide']} | {c['narrow']} | {core} | {loop} | {waits} | {r.compile_s} |"
        )
        lines += [f"|  → **{problem}** |" + " |" * 12 for problem in r.problems]
    return "\n".join(lines)


def as_data(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The reports as plain data, for JSON."""
    return [asdict(report) for report in reports]


def main() -> int:
    """``python -m llm_kernels.aot``: the table of all kernels, exit status 1 if one has a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="*", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--arch", nargs="*", type=int, default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--only", default="", help="regular expression that a case's name must have")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dump", type=Path, help="folder for SASS, PTX and TTGIR of every kernel")
    parser.add_argument("--beside", type=Path, help="JSON file of another commit, whose figures go beside these")
    committed = parser.add_mutually_exclusive_group()
    committed.add_argument("--check-table", action="store_true", help="compile what aot_table.json lacks, and a share")
    committed.add_argument("--write-table", action="store_true", help="the same, and write aot_table.json")
    parser.add_argument("--share", type=float, default=0.05, help="share of the table's rows to compile all the same")
    parser.add_argument("--seed", type=int, help="which share; random if not given")
    arguments = parser.parse_args()
    if arguments.check_table or arguments.write_table:
        reports, failed = _committed(arguments)
    else:
        named = [p for p, c in places(arguments.op, arguments.arch).items() if re.search(arguments.only, c.name)]
        reports = inspect_places(named, arguments.jobs, arguments.dump)
        failed = any(report.problems for report in reports)
    if arguments.out:
        arguments.out.write_text(json.dumps(as_data(reports), indent=1))
    if arguments.beside:
        from llm_kernels.aot_table import beside

        print(beside(json.loads(arguments.beside.read_text()), as_data(reports)))
    elif not arguments.check_table:
        print(table(reports))
    return 1 if failed else 0


def _committed(arguments: argparse.Namespace) -> tuple[list[Report], bool]:
    """Checks or writes aot_table.json: all reports, and whether something is wrong."""
    from llm_kernels import aot_table

    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    run = aot_table.renew if arguments.write_table else aot_table.check
    compile_all = partial(inspect_places, jobs=arguments.jobs, dump=arguments.dump)
    found = run(places(OPERATORS, ARCHS), compile_all, arguments.share, seed)
    print(
        f"{len(found.reports)} cases: {found.changed} compiled that the table lacks, {found.sampled} by chance "
        f"(--share {arguments.share} --seed {seed}), the rest from aot_table.json"
    )
    print("\n".join(found.failures))
    return found.reports, bool(found.failures)


if __name__ == "__main__":
    raise SystemExit(main())
