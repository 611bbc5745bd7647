"""What comes before and after the blocks: the stem and the head, by fused ops or by their modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.config import HydraViTConfig
from hydravit.geometry import Selection
from hydravit.layers import Classifiers, LayerNorm, Linear, call, classifier_rows, cut, embed_of, grads_of, unusual
from hydravit.structure import Fused
from hydravit.timm_interface import TimmInterface
from hydravit_kernels import EmbedSlice, Subnetwork

_DISTILLATION = (1, 2)  # the range of tokens that head_dist reads


class Ends(TimmInterface):
    """Stem and head of ``HydraViT``."""

    norm: LayerNorm  # called fc_norm where it follows pooling
    norm_pre: LayerNorm
    head_dist: Any  # as head

    # Defined in model.py.
    select: Any
    _check_batch: Any
    _fused: Any
    _ops: Any

    # Classifier -------------------------------------------------------------------------------------------------------

    distilled_training = False  # whether training has the logits of both classifiers of a distilled model

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let calls in training mode return the logits of ``head`` and ``head_dist`` instead of their mean, as timm."""
        if not self.config.distilled:
            raise ValueError("set_distilled_training needs a model with distilled=True")
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        """Return ``head``, and of a distilled model ``(head, head_dist)``."""
        return (self.head, self.head_dist) if self.config.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for ``num_classes`` with new random weights; both of a distilled model.

        Args:
            num_classes: 0: the model has none then, and its logits are the pooled features.
            global_pool: the config's ``pool`` from now on; as in timm, the final norm stays where it is. A distilled
                model keeps reading its two tokens.
        """
        factory: dict[str, Any] = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        pooling: dict[str, Any] = {}
        if global_pool is not None and not (self.config.distilled and global_pool == ""):
            pooling = {"pool": global_pool, "fc_norm": self.config.final_norm == "fc_norm"}
        self.config = dataclasses.replace(self.config, num_classes=num_classes, **pooling)
        for name in ("head", "head_dist") if self.config.distilled else ("head",):
            classifier: Any = make_head(self.config, **factory)
            if num_classes:
                nn.init.trunc_normal_(classifier.weight, std=0.02)
                nn.init.zeros_(classifier.bias)
            setattr(self, name, classifier)

    # Parameters -------------------------------------------------------------------------------------------------------

    def stem_parameters(self) -> kernels.StemParameters:
        return kernels.StemParameters(
            weight=self.patch_embed.proj.weight,
            bias=self.patch_embed.proj.bias,
            cls_token=getattr(self, "cls_token", None),
            reg_token=getattr(self, "dist_token" if self.config.distilled else "reg_token", None),
            pos_embed=self.pos_embed,
        )

    def head_parameters(self) -> kernels.HeadParameters:
        norm = getattr(self, self.config.final_norm)
        weight, bias = classifier_rows(self.head)
        return kernels.HeadParameters(norm_weight=norm.weight, norm_bias=norm.bias, weight=weight, bias=bias)

    # Stem -------------------------------------------------------------------------------------------------------------

    def _stem(self, images: Tensor, selection: Selection, fused: Fused) -> Tensor:
        if not fused.stem:
            return kernels.per_image(self._run_stem, images, None, selection.embed, selection.width_index)
        parameters = self.stem_parameters()
        grads = grads_of(self.slice_gradients, parameters)
        return kernels.stem(
            images, parameters, selection.embed, selection.width_index, backend=self._ops(), grads=grads
        )

    def _run_stem(self, images: Tensor, _: None, s: EmbedSlice) -> Tensor:
        """Run the stem as its modules say, for images of one width."""
        tokens = [getattr(self, name) for name in ("cls_token", "dist_token", "reg_token") if hasattr(self, name)]
        prefix = [cut(token, 2, embed_of(s)).expand(images.shape[0], -1, -1) for token in tokens]
        patches, positions = call(self.patch_embed, images, s=s), cut(self.pos_embed, 2, embed_of(s))
        expected = self.config.grid[0] * self.config.grid[1]
        if kernels.sizes(patches)[1] != expected:
            raise ValueError(f"patch_embed makes {patches.shape[1]} patches, the config has {expected}")
        if self.config.no_embed_class:
            x = torch.cat([*prefix, patches + positions], dim=1)
        else:
            x = torch.cat([*prefix, patches], dim=1) + positions
        return call(self.norm_pre, x, s=s) if self.config.pre_norm else x

    # Head -------------------------------------------------------------------------------------------------------------

    def forward_head(
        self, features: Tensor, heads: int | Tensor | Subnetwork | None = None, *, pre_logits: bool = False
    ) -> Tensor:
        """Compute the logits, or with ``pre_logits`` the pooled features, of what ``forward_features`` returned.

        ``heads`` must be the same as there.
        """
        if self.dynamic_img_size and (model := self._of_tokens(features)) is not self:
            return model.forward_head(features, heads, pre_logits=pre_logits)
        selection = self.select(heads, kernels.sizes(features)[0])
        features = self._check_batch("features", features, (self.config.tokens, kernels.widest(selection.embed)))
        run = self._head if self._fused().head else self._run_head
        return run(features, selection, normed=self.config.final_norm == "norm", pre_logits=pre_logits)

    def _head(self, x: Tensor, selection: Selection, *, normed: bool = False, pre_logits: bool = False) -> Any:
        """Run pooling, norm and classifier as an op; of a distilled model both classifiers.

        Args:
            normed: whether ``x`` has passed the final norm.
        """
        parameters = self.head_parameters()
        if normed:
            parameters = parameters._replace(norm_weight=None, norm_bias=None)
        if pre_logits:
            parameters = parameters._replace(weight=None, bias=None)
        logits = self._classify(x, parameters, self._pool_range(x), selection)
        if not self.config.distilled:
            return logits
        if not pre_logits:
            weight, bias = classifier_rows(self.head_dist)
            parameters = parameters._replace(weight=weight, bias=bias)
        return self._of_both(logits, self._classify(x, parameters, _DISTILLATION, selection), pre_logits)

    def _classify(
        self, x: Tensor, parameters: kernels.HeadParameters, pool: tuple[int, int], selection: Selection
    ) -> Tensor:
        return kernels.head(
            x, parameters, pool, selection.head, selection.eps, selection.width_index,
            backend=self._ops(), grads=grads_of(self.slice_gradients, parameters),
        )  # fmt: skip

    def _of_both(self, logits: Tensor, of_distillation: Tensor, pre_logits: bool) -> Any:
        """Return the mean of what the two tokens of a distilled model say; in distilled training both."""
        if self.distilled_training and self.training and not pre_logits:
            return logits, of_distillation
        return (logits + of_distillation) / 2

    def _final_norm(self, x: Tensor, selection: Selection, fused: Fused) -> Tensor:
        """Apply the final norm to all tokens."""
        if fused.head:
            return kernels.layer_norm(
                x, self.norm.weight, self.norm.bias, selection.embed, selection.eps, selection.width_index
            )
        return self._run_norm(x, selection)

    def _run_norm(self, x: Tensor, selection: Selection) -> Tensor:
        """Run the module of the norm before pooling, on all tokens."""
        eps = unusual(selection.eps, self.config)
        return kernels.per_image(
            lambda x, _, s: call(self.norm, x, s=s, eps=eps), x, None, selection.head, selection.width_index
        )

    def _pool_range(self, x: Tensor) -> tuple[int, int]:
        """The tokens to pool for ``head``; blocks may have changed their number, as token merging and prompts do."""
        start, _ = self.config.pool_range
        return (start, start + 1) if self.config.pool == "token" else (start, kernels.sizes(x)[1])

    def _pool(self, x: Tensor) -> Tensor:
        """Pool all of some tokens."""
        match self.config.pool:
            case "":
                return x
            case "max":
                return x.amax(dim=1)
            case "avgmax":
                return 0.5 * (x.amax(dim=1) + x.mean(dim=1))
        return x.mean(dim=1)

    def _run_head(self, x: Tensor, selection: Selection, *, normed: bool = False, pre_logits: bool = False) -> Any:
        """Run what ``_head`` does as the modules say; as in timm, ``norm`` sees all tokens."""
        if self.config.final_norm == "norm" and not normed:
            x = self._run_norm(x, selection)

        def run(classifier: nn.Module, pool: tuple[int, int]) -> Tensor:
            def single(x: Tensor, _: None, s: kernels.HeadSlice) -> Tensor:
                x = self._pool(x[:, slice(*pool)])
                if self.config.final_norm == "fc_norm":
                    x = call(self.get_submodule("fc_norm"), x, s=s, eps=unusual(selection.eps, self.config))
                if pre_logits:
                    return x
                return call(classifier, x, rows=((s.class_offset, s.classes),), columns=embed_of(s))

            pad = pre_logits or isinstance(classifier, nn.Identity)
            return kernels.per_image(single, x, None, selection.head, selection.width_index, pad=pad)

        logits = run(self.head, self._pool_range(x))
        return (
            self._of_both(logits, run(self.head_dist, _DISTILLATION), pre_logits) if self.config.distilled else logits
        )


def make_head(config: HydraViTConfig, **factory) -> nn.Module:
    if not config.num_classes:
        return nn.Identity()
    if config.separate_classifiers:
        return Classifiers(config, **factory)
    return Linear(config.embed, config.num_classes, **factory)
