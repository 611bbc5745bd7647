"""``python -m bench.report.summary FILE.json``: a run's results as text for the terminal."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from bench.report.wording import STATUSES, about, machine, missing, number, percent, ratio, short, telling, verdict
from bench.rows import baseline, grouped, read_results, strongest, widths_of

_COLUMNS = 100
_MOST_LINES = 24  # of workloads; beyond, three widths or two stand for all
_MOST_LETTERS = 18  # of a peer's name


def summary(environment: dict, rows: list[dict]) -> str:
    """A short account of a run: at most 100 columns and about 40 lines."""
    ours = baseline(rows)
    head = "; ".join(f"{label} {text}" if label != "processor" else text for label, text in machine(environment))
    lines = [*_wrapped(head), ""]
    if ours is None:
        lines.append("Nothing of ours was measured.")
    else:
        lines += [f"ours: {ours}; ratio: a peer's time by ours, above 1 ours is faster; * noisy; = within the noise"]
        lines += _inference(rows, ours)
        for task in ("switching", "mixed", "memory", "copies", "training", "training_memory"):
            of_task = [row for row in rows if row["task"] == task]
            for group in grouped(of_task, "config", "dtype", "batch", "launch").values():
                lines += _wrapped(_one_line(task, group))
    return "\n".join([*lines, *_counts(rows)])


def line(rows: Sequence[dict]) -> str:
    """One workload's rows in one line, while a run goes on: every peer's time, ours first, with its ratio."""
    if not rows:
        return "no rows"
    base = baseline(rows)
    measured = sorted((row for row in rows if row["status"] == "measured"), key=lambda row: row["peer"] != base)
    told = [f"{_name(row['peer'])} {_told(row['task'], row)}" for row in measured]
    told += [f"{_name(row['peer'])} {row['status']}" for row in rows if row["status"] in ("refused", "failed")]
    conditions = about(rows[0], task=False)
    return f"{rows[0]['task']} k={rows[0]['heads']} {conditions}: {', '.join(told) or 'nothing measured'}"


def _inference(rows: list[dict], ours: str) -> list[str]:
    rows = [row for row in rows if row["task"] == "inference"]
    conditions = ("config", "dtype", "batch", "cache", "launch")
    rows = [row for group in grouped(rows, *conditions).values() for row in sorted(group, key=widths_of)]
    workloads = grouped(rows, *conditions, "heads")
    workloads = {key: group for key, group in workloads.items() if any(row["status"] == "measured" for row in group)}
    every = sorted(widths_of(group[0])[0] for group in workloads.values())
    choices = (set(every), telling(every), every[:1] + every[-1:]) if every else ((),)
    widths = next((w for w in choices if sum(k in w for k in every) <= _MOST_LINES), choices[-1])
    configs = len({row["config"] for row in rows}) > 1
    named = [name for name in ("views", "authors") if any(row["peer"] == name for row in rows)]
    table = [["inference", "k", "ours ms", "limit", "fastest other", "ms", "ratio", *named]]
    for group in workloads.values():
        if widths_of(group[0])[0] not in widths:
            continue
        measured = {row["peer"]: row for row in group if row["status"] == "measured"}
        own, best = measured.get(ours), strongest(group)
        title = about(group[0], task=False, configs=configs)
        cells = [title, group[0]["heads"], _time(own), percent(own["share"]) if own else "-"]
        cells += [_name(best["peer"]) if best else "-", _time(best), _ratio(best)]
        table.append([str(cell) for cell in [*cells, *(_ratio(measured.get(name)) for name in named)]])
    for above, row in zip(reversed(table[:-1]), reversed(table[1:]), strict=True):
        row[0] = "" if row[0] == above[0] else row[0]
    return _aligned(table) if len(table) > 1 else []


def _one_line(task: str, rows: list[dict]) -> str:
    """Every peer under one set of conditions; of several widths the narrowest and the widest."""
    found = []
    for (peer,), group in grouped(rows, "peer").items():
        group = [row for row in group if row["status"] == "measured"]
        alone = sorted((row for row in group if len(widths_of(row)) == 1), key=widths_of)
        ends = [_told(task, row) for row in ([alone[0], alone[-1]] if alone else group[:1])]
        if ends:
            found.append(f"{_name(peer)} {' to '.join(dict.fromkeys(ends))}".replace(" ", "\u00a0"))
    labels = {
        "switching": "another width in every call costs",
        "mixed": "a batch of differing widths, ms, and what it costs more than its images' shares",
        "memory": "memory to hold all widths, weights included",
        "copies": "weight bytes copied by a call",
        "training": "training step, ms",
        "training_memory": "most memory of a training step, all included",
    }
    conditions = about(rows[0], task=False, configs=True)
    return f"{labels[task]} ({conditions}): {'; '.join(found) or 'nothing measured'}"


def _told(task: str, row: dict) -> str:
    if task == "switching":
        return "-" if row.get("switch_cost") is None else f"{round(100 * row['switch_cost']) + 0:+d} %"
    if task == "mixed" and row.get("switch_cost") is not None:
        return f"{_time(row)} ({round(100 * row['switch_cost']) + 0:+d} %)"
    if task in ("memory", "training_memory", "copies"):
        return "-" if row.get("bytes") is None else f"{number(row['bytes'] / 1e6)} MB"
    return _time(row) + (f" ({ratio(row['ratio'])})" if row.get("ratio") is not None else "")


def _counts(rows: list[dict]) -> list[str]:
    measured = [row for row in rows if row["status"] == "measured"]
    counts = [f"{len(measured)} rows measured", f"{sum(bool(row['noisy']) for row in measured)} of them noisy"]
    counts += [f"{sum(row['status'] == status for row in rows)} {status}" for status in STATUSES]
    lines = ["", ", ".join(counts)]
    for (peer, status, reason), group in missing(rows).items():
        text = f"  {_name(peer)} {status} ({len(group)}): {reason}"
        lines.append(textwrap.shorten(text, _COLUMNS, placeholder=" ..."))
    if len(lines) > 12:
        lines[11:] = [f"  and {len(lines) - 11} more reasons"]
    return lines


def _time(row: dict | None) -> str:
    return "-" if row is None else number(row["p50_ms"]) + ("*" if row["noisy"] else "")


def _ratio(row: dict | None) -> str:
    if row is None or row["ratio"] is None:
        return "-"
    return ratio(row["ratio"]) + ("=" if verdict(row) == "equal" else "")


def _name(peer: str) -> str:
    return short(peer, _MOST_LETTERS)


def _wrapped(text: str) -> list[str]:
    return [part.replace("\u00a0", " ") for part in textwrap.wrap(text, _COLUMNS, subsequent_indent="  ")]


def _aligned(table: list[list[str]]) -> list[str]:
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(sizes[0]), *map(str.rjust, row[1:], sizes[1:])])[:_COLUMNS] for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report.summary", description="Results as text.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    try:
        print("\n\n".join(summary(*read_results(path)) for path in parser.parse_args().files))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
