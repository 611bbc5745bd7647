"""The parameters of a network: their order, names in timm, shapes, and the axes along which a subnetwork slices them.

This is the one definition in Python; ``csrc/parameters.h`` has the same structs, field by field, for C++.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hydravit_kernels.subnetwork import AttentionSlice, Intervals, Subnetwork


class StemParameters(NamedTuple):
    """``weight (D, channels, patch, patch)``, ``bias (D,)``, tokens ``(1, count, D)``, ``pos_embed (1, P, D)``.

    ``P`` counts all tokens, or the patches only. All but ``weight`` may be None.
    """

    weight: Any
    bias: Any
    cls_token: Any
    reg_token: Any
    pos_embed: Any


class AttentionParameters(NamedTuple):
    """Norm ``(D,)``, ``qkv (3 * D, D)`` and ``(3 * D,)``, ``proj (D, D)`` and ``(D,)``, ``layer_scale (D,)``.

    Biases and ``layer_scale`` may be None.
    """

    norm_weight: Any
    norm_bias: Any
    qkv_weight: Any
    qkv_bias: Any
    proj_weight: Any
    proj_bias: Any
    layer_scale: Any


class MlpParameters(NamedTuple):
    """Norm ``(D,)``, ``fc1 (hidden, D)`` and ``(hidden,)``, ``fc2 (D, hidden)`` and ``(D,)``, ``layer_scale (D,)``.

    Biases of fc1 and fc2 and ``layer_scale`` may be None.
    """

    norm_weight: Any
    norm_bias: Any
    fc1_weight: Any
    fc1_bias: Any
    fc2_weight: Any
    fc2_bias: Any
    layer_scale: Any


class HeadParameters(NamedTuple):
    """Norm ``(D,)``, classifier ``weight (classes, D)`` and ``bias (classes,)``.

    Either pair may be None: then the norm is left out, or the result is the pooled features.
    """

    norm_weight: Any
    norm_bias: Any
    weight: Any
    bias: Any


BlockParameters = StemParameters | AttentionParameters | MlpParameters | HeadParameters


class NetworkParameters(NamedTuple):
    """The parameters of a whole network: one attention and one MLP tuple per layer.

    The entries are tensors, or anything else that belongs to one parameter: specs, gradient buffers, names.
    """

    stem: StemParameters
    attention: Sequence[AttentionParameters]
    mlp: Sequence[MlpParameters]
    head: HeadParameters

    def flat(self) -> list[Any]:
        """All entries in order: the stem, then per layer attention and MLP, then the head."""
        layers = [entries for layer in zip(self.attention, self.mlp, strict=True) for entries in layer]
        return list(itertools.chain(self.stem, *layers, self.head))


class ParameterSpec(NamedTuple):
    """``name`` is the one in timm's state dict, ``axes`` names what each axis counts (see ``NetworkSizes.axis``)."""

    name: str
    axes: tuple[str, ...]
    optional: bool = True


STEM = StemParameters(
    weight=ParameterSpec(
        "patch_embed.proj.weight", ("embed", "channels", "patch_height", "patch_width"), optional=False
    ),
    bias=ParameterSpec("patch_embed.proj.bias", ("embed",)),
    cls_token=ParameterSpec("cls_token", ("one", "cls_tokens", "embed")),
    reg_token=ParameterSpec("reg_token", ("one", "reg_tokens", "embed")),
    pos_embed=ParameterSpec("pos_embed", ("one", "positions", "embed")),
)
ATTENTION = AttentionParameters(
    norm_weight=ParameterSpec("norm1.weight", ("attention_embed",), optional=False),
    norm_bias=ParameterSpec("norm1.bias", ("attention_embed",), optional=False),
    qkv_weight=ParameterSpec("attn.qkv.weight", ("qkv", "attention_embed"), optional=False),
    qkv_bias=ParameterSpec("attn.qkv.bias", ("qkv",)),
    proj_weight=ParameterSpec("attn.proj.weight", ("attention_embed", "attended"), optional=False),
    proj_bias=ParameterSpec("attn.proj.bias", ("attention_embed",)),
    layer_scale=ParameterSpec("ls1.gamma", ("attention_embed",)),
)
MLP = MlpParameters(
    norm_weight=ParameterSpec("norm2.weight", ("mlp_embed",), optional=False),
    norm_bias=ParameterSpec("norm2.bias", ("mlp_embed",), optional=False),
    fc1_weight=ParameterSpec("mlp.fc1.weight", ("hidden", "mlp_embed"), optional=False),
    fc1_bias=ParameterSpec("mlp.fc1.bias", ("hidden",)),
    fc2_weight=ParameterSpec("mlp.fc2.weight", ("mlp_embed", "hidden"), optional=False),
    fc2_bias=ParameterSpec("mlp.fc2.bias", ("mlp_embed",)),
    layer_scale=ParameterSpec("ls2.gamma", ("mlp_embed",)),
)
HEAD = HeadParameters(
    norm_weight=ParameterSpec("norm.weight", ("embed",)),
    norm_bias=ParameterSpec("norm.bias", ("embed",)),
    weight=ParameterSpec("head.weight", ("classes", "embed")),
    bias=ParameterSpec("head.bias", ("classes",)),
)


class NetworkSizes(NamedTuple):
    """The sizes of a full network.

    ``positions`` counts the position embeddings, ``classes`` is 0 without a classifier, and the head pools the tokens
    ``[pool_start, pool_stop)``.
    """

    layers: int
    embed: int
    hidden: int
    channels: int
    patch_height: int
    patch_width: int
    cls_tokens: int
    reg_tokens: int
    positions: int
    classes: int
    image_height: int
    image_width: int
    pool_start: int
    pool_stop: int

    def axis(self, name: str) -> int:
        """The length of an axis, by its name in a ``ParameterSpec``."""
        if name == "one":
            return 1
        if name == "qkv":
            return 3 * self.embed
        if name in ("attention_embed", "mlp_embed", "attended"):
            return self.embed
        return getattr(self, name)

    def check(self, parameters: NetworkParameters) -> None:
        """Refuse parameters that do not fit, because kernels that know only the sizes would read beyond them.

        Raises:
            ValueError: the number of layers is wrong, or a parameter is absent that is not optional.
            RuntimeError: a parameter has a wrong shape.
        """
        if not len(parameters.attention) == len(parameters.mlp) == self.layers:
            raise ValueError(f"parameters: {self.layers} layers expected, {len(parameters.attention)} given")
        for (name, spec, _), parameter in zip(named_specs(self.layers), parameters.flat(), strict=True):
            shape = tuple(self.axis(axis) for axis in spec.axes)
            if parameter is None and not spec.optional:
                raise ValueError(f"{name}: a tensor expected, None given")
            if parameter is not None and tuple(parameter.shape) != shape:
                raise RuntimeError(f"{name}: shape {shape} expected, {tuple(parameter.shape)} given")

    def validate(self, subnetwork: Subnetwork) -> Subnetwork:
        """Return the subnetwork if it fits a network of these sizes.

        Raises:
            ValueError: a length, an interval or the number of layers does not fit.
        """
        attention, mlp, embed = subnetwork.attention, subnetwork.mlp, subnetwork.embed
        if not len(attention) == len(mlp) == self.layers:
            raise ValueError(
                f"subnetwork has {len(attention)} attention and {len(mlp)} MLP slices for {self.layers} layers"
            )
        if not subnetwork.eps > 0:
            raise ValueError(f"subnetwork: eps must be positive, not {subnetwork.eps}")
        _check_interval("embed", *embed, self.embed)
        if subnetwork.head[:2] != embed:
            raise ValueError(f"subnetwork: the head does not use the embed interval {tuple(embed)}")
        if self.classes:
            _check_interval("classes", *subnetwork.head[2:], self.classes)
        for layer in range(self.layers):
            if attention[layer][:2] != embed or mlp[layer][:2] != embed:
                raise ValueError(f"subnetwork: layer {layer} does not use the embed interval {tuple(embed)}")
            if attention[layer].heads < 0 or mlp[layer].hidden < 0:
                raise ValueError(f"subnetwork: layer {layer} has a negative length")
            if attention[layer].heads:
                self._check_attention(layer, attention[layer])
            if mlp[layer].hidden:
                _check_interval(f"layer {layer} hidden", *mlp[layer][2:], self.hidden)
        return subnetwork

    def _check_attention(self, layer: int, attention: AttentionSlice) -> None:
        if not math.isfinite(attention.scale):
            raise ValueError(f"subnetwork: layer {layer} has an attention scale of {attention.scale}")
        if min(attention.head_dim, attention.value_dim) < 1:
            raise ValueError(f"subnetwork: layer {layer} has heads without channels")
        if attention.pitch < max(attention.head_dim, attention.value_dim) and attention.heads > 1:
            raise ValueError(f"subnetwork: layer {layer} has heads that overlap (pitch {attention.pitch})")
        for name, start, length, size in (
            ("query rows", attention.query_row, attention.head_dim, 3 * self.embed),
            ("key rows", attention.key_row, attention.head_dim, 3 * self.embed),
            ("value rows", attention.value_row, attention.value_dim, 3 * self.embed),
            ("proj columns", attention.proj_column, attention.value_dim, self.embed),
        ):
            _check_interval(f"layer {layer} {name}", start, (attention.heads - 1) * attention.pitch + length, size)

    def parameter_slices(self, subnetwork: Subnetwork, final_norm: str = "norm") -> dict[str, tuple[Intervals, ...]]:
        """The intervals that the subnetwork reads along every axis of each parameter, by its name in a state dict.

        A skipped branch reads nothing, so the axes of its parameters have no intervals.
        """
        cut = [subnetwork.axes(layer) for layer in range(self.layers)]
        return {
            name: tuple(cut[layer].get(axis, ((0, self.axis(axis)),)) for axis in spec.axes)
            for name, spec, layer in named_specs(self.layers, final_norm)
        }


def named_specs(layers: int, final_norm: str = "norm") -> Iterator[tuple[str, ParameterSpec, int]]:
    """Every parameter in order: its name in a state dict, its spec and its layer (0 for stem and head).

    ``final_norm`` is timm's name of the norm before the classifier: "fc_norm" if it follows average pooling.
    """
    yield from ((spec.name, spec, 0) for spec in STEM)
    for layer in range(layers):
        yield from ((f"blocks.{layer}.{spec.name}", spec, layer) for spec in (*ATTENTION, *MLP))
    for spec in HEAD:
        yield spec.name.replace("norm", final_norm, 1), spec, 0


def _check_interval(name: str, offset: int, length: int, size: int) -> None:
    if offset < 0 or length < 1 or offset + length > size:
        raise ValueError(f"subnetwork: {name} [{offset}, {offset + length}) is not inside [0, {size})")
