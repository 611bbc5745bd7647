"""Named ranges around phases, in the domain "hydravit", for profilers such as Nsight Systems.

They need the package ``nvtx``. Without it, ``annotate`` leaves functions as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

try:
    import nvtx
except ImportError:
    nvtx = None


def annotate(name: str | Callable[..., str]):
    """Decorate a function with a range around every call; ``name`` may be a function of the call's arguments.

    Code under ``torch.compile`` has no ranges, because the compiler forms phases of its own.
    """

    def decorate(function):
        if nvtx is None:
            return function

        in_range = functools.cache(lambda name: nvtx.annotate(name, domain="hydravit")(function))

        @functools.wraps(function)
        def annotated(*args, **kwargs):
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return in_range(name if isinstance(name, str) else name(*args, **kwargs))(*args, **kwargs)

        return annotated

    return decorate
