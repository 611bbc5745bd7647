"""The classes of a checkpoint's classifier, matched by name with those of a data set."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence

import torch

from hydravit.checkpoint.files import Checkpoint


def with_classes(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return the checkpoint with its classifier's rows in the order of ``names``.

    It has no classifier, so that the model's is initialised anew, if it lacks one of these classes. Both cases warn. A
    checkpoint that names no classes stays as it is.
    """
    own, names = checkpoint.class_names, tuple(names)
    if own is None or own == names:
        return checkpoint
    missing = [name for name in names if name not in own]
    rows = torch.tensor([own.index(name) for name in names if name in own], dtype=torch.int64, device="cpu")
    weights = {}
    for name, tensor in checkpoint.state_dict.items():
        classifier = re.fullmatch(r"heads?(?:\.\d+)?\.(weight|bias)", name)
        if classifier is None:
            weights[name] = tensor
        elif not missing:
            weights[name] = tensor.index_select(-2 if classifier[1] == "weight" else -1, rows)
    if missing:
        unknown = f"{len(missing)} of the data's {len(names)} classes are unknown to it, e.g. {missing[0]!r}"
        what = f"{unknown}; its classifier is left out"
    else:
        what = f"its classifier's {len(own)} rows are matched by name with the data's {len(names)} classes"
    warnings.warn(f"{checkpoint.where}{what}", stacklevel=2)
    return dataclasses.replace(checkpoint, state_dict=weights, class_names=None if missing else names)
