"""``python -m bench.report.page FILE.json``: one self-contained HTML page of a run's results."""

from __future__ import annotations

import argparse
import re
import string
import sys
from html import escape
from pathlib import Path

from bench.report import plot
from bench.report.markup import (
    best_cell,
    block_title,
    cell,
    columns,
    figure,
    figures,
    kind_of,
    line,
    matrix,
    mean_ratios,
    measured_of,
    not_measured,
    peers_of,
    peers_told,
    ratio_cell,
    sentence,
    table,
    time_cell,
)
from bench.report.plot import Point
from bench.report.wording import about, machine, number, ratio, spans
from bench.rows import baseline, grouped, read_results, stand_ins, strongest, widths_of

# Parameters of the full models with 1000 classes; memory is also given as a multiple of them.
PARAMETERS = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632}
_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
_CONDITIONS = ("config", "dtype", "batch", "cache", "launch")
_SWITCHING = "Calls with another width every time, beside as many calls of the same widths one after the other."
_MIXED = """One batch whose images have the widths in turn. The extra cost is over their shares: the time of a whole
batch of one width, by its number of images. A peer that cannot mix widths runs the images of each as a batch of their
own."""
_BLOCKS = ("attention", "mlp", "attention_backward", "mlp_backward")


def page(path: Path) -> str:
    """The HTML of a result file. Raises ``ValueError`` or ``OSError`` for any other file."""
    environment, rows = read_results(path)
    run = _Run(environment, rows)
    run.write()
    links = "".join(f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in run.headings.items())
    here = Path(__file__)
    template = string.Template(here.with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"hydravit benchmark: {environment.get('name') or 'unnamed machine'}"),
        style=here.with_suffix(".css").read_text(encoding="utf-8"),
        links=links,
        body="\n".join(run.parts),
    )


class _Run:
    """The page's parts: the run's machine and verdict, then a section per task."""

    def __init__(self, environment: dict, rows: list[dict]):
        self.environment, self.rows = environment, rows
        self.base = baseline(rows)
        self.configs = len({row["config"] for row in rows}) > 1
        self.headings: dict[str, str] = {}  # by id
        self.parts: list[str] = []

    def write(self) -> None:
        pairs = "".join(f"<dt>{label}</dt><dd>{escape(text)}</dd>" for label, text in machine(self.environment))
        self._add(f"<dl>{pairs}</dl>", self._ours())
        self._headline()
        for group in grouped(self._of("inference"), "task", *_CONDITIONS).values():
            self._curves(group)
        self._blocks()
        self._training()
        self._differing("switching", "Switching the width", _SWITCHING)
        self._differing("mixed", "Widths that differ within a batch", _MIXED)
        self._memory()
        self._by_width("copies", "Weight bytes copied by a call")
        self._by_width("training_memory", "The most memory that a training step needs, weights and optimizer included")
        self._preparation()
        if self.rows:
            self._heading("Who was measured")
            self._add(peers_told(self.rows))

    def _add(self, *parts: str) -> None:
        self.parts.extend(part for part in parts if part)

    def _heading(self, text: str) -> None:
        name = "-".join(re.findall("[a-z0-9]+", text.lower()))
        self.headings[name] = text
        self._add(f'<h2 id="{name}">{escape(text)}</h2>')

    def _of(self, *tasks: str) -> list[dict]:
        return [row for row in self.rows if row["task"] in tasks]

    def _base(self, group: list[dict]) -> str | None:
        """The peer to which the group's ratios are; chosen among all ways to launch, as the run does."""
        alike = [column for column in ("task", *_CONDITIONS) if column != "launch"]
        return baseline(row for row in self.rows if all(row[c] == group[0][c] for c in alike))

    def _title(self, row: dict, *, task: bool = True) -> str:
        title = about(row, task=task, configs=self.configs)
        return title[0].upper() + title[1:]

    def _ours(self) -> str:
        names = dict.fromkeys(row["peer"] for row in self.rows if row["ours"])
        if not names:
            return "<p>No peer of ours is in these results.</p>"
        listed = ", ".join(escape(name) for name in names)
        if self.base is None:
            return f"<p>Ours, backends of this repository: {listed}. <strong>None of them was measured.</strong></p>"
        return (
            f"<p>Ours, backends of this repository: {listed}. The others are held against "
            f"<strong>{escape(self.base)}</strong>, or against the first of ours that runs where it does not.</p>"
        )

    def _headline(self) -> None:
        warm = [row for row in self._of("inference") if row["cache"] == "warm"]
        if not warm:
            return
        self._heading("Ours against the strongest other peer")
        sentences, lines, shown = [], [], columns(warm)
        series: dict[str, dict[str, list[Point]]] = {}  # a figure per dtype and launch, a line per batch
        for group in grouped(warm, *_CONDITIONS).values():
            best = {heads: strongest(rows) for (heads,), rows in grouped(group, "heads").items()}
            best = {heads: row for heads, row in best.items() if row is not None and row["ratio"] is not None}
            title = self._title(group[0], task=False)
            base = self._base(group)
            plain = " (ours: plain calls)" if stand_ins(self.rows, group, base) else ""
            sentences.append(sentence(title + plain, best, base))
            if best:
                lines.append(line(title, [best_cell(best.get(column.heads)) for column in shown]))
                batch, _, others = title.partition(", ")
                points = [_ratio_point(row) for _, row in sorted(best.items(), key=lambda item: int(item[0]))]
                series.setdefault(others, {})[batch] = points
        self._add('<ul class="lead">', *(f"<li>{text}</li>" for text in sentences), "</ul>")
        if lines:
            caption = "Time of the fastest other peer relative to ours"
            parts = []
            for others, by_batch in series.items():
                svg = plot.against_strongest(by_batch, label=f"{caption}, {others}")
                note = "time of the fastest other peer relative to ours, log scale; with p20 to p80"
                parts.append(figure(f"Inference, {others}:", note, svg))
            self._add(figures(*parts))
            self._add(
                table(f"{caption}: inference, warm caches", ["workload", *(c.title for c in shown)], ["\n".join(lines)])
            )

    def _curves(self, rows: list[dict]) -> None:
        """Inference under one set of conditions: three figures, the table, and the peers that are missing."""
        title, base, every = self._title(rows[0]), self._base(rows), rows
        self._heading(title)
        rows = self._with_ours(rows)
        measured = [row for row in rows if row["status"] == "measured"]
        look = plot.styles(self.rows, base)
        parts = []
        for caption, note, point, options in (
            ("Latency of a call", "ms, log scale; lower is better", _time_point, {}),
            (f"Time relative to {base}", "log scale; above 1 ours is faster", _ratio_point, {"one": True}),
            ("Share of the machine’s limit", "percent; higher is better", _share_point, {"log": False}),
        ):
            series = {}
            for name in peers_of(rows, base):
                own = sorted((row for row in measured if row["peer"] == name), key=widths_of)
                if name == base and point is _ratio_point:
                    series[name] = [Point(k, 1.0, 1.0, 1.0) for row in own for k in widths_of(row)]
                    continue
                series[name] = [found for found in map(point, own) if found is not None]
            if sum(map(len, series.values())) > len(measured[:1]):
                label = f"{title}: {caption}"
                parts.append(figure(caption, note, plot.curves(series, look, label=label, **options)))
        self._add(figures(*parts), matrix(title, rows, base), not_measured(every), self._elsewhere(rows, base))

    def _with_ours(self, rows: list[dict]) -> list[dict]:
        """``rows``; if ours cannot be launched likewise, with its plain calls, to which the ratios are."""
        base = self._base(rows)
        own = stand_ins(self.rows, rows, base)
        if not own:
            return rows
        self._add(f"<p>{escape(base)} cannot be launched like this: its plain calls stand in for it.</p>")
        return own + [row for row in rows if row["peer"] != base]

    @staticmethod
    def _elsewhere(rows: list[dict], base: str | None) -> str:
        """Tells the reader where the ratios are to another of ours, because ``base`` has no time there."""
        lost = [row for row in rows if row["ratio"] is not None and not row["ours"]]
        own = {row["heads"] for row in rows if row["peer"] == base and row["status"] == "measured"}
        lost = [k for row in lost if row["heads"] not in own for k in widths_of(row)]
        if not lost:
            return ""
        name = escape(base or "ours")
        return f"<p>At k = {spans(lost)} {name} has no time here: ratios are to another of ours.</p>"

    def _blocks(self) -> None:
        rows = self._of(*_BLOCKS)
        if rows:
            self._heading("Blocks")
        for group in grouped(rows, *_CONDITIONS).values():
            conditions = self._title(group[0], task=False)
            self._add(f"<h3>{escape(conditions)}</h3>")
            tasks = {row["task"]: [other for other in group if other["task"] == row["task"]] for row in group}
            titles = {task: block_title(task) for task in tasks}
            self._add(figures(*(self._mean_bars(titles[task], own, conditions) for task, own in tasks.items())))
            for task, own in tasks.items():
                caption = f"{titles[task]}; {about(own[0], task=False)}"
                self._add(matrix(caption, self._with_ours(own), self._base(own)))
            self._add(not_measured(group))

    def _mean_bars(self, title: str, rows: list[dict], conditions: str) -> str:
        base = self._base(rows)
        means = mean_ratios([*rows, *stand_ins(self.rows, rows, base)], base)
        if len(means) < 2:
            return ""
        values = dict(sorted(means.items(), key=lambda item: item[1]))
        texts = {name: ratio(value) for name, value in values.items()}
        look = plot.styles(self.rows, base)
        label = f"{', '.join(filter(None, (title, conditions)))}: mean time relative to {base}"
        svg = plot.bars(values, look, texts, one=True, label=label)
        return figure(title, f"mean time over the widths, {base} = 1; longer is slower", svg)

    def _training(self) -> None:
        rows = self._of("training")
        if not rows:
            return
        self._heading("Training")
        self._add("<p>One step: forward, backward and AdamW on all parameters, unless a peer says otherwise.</p>")
        groups = list(grouped(rows, *_CONDITIONS).values())
        bars = [self._mean_bars(self._title(own[0]), own, "") for own in groups]
        self._add(figures(*bars))
        for own in groups:
            self._add(matrix(self._title(own[0]), self._with_ours(own), self._base(own)), not_measured(own))

    def _differing(self, task: str, heading: str, text: str) -> None:
        rows = self._of(task)
        if rows:
            self._heading(heading)
            self._add(f"<p>{text}</p>")
        for group in grouped(rows, *_CONDITIONS).values():
            base = self._base(group)
            lines = []
            for row in measured_of(group, base):
                cost = "–" if row["switch_cost"] is None else f"{100 * row['switch_cost']:+.1f} %"
                cells = [cell(cost.replace("-", "−")), time_cell(row), ratio_cell(row)]
                lines.append(line(row["peer"], cells, kind_of(row["peer"], group, base)))
            head = ["peer", "extra cost", "median, ms", f"time relative to {base}"]
            self._listed(self._title(group[0]), head, lines, group)

    def _memory(self) -> None:
        rows = self._of("memory")
        if rows:
            self._heading("Memory to hold all widths ready")
        for group in grouped(rows, *_CONDITIONS).values():
            base = self._base(group)
            first, measured = group[0], measured_of(group, base)
            full = PARAMETERS.get(first["config"], 0) * _BYTES.get(first["dtype"], 0)
            ready = f"k = {spans(widths_of(first))} held ready, {first['dtype']}"
            alone = f"; the full model’s weights alone are {full / 1e6:.0f} MB" if full else ""
            self._add(f"<p>Everything a process holds, weights included{alone}.</p>")
            if len(measured) > 1:
                values = {row["peer"]: row["bytes"] / 1e6 for row in measured}
                texts = {name: f"{value:.0f}" for name, value in values.items()}
                label = f"Memory: {ready}, MB"
                svg = plot.bars(values, plot.styles(self.rows, base), texts, label=label)
                self._add(figures(figure("Memory held", f"MB, {ready}; shorter is better", svg)))
            lines = []
            for row in measured:
                times = f"{row['bytes'] / full:.2f}" if full else "–"
                cells = [cell(number(row["bytes"] / 1e6)), cell(times)]
                lines.append(line(row["peer"], cells, kind_of(row["peer"], group, base)))
            self._listed(f"Memory: {ready}", ["peer", "MB", "relative to the full model’s weights"], lines, group)

    def _by_width(self, task: str, heading: str) -> None:
        rows = self._of(task)
        if rows:
            self._heading(heading)
        for group in grouped(rows, *_CONDITIONS).values():
            base = self._base(group)
            found = {(row["peer"], row["heads"]): row["bytes"] for row in group if row["status"] == "measured"}
            lines = []
            for name in peers_of(group, base):
                sizes = [found.get((name, column.heads)) for column in columns(group)]
                cells = [cell("–" if size is None else number(size / 1e6)) for size in sizes]
                lines.append(line(name, cells, kind_of(name, group, base)))
            head = ["peer", *(column.title for column in columns(group))]
            self._listed(f"{self._title(group[0])}: MB", head, lines, group)

    def _listed(self, caption: str, head: list[str], lines: list[str], rows: list[dict]) -> None:
        nothing = f"<p>{escape(caption)}: nothing was measured.</p>"
        self._add(table(caption, head, ["\n".join(lines)]) if lines else nothing, not_measured(rows))

    def _preparation(self) -> None:
        rows = [row for row in self.rows if row["prepare_s"] is not None]
        if not rows:
            return
        self._heading("Preparation")
        text = "Compiling, exporting, packing; where earlier runs left a cache, loading. Not part of any time above."
        self._add(f"<p>{text}</p>")
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        lines = []
        for name in peers_of(rows, self.base):
            group = [row for row in rows if row["peer"] == name]
            spent = {task: [row["prepare_s"] for row in group if row["task"] == task] for task in tasks}
            cells = []
            for seconds in spent.values():
                longest = f"longest {number(max(seconds))}" if max(seconds, default=0) > min(seconds, default=0) else ""
                cells.append(cell(number(sum(seconds) / len(seconds)), longest) if seconds else cell("–", kind="none"))
            lines.append(line(name, cells, kind_of(name, group, self.base)))
        head = ["peer", *(task.replace("_", " + ") for task in tasks)]
        self._add(table("Seconds to prepare one workload, on average", head, ["\n".join(lines)]))


def _time_point(row: dict) -> Point:
    return _point(row, row["p50_ms"], row["p20_ms"], row["p80_ms"])


def _ratio_point(row: dict) -> Point | None:
    return None if row["ratio"] is None else _point(row, row["ratio"], row["ratio_p20"], row["ratio_p80"])


def _share_point(row: dict) -> Point | None:
    if row["share"] is None:
        return None
    return _point(row, *(100 * row["share"] * row["p50_ms"] / row[column] for column in ("p50_ms", "p80_ms", "p20_ms")))


def _point(row: dict, middle: float, low: float, high: float) -> Point:
    low, high = (middle if value is None else value for value in (low, high))
    return Point(widths_of(row)[0], middle, low, high, bool(row["noisy"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.page", description="One self-contained HTML page.")
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside the file, with .html")
    args = parser.parse_args()
    out = args.out or args.file.with_suffix(".html")
    try:
        out.write_text(page(args.file), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("wrote", out)


if __name__ == "__main__":
    main()
