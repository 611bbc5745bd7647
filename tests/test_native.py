"""The native CPU ops against plain PyTorch in float64, forward and backward, on every instruction set that runs here.

Every parameter holds NaN outside the slice, so a finite result proves that nothing else was read.
"""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, _native, ops  # noqa: F401  (defines the ops)
from hydravit_kernels.slices import flatten

pytestmark = pytest.mark.skipif(not _native.loaded, reason=f"native {_native.why_not}")
hydravit = torch.ops.hydravit
EPS = 1e-6


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    before = hydravit.cpu_isa()
    try:
        hydravit.set_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    hydravit.set_cpu_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- Parameters with NaN outside the slice, and the oracle: plain PyTorch on views ----


def interval(offset, length):
    return torch.arange(offset, offset + length)


def head_rows(start, length, s):
    return torch.cat([interval(start + h * s.pitch, length) for h in range(s.heads)] or [interval(0, 0)])


def poisoned(shape, *live, scale=None):
    """Random where every axis is in its list (None: all of it), NaN elsewhere; a product keeps the variance."""
    parameter = torch.full(shape, float("nan"))
    lists = [torch.arange(n) if keep is None else keep for n, keep in zip(shape, live, strict=True)]
    if scale is None:
        scale = 0.3 if len(shape) == 1 else max(1, math.prod(len(keep) for keep in lists[1:])) ** -0.5
    values = torch.randn([len(keep) for keep in lists]) * scale
    parameter[torch.meshgrid(*lists, indexing="ij")] = values
    return parameter


def add_branch(x, branch, layer_scale, branch_scale, e):
    if layer_scale is not None:
        branch = branch * layer_scale[e]
    return x + (branch if branch_scale is None else branch * branch_scale[:, None, None])


def optional(parameter, index):
    return None if parameter is None else parameter[index]


def plain_attention(x, p, branch_scale, s):
    if s.heads == 0:
        return x.clone()
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale = p
    e = slice(s.embed_offset, s.embed_offset + s.embed)
    y = F.layer_norm(x, (s.embed,), norm_weight[e], norm_bias[e], EPS)
    roles = ((s.query_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim))
    rows = [head_rows(start, length, s) for start, length in roles]
    q, k, v = (F.linear(y, qkv_weight[r][:, e], optional(qkv_bias, r)).unflatten(-1, (s.heads, -1)) for r in rows)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = ((q @ k.mT * s.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
    columns = head_rows(s.proj_column, s.value_dim, s)
    return add_branch(x, F.linear(y, proj_weight[e][:, columns], optional(proj_bias, e)), layer_scale, branch_scale, e)


def plain_mlp(x, p, branch_scale, s):
    if s.hidden == 0:
        return x.clone()
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale = p
    e = slice(s.embed_offset, s.embed_offset + s.embed)
    h = slice(s.hidden_offset, s.hidden_offset + s.hidden)
    y = F.layer_norm(x, (s.embed,), norm_weight[e], norm_bias[e], EPS)
    y = F.linear(F.gelu(F.linear(y, fc1_weight[h, e], optional(fc1_bias, h))), fc2_weight[e, h], optional(fc2_bias, e))
    return add_branch(x, y, layer_scale, branch_scale, e)


def plain_stem(images, p, s):
    weight, bias, cls_token, reg_token, pos_embed = p
    e = slice(s.embed_offset, s.embed_offset + s.embed)
    patches = F.conv2d(images, weight[e], optional(bias, e), stride=weight.shape[2:]).flatten(2).mT
    prefix = [t[:, :, e].expand(len(images), -1, -1) for t in (cls_token, reg_token) if t is not None]
    if pos_embed is not None and pos_embed.shape[1] == patches.shape[1]:
        return torch.cat([*prefix, patches + pos_embed[:, :, e]], 1)
    tokens = torch.cat([*prefix, patches], 1)
    return tokens if pos_embed is None else tokens + pos_embed[:, :, e]


def plain_head(x, p, pool, s):
    norm_weight, norm_bias, weight, bias = p
    e, rows = slice(s.embed_offset, s.embed_offset + s.embed), slice(s.class_offset, s.class_offset + s.classes)
    y = x[:, pool[0] : pool[1]].mean(1)
    if norm_weight is not None:
        y = F.layer_norm(y, (s.embed,), norm_weight[e], norm_bias[e], EPS)
    return y if weight is None else F.linear(y, weight[rows, e], optional(bias, rows))


# ---- One op call, and its comparison with the oracle ----


class Block:
    """Everything to call one op: its input, parameters and constants, and the plain function of (input, parameters)."""

    def __init__(self, name, x, parameters, constants, plain):
        self.name, self.x, self.parameters, self.constants, self.plain = name, x, parameters, constants, plain
        self.saves = name in ("attention_block", "mlp_block")

    def forward(self, save=False):
        op = getattr(hydravit, f"{self.name}_native")
        result = op(self.x, *self.parameters, *self.constants, *((save,) if self.saves else ()))
        return result if self.saves else (result,)

    def backward(self, grad, buffers, x_grad=True):
        _, *saved = self.forward(save=True)
        op = getattr(hydravit, f"{self.name}_backward_native")
        return op(grad, self.x, *saved, *self.parameters, *self.constants, x_grad, *buffers)

    def zeros(self):
        return [None if p is None else torch.zeros_like(p) for p in self.parameters]

    def oracle(self, grad, dtype):
        x, *parameters = (None if t is None else t.to(dtype).requires_grad_() for t in (self.x, *self.parameters))
        y = self.plain(x, parameters)
        inputs = [t for t in (x, *parameters) if t is not None]
        gradients = torch.autograd.grad(y, inputs, grad.to(dtype), allow_unused=True)
        return y, [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True)]

    def check(self):
        y = self.forward()[0]
        assert torch.equal(y, self.forward(save=True)[0])
        grad = torch.randn(y.shape)
        buffers = self.zeros()
        gradients = [self.backward(grad, buffers), *(b for b in buffers if b is not None)]
        exact, exact_gradients = self.oracle(grad, torch.float64)
        eager, eager_gradients = self.oracle(grad, torch.float32)
        assert_within_budget(y, eager, exact, f"{self.name} output")
        for i, triple in enumerate(zip(gradients, eager_gradients, exact_gradients, strict=True)):
            assert_within_budget(*triple, f"{self.name} gradient {i}")
        for parameter, buffer in zip(self.parameters, buffers, strict=True):
            assert parameter is None or not buffer[parameter.isnan()].any(), "gradient outside the slice"


def attention(s, batch, tokens, full=192, rows=576, plenty=True, x=None):
    e = interval(s.embed_offset, s.embed)
    roles = ((s.query_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim))
    qkv_rows = torch.cat([head_rows(start, length, s) for start, length in roles])
    proj_columns = head_rows(s.proj_column, s.value_dim, s)
    e_or_none = e if s.heads else interval(0, 0)
    parameters = [
        poisoned((full,), e_or_none, scale=1),
        poisoned((full,), e_or_none),
        poisoned((rows, full), qkv_rows, e),
        poisoned((rows,), qkv_rows) if plenty else None,
        poisoned((full, full), e, proj_columns),
        poisoned((full,), e_or_none) if plenty else None,
        poisoned((full,), e_or_none) if plenty else None,
    ]
    branch_scale = torch.rand(batch) * 2 if plenty else None
    x = torch.randn(batch, tokens, s.embed) if x is None else x
    constants = (branch_scale, flatten([s]), [s.scale], EPS, None)
    plain = lambda x, p: plain_attention(x, p, None if branch_scale is None else branch_scale.to(x.dtype), s)  # noqa: E731
    return Block("attention_block", x, parameters, constants, plain)


def mlp(s, batch, tokens, full=192, hidden=400, plenty=True):
    e = interval(s.embed_offset, s.embed) if s.hidden else interval(0, 0)
    h = interval(s.hidden_offset, s.hidden)
    parameters = [
        poisoned((full,), e, scale=1),
        poisoned((full,), e),
        poisoned((hidden, full), h, e),
        poisoned((hidden,), h) if plenty else None,
        poisoned((full, hidden), e, h),
        poisoned((full,), e) if plenty else None,
        poisoned((full,), e) if plenty else None,
    ]
    branch_scale = torch.rand(batch) * 2 if plenty else None
    constants = (branch_scale, flatten([s]), EPS, None)
    plain = lambda x, p: plain_mlp(x, p, None if branch_scale is None else branch_scale.to(x.dtype), s)  # noqa: E731
    return Block("mlp_block", torch.randn(batch, tokens, s.embed), parameters, constants, plain)


def stem(s, images, patch=(8, 8), full=80, cls=1, reg=0, positions="all"):
    e = interval(s.embed_offset, s.embed)
    patches = images.shape[2] // patch[0] * (images.shape[3] // patch[1])
    count = patches + cls + reg if positions == "all" else patches
    parameters = [
        poisoned((full, images.shape[1], *patch), e, None, None, None),
        poisoned((full,), e) if cls else None,
        poisoned((1, cls, full), None, None, e) if cls else None,
        poisoned((1, reg, full), None, None, e) if reg else None,
        poisoned((1, count, full), None, None, e) if positions else None,
    ]
    return Block("stem", images, parameters, (flatten([s]), None), lambda x, p: plain_stem(x, p, s))


def head(s, batch, tokens, pool, full=192, rows=30, norm=True, classify=True, bias=True):
    e, c = interval(s.embed_offset, s.embed), interval(s.class_offset, s.classes)
    parameters = [
        poisoned((full,), e, scale=1) if norm else None,
        poisoned((full,), e) if norm else None,
        poisoned((rows, full), c, e) if classify else None,
        poisoned((rows,), c) if classify and bias else None,
    ]
    constants = (*pool, flatten([s]), EPS, None)
    return Block(
        "head", torch.randn(batch, tokens, s.embed), parameters, constants, lambda x, p: plain_head(x, p, pool, s)
    )


ATTENTION_SLICES = {
    "prefix": AttentionSlice(0, 128, 0, 192, 384, 0, 2, 64, 64, 64, 0.125),
    "fused suffix": AttentionSlice(112, 80, 336, 416, 496, 112, 4, 20, 20, 20, 0.125),
    "prefix of every head": AttentionSlice(0, 192, 0, 192, 384, 0, 3, 24, 40, 64, 0.2),
    "odd": AttentionSlice(3, 33, 7, 100, 205, 11, 3, 5, 7, 9, 0.7),
    "one head": AttentionSlice(16, 16, 16, 208, 400, 16, 1, 16, 48, 48, 0.25),
    "skipped": AttentionSlice(8, 64, 0, 0, 0, 0, 0, 0, 0, 0, 1.0),
}
MLP_SLICES = {
    "prefix": MlpSlice(0, 128, 0, 256),
    "offset": MlpSlice(5, 33, 17, 77),
    "whole": MlpSlice(0, 192, 0, 400),
    "narrow": MlpSlice(180, 12, 379, 21),
    "skipped": MlpSlice(8, 64, 0, 0),
}
SIZES = [(3, 1), (1, 17), (3, 50), (1, 197)]


@pytest.mark.parametrize("batch, tokens", SIZES)
@pytest.mark.parametrize("name", ATTENTION_SLICES)
def test_attention_block(isa, name, batch, tokens):
    attention(ATTENTION_SLICES[name], batch, tokens, plenty=batch == 3).check()


@pytest.mark.parametrize("batch, tokens", SIZES)
@pytest.mark.parametrize("name", MLP_SLICES)
def test_mlp_block(isa, name, batch, tokens):
    mlp(MLP_SLICES[name], batch, tokens, plenty=batch == 3).check()


@pytest.mark.parametrize("cls, reg, positions", [(1, 0, "all"), (1, 3, "all"), (1, 2, "patches"), (0, 0, None)])
def test_stem(isa, cls, reg, positions):
    stem(EmbedSlice(0, 64), torch.randn(3, 3, 16, 24), cls=cls, reg=reg, positions=positions).check()
    stem(EmbedSlice(13, 21), torch.randn(1, 2, 15, 14), (5, 7), cls=cls, reg=reg, positions=positions).check()


def test_stem_reads_images_of_any_strides(isa):
    image = torch.randn(3, 3, 16, 24)
    block = stem(EmbedSlice(0, 64), image)
    grad = torch.randn(block.forward()[0].shape)
    expected = block.forward()[0], block.backward(grad, block.zeros())
    padded = torch.full((3, 3, 32, 48), float("nan"))
    padded[:, :, ::2, ::2] = image
    for view in (image.to(memory_format=torch.channels_last), padded[:, :, ::2, ::2]):
        block.x = view
        assert torch.equal(block.forward()[0], expected[0])
        dx = block.backward(grad, block.zeros())
        assert dx.is_contiguous() and torch.equal(dx, expected[1])


@pytest.mark.parametrize("channels, patch", [(1, (8, 8)), (1, (5, 7)), (3, (1, 1)), (1, (1, 4))])
def test_stem_ignores_strides_of_axes_of_one_element(isa, channels, patch):
    """A channels_last weight whose output channels are contiguous all the same."""
    block = stem(EmbedSlice(0, 64), torch.randn(2, channels, 2 * patch[0], 3 * patch[1]), patch)
    grad = torch.randn(block.forward()[0].shape)
    expected, buffers, again = block.forward()[0], block.zeros(), block.zeros()
    dx = block.backward(grad, buffers)
    for tensors in (block.parameters, again):
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        assert tensors[0].stride(1) == 1
    assert torch.equal(block.forward()[0], expected) and torch.equal(block.backward(grad, again), dx)
    assert all(a is None or torch.equal(a, b) for a, b in zip(again, buffers, strict=True))


@pytest.mark.parametrize("batch, tokens, pool", [(3, 1, (0, 1)), (1, 17, (0, 1)), (3, 50, (2, 50)), (5, 197, (1, 197))])
@pytest.mark.parametrize("norm, classify, bias", [(True, True, True), (False, True, False), (True, False, False)])
def test_head(isa, batch, tokens, pool, norm, classify, bias):
    for s in (HeadSlice(0, 128, 0, 30), HeadSlice(7, 33, 4, 11)):
        head(s, batch, tokens, pool, norm=norm, classify=classify, bias=bias).check()


def test_large_values(isa):
    """Scores and GELU arguments far from zero: peaked softmax, both tails of the error function."""
    attention(ATTENTION_SLICES["prefix"]._replace(scale=0.5), 1, 50).check()
    block = mlp(MLP_SLICES["prefix"], 1, 50)
    block.parameters[2] *= 5
    block.check()


def test_score_overflow_is_not_nan(isa):
    block = attention(ATTENTION_SLICES["prefix"]._replace(scale=1e6), 1, 50)
    assert block.forward()[0].isfinite().all()


def test_single_channels(isa):
    """Lengths of one; too few numbers for the budget, whose eager error may be zero by chance."""
    s = AttentionSlice(7, 1, 3, 4, 5, 6, 1, 1, 1, 1, 1.0)
    for block in (
        attention(s, 3, 17),
        mlp(MlpSlice(191, 1, 399, 1), 3, 17),
        head(HeadSlice(3, 1, 5, 1), 3, 17, (0, 17)),
    ):
        buffers = block.zeros()
        y = block.forward()[0]
        dx = block.backward(torch.ones_like(y), buffers)
        exact, gradients = block.oracle(torch.ones_like(y), torch.float64)
        for actual, expected in zip((y, dx, *(b for b in buffers if b is not None)), (exact, *gradients), strict=True):
            torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_nan_input_stays_visible(isa):
    for block in (attention(ATTENTION_SLICES["prefix"], 2, 17), mlp(MLP_SLICES["prefix"], 2, 17)):
        block.x[1, 3, 5] = float("nan")
        y = block.forward()[0]
        assert y[0].isfinite().all() and y[1, 3].isnan().all()


BLOCKS = {
    "attention": lambda batch=2: attention(ATTENTION_SLICES["prefix"], batch, 197),
    "segmented attention": lambda batch=2: attention(ATTENTION_SLICES["prefix of every head"], batch, 50),
    "mlp": lambda batch=2: mlp(MLP_SLICES["whole"], batch, 197),
    "stem": lambda batch=2: stem(EmbedSlice(0, 64), torch.randn(batch, 3, 64, 64)),
    "head": lambda batch=2: head(HeadSlice(0, 128, 0, 30), batch, 50, (0, 50)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_same_bits_at_any_batch_position_and_thread_count(isa, threads, name):
    batch = 7  # more than one chunk of 1024 rows
    block = BLOCKS[name](batch)
    threads(1)
    y = block.forward()[0]
    grad = torch.randn(y.shape)
    buffers = block.zeros()
    dx = block.backward(grad, buffers)
    for count in (2, 3):
        threads(count)
        again = block.zeros()
        assert torch.equal(block.forward()[0], y) and torch.equal(block.backward(grad, again), dx)
        for a, b in zip(again, buffers, strict=True):
            assert a is None or torch.equal(a, b), "parameter gradient depends on the thread count"
    whole, constants = block.x, block.constants
    for first, last in ((0, 1), (batch - 1, batch), (2, 5)):
        block.x = whole[first:last]
        if block.saves and constants[0] is not None:
            block.constants = (constants[0][first:last], *constants[1:])
        assert torch.equal(block.forward()[0], y[first:last])
        assert torch.equal(block.backward(grad[first:last], block.zeros()), dx[first:last])


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_added_inside_the_slice_only(isa, name):
    block = BLOCKS[name]()
    grad = torch.randn(block.forward()[0].shape)
    alone, added = block.zeros(), [None if p is None else torch.ones_like(p) for p in block.parameters]
    dx = block.backward(grad, alone)
    block.backward(grad, added)
    for parameter, a, b in zip(block.parameters, alone, added, strict=True):
        if parameter is not None:
            assert torch.equal(b[parameter.isnan()], torch.ones_like(b[parameter.isnan()]))
            torch.testing.assert_close(b, a + 1, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    # Each gradient by itself is the same as all together; what is not wanted is not touched.
    for i, expected in enumerate(alone):
        if expected is not None:
            buffers = [b if j == i else None for j, b in enumerate(block.zeros())]
            assert block.backward(grad, buffers, x_grad=False).numel() == 0
            assert torch.equal(buffers[i], expected)
    assert torch.equal(block.backward(grad, [None] * len(alone)), dx)


@pytest.mark.parametrize("name", BLOCKS)
def test_row_strided_parameters(isa, name):
    block = BLOCKS[name]()
    grad = torch.randn(block.forward()[0].shape)
    y, buffers = block.forward()[0], block.zeros()
    dx = block.backward(grad, buffers)

    def strided(t):  # the same values, rows further apart, NaN between
        if t is None or t.dim() < 2:
            return t
        shape = [t.shape[0] * 2, *t.shape[1:]] if t.dim() == 4 else [*t.shape[:-1], t.shape[-1] + 3]
        room = torch.full(shape, float("nan"))
        view = room[::2] if t.dim() == 4 else room[..., : t.shape[-1]]
        return view.copy_(t)

    block.parameters = [strided(p) for p in block.parameters]
    again = [None if b is None else strided(torch.zeros_like(b)) for b in buffers]
    assert torch.equal(block.forward()[0], y) and torch.equal(block.backward(grad, again), dx)
    for a, b in zip(again, buffers, strict=True):
        assert a is None or torch.equal(a, b)


def test_activations_of_any_row_stride(isa):
    block = attention(ATTENTION_SLICES["prefix"], 3, 17)
    y = block.forward()[0]
    grad = torch.randn(y.shape)
    dx = block.backward(grad, block.zeros())
    block.x = (
        torch.cat([block.x, torch.full_like(block.x, float("nan"))], 2).transpose(0, 1).contiguous().transpose(0, 1)
    )
    block.x = block.x[:, :, : y.shape[2]]
    assert torch.equal(block.forward()[0], y)
    assert torch.equal(block.backward(torch.cat([grad, grad], 2)[:, :, : y.shape[2]], block.zeros()), dx)


# ---- One batch, many widths ----

WIDTHS = {
    "attention": (
        [AttentionSlice(0, k * 16, 0, 64, 128, 0, k, 16, 16, 16, 0.25) for k in (1, 4)],
        lambda s, batch: attention(s, batch, 17, full=64, rows=192),
    ),
    "mlp": ([MlpSlice(0, k * 16, 0, k * 64) for k in (1, 4)], lambda s, batch: mlp(s, batch, 17, full=64, hidden=256)),
    "stem": ([EmbedSlice(0, k * 16) for k in (1, 4)], lambda s, batch: stem(s, torch.randn(batch, 3, 16, 16), full=64)),
    "head": (
        [HeadSlice(0, k * 16, 0, 5 + k) for k in (1, 4)],
        lambda s, batch: head(s, batch, 17, (0, 17), full=64, rows=9),
    ),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_every_image_at_its_own_width(isa, name):
    slices, make = WIDTHS[name]
    subnet = torch.tensor([1, 0, 0, 1, 1, 0])
    block = make(slices[1], len(subnet))
    own = [s.classes if name == "head" else s.embed for s in slices]

    def constants(chosen, images, subnet):
        scale = () if not block.saves else (block.constants[0][images],)
        scales = ([s.scale for s in chosen],) if name == "attention" else ()
        pool = (0, 17) if name == "head" else ()
        return (*scale, *pool, flatten(chosen), *scales, *(() if name == "stem" else (EPS,)), subnet)

    whole = block.x
    mixed = Block(block.name, whole.clone(), block.parameters, constants(slices, slice(None), subnet), None)
    if name != "stem":
        for image, index in enumerate(subnet):
            mixed.x[image, :, slices[index].embed :] = float("nan")
    y = mixed.forward()[0]
    grad = torch.randn(y.shape)
    buffers, expected = block.zeros(), block.zeros()
    dx = mixed.backward(grad, buffers)
    for image, index in enumerate(subnet.tolist()):
        x = whole[image : image + 1] if name == "stem" else whole[image : image + 1, :, : slices[index].embed]
        single = Block(block.name, x, block.parameters, constants([slices[index]], slice(image, image + 1), None), None)
        assert torch.equal(y[image, ..., : own[index]], single.forward()[0][0])
        assert not y[image, ..., own[index] :].any()
        part = single.backward(grad[image : image + 1, ..., : own[index]], expected)[0]
        assert torch.equal(dx[image][..., : part.shape[-1]], part) and not dx[image][..., part.shape[-1] :].any()
    for a, b in zip(buffers, expected, strict=True):
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKS)
def test_no_images(name):
    block = BLOCKS[name]()
    block.x = block.x[:0]
    if block.saves:
        block.constants = (block.constants[0][:0], *block.constants[1:])
    y = block.forward()[0]
    buffers = block.zeros()
    assert len(y) == 0 and block.backward(y, buffers).shape == block.x.shape
    assert all(b is None or not b.any() for b in buffers)


# ---- Wrong arguments ----


def transposed(t):
    return t.t().contiguous().t()


def replaced(index, value):
    def change(block):
        block.parameters[index] = value(block.parameters[index]) if callable(value) else value

    return change


def with_slice(**fields):
    def change(block):
        s = ATTENTION_SLICES["prefix"]._replace(**fields)
        block.constants = (block.constants[0], flatten([s]), [s.scale], EPS, None)

    return change


def with_constant(index, value):
    def change(block):
        block.constants = (*block.constants[:index], value, *block.constants[index + 1 :])

    return change


def with_x(value):
    def change(block):
        block.x = value(block.x)

    return change


WRONG = {
    "x of another width": (with_x(lambda x: x[:, :, :127]), "x: shape"),
    "x of another dtype": (with_x(torch.Tensor.double), "^x: dtype float32 expected, float64 given$"),
    "x of two dimensions": (with_x(lambda x: x[0]), "x: shape"),
    "x with channels apart": (with_x(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "x: innermost stride"),
    "x without tokens": (with_x(lambda x: x[:, :0]), "x: at least one token"),
    "bf16 weight": (replaced(2, torch.Tensor.bfloat16), "^qkv_weight: dtype float32 expected, bfloat16 given$"),
    "column-major weight": (replaced(2, transposed), "qkv_weight: innermost stride"),
    "column-major projection": (replaced(4, transposed), "proj_weight: innermost stride"),
    "weight of another width": (replaced(2, lambda t: t[:, :150]), "qkv_weight: shape"),
    "short bias": (replaced(3, lambda t: t[:100]), "qkv_bias: shape"),
    "strided bias": (replaced(5, lambda t: torch.zeros(384)[::2]), "proj_bias: innermost stride"),
    "norm of two dimensions": (replaced(0, lambda t: t[None]), "norm_weight: shape"),
    "short layer scale": (replaced(6, lambda t: t[:128]), "layer_scale: shape"),
    "embed outside": (with_slice(embed_offset=65), "elements"),
    "rows outside": (with_slice(value_row=449), "qkv_weight: rows"),
    "columns outside": (with_slice(proj_column=65), "proj_weight: columns"),
    "heads outside": (with_slice(heads=20), "qkv_weight: rows"),
    "overlapping heads": (with_slice(pitch=63), "slices: a pitch"),
    "no head dim": (with_slice(head_dim=0), "slices: head_dim"),
    "negative offset": (with_slice(query_row=-1), "slices: integers"),
    "huge offset": (with_slice(query_row=2**62), "slices: integers"),
    "no embed": (lambda b: (with_slice(embed=0)(b), with_x(lambda x: x[:, :, :0])(b)), "embed"),
    "too few integers": (with_constant(1, [0, 128]), "slices: a positive multiple of 10"),
    "no slice": (with_constant(1, []), "slices: a positive multiple of 10"),
    "no attention scale": (with_constant(2, []), "scales: one for each"),
    "short branch scale": (with_constant(0, torch.ones(2)), "branch_scale: shape"),
    "subnet out of range": (with_constant(4, torch.tensor([0, 1, 0])), "subnet: values in"),
    "subnet of another length": (with_constant(4, torch.tensor([0])), "subnet: shape"),
    "subnet of another dtype": (
        with_constant(4, torch.tensor([0, 0, 0], dtype=torch.int32)),
        "^subnet: dtype int64 expected, int32 given$",
    ),
    "strided subnet": (with_constant(4, torch.zeros(6, dtype=torch.int64)[::2]), "subnet: a contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name):
    change, message = WRONG[name]
    block = attention(ATTENTION_SLICES["prefix"], 3, 17)
    block.forward()
    change(block)
    with pytest.raises(RuntimeError, match=message):
        block.forward()


@pytest.mark.parametrize("name", ["attention", "mlp", "stem", "head"])
def test_slices_are_counted_before_they_are_read(name):
    """Read first, one integer too many is a slice that ends behind the list."""
    block = BLOCKS[name]()
    flat = next(i for i, constant in enumerate(block.constants) if isinstance(constant, list))
    count = len(block.constants[flat])
    if name != "stem":
        with_x(lambda x: x[:, :, :-1])(block)
    with_constant(flat, [*block.constants[flat], 0])(block)
    with pytest.raises(RuntimeError, match=f"^slices: a positive multiple of {count} integers expected, {count + 1} g"):
        block.forward()


def test_errors_start_with_the_argument():
    """Not with the function, file and line of the check."""
    calls = [
        lambda: hydravit.set_cpu_isa("sse"),
        lambda: mlp(MLP_SLICES["prefix"], 1, 1).backward(torch.zeros(1, 1, 1), [None] * 7),
    ]
    for call, match in zip(calls, ("^isa: ", "^grad: shape"), strict=True):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_several_slices_need_a_subnet():
    block = attention(ATTENTION_SLICES["prefix"], 3, 17)
    s = ATTENTION_SLICES["prefix"]
    block.constants = (block.constants[0], flatten([s, s]), [s.scale, s.scale], EPS, None)
    with pytest.raises(RuntimeError, match="subnet: an int64 tensor"):
        block.forward()


def test_wrong_gradients_raise():
    block = attention(ATTENTION_SLICES["prefix"], 3, 17)
    grad = torch.randn_like(block.x)
    _, *saved = block.forward(save=True)

    def call(grad=grad, saved=saved, **buffers):
        sums = [buffers.get(str(i)) for i in range(7)]
        hydravit.attention_block_backward_native(
            grad, block.x, *saved, *block.parameters, *block.constants, True, *sums
        )

    for match, change in {
        "grad: shape": {"grad": grad[:, :5]},
        "grad: innermost stride": {"grad": grad[:, :1, :1].expand_as(grad)},
        "qkv: shape": {"saved": [saved[0][:, :, :-1], *saved[1:]]},
        "attended: shape": {"saved": [saved[0], saved[1][:2], saved[2]]},
        "logsumexp: shape": {"saved": [*saved[:2], saved[2].T]},
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call(**change)
    with pytest.raises(RuntimeError, match="grad_qkv_weight: shape"):
        call(**{"2": torch.zeros(384, 128)})
    with pytest.raises(RuntimeError, match="grad_qkv_weight: innermost stride"):
        call(**{"2": torch.zeros(192, 576).t()})
    block.parameters[3] = None
    with pytest.raises(RuntimeError, match="grad_qkv_bias: None expected"):
        call(**{"3": torch.zeros(576)})


@pytest.mark.parametrize(
    "change, message",
    [
        (with_x(lambda x: x[:, :, :15]), "images: height and width"),
        (with_x(lambda x: x[:, :2]), "weight: shape"),
        (with_x(lambda x: x[0]), "images: shape"),
        (
            replaced(0, lambda t: t.to(memory_format=torch.channels_last)),
            r"^weight of the patch embedding: each output channel contiguous expected, strides \(192, 1, 24, 3\) .*"
            r"model.to\(memory_format=torch.contiguous_format\)",
        ),
        (replaced(0, lambda t: t.transpose(2, 3)), "^weight of the patch embedding: each output channel contiguous"),
        (replaced(0, lambda t: t.repeat_interleave(2, 1)[:, ::2]), "^weight of the patch embedding: each output"),
        (replaced(4, lambda t: t[:, :5]), "pos_embed: shape"),
        (replaced(2, lambda t: t[0]), "cls_token: shape"),
    ],
)
def test_wrong_stem_arguments_raise(change, message):
    block = stem(EmbedSlice(0, 64), torch.randn(2, 3, 16, 24))
    change(block)
    with pytest.raises(RuntimeError, match=message):
        block.forward()


@pytest.mark.parametrize(
    "change, message",
    [
        (with_constant(1, 51), "pool_start, pool_stop"),
        (with_constant(1, 0), "pool_start, pool_stop"),
        (with_constant(0, -1), "pool_start, pool_stop"),
        (replaced(1, None), "norm_bias"),
        (replaced(2, None), "bias"),
        (with_constant(2, [0, 128, 25, 6]), "weight: rows"),
        (with_constant(2, [65, 128, 0, 6]), "elements"),
    ],
)
def test_wrong_head_arguments_raise(change, message):
    block = head(HeadSlice(0, 128, 0, 30), 2, 50, (0, 50))
    change(block)
    with pytest.raises(RuntimeError, match=message):
        block.forward()


# ---- Instruction set ----


def test_unknown_isa_raises():
    before = hydravit.cpu_isa()
    with pytest.raises(RuntimeError, match="'sse' given"):
        hydravit.set_cpu_isa("sse")
    assert hydravit.cpu_isa() == before


def with_isa(name, *arguments, **variables):
    """Run Python with this HYDRAVIT_CPU_ISA and no other variable of ours but those given."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HYDRAVIT_")}
    environment.update(variables, HYDRAVIT_CPU_ISA=name)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name, expected", [("portable", "portable"), ("", "avx512|avx2|portable")])
def test_isa_from_the_environment(name, expected):
    result = with_isa(name, "-c", "import torch, hydravit_kernels; print(torch.ops.hydravit.cpu_isa())")
    assert re.fullmatch(expected, result.stdout.strip()), result.stderr


REFUSED = "refuses HYDRAVIT_CPU_ISA='nonsense': .*unknown CPU instruction set"


def test_unknown_isa_in_the_environment_makes_native_unavailable():
    result = with_isa("nonsense", "-W", "error", "-m", "hydravit_kernels")
    assert result.returncode == 0 and re.search(f"native on cpu +{REFUSED}", result.stdout), result.stderr
    assert re.search(f"library +none: native {REFUSED}", result.stdout)
    result = with_isa("nonsense", "-c", "import hydravit_kernels; print(hydravit_kernels.select())")
    assert result.stdout.strip() == "reference" and re.search(f"because native {REFUSED}", result.stderr)
    result = with_isa("nonsense", "-c", "import hydravit_kernels; hydravit_kernels.select('native')")
    assert result.returncode and re.search(f"RuntimeError: backend 'native': {REFUSED}", result.stderr)


def test_unknown_isa_in_the_environment_fails_the_import_where_native_is_demanded():
    result = with_isa("nonsense", "-c", "import hydravit_kernels", HYDRAVIT_BUILD="cpu")
    assert result.returncode
    assert re.search(f"ImportError: HYDRAVIT_BUILD=cpu demands the native backend, but it {REFUSED}", result.stderr)
