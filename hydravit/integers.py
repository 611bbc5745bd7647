"""Integers of other libraries, such as NumPy's, which come out of samplers, as integers of Python."""

from __future__ import annotations

import operator
from typing import Any


def plain_int(value: Any) -> Any:
    """Return an int for anything that has ``__index__``, also a tensor without axes; anything else comes back as it is.

    Booleans come back as they are, so that a check of the type refuses them. So do the symbolic integers of
    ``torch.compile``, which would make one graph for each value.
    """
    if isinstance(value, int) or not hasattr(value, "__index__") or type(value).__name__ == "SymInt":
        return value
    if "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0) > 0:
        return value
    try:
        return operator.index(value)
    except TypeError:  # an array or a tensor of floats
        return value
