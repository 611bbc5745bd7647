"""The rows that a run writes and everything else reads. Imports nothing that could measure."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

# Two runs should agree on a ratio this well. One whose p80/p20 is larger is called noisy; so is one that was measured
# while the machine was slower by more than this than at its best in the run.
AGREEMENT = 1.07

# name: what it is. One row is one peer on one workload.
COLUMNS = {
    "task": "inference, attention, mlp, attention_backward, mlp_backward, training, training_memory, switching, "
    "mixed, memory or copies",
    "config": "the full model",
    "heads": "the width, or several joined by commas",
    "batch": "images",
    "dtype": "fp32, tf32, bf16 or fp16",
    "cache": "warm, or cold: caches flushed before every call",
    "launch": "call; on a GPU also graph: replays of a captured CUDA graph",
    "peer": "name",
    "about": "what the peer is",
    "weights": "e4m3 where the matrices are rounded to it: another dtype, which is allowed larger errors",
    "ours": "whether the peer is a backend of this repository",
    "bound": "whether the peer is no competitor, but what the workload could cost at best",
    "status": "measured; absent: cannot run here; refused: wrong outputs; failed: it broke; skipped: no time left",
    "reason": "of any status but measured; of a measured one a restriction",
    "p20_ms": "20th percentile of the rounds: of a call, the mean call of a short group, or one call of every width",
    "p50_ms": "median of the same",
    "p80_ms": "80th percentile of the same",
    "wall_ms": "on a GPU: median of a call and the wait for it on the host's clock; the others are the GPU's own",
    "samples": "how many calls or groups of calls the percentiles are of",
    "attempts": "how often the workload was measured until its spread was small enough; the calmest attempt counts",
    "noisy": "whether p80/p20 of times is above 1.15 all the same, that of the ratio above 1.07, or the witness slow",
    "witness_ms": "median of a fixed piece of work in the same rounds; slow: more than 1.07 times its best of the run",
    "ratio": "median over rounds of this peer's time by that of ours: above 1, ours is faster; none for ours itself",
    "ratio_p20": "20th percentile of the same",
    "ratio_p80": "80th percentile of the same",
    "error": "of the outputs against the reference in float64, relative, in the L2 or the maximum norm: the worst one",
    "allowed": "the largest error that would not be refused",
    "gflop": "10^9 floating-point operations of the matrix products",
    "mbyte": "10^6 bytes of compulsory traffic",
    "share": "of the machine's limit: the least time that peak and bandwidth of this run allow, by the median",
    "limit": "which of the two it is: peak or bandwidth",
    "bytes": "memory: held to have every width ready, all included; training_memory: the most held "
    "in a step, all included; copies: weight bytes that a call's operators copy",
    "switch_cost": "switching, mixed: time with differing widths by the time of the same images without, less 1",
    "prepare_s": "compiling, exporting, packing; with a cache of earlier runs: loading",
    "peer_version": "of the peer's own tool",
}
# Of the run; in every row too.
ENVIRONMENT = {
    "device": "cpu or cuda",
    "name": "of the processor that computed",
    "cpu": "name",
    "threads": "of every peer",
    "clock_mhz": "lowest and highest clock seen during the run",
    "peak_gflops": "of the row's dtype: the best of the FMA probe and the products of this run",
    "bandwidth_gb_s": "of a copy, bytes read and written",
    "torch": "version",
    "cuda": "version that torch was built with; None for a CPU",
    "python": "version",
    "system": "operating system",
    "commit": "of this repository; with + where files were changed",
    "date": "of the run's start, UTC",
}


def write(folder: Path, name: str, environment: dict, rows: Iterable[dict]) -> list[Path]:
    """``name.json`` (environment, rows with every sample) and ``name.csv`` (flat: a row with its environment)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    whole, flat = folder / f"{name}.json", folder / f"{name}.csv"
    replace(whole, json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    with open(flat.with_suffix(".csv.part"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *ENVIRONMENT], extrasaction="ignore")
        writer.writeheader()
        peaks = environment.get("peak_gflops", {})
        writer.writerows({**environment, **row, "peak_gflops": peaks.get(row["dtype"])} for row in rows)
    flat.with_suffix(".csv.part").replace(flat)
    return [whole, flat]


def read(path: Path) -> tuple[dict, list[dict]]:
    """Environment and rows of a ``.json`` file. Raises ``ValueError`` for any other."""
    try:
        content = json.loads(Path(path).read_text())
        return content["environment"], content["rows"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of benchmark results: {error!r}") from error


def replace(path: Path, text: str) -> None:
    """Whoever is interrupted leaves the whole old file or the whole new one."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def key(row: dict) -> tuple:
    """What a row is about, apart from the peer."""
    return tuple(row[column] for column in ("task", "config", "heads", "batch", "dtype", "cache", "launch"))


def means(rows: Iterable[dict], ours: str) -> dict[tuple, float]:
    """Per peer and everything but the width: the mean time over the widths by that of ours, a ratio of mean times.

    Keys are ``(peer, task, config, batch, dtype, cache, launch)``; only where both were measured at the same widths.
    """
    times: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["status"] == "measured" and row["p50_ms"] is not None:
            task, config, heads, *rest = key(row)
            times.setdefault((row["peer"], task, config, *rest), {})[heads] = row["p50_ms"]
    result = {}
    for (peer, *rest), by_width in times.items():
        own = times.get((ours, *rest), {})
        if own.keys() == by_width.keys():
            result[(peer, *rest)] = sum(by_width.values()) / sum(own.values())
    return result


def baseline(rows: Iterable[dict]) -> str | None:
    """The peer that "ours" means: of those of ours that were measured, native, else triton, else the first.

    None whose weights are of another dtype: it does another thing than those it would be compared with.
    """
    of_ours = [row for row in rows if row["ours"] and row["status"] == "measured" and not row.get("weights")]
    names = list(dict.fromkeys(row["peer"] for row in of_ours))
    return next((name for name in ("native", "triton") if name in names), names[0] if names else None)


def strongest(rows: Iterable[dict]) -> dict | None:
    """Of rows about one workload: the fastest measured one of somebody else's peer."""
    others = [row for row in rows if row["p50_ms"] is not None and not row["ours"] and not row["bound"]]
    return min(others, key=lambda row: row["p50_ms"], default=None)


def grouped(rows: Iterable[dict], *columns: str) -> dict[tuple, list[dict]]:
    """Rows by their values of ``columns``, in the order of the file."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def widths(row: dict) -> tuple[int, ...]:
    """The row's widths as numbers; several where they take turns or are held together."""
    return tuple(int(part) for part in str(row["heads"]).split(","))


def stand_ins(rows: Iterable[dict], group: list[dict], base: str | None) -> list[dict]:
    """The plain calls of ``base`` where it cannot be launched like ``group``: what the ratios there are to."""
    columns = ("task", "config", "batch", "dtype", "cache")
    if any(row["peer"] == base and row["status"] == "measured" for row in group):
        return []
    return [
        {**row, "launch": group[0]["launch"]}
        for row in rows
        if (row["peer"], row["status"], row["launch"]) == (base, "measured", "call")
        and all(row[column] == group[0][column] for column in columns)
    ]
