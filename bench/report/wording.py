"""Numbers and words of results, which the terminal, the figures and the page share."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

STATUSES = ("absent", "refused", "failed", "skipped")  # all but measured


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never an exponent: "0.123", "12.3", "1235"; "-" for None."""
    if value is None:
        return "-"
    if not value:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def spans(numbers: Sequence[int]) -> str:
    """ "3-5, 8" for 3, 4, 5, 8."""
    runs: list[list[int]] = []
    for value in sorted(set(numbers)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def telling(widths: Sequence[int]) -> list[int]:
    """Three widths that stand for all: 3, 6 and 12 if all of them are there, else the ends and the middle."""
    widths = sorted(set(widths))
    chosen = (3, 6, 12) if {3, 6, 12} <= set(widths) else (widths[0], widths[(len(widths) - 1) // 2], widths[-1])
    return list(dict.fromkeys(chosen))


def verdict(row: dict) -> str:
    """The row's ratio as a word: "faster" or "slower" is ours; "equal" if the spread holds both."""
    low, high = row.get("ratio_p20"), row.get("ratio_p80")
    if low is not None and high is not None and low <= 1 <= high:
        return "equal"
    return "faster" if row["ratio"] > 1 else "slower"


def about(row: dict, *, task: bool = True, configs: bool = False) -> str:
    """A title of the row's workload without its width."""
    parts = [f"batch {row['batch']}", row["dtype"]]
    parts += [row["config"]] if configs else []
    parts += ["cold caches"] if row["cache"] == "cold" else []
    parts += [{"graph": "CUDA graph"}.get(row["launch"], row["launch"])] if row["launch"] != "call" else []
    return ", ".join(([row["task"].replace("_", " + ")] if task else []) + parts)


def machine(environment: dict) -> list[tuple[str, str]]:
    """The environment as pairs of label and text, without what was not recorded."""
    peaks = {dtype: number(value) for dtype, value in (environment.get("peak_gflops") or {}).items()}
    facts = {
        **environment,
        "host": environment.get("cpu") if environment.get("cpu") != environment.get("name") else None,
        "peak_gflops": ", ".join(f"{value} {dtype}" for dtype, value in peaks.items()),
    }
    labels = {
        **{"name": "processor", "host": "host", "threads": "threads", "clock_mhz": "clocks, MHz"},
        **{"peak_gflops": "peak, GFLOP/s", "bandwidth_gb_s": "bandwidth, GB/s", "torch": "torch", "python": "Python"},
        **{"system": "system", "commit": "commit", "date": "date"},
    }
    return [(label, str(facts[key])) for key, label in labels.items() if facts.get(key) not in (None, "")]


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


def command(name: str, description: str, run: Callable[..., object], option: str = "") -> None:
    """The command line of a module: calls ``run`` with a result file, and with ``option``'s file if there is one."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.report.{name}", description=description)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    if option:
        parser.add_argument(option, type=Path, required=True, metavar="FILE")
    try:
        run(*vars(parser.parse_args()).values())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
