"""The report in a real browser: text and figures are visible, nothing is fetched, and the console stays empty."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from llm_parallel.report.command import report_command
from llm_parallel.report.request import ReportRequest
from tests.support.report_helpers import CONFIG, EVENTS, PIPELINE, SWEEP, write_run, write_sweep
from tests.unit.test_report import CONFIG_OF_A_SWEEP, predicted_sweep

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")
WIDTH = 1100

# Measures the page and writes what it found into the page itself, which --dump-dom prints.
PROBE = """<script>addEventListener("load", () => {
const boxes = (selector) => [...document.querySelectorAll(selector)].map((element) => {
  const box = element.getBoundingClientRect();
  return {name: element.id || element.closest("figure")?.id || element.textContent, left: box.left, right: box.right,
          top: box.top, width: box.width, height: box.height};
});
const svg = [...document.querySelectorAll("figure svg")].map((element) => {
  const frame = element.getBoundingClientRect();
  const out = [...element.querySelectorAll("text")].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 4 || box.right > frame.right + 4 || box.top < frame.top - 4
      || box.bottom > frame.bottom + 4;
  });
  return out.map((text) => text.textContent);
}).flat();
const found = {text: document.body.innerText, figures: boxes("figure svg"), tables: boxes("table"), outside: svg,
  page: document.documentElement.scrollWidth, window: innerWidth};
const plot = document.querySelector(".plot");
if (plot) {
  const sizes = [...document.querySelectorAll(".plot text, .static svg text")].map((text) =>
    text.getBoundingClientRect().height);
  found.smallest = Math.min(...sizes);
  const box = plot.getBoundingClientRect();
  const move = {clientX: box.left + 0.6 * box.width, clientY: box.top + 50, bubbles: true};
  plot.dispatchEvent(new PointerEvent("pointermove", move));
  found.tip = plot.querySelector(".tip").innerText;
  const half = [...document.querySelectorAll(".tools button")].find((button) => button.innerText === "last half");
  half.click();
  found.zoomed = [...plot.querySelectorAll("text")].map((text) => text.textContent);
  const all = [...document.querySelectorAll(".tools button")].find((button) => button.innerText === "all");
  all.click();
  found.unzoomed = [...plot.querySelectorAll("text")].map((text) => text.textContent);
}
const pre = document.createElement("pre");
pre.id = "found";
pre.textContent = JSON.stringify(found);
document.body.append(pre);
});</script>"""


def _browse(page: Path, folder: Path, *options: str, width: int = WIDTH) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    return subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--window-size={width},1400", f"--user-data-dir={folder / 'profile'}"),
            *(*options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def _complaints(page: Path, folder: Path) -> list[str]:
    """Lines of the browser's console: errors, warnings, and what the page's policy refused."""
    result = _browse(page, folder, "--dump-dom")
    assert result.returncode == 0, result.stderr
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def _look(page: Path, folder: Path, width: int = WIDTH) -> dict[str, Any]:
    """Text of the page, and boxes of its elements in the browser's layout."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    probed = folder / "probed.html"
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    result = _browse(probed, folder, "--dump-dom", "--virtual-time-budget=5000", width=width)
    match = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert match is not None, result.stderr[-2000:]
    return json.loads(unescape(match.group(1)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder / "first", events=EVENTS, peak_tflops=1e-3),
        write_run(folder / "second", step_s=[0.15] * 200, config={**CONFIG, **PIPELINE}),
    ]
    sweep = write_sweep(folder / "sweep.csv", SWEEP)
    assert report_command(ReportRequest([str(run) for run in runs], [str(sweep)], str(folder / "r.html"))) == 0
    return folder / "r.html"


def test_a_reader_sees_text_and_figures(page: Path, tmp_path: Path) -> None:
    """Headings, numbers and figure labels are text; every figure lies within the page, its labels within it."""
    seen = _look(page, tmp_path)
    for message in (
        *("Report on first, second, sweep", "Summary", "Failures and recovery", "Scaling efficiency", "held-out loss"),
        *("keeps 75.0% of the baseline's speed per process", "Baseline: 1 process", "n2/2 hangs in all_reduce"),
        *(
            "loss, nats per token",
            "forward and backward",
            "seconds since the start",
            "speed per process",
            "stage 1",
            "bubble 11.1%",
        ),
    ):
        assert message in seen["text"], message
    assert [figure["name"].removeprefix("figure-") for figure in seen["figures"]] == [
        *("loss", "lr", "grad_norm", "throughput", "mfu", "memory", "schedule_1", "life_0", "scaling"),
        *("lost_0", "layouts_0"),
    ]
    for figure in seen["figures"]:
        assert 450 < figure["width"] <= WIDTH and 0.1 < figure["height"] / figure["width"] < 0.7, figure
        assert figure["left"] >= 0 and figure["right"] <= WIDTH, figure
    places = [(figure["top"], figure["left"]) for figure in seen["figures"]]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert seen["page"] <= WIDTH, "the page scrolls sideways"
    assert seen["outside"] == []


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_every_width_is_readable(page: Path, tmp_path: Path, width: int) -> None:
    """The page does not scroll sideways, its charts fill it, and no label is smaller than ten pixels."""
    seen = _look(page, tmp_path, width)
    assert seen["page"] <= seen["window"] and seen["window"] <= max(width, 500)
    loss = seen["figures"][0]
    assert loss["width"] > 0.85 * min(seen["window"], 1216) and loss["height"] >= 200
    assert seen["smallest"] >= 10


def test_values_are_shown_and_zoomed(tmp_path: Path) -> None:
    """The box under the pointer has the values of the nearest step; a button shows the second half of the steps."""
    folder = write_run(tmp_path / "one", step_s=[0.1] * 100)
    assert report_command(ReportRequest([str(folder)], out=str(tmp_path / "r.html"))) == 0
    seen = _look(tmp_path / "r.html", tmp_path)
    step = int(re.search(r"step (\d+)", seen["tip"])[1])  # type: ignore[index]
    assert 50 < step < 70 and f"each step {6 - step / 20:.4f}" in seen["tip"], seen["tip"]
    ticks = [int(text) for text in seen["zoomed"] if re.fullmatch(r"\d\d+", text)]
    assert min(ticks) >= 50 and max(ticks) == 100
    assert {"20", "40"} <= set(seen["unzoomed"]) and "20" not in seen["zoomed"]


def test_gap_and_heat_map_are_seen(tmp_path: Path) -> None:
    """The table of causes and the map's fields are text within their figure."""
    rows = [{**row, "config": json.dumps(CONFIG_OF_A_SWEEP), "cluster": "dgx-a100"} for row in predicted_sweep("time/")]
    sweep = write_sweep(tmp_path / "sweep.csv", rows)
    assert report_command(ReportRequest([], [str(sweep)], str(tmp_path / "r.html"))) == 0
    seen = _look(tmp_path / "r.html", tmp_path)
    for message in ("lost per step on 4 processes", "optimizer with +250 ms", "TP 4", "PP 2", "1.6 s", "s predicted"):
        assert message in seen["text"], message
    assert [figure["name"] for figure in seen["figures"]] == [
        *("figure-scaling", "figure-lost_0", "figure-heat_0", "figure-layouts_0")
    ]
    assert seen["outside"] == [] and seen["page"] <= WIDTH
    assert _complaints(tmp_path / "r.html", tmp_path) == []


def test_the_console_stays_empty(page: Path, tmp_path: Path) -> None:
    """Nothing was fetched and no foreign script ran, which the page's policy refuses; its own made no error."""
    assert _complaints(page, tmp_path) == []


def test_the_checks_see_what_they_look_for(page: Path, tmp_path: Path) -> None:
    """The checks find a script, a missing image, and a label outside of its figure."""
    text = page.read_text()
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("</body>", '<script>null.x</script><img src="missing.png"></body>'))
    complaints = " ".join(_complaints(bad, tmp_path))
    assert "script" in complaints and "missing.png" in complaints
    before, end, after = text.rpartition("</svg>")
    bad.write_text(f'{before}<text x="5000" y="9">far</text>{end}{after}')
    assert _look(bad, tmp_path)["outside"] == ["far"]
