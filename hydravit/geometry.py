"""The nesting methods: each is a function that makes the ``Subnetwork`` of a width.

A ``Subnetwork`` is made once per width, never inside a forward. Kernels know none of the methods, so a new one needs
only a function here. The intervals follow the cited papers, and the released checkpoints where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hydravit.config import HydraViTConfig
from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, Intervals, MlpSlice, Subnetwork


class Selection(NamedTuple):
    """The subnetworks of one call.

    ``width_index (B,)`` int64 is the index of each image's subnetwork; None: the whole batch uses the only one.
    """

    subnetworks: tuple[Subnetwork, ...]
    width_index: Tensor | None

    @property
    def eps(self) -> float:
        return self.subnetworks[0].eps

    @property
    def embed(self) -> list[EmbedSlice]:
        return [s.embed for s in self.subnetworks]

    def attention(self, layer: int) -> list[AttentionSlice]:
        return [s.attention[layer] for s in self.subnetworks]

    def mlp(self, layer: int) -> list[MlpSlice]:
        return [s.mlp[layer] for s in self.subnetworks]

    @property
    def head(self) -> list[HeadSlice]:
        return [s.head for s in self.subnetworks]


def parameter_slices(config: HydraViTConfig, subnetwork: Subnetwork) -> dict[str, tuple[Intervals, ...]]:
    """Return, by the parameters' names, the intervals that the subnetwork reads along every axis.

    A skipped branch reads nothing: its parameters have axes without intervals.
    """
    slices = config.sizes.parameter_slices(subnetwork, config.final_norm)
    if config.pre_norm:
        slices["norm_pre.weight"] = slices["norm_pre.bias"] = (
            ((subnetwork.embed.embed_offset, subnetwork.embed.embed),),
        )
    if config.distilled:
        slices["dist_token"] = slices.pop("reg_token")
        slices |= {f"head_dist.{kind}": slices[f"head.{kind}"] for kind in ("weight", "bias")}
    if config.separate_classifiers:  # the model keeps them apart along an axis of widths
        width = ((subnetwork.head.class_offset // max(config.num_classes, 1), 1),)
        classes = ((0, config.num_classes),)
        slices["head.weight"] = (width, classes, slices["head.weight"][1])
        slices["head.bias"] = (width, classes)
    return slices


def position(widths: tuple[int, ...], heads: int, problem: str) -> int:
    """Return the index of ``heads`` in the ascending ``widths``.

    It compares ``heads`` with no single width: torch.compile then makes one graph for all widths, where ``in`` and
    ``index`` would make one for each.

    Raises:
        ValueError: there is no such width; ``problem`` ends the sentence that begins with it.
    """
    first, last = widths[0], widths[-1]
    if last - first + 1 == len(widths):
        if first <= heads <= last:
            return heads - first
    else:
        product, smaller = 1, 0
        for width in widths:
            product = product * (heads - width)
            smaller = smaller + (heads - width - 1) // last + 1  # adds 1 where width < heads
        if product == 0:
            return smaller
    raise ValueError(f"heads={heads} {problem}; possible: {list(widths)}")


def _subnetwork(
    config: HydraViTConfig,
    heads: int,
    attention: Sequence[AttentionSlice],
    mlp: Sequence[MlpSlice],
    eps: float | None = None,
) -> Subnetwork:
    own = config.separate_classifiers
    index = position(own, heads, "has no classifier of its own") if own else 0
    embed = EmbedSlice(*attention[0][:2])
    head = HeadSlice(*embed, index * config.num_classes, config.num_classes)
    return Subnetwork(heads, embed, tuple(attention), tuple(mlp), head, config.norm_eps if eps is None else eps)


def _uniform(
    config: HydraViTConfig, heads: int, attention: AttentionSlice, mlp: MlpSlice, eps: float | None = None
) -> Subnetwork:
    """Make a subnetwork with the same slices in every layer."""
    return _subnetwork(config, heads, (attention,) * config.depth, (mlp,) * config.depth, eps)


def hydravit(config: HydraViTConfig, heads: int) -> Subnetwork:
    """The first ``heads`` heads and the matching first channels of everything else (arXiv 2409.17978, section 3)."""
    whole = _whole_heads(config, heads)
    embed = whole * config.head_dim
    return _uniform(
        config,
        heads,
        _per_role_attention(config, embed, whole, config.head_dim),
        MlpSlice(0, embed, 0, config.hidden_of(heads)),
    )


def _whole_heads(config: HydraViTConfig, width: int) -> int:
    if config.widths == config.max_heads:
        return width
    if config.max_heads * width % config.widths:
        raise ValueError(f"width {width}/{config.widths} of {config.max_heads} heads is no integer")
    return config.max_heads * width // config.widths


def sortednet(config: HydraViTConfig, heads: int) -> Subnetwork:
    """All heads, each cut to its first channels, so that they are as wide as ``heads`` whole ones.

    SortedNet, arXiv 2309.00255. ``heads * head_dim`` must be divisible by ``max_heads``. The attention scale stays the
    full model's.
    """
    head_dim = _narrow_head(config, heads)
    embed = config.max_heads * head_dim
    return _uniform(
        config,
        heads,
        _per_role_attention(config, embed, config.max_heads, head_dim),
        MlpSlice(0, embed, 0, config.hidden_of(heads)),
    )


def _narrow_head(config: HydraViTConfig, width: int) -> int:
    """The channels of a head where all heads are kept and cut to the width's share."""
    if config.head_dim * width % config.widths:
        raise ValueError(f"width {width}/{config.widths} of a head's {config.head_dim} channels is no integer")
    return config.head_dim * width // config.widths


def dynabert(config: HydraViTConfig, heads: int) -> Subnetwork:
    """The first ``heads`` heads and the same share of the hidden channels; the residual is whole (arXiv 2004.04037)."""
    return _uniform(
        config,
        heads,
        _per_role_attention(config, config.embed, _whole_heads(config, heads), config.head_dim),
        MlpSlice(0, config.embed, 0, config.hidden_of(heads)),
    )


def matformer(config: HydraViTConfig, heads: int) -> Subnetwork:
    """The width's share of the hidden channels, and all of the rest (MatFormer, arXiv 2310.07707)."""
    return _uniform(
        config,
        heads,
        _per_role_attention(config, config.embed, config.max_heads, config.head_dim),
        MlpSlice(0, config.embed, 0, config.hidden_of(heads)),
    )


def nested_skd(config: HydraViTConfig, heads: int) -> Subnetwork:
    """All heads, each cut to the width's share of its channels, the first ones, rounded down.

    The hidden channels are cut to the same share, and the residual is whole: SKD (arXiv 2511.11683) with the same
    lengths in every layer. With ``config.cuts`` every layer has lengths of its own.
    """
    if config.cuts:
        lengths = [{"attn": config.head_dim, "mlp": config.hidden} for _ in range(config.depth)]
        for layer, branch, channels in config.cuts[: config.widths - heads]:
            lengths[layer][branch] = channels
        return skd(config, [(each["attn"], each["mlp"]) for each in lengths], heads)
    return _uniform(
        config,
        heads,
        _narrow_attention(config, config.max_heads, config.head_dim * heads // config.widths),
        MlpSlice(0, config.embed, 0, config.hidden_of(heads)),
    )


def _narrow_attention(config: HydraViTConfig, heads: int, channels: int) -> AttentionSlice:
    """The first channels of each of the heads, from the whole residual."""
    full, pitch = config.embed, config.head_dim
    return AttentionSlice(0, full, 0, full, 2 * full, 0, heads, channels, channels, pitch, pitch**-0.5)


def _per_role_attention(config: HydraViTConfig, embed: int, heads: int, head_dim: int) -> AttentionSlice:
    """The first heads of Q, K and V, each in its own third of the fused weight, from the first ``embed`` channels."""
    full = config.embed
    return AttentionSlice(0, embed, 0, full, 2 * full, 0, heads, head_dim, head_dim, head_dim, config.head_dim**-0.5)


def full_attention(config: HydraViTConfig) -> AttentionSlice:
    """The attention of the full model, which the widest subnetwork of every method has."""
    return _per_role_attention(config, config.embed, config.max_heads, config.head_dim)


def scala(
    config: HydraViTConfig, embed: int, *, suffix: int, per_role: bool = False, width: int | None = None
) -> Subnetwork:
    """The first ``embed`` channels of every axis, or the last (``suffix`` 1), with all heads (Scala, arXiv 2412.04786).

    This follows the released checkpoints. They cut the qkv weight as one block of ``3 * embed`` rows, and split that
    into queries, keys and values, so a subnetwork's queries may be the full model's key rows. With ``per_role`` they
    are query rows, as keys are key rows. The attention scale stays the full model's, and epsilon is 1e-5.

    ``width`` is the number that names the subnetwork; None: that of the full width. It also selects the classifier,
    where widths have their own.
    """
    if not 1 <= embed <= config.embed or embed % config.max_heads:
        raise ValueError(f"scala: embed {embed} must be in 1..{config.embed} and divisible by {config.max_heads} heads")
    hidden = config.hidden * embed // config.embed
    channel = (config.embed - embed) * suffix
    row, distance = (channel, config.embed) if per_role else (3 * channel, embed)
    head_dim = embed // config.max_heads
    attention = AttentionSlice(
        channel, embed, row, row + distance, row + 2 * distance, channel,
        config.max_heads, head_dim, head_dim, head_dim, config.head_dim**-0.5,
    )  # fmt: skip
    mlp = MlpSlice(channel, embed, (config.hidden - hidden) * suffix, hidden)
    return _uniform(config, config.widths if width is None else width, attention, mlp, eps=1e-5)


def scala_released(config: HydraViTConfig, width: int, *, per_role: bool = False) -> Subnetwork:
    """Scala as in its released code: the last channels of every axis; of the narrowest and the full width, the first.

    The narrowest width, which every step trains, then shares few weights with those between, or none (Isolated
    Activation, section 3.2).
    """
    between = _positive((width - config.narrowest) * (config.widths - width))
    embed = config.max_heads * _narrow_head(config, width)
    return scala(config, embed, suffix=between, per_role=per_role, width=width)


def _positive(number: int) -> int:
    """Return 1 for a number above 0, and 0 for 0. No comparison: torch.compile then makes one graph for all widths."""
    return 2 * number // (number + 1)


def scala_per_role(config: HydraViTConfig, width: int) -> Subnetwork:
    """The released code's Scala, but queries, keys and values keep their roles."""
    return scala_released(config, width, per_role=True)


def scala_paper(config: HydraViTConfig, width: int) -> Subnetwork:
    """Scala as in the paper (equations 2 and 3): the first channels of every axis; of the narrowest width, the last."""
    embed = config.max_heads * _narrow_head(config, width)
    return scala(config, embed, suffix=1 - _positive(width - config.narrowest), width=width)


# The values of `HydraViTConfig.geometry`: the methods in which a number names a width.
GEOMETRIES: dict[str, Callable[[HydraViTConfig, int], Subnetwork]] = {
    "hydravit": hydravit,
    "sortednet": sortednet,
    "dynabert": dynabert,
    "matformer": matformer,
    "skd": nested_skd,
    "scala": scala_released,
    "scala-paper": scala_paper,
    "scala-per-role": scala_per_role,
}


def every_width(config: HydraViTConfig) -> dict[int, Subnetwork]:
    """Return the validated subnetworks of all widths that the config's geometry has, in ascending order."""
    found = {}
    for heads in range(config.narrowest, config.widths + 1):
        try:
            found[heads] = config.sizes.validate(GEOMETRIES[config.geometry](config, heads))
        except ValueError:  # a width whose heads would be no integers, or one without a classifier
            continue
    return found


def skd(config: HydraViTConfig, lengths: Sequence[tuple[int, int]], width: int | None = None) -> Subnetwork:
    """The first ``r`` channels of every head and the first ``m`` hidden channels; ``lengths`` has ``(r, m)`` per layer.

    SKD, arXiv 2511.11683. The residual and the number of heads stay whole. A 0 skips the layer's branch with its bias.
    ``width`` is that of ``scala``.
    """
    attention = [_narrow_attention(config, config.max_heads if r else 0, r) for r, _ in lengths]
    mlp = [MlpSlice(0, config.embed, 0, m) for _, m in lengths]
    return _subnetwork(config, config.widths if width is None else width, attention, mlp)
