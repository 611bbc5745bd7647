"""The native CPU ops against the reference in float64, forward and backward, on every instruction set that runs here.

Every parameter holds NaN outside the slice, so a finite result proves that nothing else was read.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from blocks import EPS, Block, attention, equal, head, hydravit, mlp, stem
from wrong import replaced, transposed, with_constant, with_x

from hydravit_kernels import AttentionSlice, EmbedSlice, HeadSlice, MlpSlice
from hydravit_kernels.subnetwork import flatten

pytestmark = pytest.mark.needs("native")

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


@pytest.mark.parametrize("batch, tokens, queries", [(3, 50, 1), (1, 197, 33), (7, 197, 1)])
@pytest.mark.parametrize("name", ATTENTION_SLICES)
def test_attention_of_the_first_tokens(isa, name, batch, tokens, queries):
    s = ATTENTION_SLICES[name]
    block = attention(s, batch, tokens, plenty=batch == 3, queries=queries)
    block.check()
    every = Block(block.name, block.x, block.parameters, (*block.constants[:-1], tokens), None)
    assert torch.equal(block.forward()[0], every.forward()[0][:, :queries])
    grad, (_, *saved) = torch.randn(block.forward()[0].shape), block.forward(save=True)
    first, second = (
        block.backward(grad, block.zeros(), saved=saved)
        for saved[0][:, queries:, : s.heads * s.head_dim] in (0.0, float("nan"))  # queries that nobody asked for
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("batch, tokens", SIZES)
@pytest.mark.parametrize("name", MLP_SLICES)
def test_mlp_block(isa, name, batch, tokens):
    mlp(MLP_SLICES[name], batch, tokens, plenty=batch == 3).check()


@pytest.mark.parametrize("cls, reg, positions", [(1, 0, "all"), (1, 3, "all"), (1, 2, "patches"), (0, 0, None)])
def test_stem(isa, cls, reg, positions):
    stem(EmbedSlice(0, 64), torch.randn(3, 3, 16, 24), cls=cls, reg=reg, positions=positions).check()
    stem(EmbedSlice(13, 21), torch.randn(1, 2, 15, 14), (5, 7), cls=cls, reg=reg, positions=positions).check()


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
    assert equal([block.forward()[0], block.backward(grad, again), *again], [expected, dx, *buffers])


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
    attention(AttentionSlice(7, 1, 3, 4, 5, 6, 1, 1, 1, 1, 1.0), 3, 17).check()
    mlp(MlpSlice(191, 1, 399, 1), 3, 17).check()
    head(HeadSlice(3, 1, 5, 1), 3, 17, (0, 17)).check()


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
    grad = torch.randn(block.forward()[0].shape)
    y, dx, *gradients = block.results(grad)
    for count in (2, 3):
        threads(count)
        assert equal(block.results(grad), [y, dx, *gradients])
    whole, constants = block.x, block.constants
    for first, last in ((0, 1), (batch - 1, batch), (2, 5)):
        block.x = whole[first:last]
        if block.saves and constants[0] is not None:
            block.constants = (constants[0][first:last], *constants[1:])
        assert torch.equal(block.forward()[0], y[first:last])
        assert torch.equal(block.backward(grad[first:last], block.zeros()), dx[first:last])


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_added_inside_the_slice_only(isa, name):
    BLOCKS[name]().check_adding()


@pytest.mark.parametrize("name", BLOCKS)
def test_row_strided_parameters(isa, name):
    BLOCKS[name]().check_row_strides()


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
    width_index = torch.tensor([1, 0, 0, 1, 1, 0])
    block = make(slices[1], len(width_index))
    own = [s.classes if name == "head" else s.embed for s in slices]

    def constants(chosen, images, width_index):
        scale = () if not block.saves else (block.constants[0][images],)
        scales = ([s.scale for s in chosen],) if name == "attention" else ()
        pool = (0, 17) if name == "head" else ()
        queries = (17,) if name == "attention" else ()
        return (*scale, *pool, flatten(chosen), *scales, *(() if name == "stem" else (EPS,)), width_index, *queries)

    whole = block.x
    mixed = Block(block.name, whole.clone(), block.parameters, constants(slices, slice(None), width_index), None)
    if name != "stem":
        for image, index in enumerate(width_index):
            mixed.x[image, :, slices[index].embed :] = float("nan")
    y = mixed.forward()[0]
    grad = torch.randn(y.shape)
    buffers, expected = block.zeros(), block.zeros()
    dx = mixed.backward(grad, buffers)
    for image, index in enumerate(width_index.tolist()):
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
    BLOCKS[name]().check_no_images()


# ---- Wrong arguments ----


def with_slice(**fields):
    def change(block):
        s = ATTENTION_SLICES["prefix"]._replace(**fields)
        block.constants = (block.constants[0], flatten([s]), [s.scale], *block.constants[3:])

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
    "width_index out of range": (with_constant(4, torch.tensor([0, 1, 0])), "width_index: values in"),
    "width_index of another length": (with_constant(4, torch.tensor([0])), "width_index: shape"),
    "width_index of another dtype": (
        with_constant(4, torch.tensor([0, 0, 0], dtype=torch.int32)),
        "^width_index: dtype int64 expected, int32 given$",
    ),
    "no queries": (with_constant(5, 0), "queries: 1 to 17 tokens expected, 0 given"),
    "too many queries": (with_constant(5, 18), "queries: 1 to 17 tokens expected, 18 given"),
    "strided width_index": (with_constant(4, torch.zeros(6, dtype=torch.int64)[::2]), "width_index: a contiguous"),
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


def test_several_slices_need_a_width_index():
    block = attention(ATTENTION_SLICES["prefix"], 3, 17)
    s = ATTENTION_SLICES["prefix"]
    block.constants = (block.constants[0], flatten([s, s]), [s.scale, s.scale], EPS, None, 17)
    with pytest.raises(RuntimeError, match="width_index: an int64 tensor"):
        block.forward()


def test_wrong_gradients_raise():
    block = attention(ATTENTION_SLICES["prefix"], 3, 17)
    grad = torch.randn_like(block.x)
    _, *saved = block.forward(save=True)

    def call(grad=grad, saved=saved, **buffers):
        sums = [buffers.get(str(i)) for i in range(7)]
        block.backward(grad, sums, saved=saved)

    for match, change in {
        "^grad: shape": {"grad": grad[:, :5]},
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
    with pytest.raises(RuntimeError, match="^isa: .*'sse' given"):
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
