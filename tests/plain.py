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


def scala(config, share, narrowest, *, paper=False, per_role=False):
    """Scala, section 3.2: ``share`` of every axis from its end, as the code has it; of both extremes, from its start.

    In the paper it is from the start, and of the narrowest from the end. The rows of qkv are one axis, unless
    ``per_role`` makes them three.
    """
    last = share == narrowest if paper else narrowest < share < 1

    def part(axis):
        count = int(share * len(axis))
        return axis[len(axis) - count :] if last else axis[:count]

    channels, rows = list(range(config.embed)), list(range(3 * config.embed))
    embed = part(channels)
    if per_role:
        query, key, value = ([role * config.embed + i for i in embed] for role in range(3))
    else:
        rows, count = part(rows), len(embed)
        query, key, value = rows[:count], rows[count : 2 * count], rows[2 * count :]
    hidden = part(list(range(config.hidden)))
    layer = Layer(query, key, value, embed, config.max_heads, config.head_dim**-0.5, hidden)
    return Subnetwork(embed, [layer] * config.depth, 1e-5, list(range(config.num_classes)))


def skd(config, lengths):
    """SKD: the first channels of every head and the first hidden ones, ``(r, m)`` per layer; the residual is whole."""
    full = config.embed

    def inside(role, r):
        return [role * full + head * config.head_dim + j for head in range(config.max_heads) for j in range(r)]

    layers = [
        Layer(*(inside(role, r) for role in (0, 1, 2, 0)), config.max_heads, config.head_dim**-0.5, list(range(m)))
        for r, m in lengths
    ]
    return Subnetwork(list(range(full)), layers, config.norm_eps, list(range(config.num_classes)))


def forward(parameters, config, subnetwork, images, maps=None):
    """Logits of ``images (B, C, height, width)`` from full ``parameters`` (a state dict, any dtype).

    Those of a distilled model are a pair: the class token's and the distillation token's.

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
    prefix = [p[t][:, :, e].expand(b, -1, -1) for t in ("cls_token", "dist_token", "reg_token") if t in p]
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

    def classify(x, name):
        weight, bias = p[name + ".weight"], p[name + ".bias"]
        rows = weight.reshape(-1, weight.shape[-1])[subnetwork.classes]
        return F.linear(x, rows[:, e], bias.reshape(-1)[subnetwork.classes])

    if config.pool != "token":
        return classify(norm(x[:, config.prefix_tokens :].mean(1), "fc_norm"), "head")
    x = norm(x, "norm")
    logits = classify(x[:, 0], "head")
    return (logits, classify(x[:, 1], "head_dist")) if "dist_token" in p else logits
