"""torch.compile in its settings, on the extracted width and on slices of the full weights, one graph per width.

max-autotune chooses by timings in the first run that compiles; ``CACHE`` keeps the choices with the code.
"""

from __future__ import annotations

import contextlib
import copy
import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from bench import CACHE
from bench.measuring.peer import Absent, Peer, Step
from bench.peers.eager import plain_vit, views_block, views_network
from bench.peers.training import block_parameters, block_step, cut_block, train_steps
from hydravit import HydraViT


def _compile(function: Callable, mode: str | None = None) -> Callable:
    """``torch.compile`` of ``function``, for tensors of one shape.

    Dynamo keeps graphs by code object. If widths shared one, they would count towards one recompile limit, evaluate
    each other's guards and outlive their closures, and a setting would find the graphs of another. So every call here
    copies the code. ``fullgraph`` makes a fallback to eager an error.
    """
    code = function.__code__
    own = types.FunctionType(code.replace(), function.__globals__, code.co_name, None, function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, mode=mode)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Around a first call: inductor caches beside our files and prints nothing.

    Raises ``Absent`` if it cannot compile.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):  # importing torch sets it
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "inductor")
    quiet = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    try:
        with torch._inductor.config.patch(quiet), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Absent(f"does not compile: {lines[0] if lines else type(error).__name__}") from error


def _warm(compiled: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``compiled`` without gradients, after its first call."""
    run = torch.no_grad()(compiled)
    with compiling():
        run()
    return run


def _extracted(mode: str | None, model: HydraViT, images: Tensor, heads: Sequence[int]):
    def ready(k: int) -> Callable[[], Tensor]:
        vit = plain_vit(model, k).eval()
        return _warm(partial(_compile(lambda images: vit(images), mode), images))

    return {k: ready(k) for k in heads}


def _sliced(model: HydraViT, images: Tensor, heads: Sequence[int]):
    def ready(k: int) -> Callable[[], Tensor]:
        return _warm(partial(_compile(lambda images: views_network(model, images, k)), images))

    return {k: ready(k) for k in heads}


def _sliced_block(model: HydraViT, kind: str, heads: int, x: Tensor, grad: Tensor | None) -> Step:
    forward = _compile(lambda x: views_block(model, kind, x, heads))
    parameters = block_parameters(model.blocks[0], kind)
    step = block_step(forward, parameters, x, grad, partial(cut_block, model=model, heads=heads))
    with compiling():
        step.run()
    return step


def _sliced_training(model: HydraViT, images: Tensor, labels: Tensor, heads: Sequence[int], amp) -> dict[int, Step]:
    own = copy.deepcopy(model).train()

    def forward(k: int) -> Callable[[Tensor], Tensor]:
        return _compile(lambda images: views_network(own, images, k))

    forwards = {k: forward(k) for k in heads}
    steps = train_steps(own, lambda images, k: forwards[k](images), images, labels, heads, amp)
    for step in steps.values():
        with compiling():
            step.outputs()
    return steps


_MAX = "max-autotune-no-cudagraphs"  # the timer captures the call itself


def _peer(name: str, about: str, **rest) -> Peer:
    triton = f"triton {version('triton')}" if find_spec("triton") else ""  # compiles for GPUs
    return Peer(name, about, opaque=True, version=triton, **rest)


PEERS = [
    _peer("compiled", "torch.compile of the extracted width, default mode", inference=partial(_extracted, None)),
    _peer(
        "compiled-max",
        "torch.compile of the extracted width, max-autotune; on a CPU the same products as compiled, see aot-max",
        inference=partial(_extracted, _MAX),
    ),
    _peer(
        "compiled-sliced",
        "torch.compile of slices of the full weights, a graph per width without the guards of the others",
        inference=_sliced,
        block=_sliced_block,
        training=_sliced_training,
    ),
]
