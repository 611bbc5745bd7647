"""The order in which a rearranged ViT loses its channels, layer by layer: SKD's nested list (arXiv 2511.11683)."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydravit.compression.calibration import Batches, activations, loss, slopes
from hydravit.compression.source import check_source, rearranged, working_copy
from hydravit.config import HydraViTConfig
from hydravit.evaluation.cost import cost as cost_of
from hydravit.evaluation.latency import with_backend
from hydravit.geometry import skd
from hydravit.model import HydraViT
from hydravit_kernels import Subnetwork

COSTS = ("macs", "params", "latency")
GROUPS = (8, 32)  # of the channels of a head, and of the hidden ones
Branch = tuple[int, str]  # a layer, and "attn" or "mlp"
Cut = tuple[int, str, int]


def plan(
    model: HydraViT,
    batches: Batches,
    *,
    cost: str = "macs",
    keep: float = 0.125,
    rounds: int = 10,
    groups: tuple[int, int] = GROUPS,
) -> HydraViT:
    """Return the model with a width for every step of a list that cuts what matters least for its cost first.

    Channels go in groups, from the last one of a branch on, those first whose importance is the least for their cost.
    The list is a chain: every width holds all narrower ones. It grows in rounds, each of which measures the importance
    anew, in the narrowest width so far.

    Importance is the empirical Fisher information of a factor, 1, before a channel: the mean over images of the squared
    derivative of the loss, as in ``order_heads``. The paper's is a share of the answers that are wrong without the
    whole branch, for which it runs the network once more per branch; the shares of branches without which more answers
    are right are negative, and the published code never cuts these. That code also scores a cut by the mean importance
    of all that is behind it, not by that of its own group, and so ranks inner groups too low.

    Args:
        model: one of ``wpac``, trained or not; it stays as it is.
        batches: ``(images (B, C, H, W), labels (B,))``, read once in every round: a list, a ``DataLoader`` or
            ``CalibrationImages``.
        cost: what a channel costs: multiply-accumulates, parameters, or the ``"latency"`` of one image measured here.
        keep: the share of the full cost of all channels that the narrowest width keeps, about.
        rounds: how often importance is measured.
        groups: into how many groups the channels of a head and the hidden channels are divided, if there are so many.
    Returns:
        A model with the same weights whose config has the list (``HydraViTConfig.cuts``).
    Raises:
        TypeError, ValueError: a model, labels, batches or options that do not serve.
        RuntimeError: logits that are not finite.
    """
    check_source(model)
    config = model.config
    if config.geometry != "skd":
        raise ValueError(f"plan: the model must have geometry 'skd', as wpac makes it, not {config.geometry!r}")
    for name, value, good, expected in (
        ("cost", cost, cost in COSTS, f"one of {', '.join(COSTS)}"),
        ("keep", keep, 0 <= keep < 1, "in [0, 1)"),
        ("rounds", rounds, rounds >= 1, "at least 1"),
        ("groups", groups, min(groups) >= 1, "at least 1"),
    ):
        if not good:
            raise ValueError(f"plan: {name} must be {expected}, not {value!r}")
    working, prices = working_copy(model), prices_of(model, cost)
    cuts: tuple[Cut, ...] = ()
    for done in range(1, rounds + 1):
        cuts = grow(working, batches, cuts, (1 - keep) * done / rounds, prices, groups)
    if not cuts:
        raise ValueError(f"plan: keep {keep} leaves no room for a cut of one group")
    return rearranged(model, model.state_dict(), "skd", cuts)


class _Operation(NamedTuple):
    """Cut a branch to ``channels``; ``importance`` and ``cost`` are those of what goes."""

    branch: Branch
    channels: int
    importance: float
    cost: float

    @property
    def density(self) -> float:
        return self.importance / self.cost


def grow(
    model: HydraViT,
    batches: Batches,
    cuts: Sequence[Cut],
    share: float,
    prices: Mapping[str, float],
    groups: tuple[int, int] = GROUPS,
) -> tuple[Cut, ...]:
    """Return a list of cuts with more of them, until another one would exceed ``share`` of the cost of all channels.

    Those that come first are of least importance for their cost, in the network that the cuts so far leave.

    Args:
        model: in evaluation mode, of geometry ``"skd"``; its own list does not matter.
        prices: what ``prices_of`` returns.
    """
    config = model.config
    full = _full(config)
    left = full | {(layer, branch): channels for layer, branch, channels in cuts}
    budget = sum(prices[branch[1]] * (left[branch] - (1 - share) * n) for branch, n in full.items())
    operations: list[_Operation] = []
    for branch, importance in _importance(model, batches, left).items():
        most, count = _channels(config)[branch[1]], groups[branch[1] == "mlp"]
        operations += _operations(branch, importance, most, min(count, most), prices[branch[1]])
    result = [*cuts]
    # Sorting is stable, and the operations of a branch are ascending, so that they keep their order.
    for operation in sorted(operations, key=lambda each: each.density):
        budget -= operation.cost
        if budget < -1e-9 * operation.cost:
            break
        result.append((*operation.branch, operation.channels))
    return tuple(result)


def _operations(branch: Branch, importance: Tensor, full: int, groups: int, price: float) -> list[_Operation]:
    """Return the cuts of one branch, the last group first, none of less importance per cost than the one before.

    A group that matters less than those behind it goes together with them.
    """
    result: list[_Operation] = []
    starts = sorted({full * i // groups for i in range(groups)} & set(range(len(importance))), reverse=True)
    stop = len(importance)
    for start in starts:
        step = _Operation(branch, start, float(importance[start:stop].sum()), price * (stop - start))
        while result and step.density < result[-1].density:
            before = result.pop()
            step = step._replace(importance=step.importance + before.importance, cost=step.cost + before.cost)
        result.append(step)
        stop = start
    return result


def _importance(model: HydraViT, batches: Batches, left: Mapping[Branch, int]) -> dict[Branch, Tensor]:
    """Return the importance of the channels of every branch that is left, ``(channels,)``."""
    config = model.config
    module = {"attn": "attn.qkv", "mlp": "mlp.act"}
    names = {branch: f"blocks.{branch[0]}.{module[branch[1]]}" for branch, channels in left.items() if channels}
    result: dict[Branch, Tensor] = {}
    if not names:
        return result
    for found in activations(model, batches, list(names.values()), loss, heads=_subnetwork(config, left)):
        for branch, name in names.items():
            slope = slopes(found[name])
            if branch[1] == "attn":  # one factor before a channel of all heads' products and values
                queries, _, values = slope.unflatten(1, (3, config.max_heads, left[branch])).sum(2).unbind(1)
                slope = queries + values
            squares = slope.square().sum(0)
            result[branch] = result[branch] + squares if branch in result else squares
    return result


def _subnetwork(config: HydraViTConfig, left: Mapping[Branch, int]) -> Subnetwork:
    return skd(config, [(left[layer, "attn"], left[layer, "mlp"]) for layer in range(config.depth)])


def _full(config: HydraViTConfig) -> dict[Branch, int]:
    return {(layer, branch): n for layer in range(config.depth) for branch, n in _channels(config).items()}


def _channels(config: HydraViTConfig) -> dict[str, int]:
    return {"attn": config.head_dim, "mlp": config.hidden}


def prices_of(model: HydraViT, kind: str = "macs") -> dict[str, float]:
    """Return what a channel of every head costs, ``"attn"``, and a hidden one, ``"mlp"``; ``kind``: ``plan``'s cost."""
    config = model.config
    full = _full(config)
    halves = {branch: {key: n // 2 if key[1] == branch else n for key, n in full.items()} for branch in ("attn", "mlp")}
    subnetworks = {"": _subnetwork(config, full)} | {name: _subnetwork(config, each) for name, each in halves.items()}
    if kind == "latency":
        timed = with_backend(copy.deepcopy(model).eval(), "auto")
        timed.packed_inference = None  # packed weights serve none of the widths that cut heads
        found = _latencies(timed, subnetworks)
    else:
        found = {name: float(getattr(cost_of(config, each), kind)) for name, each in subnetworks.items()}
    fewer = {name: config.depth * (n - n // 2) for name, n in _channels(config).items()}
    return {name: max(found[""] - found[name], 1e-9 * found[""]) / fewer[name] for name in halves}


@torch.inference_mode()
def _latencies(model: HydraViT, subnetworks: Mapping[str, Subnetwork], calls: int = 30) -> dict[str, float]:
    """Return the median seconds of one image, the subnetworks in turns."""
    image = model.pos_embed.new_zeros(1, *model.config.image_shape)
    times: dict[str, list[float]] = {name: [] for name in subnetworks}
    for call in range(calls + 3):
        for name, subnetwork in subnetworks.items():
            start = time.perf_counter()
            model(image, heads=subnetwork)
            if image.is_cuda:
                torch.cuda.synchronize()
            if call >= 3:  # the first calls warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}
