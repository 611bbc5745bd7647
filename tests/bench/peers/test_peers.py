"""The eager peers and our own: their numbers are right, and each does the work that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from plain import forward, prefix
from small import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measuring.copies import copied_bytes
from bench.measuring.peer import Absent, cut
from bench.measuring.workloads import Workload, make_images, make_labels, make_model, make_residual
from bench.peers import eager, ours
from hydravit.checkpoint import extract
from hydravit.geometry import hydravit
from hydravit_kernels import backends, reference

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
HEADS = (1, 3, 4)
NOT_HERE = tuple(name for name, reason in backends.report(CPU).items() if reason != "available") + ("engine",)
BY_NAME = {peer.name: peer for peer in (*eager.PEERS, *ours.PEERS) if not peer.name.startswith(NOT_HERE)}


def offering(setup):
    return pytest.mark.parametrize("name", [name for name, peer in BY_NAME.items() if getattr(peer, setup)])


def make(task, heads=HEADS):
    workload = Workload(task, tuple(heads), 2, config=SMALL)
    return workload, make_model(workload, CPU)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def exact_gradients(model, images, labels, heads):
    """Gradients in float64 from index lists, of the full parameters, cut to the width."""
    parameters = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    logits = forward(parameters, model.config, prefix(model.config, heads), images.double())
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), [*parameters.values()])
    return cut(dict(zip(parameters, gradients, strict=True)), model, heads)


def exact_block(model, kind, heads, x, grad):
    """Outputs in float64 from the reference, with gradients by the block's names, cut to the width."""
    own, x = model.double(), x.double().requires_grad_()
    subnetwork, block = hydravit(SMALL, heads), own.blocks[0]
    function = getattr(reference, f"{kind}_block")
    parameters = getattr(block, f"{kind}_parameters")()
    y = function(x, parameters, None, [getattr(subnetwork, kind)[0]], subnetwork.eps)
    y.backward(grad.double())
    gradients = {f"blocks.0.{n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    cut_to_width = {n.removeprefix("blocks.0."): g for n, g in cut(gradients, own, heads).items()}
    return {"y": y.detach(), "x": x.grad, **cut_to_width}


def assert_close(actual, exact, allowed=1e-5):
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        assert actual[name].shape == expected.shape, name
        assert not actual[name].requires_grad and actual[name].dtype == torch.float32, name
        error = torch.linalg.vector_norm(actual[name].double() - expected) / torch.linalg.vector_norm(expected)
        assert error < allowed, f"{name}: {error:.1e}"


@offering("inference")
def test_logits(name):
    workload, model = make("inference")
    images = make_images(workload, CPU)
    closures = BY_NAME[name].inference(model, images, HEADS)
    assert list(closures) == list(HEADS)
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    before = images.clone(), state(model)
    for heads in (*HEADS, HEADS[0]):  # also after other widths
        exact = forward(parameters, SMALL, prefix(SMALL, heads), images.double())
        logits = closures[heads]()
        assert logits.is_inference()
        assert_close({"logits": logits}, {"logits": exact})
    assert torch.equal(images, before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
@offering("block")
def test_blocks(name, kind, heads):
    workload, model = make(kind, [heads])
    x, grad = make_residual(workload, CPU)
    before = x.clone()
    with_gradients = BY_NAME[name].block(model, kind, heads, x, grad)
    with_gradients.run()
    outputs = with_gradients.outputs()
    with_gradients.run()  # must not change what was returned
    assert torch.equal(x, before) and not x.requires_grad
    assert all(p.grad is None for p in model.parameters())
    step = BY_NAME[name].block(model, kind, heads, x, None)
    assert step.run().is_inference()
    alone = step.outputs()
    assert list(alone) == ["y"]
    assert torch.equal(x, before)
    exact = exact_block(model, kind, heads, x, grad)
    assert_close(outputs, exact)
    assert_close(alone, {name: exact[name] for name in alone})


@offering("training")
def test_training(name):
    workload, model = make("training")
    images, labels = make_images(workload, CPU), make_labels(workload, CPU)
    before = state(model)
    steps = BY_NAME[name].training(model, images, labels, HEADS, None)
    assert list(steps) == list(HEADS)
    outputs = {heads: steps[heads].outputs() for heads in HEADS}
    for heads in HEADS:
        assert_close(outputs[heads], exact_gradients(model, images, labels, heads))
    steps[HEADS[0]].run()
    stepped = steps[HEADS[0]].outputs()
    assert all(not torch.equal(gradient, outputs[HEADS[0]][name]) for name, gradient in stepped.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("trained", "compared"), [((4, 1, 1, 1, 3), 4), ((3, 3, 3), 3)])
def test_every_nested_peer_takes_the_same_steps(trained, compared):
    """Widths in turn on one set of weights, with dense AdamW, whose momentum moves weights outside the width as well.

    Peers that let those weights rest take the same steps as long as the width does not change.
    """
    workload, model = make("training")
    images, labels = make_images(workload, CPU), make_labels(workload, CPU)
    results = {}
    for name, peer in BY_NAME.items():
        if not peer.training or (name.endswith("-active") and {*trained} != {compared}):
            continue
        steps = peer.training(model, images, labels, HEADS, None)
        for heads in trained:
            steps[heads].run()
        results[name] = steps[compared].outputs()
    exact = {name: gradient.double() for name, gradient in results.pop("reference").items()}
    assert {"authors", "views"} <= results.keys()
    for outputs in results.values():
        assert_close(outputs, exact, 1e-4)


def test_autocast():
    workload, model = make("training")
    images, labels = make_images(workload, CPU), make_labels(workload, CPU)
    exact = exact_gradients(model, images, labels, 3)
    for name in ("authors", "views", "reference"):
        outputs = BY_NAME[name].training(model, images, labels, [3], torch.bfloat16)[3].outputs()
        error = torch.linalg.vector_norm(outputs["head.weight"].double() - exact["head.weight"])
        assert 1e-4 < error / torch.linalg.vector_norm(exact["head.weight"]) < 0.1
        with pytest.raises(Absent, match="scaled loss"):
            BY_NAME[name].training(model, images, labels, [3], torch.float16)
    for name in (name for name in BY_NAME if name in ("native", "native-inplace", "native-active")):
        with pytest.raises(Absent, match="undoes autocast"):
            BY_NAME[name].training(model, images, labels, [3], torch.bfloat16)


class Gathers(TorchDispatchMode):
    """Notes the shapes of what gathers by index lists return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten.index.Tensor:
            self.shapes.append(tuple(result.shape))
        return result


def test_authors_gather_rows_of_qkv_in_every_layer_and_views_copy_no_weight():
    heads, width = 3, 3 * SMALL.head_dim
    workload, model = make("inference", [heads])
    images = make_images(workload, CPU)
    for name, layers in (("authors", SMALL.depth), ("views", 0), ("extracted", 0), ("reference", 0)):
        run = BY_NAME[name].inference(model, images, [heads])[heads]
        with Gathers() as gathers:
            run()
        assert gathers.shapes == [(3 * width, width), (3 * width,)] * layers
        assert copied_bytes(run, model.parameters()) == layers * 3 * width * (width + 1) * 4
    for network, layers in ((eager.authors_network, SMALL.depth), (eager.views_network, 0)):  # with gradients
        copied = copied_bytes(lambda network=network: network(model, images, heads), model.parameters())
        assert copied == layers * 3 * width * (width + 1) * 4


def test_extracted_is_timms_with_fused_attention():
    _, model = make("inference")
    vit = eager.plain_vit(model, 3)
    assert eager.TIMM == type(vit).__module__.startswith("timm.")
    if not eager.TIMM:
        pytest.skip("timm is not installed")
    assert all(block.attn.fused_attn for block in vit.blocks)
    assert BY_NAME["extracted"].version.startswith("timm ")


def test_extracted_without_timm(monkeypatch):
    monkeypatch.setattr(eager, "TIMM", False)
    assert eager.plain_vit(make("inference")[1], 3).config.max_heads == 3
    test_logits("extracted")


def test_views_can_be_compiled_in_one_graph():
    workload, model = make("inference")
    images = make_images(workload, CPU)
    compiled = torch.compile(eager.views_network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(model, images, 3), eager.views_network(model, images, 3))
    x, _ = make_residual(Workload("mlp", (3,), 2, config=SMALL), CPU)
    compiled = torch.compile(eager.views_block, backend="eager", fullgraph=True)
    for kind in ("attention", "mlp"):
        assert torch.equal(compiled(model, kind, x, 3), eager.views_block(model, kind, x, 3))


@pytest.mark.parametrize("heads", HEADS)
def test_cut_has_the_shapes_and_values_of_extract(heads):
    _, model = make("inference")
    expected = extract(model, heads)
    parts = cut(dict(model.named_parameters()), model, heads)
    assert parts.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parts.items())


@pytest.mark.skipif("native" not in BY_NAME, reason="the native backend was not built")
def test_a_backend_that_cannot_run_says_why():
    workload, model = make("inference")
    with pytest.raises(Absent, match="computes in torch.float32 on the CPU, not in torch.float64"):
        BY_NAME["native"].inference(model.double(), make_images(workload, CPU).double(), HEADS)
