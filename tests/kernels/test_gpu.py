"""On a CUDA device: values and gradients in every dtype, graph capture, moving there and back, and what is refused."""

import copy
import math

import plain
import pytest
import small
import torch
from budget import Draws, assert_within_budget
from torch.utils.data import TensorDataset

import hydravit
from bench.measuring.cuda_graph import captured
from bench.measuring.machine import Machine
from bench.measuring.measure import measure
from bench.measuring.timer import Effort, Timer
from bench.measuring.workloads import Workload
from bench.peers import eager, ours
from hydravit.evaluation.latency import with_backend
from hydravit.recipes import AMP, Recipe
from hydravit.training import Trainer
from hydravit_kernels import backends

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.needs("GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Float32 means float32; by default convolutions round to TensorFloat-32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.needs("triton", "triton_compiler"))])
def model(request):
    return with_backend(small.make().to(DEVICE), request.param)


def plain_gradients(model, heads, images, grad, device, dtype, near):
    """Logits and every parameter's gradient of the plain network with the model's weights, by name."""
    images, *weights = (t.detach().to(device, dtype) for t in near([images, *model.parameters()]))
    names = [name for name, _ in model.named_parameters()]
    parameters = {name: weight.requires_grad_() for name, weight in zip(names, weights, strict=True)}
    logits = plain.forward(parameters, model.config, plain.prefix(model.config, heads), images)
    gradients = torch.autograd.grad(logits, list(parameters.values()), grad.to(device, dtype))
    return {"logits": logits, **dict(zip(parameters, gradients, strict=True))}


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_error_budget(model, dtype, heads):
    """Against float64 on the CPU, no worse than plain eager PyTorch on the same device: both ways of attention."""
    model = model.to(dtype)
    images = small.images(model.config).to(DEVICE, dtype)
    grad = torch.randn(2, model.config.num_classes).to(dtype)
    places = (DEVICE, dtype), ("cpu", torch.float64)
    draws = Draws(lambda near: [plain_gradients(model, heads, images, grad, *place, near) for place in places], dtype)
    with torch.inference_mode():
        logits = model(images, heads=heads)
    assert_within_budget(logits, draws["logits"], "logits without gradients")
    logits = model(images, heads=heads)
    assert_within_budget(logits, draws["logits"], "logits")
    logits.backward(grad.to(DEVICE))
    unread = small.poison(copy.deepcopy(model), [model.subnetwork(heads)])
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.cpu()
        assert_within_budget(gradient, draws[name], f"gradient of {name}")
        assert not gradient[unread.get_parameter(name).isnan().cpu()].any(), f"gradient of {name} outside the slice"


def test_one_width_per_image(model):
    images, widths = small.images(model.config, batch=4).to(DEVICE), [3, 1, 4, 3]
    logits = model(images, heads=torch.tensor(widths))
    alone = [model(image[None], heads=k) for image, k in zip(images, widths, strict=True)]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_captured_graph_replays_the_forward(model):
    """After calls on another stream."""
    images = small.images(model.config).to(DEVICE)
    side = torch.cuda.Stream()  # libraries set themselves up in the first calls, which may not happen in a capture
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(images, heads=3)
        model(images, heads=3)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(images, heads=3)
    for _ in range(2):
        images.copy_(small.images(model.config))
        graph.replay()
        torch.testing.assert_close(logits, model(images, heads=3), rtol=1e-5, atol=1e-5)


def test_there_and_back():
    model = hydravit.fused_model(config=small.SMALL).eval()
    small.shake(model)
    images, backend = small.images(model.config), model.backend
    with torch.inference_mode():
        expected = model(images, heads=3)
        torch.testing.assert_close(model.to(DEVICE)(images.to(DEVICE), heads=3).cpu(), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="images are on cpu, the model on cuda"):
            model(images)
        assert torch.equal(model.cpu()(images, heads=3), expected)
    assert model.backend == backend


def test_native_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="backend 'native': ") as error:
        hydravit.fused_model(config=small.SMALL, backend="native", device=DEVICE)
    assert backends.report(DEVICE)["native"] in str(error.value)


def test_auto_falls_back_and_says_so(monkeypatch):
    monkeypatch.delenv("HYDRAVIT_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_fallbacks_told", set())
    with pytest.warns(UserWarning, match="using backend 'reference', because native "):
        model = hydravit.fused_model(config=small.SMALL, device=DEVICE)
    assert model.backend == "reference"


@pytest.mark.parametrize("amp", AMP)
@pytest.mark.parametrize("optimizer", ["dense", "active"])
def test_training(model, amp, optimizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, labels = small.images(model.config, batch=8), torch.arange(8)
    recipe = Recipe(
        config=model.config, heads=(1, 4), epochs=2, batch_size=4, lr=1e-3, warmup_epochs=0, clip_norm=1.0,
        optimizer=optimizer, ema=0.99, amp=amp, seed=3,  # draws 1, 4, 4, 4: a scaler may skip the first steps
    )  # fmt: skip
    Trainer(model, recipe, TensorDataset(images, labels), progress=False).run()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]), name


def test_sanitizer(model):
    """What the compute sanitizer watches: few and small launches, and all of ours."""
    images = small.images(model.config, batch=1).to(DEVICE)
    for heads in (1, 4):
        model.zero_grad()
        model(images, heads=heads).square().sum().backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters()])
        assert math.isfinite(norms.sum())


# The benchmark suite on a GPU. ----------------------------------------------------------------------------------------

QUICK = Effort(rounds=2, most=2, seconds=0.0, attempts=1)


@pytest.mark.parametrize("task, heads", [("inference", (3,)), ("switching", (1, 3)), ("mlp_backward", (3,))])
def test_the_suite_measures(task, heads):
    """By events and by graphs; what cannot be captured is named and breaks nothing for those after it."""
    workload = Workload(task, heads, 2, config=small.SMALL)
    rows = measure(workload, [*eager.PEERS, *ours.PEERS], Timer(torch.device(DEVICE), QUICK))
    states = {(row["peer"], row["launch"]): row["status"] for row in rows}
    assert states["authors", "call"] == states["views", "call"] == states["views", "graph"] == "measured"
    assert states["authors", "graph"] == "absent"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(1, device=DEVICE)


def test_the_suite_measures_training():
    workload = Workload("training", (1, 3), 2, config=small.SMALL)
    rows = measure(workload, [*eager.PEERS, *ours.PEERS], Timer(torch.device(DEVICE), QUICK))
    states = {(row["peer"], row["launch"]): (row["status"], row["reason"]) for row in rows}
    assert states["views", "call"] == states["views", "graph"] == ("measured", ""), states


def test_a_failed_capture_is_survived():
    def reads():
        return torch.ones(1, device=DEVICE).item()

    for run in (reads, lambda: None):  # waits; leaves the graph empty
        with pytest.raises(Exception, match="."):
            captured(run, torch.device(DEVICE))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert captured(lambda: torch.ones(2, device=DEVICE).mul(2), torch.device(DEVICE))().sum() == 4


def test_limits_of_the_gpu():
    machine = Machine(torch.device(DEVICE), ["bf16", "fp32"])
    machine.probe()
    assert machine.environment()["peak_gflops"]["bf16"] > machine.environment()["peak_gflops"]["fp32"] > 100
