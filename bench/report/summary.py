"""``python -m bench.report.summary FILE.json``: a run's results as text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from bench.report.wording import STATUSES, about, command, machine, missing, number, percent, ratio, telling, verdict
from bench.rows import baseline, grouped, read_results, strongest, widths_of

_COLUMNS = 100
_TASKS = {
    "switching": "another width in every call costs",
    "mixed": "a batch of differing widths, ms, and what it costs more than its images' shares",
    "memory": "memory to hold all widths, weights included",
    "copies": "weight bytes copied by a call",
    "training": "training step, ms",
    "training_memory": "most memory of a training step, all included",
}


def summary(environment: dict, rows: list[dict]) -> str:
    """A short account of a run: at most 100 columns and about 40 lines."""
    ours = baseline(rows)
    lines = [*_wrapped("; ".join(f"{label} {text}" for label, text in machine(environment))), ""]
    if ours is None:
        lines.append("Nothing of ours was measured.")
    else:
        lines += [f"ours: {ours}; ratio: a peer's time by ours, above 1 ours is faster; * noisy; = within the noise"]
        lines += _inference([row for row in rows if row["task"] == "inference"], ours)
        for task, label in _TASKS.items():
            of_task = [row for row in rows if row["task"] == task]
            for group in grouped(of_task, "config", "dtype", "batch", "launch").values():
                conditions = about(group[0], task=False, configs=True)
                lines += _wrapped(f"{label} ({conditions}): {_ends(task, group) or 'nothing measured'}")
    measured = [row for row in rows if row["status"] == "measured"]
    counts = [f"{len(measured)} rows measured", f"{sum(bool(row['noisy']) for row in measured)} of them noisy"]
    counts += [f"{sum(row['status'] == status for row in rows)} {status}" for status in STATUSES]
    told = [f"  {peer} {status} ({len(group)}): {why}" for (peer, status, why), group in missing(rows).items()]
    if len(told) > 10:
        told[9:] = [f"  and {len(told) - 9} more reasons"]
    told = [text if len(text) <= _COLUMNS else f"{text[: _COLUMNS - 4]} ..." for text in told]
    return "\n".join([*lines, "", ", ".join(counts), *told])


def line(rows: Sequence[dict]) -> str:
    """One workload's rows in one line, while a run goes on: every peer's time, ours first, with its ratio."""
    if not rows:
        return "no rows"
    base = baseline(rows)
    measured = sorted((row for row in rows if row["status"] == "measured"), key=lambda row: row["peer"] != base)
    told = [f"{row['peer']} {_told(row['task'], row)}" for row in measured]
    told += [f"{row['peer']} {row['status']}" for row in rows if row["status"] in ("refused", "failed")]
    conditions = about(rows[0], task=False)
    return f"{rows[0]['task']} k={rows[0]['heads']} {conditions}: {', '.join(told) or 'nothing measured'}"


def _inference(rows: list[dict], ours: str) -> list[str]:
    """Ours and the fastest other peer, at up to three widths of all conditions."""
    rows = [row for row in rows if row["status"] == "measured"]
    widths = telling([int(row["heads"]) for row in rows]) if rows else []
    form = "{:28.28} {:>3} {:>9} {:>6}  {:18.18} {:>9} {:>6}"
    lines = [form.format("inference", "k", "ours ms", "limit", "fastest other", "ms", "ratio")] if rows else []
    for group in grouped(rows, "config", "dtype", "batch", "cache", "launch").values():
        for k in widths:
            at_width = [row for row in group if row["heads"] == str(k)]
            own, best = next((row for row in at_width if row["peer"] == ours), None), strongest(at_width)
            ratio_text = "-"
            if best and best["ratio"] is not None:
                ratio_text = ratio(best["ratio"]) + ("=" if verdict(best) == "equal" else "")
            share, name = percent(own["share"]) if own else "-", best["peer"] if best else "-"
            title = about(group[0], task=False, configs=True)
            lines.append(form.format(title, k, _time(own), share, name, _time(best), ratio_text))
    return lines


def _ends(task: str, rows: list[dict]) -> str:
    """Every peer under one set of conditions; of several widths the narrowest and the widest."""
    found = []
    for (peer,), group in grouped([row for row in rows if row["status"] == "measured"], "peer").items():
        single = sorted((row for row in group if len(widths_of(row)) == 1), key=widths_of)
        ends = [_told(task, row) for row in (single[:1] + single[-1:] or group[:1])]
        found.append(f"{peer} {' to '.join(dict.fromkeys(ends))}".replace(" ", "\u00a0"))
    return "; ".join(found)


def _told(task: str, row: dict) -> str:
    cost = "" if row["switch_cost"] is None else f"{round(100 * row['switch_cost']) + 0:+d} %"
    if task == "switching":
        return cost or "-"
    if task == "mixed" and cost:
        return f"{_time(row)} ({cost})"
    if row["bytes"] is not None:
        return f"{number(row['bytes'] / 1e6)} MB"
    return _time(row) + (f" ({ratio(row['ratio'])})" if row["ratio"] is not None else "")


def _time(row: dict | None) -> str:
    return "-" if row is None else number(row["p50_ms"]) + ("*" if row["noisy"] else "")


def _wrapped(text: str) -> list[str]:
    return [
        part.replace("\u00a0", " ")
        for part in textwrap.wrap(text, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
    ]


if __name__ == "__main__":
    command("summary", "Results as text.", lambda path: print(summary(*read_results(path))))
