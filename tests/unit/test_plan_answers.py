"""What `llm-parallel plan` answers: the questions of the documentation, how far an answer may be off, what would fit
where nothing does, and models by their config."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.cli import main
from llm_parallel.errors import UserError
from llm_parallel.planner.advice import is_tight, would_fit
from llm_parallel.planner.hardware import left_out_predictions, load_cluster
from llm_parallel.planner.memory import ALLOWANCE, CONTEXT_BYTES, GIB
from llm_parallel.planner.models import planned
from llm_parallel.planner.published.fit import fit_chip
from llm_parallel.planner.published.rows import read_rows
from llm_parallel.planner.published.trust import by_left_out, by_left_out_source, trust
from llm_parallel.planner.request import read_amount, read_length
from llm_parallel.planner.search import best_layouts
from llm_parallel.planner.shapes import Strategy

PAGE = Path(__file__).parents[2] / "docs/pages/plan.md"
BLOCK = re.compile(r"^    llm-parallel (plan [^\n]*)\n\n```text\n(.*?)```", re.MULTILINE | re.DOTALL)
ASKED = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def run(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    monkeypatch.setattr("sys.argv", ["llm-parallel", *shlex.split(command)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("command", "answer"), ASKED, ids=[str(number) for number in range(len(ASKED))])
def test_the_documentation_has_the_answers_that_are_printed(
    command: str, answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(monkeypatch, command)
    said = capsys.readouterr().out
    assert status == (1 if "None fits" in answer else 0)
    for line in answer.splitlines():
        assert line in said


def test_there_are_twelve_questions() -> None:
    assert len(ASKED) == 12


def test_llama_3_405b_is_near_its_published_utilization() -> None:
    """Meta prints 400 TFLOP/s on 16,384 H100, a utilization of 40.4 % of the peak (arXiv 2407.21783, Table 4)."""
    cluster, shape = load_cluster("dgx-h100"), planned("llama3-405b").shape
    found, _, _ = best_layouts(shape, Strategy(gpus=16384, global_batch=2048, micro_batch=1, seq=8192), cluster, 1)
    assert found[0].mfu(shape, cluster, causal=True) == pytest.approx(0.404, abs=0.03)


def _question(chip: str, te: bool = False, seq: int = 8192, gpus: int = 64, precision: str = "bf16") -> str:
    strategy = Strategy(gpus=gpus, global_batch=gpus, micro_batch=1, seq=seq, te=te, precision=precision)  # type: ignore[arg-type]
    return trust(load_cluster(chip), strategy).describe()


def test_an_error_is_given_only_where_rows_are_like_the_question() -> None:
    assert "Expected error of the step time" in _question("dgx-h100")
    assert "Expected error of the step time" in _question("dgx-h100", te=True, precision="fp8")
    for what, said in (
        (_question("l40s"), "the chip L40S-48GB"),
        (_question("gb200-nvl72"), "the chip GB200-186GB"),
        (_question("a100-pcie"), "the chip A100-PCIe-80GB"),
        (_question("dgx-a100", te=True), "its software"),
        (_question("dgx-h100", seq=1 << 20), "1,048,576 tokens"),
        (_question("dgx-h100", gpus=131072), "131,072 GPUs"),
    ):
        assert what.startswith(f"No published row is like this ({said});") and "range from" in what


def test_every_row_was_predicted_without_its_source() -> None:
    rows, _ = read_rows()
    assert set(left_out_predictions()) == {row.number for row in rows}
    errors = by_left_out_source()
    assert sum(count for count, _, _ in errors.values()) == len(rows)
    overall = sum(count * error for count, error, _ in errors.values()) / len(rows)
    assert overall < 0.085, "measured 8.0 %; 4.7 % with half of each source's rows in the fit"


def test_left_out_errors_by_chip_software_and_size_are_of_all_rows() -> None:
    """Each kind of group holds every row once, and the same mean in all; sizes grow."""
    rows, _ = read_rows()
    found = {kind: by_left_out(kind) for kind in ("chip", "software", "size")}
    for groups in found.values():
        assert sum(count for count, _, _ in groups.values()) == len(rows)
        mean = sum(count * error for count, error, _ in groups.values()) / len(rows)
        assert mean == pytest.approx(sum(c * e for c, e, _ in by_left_out_source().values()) / len(rows))
    assert list(found["size"]) == ["up to 8 GPUs", "up to 64 GPUs", "up to 512 GPUs", "over 512 GPUs"]
    assert set(found["chip"]) == {"A100", "H100", "H200"} and "torchtitan" in found["software"]


@pytest.mark.slow
def test_left_out_predictions_are_of_constants_without_the_source() -> None:
    """The stored figures of one source, made again from the other sources."""
    from llm_parallel.planner.published.fit import clusters_with, predict

    rows, _ = read_rows()
    mine = [row for row in rows if row.source.startswith("Korthikanti")]
    clusters = clusters_with({"A100": fit_chip("A100", [row for row in rows if row.source != mine[0].source])})
    stored = left_out_predictions()
    for row in mine:
        assert predict(row, clusters[row.cluster]) == pytest.approx(stored[row.number], rel=1e-3)


def test_what_would_fit_fits() -> None:
    cluster, shape = load_cluster("dgx-a100"), planned("llama2-70b").shape
    base = Strategy(gpus=8, global_batch=64, micro_batch=1, seq=4096)
    assert not best_layouts(shape, base, cluster, 1)[0]
    said = " ".join(would_fit(shape, base, cluster))
    gpus = int(re.search(r"It fits on (\d+) GPUs", said).group(1))  # type: ignore[union-attr]
    enough = Strategy(gpus=gpus, global_batch=64, micro_batch=1, seq=4096)
    assert best_layouts(shape, enough, cluster, 1)[0]
    assert "--adapter rank=16,base=" in said and "GiB of 79 GiB a GPU" in said


def test_over_88_percent_of_the_memory_is_tight() -> None:
    cluster = load_cluster("dgx-h100")
    limit = (0.88 * cluster.chip.memory_bytes - CONTEXT_BYTES) / ALLOWANCE
    assert is_tight(limit + GIB / 100, cluster) and not is_tight(limit - GIB / 100, cluster)


def test_a_model_is_named_by_preset_config_or_run_file(tmp_path: Path) -> None:
    assert planned("LLAMA3-8B").shape == planned("llama3-8b").shape
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder = tmp_path / "Meta-Llama-3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for given_ in (folder, folder / "config.json"):
        found = planned(str(given_))
        assert found.name == "Meta-Llama-3-8B" and found.shape == planned("llama3-8b").shape
    run_file = tmp_path / "mine.yaml"
    run_file.write_text(yaml.safe_dump({"model": {"preset": "llama3-8b"}}))
    assert planned(str(run_file)).shape == planned("llama3-8b").shape
    (folder / "config.json").write_text("[]")
    for text, said in (
        ("lama3-8b", "the nearest known one is llama3-8b"),
        (str(tmp_path / "gone"), "is unknown"),
        (str(folder), "holds no JSON object"),
        (None, "plan needs --model"),
    ):
        with pytest.raises(UserError, match=said):
            planned(text)


def test_a_run_file_for_a_foreign_model_holds_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"preset": "llama2-7b", "num_layers": 16}}))
    assert run(monkeypatch, "plan --model mine.yaml --global-batch 64 --write plan.yaml") == 0
    written = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert written["model"]["num_layers"] == 16 and written["model"]["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("text", "amount"), [("2e12", 2e12), ("100B", 1e11), ("1.4T", 1.4e12), ("300m", 3e8), ("1_000", 1000), ("5 B", 5e9)]
)
def test_amounts_are_read_as_people_write_them(text: str, amount: float) -> None:
    assert read_amount(text) == amount


@pytest.mark.parametrize("text", ["", "B", "100Q", "nan", "inf", "ten", "1e"])
def test_other_amounts_are_refused(text: str) -> None:
    for read in (read_amount, read_length):
        with pytest.raises(UserError, match="give"):
            read(text)


@given(st.integers(1, 1 << 30))
def test_lengths_are_whole_numbers_or_powers_of_two(number: int) -> None:
    assert read_length(str(number)) == read_length(f"{number:,}") == number
    assert read_length(f"{number}k") == 1024 * number
    with pytest.raises(UserError):
        read_length(f"{number}.3")
