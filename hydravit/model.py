"""The model: full-size parameters under timm's names, any width per call. All arithmetic is in ``hydravit_kernels``."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.checks import check_batch
from hydravit.config import HydraViTConfig
from hydravit.engine import Engine
from hydravit.geometry import GEOMETRIES, Geometry, Widths, every_width, position
from hydravit.inference import PackedInference
from hydravit.layers import Block, Classifier, PatchEmbed, hooks_of, init_weights, is_ours


class HydraViT(nn.Module):
    """A Vision Transformer whose first ``k`` heads are a complete smaller one, for every ``k`` (arXiv 2409.17978).

    Args:
        config: the full model.
        heads: active heads from now on; None for all. Every call can name its own: ``model(images, heads=3)``.
        trained_heads: widths that were trained; None: no width is refused. See ``allow_untrained``.
        backend: ``"auto"`` or a name of ``hydravit_kernels.available_backends()``; chosen when the model is made and
            again when it is moved or cast.
    """

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
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_embed = PatchEmbed(config, **factory)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed, **factory))
        if config.register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, config.register_tokens, config.embed, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, config.pos_tokens, config.embed, **factory))
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, rate, **factory) for rate in rates])
        # timm's names: the norm before pooling is `norm`, the norm after average pooling is `fc_norm`.
        norm = nn.LayerNorm(config.embed, config.norm_eps, **factory)
        self.add_module("norm" if config.pool == "token" else "fc_norm", norm)
        self.head = Classifier(config, **factory) if config.num_classes else nn.Identity()
        init_weights(self)

        self.unseen_writes = 0  # how often `weights_changed` was called
        self.slice_gradients = None  # set by hydravit.training.SliceGradients
        self.packed_inference: PackedInference | None = PackedInference()  # None: weights are read in place, always
        self.requested_backend = kernels.check_backend(backend)
        self._select_backend(self.pos_embed)
        self._resolve_geometries()
        if trained_heads is not None and (not trained_heads or not {*trained_heads} <= {*self._geometries}):
            raise ValueError(f"trained_heads must be widths of the model, {[*self._geometries]}, not {trained_heads}")
        self.trained_heads = None if trained_heads is None else tuple(sorted(set(trained_heads)))
        self.allow_untrained = False
        self.heads = max(self.allowed_heads) if heads is None else heads

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of the full model's features; a width has ``geometry(heads).embed.embed`` of them."""
        return self.config.embed

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised classifier for ``num_classes``; 0: none, logits are then the pooled features."""
        if global_pool not in (None, self.config.pool):
            raise ValueError(f"global_pool must be None or the model's {self.config.pool!r}, not {global_pool!r}")
        factory = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        self.head = Classifier(self.config, **factory) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
        self._resolve_geometries()

    # Width and backend ------------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Active heads of calls that do not name their own."""
        return self._heads_as_shape.shape[0] - 1

    @heads.setter
    def heads(self, heads: int) -> None:
        self._check_heads(heads)
        # An empty tensor's length: torch.compile makes a graph per value of an int attribute, but one for lengths > 1.
        self._heads_as_shape = self._lengths[heads]

    @property
    def allowed_heads(self) -> tuple[int, ...]:
        """The widths a call may ask for, ascending: those the geometry has, and of these the trained ones."""
        if self.trained_heads is None or self.allow_untrained:
            return tuple(self._geometries)
        return tuple(heads for heads in self._geometries if heads in self.trained_heads)

    def _resolve_geometries(self) -> None:
        """The slices of every width, once, so that a call only looks them up."""
        self._geometries = every_width(self.config)
        self._lengths = {heads: torch.empty(heads + 1, 0, device="cpu") for heads in self._geometries}
        self._validated: set[Geometry] = set()  # others that calls brought along

    def _make_geometry(self, heads: int) -> Geometry:
        return GEOMETRIES[self.config.geometry](self.config, heads)

    def _check_heads(self, heads: int) -> None:
        if isinstance(heads, bool) or not isinstance(heads, (int, torch.SymInt)):
            kind = type(heads).__name__
            raise TypeError(f"heads must be an int, an integer tensor (B,) or a Geometry, not {kind} {str(heads):.40}")
        if not 1 <= heads <= self.config.max_heads:
            raise ValueError(f"heads must be in 1..{self.config.max_heads}, not {heads}")
        if not torch.compiler.is_compiling() and heads not in self._geometries:
            self._make_geometry(heads).validate(self.config)
        position(self.allowed_heads, heads, "was not trained (model.allow_untrained = True allows it)")

    def geometry(self, heads: int) -> Geometry:
        """The slices of one width."""
        self._check_heads(heads)
        # Compiled, a look-up would make a graph per width.
        return self._make_geometry(heads) if torch.compiler.is_compiling() else self._geometries[heads]

    def widths(self, heads: int | Tensor | Geometry | None, batch: int) -> Widths:
        """The subnetworks of one call; ``heads`` as in ``forward``."""
        heads = self.heads if heads is None else heads
        if isinstance(heads, Geometry):
            if torch.compiler.is_compiling() or heads not in self._validated:
                self._validated.add(heads.validate(self.config))
            return Widths((heads,), None)
        if not isinstance(heads, Tensor):
            return Widths((self.geometry(heads),), None)
        if heads.dtype.is_floating_point or heads.dtype.is_complex or heads.dtype == torch.bool:
            raise TypeError(f"heads must be an integer tensor, not {heads.dtype}")
        if heads.shape != (batch,):
            raise ValueError(f"heads must have one width per image, shape ({batch},), not {tuple(heads.shape)}")
        # Compiled, which widths occur is not known: then all are in the table, and the stream is as wide as the widest.
        compiling = torch.compiler.is_compiling()
        used = self.allowed_heads if compiling else tuple(sorted(set(heads.tolist())))
        geometries = tuple(self.geometry(k) for k in used)
        if len(used) == 1 and not compiling:
            return Widths(geometries, None)
        beyond = self.config.max_heads + 1
        index_of = torch.tensor([used.index(k) if k in used else -1 for k in range(beyond + 1)])
        subnet = index_of.to(self.pos_embed.device)[heads.to(self.pos_embed.device, torch.int64).clamp(0, beyond)]
        return Widths(geometries, subnet)

    def _select_backend(self, parameter: Tensor) -> None:
        """For the device and dtype of ``parameter``; raises where the requested backend cannot run there."""
        self.backend = kernels.select(self.requested_backend, parameter.device, parameter.dtype)
        self._backend_for = parameter.device, parameter.dtype

    def _apply(self, fn, recurse=True):
        self._select_backend(fn(self.pos_embed.new_empty(0)))  # before anything is moved: it may refuse
        self.weights_changed()
        return super()._apply(fn, recurse)

    def weights_changed(self) -> None:
        """Say so after writes that torch cannot see (through ``.data`` or a NumPy view): packed weights are stale then.

        Optimizer steps, ``load_state_dict``, in-place operations and replaced parameters are noticed anyway.
        """
        self.unseen_writes += 1
        if self.packed_inference is not None:
            self.packed_inference.drop()

    def engine(self, max_batch: int = 8, dtype: torch.dtype | None = None, **cuda: str) -> Engine:
        """Inference with the least latency: see ``hydravit.engine.Engine``."""
        return Engine(self, max_batch, dtype, **cuda)

    def __getstate__(self):
        """Copies and pickles share no gradient buffers with the original."""
        return {**self.__dict__, "slice_gradients": None}  # and no packed weights: PackedInference sees to it

    def __setstate__(self, state):
        super().__setstate__(state)
        self._select_backend(self.pos_embed)  # this process may have other ones

    # Forward ----------------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, heads: int | Tensor | Geometry | None = None) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_channels, height, width)``.

        Args:
            heads: active heads in this call; or an integer tensor ``(B,)``, one width per image; or any ``Geometry``.
                None: ``self.heads``.
        Raises:
            TypeError, ValueError: images or heads that do not fit the model.
        """
        images, widths = self._enter(images, heads)
        if self.packed_inference is not None:
            if (logits := self.packed_inference.run(self, images, widths)) is not None:
                return logits
        x = self._trunk(images, widths, pooled_only=self.config.pool == "token")
        return self._head(x, self.norm if self.config.pool == "token" else self.fc_norm, widths)

    def forward_features(self, images: Tensor, heads: int | Tensor | Geometry | None = None) -> Tensor:
        """Tokens ``(B, N, Dk)`` after the blocks, and after the final norm where it precedes pooling (as in timm).

        With one width per image ``Dk`` is the widest, and the channels beyond an image's own are zero.
        """
        images, widths = self._enter(images, heads)
        x = self._trunk(images, widths)
        if self.config.pool == "avg":
            return x
        return kernels.layer_norm(x, self.norm.weight, self.norm.bias, widths.embed, widths.eps, widths.subnet)

    def forward_head(
        self, features: Tensor, heads: int | Tensor | Geometry | None = None, *, pre_logits: bool = False
    ) -> Tensor:
        """Logits of what ``forward_features`` returned at the same ``heads``; ``pre_logits``: the pooled features."""
        widths = self.widths(heads, features.shape[0])
        features = check_batch("features", features, (self.config.tokens, kernels.widest(widths.embed)), self.pos_embed)
        return self._head(features, None if self.config.pool == "token" else self.fc_norm, widths, pre_logits)

    def attention_maps(self, images: Tensor, heads: int | Geometry | None = None) -> list[Tensor | None]:
        """Per layer what every token attends to, ``(B, heads, N, N)``; None where a layer's attention is skipped."""
        images, widths = self._enter(images, heads)
        x = self._stem(images, widths)
        if widths.subnet is not None:
            raise ValueError("attention_maps takes one width for the batch")
        maps = []
        for i, block in enumerate(self.blocks):
            attention = widths.geometries[0].attention[i]
            parameters = block.attention_parameters()[:4]
            maps.append(kernels.attention_map(x, *parameters, attention, widths.eps) if attention.heads else None)
            x = self._block(i, x, widths)
        return maps

    def _enter(self, images: Tensor, heads: int | Tensor | Geometry | None) -> tuple[Tensor, Widths]:
        """What every forward begins with: checks, the widths, the backend."""
        images = check_batch("images", images, (self.config.in_channels, *self.config.image_size), self.pos_embed)
        widths = self.widths(heads, images.shape[0])
        if self._backend_for != (self.pos_embed.device, self.pos_embed.dtype):  # assigned, or unsharded in another
            self._select_backend(self.pos_embed)
        if self.slice_gradients is not None and torch.is_grad_enabled():
            self.slice_gradients.mark(widths.geometries)
        return images, widths

    def stem_parameters(self) -> tuple[Tensor | None, ...]:
        tokens = (getattr(self, "cls_token", None), getattr(self, "reg_token", None))
        return (self.patch_embed.proj.weight, self.patch_embed.proj.bias, *tokens, self.pos_embed)

    def head_parameters(self, norm: nn.LayerNorm | None, classifier: bool) -> tuple[Tensor | None, ...]:
        of_norm = (None, None) if norm is None else (norm.weight, norm.bias)
        return (*of_norm, *(self.head.head_parameters() if classifier else (None, None)))

    @property
    def pool_range(self) -> tuple[int, int]:
        """The tokens that the head takes the mean of: the first of them and the first behind."""
        return (0, 1) if self.config.pool == "token" else (self.config.prefix_tokens, self.config.tokens)

    def _stem(self, images: Tensor, widths: Widths) -> Tensor:
        parameters = self.stem_parameters()
        return kernels.stem(images, *parameters, widths.embed, widths.subnet, **self._how(parameters))

    def _trunk(self, images: Tensor, widths: Widths, pooled_only: bool = False) -> Tensor:
        """All tokens; or those that the head pools, where nobody sees that the last block computed no others."""
        x, last = self._stem(images, widths), self.blocks[-1]
        for i, block in enumerate(self.blocks):
            alone = pooled_only and block is last and is_ours(block) and not any(hooks_of(block))
            x = self._block(i, x, widths, *((self.pool_range,) if alone else ()))
        return x

    def _block(self, i: int, x: Tensor, widths: Widths, *pool: tuple[int, int]) -> Tensor:
        attention = [geometry.attention[i] for geometry in widths.geometries]
        mlp = [geometry.mlp[i] for geometry in widths.geometries]
        return self.blocks[i](x, attention, mlp, widths.eps, widths.subnet, self._how, *pool)

    def _head(self, x: Tensor, norm: nn.LayerNorm | None, widths: Widths, pre_logits: bool = False) -> Tensor:
        parameters = self.head_parameters(norm, not pre_logits and self.num_classes > 0)
        slices = [geometry.head for geometry in widths.geometries]
        pool = self.pool_range if x.shape[1] == self.config.tokens else (0, x.shape[1])  # others are gone
        return kernels.head(x, *parameters, pool, slices, widths.eps, widths.subnet, **self._how(parameters))

    def _how(self, parameters: tuple[Tensor | None, ...]) -> dict:
        """How the kernels run: on which backend, and where they put gradients."""
        if self.slice_gradients is None:
            return {"backend": self.backend}
        buffers = [None if p is None else self.slice_gradients.buffer(p) for p in parameters]
        return {"backend": self.backend, "buffers": buffers}
