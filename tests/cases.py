"""Random slices, shapes and options of every op: sizes are small and no multiples of anything.

A case is a function of its seed alone; its text names what was chosen.
"""

import math
import random

import torch
from blocks import EPS, Block

from hydravit_kernels import (
    AttentionParameters,
    AttentionSlice,
    EmbedSlice,
    HeadParameters,
    HeadSlice,
    MlpParameters,
    MlpSlice,
    StemParameters,
    reference,
    widest,
)
from hydravit_kernels.subnetwork import flatten


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

    def subnet(self, batch, count):
        """Which of ``count`` widths every image has; None, which only one width allows."""
        if count == 1 and not self.coin("subnet of one width", 0.2):
            return None
        return torch.tensor(self.keep("subnet", [self.random.randrange(count) for _ in range(batch)]))

    def images(self, *shape):
        """Any strides that a view may have."""
        kind = self.one_of("images", "contiguous", "channels_last", "part")
        if kind == "part":
            return torch.randn(2 * shape[0], shape[1], shape[2] + 1, shape[3] + 3)[::2, :, : shape[2], : shape[3]]
        return torch.randn(shape).to(memory_format=getattr(torch, f"{kind}_format" if kind == "contiguous" else kind))


def interval(offset, length):
    return range(offset, offset + length)


def of_stream(s):
    return interval(s.embed_offset, s.embed)


def poisoned(shape, reads, around=0.0):
    """Random where a width reads, NaN elsewhere; ``reads``: of every width a list of indices for each axis."""
    read = torch.zeros(shape, dtype=torch.bool)
    for axes in reads:
        read[torch.meshgrid(*(torch.tensor(axis, dtype=torch.int64) for axis in axes), indexing="ij")] = True
    inputs = min((math.prod(map(len, axes[1:])) for axes in reads), default=1)
    scale = 0.3 if len(shape) == 1 else max(1, inputs) ** -0.5
    return torch.where(read, around + scale * torch.randn(shape), float("nan"))


def stream(case, slices, batch, subnet):
    """``x`` with NaN in the channels beyond an image's own."""
    x = torch.randn(batch, case.between("tokens", 1, case.most_tokens), widest(slices))
    for image in range(batch):
        x[image, :, slices[0 if subnet is None else subnet[image]].embed :] = float("nan")
    return x


def embed_slices(case, full):
    lengths = [case.between(f"embed {i}", 16, full) for i in range(case.between("widths", 1, 3))]
    return [EmbedSlice(case.place(length, full), length) for length in lengths]


def beside(x, tensor):
    """On the device of ``x`` and, unless it is an index, in its dtype."""
    return None if tensor is None else tensor.to(x.device, x.dtype if tensor.is_floating_point() else None)


def stem_case(case):
    full, batch = case.between("full", 16, 80), case.between("batch", 1, 4)
    channels, patch = case.between("channels", 1, 4), (case.between("height", 1, 6), case.between("width", 1, 6))
    grid = case.between("down", 1, 5), case.between("across", 1, 5)
    slices = case.keep("slices", embed_slices(case, full))
    subnet, live = case.subnet(batch, len(slices)), [of_stream(s) for s in slices]

    def tokens(count):
        return poisoned((1, count, full), [(range(1), range(count), e) for e in live]) if count else None

    cls, reg = case.between("class tokens", 0, 2), case.between("registers", 0, 3)
    positions = math.prod(grid) + case.one_of("positions on the prefix", 0, cls + reg)
    parameters = [
        poisoned((full, channels, *patch), [(e, range(channels), *map(range, patch)) for e in live]),
        poisoned((full,), [(e,) for e in live]) if case.coin("bias") else None,
        tokens(cls),
        tokens(reg),
        tokens(positions) if case.coin("position embedding", 0.8) else None,
    ]
    images = case.images(batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    return Block(
        "stem",
        images,
        parameters,
        (flatten(slices), subnet),
        lambda x, p: reference.stem(x, StemParameters(*p), slices, beside(x, subnet)),
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
    case.keep("slices", slices)
    subnet, live = case.subnet(batch, len(slices)), [s for s in slices if s.heads]

    def of_heads(s, start, length):
        return [start + head * s.pitch + i for head in range(s.heads) for i in range(length)]

    def of_roles(s):
        roles = (s.query_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim)
        return [row for role in roles for row in of_heads(s, *role)]

    def vector(around=0.0):
        return poisoned((full,), [(of_stream(s),) for s in live], around)

    qkv = poisoned((rows, full), [(of_roles(s), of_stream(s)) for s in live])
    proj = poisoned((full, columns), [(of_stream(s), of_heads(s, s.proj_column, s.value_dim)) for s in live])
    parameters = [
        vector(1.0),
        vector(),
        qkv,
        poisoned((rows,), [(of_roles(s),) for s in live]) if case.coin("qkv_bias") else None,
        proj,
        vector() if case.coin("proj_bias") else None,
        vector() if case.coin("layer_scale") else None,
    ]
    branch_scale = torch.rand(batch) * 2 if case.coin("branch_scale") else None
    x = stream(case, slices, batch, subnet)
    queries = case.between("queries", 1, x.shape[1]) if case.coin("few queries", 0.3) else x.shape[1]
    return Block(
        "attention_block",
        x,
        parameters,
        (branch_scale, flatten(slices), [s.scale for s in slices], EPS, subnet, queries),
        lambda x, p: reference.attention_block(
            x, AttentionParameters(*p), beside(x, branch_scale), slices, EPS, beside(x, subnet), queries
        ),
    )


def mlp_case(case):
    full, batch, hidden = case.between("full", 16, 90), case.between("batch", 1, 4), case.between("all hidden", 16, 200)
    slices = []
    for i, embed in enumerate(embed_slices(case, full)):
        length = 0 if case.coin(f"skipped {i}", 0.1) else case.between(f"hidden {i}", 1, hidden)
        slices.append(MlpSlice(*embed, case.place(length, hidden), length))
    case.keep("slices", slices)
    subnet, live = case.subnet(batch, len(slices)), [s for s in slices if s.hidden]
    rows = [interval(s.hidden_offset, s.hidden) for s in live]

    def vector(around=0.0):
        return poisoned((full,), [(of_stream(s),) for s in live], around)

    parameters = [
        vector(1.0),
        vector(),
        poisoned((hidden, full), [(h, of_stream(s)) for h, s in zip(rows, live, strict=True)]),
        poisoned((hidden,), [(h,) for h in rows]) if case.coin("fc1_bias") else None,
        poisoned((full, hidden), [(of_stream(s), h) for h, s in zip(rows, live, strict=True)]),
        vector() if case.coin("fc2_bias") else None,
        vector() if case.coin("layer_scale") else None,
    ]
    branch_scale = torch.rand(batch) * 2 if case.coin("branch_scale") else None
    return Block(
        "mlp_block",
        stream(case, slices, batch, subnet),
        parameters,
        (branch_scale, flatten(slices), EPS, subnet),
        lambda x, p: reference.mlp_block(x, MlpParameters(*p), beside(x, branch_scale), slices, EPS, beside(x, subnet)),
    )


def head_case(case):
    full, batch = case.between("full", 16, 90), case.between("batch", 1, 6)
    rows = case.between("rows", 1, 70)
    classes = case.between("classes", 1, rows)
    slices = [HeadSlice(*embed, case.place(classes, rows), classes) for embed in embed_slices(case, full)]
    subnet = case.subnet(batch, len(case.keep("slices", slices)))
    live = [(interval(s.class_offset, classes), of_stream(s)) for s in slices]
    norm, classify = case.coin("norm", 0.8), case.coin("classify", 0.8)
    parameters = [
        poisoned((full,), [(e,) for _, e in live], 1.0) if norm else None,
        poisoned((full,), [(e,) for _, e in live]) if norm else None,
        poisoned((rows, full), live) if classify else None,
        poisoned((rows,), [(c,) for c, _ in live]) if classify and case.coin("bias") else None,
    ]
    x = stream(case, slices, batch, subnet)
    start = case.between("pool_start", 0, x.shape[1] - 1)
    pool = start, case.between("pool_stop", start + 1, x.shape[1])
    return Block(
        "head",
        x,
        parameters,
        (*pool, flatten(slices), EPS, subnet),
        lambda x, p: reference.head(x, HeadParameters(*p), *pool, slices, EPS, beside(x, subnet)),
    )


OPS = {"stem": stem_case, "attention_block": attention_case, "mlp_block": mlp_case, "head": head_case}


def check_op(name, case, on=lambda block: block):
    """``Block.check`` of a random call; ``on(block)`` makes it another backend's."""
    torch.manual_seed(case.random.getrandbits(31))
    on(OPS[name](case)).check()
