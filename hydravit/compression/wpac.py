"""WPAC: principal axes of every head, weighted by importance, come first (SKD, arXiv 2511.11683)."""

from __future__ import annotations

import torch
from torch import Tensor

from hydravit.compression.calibration import Activation, Batches, activations, label_logits
from hydravit.compression.source import check_source, rearranged, working_copy
from hydravit.config import HydraViTConfig
from hydravit.model import HydraViT


def wpac(model: HydraViT, batches: Batches, *, fold_mean: bool = False, balanced: bool = False) -> HydraViT:
    """Return the model with the most important channels of every head, and hidden channels, first.

    Inside every head one rotation goes into the rows of values and the columns of proj, another into the rows of
    queries and of keys. Their axes are the principal ones of the activations, weighted token by token with the
    first-order change of the label's logit. Hidden channels are permuted. The full width computes the same as before;
    narrower ones read first parts (``hydravit.geometry.skd``).

    Statistics are sums in float64 over all tokens, so the size of the batches does not matter. The published code
    centres each batch by its own mean, in half precision.

    Args:
        model: trained at full width; it stays as it is.
        batches: ``(images (B, C, H, W), labels (B,))``, read once.
        fold_mean: make values free of their mean, which goes through proj into its bias. Narrower widths then keep the
            mean of the channels that they drop. Needs both biases.
        balanced: choose the channels of queries and keys by the logits of attention that they explain, from the
            singular value decomposition of both covariances' roots, instead of by their own variances.
    Returns:
        A model of geometry ``"skd"``, with the dtype, device and mode of ``model``.
    Raises:
        TypeError, ValueError: a model, labels or batches that do not serve.
        RuntimeError: logits that are not finite.
    """
    check_source(model)
    config = model.config
    if fold_mean and not (config.qkv_bias and config.proj_bias):
        missing = "qkv_bias" if not config.qkv_bias else "proj_bias"
        raise ValueError(f"fold_mean needs biases of qkv and proj, but the model has {missing}=False")
    statistics = _measure(working_copy(model), batches)
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for layer, measured in enumerate(statistics):
        prefix = f"blocks.{layer}."
        block = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        weights |= _rearranged_block(config, block, prefix, measured, fold_mean, balanced)
    return rearranged(model, weights, "skd")


class _Layer:
    """Sums over the tokens seen so far of one layer: per role (queries, keys, values) and head, and per hidden channel.

    A token weighs, in every role and head, ``mean over channels of |activation * gradient|``.
    """

    def __init__(self, config: HydraViTConfig, device: torch.device):
        heads, channels = config.max_heads, config.head_dim

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.sum = zeros(3, heads, channels)
        self.weight = zeros(3, heads, 1)
        self.weighted_sum = zeros(3, heads, channels)
        self.weighted_squares = zeros(3, heads, channels, channels)
        self.hidden_importance = zeros(config.hidden)

    def add(self, qkv: Activation, hidden: Activation) -> None:
        """Add one batch: the outputs of qkv ``(B, N, 3 * D)`` and of the GELU ``(B, N, hidden)``."""
        value, gradient = map(self._by_head, qkv)
        weight = (value * gradient).abs().mean(-1, keepdim=True)
        weighted = weight * value
        self.tokens += value.shape[2]
        self.sum += value.sum(2)
        self.weight += weight.sum(2)
        self.weighted_sum += weighted.sum(2)
        self.weighted_squares += weighted.mT @ value
        self.hidden_importance += (hidden.value * hidden.gradient).square().sum((0, 1))

    def _by_head(self, rows: Tensor) -> Tensor:
        """``(B, N, 3 * D)`` as ``(3, heads, B * N, channels)``."""
        _, heads, channels = self.sum.shape
        return rows.unflatten(-1, (3, heads, channels)).permute(2, 3, 0, 1, 4).flatten(2, 3)

    @property
    def mean(self) -> Tensor:
        """Of all tokens alike, ``(3, heads, channels)``."""
        return self.sum / self.tokens

    @property
    def covariance(self) -> Tensor:
        """The weighted second moment about the mean, ``(3, heads, channels, channels)``."""
        return self._about(self.mean)

    def balanced_moments(self) -> tuple[Tensor, Tensor]:
        """Second moments ``(heads, channels, channels)`` of queries, and of keys about their weighted mean.

        A shift of all keys changes no attention, a shift of the queries does.
        """
        weight = self.weight[:2, :, :, None].clamp_min(torch.finfo(torch.float64).tiny)
        about_mean = self._about(self.weighted_sum / self.weight.clamp_min(torch.finfo(torch.float64).tiny))
        return self.weighted_squares[0] / weight[0], about_mean[1] / weight[1]

    def _about(self, centre: Tensor) -> Tensor:
        outer = centre[..., :, None] * self.weighted_sum[..., None, :]
        square = centre[..., :, None] * centre[..., None, :]
        return self.weighted_squares - outer - outer.mT + self.weight[..., None] * square


def _measure(model: HydraViT, batches: Batches) -> list[_Layer]:
    config = model.config
    layers = [_Layer(config, model.pos_embed.device) for _ in range(config.depth)]
    names = [f"blocks.{i}.{module}" for i in range(config.depth) for module in ("attn.qkv", "mlp.act")]
    for found in activations(model, batches, names, label_logits, heads=config.widths):
        for i, layer in enumerate(layers):
            layer.add(found[f"blocks.{i}.attn.qkv"], found[f"blocks.{i}.mlp.act"])
    return layers


def _rearranged_block(
    config: HydraViTConfig,
    block: dict[str, Tensor],
    prefix: str,
    measured: _Layer,
    fold_mean: bool,
    balanced: bool,
) -> dict[str, Tensor]:
    """Return the weights of a layer that change."""
    by_head = (config.max_heads, config.head_dim)
    qkv, proj, fc1, fc2 = (f"{prefix}{name}" for name in ("attn.qkv.", "attn.proj.", "mlp.fc1.", "mlp.fc2."))
    axes = _principal_axes(measured.covariance[2])
    if balanced:
        of_queries, of_keys = _balanced_maps(*measured.balanced_moments())
    else:
        of_queries = of_keys = _principal_axes(measured.covariance[0] + measured.covariance[1]).mT
    maps = torch.stack([of_queries, of_keys, axes.mT])
    rows = block[f"{qkv}weight"].unflatten(0, (3, *by_head))
    columns = block[f"{proj}weight"].unflatten(1, by_head)
    result = {
        f"{qkv}weight": (maps @ rows).flatten(0, 2),
        f"{proj}weight": torch.einsum("ehc,hcd->ehd", columns, axes).flatten(1),
    }
    if config.qkv_bias:
        biases = block[f"{qkv}bias"].unflatten(0, (3, *by_head))
        if fold_mean:
            # Attention weights sum to 1: what is added to all values comes out of proj as a constant.
            mean = measured.mean[2]
            biases = torch.stack([biases[0], biases[1], biases[2] - mean])
            result[f"{proj}bias"] = block[f"{proj}bias"] + torch.einsum("ehc,hc->e", columns, mean)
        result[f"{qkv}bias"] = (maps @ biases[..., None]).flatten()
    order = measured.hidden_importance.argsort(descending=True, stable=True)
    result[f"{fc1}weight"] = block[f"{fc1}weight"][order]
    result[f"{fc2}weight"] = block[f"{fc2}weight"][:, order]
    if config.proj_bias:
        result[f"{fc1}bias"] = block[f"{fc1}bias"][order]
    return result


def _principal_axes(covariance: Tensor) -> Tensor:
    """The eigenvectors ``(heads, channels, channels)``, as columns, in descending order of variance."""
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)


def _balanced_maps(of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps ``P`` of queries and ``Q`` of keys with ``P.mT @ Q = 1``, so that dot products stay.

    For independent ``q`` and ``k`` with these second moments ``A`` and ``B``, no other maps have a smaller error of
    ``q . k`` when only the first channels are kept: they come from the singular vectors of ``sqrt(A) sqrt(B)``.
    """
    root_a, root_b = _root(of_queries), _root(of_keys)
    left, singular, right = torch.linalg.svd(root_a @ root_b)
    scale = singular.rsqrt()[..., None]
    return scale * (right @ root_b), scale * (left.mT @ root_a)


def _root(moment: Tensor) -> Tensor:
    """The symmetric square root, of a matrix made regular: every direction keeps a millionth of the mean variance."""
    values, vectors = torch.linalg.eigh(moment)
    floor = 1e-6 * values.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (vectors * (values.clamp_min(0) + floor).sqrt()[..., None, :]) @ vectors.mT
