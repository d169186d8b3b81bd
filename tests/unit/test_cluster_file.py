"""Descriptions of clusters: every mistake that people make in them is one sentence, and no value is taken silently."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm_parallel.errors import UserError
from llm_parallel.planner.cluster_file import CHIP, CLUSTER, MEASURED
from llm_parallel.planner.hardware import DATA, NETWORKS, cluster_names, load_cluster, with_network

GOOD = (DATA / "template.yaml").read_text()


def _changed(**changes: object) -> str:
    """The template with ``section__field`` set to other values; None removes one."""
    tree = yaml.safe_load(GOOD)
    for path, value in changes.items():
        *sections, name = path.split("__")
        part = tree
        for section in sections:
            part = part.setdefault(section, {})
        if value is None:
            del part[name]
        else:
            part[name] = value
    return yaml.safe_dump(tree)


BAD = [
    ("", "holds no fields"),
    ("[1, 2]", "holds no fields"),
    ("name: [", "is not YAML"),
    (_changed(chip__peak_tflops=989.4e12), r"chip.peak_tflops is 9894.* values from 1 to 50000 are plausible"),
    (_changed(chip__peak_tflops=0), "chip.peak_tflops is 0"),
    (_changed(chip__peak_tflops=-989), "chip.peak_tflops is -989"),
    (_changed(chip__peak_tflops="fast"), "chip.peak_tflops is 'fast'; give a number"),
    (_changed(chip__peak_tflops=True), "chip.peak_tflops is True; give a number"),
    (_changed(chip__peak_tflops=None), "lacks chip.peak_tflops"),
    (GOOD.replace("989.4 ", ".nan "), "chip.peak_tflops is nan; give a number"),
    (GOOD.replace("989.4 ", ".inf "), "chip.peak_tflops is inf; give a number"),
    (GOOD.replace("989.4 ", "[989] "), r"chip.peak_tflops is \[989\]; give a number"),
    (_changed(chip__peak_fp8_tflops=1e15), "chip.peak_fp8_tflops"),
    (_changed(chip__memory_gb_per_s=3.35), "chip.memory_gb_per_s is 3.35.*3.35 TB/s are 3350"),
    (_changed(chip__memory_gib=84933607424), "chip.memory_gib is 84933607424.*bytes are divided by"),
    (_changed(chip__memory_gib=0.08), "chip.memory_gib is 0.08"),
    (_changed(chip__name=None), "chip.name is None; give a text"),
    (_changed(chip__constants=None), "chip.constants is None; give a text"),
    (_changed(chip__constants="MI300X"), "chip.constants 'MI300X' is none of A100, H100"),
    (_changed(chip__peak_tflop=989), "chip.peak_tflop is unknown; did you mean chip.peak_tflops"),
    (_changed(chip=None), "lacks chip"),
    (_changed(name=None), "lacks name"),
    (yaml.safe_dump({**yaml.safe_load(GOOD), "chip": "H100"}), "chip is 'H100'; it must be a section"),
    (_changed(gpus_per_node=7.5), "gpus_per_node is 7.5; give a whole number"),
    (_changed(gpus_per_node=0), "gpus_per_node is 0"),
    (_changed(gpus_per_node=-8), "gpus_per_node is -8"),
    (_changed(nvlink_gb_per_s=7200), "nvlink_gb_per_s is 7200.*divided by 8"),
    (_changed(nic_gb_per_s=400), "nic_gb_per_s is 400.*400 Gbit/s are 50 GB/s"),
    (_changed(nic_gb_per_s=0), "nic_gb_per_s is 0"),
    (_changed(nvlink_latency_us=3e-6), "nvlink_latency_us is 3e-06.*multiplied by 1e6"),
    (_changed(nic_latency_us="10 us"), "nic_latency_us is '10 us'; give a number"),
    (_changed(price_per_gpu_hour=-2), "price_per_gpu_hour is -2"),
    (_changed(price_per_gpu_hour="cheap"), "price_per_gpu_hour is 'cheap'"),
    (_changed(measured__gemm=78), "measured.gemm is 78.*80 % is 0.8"),
    (_changed(measured__gemm=0), "measured.gemm is 0"),
    (_changed(measured__gem=0.78), "measured.gem is unknown; did you mean measured.gemm"),
    (_changed(measured__tp_hidden=1.5), "measured.tp_hidden is 1.5"),
    (_changed(measured__tp_hidden=-0.1), "measured.tp_hidden is -0.1"),
    (_changed(measured__jitter=0.6), "measured.jitter is 0.6.*0.6 % is 0.006"),
    (yaml.safe_dump({**yaml.safe_load(GOOD), "measured": 0.8}), "measured is 0.8; it must be a section"),
    (_changed(gpu_per_node=8), "gpu_per_node is unknown; did you mean gpus_per_node"),
    (GOOD + "gpus_per_node: 4\n", "gpus_per_node is given twice, in lines"),
    (GOOD.replace("  memory_gib: 79.1", "  memory_gib: 79.1\n  memory_gib: 40"), "chip.memory_gib is given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_a_mistake_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        load_cluster(str(path))
    assert "\n" not in str(error.value) and "Error" not in str(error.value)


def test_there_are_forty_mistakes_and_the_template_has_none(tmp_path: Path) -> None:
    assert len(BAD) >= 40
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert load_cluster(str(path)).gpus_per_node == 8
    path.write_bytes("näme: x".encode("latin-1"))
    with pytest.raises(UserError, match="is not text in UTF-8"):
        load_cluster(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        load_cluster(str(tmp_path / "gone.yaml"))


@given(st.sampled_from([*((f"chip__{n}", q) for n, q in CHIP.items()), *CLUSTER.items()]), st.floats())
def test_a_number_is_taken_only_where_it_is_plausible(field: tuple[str, object], value: float) -> None:
    from llm_parallel.planner.cluster_file import Quantity, read_cluster

    name, quantity = field
    assert isinstance(quantity, Quantity)
    fits = quantity.least <= value <= quantity.most and not (quantity.whole and value != int(value))
    try:
        read_cluster(_changed(**{name: value}), "--cluster mine.yaml")
    except UserError:
        assert not fits
    else:
        assert fits


def test_every_cluster_of_the_package_is_plausible_and_names_its_source() -> None:
    names = cluster_names()
    assert {"dgx-h100", "dgx-b200", "gb200-nvl72", "l40s", "rtx-4090", "a100-pcie-40"} <= set(names)
    for name in names:
        assert load_cluster(name.upper()).name == name, "in any case"
        assert "Source:" in " ".join((DATA / f"{name}.yaml").read_text().replace("\n# ", " ").split())
    assert set(MEASURED) == set(load_cluster("dgx-a100").chip.constants.__dataclass_fields__)


def test_a_network_replaces_that_between_the_nodes_alone() -> None:
    plain = load_cluster("dgx-h100")
    assert with_network(plain, None) is plain
    found = with_network(plain, "EFA-400")
    assert found.nic_bytes_per_s == pytest.approx(400e9 / 8 / 8), "of a GPU of eight"
    assert found.nvlink_bytes_per_s == plain.nvlink_bytes_per_s
    with pytest.raises(UserError, match=f"--network token-ring is unknown; there are {', '.join(NETWORKS)}"):
        with_network(plain, "token-ring")
