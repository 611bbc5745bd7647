"""Models recorded for other tools: traced, exported, converted, with the logits of the model they were made from."""

import warnings

import pytest
import torch
from small import SMALL, images, make

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
VARIANTS = {
    "average pooling": {"pool": "avg"},
    "registers": {"register_tokens": 2, "no_embed_class": True},
    "separate classifiers": {"separate_classifiers": (1, 2, 3, 4)},
    "no classifier": {"num_classes": 0},
}
both = pytest.mark.parametrize(
    "backend", ["auto", "reference", pytest.param("native", marks=pytest.mark.needs("native"))]
)
at_widths = pytest.mark.parametrize("heads", [2, 4])
modes = pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__
)


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-4)


def narrowed(backend, heads, **overrides):
    model = make(SMALL, backend, **overrides)
    model.heads = heads
    x = images(SMALL, 5)
    with torch.no_grad():
        expected = [model(x) for _ in range(3)][-1]  # packed, where that is possible
    return model, x, expected


def check(run, x, expected):
    """The recorded model at one image, at the batch it was recorded with, and at another."""
    for batch in (1, 2, 5):
        close(run(x[:batch]), expected[:batch])


# ---- torch.jit.trace ----


@both
@at_widths
@pytest.mark.parametrize("recorded", [1, 2])
def test_trace(backend, heads, recorded):
    model, x, expected = narrowed(backend, heads)
    traced = torch.jit.trace(model, x[:recorded])
    check(traced, x, expected)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any("hydravit" in kind or kind == "aten::mT" for kind in kinds)


@modes
@pytest.mark.parametrize("variant", VARIANTS)
def test_trace_variants(variant, mode):
    model, x, expected = narrowed("auto", 2, **VARIANTS[variant])
    with mode():
        traced = torch.jit.trace(model, x[:2])
    with torch.no_grad():
        check(traced, x, expected)


@both
@at_widths
def test_gradients_of_a_traced_model(backend, heads):
    model, x, _ = narrowed(backend, heads)
    traced = torch.jit.trace(model, x[:2])
    found = []
    for run in (model, traced):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-3)


@both
def test_a_traced_model_takes_one_width_per_image(backend):
    """The example's widths are not recorded."""
    model, x, _ = narrowed(backend, 4)
    widths = torch.tensor([2, 4, 1, 2, 3])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.tensor results are registered as constants")
        traced = torch.jit.trace(model, (x[:2], torch.tensor([2, 2])))
        close(traced(x, widths), model(x, heads=widths))
        close(traced(x[:1], widths[1:2]), model(x[:1], heads=4))


@at_widths
def test_trace_of_modules_with_hooks(heads):
    model, x, expected = narrowed("auto", heads)
    model.blocks[1].attn.register_forward_hook(lambda module, inputs, output: output * 1.0)
    check(torch.jit.trace(model, x[:2]), x, expected)


@both
def test_tracing_leaves_packed_inference_alone(backend):
    model, x, expected = narrowed(backend, 2)
    before = model.packed_inference.network
    torch.jit.trace(model, x[:2])
    with torch.no_grad():
        close(model(x), expected)
    assert model.packed_inference.network is before


# ---- torch.export ----


@both
@at_widths
@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, heads, strict):
    model, x, expected = narrowed(backend, heads)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=shapes, strict=strict)
    check(program.module(), x, expected)
    assert not any("hydravit" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_variants(variant):
    model, x, expected = narrowed("auto", 2, **VARIANTS[variant])
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    check(program.module(), x, expected)


# ---- Other tools ----


@pytest.mark.long
@at_widths
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_onnx(tmp_path, heads, dynamo):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, expected = narrowed("auto", heads)
    path = tmp_path / "model.onnx"
    options = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"dynamic_axes": {"images": {0: "batch"}}, "input_names": ["images"]}
    )
    torch.onnx.export(model, (x[:2],), path, opset_version=20, dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    check(lambda x: session.run(None, {name: x.numpy()})[0], x, expected)


@pytest.mark.long
@at_widths
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_openvino(heads, exported, openvino):
    model, x, expected = narrowed("auto", heads)
    if exported:
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        converted = openvino.convert_model(program)
    else:
        converted = openvino.convert_model(model, example_input=x[:2])
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    check(lambda x: compiled(x.numpy())[0], x, expected)
