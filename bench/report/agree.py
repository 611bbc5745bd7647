"""``python -m bench.report.agree A.json B.json``: whether two runs give the same ratios."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from bench.rows import AGREEMENT, read_results, workload_of


class Pair(NamedTuple):
    """The ratio of one peer to ours on one workload, in either run; noisy if either run says so."""

    name: str
    ratios: tuple[float, float]
    noisy: bool

    @property
    def difference(self) -> float:
        """The larger ratio by the smaller."""
        return max(self.ratios) / min(self.ratios)


def pairs(first: Sequence[dict], second: Sequence[dict]) -> list[Pair]:
    """Every ratio that both runs have."""
    runs = [
        {(row["peer"], *workload_of(row)): row for row in rows if row["ratio"] is not None} for rows in (first, second)
    ]
    return [
        Pair(" ".join(map(str, key)), (row["ratio"], other["ratio"]), row["noisy"] or other["noisy"])
        for key, row in runs[0].items()
        if (other := runs[1].get(key)) is not None
    ]


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
    apart = [pair for pair in found if pair.difference > AGREEMENT]
    for pair in sorted(apart, key=lambda pair: -pair.difference):
        ratios = " and ".join(f"{ratio:.3f}" for ratio in pair.ratios)
        marked = "marked noisy" if pair.noisy else "not marked noisy"
        print(f"{pair.name}: {ratios}, {100 * (pair.difference - 1):.0f} % apart, {marked}")
    share = 1.0 - len(apart) / len(found)
    noisy = sum(pair.noisy for pair in apart)
    print(f"{100 * share:.0f} % of {len(found)} ratios agree within {100 * (AGREEMENT - 1):.0f} %", end="; ")
    print(f"of the {len(apart)} others {noisy} are marked noisy")
    return 0 if share >= 0.9 and noisy == len(apart) else 1


if __name__ == "__main__":
    sys.exit(main())
