"""Benchmarks: what every width costs, beside the best tools that somebody else would use.

Imports go one way: ``run`` (``hydravit benchmark``, ``make bench``) -> ``peers`` -> ``measuring`` -> ``rows``, the
format of results. ``report`` imports ``rows`` alone, so it cannot measure. ``gpu`` holds what only a GPU machine needs
and uses all others.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# Compiled and exported networks stay here between runs. They belong to one machine and one set of versions.
CACHE = ROOT / "build" / "bench"
