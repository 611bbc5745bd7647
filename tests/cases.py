"""Random slices, shapes and options of every op: sizes are small and no multiples of anything.

A case is a function of its seed alone; its text names what was chosen.
"""

import math
import random

import torch
from blocks import (
    attention_block,
    attention_parameters,
    head_block,
    head_parameters,
    mlp_block,
    mlp_parameters,
    stem_block,
    stem_parameters,
)

from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, widest


class Case:
    """The choices of one case, kept in the order in which they were made."""

    def __init__(self, seed, tokens=40):
        self.random, self.chosen, self.most_tokens = random.Random(seed), {"seed": seed}, tokens

    def __str__(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.chosen.items())

    def keep(self, name, value):
        self.chosen[name] = value
        return value

    def between(self, name, first, last):
        return self.keep(name, self.random.randint(first, last))

    def one_of(self, name, *values):
        return self.keep(name, self.random.choice(values))

    def coin(self, name, chance=0.5):
        return self.keep(name, self.random.random() < chance)

    def place(self, length, size, step=1):
        """Where an interval of ``length`` begins inside ``[0, size)``, at a multiple of ``step``."""
        return step * self.random.randint(0, (size - length) // step)

    def width_index(self, batch, count):
        """Which of ``count`` widths every image has; None, which only one width allows."""
        if count == 1 and not self.coin("width_index of one width", 0.2):
            return None
        return torch.tensor(self.keep("width_index", [self.random.randrange(count) for _ in range(batch)]))

    def images(self, *shape):
        """Any strides that a view may have."""
        kind = self.one_of("images", "contiguous", "channels_last", "part")
        if kind == "part":
            return torch.randn(2 * shape[0], shape[1], shape[2] + 1, shape[3] + 3)[::2, :, : shape[2], : shape[3]]
        return torch.randn(shape).to(memory_format=getattr(torch, f"{kind}_format" if kind == "contiguous" else kind))


def residual(case, slices, batch, width_index):
    """``x`` with NaN in the channels beyond an image's own."""
    x = torch.randn(batch, case.between("tokens", 1, case.most_tokens), widest(slices))
    for image in range(batch):
        x[image, :, slices[0 if width_index is None else width_index[image]].embed :] = float("nan")
    return x


def embed_slices(case, full):
    lengths = [case.between(f"embed {i}", 16, full) for i in range(case.between("widths", 1, 3))]
    return [EmbedSlice(case.place(length, full), length) for length in lengths]


def stem_case(case):
    full, batch = case.between("full", 16, 80), case.between("batch", 1, 4)
    channels, patch = case.between("channels", 1, 4), (case.between("height", 1, 6), case.between("width", 1, 6))
    grid = case.between("down", 1, 5), case.between("across", 1, 5)
    slices = case.keep("slices", embed_slices(case, full))
    width_index = case.width_index(batch, len(slices))
    cls, reg = case.between("class tokens", 0, 2), case.between("registers", 0, 3)
    positions = math.prod(grid) + case.one_of("positions on the prefix", 0, cls + reg)
    bias, embedded = case.coin("bias"), case.coin("position embedding", 0.8)
    sizes = {"bias": bias, "cls": cls, "reg": reg, "positions": positions if embedded else 0}
    parameters = stem_parameters(slices, full, channels, patch, **sizes)
    return stem_block(
        case.images(batch, channels, grid[0] * patch[0], grid[1] * patch[1]), parameters, slices, width_index
    )


def attention_case(case):
    full, batch = case.between("full", 24, 90), case.between("batch", 1, 4)
    rows, columns = case.between("rows", 40, 200), case.between("columns", 40, 100)
    slices = []
    for i, embed in enumerate(embed_slices(case, full)):
        heads = 0 if case.coin(f"skipped {i}", 0.1) else case.between(f"heads {i}", 1, 4)
        room = min(rows, columns) // max(heads, 1)
        head_dim, value_dim = (case.between(f"{name} {i}", 1, min(room, 24)) for name in ("head_dim", "value_dim"))
        pitch = case.between(f"pitch {i}", max(head_dim, value_dim), room)
        if case.coin(f"heads touch {i}"):
            pitch = value_dim = head_dim
        reach = [max(heads - 1, 0) * pitch + dim for dim in (head_dim, head_dim, value_dim, value_dim)]
        sizes = (rows, rows, rows, columns)
        starts = [case.place(length, size) for length, size in zip(reach, sizes, strict=True)]
        scale = case.one_of(f"scale {i}", head_dim**-0.5, 0.1, 1.0)
        slices.append(AttentionSlice(*embed, *starts, heads, head_dim, value_dim, pitch, scale))
    width_index = case.width_index(batch, len(case.keep("slices", slices)))
    optional = {name: case.coin(name) for name in ("qkv_bias", "proj_bias", "layer_scale")}
    parameters = attention_parameters(slices, full, rows, columns, **optional)
    branch_scale = torch.rand(batch) * 2 if case.coin("branch_scale") else None
    x = residual(case, slices, batch, width_index)
    queries = case.between("queries", 1, x.shape[1]) if case.coin("few queries", 0.3) else None
    return attention_block(x, parameters, branch_scale, slices, width_index, queries)


def mlp_case(case):
    full, batch, hidden = case.between("full", 16, 90), case.between("batch", 1, 4), case.between("all hidden", 16, 200)
    slices = []
    for i, embed in enumerate(embed_slices(case, full)):
        length = 0 if case.coin(f"skipped {i}", 0.1) else case.between(f"hidden {i}", 1, hidden)
        slices.append(MlpSlice(*embed, case.place(length, hidden), length))
    width_index = case.width_index(batch, len(case.keep("slices", slices)))
    optional = {name: case.coin(name) for name in ("fc1_bias", "fc2_bias", "layer_scale")}
    parameters = mlp_parameters(slices, full, hidden, **optional)
    branch_scale = torch.rand(batch) * 2 if case.coin("branch_scale") else None
    return mlp_block(residual(case, slices, batch, width_index), parameters, branch_scale, slices, width_index)


def head_case(case):
    full, batch = case.between("full", 16, 90), case.between("batch", 1, 6)
    rows = case.between("rows", 1, 70)
    classes = case.between("classes", 1, rows)
    slices = [HeadSlice(*embed, case.place(classes, rows), classes) for embed in embed_slices(case, full)]
    width_index = case.width_index(batch, len(case.keep("slices", slices)))
    optional = {"norm": case.coin("norm", 0.8), "classify": case.coin("classify", 0.8), "bias": case.coin("bias")}
    parameters = head_parameters(slices, full, rows, **optional)
    x = residual(case, slices, batch, width_index)
    start = case.between("pool_start", 0, x.shape[1] - 1)
    pool = start, case.between("pool_stop", start + 1, x.shape[1])
    return head_block(x, parameters, pool, slices, width_index)


OPS = {"stem": stem_case, "attention_block": attention_case, "mlp_block": mlp_case, "head": head_case}


def check_op(name, case, on=lambda block: block):
    """``Block.check`` of a random call; ``on(block)`` makes it another backend's."""
    torch.manual_seed(case.random.getrandbits(31))
    on(OPS[name](case)).check()
