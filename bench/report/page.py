"""``python -m bench.report.page FILE.json``: one HTML page of a run's results, beside the file."""

from __future__ import annotations

import base64
import string
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from bench.report import plot
from bench.report.wording import about, command, machine, missing, number, percent, ratio, spans, verdict
from bench.rows import baseline, grouped, read_results, stand_ins, strongest, widths_of

_CONDITIONS = ("config", "dtype", "batch", "cache", "launch")
_SIGNS = {"faster": "▲", "slower": "▼", "equal": "="}


def page(path: Path) -> str:
    """The HTML of a result file. Raises ``ValueError`` or ``OSError`` for any other file."""
    environment, rows = read_results(path)
    base = baseline(rows)
    parts = [_table("Environment", [], {"": [_line(label, [_cell(text)]) for label, text in machine(environment)]})]
    if any(row["task"] == "inference" for row in rows):
        parts += _headline(environment, rows)
    for (task,), own in grouped(rows, "task").items():
        parts.append(f"<h2>{escape(_sentence(task))}</h2>")
        for group in grouped(own, *_CONDITIONS).values():
            parts += _group(group, own)
        parts.append(_not_measured(own))
    about_peers = {row["peer"]: " ".join(filter(None, (row["about"], row["peer_version"]))) for row in rows}
    told = [_line(name, [_cell(text)]) for name, text in about_peers.items()]
    parts.append(_table("The peers", ["peer", "what it is"], {"": told}))
    names = ", ".join(dict.fromkeys(row["peer"] for row in rows if row["ours"])) or "none"
    held = f"The others are held against {base}." if base else "None of them was measured."
    return string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(f"hydravit benchmark: {environment.get('name') or 'unnamed machine'}"),
        ours=escape(f"Ours, backends of this repository: {names}. {held}"),
        body="\n".join(filter(None, parts)),
    )


def _headline(environment: dict, rows: list[dict]) -> Iterable[str]:
    """The README's figure, and a table of the fastest other peer of every workload."""
    warm = [row for row in rows if row["task"] == "inference" and row["cache"] == "warm"]
    lines, widths = [], _widths(warm)
    for group in grouped(warm, *_CONDITIONS).values():
        best = {heads: strongest(own) for (heads,), own in grouped(group, "heads").items()}
        cells = []
        for heads in widths:
            row = best.get(heads)
            cells.append(_ratio_cell(row, row["peer"]) if row and row["ratio"] is not None else _cell("–"))
        lines.append(_line(about(group[0], task=False), cells))
    yield "<h2>Ours against the strongest other peer</h2>"
    try:
        yield _image(plot.headline(environment, rows), "Time of every peer relative to ours")
    except ValueError as error:
        yield f"<p>{escape(str(error))}.</p>"
    yield _table("Time of the fastest other peer relative to ours", ["workload", *map(_title, widths)], {"": lines})


def _group(rows: list[dict], every: list[dict]) -> Iterable[str]:
    """Figures and the table of peers and widths under one set of conditions; ``every`` row of the task is there too."""
    alike = [column for column in _CONDITIONS if column != "launch"]
    base = baseline(row for row in every if all(row[column] == rows[0][column] for column in alike))
    title = _sentence(about(rows[0], configs=True))
    if own := stand_ins(every, rows, base):
        rows = own + [row for row in rows if row["peer"] != base]
        yield f"<p>{escape(base)} cannot be launched like this: its plain calls stand in for it.</p>"
    found = {(row["peer"], row["heads"]): row for row in rows}
    measured = {row["peer"]: row["ours"] for row in rows if row["status"] == "measured"}
    names, widths = sorted(measured, key=lambda name: (name != base, not measured[name])), _widths(rows)
    lost = {row["heads"] for row in rows if row["ratio"] is not None and not row["ours"]}
    lost -= {row["heads"] for row in rows if row["peer"] == base and row["status"] == "measured"}
    if lost:
        at = spans([k for heads in lost for k in widths_of({"heads": heads})])
        yield f"<p>At k = {at} {escape(base or 'ours')} has no time: ratios are to another of ours.</p>"
    for label, column in (("median of a call, ms", "p50_ms"), (f"time relative to {base}", "ratio")):
        if svg := plot.curves(rows, names, base, column, label):
            yield _image(svg, f"{title}: {label}")
    bodies = {}
    for measure, show in _measures(base).items():
        if any(show(row) for row in rows if row["status"] == "measured"):
            bodies[measure] = [
                _line(
                    name,
                    [_shown(found.get((name, heads)), show) for heads in widths],
                    "ours base" if name == base else "ours" if measured[name] else "",
                )
                for name in names
            ]
    yield _table(title, ["peer", *map(_title, widths)], bodies) or f"<p>{escape(title)}: nothing was measured.</p>"


def _measures(base: str | None) -> dict[str, Callable[[dict], str]]:
    """What a table shows of a measured row, as cells; an empty cell where the row has no such number."""
    return {
        "median of a call, ms; p20–p80": lambda row: _spread_cell(row, "p50_ms", "p20_ms", "p80_ms", number),
        f"time relative to {base}; p20–p80": _ratio_cell,
        "share of the machine’s limit; P peak, B bandwidth": _share_cell,
        "extra cost of differing widths": lambda row: _number_cell(row, "switch_cost", "{:+.1f} %", 100),
        "MB": lambda row: "" if row["bytes"] is None else _cell(number(row["bytes"] / 1e6)),
        "seconds to prepare": lambda row: _number_cell(row, "prepare_s", "{:.3g}"),
    }


def _shown(row: dict | None, show: Callable[[dict], str]) -> str:
    if row is not None and row["status"] != "measured":
        return _cell(row["status"])
    return (row and show(row)) or _cell("–")


def _number_cell(row: dict, column: str, form: str, factor: float = 1) -> str:
    return "" if row[column] is None else _cell(form.format(factor * row[column]).replace("-", "−"))


def _spread_cell(
    row: dict, middle: str, low: str, high: str, form: Callable, sign: str = "", kind: str = "", below: str = ""
) -> str:
    if row[middle] is None:
        return ""
    spread = f"{form(row[low])}–{form(row[high])}" if row[low] is not None else ""
    return _cell(f"{sign}{form(row[middle])}{'†' if row['noisy'] else ''}", f"{spread} {below}".strip(), kind)


def _ratio_cell(row: dict, below: str = "") -> str:
    if row["ratio"] is None:
        return ""
    kind = verdict(row)
    return _spread_cell(row, "ratio", "ratio_p20", "ratio_p80", ratio, _SIGNS[kind] + " ", kind, below)


def _share_cell(row: dict) -> str:
    limit = {"peak": " P", "bandwidth": " B"}.get(row["limit"], "")
    return "" if row["share"] is None else _cell(percent(row["share"]) + limit)


def _not_measured(rows: Sequence[dict]) -> str:
    """A table of the peers that could not be measured, where and why."""
    lines, every = [], {row["heads"] for row in rows}
    for (peer, status, reason), group in missing(rows).items():
        at = {row["heads"] for row in group}
        where = "" if at == every else f" at k = {spans([k for row in group for k in widths_of(row)])}"
        lines.append(_line(peer, [_cell(f"{status}{where}: {reason}", kind="text")]))
    return _table("Not measured", ["peer", "why"], {"": lines})


def _table(caption: str, head: Sequence[str], bodies: dict[str, list[str]]) -> str:
    """A table that scrolls sideways, with ready-made rows by title; empty without any."""
    if not any(bodies.values()):
        return ""
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    text = f'<div class="scroll" tabindex="0">\n<table>\n<caption>{escape(caption)}</caption>\n'
    text += f"<thead><tr>{cells}</tr></thead>\n" if head else ""
    for title, lines in bodies.items():
        span = f'<tr><th scope="rowgroup" colspan="{len(head)}">{escape(title)}</th></tr>\n' if title else ""
        text += f"<tbody>\n{span}" + "\n".join(lines) + "\n</tbody>\n"
    return text + "</table>\n</div>"


def _line(name: str, cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _cell(text: str, below: str = "", kind: str = "") -> str:
    kind = kind or ("text" if len(text) > 20 else "")
    return f'<td class="{kind}">{escape(text)}{f"<small>{escape(below)}</small>" if below else ""}</td>'


def _image(svg: bytes, alt: str) -> str:
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" alt="{escape(alt)}">'


def _widths(rows: Iterable[dict]) -> list[str]:
    """Widths as the rows name them: single ones first, then several that take turns."""
    return sorted({row["heads"] for row in rows}, key=lambda heads: ("," in heads, widths_of({"heads": heads})))


def _title(heads: str) -> str:
    return f"k = {spans(widths_of({'heads': heads}))}{' in turns' if ',' in heads else ''}"


def _sentence(text: str) -> str:
    text = text.replace("_", " + " if "backward" in text else " ")
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    command("page", "One HTML page.", lambda path: path.with_suffix(".html").write_text(page(path), encoding="utf-8"))
