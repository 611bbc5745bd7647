"""``python -m bench.report.agree A.json B.json``: whether two runs give the same ratios."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.rows import AGREEMENT, read_results, workload_of

Pair = tuple[str, float, float, bool]  # peer and workload, the ratio in either run, whether either run says noisy


def pairs(first: Sequence[dict], second: Sequence[dict]) -> list[Pair]:
    """Every ratio that both runs have, the most different first."""
    others = {(row["peer"], workload_of(row)): row for row in second if row["ratio"] is not None}
    found = []
    for row in first:
        other = others.get((row["peer"], workload_of(row)))
        if row["ratio"] is not None and other is not None:
            name = f"{row['peer']} {' '.join(map(str, workload_of(row)))}"
            found.append((name, row["ratio"], other["ratio"], row["noisy"] or other["noisy"]))
    return sorted(found, key=lambda pair: min(pair[1:3]) / max(pair[1:3]))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if at least 90 % of the ratios agree within ``AGREEMENT`` and the runs mark all others as noisy, else
    1; 2 for files that have no ratio in common."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report.agree", description="Do two runs give the same ratios?"
    )
    parser.add_argument("first", help="a run's .json")
    parser.add_argument("second", help="another's")
    args = parser.parse_args(argv)
    try:
        found = pairs(read_results(args.first)[1], read_results(args.second)[1])
        if not found:
            raise ValueError(f"{args.first} and {args.second} have no ratio in common")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    apart = [pair for pair in found if max(pair[1:3]) / min(pair[1:3]) > AGREEMENT]
    for name, one, other, marked in apart:
        by, word = 100 * (max(one, other) / min(one, other) - 1), "marked" if marked else "not marked"
        print(f"{name}: {one:.3f} and {other:.3f}, {by:.0f} % apart, {word} noisy")
    share = 1.0 - len(apart) / len(found)
    noisy = sum(pair[3] for pair in apart)
    print(f"{100 * share:.0f} % of {len(found)} ratios agree within {100 * (AGREEMENT - 1):.0f} %", end="; ")
    print(f"of the {len(apart)} others {noisy} are marked noisy")
    return 0 if share >= 0.9 and noisy == len(apart) else 1


if __name__ == "__main__":
    sys.exit(main())
