"""One call of an op with NaN in every parameter outside the slices, and its comparison with the reference."""

import math

import torch
from budget import Draws, assert_within_budget

from hydravit_kernels import (
    AttentionParameters,
    HeadParameters,
    MlpParameters,
    StemParameters,
    ops,  # noqa: F401  (defines the ops)
    reference,
)
from hydravit_kernels.subnetwork import flatten

hydravit = torch.ops.hydravit
EPS = 1e-6


# ---- Parameters with NaN wherever none of the slices reads ----


def interval(offset, length):
    return range(offset, offset + length)


def embed_of(s):
    return interval(s.embed_offset, s.embed)


def poisoned(shape, reads, around=0.0):
    """Random where a slice reads, NaN elsewhere; ``reads``: of every slice a sequence of indices for each axis.

    The deviation is such that a product keeps the variance.
    """
    read = torch.zeros(shape, dtype=torch.bool)
    for axes in reads:
        read[torch.meshgrid(*(torch.tensor(axis, dtype=torch.int64) for axis in axes), indexing="ij")] = True
    inputs = min((math.prod(map(len, axes[1:])) for axes in reads), default=1)
    deviation = 0.3 if len(shape) == 1 else max(1, inputs) ** -0.5
    return torch.where(read, around + deviation * torch.randn(shape), float("nan"))


def stem_parameters(slices, full, channels, patch, *, bias=True, cls=1, reg=0, positions=0):
    live = [embed_of(s) for s in slices]

    def tokens(count):
        return poisoned((1, count, full), [(range(1), range(count), e) for e in live]) if count else None

    return StemParameters(
        weight=poisoned((full, channels, *patch), [(e, range(channels), *map(range, patch)) for e in live]),
        bias=poisoned((full,), [(e,) for e in live]) if bias else None,
        cls_token=tokens(cls),
        reg_token=tokens(reg),
        pos_embed=tokens(positions),
    )


def attention_parameters(slices, full, rows, columns, *, qkv_bias=True, proj_bias=True, layer_scale=True):
    """``rows``, ``columns``: of the full qkv and proj weights."""
    live = [s for s in slices if s.heads]

    def of_heads(s, start, length):
        return [start + head * s.pitch + i for head in range(s.heads) for i in range(length)]

    def of_roles(s):
        roles = (s.query_row, s.head_dim), (s.key_row, s.head_dim), (s.value_row, s.value_dim)
        return [row for role in roles for row in of_heads(s, *role)]

    def vector(around=0.0):
        return poisoned((full,), [(embed_of(s),) for s in live], around)

    proj = [(embed_of(s), of_heads(s, s.proj_column, s.value_dim)) for s in live]
    return AttentionParameters(
        norm_weight=vector(1.0),
        norm_bias=vector(),
        qkv_weight=poisoned((rows, full), [(of_roles(s), embed_of(s)) for s in live]),
        qkv_bias=poisoned((rows,), [(of_roles(s),) for s in live]) if qkv_bias else None,
        proj_weight=poisoned((full, columns), proj),
        proj_bias=vector() if proj_bias else None,
        layer_scale=vector() if layer_scale else None,
    )


def mlp_parameters(slices, full, hidden, *, fc1_bias=True, fc2_bias=True, layer_scale=True):
    live = [s for s in slices if s.hidden]
    places = [(interval(s.hidden_offset, s.hidden), embed_of(s)) for s in live]

    def vector(around=0.0):
        return poisoned((full,), [(e,) for _, e in places], around)

    return MlpParameters(
        norm_weight=vector(1.0),
        norm_bias=vector(),
        fc1_weight=poisoned((hidden, full), places),
        fc1_bias=poisoned((hidden,), [(h,) for h, _ in places]) if fc1_bias else None,
        fc2_weight=poisoned((full, hidden), [(e, h) for h, e in places]),
        fc2_bias=vector() if fc2_bias else None,
        layer_scale=vector() if layer_scale else None,
    )


def head_parameters(slices, full, rows, *, norm=True, classify=True, bias=True):
    places = [(interval(s.class_offset, s.classes), embed_of(s)) for s in slices]
    return HeadParameters(
        norm_weight=poisoned((full,), [(e,) for _, e in places], 1.0) if norm else None,
        norm_bias=poisoned((full,), [(e,) for _, e in places]) if norm else None,
        weight=poisoned((rows, full), places) if classify else None,
        bias=poisoned((rows,), [(c,) for c, _ in places]) if classify and bias else None,
    )


# ---- One op call, and its comparison with the reference ----


class Block:
    """Everything to call one op: its input, parameters and constants, and the reference of (input, parameters)."""

    def __init__(self, name, x, parameters, constants, reference):
        self.name, self.x, self.parameters, self.constants = name, x, list(parameters), constants
        self.reference = reference
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

    def arguments(self, save=False):
        return (self.x, *self.parameters, *self.constants, *((save,) if self.saves else ()))

    def backward_arguments(self, grad, saved, buffers, x_grad=True):
        return (grad, self.x, *saved, *self.parameters, *self.constants, x_grad, *buffers)

    def forward(self, save=False):
        op = getattr(hydravit, f"{self.name}_{self.backend}")
        result = op(*self.arguments(save))
        return result if self.saves else (result,)

    def backward(self, grad, buffers, x_grad=True, saved=None):
        """``saved``: what forward returned beside its result; None: forward is called for it."""
        if saved is None:
            _, *saved = self.forward(save=True)
        op = getattr(hydravit, f"{self.name}_backward_{self.backend}")
        return op(*self.backward_arguments(grad, saved, buffers, x_grad))

    def results(self, grad=None, saved=None):
        """The result, the gradient of ``x`` and those of the parameters."""
        y, buffers = self.forward()[0], self.zeros()
        dx = self.backward(torch.ones_like(y) if grad is None else grad, buffers, saved=saved)
        return [y, dx, *(b for b in buffers if b is not None)]

    def zeros(self):
        return [None if p is None else torch.zeros_like(p) for p in self.parameters]

    def oracle(self, grad, dtype=None, near=list):
        """Result and gradients of the reference, all on the CPU in ``dtype``; None: where and as they are.

        ``near``: see ``Draws``.
        """
        where = self.x.device if dtype is None else "cpu"
        leaves = [
            None if t is None else t.detach().to(where, dtype).requires_grad_()
            for t in near([self.x, *self.parameters])
        ]
        x = leaves[0]
        y = self.reference(x, [None if p is None else p.to(x.dtype) for p in leaves[1:]])
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
        again = [strided(b) for b in self.zeros()]
        assert equal([self.forward()[0], self.backward(grad, again), *again], [y, dx, *buffers])

    def check_no_images(self):
        self.x = self.x[:0]
        if self.saves:
            self.constants = (self.constants[0][:0], *self.constants[1:])
        y, dx, *gradients = self.results()
        assert len(y) == 0 and dx.shape == self.x.shape and not any(gradient.any() for gradient in gradients)


def equal(some, others):
    """Whether two lists of tensors have the same bits, and None in the same places."""
    return all(a is b is None or torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ---- The ops. Each has one slice or several; ``width_index``: which of them an image uses ----


def beside(x, tensor):
    """On the device of ``x`` and, unless it is an index, in its dtype."""
    return None if tensor is None else tensor.to(x.device, x.dtype if tensor.is_floating_point() else None)


def stem_block(images, parameters, slices, width_index=None):
    def exact(x, p):
        return reference.stem(x, StemParameters(*p), slices, beside(x, width_index))

    return Block("stem", images, parameters, (flatten(slices), width_index), exact)


def attention_block(x, parameters, branch_scale, slices, width_index=None, queries=None):
    queries = x.shape[1] if queries is None else queries

    def exact(x, p):
        scale, which = beside(x, branch_scale), beside(x, width_index)
        return reference.attention_block(x, AttentionParameters(*p), scale, slices, EPS, which, queries)

    constants = (branch_scale, flatten(slices), [s.scale for s in slices], EPS, width_index, queries)
    return Block("attention_block", x, parameters, constants, exact)


def mlp_block(x, parameters, branch_scale, slices, width_index=None):
    def exact(x, p):
        return reference.mlp_block(x, MlpParameters(*p), beside(x, branch_scale), slices, EPS, beside(x, width_index))

    return Block("mlp_block", x, parameters, (branch_scale, flatten(slices), EPS, width_index), exact)


def head_block(x, parameters, pool, slices, width_index=None):
    def exact(x, p):
        return reference.head(x, HeadParameters(*p), *pool, slices, EPS, beside(x, width_index))

    return Block("head", x, parameters, (*pool, flatten(slices), EPS, width_index), exact)


# ---- Calls with one slice, of sizes that most tests share ----


def attention(s, batch, tokens, full=192, rows=576, plenty=True, x=None, queries=None):
    """``plenty``: with every parameter that is optional."""
    optional = dict.fromkeys(("qkv_bias", "proj_bias", "layer_scale"), plenty)
    parameters = attention_parameters([s], full, rows, full, **optional)
    branch_scale = torch.rand(batch) * 2 if plenty else None
    x = torch.randn(batch, tokens, s.embed) if x is None else x
    return attention_block(x, parameters, branch_scale, [s], queries=queries)


def mlp(s, batch, tokens, full=192, hidden=400, plenty=True):
    """``plenty``: with every parameter that is optional."""
    optional = dict.fromkeys(("fc1_bias", "fc2_bias", "layer_scale"), plenty)
    parameters = mlp_parameters([s], full, hidden, **optional)
    branch_scale = torch.rand(batch) * 2 if plenty else None
    return mlp_block(torch.randn(batch, tokens, s.embed), parameters, branch_scale, [s])


def stem(s, images, patch=(8, 8), full=80, cls=1, reg=0, positions="all"):
    """``positions``: of all tokens, of the patches, or None."""
    patches = images.shape[2] // patch[0] * (images.shape[3] // patch[1])
    count = {"all": patches + cls + reg, "patches": patches, None: 0}[positions]
    sizes = {"bias": bool(cls), "cls": cls, "reg": reg, "positions": count}
    return stem_block(images, stem_parameters([s], full, images.shape[1], patch, **sizes), [s])


def head(s, batch, tokens, pool, full=192, rows=30, norm=True, classify=True, bias=True):
    parameters = head_parameters([s], full, rows, norm=norm, classify=classify, bias=bias)
    return head_block(torch.randn(batch, tokens, s.embed), parameters, pool, [s])
