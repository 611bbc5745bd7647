"""Weights adapted to a model: other position grids, smaller ViTs, other classifiers, older names.

Names are those of timm's ``VisionTransformer``, which the checkpoints of DeiT and of HydraViT's authors share.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydravit.checkpoint.configs import count_blocks, position_layout
from hydravit.checkpoint.files import Checkpoint
from hydravit.checkpoint.foreign import checkpoint_of
from hydravit.checkpoint.names import (
    named_tensors,
    plain_names,
    reason,
    refuse_other_libraries,
    some,
    without_distillation,
)
from hydravit.config import resolve_config
from hydravit.geometry import hydravit, parameter_slices
from hydravit.model import HydraViT
from hydravit.timm_interface import resample_positions
from hydravit_kernels import Intervals

_PREFIX = ("cls_token", "dist_token", "reg_token")  # the tokens before the patches, in their order
_CLASSIFIERS = {"head": "classifier", "head_dist": "classifier of the distillation token"}


def load_weights(
    model: HydraViT, weights: Checkpoint | Mapping[str, Tensor] | nn.Module, *, strict: bool = True
) -> list[str]:
    """Copy weights into a model, adapted where that has one sensible meaning; an error leaves the model as it was.

    * A position embedding of another patch grid is resampled (bicubic, antialiased, as timm does). The grid is that of
      the checkpoint's config; without one it is the model's if the number of patches agrees, else a square. If only
      one of the two has positions for the class and register tokens, the function still stays the same.
    * A smaller ViT of the same head dim becomes the first heads, as HydraViT (arXiv 2409.17978) starts from DeiT-tiny;
      all other weights stay as they are.
    * The model's classifier is initialised anew if the checkpoint has another number of classes or no classifier.
    * One classifier for all widths is copied to every separate one. Separate ones are ``head.0.weight``,
      ``head.1.weight``, ... (or ``heads.0.weight``, ...) in ascending order of widths, each with the channels of its
      width or with all.
    * ``norm`` serves as ``fc_norm`` and the reverse. That changes the function: pooling and norm swap places.
    * A patch embedding for RGB is adapted to other channels as timm does: summed for one, else repeated and scaled.
    * What only pretraining uses is left out: ``mask_token`` and the decoder of MAE.

    Args:
        weights: a checkpoint, a state dict (wrappers and prefixes as in ``hydravit.checkpoint.read_checkpoint``), or a
            model of timm, of which ``hydravit.config_of`` says whether its arithmetic is the model's.
        strict: whether to raise if the checkpoint lacks a parameter of the model, or has one that the model has not,
            such as a distillation token. If False, the former keeps its value, and the latter is dropped.
    Returns:
        One message for every adaptation; each is also a warning.
    Raises:
        ValueError: the weights do not fit; the message names the file, if any, what was found and what is expected.
    """
    if isinstance(weights, nn.Module):
        weights = checkpoint_of(weights)
    checkpoint = weights if isinstance(weights, Checkpoint) else Checkpoint(dict(weights))
    try:
        adaptation = _Adaptation(model, checkpoint, strict)
        state_dict = adaptation.run()
    except ValueError as error:
        raise ValueError(f"{checkpoint.where}{error}") from error
    model.load_state_dict(state_dict)
    for message in adaptation.messages:
        warnings.warn(f"{checkpoint.where}{message}", stacklevel=2)
    return adaptation.messages


class _Adaptation:
    """One call of ``load_weights``: its steps change ``source``, the checkpoint's tensors, until they fit the model."""

    def __init__(self, model: HydraViT, checkpoint: Checkpoint, strict: bool):
        self.config, self.own, self.strict = model.config, model.state_dict(), strict
        self.source_config = checkpoint.config
        self.source, self.messages = plain_names(named_tensors(checkpoint.state_dict))
        self.embed = model.config.embed  # channels of the source's residual

    def run(self) -> dict[str, Tensor]:
        """Return a whole state dict of the model."""
        self._check_tensors()
        self._check_arithmetic()
        self._adapt_channels()
        self._check_patch_embedding()
        self._check_tokens()
        self._drop_distillation()
        self._rename_norm()
        self._adapt_classifier()
        if "pos_embed" in self.source:
            self._adapt_positions()
        self._check_names()
        return self._place()

    def _check_tensors(self) -> None:
        refuse_other_libraries(self.source)
        if not set(self.own) & set(self.source):
            raise ValueError("these are not the weights of a Vision Transformer: expected names as in timm, found "
                             f"{', '.join(sorted(self.source)[:3]) or 'nothing'}")  # fmt: skip
        wrong = [f"{name} ({t.dtype})" for name, t in self.source.items() if not t.dtype.is_floating_point]
        if wrong:
            raise ValueError(f"weights must be floating-point tensors, not {some(wrong)}")

    def _check_arithmetic(self) -> None:
        """Compare what no shape tells with the checkpoint's config, if it has one."""
        theirs, ours = self.source_config, self.config
        if theirs is None:
            return
        if theirs.head_dim != ours.head_dim:
            raise ValueError(f"head_dim is {theirs.head_dim}, the model's is {ours.head_dim}")
        if theirs.norm_eps != ours.norm_eps:
            self.messages.append(f"norm_eps is {theirs.norm_eps}, the model's is {ours.norm_eps}")

    def _adapt_channels(self) -> None:
        weight, channels = self.source.get("patch_embed.proj.weight"), self.config.in_channels
        if weight is None or weight.dim() != 4 or weight.shape[1] != 3 or channels == 3:
            return
        if channels == 1:
            adapted = weight.float().sum(dim=1, keepdim=True)
        else:
            adapted = weight.float().repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
        self.source["patch_embed.proj.weight"] = adapted.to(weight.dtype)
        self.messages.append(f"the patch embedding of 3 channels is adapted to {channels}")

    def _check_patch_embedding(self) -> None:
        """Find the source's channels, and raise for sizes that cannot be adapted; ``_place`` checks other shapes."""
        config, weight = self.config, self.source.get("patch_embed.proj.weight")
        if weight is None or weight.dim() != 4:
            return
        for axis, name in ((1, "in_channels"), (2, "patch_size"), (3, "patch_size")):
            if weight.shape[axis] != getattr(config, name):
                raise ValueError(f"{name} is {weight.shape[axis]}, the model's is {getattr(config, name)}")
        self.embed = weight.shape[0]
        if self.embed > config.embed:
            raise ValueError(f"the width is {self.embed} channels, the model has only {config.embed}")
        if self.embed < config.embed and (self.embed % config.head_dim or config.geometry != "hydravit"):
            raise ValueError(
                f"the width is {self.embed} channels, the model's is {config.embed}; only a multiple of head_dim "
                f"{config.head_dim} fits, and only in geometry 'hydravit', not {config.geometry!r}"
            )

    def _check_tokens(self) -> None:
        for name in (*_PREFIX, "pos_embed"):
            shape = tuple(self.source[name].shape) if name in self.source else (1, 1, self.embed)
            if len(shape) != 3 or shape[::2] != (1, self.embed):
                raise ValueError(f"{name} has shape {shape}; expected (1, tokens, {self.embed})")

    def _drop_distillation(self) -> None:
        if self.config.distilled:
            return
        source, names = without_distillation(self.source)
        if names and self.strict:
            raise ValueError(
                f"it is a distilled DeiT ({some(names)}): its logits are the mean of two classifiers on two tokens, "
                "which this model does not have: make it with distilled=True, or strict=False drops the distillation "
                "token and its classifier"
            )
        self.source = source
        if names:
            self.messages.append(f"dropped {some(names)} of a distilled DeiT")

    def _rename_norm(self) -> None:
        mine, other = ("norm", "fc_norm") if self.config.final_norm == "norm" else ("fc_norm", "norm")
        if f"{other}.weight" in self.source and f"{mine}.weight" not in self.source:
            for name in ("weight", "bias"):
                if f"{other}.{name}" in self.source:
                    self.source[f"{mine}.{name}"] = self.source.pop(f"{other}.{name}")
            self.messages.append(f"{other} is used as {mine}, because the model has pool={self.config.pool!r}")

    def _adapt_classifier(self) -> None:
        self._stack_classifiers()
        for place in _CLASSIFIERS if self.config.distilled else ("head",):
            classifier = {kind: self.source.pop(f"{place}.{kind}", None) for kind in ("weight", "bias")}
            self._adapt_one(place, {f"{place}.{kind}": t for kind, t in classifier.items() if t is not None})

    def _adapt_one(self, place: str, classifier: dict[str, Tensor]) -> None:
        """Take what the source has for ``head`` or ``head_dist``, or new values where it does not fit."""
        wanted = self.config.num_classes
        if not wanted:
            if classifier:
                self.messages.append(f"the {_CLASSIFIERS[place]} is left out, because the model has num_classes=0")
            return
        classes = self._count_classes(classifier)
        if classes == wanted:
            self.source |= self._copied_to_every_width(classifier)
            return
        if classifier:
            problem = f"num_classes is {classes}, the model's is {wanted}: its {_CLASSIFIERS[place]}"
        else:
            problem = f"there is no {_CLASSIFIERS[place]}; the model's"
        self.messages.append(f"{problem} is initialised anew")
        self.source[f"{place}.weight"] = nn.init.trunc_normal_(self._new(f"{place}.weight"), std=0.02)
        self.source[f"{place}.bias"] = self._new(f"{place}.bias")

    def _new(self, name: str) -> Tensor:
        return torch.zeros(self.own[name].shape, dtype=torch.float32, device="cpu")

    def _stack_classifiers(self) -> None:
        """Stack ``head.<i>.weight`` of all widths in one tensor, with zeros for channels that a width does not have."""
        for kind, axes in (("weight", 2), ("bias", 1)):
            names = [name for name in self.source if re.fullmatch(rf"heads?\.\d+\.{kind}", name)]
            names.sort(key=lambda name: int(name.split(".")[1]))
            parts = [self.source.pop(name) for name in names]
            if kind == "weight" and all(part.dim() == axes and part.shape[1] <= self.embed for part in parts):
                parts = [F.pad(part, (0, self.embed - part.shape[1])) for part in parts]
            if any(part.dim() != axes or part.shape != parts[0].shape for part in parts):
                raise ValueError(f"separate classifiers differ in shape: {[tuple(part.shape) for part in parts]}")
            if parts:
                self.source[f"head.{kind}"] = torch.stack(parts)

    def _count_classes(self, classifier: dict[str, Tensor]) -> int | None:
        """Return the number of classes of one classifier, or of one for each width; None if there is none."""
        widths, classes = self.config.separate_classifiers, {}
        for name, tensor in classifier.items():
            axes, shape = 2 if name.endswith("weight") else 1, tuple(tensor.shape)
            if len(shape) not in (axes, axes + 1):
                raise ValueError(f"{name} has shape {shape}; expected {axes} axes, or {axes + 1} for every width's own")
            if len(shape) > axes and shape[0] != len(widths):
                raise ValueError(
                    f"there are separate classifiers: {name} has shape {shape}, "
                    f"but the model's separate_classifiers are {list(widths)}"
                )
            classes[name] = shape[-axes]
        if len(set(classes.values())) > 1:
            raise ValueError(", but ".join(f"{name} is for {count} classes" for name, count in classes.items()))
        return next(iter(classes.values()), None)

    def _copied_to_every_width(self, classifier: dict[str, Tensor]) -> dict[str, Tensor]:
        widths = len(self.config.separate_classifiers)
        shared = {name for name, tensor in classifier.items() if tensor.dim() < self.own[name].dim()}
        if shared:
            self.messages.append("the one classifier is copied to every width's own")
        return {name: t.expand(widths, *t.shape) if name in shared else t for name, t in classifier.items()}

    def _adapt_positions(self) -> None:
        """Bring ``pos_embed`` to the model's tokens: the prefix tokens' rows, then those of the patch grid."""
        config, positions = self.config, self.source["pos_embed"]
        counts = {name: self.source[name].shape[1] for name in _PREFIX if name in self.source}
        prefix = sum(counts.values())
        prefixes = [0, prefix] if config.no_embed_class else [prefix, 0]
        grids = [known.grid for known in (self.source_config, config) if known]
        covered, grid = position_layout(positions.shape[1], prefixes, grids)
        patches = positions[:, covered:]
        rows: dict[str, Tensor] = {}
        if covered:
            rows = dict(zip(counts, positions[:, :covered].split(list(counts.values()), 1), strict=True))
        if grid != config.grid:
            patches = resample_positions(patches, grid, config.grid)
            self.messages.append(
                f"pos_embed is resampled from {grid[0]} x {grid[1]} to {config.grid[0]} x {config.grid[1]}"
            )
        if config.no_embed_class:
            for name, row in rows.items():  # the model uses tokens only in this sum
                self.source[name] = self.source[name] + row
            if rows:
                self.messages.append("positions of the class and register tokens are added to these tokens")
            self.source["pos_embed"] = patches
            return
        mine = {name: self.own[name].shape[1] for name in _PREFIX if name in self.own}
        if mine and not rows:
            self.messages.append("pos_embed gets zeros for the class and register tokens")
        # With strict=False the source may lack a token, whose positions are then zeros.
        parts = [rows.get(name, positions.new_zeros(1, count, self.embed)) for name, count in mine.items()]
        self.source["pos_embed"] = torch.cat([*parts, patches], dim=1)

    def _check_names(self) -> None:
        missing, unexpected = sorted(set(self.own) - set(self.source)), sorted(set(self.source) - set(self.own))
        for names, problem in ((missing, "the checkpoint lacks"), (unexpected, "the model has no place for")):
            words = reason(names) if names is unexpected else ""
            words = f", of a model with {words}" if words else ""
            if names and self.strict:
                depth, expected = count_blocks(self.source), self.config.depth
                depths = f"; depth is {depth}, expected {expected}" if depth != expected else ""
                raise ValueError(f"{problem} {some(names)}{words}{depths}")
            if names:
                self.messages.append(f"{problem} {some(names)}{words}")

    def _place(self) -> dict[str, Tensor]:
        """Return the model's state dict with the source in it."""
        result, slices = {}, self._slices()
        for name, own in self.own.items():
            tensor = self.source.get(name, own)
            if tensor.shape == own.shape:
                result[name] = tensor
                continue
            channels = [
                torch.cat(
                    [
                        torch.arange(start, start + length, dtype=torch.int64, device="cpu")
                        for start, length in intervals
                    ]
                )
                for intervals in slices.get(name, ())
            ]
            channels += [torch.arange(size, dtype=torch.int64, device="cpu") for size in own.shape[len(channels) :]]
            expected = tuple(map(len, channels))
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")
            result[name] = own.clone()
            result[name][torch.meshgrid(*channels, indexing="ij")] = tensor.to(own)
        return result

    def _slices(self) -> dict[str, tuple[Intervals, ...]]:
        """Return the channels of every parameter that a smaller ViT fills; none for one as wide as the model."""
        if self.embed == self.config.embed:
            return {}
        heads = self.embed // self.config.head_dim
        self.messages.append(f"a ViT of {heads} heads becomes the first {heads} of {self.config.max_heads}")
        plain = resolve_config(self.config, separate_classifiers=(), width_steps=None, narrowest=1)
        slices = parameter_slices(plain, hydravit(plain, heads))
        if self.config.separate_classifiers:
            every_classifier = ((0, len(self.config.separate_classifiers)),)
            slices |= {name: (every_classifier, *slices[name]) for name in ("head.weight", "head.bias")}
        return slices
