"""A peer is a way to run one width of a nested ViT. ``bench.peers`` holds the peers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from hydravit.checkpoint import take
from hydravit.geometry import parameter_slices


class Absent(Exception):
    """The peer cannot run this workload here. The message is the reason, one line, and appears in the results."""


class Step(NamedTuple):
    """One width of a peer. ``run()`` is timed; ``outputs()`` does the same work once and returns what is compared.

    Block: ``run`` is forward and, with a gradient, backward; ``outputs()`` has ``"y"`` and, with a gradient, ``"x"``
    and the parameters' gradients by the block's own names (``"attn.qkv.weight"``), cut to the width (``cut``).
    Training: ``run`` clears gradients, runs forward and backward of the mean cross entropy, and steps AdamW;
    ``outputs()`` has the gradients by the model's names, cut to the width, and does not step.
    Mixed: ``alone()`` is the whole batch at this width, for comparison.
    """

    run: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]]
    alone: Callable[[], object] | None = None


class Peer(NamedTuple):
    """A name, facts, and up to four set-ups.

    A set-up returns closures that are as ready and warm as the tool's user would have them, or raises ``Absent``.
    ``heads`` is a sequence of widths unless said otherwise.

    * ``inference(model, images, heads)``: per width a closure that returns logits ``(B, classes)``, all held ready
      together. ``model`` is in evaluation mode on its device. The closures themselves enter ``torch.inference_mode``
      or ``torch.no_grad``.
    * ``mixed(model, images, heads)``: one closure like those of inference; ``heads`` has a width per image. A peer
      without it runs the images of each width as a batch of their own.
    * ``block(model, kind, heads, x, grad)``: a ``Step`` on block 0 at the width ``heads``; ``kind`` is ``"attention"``
      or ``"mlp"``; ``x (B, N, Dk)``; ``grad`` of the output's shape, or None for the forward alone, without gradients.
    * ``training(model, images, labels, heads, amp)``: per width a ``Step``; all share one optimizer. ``amp`` is
      autocast's dtype or None. The set-up copies ``model``, because no peer may change its weights.

    The peer is pickled to measure its memory in a process of its own, so its set-ups are functions of a module.
    """

    name: str
    about: str
    ours: bool = False
    pooled_only: bool = False  # its last block computes only the tokens that are pooled: it executes fewer operations
    version: str = ""  # version of the tool beside torch
    opaque: bool = False  # its operators are hidden from PyTorch
    uncapturable: str = ""  # why no CUDA graph can hold a call
    weights: str = ""  # "e4m3" where weights are rounded to it, which allows larger errors (``bench.measuring.check``)
    inference: Callable | None = None
    mixed: Callable | None = None
    block: Callable | None = None
    training: Callable | None = None
    without: str = "does not apply"  # why a set-up is missing


def offered(peer: Peer, set_up: Callable | None) -> Callable:
    """``set_up``. Raises ``Absent`` if the peer does not offer it."""
    if set_up is None:
        raise Absent(peer.without)
    return set_up


def cut(gradients: dict[str, Tensor], model, heads: int) -> dict[str, Tensor]:
    """The width's part of full-size tensors by parameter name, in the parameters' order of axes."""
    slices = parameter_slices(model.config, model.subnetwork(heads))
    return {name: take(tensor, slices[name]) for name, tensor in gradients.items()}
