"""Results of ``evaluate`` and ``measure_supernet`` as tables for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hydravit.atomic import atomic_write
from hydravit.evaluation.picture import plot


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align the columns to the right, in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, *rows)]
    return "\n".join("  ".join(line) for line in lines)


def format_table(results: dict) -> str:
    """Format the results of ``evaluate`` as a table, with lines on how they were measured."""
    accuracies = {"top1": "top-1 %", "top5": "top-5 %", "e4m3_top1": "e4m3 top-1", "e4m3_top5": "e4m3 top-5"}
    accuracies = {name: label for name, label in accuracies.items() if all(name in row for row in results["widths"])}
    if results["environment"]["classes"] <= 5:  # among the first five of them is every class
        accuracies = {name: label for name, label in accuracies.items() if not name.endswith("top5")}
    header = [_counted(results), "params", "GMACs", *accuracies.values(), "eager ms", "fused ms", "memory MiB"]
    rows = [
        [
            _name(row),
            count(row["params"]),
            _number(row["gmacs"], 4),
            *(f"{row[name]:.2f}" for name in accuracies),
            _number(row["latency_ms"]["eager"]),
            _number(row["latency_ms"]["fused"]),
            _number(row["peak_memory_mib"]),
        ]
        for row in results["widths"]
    ]
    about = results["environment"]
    notes = [
        f"{about['images']} images{_source(results)}; {_machine(about)}",
        f"latency: {about['latency']}",
        f"memory: {about['memory']}" + (f", batch {about['batch_size']}" if about["weights_mib"] is not None else ""),
    ]
    if about["fused_missing"] not in ("", about["latency"]):
        notes.append(f"no fused latency: {about['fused_missing']}")
    return "\n".join([aligned(header, rows), *notes, *_differences(results)])


def format_accuracy(results: dict) -> str:
    """Format cost and top-1 accuracy of ``evaluate``'s results, with the interval that the number of images allows."""
    rows = [
        [
            _name(row),
            count(row["params"]),
            count(row["gmacs"] * 1e9),
            f"{row['top1']:.1f}",
            "{:.1f} to {:.1f}".format(*row["top1_interval"]),
        ]
        for row in results["widths"]
    ]
    return aligned([_counted(results), "params", "MACs", "top-1 %", "95 % interval"], rows)


def format_supernet(results: dict) -> str:
    """Format the results of ``measure_supernet`` as a table, with lines on how they were measured."""
    about = results["environment"]
    weights = about["weights_mib"]
    header = [_counted(results), "params", "GMACs"]
    for name in ("eager", "ours"):
        header += [f"{name} ms", "20-80 %"]
    header += ["eager/ours", "eager MiB", "ours MiB"]
    rows = []
    for row in results["widths"]:
        cells = [_name(row), count(row["params"]), _number(row["gmacs"])]
        for name in ("eager", "fused"):
            spread = row["latency_spread_ms"].get(name)
            cells += [_number(row["latency_ms"][name]), "-" if spread is None else "-".join(map(_number, spread))]
        cells.append(_number(faster(row)))
        for name in ("eager", "fused"):
            peak = row["peak_memory_mib"][name]
            cells.append("-" if peak is None else f"{weights[name] + peak:.0f}")
        rows.append(cells)
    notes = [
        f"{about['model']} with random weights, one image; {_machine(about)}",
        f"latency: {about['latency']}; 20-80 %: of the calls",
    ]
    if about["fused_missing"]:
        notes.append(f"no latency of ours: {about['fused_missing']}")
    notes += _differences(results)
    if weights["eager"] is None:
        notes.append(f"memory: {about['memory']}")
    else:
        packed = f"; ours {weights['fused']:.0f}, with their packed copy" if weights["fused"] else ""
        notes.append(f"memory: {about['memory']}; in the table both together")
        notes.append(
            f"weights of all widths: eager {weights['eager']:.0f} MiB, the parameters{packed}; "
            f"a network for each width would hold {weights['separate']:.0f} (counted)"
        )
    return "\n".join([aligned(header, rows), *notes])


def faster(row: dict) -> float | None:
    """Return how many times as long as ours eager PyTorch takes at a width."""
    eager, fused = row["latency_ms"]["eager"], row["latency_ms"]["fused"]
    return None if fused is None else eager / fused


def _counted(results: dict) -> str:
    """Return what the widths are counted in, ``HydraViTConfig.counted``; files of older versions do not say it."""
    return results["environment"].get("counted", "heads")


def _name(row: dict) -> str:
    return row.get("width", str(row["heads"]))


def _source(results: dict) -> str:
    """Return where a command says that the images come from; ``evaluate`` itself does not know."""
    data = results.get("data")
    return "" if data is None else f" of {data['source']}, {data['part']}"


def _machine(about: dict) -> str:
    machine = about["cpu"] if about["device"] == "cpu" else about["device"]
    threads, version = f"{about['threads']} thread(s)", f"torch {about['torch']}"
    return f"{machine}, {threads}, {version}, {about['dtype']}, backend {about['backend']}"


def _differences(results: dict) -> list[str]:
    """Return a line on the largest difference of the backends, or none if not both ran."""
    found = [row["difference"] for row in results["widths"] if row["difference"] is not None]
    if not found:
        return []
    return [f"largest difference of fused logits from eager ones: {max(found):.1e} of the largest logit"]


def count(number: float) -> str:
    """Format a count as people read it: 726824 is "727 k", 86567656 is "86.6 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def write_results(results: dict, folder: str | Path) -> list[Path]:
    """Write ``results.json`` and ``results.png`` to ``folder``, which is made if need be; return their paths.

    Each is written whole or, on an ``OSError``, not at all.
    """
    folder = Path(folder)
    paths = [write_json(results, folder), folder / "results.png"]
    plot(results, paths[1])
    return paths


def write_json(results: dict, folder: str | Path) -> Path:
    """Write only ``results.json``, as ``write_results`` does; return its path."""
    path = Path(folder) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    atomic_write(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path
