"""How many multiply-accumulates the blocks do, and the formulas by which torch's ``FlopCounterMode`` counts the ops.

As in the ViT literature, products with weights and attention's own two (queries by keys, weights by values) count, for
the slice that is read; norms, softmax, GELU, residuals and pooling do not. A backward op counts the products of the
gradients that are wanted, not what it computes again. These are the numbers that torch counts for ``reference``, with
two exceptions: ``reference`` makes queries of all tokens, also where only some are wanted, and torch 2.13 does not
count its own fused attention on the CPU, which ``reference`` takes where no gradient is wanted.

The counter sees the ops that run. A model that pools one token computes only that token in its last block, and packed
inference only the pooled ones: ``pooled_only`` of ``network_macs``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hydravit_kernels import ops
from hydravit_kernels.parameters import NetworkSizes
from hydravit_kernels.subnetwork import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, Subnetwork, unflatten


def stem_macs(patches: int, inputs: int, s: EmbedSlice) -> tuple[int]:
    """Count the multiply-accumulates of one image's patch embedding; a patch has ``inputs`` numbers."""
    return (patches * inputs * s.embed,)


def attention_macs(tokens: int, s: AttentionSlice, queries: int | None = None) -> tuple[int, int, int]:
    """Count those of one attention block on one image: the qkv product, attention's own, and the projection.

    Only ``queries`` tokens are queries; None stands for all.
    """
    queries = tokens if queries is None else queries
    keys, values = s.heads * s.head_dim, s.heads * s.value_dim
    qkv = s.embed * (queries * keys + tokens * (keys + values))
    return qkv, queries * tokens * (keys + values), queries * values * s.embed


def mlp_macs(tokens: int, s: MlpSlice) -> tuple[int, int]:
    """Count those of one MLP block on one image: fc1 and fc2."""
    return tokens * s.embed * s.hidden, tokens * s.hidden * s.embed


def head_macs(s: HeadSlice) -> tuple[int]:
    """Count those of the classifier on one image."""
    return (s.embed * s.classes,)


def network_macs(sizes: NetworkSizes, subnetwork: Subnetwork, pooled_only: bool = False) -> int:
    """Count those of a whole forward on one image.

    ``pooled_only`` leaves out the last block's work on tokens that are not pooled: all but their keys and values.
    """
    patches = (sizes.image_height // sizes.patch_height) * (sizes.image_width // sizes.patch_width)
    tokens = sizes.cls_tokens + sizes.reg_tokens + patches
    inputs = sizes.channels * sizes.patch_height * sizes.patch_width
    macs = sum(stem_macs(patches, inputs, subnetwork.embed) + head_macs(subnetwork.head))
    for layer, (attention, mlp) in enumerate(zip(subnetwork.attention, subnetwork.mlp, strict=True)):
        last = pooled_only and layer == sizes.layers - 1
        queries = sizes.pool_stop - sizes.pool_start if last else tokens
        macs += sum(attention_macs(tokens, attention, queries)) + sum(mlp_macs(queries, mlp))
    return macs


# ---- The formulas of the ops ----


class _Product(NamedTuple):
    """One product of a block, for its backward: ``before`` lists the parameters whose gradients come through it.

    ``weight`` is the parameter it multiplies by; None if both operands are activations.
    """

    weight: str | None
    before: tuple[str, ...] = ()


_NORM = ("norm_weight", "norm_bias")
_QKV = (*_NORM, "qkv_weight", "qkv_bias")
_PRODUCTS = {
    "stem": (_Product("weight"),),
    "attention_block": (_Product("qkv_weight", _NORM), _Product(None, _QKV), _Product("proj_weight", _QKV)),
    "mlp_block": (_Product("fc1_weight", _NORM), _Product("fc2_weight", (*_NORM, "fc1_weight", "fc1_bias"))),
    "head": (_Product("weight", _NORM),),
}


def _of_stem(a: dict[str, Any], s: EmbedSlice) -> tuple[int, ...]:
    (_, channels, height, width), (_, _, patch_height, patch_width) = a["images"].shape, a["weight"].shape
    patches = (height // patch_height) * (width // patch_width)
    return stem_macs(patches, channels * patch_height * patch_width, s)


def _of_attention(a: dict[str, Any], s: AttentionSlice) -> tuple[int, ...]:
    return attention_macs(a["x"].shape[1], s, a["queries"])


def _of_mlp(a: dict[str, Any], s: MlpSlice) -> tuple[int, ...]:
    return mlp_macs(a["x"].shape[1], s)


def _of_head(a: dict[str, Any], s: HeadSlice) -> tuple[int, ...]:
    return (0,) if a["weight"] is None else head_macs(s)


_BLOCKS: dict[str, tuple[Any, Callable[..., tuple[int, ...]]]] = {
    "stem": (EmbedSlice, _of_stem),
    "attention_block": (AttentionSlice, _of_attention),
    "mlp_block": (MlpSlice, _of_mlp),
    "head": (HeadSlice, _of_head),
}


def _formula(name: str) -> Callable[..., int]:
    """Make the function that counts a call of an op from its arguments: two operations per multiply-accumulate."""
    block = name.removesuffix("_backward")
    kind, macs_of = _BLOCKS[block]
    names = ops.argument_names(name)

    def count(*arguments, out_val=None, **keywords) -> int:
        a = {**dict(zip(names, arguments, strict=False)), **keywords}
        batch = a["images" if block == "stem" else "x"].shape[0]
        slices = unflatten(kind, a["slices"])
        each = [macs_of(a, s) for s in slices]
        times = [1] * len(_PRODUCTS[block]) if name == block else _products_of_backward(block, a)
        return 2 * _over_images([sum(map(int.__mul__, macs, times)) for macs in each], a["width_index"], batch)

    return count


def _products_of_backward(block: str, a: dict[str, Any]) -> list[int]:
    """How many gradients of its operands each product of the block computes."""

    def wanted(parameter: str) -> bool:
        return a[f"grad_{parameter}"] is not None

    times = []
    for weight, before in _PRODUCTS[block]:
        through = a["x_grad"] or any(map(wanted, before))
        times.append(2 * through if weight is None else through + wanted(weight))
    return times


def _network(images, packed, plans, columns, width_index, pooled_only, out_val=None) -> int:
    unknown = [plan for plan in plans if plan not in _plans]
    if unknown:
        raise RuntimeError("the operations of a plan that CpuNetwork did not make cannot be counted")
    made_of: list[tuple[NetworkSizes, Subnetwork]] = [_plans[plan] for plan in plans]
    each = [network_macs(sizes, subnetwork, pooled_only) for sizes, subnetwork in made_of]
    return 2 * _over_images(each, width_index, images.shape[0])


def _over_images(each: Sequence[int], width_index: Tensor | None, batch: int) -> int:
    """The sum over a batch of what an image of each slice takes; of the largest, if a fake tensor hides the widths."""
    if width_index is None:
        return each[0] * batch
    if type(width_index) is not Tensor or width_index.device.type == "meta":
        return max(each) * batch
    return sum(each[index] for index in width_index.tolist())


_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_plan(plan: Tensor, sizes: NetworkSizes, subnetwork: Subnetwork) -> None:
    """Note what a plan, which holds addresses only, was made of."""
    _plans[plan] = sizes, subnetwork


# ---- Registration ----

_COUNTER = "torch.utils.flop_counter"


def _register(counter: Any) -> None:
    def register(name: str, formula: Callable[..., int]) -> None:
        op = getattr(torch.ops.hydravit, name)
        if op not in counter.flop_registry:  # this module may have been loaded anew
            counter.register_flop_formula(op, get_raw=True)(formula)

    for backend in ("native", "triton"):
        for name in ops.SCHEMAS:
            register(f"{name}_{backend}", _formula(name))
    register("network_native", _network)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter is imported.

    To import it here would import Triton, which takes longer than all else.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module
        return spec


def register_formulas() -> None:
    """Let ``torch.utils.flop_counter`` know the ops, now or as soon as it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


register_formulas()
