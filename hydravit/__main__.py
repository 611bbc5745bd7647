"""``python -m hydravit``, for launchers that take a module: ``torchrun -m hydravit train ...``."""

from hydravit.cli import main

main()
