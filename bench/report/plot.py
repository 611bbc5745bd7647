"""Figures of results: SVG for the page, and the README's PNG (``python -m bench.report.plot``)."""

from __future__ import annotations

import argparse
import functools
import html
import io
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.style as style
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bench.report.wording import about, number, ratio, short, telling
from bench.rows import baseline, grouped, read_results

# Okabe and Ito's palette, which all common kinds of colour blindness can tell apart. Markers and dashes differ too.
_OURS, _FASTER = "#0072B2", "#D55E00"  # ours; a peer that is faster than ours
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#8C6D1F")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_INK = "#222222"
_SIZE = 14  # of text, in the units of a figure that is 345 wide, as on a phone
_LETTERS = 14  # of a peer's name
_TICKS = [[m * 10.0**e for e in range(-4, 7) for m in ms] for ms in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7))]
_RC = {
    "svg.fonttype": "none",  # text stays text: small and selectable
    "font.size": _SIZE,
    "text.parse_math": False,  # names are names
    "axes.edgecolor": "#888888",
    "text.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def _drawn(function: Callable[..., Figure]) -> Callable[..., str]:
    """The figure that ``function`` makes, as SVG named ``label``, whatever the user's matplotlibrc says."""

    @functools.wraps(function)
    def wrapper(*args, label: str, **options) -> str:
        with style.context(["default", {**_RC, "svg.hashsalt": label}]):
            return _svg(function(*args, **options), label)

    return wrapper


class Style(NamedTuple):
    color: str
    marker: str
    dash: object
    width: float
    order: int


class Point(NamedTuple):
    """A value at a width with its 20th and 80th percentile; ``noisy`` is drawn hollow."""

    x: float
    y: float
    low: float
    high: float
    noisy: bool = False


def styles(rows: Sequence[dict], base: str | None) -> dict[str, Style]:
    """One look per peer for all figures of a file: only ours are blue, and the baseline is bold."""
    result, others, mine = {}, 0, 0
    for (name, ours), _ in grouped(rows, "peer", "ours").items():
        if name == base:
            result[name] = Style(_OURS, "o", "-", 3.2, 9)
        elif ours:
            mine += 1
            result[name] = Style(_OURS, "o", _DASHES[1 + mine % 2], 1.3, 8)
        else:
            dash = _DASHES[others // len(_OTHERS) % len(_DASHES)]
            result[name] = Style(_OTHERS[others % len(_OTHERS)], _MARKERS[others % len(_MARKERS)], dash, 1.6, 5)
            others += 1
    return result


@_drawn
def curves(series: dict[str, list[Point]], look: dict[str, Style], *, log: bool = True, one: bool = False) -> Figure:
    """A line per peer against the width, named at its end. ``one`` marks 1, where the line of ours is."""
    names = [name for name, points in series.items() if points]
    height = max(235, 62 + 16 * len(names))
    margin = 18 + 8.2 * max(len(short(name, _LETTERS)) for name in names)
    figure, axes = _canvas(height, left=44, right=margin)
    points = [point for name in names for point in series[name]]
    _x_widths(axes, sorted({point.x for point in points}))
    low, high = min(point.low for point in points), max(point.high for point in points)
    if log:
        _log_axis(axes, low, high)
    else:
        axes.set_ylim(0, high * 1.06)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if one:
        axes.axhline(1, color=_INK, linewidth=0.8, zorder=3)
    for name in names:
        _line(axes, series[name], look[name])
    _end_labels(axes, {name: series[name][-1] for name in names}, look)
    return figure


@_drawn
def against_strongest(series: dict[str, list[Point]]) -> Figure:
    """The time of the strongest other peer by ours, a line per workload. The half where ours is slower is shaded."""
    names = list(series)
    figure, axes = _canvas(270 + 8 * max(0, len(names) - 4), left=44, right=18 + 7.6 * max(len(n) for n in names))
    points = [point for name in names for point in series[name]]
    _x_widths(axes, sorted({point.x for point in points}))
    low, high = min(0.85, *(point.low for point in points)), max(1.25, *(point.high for point in points))
    room = (high / low) ** 0.12  # for the words at both ends
    _log_axis(axes, low / room, high * room)
    axes.axhspan(axes.get_ylim()[0], 1, color="#F3E3DC", linewidth=0, zorder=0)
    axes.axhline(1, color=_INK, linewidth=1, zorder=3)
    for side, y, align in (("ours is faster", 0.985, "top"), ("ours is slower", 0.02, "bottom")):
        axes.text(0.015, y, side, transform=axes.transAxes, va=align, style="italic", color="#555555", zorder=10)
    colors = (_OURS, "#D55E00", "#009E73", "#CC79A7", "#7A7A7A", "#E69F00")
    look = {
        name: Style(colors[i % 6], ("o", *_MARKERS)[i % 9], _DASHES[i // 6 % 3], 2.2, 5) for i, name in enumerate(names)
    }
    for name in names:
        _line(axes, series[name], look[name])
    _end_labels(axes, {name: series[name][-1] for name in names}, look, most=40)
    return figure


@_drawn
def bars(values: dict[str, float], look: dict[str, Style], texts: dict[str, str], *, one: bool = False) -> Figure:
    """A horizontal bar per peer with its value beside it. ``one`` marks 1."""
    names = list(values)
    left = 16 + 8.2 * max(len(short(name, _LETTERS)) for name in names)
    figure, axes = _canvas(24 + 24 * len(names), left=left, right=62, bottom=8)
    _bars(axes, values, look, texts, one=one)
    axes.set_yticks(range(len(names)), [short(name, _LETTERS) for name in names])
    return figure


def headline(rows: Sequence[dict], environment: dict, path: str | Path) -> None:
    """The README's PNG: time of every peer by ours at three widths, batch 1. Raises ``ValueError`` if ours has none."""
    rows = [row for row in rows if row["task"] == "inference" and row["batch"] == 1 and row["cache"] == "warm"]
    for column in ("config", "dtype", "launch"):
        rows = [row for row in rows if row[column] == rows[0][column]]  # a run begins with the most informative
    ours = baseline(rows)
    look = styles(rows, ours)
    measured = [row for row in rows if row["status"] == "measured"]
    own = {row["heads"]: row for row in measured if row["peer"] == ours}
    if not own:
        raise ValueError("no inference of ours at batch 1 was measured")
    ks = [str(k) for k in telling([int(k) for k in own])]
    by_width = {k: {row["peer"]: row for row in rows if row["heads"] == k} for k in ks}
    times = {name: [_relative(by_width[k].get(name), ours) for k in ks] for name in look}
    times = {name: values for name, values in times.items() if any(values)}
    names = sorted(times, key=lambda name: sum(filter(None, times[name])) / sum(map(bool, times[name])))
    # The slowest may be far off. Its bar is cut and its number says so; otherwise the others would all look alike.
    most = max(2.0, min(5.0, 1.05 * max(max(filter(None, values)) for values in times.values())))

    with style.context(["default", {**_RC, "font.size": 10.5}]):
        figure = Figure(figsize=(8, 1.3 + 0.27 * len(names)), layout="constrained")
        every_axes = figure.subplots(1, len(ks), sharey=True, squeeze=False)[0]
        for i, (k, axes) in enumerate(zip(ks, every_axes, strict=True)):
            values = {name: times[name][i] for name in names if times[name][i]}
            texts = {name: ratio(value) + (" \u00bb" if value > most else "") for name, value in values.items()}
            at = [names.index(name) for name in values]
            _bars(axes, {name: min(value, most) for name, value in values.items()}, look, texts, at, one=True)
            for name in names:
                if name not in values:
                    status = by_width[k].get(name, {"status": "not measured"})["status"]
                    axes.text(1.05, names.index(name), status, va="center", style="italic", color="#666666")
            axes.set_xlim(0, most * 1.22)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_title(
                f"{k} head{'s' * (k != '1')}: {number(own[k]['p50_ms'])} ms", loc="left", size=11, weight="bold"
            )
        every_axes[0].set_yticks(range(len(names)), [short(name, 18) for name in names])
        for text in every_axes[0].get_yticklabels():
            text.set_fontweight("bold" if text.get_text() == ours else "normal")
        title = f"Time per image relative to ours ({ours} = 1): longer is slower"
        figure.suptitle(title, x=0.01, ha="left", size=12.5)
        footer = f"{environment.get('name', '')}, {environment.get('threads', '?')} threads, {about(rows[0])}"
        figure.supxlabel(footer, x=0.01, ha="left", size=9, color="#555555")
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _relative(row: dict | None, ours: str) -> float | None:
    """The row's time by that of ours, if both were measured."""
    if row is None or row["status"] != "measured":
        return None
    return 1.0 if row["peer"] == ours else row["ratio"]


def _canvas(height: float, *, left: float, right: float, bottom: float = 44, width: float = 345) -> tuple[Figure, Axes]:
    """A figure in units of 1/72 inch with the given margins; without a layout engine labels can be placed exactly."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - 10) / height)
    )
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axes.tick_params(length=3)
    return figure, axes


def _x_widths(axes: Axes, ks: list[float]) -> None:
    axes.set_xlim(ks[0] - 0.4, ks[-1] + 0.4)
    shown = ks if len(ks) <= 5 else [k for k in ks if (k - ks[0]) % 3 == 0]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("heads k")


def _log_axis(axes: Axes, low: float, high: float) -> None:
    low, high = low / 1.06, high * 1.06
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    # The coarsest round numbers of which the axis shows four; on a short axis even steps.
    choices = [*_TICKS, MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    choices = [[tick for tick in ticks if low <= tick <= high] for ticks in choices]
    axes.yaxis.set_major_locator(FixedLocator(next((ticks for ticks in choices if len(ticks) >= 4), choices[-1])))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _line(axes: Axes, points: list[Point], look: Style) -> None:
    x, y = [point.x for point in points], [point.y for point in points]
    spread = [value for point in points for value in (point.low, point.high, math.nan)]  # one path for all
    axes.plot([at for at in x for _ in range(3)], spread, color=look.color, linewidth=1, alpha=0.6, zorder=look.order)
    axes.plot(x, y, color=look.color, linestyle=look.dash, linewidth=look.width, zorder=look.order)
    for noisy in (False, True):
        chosen = [point for point in points if point.noisy == noisy]
        axes.plot(
            [point.x for point in chosen],
            [point.y for point in chosen],
            linestyle="none",
            marker=look.marker,
            markersize=5.5,
            color=look.color,
            markerfacecolor="white" if noisy else look.color,
            zorder=look.order + 0.5,
        )


def _end_labels(axes: Axes, last: dict[str, Point], look: dict[str, Style], most: int = _LETTERS) -> None:
    """Write names beside the ends of their lines, moved apart where they would overlap."""
    box, names = axes.get_window_extent(), list(last)
    end = {name: axes.transData.transform((last[name].x, last[name].y)) for name in names}
    names.sort(key=lambda name: end[name][1])
    gap = min(16, (box.height + 20) / max(1, len(names)))
    heights: list[float] = []
    for name in names:
        heights.append(max(end[name][1], heights[-1] + gap if heights else box.y0 - 10))
    top = box.y1 + 4
    for i in reversed(range(len(names))):
        heights[i] = min(heights[i], top)
        top = heights[i] - gap
    for name, height in zip(names, heights, strict=True):
        x = box.x1 + 10
        line = axes.transData.inverted().transform([end[name] + (5, 0), (x - 2, height)])
        axes.plot(*line.T, color=look[name].color, linewidth=0.7, clip_on=False)
        x, y = axes.transAxes.inverted().transform((x, height))
        weight = "bold" if look[name].width > 3 else "normal"
        axes.text(x, y, short(name, most), transform=axes.transAxes, va="center", color=look[name].color, weight=weight)


def _bars(
    axes: Axes, values: dict[str, float], look: dict, texts: dict[str, str], at: list[int] | None = None, *, one: bool
) -> None:
    """``one``: values are relative to ours; a peer below 1 is faster than ours and stands out as much as ours does."""
    at = list(range(len(values))) if at is None else at
    base = [look[name].width > 3 for name in values]
    widest = max(values.values(), default=1) or 1
    for y, (name, value), mine in zip(at, values.items(), base, strict=True):
        faster = one and value < 1
        others = _FASTER if faster else "#8FB8D6" if look[name].color == _OURS else "#B9B9B9"
        axes.barh(y, value, 0.68, color=_OURS if mine else others)
        x = (max(value, 1) if one else value) + widest * 0.02  # beside the line at 1, not on it
        axes.text(x, y, texts[name], va="center", weight="bold" if mine or faster else "normal")
    if one:
        axes.axvline(1, color=_INK, linewidth=1)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.01)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.xaxis.set_major_locator(NullLocator())
    axes.tick_params(axis="y", length=0)
    axes.grid(False)


def _svg(figure: Figure, label: str) -> str:
    """Inline SVG, the same bytes every time. The page's style sets the size and the font of its text."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    box, body = re.search(r'viewBox="([^"]*)"', text)[1], text[text.index("<g ") : text.rindex("</svg>")]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"font-size: [^;]*; |font-family: [^;]*; ", "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # these ids are the same in every figure of the page
    name = html.escape(label)
    body = body.replace("xlink:href", "href")
    return f'<svg viewBox="{box}" role="img" aria-label="{name}"><title>{name}</title>{body}</svg>'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.plot", description="The README's figure.")
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--headline", type=Path, required=True, metavar="OUT.png")
    args = parser.parse_args()
    try:
        environment, rows = read_results(args.file)
        headline(rows, environment, args.headline)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
