"""The Triton kernels against the reference in float64, forward and every gradient, with NaN outside the slices.

On a GPU they run compiled, in every dtype; elsewhere on Triton's interpreter (``TRITON_INTERPRET=1``, which ``make
test`` sets for this file), in float32 and a little float16: its bfloat16 is wrong.
"""

import importlib

import pytest
import torch
from adamw_runs import OPTIONS, Run
from blocks import Block, attention, equal, head, hydravit, mlp, stem
from cases import OPS, Case, check_op
from machine import TRITON_DEVICE as DEVICE
from op_calls import calls
from small import check_gradients, images, make
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from wrong import replaced, transposed, with_constant, with_x

from hydravit import HydraViT, HydraViTConfig
from hydravit.training import SliceGradients
from hydravit_kernels import AdamWStep, AttentionSlice, EmbedSlice, HeadSlice, MlpSlice, adamw, backends, ops
from hydravit_kernels.subnetwork import flatten

GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.needs("triton"),
    pytest.mark.usefixtures("one_thread"),
]
# Of activations and parameters, and whether products of float32 may be rounded to TensorFloat-32.
PRECISIONS = {"fp32": (torch.float32, None, "highest")}
if GPU:
    PRECISIONS |= {
        "tf32": (torch.float32, None, "high"),
        "bf16": (torch.bfloat16, None, "highest"),
        "bf16, fp32 masters": (torch.bfloat16, torch.float32, "highest"),
        "fp16": (torch.float16, None, "highest"),
    }


@pytest.fixture(params=PRECISIONS)
def on(request, monkeypatch):
    """Moves a ``Block`` to the kernels under test."""
    dtype, parameters_dtype, products = PRECISIONS[request.param]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", products == "high")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    yield lambda block: block.on("triton", DEVICE, dtype, parameters_dtype)
    torch.set_float32_matmul_precision(before)


# ---- Values ----


# On a GPU every case compiles kernels of its own, for seconds; the interpreter takes half a second for most.
SEEDS = [pytest.param(seed, marks=[pytest.mark.long] * (seed >= (3 if GPU else 16))) for seed in range(38)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OPS)
def test_op_is_the_reference(on, name, seed):
    """Any offsets, lengths and pitches, one width or a width per image, with and without every optional argument."""
    case = Case(f"triton {name} {seed}", tokens=20)
    try:
        check_op(name, case, on)
    except Exception as error:
        raise AssertionError(f"{error}\nin the case {case}") from error


@pytest.mark.parametrize("head_dim, tokens", [(16, 33), (24, 5), (40, 33), (64, 5), (80, 17), (128, 33)])
def test_head_dims(on, head_dim, tokens):
    s = AttentionSlice(16, 48, 0, 256, 512, 0, 2, head_dim, head_dim, head_dim, head_dim**-0.5)
    on(attention(s, 2, tokens, full=256, rows=768, plenty=False)).check()


SLICE = AttentionSlice(8, 48, 7, 67, 130, 3, 3, 12, 14, 20, 0.3)
BLOCKS = {
    "attention": lambda: attention(SLICE, 2, 19, full=64, rows=192),
    "mlp": lambda: mlp(MlpSlice(5, 40, 17, 77), 2, 19, full=64, hidden=100),
    "stem": lambda: stem(EmbedSlice(13, 40), torch.randn(2, 3, 16, 20), (8, 5), cls=1, reg=2),
    "head": lambda: head(HeadSlice(7, 33, 4, 11), 3, 9, (2, 9), full=48),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_all_tokens_of_an_image(on, name):
    make_block = {
        "attention": lambda: attention(AttentionSlice(0, 64, 0, 192, 384, 0, 1, 64, 64, 64, 0.125), 1, 197),
        "mlp": lambda: mlp(MlpSlice(0, 64, 0, 256), 1, 197),
    }
    on(make_block[name]()).check()


@pytest.mark.parametrize("name", BLOCKS)
def test_parameters_in_more_precision_than_activations(name):
    """As in training under autocast: a tile of a weight is cast where it is used, gradients are the parameters'."""
    block = BLOCKS[name]().on("triton", DEVICE, torch.float16, torch.float32)
    block.check()
    assert all(b is None or b.dtype == torch.float32 for b in block.zeros())


def test_peaked_softmax_and_overflow(on):
    block = attention(AttentionSlice(0, 32, 0, 64, 128, 0, 2, 16, 16, 16, 4.0), 1, 20, full=64, rows=192)
    on(block).check()
    block.constants = (*block.constants[:2], [1e6], *block.constants[3:])
    assert block.forward()[0].isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_is_left_to_chance(name):
    """The same bits every time, gradients of parameters included."""
    block = BLOCKS[name]().on("triton", DEVICE)
    grad = torch.randn_like(block.forward()[0])
    assert equal(block.results(grad), block.results(grad))


@pytest.mark.needs("GPU", "triton_compiler")
@pytest.mark.parametrize("name", OPS)
def test_a_captured_graph_replays(name):
    """Forward and backward on a side stream, a width per image: other images may have other widths in every replay."""
    case = Case(f"captured {name}", tokens=20)
    index = 4 if name == "attention_block" else -1
    while (block := OPS[name](case)).constants[index] is None:
        pass
    block.on("triton", DEVICE)
    grad, buffers = torch.randn_like(block.forward()[0]), block.zeros()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        block.backward(grad, block.zeros())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = block.forward()[0], block.backward(grad, buffers)
    for _ in range(2):
        block.constants[index].copy_(block.constants[index].flip(0))
        block.x.nan_to_num_().copy_(torch.randn_like(block.x))
        for buffer in buffers:
            _ = None if buffer is None else buffer.zero_()
        graph.replay()
        expected = block.zeros()
        assert equal([y, dx, *buffers], [block.forward()[0], block.backward(grad, expected), *expected])


# ---- Gradients in place ----


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_added_inside_the_slice_only(name):
    BLOCKS[name]().on("triton", DEVICE).check_adding()


@pytest.mark.parametrize("name", BLOCKS)
def test_row_strided_parameters(name):
    BLOCKS[name]().on("triton", DEVICE).check_row_strides()


@pytest.mark.parametrize("name", ["attention", "mlp", "head"])
def test_tokens_of_a_longer_image(name):
    """Read in place, as where the last MLP runs for the class token alone."""
    block = BLOCKS[name]().on("triton", DEVICE)
    image = torch.randn(block.x.shape[0], block.x.shape[1] + 4, block.x.shape[2], device=DEVICE)
    runs = []
    for x in (image[:, 2:-2], image[:, 2:-2].contiguous()):
        block.x = x
        runs.append(block.results())
    assert equal(*runs)


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_saved_activations_with_rows_apart(name):
    """Backward accepts saved activations that are views of wider tensors."""
    block = BLOCKS[name]().on("triton", DEVICE)
    _, *saved = block.forward(save=True)
    apart = [torch.nn.functional.pad(t, (0, 3))[..., :-3] for t in saved]
    assert equal(block.results(saved=apart), block.results(saved=saved))


@pytest.mark.parametrize("name", BLOCKS)
def test_no_images(name):
    BLOCKS[name]().on("triton", DEVICE).check_no_images()


# ---- The model ----

TINY = HydraViTConfig(image_size=16, patch_size=8, depth=2, max_heads=4, head_dim=16, num_classes=10, mlp_ratio=2.0)


@pytest.fixture
def model():
    return make(TINY, layer_scale=0.5, register_tokens=1).to(DEVICE)


def on_triton(model):
    model.requested_backend = "triton"
    model._select_backend(model.pos_embed)
    return model


def gradients(model, logits):
    model.zero_grad()
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("heads", [1, 3, [4, 1, 3]])
def test_model(model, heads):
    x = images(TINY, 3).to(DEVICE)
    heads = torch.tensor(heads) if isinstance(heads, list) else heads
    expected = model(x, heads=heads)
    expected_gradients = gradients(model, expected)
    logits = on_triton(model)(x, heads=heads)
    assert model.backend == "triton"
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model, logits).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4)


def test_frozen_parameters_and_gradients_in_place(model):
    x = images(TINY, 2).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "mlp.fc1" in name or "norm" in name or "head" in name
    expected = gradients(model, model(x, heads=3))
    assert gradients(on_triton(model), model(x, heads=3)).keys() == expected.keys()
    model.zero_grad()
    SliceGradients(model)
    model(x, heads=3).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_the_optimizer_of_the_slice():
    """Forward, gradients in place and AdamW, all by these kernels, train what the reference trains."""
    # A large epsilon: AdamW divides the rounding of gradients that are zero (those of key biases) by itself otherwise.
    options = {**OPTIONS, "eps": 1e-4}
    run, reference = (Run(name, device=DEVICE, depth=1, options=options) for name in ("triton", "reference"))
    for heads in (2, 1, 3):
        torch.testing.assert_close(run.step(heads), reference.step(heads), rtol=1e-4, atol=1e-5)
    for ours, theirs in ((run.model, reference.model), (run.average, reference.average)):
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)


def test_the_optimizer_plans_a_table_once(monkeypatch):
    """Later calls copy only their numbers to the device."""
    module, planned = importlib.import_module("hydravit_kernels.triton.adamw"), []
    make = module._make_plan
    monkeypatch.setattr(module, "_make_plan", lambda *arguments: planned.append(1) or make(*arguments))
    weight, gradient, first, second = torch.ones(4, 3, 5, device=DEVICE)
    table = torch.tensor([[0, 0, 0, 3, 5, 4]])
    for lr in (1e-3, 2e-3):
        step = AdamWStep.at(1, lr, (0.9, 0.99), 1e-8, 0.0, 0.0)
        adamw([weight], [gradient], [first], [second], [], table, [step], backend="triton")
    assert len(planned) == 1


def test_modes_and_checkpointing(model):
    x = images(TINY, 2).to(DEVICE)
    expected = on_triton(model)(x, heads=2)
    expected_gradients = gradients(model, expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x, heads=2), expected)
    logits = checkpoint(lambda x: model(x, heads=2), x, use_reentrant=False)
    for name, gradient in gradients(model, logits).items():
        assert torch.equal(gradient, expected_gradients[name])


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if GPU else [])])
def test_autocast(model, dtype):
    """The stream is in autocast's dtype; no parameter is cast as a whole, and gradients are the parameters'."""
    x, seen = images(TINY, 2).to(DEVICE), []
    exact = model.double()(x.double(), heads=3)
    on_triton(model.float())
    model.blocks[0].register_forward_hook(lambda module, arguments, y: seen.append(y.dtype))
    with torch.autocast(DEVICE, dtype=dtype):
        logits = model(x, heads=3)
    assert seen == [dtype] and logits.dtype == dtype
    torch.testing.assert_close(logits.double(), exact, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model, logits.float()).values())


@pytest.mark.parametrize("widths", [(4, 2, 3), pytest.param(([4, 1], [2, 3]), marks=pytest.mark.long)])
def test_compiled_graphs(widths):
    """No graph breaks, and not a graph per width."""
    torch._dynamo.reset()
    counters.clear()
    model = on_triton(make(TINY, depth=1).to(DEVICE))
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(TINY).to(DEVICE)
    for heads in widths:
        heads = torch.tensor(heads) if isinstance(heads, list) else heads
        logits, expected = graph(x, heads=heads), model(x, heads=heads)
        torch.testing.assert_close(logits, expected)
    check_gradients(model, logits, expected)
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(name):
    """Schema (mutation and aliasing), fake kernel and tracing with symbolic sizes agree with the real kernel."""
    op = getattr(hydravit, f"{name}_triton").default
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, calls("triton", DEVICE)[name], test_utils=tests)


# ---- What is refused ----


def with_slice(**fields):
    return with_constant(1, flatten([SLICE._replace(**fields)]))


WRONG = {
    "x of another width": (with_x(lambda x: x[:, :, :47]), "^x: shape"),
    "x without tokens": (with_x(lambda x: x[:, :0]), "^x: shape"),
    "float64": (with_x(torch.Tensor.double), "^x: dtype float32, bfloat16 or float16 expected"),
    "x with channels apart": (with_x(lambda x: x.mT.contiguous().mT), "^x: innermost stride 1 expected"),
    "column-major weight": (replaced(2, transposed), "qkv_weight"),
    "short bias": (replaced(3, lambda t: t[:100]), "^qkv_bias: shape"),
    "strided scale": (replaced(6, lambda t: t.repeat(2)[::2]), "^layer_scale: inner"),
    "slice outside": (with_slice(value_row=140), "^qkv_weight: rows up to 194 expected, 192 given"),
    "heads that overlap": (with_slice(pitch=13), "^slices: a pitch of 14 at least"),
    "no slice": (with_constant(1, []), "^slices: 10 integers"),
    "two slices, no width_index": (with_constant(1, flatten([SLICE] * 2)), "^slices: one expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    block = BLOCKS["attention"]().on("triton", DEVICE)
    change, message = WRONG[name]
    change(block)
    with pytest.raises(RuntimeError, match=message):
        block.forward()


@pytest.mark.parametrize("name", BLOCKS)
def test_wrong_arguments_of_backward(name):
    block = BLOCKS[name]().on("triton", DEVICE)
    y, *saved = block.forward(*([True] if block.saves else []))
    grad, buffers = torch.ones_like(y), block.zeros()
    wrong = {
        "^grad: torch.float32 .* expected": (grad[:1], buffers),
        "^grad: innermost stride 1 expected": (torch.ones_like(y).mT.contiguous().mT, buffers),
        "^grad_.*: shape .* expected": (grad, [b if b is None else b[..., :-1] for b in buffers]),
    }
    for message, (g, b) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            block.backward(g, b, saved=saved)


@pytest.mark.needs("triton_interpreter")
def test_an_image_of_no_slice():
    """Compiled, the assertion ends the process."""
    slices = [EmbedSlice(0, 16), EmbedSlice(0, 32)]
    block = stem(slices[1], torch.randn(2, 3, 16, 16))
    for bad in (-1, 2):
        wrong = Block("stem", block.x, block.parameters, (flatten(slices), torch.tensor([0, bad])), None).on("triton")
        with pytest.raises(RuntimeError, match="width_index"):
            wrong.forward()


def test_the_backend_is_explicit_only(monkeypatch):
    """Until results show it correct and faster somewhere, "auto" does not take it."""
    monkeypatch.delenv("HYDRAVIT_BACKEND", raising=False)
    assert "triton" in HydraViT(TINY, backend="triton", device=DEVICE).backend
    assert backends.select("auto", DEVICE) != "triton"
    with pytest.raises(RuntimeError, match="backend 'triton': computes in .*not in torch.float64"):
        backends.select("triton", DEVICE, torch.float64)
