"""Results as one picture: accuracy, latency and memory of every width. Needs matplotlib (extra ``demo``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydravit.atomic import atomic_write
from hydravit.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which people with any common colour blindness tell apart. Markers differ too.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#6E6E6E"
_WAYS = {
    "eager": {"label": "eager slicing", "color": _ORANGE, "marker": "s"},
    "fused": {"label": "hydravit", "color": _BLUE, "marker": "o"},
}


def check_plotting() -> None:
    """Raise ``RuntimeError`` before the work, rather than after it, if matplotlib is missing."""
    with extra("demo", "the picture of the results"):
        import matplotlib  # noqa: F401


def plot(results: dict, path: str | Path) -> None:
    """Draw a PNG of the results of ``evaluate``: top-1 accuracy and, if measured, latency against the width.

    If ``results["supernet"]`` holds the results of ``measure_supernet``, latency and memory are theirs.
    """
    check_plotting()
    from matplotlib.figure import Figure  # unlike pyplot it needs no global state and no display
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    speed = results.get("supernet", results)
    panels = [(_draw_accuracy, results, 1.0)]
    if speed["widths"][0]["latency_ms"]["eager"] is not None:
        panels.append((_draw_latency, speed, 1.3))
    if "supernet" in results and speed["environment"]["weights_mib"]["eager"] is not None:
        panels.append((_draw_memory, speed, 0.8))
    ratios = [ratio for _, _, ratio in panels]
    figure = Figure(figsize=(4.6 * sum(ratios), 4.4), layout=ConstrainedLayoutEngine(wspace=0.06))
    every_axes = figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False)[0]
    for axes, (draw, content, _) in zip(every_axes, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        draw(axes, content)
    atomic_write(Path(path), lambda file: figure.savefig(file, format="png", dpi=150))


def _title(axes: Axes, title: str, below: str) -> None:
    axes.set_title(f"{title}\n", loc="left", size=12, weight="bold")
    axes.text(0, 1.02, below, transform=axes.transAxes, size=9, color=_GREY, va="bottom")


def _width_axis(axes: Axes, results: dict) -> list[int]:
    rows = results["widths"]
    heads = [row["heads"] for row in rows]
    counted = results["environment"].get("counted", "heads")
    if counted == "width":
        axes.set_xticks(heads, [row["width"] for row in rows], rotation=60, size=8)
    elif counted == "heads":
        axes.set_xticks(heads)
    axes.set_xlim(min(heads) - 0.5, max(heads) + 0.5)
    labels = {"heads": "active heads", "width": "share of the full one", "step": "step of the list of cuts"}
    axes.set_xlabel(f"width ({labels[counted]})")
    axes.grid(axis="y", alpha=0.3)
    return heads


def _draw_accuracy(axes: Axes, results: dict) -> None:
    rows = results["widths"]
    heads = _width_axis(axes, results)
    top1 = [row["top1"] for row in rows]
    below = [row["top1"] - row["top1_interval"][0] for row in rows]
    above = [row["top1_interval"][1] - row["top1"] for row in rows]
    axes.plot(heads, top1, color=_BLUE, linewidth=1.2, alpha=0.5)
    axes.errorbar(heads, top1, (below, above), fmt="o", color=_BLUE, markersize=6, capsize=4, linewidth=1.5)
    for x, y in zip(heads, top1, strict=True):
        axes.annotate(f"{y:.1f}", (x, y), (6, -3), textcoords="offset points", size=9, va="top")
    axes.set_ylabel("top-1 accuracy, %")
    images = results["environment"]["images"]
    source = Path(results.get("data", {}).get("source", "")).name
    _title(
        axes, "Accuracy: one training, every width", f"{images} images{source and f' of {source}'}; bars: 95 % interval"
    )


def _draw_latency(axes: Axes, results: dict) -> None:
    rows = results["widths"]
    heads = _width_axis(axes, results)
    ends = []
    for name, style in _WAYS.items():
        middle = [row["latency_ms"][name] for row in rows]
        if None in middle:
            continue
        below = [row["latency_ms"][name] - row["latency_spread_ms"][name][0] for row in rows]
        above = [row["latency_spread_ms"][name][1] - row["latency_ms"][name] for row in rows]
        color = style["color"]
        axes.errorbar(heads, middle, (below, above), fmt="none", ecolor=color, capsize=3, linewidth=1.2)
        axes.plot(heads, middle, color=color, marker=style["marker"], markersize=6, linewidth=2, label=style["label"])
        ends.append(middle)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("latency of one image, ms")
    axes.legend(frameon=False, loc="upper left")
    about = results["environment"]
    machine = about["cpu"] if about["device"] == "cpu" else about["device"]
    title = f"Latency{_of(about)}"
    if len(ends) == 2:
        ratios = [eager / fused for eager, fused in zip(*ends, strict=True)]
        title += f": {min(ratios):.1f} to {max(ratios):.1f} times as fast"
    bars = "bars: 20 % to 80 % of the calls"
    if overlapping := _overlapping(rows):
        unit = " heads" if about.get("counted", "heads") == "heads" else ""
        bars += f", which overlap at {', '.join(overlapping)}{unit}: a busy machine"
    _title(axes, title, f"{machine}, {about['threads']} thread(s); {bars}")


def _overlapping(rows: Sequence[dict]) -> list[str]:
    """Return the widths at which the calls of both backends took as long: their ratio says little there."""
    return [
        row.get("width", str(row["heads"]))
        for row in rows
        if {"eager", "fused"} <= set(row["latency_spread_ms"])
        and row["latency_spread_ms"]["eager"][0] <= row["latency_spread_ms"]["fused"][1]
    ]


def _draw_memory(axes: Axes, results: dict) -> None:
    about, rows = results["environment"], results["widths"]
    weights = about["weights_mib"]
    bars = []
    for name, style in _WAYS.items():
        if weights[name] is not None:
            peak = max(row["peak_memory_mib"][name] for row in rows)
            bars.append((style["label"], weights[name] + peak, style["color"]))
    bars.append(("a network\nfor each width", weights["separate"], _GREY))
    labels, values, colors = zip(*bars, strict=True)
    drawn = axes.bar(labels, values, color=colors, width=0.6)
    axes.bar_label(drawn, [f"{value:.0f}" for value in values], padding=2, size=9)
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylabel("MiB")
    _title(axes, f"Memory{_of(about)}", "all widths ready, one called; grey: counted")


def _of(about: dict) -> str:
    return f" of {about['model']}" if "model" in about else ""
