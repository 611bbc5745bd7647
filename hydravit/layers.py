"""The modules of the model: parameters under timm's names and shapes.

Each module can run by itself on a slice of its full weights, at any width: it takes the slice as a keyword, and without
one it serves the full width. This is the readable maths of a layer. A ``Block`` runs two fused ops in place of its
modules wherever nobody could tell (``structure.py``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.config import HydraViTConfig
from hydravit.geometry import every_width, full_attention
from hydravit_kernels import AttentionSlice, EmbedSlice, Intervals, MlpSlice

Parameters = TypeVar("Parameters", bound=tuple)


class InPlaceGradients(Protocol):
    """Gradients in place as model and optimizer see them; ``hydravit.training.SliceGradients`` has all of this."""

    @property
    def marked(self) -> frozenset[kernels.Subnetwork]:
        """The subnetworks whose slices may hold gradients."""
        ...

    def mark(self, subnetworks: Iterable[kernels.Subnetwork]) -> None:
        """Note that these subnetworks' slices are about to receive gradients."""

    def grads_of(self, parameters: Parameters) -> Parameters:
        """Return the tensors to which backward adds these parameters' gradients; None for a parameter without one."""
        ...


def grads_of(gradients: InPlaceGradients | None, parameters: Parameters) -> Parameters | None:
    """Return the buffers of the parameters' gradients; None where autograd gets the gradients.

    It gets them of a parametrized parameter, whose gradient goes on to the tensors it is computed from.
    """
    if gradients is None or not all(p is None or (p if p._base is None else p._base).is_leaf for p in parameters):
        return None
    return gradients.grads_of(parameters)


class LayerSlice(NamedTuple):
    """What one subnetwork reads of one layer."""

    attention: AttentionSlice
    mlp: MlpSlice

    @property
    def embed(self) -> int:
        return self.attention.embed


class LayerCall(NamedTuple):
    """What one call of the model asks of one layer.

    Attributes:
        slices: one per subnetwork of the call.
        width_index: ``(B,)`` int64, which of the slices an image uses; None: all use the only one.
        backend: whose fused ops run; None: the layer runs its modules.
        gradients: the buffers to which fused ops add the parameters' gradients; None: autograd gets them.
        pool: the range ``[start, stop)`` of tokens to return, where nobody needs the others; None: all tokens.
    """

    slices: Sequence[LayerSlice]
    eps: float
    width_index: Tensor | None = None
    backend: str | None = None
    gradients: InPlaceGradients | None = None
    pool: tuple[int, int] | None = None


def cut(parameter: Tensor | None, axis: int, intervals: Intervals | None) -> Any:
    """Return the intervals of one axis, as a view if there is only one; None for the intervals stands for all."""
    if parameter is None or intervals is None:
        return parameter
    parts = [parameter.narrow(axis, offset, length) for offset, length in intervals]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def embed_of(s: EmbedSlice | AttentionSlice | MlpSlice | kernels.HeadSlice | None) -> Intervals | None:
    """Return the interval of the residual that a slice reads."""
    return None if s is None else ((s.embed_offset, s.embed),)


class Linear(nn.Linear):
    """``nn.Linear`` of which a call may use some rows (outputs) and columns (inputs)."""

    def forward(self, input: Tensor, rows: Intervals | None = None, columns: Intervals | None = None) -> Tensor:
        return F.linear(input, cut(cut(self.weight, 0, rows), 1, columns), cut(self.bias, 0, rows))


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of a slice."""

    def forward(self, input: Tensor, s: Any = None, eps: float | None = None) -> Tensor:
        channels = self.normalized_shape[0] if s is None else s.embed
        if kernels.sizes(input)[-1] != channels:
            raise ValueError(f"x has {input.shape[-1]} channels, the norm {channels}: pass the slice of the width as s")
        weight, bias = (cut(p, 0, embed_of(s)) for p in (self.weight, self.bias))
        return F.layer_norm(input, (channels,), weight, bias, self.eps if eps is None else eps)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` of which a call may use some rows (output channels)."""

    def _apply(self, fn, recurse=True):
        """Keep rows contiguous under ``to(memory_format=torch.channels_last)``: to a fused op they are a matrix's."""
        super()._apply(fn, recurse)
        if not self.weight.is_contiguous():
            self.weight.data = self.weight.data.contiguous()
        return self

    def forward(self, input: Tensor, rows: Intervals | None = None) -> Tensor:
        return self._conv_forward(input, cut(self.weight, 0, rows), cut(self.bias, 0, rows))


class GELU(nn.GELU):
    """The exact GELU, which the fused ops compute too."""


class QuickGELU(nn.Module):
    """GELU by a sigmoid (OpenAI's CLIP)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> nn.Module:
    return nn.GELU("tanh") if name == "gelu_tanh" else QuickGELU() if name == "quick_gelu" else GELU()


class DropPath(nn.Module):
    """Drops a branch of an image with probability ``drop_prob`` while training (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def factors(self, x: Tensor) -> Tensor | None:
        """Draw factors ``(B,)``: 0 drops an image's branch; their mean is 1. None: nothing is dropped."""
        if not self.training or self.drop_prob == 0.0:
            return None
        keep = 1.0 - self.drop_prob
        return x.new_empty(x.shape[0]).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, 1, 1)


class LayerScale(nn.Module):
    def __init__(self, embed: int, init: float, **factory):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed,), init, **factory))

    def forward(self, x: Tensor, s: Any = None) -> Tensor:
        return x * cut(self.gamma, 0, embed_of(s))


class PatchEmbed(nn.Module):
    def __init__(self, config: HydraViTConfig, **factory):
        super().__init__()
        self.set_sizes(config)
        sizes = config.in_channels, config.embed, config.patch_size, config.patch_size
        self.proj = Conv2d(*sizes, bias=not config.pre_norm, **factory)

    def set_sizes(self, config: HydraViTConfig) -> None:
        """Note the sizes of images under timm's names; nothing here computes with them."""
        self.img_size, self.patch_size = config.image_shape[1:], (config.patch_size, config.patch_size)
        self.grid_size = config.grid
        self.num_patches = config.grid[0] * config.grid[1]

    def forward(self, images: Tensor, s: EmbedSlice | None = None) -> Tensor:
        """Compute the patches' tokens ``(B, P, Dk)`` of images ``(B, C, height, width)``."""
        return call(self.proj, images, rows=embed_of(s)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: HydraViTConfig, **factory):
        super().__init__()
        self.full = full_attention(config)
        self.qkv = Linear(config.embed, 3 * config.embed, bias=config.qkv_bias, **factory)
        self.attn_drop = nn.Identity()  # sees the attention weights
        self.proj = Linear(config.embed, config.embed, bias=config.proj_bias, **factory)

    @property
    def num_heads(self) -> int:
        return self.full.heads

    @property
    def head_dim(self) -> int:
        return self.full.head_dim

    @property
    def scale(self) -> float:
        return self.full.scale

    def forward(self, x: Tensor, s: AttentionSlice | None = None) -> Tensor:
        """Let the tokens ``x (B, N, Dk)`` attend to each other; the result has the same shape."""
        s = self.full if s is None else s
        query, key, value = self._query_key_value(x, s)
        weights = call(self.attn_drop, (query @ key.transpose(-2, -1) * s.scale).softmax(-1), s=s)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        return call(self.proj, attended, rows=embed_of(s), columns=s.proj_columns)

    def weights(self, x: Tensor, s: AttentionSlice) -> Tensor:
        """Compute how much every token attends to every other, ``(B, heads, N, N)``."""
        query, key, _ = self._query_key_value(x, s)
        return (query @ key.transpose(-2, -1) * s.scale).softmax(-1)

    def _query_key_value(self, x: Tensor, s: AttentionSlice) -> list[Tensor]:
        """Compute queries, keys and values, each ``(B, heads, N, channels)``."""
        qkv = call(self.qkv, x, rows=None if s == self.full else s.qkv_rows, columns=embed_of(s))
        channels = (s.head_dim, s.head_dim, s.value_dim)
        parts = qkv.split([s.heads * length for length in channels], dim=-1)
        return [p.unflatten(-1, (s.heads, length)).transpose(1, 2) for p, length in zip(parts, channels, strict=True)]


class Mlp(nn.Module):
    def __init__(self, config: HydraViTConfig, **factory):
        super().__init__()
        self.fc1 = Linear(config.embed, config.hidden, bias=config.proj_bias, **factory)
        self.act = _activation(config.act_layer)
        self.fc2 = Linear(config.hidden, config.embed, bias=config.proj_bias, **factory)

    def forward(self, x: Tensor, s: MlpSlice | None = None) -> Tensor:
        hidden = None if s is None else ((s.hidden_offset, s.hidden),)
        x = call(self.act, call(self.fc1, x, rows=hidden, columns=embed_of(s)), s=s)
        return call(self.fc2, x, rows=embed_of(s), columns=hidden)


class Classifiers(nn.Module):
    """One classifier per width: ``weight (widths, classes, D)`` and ``bias (widths, classes)``."""

    def __init__(self, config: HydraViTConfig, **factory):
        super().__init__()
        widths = len(config.separate_classifiers)
        self.weight = nn.Parameter(torch.empty(widths, config.num_classes, config.embed, **factory))
        self.bias = nn.Parameter(torch.zeros(widths, config.num_classes, **factory))

    def forward(self, x: Tensor, rows: Intervals | None = None, columns: Intervals | None = None) -> Tensor:
        """``rows`` counts the rows of all classifiers; None: those of the widest."""
        if rows is None:
            rows = (((len(self.weight) - 1) * self.weight.shape[1], self.weight.shape[1]),)
        weight, bias = classifier_rows(self)
        return F.linear(x, cut(cut(weight, 0, rows), 1, columns), cut(bias, 0, rows))


def classifier_rows(head: nn.Module) -> tuple[Any, Any]:
    """Return the rows of all classifiers, ``(rows, D)`` and ``(rows,)``; a ``HeadSlice`` picks those of a width."""
    if isinstance(head, Classifiers):
        return head.weight.flatten(0, 1), head.bias.flatten()
    return (head.weight, head.bias) if isinstance(head, nn.Linear) else (None, None)


class Block(nn.Module):
    """Attention and MLP with pre-norms and residuals, as timm's ``Block``."""

    def __init__(self, config: HydraViTConfig, drop_path: float, **factory):
        super().__init__()
        self.config = config
        self.norm1 = LayerNorm(config.embed, config.norm_eps, **factory)
        self.attn = Attention(config, **factory)
        self.ls1 = _layer_scale(config, **factory)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(config.embed, config.norm_eps, **factory)
        self.mlp = Mlp(config, **factory)
        self.ls2 = _layer_scale(config, **factory)
        self.drop_path2 = DropPath(drop_path)

    def attention_parameters(self) -> kernels.AttentionParameters:
        return kernels.AttentionParameters(
            norm_weight=self.norm1.weight,
            norm_bias=self.norm1.bias,
            qkv_weight=self.attn.qkv.weight,
            qkv_bias=self.attn.qkv.bias,
            proj_weight=self.attn.proj.weight,
            proj_bias=self.attn.proj.bias,
            layer_scale=getattr(self.ls1, "gamma", None),
        )

    def mlp_parameters(self) -> kernels.MlpParameters:
        return kernels.MlpParameters(
            norm_weight=self.norm2.weight,
            norm_bias=self.norm2.bias,
            fc1_weight=self.mlp.fc1.weight,
            fc1_bias=self.mlp.fc1.bias,
            fc2_weight=self.mlp.fc2.weight,
            fc2_bias=self.mlp.fc2.bias,
            layer_scale=getattr(self.ls2, "gamma", None),
        )

    def forward(self, x: Tensor, layer: LayerCall | None = None) -> Tensor:
        """Add both branches to the residual ``x (B, N, Dk)``.

        Args:
            layer: what the model's call asks of this layer; None: the block runs its modules at the width whose
                residual has as many channels as ``x``.
        """
        layer = self._layer_of(x) if layer is None else layer
        if layer.backend is None:
            return kernels.per_image(
                lambda x, _, s: self._run_modules(x, s, unusual(layer.eps, self.config)),
                x,
                None,
                layer.slices,
                layer.width_index,
            )
        attention, mlp = [s.attention for s in layer.slices], [s.mlp for s in layer.slices]
        if any(s.heads for s in attention):
            of_attention = self.attention_parameters()
            x = kernels.attention_block(
                x, of_attention, self.drop_path1.factors(x), attention, layer.eps, layer.width_index,
                queries=None if layer.pool is None else layer.pool[1],
                backend=layer.backend, grads=grads_of(layer.gradients, of_attention),
            )  # fmt: skip
        if layer.pool is not None:
            x = x[:, layer.pool[0] : layer.pool[1]]
        if any(s.hidden for s in mlp):
            of_mlp = self.mlp_parameters()
            x = kernels.mlp_block(
                x, of_mlp, self.drop_path2.factors(x), mlp, layer.eps, layer.width_index,
                backend=layer.backend, grads=grads_of(layer.gradients, of_mlp),
            )  # fmt: skip
        return x

    def _run_modules(self, x: Tensor, s: LayerSlice, eps: float | None) -> Tensor:
        """Run the block as its modules say, for images of one width."""
        attention, mlp = s
        if attention.heads:
            y = call(self.attn, call(self.norm1, x, s=attention, eps=eps), s=attention)
            x = x + call(self.drop_path1, call(self.ls1, y, s=attention), s=attention)
        if mlp.hidden:
            y = call(self.mlp, call(self.norm2, x, s=mlp, eps=eps), s=mlp)
            x = x + call(self.drop_path2, call(self.ls2, y, s=mlp), s=mlp)
        return x

    def _layer_of(self, x: Tensor) -> LayerCall:
        found = _layers_by_channels(self.config)
        if x.shape[-1] not in found:
            raise ValueError(
                f"x has {x.shape[-1]} channels; the widths of this model have {', '.join(map(str, found))}"
            )
        return LayerCall([found[x.shape[-1]]], self.config.norm_eps)


@functools.lru_cache
def _layers_by_channels(config: HydraViTConfig) -> dict[int, LayerSlice]:
    """Map the channels of the residual to the slices of a layer, of the widest subnetwork that has so many."""
    return {s.embed.embed: LayerSlice(s.attention[0], s.mlp[0]) for s in every_width(config).values()}


def channels_tell_width(config: HydraViTConfig) -> bool:
    """Whether no two widths have a residual of equally many channels."""
    return len(_layers_by_channels(config)) == len(every_width(config))


def _layer_scale(config: HydraViTConfig, **factory) -> nn.Module:
    return nn.Identity() if config.layer_scale is None else LayerScale(config.embed, config.layer_scale, **factory)


def unusual(eps: float, config: HydraViTConfig) -> float | None:
    """Return a subnetwork's epsilon if it is not the config's; None: the norms have their own."""
    return None if eps == config.norm_eps else eps


def call(module: nn.Module, x: Tensor, **slices: Any) -> Tensor:
    """Call a module with its slice. One that takes no slices gets ``x`` alone (``structure.py`` refuses the call where
    it cannot serve the width)."""
    return module(x, **slices) if takes_slices(module) else module(x)


def takes_slices(module: nn.Module) -> bool:
    """Whether a module's forward takes the keywords that the module in its place gets from ``call``."""
    if "forward" not in module.__dict__ and type(module).forward in _OWN:
        return True
    parameters = inspect.signature(module.forward).parameters.values()
    return names_slices(module) or any(p.kind is p.VAR_KEYWORD for p in parameters)


SLICED = (Linear, LayerNorm, Conv2d, LayerScale, PatchEmbed, Attention, Mlp, Classifiers, Block)
_OWN = {module.forward for module in SLICED}


def names_slices(module: nn.Module) -> bool:
    """Whether a module's forward names a keyword of ``call``, rather than take any."""
    return not {"s", "rows", "layer"}.isdisjoint(inspect.signature(module.forward).parameters)


def init_weights(model: nn.Module) -> None:
    """Draw weights as timm does: from a truncated normal of deviation 0.02; biases are zero."""
    if model.get_parameter("pos_embed").is_meta:  # they have no values, and torch would import its compiler
        return
    for module in model.modules():
        if isinstance(module, (nn.Linear, Classifiers)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.get_parameter("pos_embed"), std=0.02)
    for token, std in (("cls_token", 1e-6), ("reg_token", 1e-6), ("dist_token", 0.02)):
        if hasattr(model, token):
            nn.init.normal_(getattr(model, token), std=std)
