"""The modules of the model: parameters under timm's names and shapes, and a block that runs its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.config import HydraViTConfig

_MODULE = nn.modules.module  # keeps the hooks on all modules
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

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
    """Return the buffers of the parameters' gradients; None where autograd gets the gradients."""
    return None if gradients is None else gradients.grads_of(parameters)


class Attention(nn.Module):
    def __init__(self, embed: int, qkv_bias: bool, proj_bias: bool, **factory):
        super().__init__()
        self.qkv = nn.Linear(embed, 3 * embed, bias=qkv_bias, **factory)
        self.proj = nn.Linear(embed, embed, bias=proj_bias, **factory)


class Mlp(nn.Module):
    def __init__(self, embed: int, hidden: int, bias: bool, **factory):
        super().__init__()
        self.fc1 = nn.Linear(embed, hidden, bias=bias, **factory)
        self.fc2 = nn.Linear(hidden, embed, bias=bias, **factory)


class LayerScale(nn.Module):
    def __init__(self, embed: int, init: float, **factory):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed,), init, **factory))


class PatchEmbed(nn.Module):
    def __init__(self, config: HydraViTConfig, **factory):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.embed, config.patch_size, config.patch_size, **factory)


class Classifier(nn.Module):
    """``weight (classes, D)`` and ``bias (classes,)``; separate classifiers add a first axis of widths to both."""

    def __init__(self, config: HydraViTConfig, **factory):
        super().__init__()
        widths = (len(config.separate_classifiers),) if config.separate_classifiers else ()
        self.weight = nn.Parameter(torch.empty(*widths, config.num_classes, config.embed, **factory))
        self.bias = nn.Parameter(torch.zeros(*widths, config.num_classes, **factory))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows of all classifiers, ``(rows, D)`` and ``(rows,)``; a ``HeadSlice`` picks those of a width."""
        return (self.weight, self.bias) if self.bias.dim() == 1 else (self.weight.flatten(0, 1), self.bias.flatten())


class Block(nn.Module):
    """Attention and MLP with pre-norms and residuals; the parameters of timm's ``Block``.

    A model without layer scale has blocks without ``ls1`` and ``ls2``.
    """

    ls1: LayerScale
    ls2: LayerScale

    def __init__(self, config: HydraViTConfig, drop_path: float, **factory):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed, config.norm_eps, **factory)
        self.attn = Attention(config.embed, config.qkv_bias, config.proj_bias, **factory)
        self.norm2 = nn.LayerNorm(config.embed, config.norm_eps, **factory)
        self.mlp = Mlp(config.embed, config.hidden, config.proj_bias, **factory)
        if config.layer_scale is not None:
            self.ls1 = LayerScale(config.embed, config.layer_scale, **factory)
            self.ls2 = LayerScale(config.embed, config.layer_scale, **factory)
        self.drop_path = drop_path

    def attention_parameters(self) -> kernels.AttentionParameters:
        return kernels.AttentionParameters(
            norm_weight=self.norm1.weight,
            norm_bias=self.norm1.bias,
            qkv_weight=self.attn.qkv.weight,
            qkv_bias=self.attn.qkv.bias,
            proj_weight=self.attn.proj.weight,
            proj_bias=self.attn.proj.bias,
            layer_scale=self.ls1.gamma if hasattr(self, "ls1") else None,
        )

    def mlp_parameters(self) -> kernels.MlpParameters:
        return kernels.MlpParameters(
            norm_weight=self.norm2.weight,
            norm_bias=self.norm2.bias,
            fc1_weight=self.mlp.fc1.weight,
            fc1_bias=self.mlp.fc1.bias,
            fc2_weight=self.mlp.fc2.weight,
            fc2_bias=self.mlp.fc2.bias,
            layer_scale=self.ls2.gamma if hasattr(self, "ls2") else None,
        )

    def forward(
        self,
        x: Tensor,
        attention: Sequence[kernels.AttentionSlice],
        mlp: Sequence[kernels.MlpSlice],
        eps: float,
        width_index: Tensor | None,
        backend: str,
        gradients: InPlaceGradients | None = None,
        pool: tuple[int, int] | None = None,
    ) -> Tensor:
        """Add both branches to the residual ``x (B, N, Dk)``.

        Args:
            attention, mlp: one slice per subnetwork of the call.
            width_index: ``(B,)`` int64, which of the slices an image uses; None: all use the only one.
            gradients: the buffers to which backward adds the parameters' gradients; None: autograd gets them.
            pool: the range ``[start, stop)`` of tokens to return, where nobody needs the others; None: all tokens.
        """
        if any(s.heads for s in attention):
            of_attention = self.attention_parameters()
            x = kernels.attention_block(
                x, of_attention, self.branch_scale(x), attention, eps, width_index,
                queries=None if pool is None else pool[1],
                backend=backend, grads=grads_of(gradients, of_attention),
            )  # fmt: skip
        if pool is not None:
            x = x[:, pool[0] : pool[1]]
        if any(s.hidden for s in mlp):
            of_mlp = self.mlp_parameters()
            x = kernels.mlp_block(
                x, of_mlp, self.branch_scale(x), mlp, eps, width_index,
                backend=backend, grads=grads_of(gradients, of_mlp),
            )  # fmt: skip
        return x

    def branch_scale(self, x: Tensor) -> Tensor | None:
        """Draw drop-path's factors ``(B,)``: 0 drops an image's branch; their mean is 1. None: nothing is dropped."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        return x.new_empty(x.shape[0]).bernoulli_(keep).div_(keep)


def hooks_of(block: nn.Module) -> list[dict]:
    """Return the tables of all hooks that see the block's input, its output or their gradients."""
    return [getattr(_MODULE, f"_global{name}") for name in _HOOKS] + [getattr(block, name) for name in _HOOKS]


def is_ours(block: nn.Module) -> bool:
    """Whether the block runs ``Block.forward``, not that of a subclass and not a patched one."""
    return type(block) is Block and "forward" not in block.__dict__


def init_weights(model: nn.Module) -> None:
    """Draw weights as timm does: from a truncated normal of deviation 0.02; biases are zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, Classifier)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.get_parameter("pos_embed"), std=0.02)
    for token in ("cls_token", "reg_token"):
        if hasattr(model, token):
            nn.init.normal_(getattr(model, token), std=1e-6)
