"""Who is measured: every way to run one width of a nested ViT that somebody would choose, and ours.

A peer offers up to three set-ups. Each returns closures, made ready and warmed as far as the tool's user would, or
raises ``Absent`` with the reason why it cannot run here; a set-up it does not offer says why in ``without``. Peers
share nothing but the model's full parameters and ``Absent``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

# Compiled and exported networks, kept between runs. Not in the results: they belong to one machine and one version.
CACHE = Path(__file__).resolve().parents[2] / "build" / "bench"


class Absent(Exception):
    """The peer cannot run this workload here; the message is the reason, one line, for readers of the results."""


class Step(NamedTuple):
    """Something with gradients. ``run()`` is timed; ``outputs()`` does the same work once and returns what is compared.

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
    """``pooled_only``: its last block computes only the tokens that the head pools, so it executes fewer operations;
    ``bound``: no competitor, but what it could cost at best; ``version``: of the tool beside torch, or "";
    ``opaque``: its operators are hidden from PyTorch; ``uncapturable``: why no CUDA graph can hold a call; ``weights``:
    "e4m3" where they are rounded to it, which allows larger errors (``bench.check``), else "".

    Set-ups (``heads`` is always a sequence of widths):

    * ``inference(model, images, heads)``: per width a closure that returns logits ``(B, classes)``, all held ready
      together; ``model`` is in evaluation mode on its device; closures run under ``torch.inference_mode`` or
      ``torch.no_grad`` by themselves.
    * ``mixed(model, images, heads)``: a closure like those of inference; ``heads`` has a width per image. Who does not
      offer it runs the images of each width as a batch of their own.
    * ``block(model, kind, heads, x, grad)``: a ``Step`` on block 0 at one width; ``kind`` is ``"attention"`` or
      ``"mlp"``; ``x (B, N, Dk)``; ``grad`` of the output's shape, or None for the forward alone, without gradients.
    * ``training(model, images, labels, heads, amp)``: per width a ``Step``; all share one optimizer. ``amp`` is
      autocast's dtype or None. The set-up copies ``model``, whose weights no peer may change.
    """

    name: str
    about: str
    ours: bool = False
    pooled_only: bool = False
    bound: bool = False
    version: str = ""
    opaque: bool = False
    uncapturable: str = ""
    weights: str = ""
    inference: Callable | None = None
    mixed: Callable | None = None
    block: Callable | None = None
    training: Callable | None = None
    without: str = "does not apply"


def cut(gradients: dict[str, Tensor], model, heads: int) -> dict[str, Tensor]:
    """The width's part of full-size tensors by parameter name, in the parameters' order of axes."""
    from hydravit.checkpoint import take
    from hydravit.geometry import parameter_slices

    slices = parameter_slices(model.config, model.subnetwork(heads))
    return {name: take(tensor, slices[name]) for name, tensor in gradients.items()}


def peers() -> list[Peer]:
    """Every peer; what is ready soonest comes first. Those for another device say so when they are set up."""
    from bench.peers import compiled, eager, ours, runtimes

    return [*ours.PEERS, *eager.PEERS, *runtimes.PEERS, *compiled.PEERS]
