"""The program ``hydravit``, also as ``python -m hydravit`` for launchers: ``torchrun -m hydravit train ...``."""

import sys


def main() -> int:
    """Run one command; return its exit code, or 130 if it is interrupted while it loads torch, which takes seconds."""
    try:
        from hydravit.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("hydravit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
