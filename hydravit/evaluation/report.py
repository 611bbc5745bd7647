"""Results of ``evaluate`` for people: a table and a plot; and for programs: JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hydravit.atomic import atomic_write

# Okabe and Ito's palette: tells apart for all common kinds of colour blindness. Markers differ too.
_BLUE, _ORANGE = "#0072B2", "#D55E00"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    return "\n".join("  ".join(line) for line in lines)


def format_table(results: dict) -> str:
    """The widths of ``evaluate``'s results as aligned text, and a line on how they were measured."""
    accuracies = {"top1": "top-1 %", "top5": "top-5 %", "e4m3_top1": "e4m3 top-1", "e4m3_top5": "e4m3 top-5"}
    accuracies = {name: label for name, label in accuracies.items() if all(name in row for row in results["widths"])}
    header = ["heads", "params", "GMACs", *accuracies.values(), "eager ms", "fused ms", "memory MiB"]
    rows = [
        [
            str(row["heads"]),
            count(row["params"]),
            _number(row["gmacs"], 4),
            *(f"{row[name]:.2f}" for name in accuracies),
            _number(row["latency_ms"]["eager"]),
            _number(row["latency_ms"]["fused"]),
            _number(row["peak_memory_mib"]),
        ]
        for row in results["widths"]
    ]
    about = results["environment"]
    machine = about["cpu"] if about["device"] == "cpu" else about["device"]
    notes = [
        f"{about['images']} images; {machine}, {about['threads']} thread(s), torch {about['torch']}, {about['dtype']}, "
        f"backend {about['backend']}",
        f"latency: {about['latency']}",
        f"memory: {about['memory']}, batch {about['batch_size']}",
    ]
    if about["fused_missing"] not in ("", about["latency"]):
        notes.append(f"no fused latency: {about['fused_missing']}")
    differences = [row["difference"] for row in results["widths"] if row["difference"] is not None]
    if differences:
        notes.append(f"largest difference of fused logits from eager ones: {max(differences):.1e} of the largest logit")
    return "\n".join([aligned(header, rows), *notes])


def count(number: int) -> str:
    """A count as people read it: 726824 is "727 k", 86567656 is "86.6 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def write_results(results: dict, folder: str | Path) -> list[Path]:
    """Write ``results.json`` and ``results.png`` to ``folder``, which is made if need be; returns their paths.

    Each is written at once or, on an ``OSError``, not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.json", folder / "results.png"]
    atomic_write(paths[0], lambda file: file.write_text(json.dumps(results, indent=2) + "\n"))
    plot(results, paths[1])
    return paths


def plot(results: dict, path: str | Path) -> None:
    """A PNG of top-1 accuracy against multiply-accumulates and, where measured, latency; markers hold the heads."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import EngFormatter

    rows = results["widths"]
    panels = {"multiply-accumulates (MACs) of an image": {"": [row["gmacs"] * 1e9 for row in rows]}}
    latencies = {name: [row["latency_ms"][name] for row in rows] for name in ("eager", "fused")}
    latencies = {name: values for name, values in latencies.items() if None not in values}
    if latencies:
        panels["latency of an image in ms"] = latencies
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    top1 = [row["top1"] for row in rows]
    every_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, curves) in zip(every_axes, panels.items(), strict=True):
        for name, values in curves.items():
            style = {"color": _ORANGE, "marker": "s"} if name == "eager" else {"color": _BLUE, "marker": "o"}
            axes.plot(values, top1, linewidth=1.5, markersize=14, markeredgecolor="white", label=name, **style)
            for row, x, y in zip(rows, values, top1, strict=True):
                axes.text(x, y, row["heads"], color="white", size=8, weight="bold", ha="center", va="center_baseline")
        axes.set_xlabel(label)
        axes.margins(x=0.08, y=0.1)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if "" not in curves:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, markerscale=0.6)
    every_axes[0].xaxis.set_major_formatter(EngFormatter())
    every_axes[0].set_ylabel("top-1 accuracy in %")
    every_axes[0].set_title("every width from one set of weights; in the markers: heads", loc="left", size=10)
    atomic_write(Path(path), lambda file: figure.savefig(file, format="png", dpi=150))
