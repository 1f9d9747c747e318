"""The frontier in a real browser: marks tell what they are, the menu changes the axes, tables sort at a click."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from test_frontier import two_cells
from test_report import full_result
from test_report_browser import CHROMIUM, browse

from owl_deploy.bench.frontier import points, sentences
from owl_deploy.bench.frontier_report import frontier_plot
from owl_deploy.bench.report import html_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium installed")]

USE = """<!doctype html><meta charset="utf-8">
<iframe id="frame" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe>
<pre id="measured"></pre>
<script>
const frame = document.getElementById("frame");
const column = (table, number) => [...table.tBodies[0].rows].map((row) => row.cells[number].textContent.trim());
async function use() {{
  const page = frame.contentDocument, plotly = frame.contentWindow.Plotly, node = page.getElementById("frontier");
  const found = {{overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth}};
  plotly.Fx.hover(node, [{{curveNumber: 2, pointNumber: 1}}]);
  found.hover = node.querySelector(".hoverlayer").textContent;
  found.titles = [];
  for (const button of node.layout.updatemenus[0].buttons) {{
    await plotly.update(node, ...button.args);
    found.titles.push([node.querySelector(".xtitle").textContent, node.querySelectorAll(".points .point").length]);
  }}
  const table = page.querySelector(".table table"), heads = [...table.tHead.rows[0].cells];
  found.heads = heads.map((head) => head.textContent);
  const number = found.heads.indexOf("p50 ms");
  found.columns = [column(table, number)];
  for (const _ of [1, 2]) {{
    heads[number].querySelector("button").click();
    found.columns.push(column(table, number));
  }}
  found.sort = heads[number].getAttribute("aria-sort");
  document.getElementById("measured").textContent = JSON.stringify(found);
  frame.remove();
}}
frame.addEventListener("load", () => setTimeout(use, 2500));
</script>"""


def used(folder: Path, width: int) -> dict[str, Any]:
    """Return what a reader finds on the page of two cells in a window of that many CSS pixels."""
    result = {**full_result(), **{key: value for key, value in two_cells().items() if key in ("rows", "bytes_on_disk")}}
    found = points(result)
    plot = frontier_plot(found)
    assert plot is not None
    page = html_page(result, lead=sentences(found), plots=[plot])
    path = folder / "use.html"
    path.write_text(USE.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = browse(path)
    read: dict[str, Any] = json.loads(html.unescape(dom.split('<pre id="measured">')[1].split("</pre>")[0]))
    return read


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_can_be_used(tmp_path: Path, width: int) -> None:
    found = used(tmp_path, width)
    assert found["overflow"] <= 0
    assert "a-0.7/int8" in found["hover"]
    assert "60 % sparse" in found["hover"]
    assert [title for title, _ in found["titles"]][:3] == [
        "decode, times as fast as the baseline",
        "decode, times as fast as the baseline",
        "decode, milliseconds per token",
    ]
    assert found["titles"][0][1] == 4
    before, ascending, descending = (list(map(float, column)) for column in found["columns"])
    assert sorted(before) == ascending
    assert descending == ascending[::-1]
    assert found["sort"] == "descending"
    assert found["heads"][0] == "engine, weights, artifact"
