"""The configuration of the full model: one frozen value from which all sizes follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from hydravit.integers import plain_int
from hydravit_kernels import NetworkSizes


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


POOLS = ("token", "avg", "avgmax", "max", "")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")

# Per field a test and the words of its error. `__post_init__` tests fields with several values or with dependencies.
_CHECKS = {
    **dict.fromkeys(
        ("patch_size", "in_channels", "depth", "max_heads", "head_dim"),
        (lambda value: type(value) is int and value >= 1, "an integer of at least 1"),
    ),
    **dict.fromkeys(
        ("num_classes", "register_tokens"),
        (lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
    ),
    **dict.fromkeys(
        ("qkv_bias", "proj_bias", "class_token", "distilled", "no_embed_class", "pre_norm"),
        (lambda value: type(value) is bool, "True or False"),
    ),
    **dict.fromkeys(
        ("mlp_ratio", "norm_eps"), (lambda value: _is_number(value) and value > 0, "a positive, finite number")
    ),
    "drop_path": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "layer_scale": (lambda value: value is None or _is_number(value), "None or a finite number"),
    "pool": (lambda value: isinstance(value, str) and value in POOLS, "'token', 'avg', 'avgmax', 'max' or ''"),
    "act_layer": (lambda value: isinstance(value, str) and value in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}"),
    "fc_norm": (lambda value: value is None or type(value) is bool, "None, True or False"),
    "geometry": (lambda value: isinstance(value, str), "a name of hydravit.geometry.GEOMETRIES"),
    "width_steps": (lambda value: value is None or (type(value) is int and value >= 1), "None or an integer from 1 on"),
}


def check_image_size(size: object, patch_size: int) -> tuple[int, int]:
    """Return (height, width) for one or two numbers of pixels. Raise ``ValueError`` unless both are whole patches."""
    size = plain_int(size)
    sides = (size, size) if type(size) is int else size
    if isinstance(sides, (tuple, list)) and len(sides) == 2:
        sides = height, width = tuple(map(plain_int, sides))
        if all(type(side) is int and side >= 1 and side % patch_size == 0 for side in sides):
            return height, width
    raise ValueError(f"image_size {size!r} must be one or two multiples of patch_size {patch_size}")


@dataclass(frozen=True)
class HydraViTConfig:
    """A Vision Transformer of ``max_heads`` heads that holds a smaller one for every number of heads below.

    A width is counted in heads, or in finer steps where the method cuts heads (``width_steps``). The defaults are
    ViT-B/16 at 224 px, whose first 3 and 6 heads have the shapes of ViT-Ti and ViT-S (HydraViT, arXiv 2409.17978,
    section 3). Fields have the names of timm's ``VisionTransformer`` wherever it has one.

    Args:
        image_size: pixels of a side, or (height, width); divisible by ``patch_size``.
        patch_size: pixels of a patch's side.
        in_channels: channels of the images.
        num_classes: rows of the classifier; 0: there is none, and the logits are the pooled features.
        depth: layers, each an attention block and an MLP block.
        max_heads: attention heads of the widest subnetwork.
        head_dim: channels of a head; the residual has ``max_heads * head_dim`` channels.
        mlp_ratio: hidden channels over channels of the residual; their product is an integer. A subnetwork has the
            share of its heads, rounded down.
        qkv_bias: whether queries, keys and values have a bias.
        proj_bias: whether proj, fc1 and fc2 have a bias.
        act_layer: the activation of the MLP: ``"gelu"``, which fused ops compute; ``"gelu_tanh"`` (its approximation by
            tanh) or ``"quick_gelu"`` (by a sigmoid), for which blocks run their modules.
        pre_norm: whether a norm comes before the blocks; the patch embedding then has no bias.
        class_token: whether a class token is prepended.
        distilled: whether a distillation token follows the class token and has a classifier of its own, ``head_dist``;
            the logits are the mean of both (DeiT, arXiv 2012.12877).
        register_tokens: tokens after these that only attention reads (arXiv 2309.16588).
        no_embed_class: whether the position embedding covers the patches only, not the class and register tokens.
        pool: ``"token"`` (class token), ``"avg"`` (mean of the patch tokens), ``"max"`` (their maximum), ``"avgmax"``
            (half of both) or ``""`` (no pooling: every token has logits).
        fc_norm: whether the final norm follows pooling and is called ``fc_norm``; else it precedes pooling and is
            called ``norm``. None: it follows a mean or a maximum. Fused ops, packed inference and engines need a class
            token, or a mean before the norm.
        layer_scale: initial value of a learnt per-channel scale of each branch (arXiv 2103.17239), or None.
        drop_path: largest drop-path rate; grows linearly over the blocks.
        norm_eps: epsilon of every layer norm.
        separate_classifiers: the widths that have a classifier of their own; empty: one serves all.
        geometry: the nesting method, a name of ``hydravit.geometry.GEOMETRIES``.
        width_steps: the number of equal steps in which the width is counted, 1 to this; None: ``max_heads``, so that a
            width is a number of heads. Scala's 16 make width 4 the first quarter of all channels.
        narrowest: the narrowest width that there is. Scala cuts it from the other end of every axis than those between.
        cuts: SKD's nested list (arXiv 2511.11683), with geometry ``"skd"``: every entry ``(layer, branch, channels)``
            leaves that many channels of each head (branch ``"attn"``) or of the hidden ones (``"mlp"``), and 0 skips
            the branch. The full width has none of the cuts, each width below it one more, and width 1 all.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    depth: int = 12
    max_heads: int = 12
    head_dim: int = 64
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    proj_bias: bool = True
    act_layer: str = "gelu"
    pre_norm: bool = False
    class_token: bool = True
    distilled: bool = False
    register_tokens: int = 0
    no_embed_class: bool = False
    pool: str = "token"
    fc_norm: bool | None = None
    layer_scale: float | None = None
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    separate_classifiers: tuple[int, ...] = ()
    geometry: str = "hydravit"
    width_steps: int | None = None
    narrowest: int = 1
    cuts: tuple[tuple[int, str, int], ...] = ()

    def __post_init__(self):
        for name, (valid, expected) in _CHECKS.items():
            value = plain_int(getattr(self, name))
            object.__setattr__(self, name, value)
            if not valid(value):
                raise ValueError(f"{name} must be {expected}, not {value!r}")
        object.__setattr__(self, "image_size", check_image_size(self.image_size, self.patch_size))
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool='token' needs class_token=True")
        if self.distilled and (
            self.pool != "token" or self.register_tokens or self.separate_classifiers or self.fc_norm
        ):
            raise ValueError(
                "distilled=True needs pool='token' with the norm before it, no register tokens and one classifier for "
                "all widths, as timm's distilled DeiT"
            )
        if self.fc_norm is (self.pool in ("avg", "avgmax", "max")):
            object.__setattr__(self, "fc_norm", None)  # so that equal models have equal configs
        self._check_cuts()
        if type(self.narrowest) is not int or not 1 <= self.narrowest <= self.widths:
            raise ValueError(f"narrowest must be an integer in 1..{self.widths}, the widths, not {self.narrowest!r}")
        hidden = self.mlp_ratio * self.embed  # a rounded quotient will do
        if abs(hidden - self.hidden) > 1e-6 or (self.hidden_of(self.narrowest) < 1 and not self.cuts):
            raise ValueError(
                "mlp_ratio times the residual's channels must be an integer, and no less than the widths, "
                f"not {self.mlp_ratio} * {self.embed}"
            )
        widths = self.separate_classifiers
        if not isinstance(widths, (tuple, list, set, frozenset, range)):
            raise ValueError(f"separate_classifiers must be a tuple of widths, not {widths!r}")
        widths = [plain_int(heads) for heads in widths]
        for heads in widths:
            if type(heads) is not int or not self.narrowest <= heads <= self.widths:
                raise ValueError(f"separate_classifiers: {heads!r} is not a width in {self.narrowest}..{self.widths}")
        object.__setattr__(self, "separate_classifiers", tuple(sorted(set(widths))))

    def _check_cuts(self) -> None:
        """Raise ``ValueError`` unless every cut leaves less of its branch than the one before."""
        if not isinstance(self.cuts, (tuple, list)) or not all(isinstance(cut, (tuple, list)) for cut in self.cuts):
            raise ValueError(f"cuts must be a tuple of (layer, branch, channels), not {self.cuts!r:.80}")
        cuts = tuple(tuple(map(plain_int, cut)) for cut in self.cuts)
        object.__setattr__(self, "cuts", cuts)
        if cuts and (self.geometry != "skd" or self.width_steps is not None):
            raise ValueError("cuts need geometry='skd' and width_steps=None")
        left = {(layer, "attn"): self.head_dim for layer in range(self.depth)}
        left |= {(layer, "mlp"): self.hidden for layer in range(self.depth)}
        for cut in cuts:
            right = [type(part) for part in cut] == [int, str, int] and cut[:2] in left
            if not right or not 0 <= cut[2] < left[cut[:2]]:
                most = f", which has {left[cut[:2]]} channels" if right else ""
                raise ValueError(f"cuts: {cut!r} is no (layer, 'attn' or 'mlp', fewer channels){most}")
            left[cut[:2]] = cut[2]

    @property
    def embed(self) -> int:
        """Channels of the full residual, ``D``."""
        return self.max_heads * self.head_dim

    @property
    def widths(self) -> int:
        """The full width, in heads or in ``width_steps``; one more than there are ``cuts``."""
        return len(self.cuts) + 1 if self.cuts else self.width_steps or self.max_heads

    @property
    def counted(self) -> str:
        """What the number of a width counts: "heads"; "width", where names are shares; or "step" of the ``cuts``."""
        return "step" if self.cuts else "heads" if self.width_steps is None else "width"

    def width_name(self, width: int) -> str:
        """Return what people call a width: its number, or with ``width_steps`` its share of the full one."""
        return str(width) if self.width_steps is None else f"{width / self.width_steps:.4g}"

    def label(self, width: int) -> str:
        """Return the width's name with what it counts: "3 heads", "width 0.4375", "step 12"."""
        return f"{width} heads" if self.counted == "heads" else f"{self.counted} {self.width_name(width)}"

    def width_of(self, share: float) -> int:
        """Return the width of that share of the full one, 0.4375 of 16 steps is 7. Raise ``ValueError`` if none is."""
        if self.cuts:
            raise ValueError(f"width={share:g}: the widths of a list of cuts have no shares; name them by a budget")
        width = round(share * self.widths)
        names = {k: f"{k / self.widths:.4g}" for k in range(self.narrowest, self.widths + 1)}
        if width not in names or (abs(width - share * self.widths) > 1e-6 and f"{share:.4g}" != names[width]):
            raise ValueError(f"width={share:g} is none of the model's: {', '.join(names.values())}")
        return width

    @property
    def hidden(self) -> int:
        """Channels between the full fc1 and fc2."""
        return round(self.mlp_ratio * self.embed)

    def hidden_of(self, heads: int) -> int:
        """Hidden channels of a width: its share, rounded down."""
        return self.hidden * heads // self.widths

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        assert isinstance(self.image_size, tuple)  # `__post_init__` sees to it
        return self.in_channels, *self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        _, height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which come before the patches."""
        return int(self.class_token) + int(self.distilled) + self.register_tokens

    @property
    def tokens(self) -> int:
        """All tokens of an image, ``N``."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def pos_tokens(self) -> int:
        """Tokens that have a position embedding."""
        return self.tokens - (self.prefix_tokens if self.no_embed_class else 0)

    @property
    def pool_range(self) -> tuple[int, int]:
        """The range ``[start, stop)`` of tokens that are pooled, or of which each has its own classifier."""
        return {"token": (0, 2 if self.distilled else 1), "": (0, self.tokens)}.get(
            self.pool, (self.prefix_tokens, self.tokens)
        )

    @property
    def pooling_is_fused(self) -> bool:
        """Whether the head op does it, which takes a mean, then the norm. One token may have its norm before too."""
        return self.pool == "token" or (self.pool == "avg" and self.final_norm == "fc_norm")

    @property
    def final_norm(self) -> str:
        """timm's name of the norm before the classifier: ``norm`` precedes pooling, ``fc_norm`` follows it."""
        follows = self.pool in ("avg", "avgmax", "max") if self.fc_norm is None else self.fc_norm
        return "fc_norm" if follows else "norm"

    @property
    def sizes(self) -> NetworkSizes:
        """The sizes of the full network as kernels see it: separate classifiers are rows of one."""
        return NetworkSizes(
            layers=self.depth,
            embed=self.embed,
            hidden=self.hidden,
            channels=self.in_channels,
            patch_height=self.patch_size,
            patch_width=self.patch_size,
            cls_tokens=int(self.class_token),
            reg_tokens=self.register_tokens + int(self.distilled),  # ops know the distillation token as a register
            positions=self.pos_tokens,
            classes=self.num_classes * max(len(self.separate_classifiers), 1),
            image_height=self.image_shape[1],
            image_width=self.image_shape[2],
            pool_start=self.pool_range[0],
            pool_stop=self.pool_range[1],
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> HydraViTConfig:
        """The inverse of ``to_dict``, also after a trip through JSON. Raises ``ValueError`` for an unknown field."""
        if not isinstance(values, Mapping):
            raise TypeError(f"config must be a dict of fields, not {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        if unknown:
            raise ValueError(f"unknown config field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)


CONFIGS = {
    "tiny": HydraViTConfig(max_heads=3),
    "small": HydraViTConfig(max_heads=6),
    "base": HydraViTConfig(),
    "large": HydraViTConfig(max_heads=16, depth=24),
}


def resolve_config(config: str | HydraViTConfig, **overrides) -> HydraViTConfig:
    """Return a config, given by name or as it is, with some fields replaced.

    Raises ``ValueError`` for an unknown name or field, ``TypeError`` for anything but a name or a config.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"unknown config {config!r}; known: {', '.join(CONFIGS)}, or a HydraViTConfig")
        config = CONFIGS[config]
    elif not isinstance(config, HydraViTConfig):
        raise TypeError(f"config must be a name or a HydraViTConfig, not {type(config).__name__}")
    return HydraViTConfig.from_dict({**config.to_dict(), **overrides})
