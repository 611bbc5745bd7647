"""A plain Vision Transformer from index lists, in any precision: shares nothing with the code under test.

Every test names the channels of its subnetwork in the words of the method's paper; here they are gathered with index
lists, copied, and run through the textbook computation. Autograd brings the gradients back to the full parameters.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Layer:
    """Index lists of one layer; an empty ``query`` or ``hidden`` skips that branch. Heads lie one after the other."""

    query: list
    key: list
    value: list
    proj: list
    heads: int
    scale: float
    hidden: list


@dataclass
class Subnetwork:
    embed: list
    layers: list
    eps: float
    classes: list


def prefix(config, heads):
    """HydraViT, section 3: the first heads and the first channels of everything."""
    full, width = config.embed, heads * config.head_dim
    layer = Layer(
        query=list(range(width)),
        key=list(range(full, full + width)),
        value=list(range(2 * full, 2 * full + width)),
        proj=list(range(width)),
        heads=heads,
        scale=config.head_dim**-0.5,
        hidden=list(range(config.hidden_of(heads))),
    )
    return Subnetwork(list(range(width)), [layer] * config.depth, config.norm_eps, list(range(config.num_classes)))


def forward(parameters, config, subnetwork, images, maps=None):
    """Logits of ``images (B, C, height, width)`` from full ``parameters`` (a state dict, any dtype).

    A list given as ``maps`` receives, per layer, the softmax matrices ``(B, heads, N, N)``; None for a skipped branch.
    """
    p, e = parameters, subnetwork.embed
    size = config.patch_size

    def norm(x, name):
        return F.layer_norm(x, (len(e),), p[name + ".weight"][e], p[name + ".bias"][e], subnetwork.eps)

    def pick(name, rows, columns=None):
        if name not in p:
            return None
        return p[name][rows] if columns is None else p[name][rows][:, columns]

    b, c, h, w = images.shape
    patches = (
        images.reshape(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * size**2)
    )
    x = patches @ p["patch_embed.proj.weight"].flatten(1)[e].T + p["patch_embed.proj.bias"][e]
    prefix = [p[t][:, :, e].expand(b, -1, -1) for t in ("cls_token", "reg_token") if t in p]
    if config.no_embed_class:
        x = torch.cat([*prefix, x + p["pos_embed"][:, :, e]], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + p["pos_embed"][:, :, e]

    for i, layer in enumerate(subnetwork.layers):
        name = f"blocks.{i}."
        if layer.query:
            y = norm(x, name + "norm1")
            q, k, v = (
                F.linear(y, pick(name + "attn.qkv.weight", rows, e), pick(name + "attn.qkv.bias", rows))
                .unflatten(-1, (layer.heads, -1))
                .transpose(1, 2)
                for rows in (layer.query, layer.key, layer.value)
            )
            weights = ((q @ k.transpose(-1, -2)) * layer.scale).softmax(-1)
            y = weights @ v
            y = F.linear(
                y.transpose(1, 2).flatten(2),
                pick(name + "attn.proj.weight", e, layer.proj),
                pick(name + "attn.proj.bias", e),
            )
            x = x + (y * p[name + "ls1.gamma"][e] if name + "ls1.gamma" in p else y)
        if maps is not None:
            maps.append(weights if layer.query else None)
        if layer.hidden:
            y = norm(x, name + "norm2")
            y = F.gelu(
                F.linear(y, pick(name + "mlp.fc1.weight", layer.hidden, e), pick(name + "mlp.fc1.bias", layer.hidden))
            )
            y = F.linear(y, pick(name + "mlp.fc2.weight", e, layer.hidden), pick(name + "mlp.fc2.bias", e))
            x = x + (y * p[name + "ls2.gamma"][e] if name + "ls2.gamma" in p else y)

    if config.pool == "token":
        x = norm(x, "norm")[:, 0]
    else:
        x = norm(x[:, config.prefix_tokens :].mean(1), "fc_norm")
    weight, bias = p["head.weight"], p["head.bias"]
    rows = weight.reshape(-1, weight.shape[-1])[subnetwork.classes]
    return F.linear(x, rows[:, e], bias.reshape(-1)[subnetwork.classes])
