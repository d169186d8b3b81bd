"""Reading published rows: conventions of FLOPs against counts by hand, blanks, refused rows, bad files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.planner.published.rows import COLUMNS, DATA, Row, read_rows
from llm_parallel.planner.published.scores import report, score_rows


def records() -> list[dict[str, str]]:
    """The package's CSV."""
    return list(csv.DictReader(io.StringIO((DATA / "published_throughput.csv").read_text(encoding="utf-8"))))


def write(folder: Path, *rows: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> str:
    """A user's file with these rows; what they do not give is blank."""
    path = folder / "mine.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


LLAMA_8B = {
    "source": "our cluster", "model": "Llama 3 8B", "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8",
    "ffn": "14336", "vocab": "128256", "seq": "8192", "gpus": "8", "chip": "H100", "precision": "bf16", "tp": "1",
    "pp": "1", "micro_batch": "1", "global_batch": "128",
}  # fmt: skip


def only(path: str) -> Row:
    rows, refused = read_rows(path)
    assert not refused
    return rows[0]


def test_every_row_is_predicted_or_refused_with_a_reason() -> None:
    rows, refused = read_rows()
    assert sorted(item.number for item in (*rows, *refused)) == list(range(2, len(records()) + 2))
    assert all(item.reason for item in refused)
    # All mixtures of experts and nothing that has a layout, a chip, a length and a time without a reason.
    assert len(rows) > 370


def test_parameters_agree_with_the_printed_ones() -> None:
    """Dimensions, gating and tying give what the source prints (a proxy's row prints the whole model's)."""
    printed = dict(enumerate(records(), 2))
    off = {}
    for row in read_rows()[0]:
        text = printed[row.number]["n_params_b"]
        if text and "PROXY" not in row.model:
            positions = 0 if row.shape.rotary else row.strategy.seq * row.shape.hidden
            error = (row.shape.parameters + positions) / (1e9 * float(text)) - 1.0
            if abs(error) > 0.05:
                off[row.number] = (row.model, round(error, 3))
    # GPT-2 1B and others without their position table stay below a twentieth, and so do all the rest.
    assert not off


def test_hardware_flops_of_sc21_are_its_equation_three() -> None:
    row = next(row for row in read_rows()[0] if row.source.startswith("Megatron SC21") and row.model == "GPT 530B")
    batch, s, layers, h, vocab = 2520, 2048, 105, 20480, 51200
    flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert row.step_s == pytest.approx(flops / (163e12 * 2520), rel=1e-6)


def test_korthikantis_printed_step_and_mfu_are_one_convention() -> None:
    """Table 5 prints both; model FLOPs with full attention join them (72 B s L h^2 (1 + s/6h + V/12hL))."""
    row = next(row for row in read_rows()[0] if row.source.startswith("Korthikanti") and row.step_s == 13.75)
    assert row.shape.flops_per_token(2048) * 64 * 2048 / (13.75 * 64 * 312e12) == pytest.approx(0.514, abs=0.005)


def test_causal_tflops_of_megatron_bridge_agree_with_its_tokens() -> None:
    checked = 0
    for number, record in enumerate(records(), 2):
        if record["source"].startswith("Megatron-Bridge") and record["layers"]:
            row = next(row for row in read_rows()[0] if row.number == number)
            tflops = row.shape.flops_per_token(row.strategy.seq, causal=True) * row.tokens_per_s / 1e12
            assert tflops == pytest.approx(float(record["tflops_per_gpu"]), rel=0.02)
            checked += 1
    assert checked >= 5


def test_step_time_comes_before_tokens_and_tokens_before_tflops(tmp_path: Path) -> None:
    tokens = 128 * 8192
    figures = {"step_time_s": "12.0", "tokens_per_s_per_gpu": "9999", "tflops_per_gpu": "400"}
    assert only(write(tmp_path, LLAMA_8B | figures)).step_s == pytest.approx(12.0)
    figures.pop("step_time_s")
    assert only(write(tmp_path, LLAMA_8B | figures)).step_s == pytest.approx(tokens / 8 / 9999)
    figures.pop("tokens_per_s_per_gpu")
    # 8.03e9 parameters; 2 FLOPs each but for the embedding's, and 4 s h a layer for attention; three passes.
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    flops = 3 * (2 * weights + 32 * 4 * 8192 * 4096)
    assert only(write(tmp_path, LLAMA_8B | figures)).step_s == pytest.approx(tokens * flops / (8 * 400e12))


def test_a_users_blanks_get_the_usual_values(tmp_path: Path) -> None:
    row = only(write(tmp_path, LLAMA_8B | {"kv_heads": "", "cp": "", "micro_batch": "", "step_time_s": "12"}))
    assert row.shape.groups == 32
    assert (row.strategy.cp, row.strategy.vpp, row.unknown) == (1, 1, ("micro_batch", "recompute"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden": ""}, "hidden is not stated"),
        ({"gpus": "many"}, "gpus is 'many'"),
        ({"gpus": "12", "tp": "8"}, "12 GPUs are no multiple"),
        ({"chip": "TPU v5p"}, "chip TPU v5p"),
        ({"step_time_s": ""}, "no figure of throughput"),
        ({"model": "Mixtral 8x7B"}, "mixture of experts"),
        ({"pp": "8", "vpp": "8"}, "32 layers on PP 8 x VPP 8"),
    ],
)
def test_what_cannot_be_predicted_is_named(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    rows, refused = read_rows(write(tmp_path, LLAMA_8B | {"step_time_s": "12"} | change))
    assert not rows
    assert reason in refused[0].reason
    assert refused[0].number == 2


def test_a_missing_column_or_file_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA_8B, columns=tuple(name for name in COLUMNS if name != "heads"))
    with pytest.raises(UserError, match="has no column heads"):
        read_rows(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(str(tmp_path / "none.csv"))


def test_stages_of_nanotron_and_torchtitan_are_split_as_their_code_does() -> None:
    """nanotron puts blocks on a stage until its share of the products is exceeded: 28 layers and an output worth 3.56
    make 16 and 12. torchtitan gives 126 layers on 8 stages as 15, six times 16, 15."""
    rows = {row.number: row for row in read_rows()[0]}
    assert rows[111].strategy.stage_layers == (16, 12)
    assert rows[81].strategy.stage_layers == (15, 16, 16, 16, 16, 16, 16, 15)
    assert rows[82].strategy.stage_layers == (7, *[8] * 14, 7) and rows[82].strategy.vpp == 2
    assert rows[36].strategy.stage_layers is None


def test_a_local_batch_of_torchtitan_is_split_into_as_many_micro_batches_as_stages() -> None:
    rows = {row.number: row for row in read_rows()[0]}
    assert (rows[81].strategy.micro_batch, rows[81].strategy.micro_batches) == (4, 8)
    assert (rows[83].strategy.micro_batch, rows[83].strategy.micro_batches) == (1, 8)
    assert "micro_batch" not in rows[81].unknown


def test_zero_stage_and_unit_of_memory_are_the_sources() -> None:
    rows = {row.number: row for row in read_rows()[0]}
    assert [rows[number].strategy.zero for number in (105, 106)] == [1, 0]
    assert rows[106].memory_gib == 19.57  # "GB" of helpers.py are bytes / 1024**3
    assert (rows[106].memory_of, rows[70].memory_of) == ("not stated", "reserved")


HFU = {**LLAMA_8B, "source": "theirs", "tflops_per_gpu": "400"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"mfu_convention": "full"}, {"mfu_convention": "causal"}], "rows 2 and 3, both of theirs on H100, count MFU"),
        ([{}, {"mfu_convention": "hardware"}], "as full and as hardware"),
        ([{"note": "HFU convention"}, {"note": "causal attention"}], "as hardware and as causal"),
        ([{"note": "non-causal attention"}, {"note": "MFU is 6N"}], "as full and as six_n"),
        ([{"mfu_convention": "model"}], "row 2: mfu_convention 'model' is not one of full, causal"),
        ([], "is empty; give a row"),
    ],
)
def test_mixed_conventions_are_one_sentence(tmp_path: Path, changes: list[dict[str, str]], message: str) -> None:
    path = write(tmp_path, *({**HFU, **change} for change in changes), columns=(*COLUMNS, "mfu_convention"))
    with pytest.raises(UserError) as caught:
        read_rows(path)
    text = str(caught.value)
    assert message in text and text.startswith(f"--rows {path}") and "\n" not in text


def test_conventions_may_differ_where_they_do_not_count(tmp_path: Path) -> None:
    """Other conventions are allowed for another source or chip, and in rows with a step time."""
    rows = [HFU, {**HFU, "chip": "A100", "tflops_per_gpu": "200", "mfu_convention": "causal"},
            {**HFU, "source": "c", "mfu_convention": "six_n"},
            {**HFU, "step_time_s": "16", "mfu_convention": "causal"}]  # fmt: skip
    found, refused = read_rows(write(tmp_path, *rows, columns=(*COLUMNS, "mfu_convention")))
    assert len(found) == 4 and not refused
    # 400 TFLOP/s over a token's FLOPs, by hand: 8.03e9 weights less the embedding's, and attention of 32 x 4096.
    matrices = 32 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336) + 128256 * 4096
    square = 12 * 8192 * 32 * 4096
    expected = [400e12 / (6 * matrices + square), 200e12 / (6 * matrices + square / 2),
                400e12 / (6 * (matrices + 128256 * 4096)), 128 * 8192 / 16 / 8]  # fmt: skip
    assert [row.tokens_per_s for row in found] == pytest.approx(expected, rel=2e-4)  # six_n: norms are weights, too


def test_a_file_of_which_no_row_can_be_predicted_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {**HFU, "chip": "B300"}, {**HFU, "tp": ""})
    with pytest.raises(UserError, match="none of its 2 rows can be predicted; row 2: chip B300 is none of A100, H100"):
        report(path, print)


NUMBERS = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gpus", "tp", "pp", "vpp",
           "cp", "micro_batch", "global_batch", "tflops_per_gpu", "tokens_per_s_per_gpu", "step_time_s",
           "mfu_pct")  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(NUMBERS), st.sampled_from(["", "0", "-1", "x", "nan", "inf", "1e300", "1.5", "3", "64", "1e6"]),
        min_size=1, max_size=4,
    ),
    note=st.sampled_from(["", "mem_gib=1.2.3", "local batch 0", "causal", "mem_gib=."]),
)  # fmt: skip
def test_whatever_stands_in_a_row_is_predicted_or_refused(tmp_path: Path, changes: dict[str, str], note: str) -> None:
    path = write(tmp_path, {**LLAMA_8B, "step_time_s": "9", "note": note, **changes})
    scored, refused = score_rows(path)
    assert len(scored) + len(refused) == 1
    assert all(item.predicted_s > 0 and item.row.step_s > 0 for item in scored)
