"""Figures of results: SVG for the page, and the README's PNG (``python -m bench.report.plot``)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib.style as style
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from bench.report.wording import about, command, number, ratio, telling
from bench.rows import baseline, grouped, read_results, widths_of

# Okabe and Ito's palette, which all common kinds of colour blindness can tell apart. Markers differ too.
_OURS, _FASTER = "#0072B2", "#D55E00"  # ours; a peer that is faster than ours
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#8C6D1F")
_MARKERS = "s^DvPX<>"
_RC = {
    "svg.fonttype": "none",  # text stays text: small and sharp
    "svg.hashsalt": "hydravit",  # the same bytes every time
    "font.size": 10.5,
    "text.parse_math": False,  # names are names
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def curves(rows: Sequence[dict], names: Sequence[str], base: str | None, column: str, label: str) -> bytes:
    """A line per peer against single widths with p20 to p80, noisy ones hollow; empty for fewer than two widths."""
    low, high = {"p50_ms": ("p20_ms", "p80_ms"), "ratio": ("ratio_p20", "ratio_p80")}[column]
    rows = [row for row in rows if row[column] is not None and "," not in row["heads"]]
    if len({row["heads"] for row in rows}) < 2:
        return b""
    with style.context(["default", _RC]):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for i, name in enumerate(names):
            own = sorted((row for row in rows if row["peer"] == name), key=widths_of)
            if not own:
                continue
            k, y = [int(row["heads"]) for row in own], [row[column] for row in own]
            color = _OURS if own[0]["ours"] else _OTHERS[i % len(_OTHERS)]
            look = {"color": color, "marker": "o" if name == base else _MARKERS[i % len(_MARKERS)]}
            axes.plot(k, y, **look, linewidth=3 if name == base else 1.3, label=f"{name:.18}")
            spread = [[row[end] if row[end] is not None else row[column] for row in own] for end in (low, high)]
            axes.vlines(k, *spread, color=color, alpha=0.6)
            noisy = [(at, value) for at, value, row in zip(k, y, own, strict=True) if row["noisy"]]
            axes.plot(*zip(*noisy, strict=True) if noisy else ([], []), **look, linestyle="none", markerfacecolor="w")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7) if column == "ratio" else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({int(row["heads"]) for row in rows}))
        axes.set_xlabel("heads k")
        axes.set_title(label, loc="left", size=11)
        axes.grid(axis="y", alpha=0.3)
        if column == "ratio":
            axes.axhspan(axes.get_ylim()[0], 1, color="#F3E3DC", zorder=0)
            axes.text(0.01, 0.02, "shaded: ours is slower", transform=axes.transAxes, style="italic", size=9)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return _file(figure)


def headline(environment: dict, rows: Sequence[dict], form: str = "svg") -> bytes:
    """Time of every peer by ours at three widths, batch 1: the README's figure. Raises ``ValueError`` without ours."""
    rows = [row for row in rows if row["task"] == "inference" and row["batch"] == 1 and row["cache"] == "warm"]
    for column in ("config", "dtype", "launch"):
        rows = [row for row in rows if row[column] == rows[0][column]]  # a run begins with the most informative
    ours = baseline(rows)
    measured = [{**row, "ratio": 1.0} if row["peer"] == ours else row for row in rows if row["status"] == "measured"]
    own = {row["heads"]: row for row in measured if row["peer"] == ours}
    if not own:
        raise ValueError("no inference of ours at batch 1 was measured")
    ks = [str(k) for k in telling([int(k) for k in own])]
    times = grouped([row for row in measured if row["heads"] in ks and row["ratio"] is not None], "peer")
    names = sorted((name for (name,) in times), key=lambda n: sum(r["ratio"] for r in times[n,]) / len(times[n,]))
    # The slowest may be far off. Its bar is cut and its number says so; otherwise the others would all look alike.
    most = max(2.0, min(5.0, 1.05 * max(row["ratio"] for found in times.values() for row in found)))

    with style.context(["default", _RC]):
        figure = Figure(figsize=(8, 1.3 + 0.27 * len(names)), layout="constrained")
        for k, axes in zip(ks, figure.subplots(1, len(ks), sharey=True, squeeze=False)[0], strict=True):
            by_peer = {row["peer"]: row for row in rows if row["heads"] == k}
            for y, name in enumerate(names):
                row = next((row for row in times[name,] if row["heads"] == k), None)
                if row is None:
                    status = by_peer.get(name, {"status": "not measured"})["status"]
                    axes.text(1.05, y, status, va="center", style="italic", color="#666666")
                    continue
                value = row["ratio"]
                bold, others = name == ours or value < 1, "#8FB8D6" if row["ours"] else "#B9B9B9"
                axes.barh(y, min(value, most), 0.68, color=_OURS if name == ours else _FASTER if value < 1 else others)
                text = ratio(value) + (" »" if value > most else "")
                x = min(max(value, 1), most) + 0.03  # beside the line at 1, not on it
                axes.text(x, y, text, va="center", weight="bold" if bold else "normal")
            axes.axvline(1, color="#222222", linewidth=1)
            axes.set(xlim=(0, most * 1.22), ylim=(len(names) - 0.4, -0.6), xticks=[])
            axes.set_title(
                f"{k} head{'s' * (k != '1')}: {number(own[k]['p50_ms'])} ms", loc="left", size=11, weight="bold"
            )
            axes.spines[["bottom", "left"]].set_visible(False)
            axes.set_yticks(range(len(names)), [f"{name:.18}" for name in names])
            axes.tick_params(axis="y", length=0)
        for text in figure.axes[0].get_yticklabels():
            text.set_fontweight("bold" if text.get_text() == ours else "normal")
        title = f"Time per image relative to ours ({ours} = 1): longer is slower"
        figure.suptitle(title, x=0.01, ha="left", size=12.5)
        footer = f"{environment.get('name', '')}, {environment.get('threads', '?')} threads, {about(rows[0])}"
        figure.supxlabel(footer, x=0.01, ha="left", size=9, color="#555555")
        return _file(figure, form)


def _file(figure: Figure, form: str = "svg") -> bytes:
    """The same bytes every time."""
    file = io.BytesIO()
    varying = ("Software",) if form == "png" else ("Creator", "Date", "Format", "Type")
    figure.savefig(file, format=form, dpi=150, metadata=dict.fromkeys(varying))
    return file.getvalue()


if __name__ == "__main__":
    command(
        "plot",
        "The README's figure.",
        lambda path, out: out.write_bytes(headline(*read_results(path), form="png")),
        "--headline",
    )
