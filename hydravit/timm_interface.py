"""What timm's users expect of a ``VisionTransformer`` besides its forward, for ``HydraViT`` at any width.

Names, arguments and results are those of timm 1.0. A method that computes takes ``heads`` too. Nothing here imports
timm.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydravit.config import HydraViTConfig, check_image_size
from hydravit.geometry import Selection
from hydravit.layers import Block, InPlaceGradients, PatchEmbed
from hydravit.structure import Fused
from hydravit_kernels import Subnetwork

_LAYOUTS = ("NCHW", "NLC")


class TimmInterface(nn.Module):
    """The part of ``HydraViT`` that only timm's tools call."""

    config: HydraViTConfig
    blocks: nn.Sequential
    head: Any
    heads: int
    patch_embed: PatchEmbed
    pos_embed: nn.Parameter
    slice_gradients: InPlaceGradients | None
    dynamic_img_size = False  # whether calls take images of any size in whole patches, besides the config's
    grad_checkpointing = False  # whether backward computes the blocks anew instead of keeping their activations

    # Defined in model.py.
    subnetwork: Any
    weights_changed: Any
    reset_classifier: Any
    structure: Any
    _enter: Any
    _stem: Any
    _block: Any
    _final_norm: Any
    _resolve_subnetworks: Any

    # Sizes ------------------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the full model's features; a width has ``subnetwork(heads).embed.embed`` of them."""
        return self.config.embed

    @property
    def head_hidden_size(self) -> int:
        """Channels of the full model's pooled features."""
        return self.config.embed

    @property
    def embed_dim(self) -> int:
        """Channels of the full model's residual."""
        return self.config.embed

    @property
    def depth(self) -> int:
        return self.config.depth

    @property
    def in_chans(self) -> int:
        return self.config.in_channels

    @property
    def global_pool(self) -> str:
        return self.config.pool

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens."""
        return self.config.prefix_tokens

    @property
    def num_reg_tokens(self) -> int:
        return self.config.register_tokens

    @property
    def has_class_token(self) -> bool:
        return self.config.class_token

    @property
    def no_embed_class(self) -> bool:
        return self.config.no_embed_class

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each block its name, the channels of its output at the width ``heads``, and pixels per patch."""
        channels = self.subnetwork(self.heads).embed.embed
        return [
            {"module": f"blocks.{i}", "num_chs": channels, "reduction": self.config.patch_size}
            for i in range(self.config.depth)
        ]

    # Intermediate features --------------------------------------------------------------------------------------------

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        heads: int | Tensor | Subnetwork | None = None,
    ) -> Any:
        """Compute the outputs of several blocks, and what ``forward_features`` returns.

        Args:
            x: images ``(B, in_channels, height, width)``.
            indices: the blocks, negative ones from the end; or how many, the last ones; None: all.
            return_prefix_tokens: whether each intermediate is a pair, whose second part are the tokens before the
                patches, ``(B, prefix_tokens, Dk)``.
            norm: whether intermediates pass the final norm, if the model has it before pooling.
            stop_early: whether the blocks after the last of these do not run.
            output_fmt: ``"NCHW"``: intermediates are ``(B, Dk, rows, columns)`` of patches; ``"NLC"``: ``(B, P, Dk)``.
            intermediates_only: whether the intermediates are returned alone.
            output_dict: whether the result is a dict of ``image_features``, ``image_intermediates`` and, if wanted,
                ``image_intermediates_prefix``.
            heads: as in ``forward``.
        Returns:
            ``(features, intermediates)``, unless ``intermediates_only`` or ``output_dict`` says otherwise.
        """
        if output_fmt not in _LAYOUTS:
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}")
        if self.dynamic_img_size and (model := self._of_size(x)) is not self:
            return model.forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict,
                heads=heads,
            )  # fmt: skip
        taken = self._blocks_of(indices)
        images, selection, fused = self._enter(x, heads)
        x, outputs = self._stem(images, selection, fused), []
        for i in range(max(taken) + 1 if stop_early else len(self.blocks)):
            x = self._block(i, x, selection, fused)
            if i in taken:
                outputs.append(self._normed(x, selection, fused) if norm else x)

        prefix = self.config.prefix_tokens
        intermediates: list[Any] = [y[:, prefix:] for y in outputs]
        if output_fmt == "NCHW":
            intermediates = [y.transpose(1, 2).unflatten(2, self.config.grid).contiguous() for y in intermediates]
        prefixes = [y[:, :prefix] for y in outputs] if prefix and return_prefix_tokens else None
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": intermediates}
            if prefixes is not None:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self._normed(x, selection, fused)
            return result
        if prefixes is not None:
            intermediates = list(zip(intermediates, prefixes, strict=True))
        return intermediates if intermediates_only else (self._normed(x, selection, fused), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        *,
        heads: int | Tensor | Subnetwork | None = None,
    ) -> list[Any]:
        """Compute the outputs of the last ``n`` blocks, or of the blocks ``n``: DINO's name of the method above."""
        layout = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, False, layout, True, heads=heads)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last of ``indices``, and return these counted from the beginning.

        Args:
            indices: as in ``forward_intermediates``.
            prune_norm: whether a norm before pooling is removed.
            prune_head: whether classifier, pooling and a norm after pooling are removed.
        """
        self._check_no_gradients("prune_intermediate_layers")
        taken = self._blocks_of(indices)
        if self.config.cuts and len(taken) and max(taken) + 1 < len(self.blocks):
            raise ValueError("prune_intermediate_layers: config.cuts names all layers; extract the full width first")
        self.blocks = cast("nn.Sequential", self.blocks[: max(taken) + 1])
        self.adopt(dataclasses.replace(self.config, depth=len(self.blocks)))
        final_norm = self.config.final_norm
        if prune_norm if final_norm == "norm" else prune_head:
            setattr(self, final_norm, nn.Identity())
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _blocks_of(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.blocks)
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            if not 0 < last <= count:
                raise ValueError(f"indices: the number of last blocks must be in 1..{count}, not {last}")
            return [*range(count - last, count)]
        if not indices or not all(-count <= i < count for i in indices):
            raise ValueError(f"indices must be blocks in {-count}..{count - 1}, not {indices}")
        return [i % count for i in indices]

    def _normed(self, x: Tensor, selection: Selection, fused: Fused) -> Tensor:
        """Apply the final norm if it precedes pooling: one that follows it is no part of the features."""
        return self._final_norm(x, selection, fused) if self.config.final_norm == "norm" else x

    # Training ---------------------------------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let backward compute each block anew instead of keeping its activations; gradients have the same bits."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimizers do not decay, besides all of one axis."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names that make a group of the stem and of each block, from which timm's
        optimizers know the depth of a parameter."""
        return {
            "stem": r"^(?:cls_token|reg_token|dist_token|pos_embed|patch_embed)",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    # Other images -----------------------------------------------------------------------------------------------------

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Take images of another size from now on: the positions are resampled as timm does, and the config follows.

        ``pos_embed`` is a new parameter where the patch grid changes: make an optimizer or an engine afterwards.

        Raises ``ValueError`` for a size that is not whole patches, and for another ``patch_size``.
        """
        config = self.config
        if patch_size is not None and check_image_size(patch_size, 1) != (config.patch_size,) * 2:
            raise ValueError(f"patch_size stays {config.patch_size}: set_input_size resamples no patch weights")
        if img_size is None:
            return
        size = img_size if isinstance(img_size, int) else tuple(img_size)
        new = dataclasses.replace(config, image_size=check_image_size(size, config.patch_size))
        if new.grid != config.grid:
            self._check_no_gradients("set_input_size")
            self.pos_embed = nn.Parameter(self._resampled(new).detach(), self.pos_embed.requires_grad)
        self.adopt(new)
        if isinstance(self.patch_embed, PatchEmbed):
            self.patch_embed.set_sizes(new)

    def _of_size(self, images: Any) -> Any:
        """Return the model for images of this size: with ``dynamic_img_size`` a view of this one, whose positions are
        resampled."""
        if not isinstance(images, Tensor) or images.dim() != 4:
            return self
        size = tuple(images.shape[2:])
        return self if size == self.config.image_size else self._view(size)

    def _of_tokens(self, features: Any) -> Any:
        """Return the model for features of so many tokens, as ``_of_size``. No grid matters to them, so it is a row."""
        if not isinstance(features, Tensor) or features.dim() != 3:
            return self
        patches, patch = features.shape[1] - self.config.prefix_tokens, self.config.patch_size
        return self if features.shape[1] == self.config.tokens else self._view((patch, patches * patch))

    def _view(self, size: tuple[int, ...]) -> Any:
        """Make a model for images of another size that shares modules, parameters and their gradients."""
        if torch.compiler.is_compiling():
            raise ValueError("dynamic_img_size: a compiled model has one size, which model.set_input_size changes")
        view: Any = copy.copy(self)
        view.config = dataclasses.replace(self.config, image_size=check_image_size(size, self.config.patch_size))
        view._sizes, view._image_shape = view.config.sizes, view.config.image_shape
        view._parameters = {name: p for name, p in self._parameters.items() if name != "pos_embed"}
        view.pos_embed = self._resampled(view.config)
        view._structure, view.slice_gradients = self.structure(), self.slice_gradients
        view.packed_inference = None  # the packed copy has the positions of one size
        return view

    def _resampled(self, config: HydraViTConfig) -> Tensor:
        """Resample the patches' positions to another config's grid."""
        old, new = self.config.grid, config.grid
        prefix, patches = self.pos_embed.split([self.config.pos_tokens - old[0] * old[1], old[0] * old[1]], dim=1)
        return torch.cat([prefix, resample_positions(patches, old, new)], dim=1)

    def adopt(self, config: HydraViTConfig) -> None:
        """Follow a config of other sizes or widths; the parameters have to fit already."""
        self.config = config
        for block in self.blocks:
            if isinstance(block, Block):
                block.config = config
        self._resolve_subnetworks()
        self.weights_changed()

    def _check_no_gradients(self, method: str) -> None:
        if self.slice_gradients is not None:
            raise ValueError(f"{method} replaces parameters that have gradients in place: call it before training")


def resample_positions(patches: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding ``(1, h * w, D)`` to ``(1, H * W, D)``, and keep its dtype."""
    image = patches.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)
