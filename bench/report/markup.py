"""The page's elements: figures, tables of peers against widths, and lists of what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from bench.report.wording import missing, number, percent, ratio, spans, verdict
from bench.rows import widths_of

_NOISY = '<sup title="noisy">†</sup>'
_LEGEND = (
    '\n<p class="legend">▲ ours is faster, ▼ ours is slower, = within the spread; † noisy: p80/p20 of the time '
    "above 1.15, or of the ratio above 1.07, or the machine more than 7 % slower than at its best; limit: P peak, "
    "B bandwidth</p>"
)
_SIGNS = {"faster": "▲", "slower": "▼", "equal": "="}


class Column:
    """A width, or several that take turns; sorts with single widths first."""

    def __init__(self, heads: str):
        self.heads = heads
        self.widths = widths_of({"heads": heads})
        self.single = len(self.widths) == 1
        self.title = f"k\u00a0=\u00a0{heads}" if self.single else f"k\u00a0=\u00a0{spans(self.widths)} in turns"

    def __lt__(self, other: Column) -> bool:
        return (not self.single, self.widths) < (not other.single, other.widths)


def columns(rows: Iterable[dict]) -> list[Column]:
    return sorted(Column(heads) for heads in dict.fromkeys(str(row["heads"]) for row in rows))


def figure(caption: str, note: str, svg: str) -> str:
    return f"<figure>\n<figcaption>{escape(caption)} <span>{escape(note)}</span></figcaption>\n{svg}\n</figure>"


def figures(*parts: str) -> str:
    shown = [part for part in parts if part]
    return '<div class="figures">\n' + "\n".join(shown) + "\n</div>" if shown else ""


def table(caption: str, head: Sequence[str], bodies: Sequence[str], kind: str = "") -> str:
    """A table in a container of its own that scrolls sideways; ``bodies`` are ready-made rows."""
    cells = "".join(f'<th scope="col"{_class("mean" if cell == "mean" else "")}>{escape(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table{_class(kind)}>\n<caption><span>{escape(caption)}</span></caption>\n<thead><tr>{cells}</tr></thead>\n"
        + "\n".join(f"<tbody>\n{body}\n</tbody>" for body in bodies)
        + "\n</table>\n</div>"
    )


def line(name: str, cells: Iterable[str], kind: str = "") -> str:
    """A table's row; ``cells`` are ready-made ``<td>``."""
    return f'<tr{_class(kind)}><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def cell(text: str, small: str = "", kind: str = "") -> str:
    """A cell; ``text`` is markup, ``small`` stands below it."""
    return f"<td{_class(kind)}>{text}{f'<small>{small}</small>' if small else ''}</td>"


def kind_of(name: str, rows: Iterable[dict], base: str | None) -> str:
    mine = any(row["ours"] for row in rows if row["peer"] == name)
    return " ".join(["ours"] * mine + ["base"] * (name == base))


def time_cell(row: dict) -> str:
    spread = f"{number(row['p20_ms'])}–{number(row['p80_ms'])}" if row.get("p20_ms") is not None else ""
    return cell(number(row["p50_ms"]) + (_NOISY if row.get("noisy") else ""), spread)


def ratio_cell(row: dict) -> str:
    """A ratio; a sign and a shade tell who is faster."""
    if row.get("ratio") is None:
        return cell("–", kind="none")
    who = verdict(row)
    spread = f"{ratio(row['ratio_p20'])}–{ratio(row['ratio_p80'])}" if row.get("ratio_p20") is not None else ""
    return cell(f"{_SIGNS[who]}&nbsp;{ratio(row['ratio'])}{_NOISY if row.get('noisy') else ''}", spread, who)


def best_cell(row: dict | None) -> str:
    if row is None:
        return cell("–", kind="none")
    return ratio_cell(row).replace("</td>", f"<small>{escape(row['peer'])}</small></td>")


def share_cell(row: dict) -> str:
    limit = {"peak": "P", "bandwidth": "B"}.get(row.get("limit"), "")
    return cell(f"{percent(row.get('share'))}{f'&nbsp;{limit}' if row.get('share') is not None else ''}")


def matrix(caption: str, rows: Sequence[dict], base: str | None) -> str:
    """Peers as rows, widths as columns: times, ratios to ours and shares of the limit of one set of conditions."""
    found = {(row["peer"], str(row["heads"])): row for row in rows}
    shown = columns(rows)
    names = peers_of(rows, base)
    if not names:
        return f"<p>{escape(caption)}: nothing was measured.</p>"
    single = [column for column in shown if column.single]
    means = mean_ratios(rows, base)

    def body(title: str, show: Callable[[dict], str], mean: Callable[[str], str], without: str | None = None) -> str:
        head = f'<tr><th scope="rowgroup" colspan="{len(shown) + 2}"><span>{title}</span></th></tr>'
        lines = []
        for name in names:
            if name != without:
                cells = [_of_status(found.get((name, column.heads)), show) for column in shown]
                mean_cell = f'<td class="mean">{mean(name)}</td>'
                lines.append(line(name, [*cells, mean_cell], kind_of(name, rows, base)))
        return "\n".join([head, *lines])

    def mean_time(name: str) -> str:
        times = [found.get((name, column.heads), {}).get("p50_ms") for column in single]
        return number(sum(times) / len(times)) if times and None not in times else "–"

    bodies = [body("median of a call, ms <small>p20–p80</small>", time_cell, mean_time)]
    if base is not None and len(names) > 1:
        title = f"time relative to {escape(base)} <small>p20–p80; the mean is a ratio of mean times</small>"
        bodies.append(body(title, ratio_cell, lambda name: ratio(means[name]) if name in means else "–", without=base))

    def mean_share(name: str) -> str:
        own = [found.get((name, column.heads), {}) for column in single]
        if not own or any(row.get("share") is None for row in own):
            return "–"
        return percent(sum(row["share"] * row["p50_ms"] for row in own) / sum(row["p50_ms"] for row in own))

    bodies.append(body("share of the machine’s limit", share_cell, mean_share))
    return table(caption, ["peer", *(column.title for column in shown), "mean"], bodies) + _LEGEND


def _of_status(row: dict | None, show: Callable[[dict], str]) -> str:
    if row is None:
        return cell("–", kind="none")
    return show(row) if row["status"] == "measured" else cell(escape(row["status"]), kind="none")


def peers_of(rows: Iterable[dict], base: str | None) -> list[str]:
    """Peers with a measurement: the baseline, then ours, then others in the order of the file."""
    rows = list(rows)
    measured = {row["peer"]: row["ours"] for row in rows if row["status"] == "measured"}
    order = list(dict.fromkeys(row["peer"] for row in rows if row["peer"] in measured))
    return sorted(order, key=lambda name: (name != base, not measured[name]))


def measured_of(rows: list[dict], base: str | None) -> list[dict]:
    order = {name: i for i, name in enumerate(peers_of(rows, base))}
    return sorted((row for row in rows if row["status"] == "measured"), key=lambda row: order[row["peer"]])


def block_title(task: str) -> str:
    kind, _, backward = task.partition("_")
    return f"{'MLP' if kind == 'mlp' else kind.capitalize()}, forward{' and backward' if backward else ''}"


def mean_ratios(rows: Iterable[dict], base: str | None) -> dict[str, float]:
    """Per peer its mean time over single widths by that of ``base``, for rows of one set of conditions.

    Only peers that were measured at the same widths as ``base`` have a mean.
    """
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "measured" and row["p50_ms"] is not None and len(widths_of(row)) == 1:
            times.setdefault(row["peer"], {})[row["heads"]] = row["p50_ms"]
    own = times.get(base, {})
    return {
        name: sum(by_width.values()) / sum(own.values())
        for name, by_width in times.items()
        if by_width.keys() == own.keys()
    }


def sentence(title: str, best: dict[str, dict], base: str | None) -> str:
    """One sentence on all widths; it says at which widths ours is slower, and by how much."""
    title = escape(title)
    if not best or base is None:
        return f"{title}: no comparison with another peer was measured."
    kinds: dict[str, list[dict]] = {"faster": [], "equal": [], "slower": []}
    for row in best.values():
        kinds[verdict(row)].append(row)
    texts = []
    for kind, rows in kinds.items():
        if rows:
            ratios = dict.fromkeys(ratio(value) for value in sorted(row["ratio"] for row in rows))
            span = " to ".join(dict.fromkeys((next(iter(ratios)), next(reversed(ratios)))))
            rivals = ", ".join(dict.fromkeys(escape(row["peer"]) for row in rows))
            words = {"faster": "faster", "equal": "level", "slower": "<em>slower</em>"}[kind]
            texts.append(
                f"{words} at k = {spans([k for row in rows for k in widths_of(row)])} (ratio {span}; {rivals})"
            )
    return f"{title}: beside the fastest other peer, <strong>{escape(base)}</strong> is {', '.join(texts)}."


def not_measured(rows: Sequence[dict]) -> str:
    """A table of the peers that could not be measured, where and why."""
    every = {str(row["heads"]) for row in rows}
    lines = []
    for (peer, status, reason), group in missing(rows).items():
        at = {str(row["heads"]) for row in group}
        tasks = dict.fromkeys(row["task"].replace("_", " + ") for row in group)
        where = "" if at == every else f" at k = {spans([k for row in group for k in widths_of(row)])}"
        where += f" ({', '.join(tasks)})" if len({row["task"] for row in rows}) > 1 else ""
        text = f"<strong>{escape(status)}</strong>{escape(where)}: {escape(reason)}"
        lines.append(line(peer, [cell(text, kind="text")]))
    return table("Not measured", ["peer", "why"], ["\n".join(lines)], "reasons") if lines else ""


def peers_told(rows: Sequence[dict]) -> str:
    """A table of what every peer is, with its version."""
    told = {row["peer"]: row for row in rows}
    lines = []
    for name, row in told.items():
        version = f" ({row['peer_version']})" if row["peer_version"] else ""
        lines.append(line(name, [cell(escape(f"{row['about'] or ''}{version}"), kind="text")]))
    return table("The peers", ["peer", "what it is"], ["\n".join(lines)], "reasons")


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""
