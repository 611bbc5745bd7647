"""How many threads a command computes with, and how they wait."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def let_waiting_threads_sleep() -> None:
    """Ask OpenMP, before torch loads it, that threads sleep while they wait; a user's own choice counts.

    By default they spin, and where other programs need the same processors, spinning threads keep the one for which
    they wait from running: training can take many times as long.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def set_threads(count: int | None) -> None:
    """Let torch compute with ``count`` threads; None: as many as are of use here, unless the user told OpenMP.

    torch counts the cores of the machine, of which a container or a job may have a few.
    """
    import torch

    if count is not None:
        torch.set_num_threads(count)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_processors()))


def usable_processors(root: Path = Path("/")) -> int:
    """Return on how many processors this process can run at once: by its affinity and its cgroups' CPU limits.

    ``root`` is the folder where ``proc`` and ``sys`` are.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *map(math.ceil, _limits(root))]))


def _limits(root: Path) -> Iterator[float]:
    """Iterate over the limits, in processors, of the cgroup of this process and of those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, files = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, files = root / "sys/fs/cgroup/cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = top / path.strip("/")
        # In a container the path may be that on the host, which is not there; the top is then the container's group.
        for folder in (group, *group.parents):
            yield from _limit([folder / file for file in files])
            if folder == top:
                break


def _limit(files: list[Path]) -> Iterator[float]:
    try:
        quota, period = " ".join(file.read_text(encoding="utf-8") for file in files).split()
    except (OSError, ValueError):  # the group has no such file: the root has none
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)
