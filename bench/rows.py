"""The format of results: a run writes rows, and the report reads them. Nothing here can measure."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

# Two runs should agree on a ratio within this factor. A ratio whose p80/p20 is larger is noisy, and so is every row
# that was measured while the machine was slower, by more than this factor, than at its best in the run.
AGREEMENT = 1.07

# One row is one peer on one workload.
COLUMNS = {
    "task": "inference, attention, mlp, attention_backward, mlp_backward, training, training_memory, switching, "
    "mixed, memory or copies",
    "config": "the full model",
    "heads": "the width, or several widths joined by commas",
    "batch": "number of images",
    "dtype": "fp32, tf32, bf16 or fp16",
    "cache": "warm, or cold: caches flushed before every call",
    "launch": "call; on a GPU also graph: replays of a captured CUDA graph",
    "peer": "name of the peer",
    "about": "what the peer is",
    "weights": "e4m3 where the peer rounds its matrices to it, which allows larger errors",
    "ours": "whether the peer is a backend of this repository",
    "status": "measured; absent: cannot run here; refused: wrong outputs; failed: it broke; skipped: no time left",
    "reason": "why the status is not measured; for a measured row a restriction",
    "p20_ms": "20th percentile over the rounds; a round times one call, the mean of a few short calls, or one call of "
    "every width",
    "p50_ms": "median over the rounds",
    "p80_ms": "80th percentile over the rounds",
    "wall_ms": "on a GPU: median of one call and the wait for it, by the host's clock; other times are the GPU's",
    "samples": "number of rounds",
    "attempts": "how often the workload was measured until its spread was small enough; the calmest attempt counts",
    "noisy": "whether p80/p20 of the times is above 1.15 all the same, of the ratio above 1.07, or the witness slow",
    "witness_ms": "median of a fixed piece of work in the same rounds; slow: more than 1.07 times its best of the run",
    "ratio": "median over the rounds of this peer's time by that of ours: above 1, ours is faster; None for ours",
    "ratio_p20": "20th percentile of that ratio",
    "ratio_p80": "80th percentile of that ratio",
    "error": "worst relative error of the outputs against the reference in float64, in the L2 or the maximum norm",
    "allowed": "the largest error that is not refused",
    "gflop": "10^9 floating-point operations of the matrix products",
    "mbyte": "10^6 bytes of compulsory traffic",
    "share": "the least time that this run's peak and bandwidth allow, by the median",
    "limit": "which of the two sets that least time: peak or bandwidth",
    "bytes": "memory: what a process holds to have every width ready, all included; training_memory: the most that it "
    "holds in a step, all included; copies: weight bytes that the operators of a call copy",
    "switch_cost": "switching, mixed: time with differing widths by the time of the same images without, less 1",
    "prepare_s": "seconds of compiling, exporting and packing; of loading where an earlier run left a cache",
    "peer_version": "version of the peer's own tool",
}
# One set for the run; the CSV repeats it in every row.
ENVIRONMENT = {
    "device": "cpu or cuda",
    "name": "name of the processor that computed",
    "cpu": "name of the host's processor",
    "threads": "number of threads of every peer",
    "clock_mhz": "lowest and highest clock seen during the run",
    "peak_gflops": "peak of the row's dtype: the best of the FMA probe and the products of this run",
    "bandwidth_gb_s": "bandwidth of a copy, bytes read and written",
    "torch": "version",
    "cuda": "version that torch was built with; None for a CPU",
    "python": "version",
    "system": "operating system",
    "commit": "commit of this repository; with + where files were changed",
    "date": "start of the run, UTC",
}


def write_results(folder: Path, name: str, environment: dict, rows: Iterable[dict]) -> list[Path]:
    """``name.json`` (environment, rows with every sample) and ``name.csv`` (flat: a row with its environment)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    whole, flat = folder / f"{name}.json", folder / f"{name}.csv"
    replace_file(whole, json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    with open(flat.with_suffix(".csv.part"), "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *ENVIRONMENT], extrasaction="ignore")
        writer.writeheader()
        peaks = environment.get("peak_gflops", {})
        writer.writerows({**environment, **row, "peak_gflops": peaks.get(row["dtype"])} for row in rows)
    flat.with_suffix(".csv.part").replace(flat)
    return [whole, flat]


def read_results(path: Path) -> tuple[dict, list[dict]]:
    """Environment and rows of a ``.json`` file. Raises ``ValueError`` for any other."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return content["environment"], content["rows"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of benchmark results: {error!r}") from error


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` so that an interruption leaves the whole old file or the whole new one."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text)
    part.replace(path)


def workload_of(row: dict) -> tuple:
    """The columns that name the row's workload: two rows that agree in them differ in the peer only."""
    return tuple(row[column] for column in ("task", "config", "heads", "batch", "dtype", "cache", "launch"))


def widths_of(row: dict) -> tuple[int, ...]:
    """The row's widths as numbers; several where they take turns or are held together."""
    return tuple(int(part) for part in str(row["heads"]).split(","))


def grouped(rows: Iterable[dict], *columns: str) -> dict[tuple, list[dict]]:
    """Rows by their values of ``columns``, in the order of the file."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def baseline(rows: Iterable[dict]) -> str | None:
    """The peer that "ours" means: of our measured peers native, else triton, else the first.

    A peer with weights of another dtype is never chosen, because it does not compute what the others compute.
    """
    of_ours = [row for row in rows if row["ours"] and row["status"] == "measured" and not row.get("weights")]
    names = list(dict.fromkeys(row["peer"] for row in of_ours))
    return next((name for name in ("native", "triton") if name in names), names[0] if names else None)


def strongest(rows: Iterable[dict]) -> dict | None:
    """The fastest measured row of another's peer, among rows about one workload."""
    others = [row for row in rows if row["p50_ms"] is not None and not row["ours"]]
    return min(others, key=lambda row: row["p50_ms"], default=None)


def stand_ins(rows: Iterable[dict], group: list[dict], base: str | None) -> list[dict]:
    """The plain calls of ``base`` if it cannot be launched like ``group``: the ratios of ``group`` are to these."""
    columns = ("task", "config", "batch", "dtype", "cache")
    if any(row["peer"] == base and row["status"] == "measured" for row in group):
        return []
    return [
        {**row, "launch": group[0]["launch"]}
        for row in rows
        if (row["peer"], row["status"], row["launch"]) == (base, "measured", "call")
        and all(row[column] == group[0][column] for column in columns)
    ]
