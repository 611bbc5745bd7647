"""Helpers around the forward of peers in PyTorch: without gradients, with a block's gradients, a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measuring.peer import Absent, Step, cut

_PARTS = {"attention": ("norm1.", "attn.", "ls1."), "mlp": ("norm2.", "mlp.", "ls2.")}


def without_gradients(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``forward`` under ``torch.inference_mode``."""

    def run() -> Tensor:
        with torch.inference_mode():
            return forward()

    return run


def block_parameters(block: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """The parameters of a block's attention or MLP, its norm included, by the block's own names."""
    return {name: parameter for name, parameter in block.named_parameters() if name.startswith(_PARTS[kind])}


def cut_block(gradients: dict[str, Tensor], model, heads: int) -> dict[str, Tensor]:
    """``cut`` for tensors by the names of block 0."""
    prefix = "blocks.0."
    whole = cut({prefix + name: tensor for name, tensor in gradients.items()}, model, heads)
    return {name.removeprefix(prefix): tensor for name, tensor in whole.items()}


def block_step(
    forward: Callable[[Tensor], Tensor],
    parameters: dict[str, nn.Parameter],
    x: Tensor,
    grad: Tensor | None,
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Step:
    """A step of ``forward(x)``, which reads ``parameters``; ``finish`` cuts their gradients, in ``outputs`` alone."""
    if grad is None:
        run = without_gradients(lambda: forward(x))
        return Step(run, lambda: {"y": run()})
    x = x.detach().requires_grad_()
    inputs = (x, *parameters.values())

    def run() -> tuple[Tensor, ...]:
        y = forward(x)
        return y.detach(), *torch.autograd.grad(y, inputs, grad)  # detached, so that the result keeps no graph alive

    def outputs() -> dict[str, Tensor]:
        y, grad_x, *gradients = run()
        return {"y": y, "x": grad_x, **finish(dict(zip(parameters, gradients, strict=True)))}

    return Step(run, outputs)


OPTIONS = {"lr": 1e-4, "weight_decay": 0.05}  # every peer's AdamW has these


def train_steps(
    model: nn.Module,
    forward: Callable[[Tensor, int], Tensor],
    images: Tensor,
    labels: Tensor,
    heads: Sequence[int],
    amp: torch.dtype | None,
    clear: Callable[[], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[int, Step]:
    """Per width a step of one optimizer on all parameters of ``model``, which is the peer's own copy.

    ``forward(images, k)`` gives logits; ``clear`` replaces the optimizer's ``zero_grad``. ``optimizer`` replaces AdamW,
    dense and fused, which on a GPU may be captured in a CUDA graph. Gradients outside the width are zeros and not None,
    so dense AdamW decays and moves every weight in every step, as in the authors' code.

    Raises ``Absent`` for float16, where gradients would need a scaled loss.
    """
    if amp == torch.float16:
        raise Absent("autocast to float16 needs a scaled loss, which is not measured")
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True, capturable=images.is_cuda)
    clear = clear or optimizer.zero_grad

    def backward(k: int) -> None:
        clear()
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            loss = F.cross_entropy(forward(images, k), labels)
        loss.backward()

    def run(k: int) -> None:
        backward(k)
        optimizer.step()

    def outputs(k: int) -> dict[str, Tensor]:
        backward(k)
        return cut({name: parameter.grad for name, parameter in model.named_parameters()}, model, k)

    return {k: Step(partial(run, k), partial(outputs, k)) for k in heads}
