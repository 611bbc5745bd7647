"""``python -m hydravit``, for launchers that take a module: ``torchrun -m hydravit train ...``."""

import sys

from hydravit.cli import main

sys.exit(main())
