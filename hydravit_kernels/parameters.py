"""The parameters of a whole network in order: of the stem, of every block (attention, then MLP), of the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

_STEM, _BLOCK, _HEAD = 5, 14, 4
_STEM_WEIGHT, _FC1_WEIGHT, _HEAD_WEIGHT = 0, _STEM + 9, -2


class NetworkParameter(NamedTuple):
    """``weight``: of a product, so that packing lays it out anew. ``optional``: may be None."""

    name: str
    shape: tuple[int, ...]
    weight: bool = False
    optional: bool = False


class NetworkSizes(NamedTuple):
    """Of the full network. ``positions``: position embeddings; ``classes``: 0 without a classifier."""

    depth: int
    embed: int
    hidden: int
    channels: int
    patch_height: int
    patch_width: int
    cls_tokens: int
    reg_tokens: int
    positions: int
    classes: int

    @classmethod
    def of(cls, parameters: Sequence[Tensor | None]) -> NetworkSizes:
        """Those of these parameters. Every shape is checked: kernels that know the sizes alone would read beyond.

        Raises:
            ValueError: their number fits no depth, or one that is not optional is absent.
            RuntimeError: one has another shape than the others make it expect.
        """
        depth, rest = divmod(len(parameters) - _STEM - _HEAD, _BLOCK)
        if depth < 1 or rest:
            raise ValueError(f"parameters: {_STEM} + {_BLOCK} * depth + {_HEAD} expected, {len(parameters)} given")
        stem, fc1, classifier = (parameters[i] for i in (_STEM_WEIGHT, _FC1_WEIGHT, _HEAD_WEIGHT))
        for name, weight, axes in (("weight", stem, 4), ("fc1.weight", fc1, 2)):
            if weight is None or weight.dim() != axes:
                given = None if weight is None else tuple(weight.shape)
                raise ValueError(f"{name}: a tensor of {axes} axes expected, {given} given")
        tokens = [0 if token is None else token.shape[1] for token in parameters[2:_STEM]]
        classes = 0 if classifier is None else classifier.shape[0]
        sizes = cls(depth, stem.shape[0], fc1.shape[0], *stem.shape[1:], *tokens, classes)
        for expected, parameter in zip(sizes.parameters(), parameters, strict=True):
            if parameter is None and not expected.optional:
                raise ValueError(f"{expected.name}: a tensor expected, None given")
            if parameter is not None and parameter.shape != expected.shape:
                raise RuntimeError(f"{expected.name}: shape {expected.shape} expected, {tuple(parameter.shape)} given")
        return sizes

    def parameters(self) -> list[NetworkParameter]:
        """All of them, in order."""
        embed, hidden = self.embed, self.hidden

        def weight(name: str, *shape: int, optional: bool = False) -> NetworkParameter:
            return NetworkParameter(name, shape, True, optional)

        def vector(name: str, *shape: int) -> NetworkParameter:
            return NetworkParameter(name, shape, optional=True)

        block = [
            NetworkParameter("norm1.weight", (embed,)), NetworkParameter("norm1.bias", (embed,)),
            weight("qkv.weight", 3 * embed, embed), vector("qkv.bias", 3 * embed),
            weight("proj.weight", embed, embed), vector("proj.bias", embed), vector("ls1.gamma", embed),
            NetworkParameter("norm2.weight", (embed,)), NetworkParameter("norm2.bias", (embed,)),
            weight("fc1.weight", hidden, embed), vector("fc1.bias", hidden),
            weight("fc2.weight", embed, hidden), vector("fc2.bias", embed), vector("ls2.gamma", embed),
        ]  # fmt: skip
        return [
            weight("weight", embed, self.channels, self.patch_height, self.patch_width), vector("bias", embed),
            vector("cls_token", 1, self.cls_tokens, embed), vector("reg_token", 1, self.reg_tokens, embed),
            vector("pos_embed", 1, self.positions, embed),
            *(block * self.depth),
            vector("norm_weight", embed), vector("norm_bias", embed),
            weight("head.weight", self.classes, embed, optional=True), vector("head.bias", self.classes),
        ]  # fmt: skip
