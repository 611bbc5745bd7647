"""The full model in numbers: one frozen value from which everything else follows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class HydraViTConfig:
    """A Vision Transformer of ``max_heads`` heads that holds a smaller one for every number of heads below.

    Defaults are ViT-B/16 at 224 px, whose first 3 and 6 heads are ViT-Ti and ViT-S (HydraViT, arXiv 2409.17978,
    section 3). Names follow timm's ``VisionTransformer`` wherever it has one.

    Args:
        image_size: pixels of a side, or (height, width); divisible by ``patch_size``.
        patch_size: pixels of a patch's side.
        in_channels: channels of the images.
        num_classes: width of the classifier; 0 for none (logits are then the pooled features).
        depth: blocks.
        max_heads: attention heads of the widest subnetwork.
        head_dim: channels of a head; the embed width is ``max_heads * head_dim``.
        mlp_ratio: hidden width over embed width; ``mlp_ratio * head_dim`` is an integer, so every head adds as much.
        qkv_bias: whether queries, keys and values have a bias.
        class_token: whether a class token is prepended.
        register_tokens: tokens after the class token that only attention reads (arXiv 2309.16588).
        no_embed_class: the position embedding covers the patches only, not the class and register tokens.
        pool: ``"token"`` (class token, final norm first) or ``"avg"`` (mean of the patch tokens, then ``fc_norm``).
        layer_scale: initial value of a learnt per-channel scale of each branch (arXiv 2103.17239), or None.
        drop_path: largest drop-path rate; grows linearly over the blocks.
        norm_eps: epsilon of every layer norm.
        separate_classifiers: the widths (in heads) that have a classifier of their own; empty: one serves all.
        geometry: which nesting the widths follow, a name of ``hydravit.geometry.GEOMETRIES``.
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
    class_token: bool = True
    register_tokens: int = 0
    no_embed_class: bool = False
    pool: str = "token"
    layer_scale: float | None = None
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    separate_classifiers: tuple[int, ...] = ()
    geometry: str = "hydravit"

    def __post_init__(self):
        size = self.image_size
        object.__setattr__(self, "image_size", (size, size) if isinstance(size, int) else tuple(size))
        object.__setattr__(self, "separate_classifiers", tuple(sorted(self.separate_classifiers)))
        for name in ("patch_size", "in_channels", "depth", "max_heads", "head_dim"):
            self._check_int(name, 1)
        for name in ("num_classes", "register_tokens"):
            self._check_int(name, 0)
        height_width = self.image_size
        if len(height_width) != 2 or any(type(s) is not int or s < 1 or s % self.patch_size for s in height_width):
            raise ValueError(f"image_size {size!r} must be one or two multiples of patch_size {self.patch_size}")
        if self.pool not in ("token", "avg"):
            raise ValueError(f"pool must be 'token' or 'avg', not {self.pool!r}")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool='token' needs class_token=True")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), not {self.drop_path!r}")
        if not self.norm_eps > 0.0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps!r}")
        per_head = self.mlp_ratio * self.head_dim
        if per_head < 1 or per_head != int(per_head):
            raise ValueError(f"mlp_ratio * head_dim must be a positive integer, not {self.mlp_ratio} * {self.head_dim}")
        for heads in self.separate_classifiers:
            if type(heads) is not int or not 1 <= heads <= self.max_heads:
                raise ValueError(f"separate_classifiers: {heads!r} is not a number of heads in 1..{self.max_heads}")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")

    @property
    def embed(self) -> int:
        """Channels of the full residual stream, ``D``."""
        return self.max_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Channels of the full MLP's hidden layer."""
        return self.max_heads * self.hidden_per_head

    @property
    def hidden_per_head(self) -> int:
        return int(self.mlp_ratio * self.head_dim)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens, which come before the patches."""
        return int(self.class_token) + self.register_tokens

    @property
    def tokens(self) -> int:
        """All tokens of an image, ``N``."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def pos_tokens(self) -> int:
        """Tokens that have a position embedding."""
        return self.tokens - (self.prefix_tokens if self.no_embed_class else 0)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> HydraViTConfig:
        """The inverse of ``to_dict``, also after a trip through JSON. Raises ``ValueError`` for an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
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
    """A named config or a config, with some fields replaced. Raises ``ValueError`` for an unknown name or field."""
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"unknown config {config!r}; known: {', '.join(CONFIGS)}, or a HydraViTConfig")
        config = CONFIGS[config]
    elif not isinstance(config, HydraViTConfig):
        raise TypeError(f"config must be a name or a HydraViTConfig, not {type(config).__name__}")
    return HydraViTConfig.from_dict({**config.to_dict(), **overrides})
