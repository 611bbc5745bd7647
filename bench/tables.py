"""What a run found, in words and numbers: for the terminal, and the wording that the page shares with it."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import results

STATUSES = ("absent", "refused", "failed", "skipped")  # all but measured
_COLUMNS = 100
_MOST_LINES = 24  # of workloads; beyond, three widths or two stand for all


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent: "0.123", "12.3", "1235"; "-" for what there is none of."""
    if value is None:
        return "-"
    if not value:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def telling(widths: Sequence[int]) -> list[int]:
    """Three widths that stand for all: 3, 6 and 12 where they are, else the ends and the middle."""
    widths = sorted(set(widths))
    chosen = (3, 6, 12) if {3, 6, 12} <= set(widths) else (widths[0], widths[(len(widths) - 1) // 2], widths[-1])
    return list(dict.fromkeys(chosen))


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def verdict(row: dict) -> str:
    """A word for the row's ratio: who is faster, unless the spread holds both."""
    low, high = row.get("ratio_p20"), row.get("ratio_p80")
    if low is not None and high is not None and low <= 1 <= high:
        return "equal"
    return "faster" if row["ratio"] > 1 else "slower"


def about(row: dict, *, task: bool = True, configs: bool = False) -> str:
    """A workload without its width, as a title."""
    parts = [f"batch {row['batch']}", row["dtype"]]
    parts += [row["config"]] if configs else []
    parts += ["cold caches"] if row["cache"] == "cold" else []
    parts += [{"graph": "CUDA graph"}.get(row["launch"], row["launch"])] if row["launch"] != "call" else []
    return ", ".join(([row["task"].replace("_", " + ")] if task else []) + parts)


def machine(environment: dict) -> list[tuple[str, str]]:
    """The environment as pairs for a reader; what was not recorded is left out."""
    get = environment.get
    clocks, peaks = get("clock_mhz"), get("peak_gflops")
    if isinstance(clocks, (list, tuple)):
        clocks = " to ".join(dict.fromkeys(f"{clock:.0f}" for clock in clocks))
    if isinstance(peaks, dict):
        peaks = ", ".join(f"{number(value)} {dtype}" for dtype, value in peaks.items())
    bandwidth = get("bandwidth_gb_s")
    cpu = get("cpu") if get("cpu") != get("name") else None
    pairs = {
        "processor": get("name"),
        "host": cpu,
        "threads": get("threads"),
        "clocks": f"{clocks} MHz" if clocks else None,
        "peak": f"{peaks} GFLOP/s" if peaks else None,
        "bandwidth": f"{number(bandwidth) if isinstance(bandwidth, (int, float)) else bandwidth} GB/s"
        if bandwidth
        else None,
        "torch": get("torch"),
        "Python": get("python"),
        "system": get("system"),
        "commit": get("commit"),
        "date": get("date"),
    }
    return [(label, str(value)) for label, value in pairs.items() if value not in (None, "")]


def missing(rows: Iterable[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """Rows without a measurement by (peer, status, reason); a refusal's reason ends with its error and the budget."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if row["status"] != "measured":
            reason = " ".join(str(row.get("reason") or "no reason was recorded").split())
            if row["status"] == "refused" and row.get("error") is not None and row.get("allowed") is not None:
                reason += f" (error {row['error']:.1e}, allowed {row['allowed']:.1e})"
            groups.setdefault((row["peer"], row["status"], reason), []).append(row)
    return groups


def spans(numbers: Sequence[int]) -> str:
    """ "3-5, 8" for 3, 4, 5, 8."""
    runs: list[list[int]] = []
    for value in sorted(set(numbers)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def summary(environment: dict, rows: list[dict]) -> str:
    """A short account of a run: at most 100 columns and about 40 lines."""
    ours = results.baseline(rows)
    head = "; ".join(f"{label} {text}" if label != "processor" else text for label, text in machine(environment))
    lines = [*_wrapped(head), ""]
    if ours is None:
        lines.append("Nothing of ours was measured.")
    else:
        lines += [f"ours: {ours}; ratio: a peer's time by ours, above 1 ours is faster; * noisy; = within the noise"]
        lines += _inference(rows, ours)
        for task in ("switching", "mixed", "memory", "copies", "training", "training_memory"):
            of_task = [row for row in rows if row["task"] == task]
            for group in results.grouped(of_task, "config", "dtype", "batch", "launch").values():
                lines += _wrapped(_one_line(task, group))
    return "\n".join([*lines, *_counts(rows)])


def line(rows: Sequence[dict]) -> str:
    """One workload's rows in one line, as a run goes on: everybody's time, ours first, with its ratio."""
    if not rows:
        return "no rows"
    base = results.baseline(rows)
    measured = sorted((row for row in rows if row["status"] == "measured"), key=lambda row: row["peer"] != base)
    told = [f"{_short(row['peer'])} {_told(row['task'], row)}" for row in measured]
    told += [f"{_short(row['peer'])} {row['status']}" for row in rows if row["status"] in ("refused", "failed")]
    return (
        f"{rows[0]['task']} k={rows[0]['heads']} {about(rows[0], task=False)}: {', '.join(told) or 'nothing measured'}"
    )


def _inference(rows: list[dict], ours: str) -> list[str]:
    rows = [row for row in rows if row["task"] == "inference"]
    conditions = ("config", "dtype", "batch", "cache", "launch")
    rows = [row for group in results.grouped(rows, *conditions).values() for row in sorted(group, key=results.widths)]
    workloads = results.grouped(rows, *conditions, "heads")
    workloads = {key: group for key, group in workloads.items() if any(row["status"] == "measured" for row in group)}
    every = sorted(results.widths(group[0])[0] for group in workloads.values())
    choices = (set(every), telling(every), every[:1] + every[-1:]) if every else ((),)
    widths = next((w for w in choices if sum(k in w for k in every) <= _MOST_LINES), choices[-1])
    configs = len({row["config"] for row in rows}) > 1
    named = [name for name in ("views", "authors") if any(row["peer"] == name for row in rows)]
    table = [["inference", "k", "ours ms", "limit", "fastest other", "ms", "ratio", *named]]
    for group in workloads.values():
        if results.widths(group[0])[0] not in widths:
            continue
        measured = {row["peer"]: row for row in group if row["status"] == "measured"}
        own, best = measured.get(ours), results.strongest(group)
        title = about(group[0], task=False, configs=configs)
        cells = [title, group[0]["heads"], _time(own), percent(own["share"]) if own else "-"]
        cells += [_short(best["peer"]) if best else "-", _time(best), _ratio(best)]
        table.append([str(cell) for cell in [*cells, *(_ratio(measured.get(name)) for name in named)]])
    for above, row in zip(reversed(table[:-1]), reversed(table[1:]), strict=True):
        row[0] = "" if row[0] == above[0] else row[0]
    return _aligned(table) if len(table) > 1 else []


def _one_line(task: str, rows: list[dict]) -> str:
    """What one set of conditions tells of every peer; of several widths the narrowest and the widest."""
    found = []
    for (peer,), group in results.grouped(rows, "peer").items():
        group = [row for row in group if row["status"] == "measured"]
        alone = sorted((row for row in group if len(results.widths(row)) == 1), key=results.widths)
        ends = [_told(task, row) for row in ([alone[0], alone[-1]] if alone else group[:1])]
        if ends:
            found.append(f"{_short(peer)} {' to '.join(dict.fromkeys(ends))}".replace(" ", "\u00a0"))
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
        lines.append(
            textwrap.shorten(f"  {_short(peer)} {status} ({len(group)}): {reason}", _COLUMNS, placeholder=" ...")
        )
    if len(lines) > 12:
        lines[11:] = [f"  and {len(lines) - 11} more reasons"]
    return lines


def _time(row: dict | None) -> str:
    return "-" if row is None else number(row["p50_ms"]) + ("*" if row["noisy"] else "")


def _ratio(row: dict | None) -> str:
    if row is None or row["ratio"] is None:
        return "-"
    return ratio(row["ratio"]) + ("=" if verdict(row) == "equal" else "")


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."


def _wrapped(text: str) -> list[str]:
    return [part.replace("\u00a0", " ") for part in textwrap.wrap(text, _COLUMNS, subsequent_indent="  ")]


def _aligned(table: list[list[str]]) -> list[str]:
    sizes = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(sizes[0]), *map(str.rjust, row[1:], sizes[1:])])[:_COLUMNS] for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    try:
        print("\n\n".join(summary(*results.read(path)) for path in parser.parse_args().files))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
