"""The page, the figures and the summary, from invented results: nothing is left out or told better than it is."""

import copy
import itertools
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from bench import ROOT
from bench.report import plot
from bench.report.page import page
from bench.report.summary import line, summary
from bench.report.wording import STATUSES, number
from bench.rows import COLUMNS, write_results

ENVIRONMENT = {
    "device": "cpu",
    "name": "AMD EPYC <9B14>",
    "cpu": "AMD EPYC <9B14>",
    "threads": 2,
    "clock_mhz": "2596-3107",
    "peak_gflops": {"fp32": 327.4},
    "bandwidth_gb_s": 21.3,
    "torch": "2.13.0+cpu",
    "python": "3.11.2",
    "system": "Linux-6.1",
    "commit": "0123abc+",
    "date": "2026-11-21T06:46:35",
}
EVIL = '<script>alert("$a_1$ & more")</script>'
LONG = "RuntimeError: " + "the exporter met an operator that it does not know, and said so at great length; " * 6
# Per peer: whether it is ours, and its time by ours at the narrowest and at the widest width.
SPEEDS = {
    "views": (False, 2.6, 1.5),
    "authors": (False, 4.4, 2.9),
    "extracted": (False, 2.1, 1.32),
    "compiled": (False, 1.45, 1.12),
    "compiled-dynamic": (False, 1.6, 1.2),
    "onnxruntime": (False, 1.25, 1.04),
    "openvino": (False, 1.18, 0.86),
    EVIL: (False, 1.9, 1.6),
    "native": (True, 1.0, 1.0),
    "reference": (True, 2.5, 1.5),
}
BLOCKS = ("attention", "mlp", "attention_backward", "mlp_backward")


def row(task, heads, batch, peer, ours, **values):
    first = {"task": task, "config": "base", "heads": heads, "batch": batch, "dtype": "fp32", "cache": "warm"}
    first |= {"launch": "call", "peer": peer, "ours": ours, "status": "measured", "reason": "", "noisy": False}
    return {**dict.fromkeys(COLUMNS), **first, **values}


def timed(task, heads, batch, peer, **values):
    """An invented measurement: what the machine would do at a share that grows with the width."""
    ours, narrow, wide = SPEEDS[peer]
    ks = [int(k) for k in heads.split(",")]
    gflop = sum(batch * 0.24 * k * k * (3 if task == "training" else 1) for k in ks)
    relative = sum(narrow + (wide - narrow) * (k - 3) / 9 for k in ks) / len(ks)
    relative *= 1 if peer == "native" else 1 + 0.02 * batch
    own = gflop / 327.4 / (0.5 + 0.02 * ks[0]) * 1e3
    noisy = (ks[0] + len(peer) + batch) % 11 == 0
    spread = 0.09 if noisy else 0.015
    found = {"p20_ms": own * relative * (1 - spread), "p50_ms": own * relative, "p80_ms": own * relative * (1 + spread)}
    if peer != "native":
        found |= {"ratio_p20": relative * (1 - spread), "ratio": relative, "ratio_p80": relative * (1 + spread)}
    found |= {"share": gflop / 327.4 * 1e3 / found["p50_ms"], "limit": "peak", "gflop": gflop, "mbyte": 30.0}
    found |= {"samples": 9, "attempts": 1, "error": 3e-7, "allowed": 2e-6, "noisy": noisy, "prepare_s": 0.3 * narrow}
    return row(task, heads, batch, peer, ours, **found | values)


def everything(widths=range(3, 13), batches=(1, 8)):
    """Rows of every task and every status."""
    widths = list(map(str, widths))
    mix = ",".join(widths)
    rows = [timed("inference", k, batch, peer) for batch in batches for k in widths for peer in SPEEDS]
    rows += [timed("inference", k, 1, peer, cache="cold") for k in widths for peer in SPEEDS]
    rows += [timed(task, k, b, peer) for task in BLOCKS for b in batches for k in widths for peer in list(SPEEDS)[-4:]]
    for batch, heads in itertools.product(batches, [*widths, mix]):
        rows += [timed("training", heads, batch, peer) for peer in ("views", "authors", "compiled", "native")]
    costs = {"compiled": 0.31, "openvino": 0.02, "native": -0.004, "views": 0.006}
    rows += [timed("switching", mix, 1, peer, switch_cost=cost) for peer, cost in costs.items()]
    rows += [
        row("training_memory", k, 8, peer, SPEEDS[peer][0], bytes=2e9) for k in widths for peer in ("views", "native")
    ]
    rows += [timed("mixed", mix, 8, peer, switch_cost=cost) for peer, cost in (("native", 0.04), ("views", None))]
    held = {"views": 347e6, "extracted": 1.56e9, "openvino": 1.66e9, "onnxruntime": 1.71e9, "native": 349e6}
    rows += [row("memory", mix, 1, peer, SPEEDS[peer][0], bytes=size) for peer, size in held.items()]
    copied = {"views": 0, "authors": 147456, "native": 0}
    rows += [
        row("copies", k, 1, peer, SPEEDS[peer][0], bytes=size * int(k) ** 2 if size else 0)
        for k in widths
        for peer, size in copied.items()
    ]
    for batch, k in itertools.product(batches, widths):
        rows.append(row("inference", k, batch, "tensorrt", False, status="absent", reason="needs a GPU"))
        rows.append(row("inference", k, batch, "executorch", False, status="failed", reason=LONG))
    for k in widths[:2]:  # a peer that is wrong at two widths only
        bad = {"status": "refused", "reason": "logits differ", "error": 3.1e-2, "allowed": 1.9e-6}
        bad |= dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "ratio", "ratio_p20", "ratio_p80", "share"))
        next(r for r in rows if (r["heads"], r["batch"], r["peer"]) == (k, 1, "compiled")).update(bad)
    rows.append(row("training", mix, 1, "openvino", False, status="skipped", reason="no time left"))
    return rows


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Raises for tags that are not closed in order; collects text, tags and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, *pair) for pair in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend((tag, *pair) for pair in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


@pytest.fixture(scope="module")
def rows():
    return everything()


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """The HTML of everything, and what a parser makes of it."""
    html = render(rows, tmp_path_factory.mktemp("page"))
    return html, Checker(html)


def render(rows, folder):
    return page(write_results(folder, "suite", ENVIRONMENT, rows)[0])


def test_page_stands_alone(whole):
    html, found = whole
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    targets = [value for _, name, value in found.attributes if name in ("href", "src")]
    assert targets and all(value.startswith("data:image/svg+xml;base64,") for value in targets)
    assert len(html.encode()) < 2_000_000


def test_every_peer_and_reason_is_there_and_escaped(whole, rows):
    html, found = whole
    text = " ".join("".join(found.text).split())
    for entry in rows:
        assert entry["peer"] in text, entry["peer"]
        assert " ".join(entry["reason"].split()) in text
    assert "<script" not in html and "&lt;script&gt;" in html


def test_refusal_shows_error_and_budget_where_it_happened(whole):
    html, _ = whole
    assert "refused at k = 3, 4: logits differ (error 3.1e-02, allowed 1.9e-06)" in html
    assert html.count('<td class="">refused</td>') == 8  # two widths: times, ratios, shares, preparation


def test_noisy_cells_are_marked(whole, rows):
    html, _ = whole
    noisy = [
        entry for entry in rows if entry["noisy"] and entry["task"] == "inference" and entry["status"] == "measured"
    ]
    assert len(noisy) > 10 and html.count("†<") > len(noisy)  # times, and ratios


def test_slower_is_as_visible_as_faster(whole):
    html, _ = whole
    best = html[html.index("Time of the fastest other peer") :]
    assert '<td class="slower">▼ 0.88' in best and '<td class="faster">▲ 1.20' in best
    assert '<td class="equal">= ' in best


def test_same_rows_same_bytes(tmp_path):
    rows = everything(widths=[3, 12], batches=[1])
    assert render(rows, tmp_path) == render(copy.deepcopy(rows), tmp_path)


def test_figures_have_names(whole):
    _, found = whole
    images = [value for tag, name, value in found.attributes if tag == "img" and name == "alt"]
    assert len(images) == found.tags.count("img") > 12
    assert len(set(images)) == len(images)
    assert found.tags.count("caption") == found.tags.count("table") > 10


@pytest.mark.parametrize("status", STATUSES)
def test_nothing_measured(status, tmp_path):
    rows = [
        row("inference", "3", 1, peer, peer == "native", status=status, reason=f"because of {peer}") for peer in "ab"
    ]
    rows.append(row("inference", "3", 1, "native", True, status=status, reason="no compiler"))
    for task in ("switching", "mixed", "memory", "copies", "training", "training_memory", *BLOCKS):
        rows.append(row(task, "3", 1, "native", True, status=status, reason="no compiler"))
    html = render(rows, tmp_path)
    Checker(html)
    assert "None of them was measured" in html and "because of a" in html and "<img" not in html
    assert "Nothing of ours was measured" in summary(ENVIRONMENT, rows)
    with pytest.raises(ValueError, match="ours"):
        plot.headline(ENVIRONMENT, rows)


def test_no_rows_at_all(tmp_path):
    Checker(render([], tmp_path))
    assert "0 rows measured" in summary({}, [])


def test_one_width_and_only_ours(tmp_path):
    rows = everything(widths=[3], batches=[1])
    Checker(render(rows, tmp_path))
    Checker(render([entry for entry in rows if entry["peer"] == "native"], tmp_path))
    assert plot.headline(ENVIRONMENT, rows, "png")[:4] == b"\x89PNG"


def test_ours_is_another_where_the_best_of_ours_does_not_run(tmp_path):
    """bf16 on a CPU: native refuses the dtype, reference is the baseline there."""
    rows = [entry for entry in everything(widths=[3, 12], batches=[1]) if entry["cache"] == "warm"]
    half = [{**entry, "dtype": "bf16"} for entry in rows if entry["task"] == "inference"]
    half = [
        entry if entry["peer"] != "native" else {**entry, "status": "absent", "reason": "fp32 only"} for entry in half
    ]
    html = render([*rows, *half], tmp_path)
    assert "time relative to native" in html and "time relative to reference" in html


def test_plain_calls_stand_in_where_ours_cannot_be_captured(tmp_path):
    """On a GPU the ratios of graphs are then to the plain calls of ours, and not to another backend's graphs."""
    rows = [timed("inference", k, 1, peer) for k in ("3", "12") for peer in ("views", "native", "reference")]
    graphs = [{**entry, "launch": "graph"} for entry in rows if entry["peer"] != "native"]
    graphs += [
        row("inference", k, 1, "native", True, launch="graph", status="absent", reason="no") for k in ("3", "12")
    ]
    html = render([*rows, *graphs], tmp_path)
    assert html.count("native cannot be launched like this") == 1
    assert html.count("time relative to native; p20–p80") == 2


def test_summary_fits_a_terminal(rows):
    text = summary(ENVIRONMENT, rows).splitlines()
    assert max(map(len, text)) <= 100 and len(text) <= 40
    text = "\n".join(text)
    for part in (
        "openvino",
        "0.88",
        "needs a GPU",
        "compiled +31 %",
        "1560 MB",
        "allowed 1.9e-06",
        "2 refused",
    ):
        assert part in text, part
    assert line(rows[: len(SPEEDS)]).startswith("inference k=3 batch 1, fp32: native 11.8, ")


@pytest.mark.parametrize("value, text", [(None, "-"), (0, "0"), (0.01234, "0.0123"), (4.0, "4.00"), (12345.6, "12346")])
def test_numbers(value, text):
    assert number(value) == text


def test_command_lines(rows, tmp_path):
    path = write_results(tmp_path, "suite", ENVIRONMENT, rows[:60])[0]

    def run(module, *arguments):
        command = [sys.executable, "-m", f"bench.report.{module}", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    for command in (["page", path], ["plot", path, "--headline", tmp_path / "h.png"], ["summary", path]):
        assert run(*command).returncode == 0
    assert (tmp_path / "suite.html").exists() and (tmp_path / "h.png").exists()
    (tmp_path / "bad.json").write_text("[]")
    failed = run("page", tmp_path / "bad.json")
    assert failed.returncode == 1 and "no file of benchmark results" in failed.stderr
