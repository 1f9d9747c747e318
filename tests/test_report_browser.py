"""The HTML report in a real browser: plots drawn, no script refused, nothing wider than a phone."""

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import FASTER, HOSTILE, bench_result, full_result

from owl_deploy.bench.report import html_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium installed")]

# A headless window is never narrower than about 500 pixels, a frame can be: media queries see the frame's width.
MEASURE = """<!doctype html><meta charset="utf-8">
<iframe id="frame" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<pre id="measured"></pre>
<script>
const frame = document.getElementById("frame");
const measure = () => {{
  const page = frame.contentDocument, right = frame.contentWindow.innerWidth + 1;
  const plots = [...page.querySelectorAll(".plot[role=img]")], tables = [...page.querySelectorAll(".table")];
  const wide = [...page.querySelectorAll("main *")].filter(
    (node) => !node.closest(".table, svg") && node.getBoundingClientRect().right > right);
  document.getElementById("measured").textContent = JSON.stringify({{
    width: frame.contentWindow.innerWidth,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    table_overflow: Math.max(...tables.map((node) => node.scrollWidth - node.clientWidth)),
    wide: wide.map((node) => node.outerHTML.slice(0, 120)),
    n_drawn: plots.filter((node) => node.querySelector("svg.main-svg .xtick")).length,
    n_plots: plots.length,
    n_bars: page.querySelectorAll(".bars .point").length,
    n_points: page.querySelectorAll(".scatterlayer .point").length,
    owned: frame.contentWindow.owned === true,
  }});
  frame.remove();
}};
// Plots are drawn after the load event.
frame.addEventListener("load", () => setTimeout(measure, 3000));
</script>"""


def browse(path: Path, *flags: str) -> str:
    """Return the DOM of the page after its scripts ran."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [
        f"--user-data-dir={path.parent / 'profile'}",
        "--virtual-time-budget=8000",
        *flags,
        "--dump-dom",
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measured(folder: Path, page: str, width: int) -> dict[str, Any]:
    """Return what the page measures when it is `width` CSS pixels wide."""
    path = folder / "measure.html"
    path.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = browse(path)
    found: dict[str, Any] = json.loads(html.unescape(dom.split('<pre id="measured">')[1].split("</pre>")[0]))
    return found


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_plots_are_drawn_and_nothing_overflows(tmp_path: Path, width: int) -> None:
    found = measured(tmp_path, html_page(full_result()), width)
    assert found["width"] == width
    assert found["n_drawn"] == found["n_plots"] == 5
    # One bar per row, also for the failed one; six speed-ups may be shown of nine rows, and a profile has ten blocks.
    assert found["n_bars"] == 9
    assert found["n_points"] >= 10
    assert found["overflow"] <= 0, found["wide"]
    assert found["wide"] == []
    assert found["table_overflow"] <= 0


def test_hostile_text_runs_nothing_and_keeps_the_width(tmp_path: Path) -> None:
    attack = "</script><script>window.owned = true</script><img src=x onerror='window.owned = true'>" + "W" * 200
    result = bench_result(FASTER | {"artifact": attack, "engine": attack, "notes": [attack, HOSTILE]})
    result["machine"]["cpu"] = attack
    found = measured(tmp_path, html_page(result), 390)
    assert found["owned"] is False
    assert found["n_drawn"] == found["n_plots"]
    assert found["overflow"] <= 0, found["wide"]


def test_content_policy_refuses_any_other_script(tmp_path: Path) -> None:
    page = html_page(bench_result(FASTER)).replace("</main>", "<script>window.owned = true</script></main>")
    found = measured(tmp_path, page, 390)
    assert found["owned"] is False
    assert found["n_drawn"] == found["n_plots"]
