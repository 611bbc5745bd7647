"""Random slices, shapes and options: every native op against the reference in float64, the network against its blocks.

Sizes are small and no multiples of anything; a case is a function of its seed alone. A failure names the case.
"""

import math
import random

import pytest
import torch
from blocks import EPS, Block, hydravit
from budget import assert_within_budget
from small import poison, shake

from hydravit import HydraViT, HydraViTConfig, inference
from hydravit.geometry import Geometry, Widths
from hydravit_kernels import (
    AttentionSlice,
    EmbedSlice,
    HeadSlice,
    MlpSlice,
    _native,
    network,
    pack,
    reference,
    slices_of_network,
    widest,
)
from hydravit_kernels.packed import PANEL
from hydravit_kernels.slices import flatten

pytestmark = pytest.mark.skipif(not _native.loaded, reason=f"native {_native.why_not}")
CASES = 50  # of one test


@pytest.fixture(scope="module")
def isas():
    """Those that run here."""
    before, possible = hydravit.cpu_isa(), []
    for isa in ("avx512", "avx2", "portable"):
        try:
            hydravit.set_cpu_isa(isa)
        except RuntimeError:
            continue
        possible.append(isa)
    hydravit.set_cpu_isa(before)
    return possible


class Case:
    """The choices of one case, kept in the order in which they were made."""

    def __init__(self, seed):
        self.random, self.chosen = random.Random(seed), {"seed": seed}

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


@pytest.fixture
def each_case(isas, threads):
    """Runs ``check(case)`` for every case of a test; whatever one raises is told together with its choices."""
    before = hydravit.cpu_isa()

    def run(name, batch, check):
        for i in range(CASES):
            case = Case(f"{name} {batch * CASES + i}")
            hydravit.set_cpu_isa(case.one_of("isa", *isas))
            threads(case.one_of("threads", 1, 1, 2, 3))
            try:
                check(case)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise AssertionError(f"{reason}\nin the case {case}") from error

    yield run
    hydravit.set_cpu_isa(before)


# ---- The ops ----


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
    x = torch.randn(batch, case.between("tokens", 1, 40), widest(slices))
    for image in range(batch):
        x[image, :, slices[0 if subnet is None else subnet[image]].embed :] = float("nan")
    return x


def embed_slices(case, full):
    lengths = [case.between(f"embed {i}", 16, full) for i in range(case.between("widths", 1, 3))]
    return [EmbedSlice(case.place(length, full), length) for length in lengths]


def as_dtype(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


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
        "stem", images, parameters, (flatten(slices), subnet), lambda x, p: reference.stem(x, *p, slices, subnet)
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
        lambda x, p: reference.attention_block(x, *p, as_dtype(branch_scale, x.dtype), slices, EPS, subnet, queries),
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
        lambda x, p: reference.mlp_block(x, *p, as_dtype(branch_scale, x.dtype), slices, EPS, subnet),
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
        lambda x, p: reference.head(x, *p, *pool, slices, EPS, subnet),
    )


OPS = {"stem": stem_case, "attention_block": attention_case, "mlp_block": mlp_case, "head": head_case}


class OverBudget(AssertionError):
    """And yet close: where numbers are few, eager's may be exact by chance."""


def compare(actual, eager, exact, name):
    exact = exact.detach()
    size = exact.square().mean().sqrt().item()
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-4 * size + 1e-6, msg=lambda m: f"{name}: {m}")
    try:
        assert_within_budget(actual, eager, exact, name)
    except AssertionError as error:
        raise OverBudget(error) from None


def check_op(name, case, draws=5):
    """The same choices with other numbers, where those were unlucky: a kernel over budget is so with all of them."""
    choices = case.random.getstate()
    for draw in range(draws):
        case.random.setstate(choices)
        torch.manual_seed(case.random.getrandbits(31) + draw)
        try:
            return OPS[name](case).check(compare)
        except OverBudget:
            if draw == draws - 1:
                raise


@pytest.mark.parametrize("batch", range(10))
@pytest.mark.parametrize("name", OPS)
def test_op_is_the_reference(each_case, name, batch):
    """Forward and every gradient, within the error budget; NaN outside the slices; see ``Block.check``."""
    each_case(name, batch, lambda case: check_op(name, case))


# ---- The whole network ----


def random_config(case):
    head_dim, patch = case.one_of("head_dim", 5, 8, 12, 16, 24, 32, 40), case.between("patch", 1, 6)
    heads = case.between("max_heads", 1, 5)
    pool = case.one_of("pool", "token", "avg")
    return HydraViTConfig(
        image_size=(patch * case.between("down", 1, 5), patch * case.between("across", 1, 5)),
        patch_size=patch,
        in_channels=case.between("channels", 1, 4),
        num_classes=case.between("classes", 0, 70),
        depth=case.between("depth", 1, 3),
        max_heads=heads,
        head_dim=head_dim,
        mlp_ratio=case.between("hidden of a head", 1, 80) / head_dim,
        qkv_bias=case.coin("qkv_bias"),
        class_token=pool == "token" or case.coin("class_token"),
        register_tokens=case.between("registers", 0, 3),
        no_embed_class=case.coin("no_embed_class"),
        pool=pool,
        layer_scale=case.one_of("layer_scale", None, 0.3),
        separate_classifiers=tuple(range(1, heads + 1)) if case.coin("separate_classifiers", 0.2) else (),
    )


def random_geometry(case, config):
    """Any that a packed copy serves: rows from a panel on, heads side by side, all else as it comes."""

    def part(size):
        offset = PANEL * case.random.randrange(-(-size // PANEL))
        return offset, case.random.randint(1, size - offset)

    full, attention, mlp = config.embed, [], []
    embed = EmbedSlice(*part(full))
    for _ in range(config.depth):
        heads = case.random.choice([0, 1, 1, 2, 3, 4])
        head_dim = value_dim = pitch = case.random.randint(1, max(1, full // max(heads, 1)))
        if heads == 1:
            value_dim, pitch = case.random.randint(1, full), case.random.randint(0, 9)
        heads = min(heads, full // head_dim)
        lengths = [max(heads, 1) * dim for dim in (head_dim, head_dim, value_dim)]
        rows = [case.place(length, 3 * full, PANEL) for length in lengths]
        column = case.place(lengths[2], full)
        scale = case.random.choice([0.2, head_dim**-0.5])
        attention.append(AttentionSlice(*embed, *rows, column, heads, head_dim, value_dim, pitch, scale))
        mlp.append(MlpSlice(*embed, *((0, 0) if case.random.random() < 0.1 else part(config.hidden))))
    classes, offsets = config.num_classes, range(0, config.num_classes * len(config.separate_classifiers), PANEL)
    if config.separate_classifiers:
        head = HeadSlice(*embed, case.random.choice([i for i in offsets if i % classes == 0] or [0]), classes)
    else:
        head = HeadSlice(*embed, *(part(classes) if classes else (0, 0)))
    return Geometry(1, embed, tuple(attention), tuple(mlp), head, 1e-5).validate(config)


@torch.no_grad()
def check_network(case):
    torch.manual_seed(case.random.getrandbits(32))
    config = case.keep("config", random_config(case))
    batch, count = case.between("batch", 1, 5), case.between("widths", 1, 3)
    geometries = case.keep("geometries", tuple(random_geometry(case, config) for _ in range(count)))
    model = poison(shake(HydraViT(config, backend="native").eval()), geometries)
    images = case.images(batch, config.in_channels, *config.image_size)
    widths = Widths(geometries, case.subnet(batch, count))
    norm = model.norm if config.pool == "token" else model.fc_norm
    expected = model._head(model._trunk(images, widths), norm, widths)
    assert torch.isfinite(expected).all(), "a block read outside the slice"

    slices = slices_of_network(*zip(*((g.embed, g.attention, g.mlp, g.head) for g in geometries), strict=True))
    packed = pack(inference.in_order(model))
    for pooled_only in (True, False):
        arguments = (images, packed, slices, model.pool_range, widths.eps, widths.subnet)
        logits = network(*arguments, pooled_only=pooled_only)
        assert torch.equal(logits, expected), f"other bits, pooled_only={pooled_only}"


@pytest.mark.parametrize("batch", range(12))
def test_packed_network_is_its_blocks(each_case, batch):
    """Bit for bit; NaN in every parameter outside the slices, before packing."""
    each_case("network", batch, check_network)
