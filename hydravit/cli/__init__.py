"""The command line: ``hydravit demo | train | compare | compress | evaluate | predict | info | extract | benchmark``.

A command is a module with ``add_parser(subparsers)`` and ``run(args)``. A user's mistake ends in one line on
standard error and exit code 2; ``HYDRAVIT_DEBUG=1`` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
import warnings
from collections.abc import Sequence

from hydravit import __version__
from hydravit.cli.threads import let_waiting_threads_sleep, set_threads

COMMANDS = ("demo", "train", "compare", "compress", "evaluate", "predict", "info", "extract", "benchmark")

_EXAMPLES = """examples:
  hydravit demo
  hydravit train --recipe demo --out runs/demo
  hydravit evaluate --checkpoint runs/demo/model.safetensors --data digits
  hydravit predict photo.jpg --checkpoint runs/demo/model.safetensors --heads all
  hydravit info
  hydravit benchmark --heads 3,6,12 --batch 1
Every command has its own --help with examples.
"""


_ESCAPED = "hydravit.escaped"


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write what a stream cannot encode as escapes, such as the names of classes on a terminal that is ASCII only.

    A file name that no text could hold comes out as the bytes it came as.
    """
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error(_ESCAPED, _escape)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for wrong input, or 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ESCAPED)
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] != ["benchmark"]:  # its numbers are those of OpenMP as it is
        let_waiting_threads_sleep()
    args = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"hydravit: warning: {message}", file=sys.stderr)
            if hasattr(args, "threads"):
                set_threads(args.threads)
            args.run(args)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe; writing, even at exit, would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get("HYDRAVIT_DEBUG") == "1":
            raise
        named = isinstance(error, OSError) and error.filename and error.strerror
        message = f"{error.filename}: {error.strerror}" if named else " ".join(str(error).split())  # type: ignore[union-attr]
        message = message or type(error).__name__
        print(f"hydravit: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hydravit: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; its result has the command's ``run``."""
    from importlib import import_module

    parser = argparse.ArgumentParser(
        prog="hydravit",
        description="Train, evaluate and use a Vision Transformer that works at every width.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        import_module(f"hydravit.cli.{command}").add_parser(subparsers)
    for command, subparser in subparsers.choices.items():
        subparser.set_defaults(run=import_module(f"hydravit.cli.{command}").run)
    return parser


def parse_heads(text: str, widest: int, narrowest: int = 1) -> tuple[int, ...]:
    """Return the widths, ascending, that ``"all"``, ``"6"``, ``"3,6,12"``, ``"3-12"`` or ``"1,3-5"`` names.

    Raise ``ValueError`` for anything else, and for widths outside ``narrowest..widest``.
    """
    if text.strip().lower() == "all":
        return tuple(range(narrowest, widest + 1))
    heads: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
            raise ValueError(f"heads {text!r}: expected all, or numbers and ranges such as 3,6,12 or 3-12")
        if int(first) < narrowest or int(last) > widest:
            raise ValueError(f"heads {text!r}: the model has the widths {narrowest}..{widest}; all names every one")
        heads.update(range(int(first), int(last) + 1))
    return tuple(sorted(heads))
