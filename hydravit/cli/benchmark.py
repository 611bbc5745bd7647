"""``hydravit benchmark``: every width beside the best other tools. Its arguments go to the checkout's ``bench/``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import hydravit
from hydravit.extras import extra


def add_parser(subparsers) -> None:
    # No argument is an option here, so that all of them, --help too, reach the suite as they are.
    parser = subparsers.add_parser(
        "benchmark", help="measure every width beside the best other tools", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> None:
    """Replace this process by ``python -m bench.run``, whose exit code is then the command's.

    Raises ``RuntimeError`` if hydravit was installed without its repository, or without matplotlib.
    """
    checkout = Path(hydravit.__file__).resolve().parents[1]
    if not (checkout / "bench" / "run.py").is_file():
        raise RuntimeError(
            f"the benchmarks are part of the repository, not of the installed package in {checkout}: "
            "clone the repository, then `make bench` or `pip install -e .` there"
        )
    with extra("demo", "the report of the benchmarks"):
        import matplotlib  # noqa: F401
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    # With the safe path (from Python 3.11 on) a folder named bench in the working directory is not taken for ours.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "bench.run", *args.arguments], environment)
