"""The report: every row appears on every page, nothing flatters, and hostile text stays text."""

import copy
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from owl_deploy.bench import plots
from owl_deploy.bench.comparison import row_sentence, void_reason
from owl_deploy.bench.report import html_page, markdown, terminal_table, write_report
from owl_deploy.bench.report_csv import report_csv
from owl_deploy.bench.verdict import cautions, findings, verdict
from owl_deploy.engines.bridge import LICENCE_NOTICE

HOSTILE = "</script><script>alert(1)</script>|<img src=x onerror=alert(2)>`[a](http://evil.example)"


def bench_row(engine: str, artifact: str, p50: float | None, **changes: Any) -> dict[str, Any]:
    """Return a decode row; without a p50 (ms) it is a failed one."""
    row: dict[str, Any] = {
        "engine": engine,
        "artifact": artifact,
        "weights": "sparse-operator",
        "precision": "fp32",
        "sparsity": 0.7,
        "phase": "decode",
        "batch": 1,
        "threads": 2,
        "prompt_len": 0,
        "past_len": 256,
        "status": "ok" if p50 else "failed",
        "reason": None if p50 else "the worker aborted: assertion in graph.cpp",
        "ms": {"p50": p50, "p90": 1.1 * p50, "min": 0.95 * p50, "n": 60} if p50 else None,
        "tokens_per_s": 1000 / p50 if p50 else None,
        "speedup": {"p50": 19.0 / p50, "low": 18.0 / p50, "high": 20.0 / p50} if p50 else None,
        "is_baseline": False,
        "bytes_per_step": 260_000_000,
        "ceiling_fraction": 0.4,
        "peak_rss_bytes": 900_000_000,
        "load_ms": 512.3,
        "perplexity": 812.4 if p50 else None,
        "kl_divergence": 3.21,
        "top1_agreement": 0.31,
        "evaluation": {"text": "python-docs", "window": 512, "n_windows": 20},
        "parity": {"passed": True},
        "samples_ns": [[int(1e6 * (p50 or 0))] * 3] * 2,
        "notes": [],
    }
    return row | changes


def bench_result(*cases: dict[str, Any]) -> dict[str, Any]:
    """Return a result of a dense baseline at 19 ms, and the cases."""
    baseline = bench_row(
        "onnxruntime",
        "dense",
        19.0,
        weights="dense",
        sparsity=0.0,
        speedup=None,
        is_baseline=True,
        perplexity=31.4,
        kl_divergence=0.0,
        top1_agreement=1.0,
    )
    profile = {
        "artifact": "owl70",
        "method": "wanda",
        "allocation": "owl",
        "target": 0.7,
        "blocks": [{"index": index, "sparsity": 0.6 + 0.02 * index, "outlier_ratio": 0.03} for index in range(10)],
    }
    return {
        "format_version": 1,
        "created": "2026-01-02T03:04:05Z",
        "command": "owl-deploy bench dense owl70 --baseline dense --out report",
        "versions": {"owl_deploy": "0.1.0", "onnxruntime": "1.31.1"},
        "commit": None,
        "recipe": None,
        "machine": {
            "cpu": "Some CPU at 2.5 GHz",
            "isa": ["avx2", "avx512f"],
            "n_cores": 2,
            "threads": 2,
            "threads_source": "cgroup quota",
            "caches": {"L1d": 32768, "L2": 2 << 20, "L3": 32 << 20},
            "memory_bytes": 24 << 30,
            "memory_bandwidth_bytes_per_s": 34e9,
            "load_before": 0.1,
            "load_after": 1.9,
            "steal_fraction": 0.001,
            "governor": None,
            "os": "Linux 6.1",
            "python": "3.11.9",
        },
        "protocol": {
            "n_rounds": 10,
            "samples_per_round": {"decode": 30, "prefill": 3},
            "cold_calls_per_round": {"decode": 7, "prefill": 0},
            "warmup": "4 steps per round",
            "interleaved": True,
            "outside_clock": "tokenising, sampling, loading",
            "bytes_per_step": "weights and KV cache read once",
        },
        "baseline": "dense",
        "rows": [baseline, *cases],
        "profiles": [profile, profile | {"artifact": "owl70-int8"}],
    }


FAILED = bench_row("deepsparse", "owl70-ds", None, weights="sparse-initializer")
FASTER = bench_row("onnxruntime", "owl70", 10.0)
SLOWER = bench_row("onnxruntime", "owl50", 38.0, sparsity=0.5, perplexity=33.0)
CLOSE = bench_row("onnxruntime", "owl30", 15.0, sparsity=0.3, perplexity=32.0)
INT4 = bench_row("onnxruntime", "dense-int4", 8.0, weights="dense", precision="int4", sparsity=0.0, perplexity=32.5)
UNKNOWN = bench_row("onnxruntime", "owl80", 7.0, sparsity=0.8, perplexity=None)
BROKEN = bench_row("onnxruntime", "owl90", 6.0, sparsity=0.9, parity={"passed": False})
PREFILL = bench_row(
    "onnxruntime", "dense", 400.0, phase="prefill", prompt_len=256, past_len=0, is_baseline=True, sparsity=0
)


def full_result() -> dict[str, Any]:
    return bench_result(FASTER, SLOWER, CLOSE, INT4, UNKNOWN, BROKEN, FAILED, PREFILL)


def rendered(result: dict[str, Any]) -> str:
    """Return what a terminal of 100 columns shows."""
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(result))
    return capture.get()


def page_text(result: dict[str, Any]) -> str:
    """Return what a reader of the HTML page sees as text."""
    return Page(html_page(result)).text


def flat(text: str) -> str:
    """Return the text without escapes and line breaks."""
    return " ".join(text.replace("\\", "").split())


class Page(HTMLParser):
    """The tags of a page, with attributes, the text outside scripts and styles, and the styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = ""
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.styles += data
        elif self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


# The sentences.


def test_verdict_puts_quality_beside_speed() -> None:
    assert verdict(bench_result(FASTER)) == (
        "onnxruntime dense fp32 decodes in 19.0 ms per token (256 tokens of context); "
        "onnxruntime sparse-operator fp32 at 70 % sparsity is 1.90x faster (95 % interval 1.80-2.00) "
        "at perplexity 812 instead of 31.4; "
        "no case is shown to be both faster and within 10 % of the baseline's perplexity."
    )


def test_verdict_says_slower_when_slower() -> None:
    assert "is 2.00x slower (95 % interval 1.90-2.11)" in verdict(bench_result(SLOWER))
    assert "faster (" not in verdict(bench_result(SLOWER))


def test_verdict_claims_nothing_when_the_interval_contains_one() -> None:
    assert "is not shown to be faster or slower (1.00x, 95 % interval 0.95-1.05)" in verdict(
        bench_result(bench_row("onnxruntime", "owl70", 19.0))
    )


def test_verdict_names_the_fastest_case_of_good_quality_too() -> None:
    assert (
        "within 10 % of the baseline's perplexity the fastest is onnxruntime sparse-operator fp32 at 30 %"
        in verdict(bench_result(FASTER, CLOSE))
    )


def test_verdict_tells_when_dense_low_precision_beats_sparsity() -> None:
    sentence = verdict(bench_result(CLOSE, INT4))
    assert "; onnxruntime dense int4 is 2.38x faster" in sentence
    assert "perplexity, onnxruntime sparse-operator fp32 at 30 % sparsity, is 1.27x faster" in sentence
    bad = verdict(bench_result(FASTER, INT4))
    assert "the fastest sparse case, onnxruntime sparse-operator fp32 at 70 % sparsity, is 1.90x faster" in bad
    assert bad.endswith("at perplexity 812 instead of 31.4.")


def test_verdict_leaves_out_void_cases() -> None:
    sentence = verdict(bench_result(UNKNOWN, BROKEN, FAILED))
    assert sentence.endswith("there is no speed-up to show (1 failed, 2 void).")


def test_verdict_without_a_baseline_gives_no_speedup() -> None:
    result = bench_result(FASTER)
    result["rows"] = result["rows"][1:]
    assert "no speed-up can be given" in verdict(result)
    assert verdict(bench_result() | {"rows": []}) == "Nothing was measured."


def test_perplexities_of_different_texts_are_not_compared() -> None:
    other = bench_row(
        "onnxruntime", "owl30", 10.0, evaluation={"text": "c4", "window": 512, "n_windows": 20}, perplexity=31.4
    )
    result = bench_result(other)
    assert "not comparable with the baseline's 31.4" in verdict(result)
    assert any("cannot be compared" in sentence for sentence in cautions(result))
    assert "31.4 (other text)" in markdown(result)


def test_perplexities_are_compared_by_text_and_windows_only() -> None:
    case = FASTER | {"evaluation": FASTER["evaluation"] | {"perplexity": 812.4, "engine": "another"}}
    assert "at perplexity 812 instead of 31.4" in verdict(bench_result(case))


def test_a_few_zeros_by_chance_do_not_make_a_model_sparse() -> None:
    assert "onnxruntime dense int4 is" in verdict(bench_result(INT4 | {"sparsity": 0.02}))


def test_findings_speak_of_the_other_workloads() -> None:
    (sentence,) = findings(full_result())
    assert sentence.startswith(
        "onnxruntime sparse-operator fp32 of the dense model reads a prompt of 256 tokens in 400 ms"
    )


def test_cautions_name_what_weakens_the_figures() -> None:
    result = full_result()
    assert cautions(bench_result(FASTER)) == []
    result["machine"] |= {"load_before": 1.7, "steal_fraction": 0.05}
    result["protocol"]["n_rounds"] = 3
    result["rows"].append(FASTER | {"artifact": "tiny", "ceiling_fraction": 1.2, "parity": None})
    said = " ".join(cautions(result))
    for words in (
        "not idle",
        "5 % of the processor time",
        "3 rounds",
        "above 100 %",
        "Parity not checked: tiny in onnxruntime.",
    ):
        assert words in said
    assert "Parity failed: owl90 in onnxruntime." in said
    assert "Perplexity unknown: owl80 in onnxruntime." in said


def test_void_rule() -> None:
    assert void_reason(FASTER) is None
    assert void_reason(FASTER | {"parity": None}) == "parity not checked"
    assert void_reason(UNKNOWN) == void_reason(FASTER | {"perplexity": float("nan")}) == "perplexity unknown"
    assert void_reason(BROKEN) == "parity failed"
    assert void_reason(FASTER, BROKEN) == "baseline failed parity"


def test_line_of_a_finished_row_has_no_speed_without_its_quality() -> None:
    baseline = bench_result()["rows"][0]
    assert row_sentence(baseline, baseline) == "dense: 19 ms, perplexity 31.4"
    assert row_sentence(FASTER, baseline) == "owl70: 10 ms, 1.90x (1.80x to 2.00x), perplexity 812.4"
    assert row_sentence(UNKNOWN, baseline) == "owl80: 7 ms, void: perplexity unknown"
    assert row_sentence(BROKEN, baseline) == "owl90: 6 ms, void: parity failed"
    assert row_sentence(FAILED, baseline) == "owl70-ds: failed: the worker aborted: assertion in graph.cpp"


def test_a_baseline_that_failed_parity_voids_every_speedup() -> None:
    result = bench_result(FASTER)
    result["rows"][0]["parity"] = {"passed": False}
    assert "1.90x" not in markdown(result) + rendered(result) + page_text(result)
    assert "there is no speed-up to show" in verdict(result)


# The pages.


@pytest.mark.parametrize("render", [markdown, page_text, rendered])
def test_every_row_appears(render: Any) -> None:
    text = flat(render(full_result()))
    for row in full_result()["rows"]:
        assert row["artifact"] in text
    for figure in (
        "19.0",
        "10.0",
        "1.90x",
        "1.80-2.00",
        "0.50x",
        "812",
        "3.21",
        "40 %",
        "100",
        "failed: the worker aborted",
    ):
        assert figure in text, figure


@pytest.mark.parametrize("render", [markdown, page_text, rendered])
def test_void_speedups_are_not_printed(render: Any) -> None:
    text = flat(render(bench_result(UNKNOWN, BROKEN)))
    assert all(word in text.split() for word in ("void:", "perplexity", "unknown", "parity", "failed"))
    assert "2.71" not in text
    assert "3.17" not in text


@pytest.mark.parametrize("render", [markdown, page_text])
def test_pages_carry_machine_protocol_command_and_licence(render: Any) -> None:
    text = flat(render(full_result()))
    for words in (
        "Some CPU at 2.5 GHz",
        "34.0 GB/s",
        "L2 2 MiB",
        "outside the clock",
        "tokenising, sampling, loading",
        "python-docs, 20 windows of 512 tokens",
        "owl-deploy bench dense owl70 --baseline dense --out report",
        "evaluation only",
        "onnxruntime 1.31.1",
    ):
        assert words in text, words


def test_terminal_table_fits_a_hundred_columns_and_cuts_nothing() -> None:
    lines = rendered(full_result()).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert not any("…" in line for line in lines)
    for heading in (
        "engine",
        "weights",
        "phase",
        "sparsity",
        "ms p50",
        "tokens",
        "speed-up",
        "ceiling",
        "perplexity",
        "KL",
    ):
        assert any(heading in line for line in lines), heading


def test_terminal_table_swallows_control_characters_and_markup() -> None:
    text = rendered(bench_result(FASTER | {"artifact": "a\x1b[31m[red]b\x07"}))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]" in text.replace("\n", "")


def test_html_escapes_hostile_text_everywhere() -> None:
    result = bench_result(
        FASTER | {"artifact": HOSTILE, "engine": HOSTILE, "weights": HOSTILE, "notes": [HOSTILE]},
        FAILED | {"reason": HOSTILE},
    )
    result["profiles"][0]["artifact"] = HOSTILE
    result |= {"command": HOSTILE, "commit": HOSTILE, "recipe": {HOSTILE: HOSTILE}}
    result["machine"]["cpu"] = HOSTILE
    page = Page(html_page(result))
    assert HOSTILE in page.text
    assert not [tag for tag, _ in page.tags if tag in ("img", "a", "iframe", "link")]
    assert sum("alert(1)" in script for script in page.scripts if not script.lstrip().startswith("{")) == 0
    clean = Page(html_page(bench_result(FASTER, FAILED)))
    assert len([tag for tag, _ in page.tags if tag == "script"]) == len(
        [tag for tag, _ in clean.tags if tag == "script"]
    )


def test_plot_labels_are_escaped_for_plotly() -> None:
    plot = plots.speedup_plot("p", "t", [FASTER | {"engine": "<b>x"}], {"<b>x sparse-operator fp32": 0})
    assert plot is not None
    assert plot.figure["data"][0]["name"].startswith("&lt;b&gt;x")


def test_markdown_escapes_hostile_text() -> None:
    text = markdown(bench_result(FASTER | {"artifact": HOSTILE + "\nnext"}))
    assert not re.search(r"(?<!\\)<script", text)
    (line,) = [line for line in text.splitlines() if "alert" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(
        re.findall(r"\|", text.splitlines()[text.splitlines().index(line) - 2])
    )


def test_html_loads_nothing() -> None:
    page = Page(html_page(full_result()))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action"):
            assert name not in attributes, (tag, attributes)
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 2


def test_html_is_accessible() -> None:
    page = Page(html_page(full_result()))
    figures = [attributes for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(figures) == 5
    assert all(attributes["aria-label"] for attributes in figures)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_figures_are_valid_for_plotly() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    page = Page(html_page(full_result()))
    figures = [json.loads(script) for script in page.scripts if script.startswith("{")]
    assert len(figures) == 5
    for figure in figures:
        go.Figure(figure)


def test_profiles_of_one_checkpoint_share_a_line() -> None:
    plot = plots.profile_plot("profile", full_result()["profiles"])
    assert plot is not None
    assert [line["name"] for line in plot.figure["data"]] == ["owl70 and 1 more<br>wanda, owl, target 70 %"]


def test_series_colours_stand_out_on_both_backgrounds() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in plots.PALETTE:
        for background in ("#f5f6f8", "#1d2127"):
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= 3.0, (colour, background)


def test_licence_note_is_written_once() -> None:
    licensed = bench_row("deepsparse", "ds", 16.0, notes=[LICENCE_NOTICE])
    assert markdown(bench_result(licensed, licensed | {"artifact": "ds2"})).count("ended in June 2025") == 1


# The files.


def test_spreadsheet_has_every_row_and_no_void_speedup() -> None:
    rows = {row["artifact"]: row for row in csv.DictReader(report_csv(full_result()).splitlines())}
    assert len(rows) == len(full_result()["rows"]) - 1  # prefill has the dense artifact's name again
    assert (rows["owl70"]["p50_ms"], rows["owl70"]["speedup"], rows["owl70"]["perplexity"]) == ("10.0", "1.9", "812.4")
    assert (rows["owl80"]["speedup"], rows["owl80"]["void"]) == ("", "perplexity unknown")
    assert (rows["owl90"]["speedup"], rows["owl90"]["void"]) == ("", "parity failed")
    assert rows["owl70-ds"]["reason"] == "the worker aborted: assertion in graph.cpp"


def test_interrupt_is_named_as_a_weakness() -> None:
    said = cautions({**full_result(), "stopped": "decode at 256 tokens, after 3 of 10 rounds"})
    assert "Interrupted in decode at 256 tokens, after 3 of 10 rounds: what was to follow is missing." in said


def test_report_json_round_trips(tmp_path: Path) -> None:
    result = full_result()
    before = copy.deepcopy(result)
    write_report(result, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8")) == before == result
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    write_report(
        bench_result(FASTER | {"perplexity": float("inf"), "kl_divergence": float("nan")}), tmp_path / "report"
    )
    row = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["rows"][1]
    assert row["perplexity"] is None
    assert row["kl_divergence"] is None
    assert "void: perplexity unknown" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_report(full_result(), tmp_path / "report")
    before = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    broken = full_result()
    del broken["machine"]["cpu"]
    with pytest.raises(KeyError):
        write_report(broken, tmp_path / "report")
    assert (tmp_path / "report" / "report.md").read_text(encoding="utf-8") == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
