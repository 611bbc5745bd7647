"""One call of an op with NaN outside the slice of every parameter, and plain PyTorch to compare it with."""

import math

import torch
import torch.nn.functional as F
from budget import Draws, assert_within_budget

from hydravit_kernels import ops  # noqa: F401  (defines the ops)
from hydravit_kernels.subnetwork import flatten

hydravit = torch.ops.hydravit
EPS = 1e-6


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


def plain_attention(x, p, branch_scale, s, queries):
    if s.heads == 0:
        return x[:, :queries].clone()
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale = p
    e = slice(s.embed_offset, s.embed_offset + s.embed)
    y = F.layer_norm(x, (s.embed,), norm_weight[e], norm_bias[e], EPS)
    roles = ((s.query_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim))
    rows = [head_rows(start, length, s) for start, length in roles]
    q, k, v = (F.linear(y, qkv_weight[r][:, e], optional(qkv_bias, r)).unflatten(-1, (s.heads, -1)) for r in rows)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q = q[:, :, :queries]
    y = ((q @ k.mT * s.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
    columns = head_rows(s.proj_column, s.value_dim, s)
    branch = F.linear(y, proj_weight[e][:, columns], optional(proj_bias, e))
    return add_branch(x[:, :queries], branch, layer_scale, branch_scale, e)


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
        self.backend = "native"

    def on(self, backend, device="cpu", dtype=torch.float32, parameters_dtype=None):
        """The same call of another backend, elsewhere, in another dtype; the parameters may have one of their own."""

        def moved(tensors, dtype):
            return [
                t.to(device, dtype if t.is_floating_point() else None) if isinstance(t, torch.Tensor) else t
                for t in tensors
            ]

        self.backend = backend
        [self.x], self.constants = moved([self.x], dtype), tuple(moved(self.constants, dtype))
        self.parameters = moved(self.parameters, parameters_dtype or dtype)
        return self

    def forward(self, save=False):
        op = getattr(hydravit, f"{self.name}_{self.backend}")
        result = op(self.x, *self.parameters, *self.constants, *((save,) if self.saves else ()))
        return result if self.saves else (result,)

    def backward(self, grad, buffers, x_grad=True, saved=None):
        """``saved``: what forward returned beside its result; None: forward is called for it."""
        if saved is None:
            _, *saved = self.forward(save=True)
        op = getattr(hydravit, f"{self.name}_backward_{self.backend}")
        return op(grad, self.x, *saved, *self.parameters, *self.constants, x_grad, *buffers)

    def zeros(self):
        return [None if p is None else torch.zeros_like(p) for p in self.parameters]

    def oracle(self, grad, dtype=None, near=list):
        """Result and gradients of the plain function, all on the CPU in ``dtype``; None: where and as they are.

        ``near``: see ``Draws``.
        """
        where = self.x.device if dtype is None else "cpu"
        leaves = [
            None if t is None else t.detach().to(where, dtype).requires_grad_()
            for t in near([self.x, *self.parameters])
        ]
        x = leaves[0]
        y = self.plain(x, [None if p is None else p.to(x.dtype) for p in leaves[1:]])
        inputs = [t for t in leaves if t is not None]
        gradients = torch.autograd.grad(y, inputs, grad.to(x), allow_unused=True)
        return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True))]

    def check(self):
        """The result and every gradient are within the error budget, and no gradient is outside the slice."""
        y, *saved = self.forward(save=True)
        assert torch.equal(y, self.forward()[0])
        grad = torch.randn(y.shape).to(y)
        buffers = self.zeros()
        gradients = [self.backward(grad, buffers, saved=saved), *(b for b in buffers if b is not None)]
        draws = Draws(lambda near: (self.oracle(grad, near=near), self.oracle(grad, torch.float64, near)), y.dtype)
        for i, actual in enumerate([y, *gradients]):
            assert_within_budget(actual, draws[i], f"{self.name} {f'gradient {i - 1}' if i else 'output'}")
        for parameter, buffer in zip(self.parameters, buffers, strict=True):
            assert parameter is None or not buffer[parameter.isnan()].any(), "gradient outside the slice"

    def check_adding(self):
        """Gradients are added to what the buffers hold inside of the slice, nothing is touched outside."""
        grad = torch.randn_like(self.forward()[0])
        alone, added = self.zeros(), [None if p is None else torch.ones_like(p) for p in self.parameters]
        dx = self.backward(grad, alone)
        self.backward(grad, added)
        for parameter, a, b in zip(self.parameters, alone, added, strict=True):
            if parameter is not None:
                assert torch.equal(b[parameter.isnan()], torch.ones_like(b[parameter.isnan()]))
                torch.testing.assert_close(b, a + 1, rtol=1e-4, atol=1e-4 * a.abs().max().item())
        # Each gradient by itself is the same as all together; what is not wanted is not touched.
        for i, expected in enumerate(alone):
            if expected is not None:
                buffers = [b if j == i else None for j, b in enumerate(self.zeros())]
                assert self.backward(grad, buffers, x_grad=False).numel() == 0
                assert torch.equal(buffers[i], expected)
        assert torch.equal(self.backward(grad, [None] * len(alone)), dx)

    def check_row_strides(self):
        """The same bits from parameters, and in buffers, whose rows lie further apart, with NaN between."""
        grad = torch.randn_like(self.forward()[0])
        y, buffers = self.forward()[0], self.zeros()
        dx = self.backward(grad, buffers)

        def strided(t):
            if t is None or t.dim() < 2:
                return t
            shape = [t.shape[0] * 2, *t.shape[1:]] if t.dim() == 4 else [*t.shape[:-1], t.shape[-1] + 3]
            room = torch.full(shape, float("nan"), device=t.device)
            view = room[::2] if t.dim() == 4 else room[..., : t.shape[-1]]
            return view.copy_(t)

        self.parameters = [strided(p) for p in self.parameters]
        again = [None if b is None else strided(torch.zeros_like(b)) for b in buffers]
        assert torch.equal(self.forward()[0], y) and torch.equal(self.backward(grad, again), dx)
        for a, b in zip(again, buffers, strict=True):
            assert a is None or torch.equal(a, b)


def attention(s, batch, tokens, full=192, rows=576, plenty=True, x=None, queries=None):
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
    queries = tokens if queries is None else queries

    def plain(x, p):
        return plain_attention(x, p, None if branch_scale is None else branch_scale.to(x), s, queries)

    constants = (branch_scale, flatten([s]), [s.scale], EPS, None, queries)
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
    plain = lambda x, p: plain_mlp(x, p, None if branch_scale is None else branch_scale.to(x), s)  # noqa: E731
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
