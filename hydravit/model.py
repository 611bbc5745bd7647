"""The model: full-size parameters under timm's names, any width per call. ``hydravit_kernels`` does the arithmetic."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hydravit_kernels as kernels
from hydravit.config import HydraViTConfig
from hydravit.ends import Ends, make_head
from hydravit.geometry import GEOMETRIES, Selection, every_width, position
from hydravit.inference import Engine, PackedInference
from hydravit.integers import plain_int
from hydravit.layers import (
    Attention,
    Block,
    Classifiers,
    InPlaceGradients,
    LayerCall,
    LayerNorm,
    LayerSlice,
    PatchEmbed,
    call,
    init_weights,
    unusual,
)
from hydravit.structure import Fused, Structure
from hydravit_kernels import NetworkSizes, Subnetwork

# Calls name the same few subnetworks again and again: validating one takes longer than looking it up.
_validate = functools.lru_cache(maxsize=256)(NetworkSizes.validate)


class HydraViT(Ends):
    """A Vision Transformer whose first ``k`` heads are a complete smaller one, for every ``k`` (arXiv 2409.17978).

    Args:
        config: the full model.
        heads: active heads from now on; None for all. Every call can name its own: ``model(images, heads=3)``. Where
            the config counts widths otherwise (``width_steps``, ``cuts``), ``heads`` is a number of these.
        trained_heads: widths that were trained; calls may name no others, unless ``model.allow_untrained`` is True.
            None: calls may name any width.
        backend: ``"auto"`` or a name of ``hydravit_kernels.available_backends()``. The backend is selected when the
            model is made, moved or cast.
    """

    head: Any  # Linear, Classifiers where the config has separate ones, or nn.Identity where it has no classes

    def __init__(
        self,
        config: HydraViTConfig,
        heads: int | None = None,
        *,
        trained_heads: tuple[int, ...] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if config.geometry not in GEOMETRIES:
            raise ValueError(f"geometry: unknown {config.geometry!r}; known: {', '.join(GEOMETRIES)}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_embed = PatchEmbed(config, **factory)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed, **factory))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, config.embed, **factory))
        if config.register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, config.register_tokens, config.embed, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, config.pos_tokens, config.embed, **factory))
        if config.pre_norm:
            self.norm_pre = LayerNorm(config.embed, config.norm_eps, **factory)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config, rate, **factory) for rate in rates))
        self.add_module(config.final_norm, LayerNorm(config.embed, config.norm_eps, **factory))
        self.head = make_head(config, **factory)
        if config.distilled:
            self.head_dist = make_head(config, **factory)
        init_weights(self)

        self.declared_changes = 0  # how often `weights_changed` was called
        self.slice_gradients: InPlaceGradients | None = None  # set by hydravit.training.SliceGradients
        self.packed_inference: PackedInference | None = PackedInference()  # None: every call reads the weights in place
        self._structure: Structure | None = None
        self.requested_backend = kernels.check_backend(backend)
        self._select_backend(self.pos_embed)
        self._resolve_subnetworks()
        trained_heads = None if trained_heads is None else tuple(map(plain_int, trained_heads))
        known = trained_heads and all(type(k) is int and k in self._subnetworks for k in trained_heads)
        if trained_heads is not None and not known:
            raise ValueError(f"trained_heads must be widths of the model, {[*self._subnetworks]}, not {trained_heads}")
        self.trained_heads = None if trained_heads is None else tuple(sorted(set(trained_heads)))
        self.allow_untrained = False
        self.heads = max(self.allowed_heads) if heads is None else heads

    def __setattr__(self, name: str, value: Any) -> None:
        """Take a new ``head`` as timm's users assign it: the config has as many classes as a linear layer has rows."""
        super().__setattr__(name, value)
        if name == "head" and "_sizes" in self.__dict__:
            if not isinstance(value, Classifiers):
                classes = {nn.Identity: 0}.get(type(value), getattr(value, "out_features", self.config.num_classes))
                self.config = dataclasses.replace(self.config, num_classes=classes, separate_classifiers=())
            self._resolve_subnetworks()

    # Width and backend ------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Active heads of calls that do not name their own."""
        return kernels.sizes(self._heads_as_shape)[0] - 1

    @heads.setter
    def heads(self, heads: int) -> None:
        heads = plain_int(heads)
        self._check_heads(heads)
        # The length of an empty tensor keeps the number: torch.compile makes one graph for all lengths above 1, but one
        # for each value of an integer attribute.
        self._heads_as_shape = self._lengths[heads]

    @property
    def allowed_heads(self) -> tuple[int, ...]:
        """The widths that a call may name, ascending: those of the nesting method, if they were trained."""
        if self.trained_heads is None or self.allow_untrained:
            return tuple(self._subnetworks)
        trained = frozenset(self.trained_heads)
        return tuple(heads for heads in self._subnetworks if heads in trained)

    def _resolve_subnetworks(self) -> None:
        """Make all subnetworks, and what else follows from the config, so that a call only looks it up."""
        self._sizes, self._image_shape = self.config.sizes, self.config.image_shape
        self._subnetworks = every_width(self.config)
        self._lengths = {
            heads: torch.empty(heads + 1, 0, dtype=torch.float32, device="cpu") for heads in self._subnetworks
        }

    def _make_subnetwork(self, heads: int) -> Subnetwork:
        return GEOMETRIES[self.config.geometry](self.config, heads)

    def _check_heads(self, heads: int) -> None:
        if isinstance(heads, bool) or not isinstance(heads, (int, torch.SymInt)):
            kind = type(heads).__name__
            raise TypeError(
                f"heads must be an int, an integer tensor (B,) or a Subnetwork, not {kind} {str(heads):.40}"
            )
        if not self.config.narrowest <= heads <= self.config.widths:
            raise ValueError(f"heads must be in {self.config.narrowest}..{self.config.widths}, not {heads}")
        if not torch.compiler.is_compiling() and heads not in self._subnetworks:
            self.config.sizes.validate(self._make_subnetwork(heads))
        position(
            self.allowed_heads, heads, "was not trained (model.allow_untrained = True, --allow-untrained, allows it)"
        )

    def subnetwork(self, heads: int) -> Subnetwork:
        """Return what one width reads. Raise ``TypeError`` or ``ValueError`` for a width that is not allowed."""
        if type(heads) is not int:
            heads = plain_int(heads)
        if torch.compiler.is_compiling():  # a look-up would make one graph for each width
            self._check_heads(heads)
            return self._make_subnetwork(heads)
        trained = self.trained_heads is None or self.allow_untrained or heads in self.trained_heads
        if type(heads) is not int or heads not in self._subnetworks or not trained:
            self._check_heads(heads)
        return self._subnetworks[heads]

    def select(self, heads: int | Tensor | Subnetwork | None, batch: int) -> Selection:
        """Return the subnetworks of one call; ``heads`` is that of ``forward``."""
        heads = self.heads if heads is None else heads
        if isinstance(heads, Subnetwork):
            validate = NetworkSizes.validate if torch.compiler.is_compiling() else _validate
            return Selection((validate(self._sizes, heads),), None)
        if not isinstance(heads, Tensor):
            return Selection((self.subnetwork(heads),), None)
        if heads.dtype.is_floating_point or heads.dtype.is_complex or heads.dtype == torch.bool:
            raise TypeError(f"heads must be an integer tensor, not {heads.dtype}")
        if heads.dim() == 0:  # one number, as an integer
            heads = heads.expand(batch)
        if kernels.sizes(heads) != (batch,):
            raise ValueError(f"heads must have one width per image, shape ({batch},), not {tuple(heads.shape)}")
        # A compiled call cannot know which widths occur, so it prepares for all, with the residual of the widest.
        compiling = torch.compiler.is_compiling() or kernels.exporting()
        used = self.allowed_heads if compiling else tuple(sorted(set(heads.tolist()))) or (self.heads,)  # no images
        subnetworks = tuple(self.subnetwork(k) for k in used)
        if len(used) == 1 and not compiling:
            return Selection(subnetworks, None)
        beyond = self.config.widths + 1
        index_of = torch.tensor(
            [used.index(k) if k in used else -1 for k in range(beyond + 1)], dtype=torch.int64, device="cpu"
        )
        width_index = index_of.to(self.pos_embed.device)[heads.to(self.pos_embed.device, torch.int64).clamp(0, beyond)]
        return Selection(subnetworks, width_index)

    def _select_backend(self, parameter: Tensor) -> None:
        """Select the backend for the device and dtype of ``parameter``; raise if the requested one cannot run there."""
        self.backend = kernels.select(self.requested_backend, parameter.device, parameter.dtype)
        self._backend_for = parameter.device, parameter.dtype

    def _apply(self, fn, recurse=True):
        self._select_backend(fn(self.pos_embed.new_empty(0)))  # first, because it may raise
        self.weights_changed()  # frees the packed copy
        try:
            return super()._apply(fn, recurse)
        finally:
            self.weights_changed()  # meanwhile another thread may have packed the old weights

    def weights_changed(self) -> None:
        """Declare packed weights stale, after writes to few elements that torch cannot see, as through a NumPy view.

        Optimizer steps, ``load_state_dict``, in-place operations and replaced parameters need no such call. On the CPU
        nor do writes to a quarter of a parameter or more, whatever they go through.
        """
        self.declared_changes += 1
        if self.packed_inference is not None:
            self.packed_inference.drop()

    def engine(self, max_batch: int = 8, dtype: torch.dtype | None = None, loader: str = "best") -> Engine:
        """Make an engine for inference with the least latency: see ``hydravit.inference.Engine``."""
        return Engine(self, max_batch, dtype, loader)

    def __getstate__(self):
        """Leave gradient buffers out of copies and pickles; ``PackedInference`` leaves out the packed weights."""
        return {**self.__dict__, "slice_gradients": None, "_structure": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._select_backend(self.pos_embed)  # this process may have other backends

    # Forward ----------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, heads: int | Tensor | Subnetwork | None = None) -> Tensor:
        """Compute the logits ``(B, num_classes)`` of images ``(B, in_channels, height, width)``.

        Args:
            heads: active heads of this call; or an integer tensor ``(B,)``, one width per image; or any ``Subnetwork``.
                None: ``self.heads``.
        Returns:
            While ``set_distilled_training`` is on, in training mode, the logits of both classifiers.
        Raises:
            TypeError, ValueError: images or heads that do not fit the model.
        """
        if self.dynamic_img_size and (model := self._of_size(images)) is not self:
            return model.forward(images, heads)
        images, selection, fused = self._enter(images, heads)
        if self.packed_inference is not None and not fused.unpackable:
            logits = self.packed_inference.run(self, images, selection)
            if logits is not None:
                return logits
        if not fused.forward:
            width = () if heads is None else (heads,)  # an override may know nothing of widths
            return self.forward_head(self.forward_features(images, *width), *width)
        x = self._trunk(images, selection, fused, pooled_only=fused.head and self.config.pool == "token")
        return self._head(x, selection) if fused.head else self._run_head(x, selection)

    def forward_features(self, images: Tensor, heads: int | Tensor | Subnetwork | None = None) -> Tensor:
        """Compute the tokens ``(B, N, Dk)`` after the blocks and, as in timm, a final norm that precedes pooling.

        With one width per image ``Dk`` is that of the widest, and the channels beyond an image's own are zero.
        """
        if self.dynamic_img_size and (model := self._of_size(images)) is not self:
            return model.forward_features(images, heads)
        images, selection, fused = self._enter(images, heads)
        x = self._trunk(images, selection, fused)
        return self._normed(x, selection, fused)

    def attention_maps(self, images: Tensor, heads: int | Subnetwork | None = None) -> list[Tensor | None]:
        """Compute the attention weights of every layer, ``(B, heads, queries, keys)``; None for a skipped attention.

        Raises ``ValueError`` for more than one width, and if a block's attention was replaced.
        """
        if self.dynamic_img_size and (model := self._of_size(images)) is not self:
            return model.attention_maps(images, heads)
        images, selection, fused = self._enter(images, heads)
        if selection.width_index is not None:
            raise ValueError("attention_maps takes one width for the batch")
        x = self._stem(images, selection, fused)
        maps: list[Tensor | None] = []
        for i, block in enumerate(self.blocks):
            attn, s = getattr(block, "attn", None), selection.subnetworks[0].attention[i]
            if not isinstance(attn, Attention):
                raise ValueError(f"attention_maps: blocks.{i} has no attention of ours")
            maps.append(
                attn.weights(call(cast("Block", block).norm1, x, s=s, eps=unusual(selection.eps, self.config)), s)
                if s.heads
                else None
            )
            x = self._block(i, x, selection, fused)
        return maps

    def structure(self, look: bool = True) -> Structure:
        """Return what the model is made of now; it is looked at anew only if something changed.

        With ``look=False`` it is what the last look found, for what runs inside a forward, which begins with a look.
        """
        structure = self._structure
        if structure is None or (look and not structure.holds()):
            structure = self._structure = Structure(self, _METHODS)
        return structure

    def _fused(self) -> Fused:
        return self._fused_when_compiling() if torch.compiler.is_compiling() else self.structure().fused

    def _fused_when_compiling(self) -> Fused:
        return self.structure().fused

    def _enter(self, images: Tensor, heads: int | Tensor | Subnetwork | None) -> tuple[Tensor, Selection, Fused]:
        """Begin a forward: check the images, find the widths, and select the backend anew if the parameters moved."""
        images = self.check_images(images)
        selection = self.select(heads, kernels.sizes(images)[0])
        if self._backend_for != (self.pos_embed.device, self.pos_embed.dtype):  # they were replaced
            self._select_backend(self.pos_embed)
        if self.slice_gradients is not None and torch.is_grad_enabled():
            self.slice_gradients.mark(selection.subnetworks)
        fused = self._fused()
        if fused.full_only and selection.subnetworks != (self._make_subnetwork(self.config.widths),):
            raise ValueError(f"heads: only the full width is possible, because {fused.full_only}")
        return images, selection, fused

    def check_images(self, images: Tensor) -> Tensor:
        """Return the images in the model's dtype. Under autocast they may come in another, but parameters are not cast.

        Raises ``TypeError`` or ``ValueError`` unless they are ``(B, in_channels, height, width)``, in the model's
        dtype and on its device. ``B`` may be 0, as in timm.
        """
        return self._check_batch("images", images, self._image_shape)

    def _check_batch(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if isinstance(tensor, torch.fx.Proxy):
            raise TypeError(
                "torch.fx cannot trace a model whose way depends on its width: use forward_intermediates or hooks"
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        found = kernels.sizes(tensor)
        if len(found) != len(shape) + 1 or found[1:] != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name} must be (B, {expected}), not {tuple(found)}")
        device, dtype = self.pos_embed.device, self.pos_embed.dtype
        if tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, the model on {device}")
        if tensor.dtype != dtype:
            if not tensor.dtype.is_floating_point or not torch.is_autocast_enabled(device.type):
                raise TypeError(f"{name} are {tensor.dtype}, the model is {dtype}")
            tensor = tensor.to(dtype)
        return tensor

    def network_parameters(self) -> kernels.NetworkParameters:
        """Return all parameters as kernels take them: separate classifiers are rows of one."""
        return kernels.NetworkParameters(
            stem=self.stem_parameters(),
            attention=[block.attention_parameters() for block in self._layers()],
            mlp=[block.mlp_parameters() for block in self._layers()],
            head=self.head_parameters(),
        )

    def _layers(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.blocks)  # a ModuleList does not tell the type of its modules

    def _ops(self) -> str:
        """The backend whose ops this call takes."""
        return "reference" if kernels.exporting() else self.backend

    def _trunk(self, images: Tensor, selection: Selection, fused: Fused, pooled_only: bool = False) -> Tensor:
        """Run stem and blocks; with ``pooled_only`` the last block returns only the tokens that the head pools.

        It returns all tokens nonetheless if it has hooks, or runs its modules, which may expect them.
        """
        x, last = self._stem(images, selection, fused), len(self.blocks) - 1
        for i in range(len(self.blocks)):
            unseen = pooled_only and i == last and fused.blocks[i] and i not in fused.hooked
            x = self._block(i, x, selection, fused, pool=self.config.pool_range if unseen else None)
        return x

    def _block(
        self, i: int, x: Tensor, selection: Selection, fused: Fused, pool: tuple[int, int] | None = None
    ) -> Tensor:
        slices = [LayerSlice(s.attention[i], s.mlp[i]) for s in selection.subnetworks]
        backend = self._ops() if fused.blocks[i] else None
        layer = LayerCall(slices, selection.eps, selection.width_index, backend, self.slice_gradients, pool)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast("Tensor", checkpoint(call, self.blocks[i], x, layer=layer, use_reentrant=False))
        return call(self.blocks[i], x, layer=layer)


# What torch.compiler.assume_constant_result does, which would import the compiler: the graph is for the modules as they
# are while it is made. As with any module, it does not notice hooks that come later.
HydraViT._fused_when_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]

# In whose place `forward` may run fused ops.
_METHODS = {name: getattr(HydraViT, name) for name in ("forward_features", "forward_head")}
