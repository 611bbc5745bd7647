"""What PyTorch asks of an op and a module: schemas, fakes, torch.compile at every width, memory, DDP."""

import copy
import sys

import pytest
import torch
import torch.utils._python_dispatch
from op_calls import calls
from small import check_gradients
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard

import hydravit
from hydravit import HydraViTConfig
from hydravit.config import resolve_config
from hydravit.training import SliceGradients
from hydravit_kernels import ops

native = pytest.mark.needs("native")

TWELVE = HydraViTConfig(image_size=32, patch_size=8, depth=2, max_heads=12, head_dim=8, num_classes=10)


@native
@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(name):
    """Schema (mutation and aliasing), fake kernel and tracing with symbolic sizes agree with the real kernel."""
    op = getattr(torch.ops.hydravit, f"{name}_native").default
    torch.library.opcheck(op, calls()[name], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def compiled(kernels, compiler="aot_eager", trained_heads=None, **overrides):
    torch._dynamo.reset()
    counters.clear()
    model = hydravit.HydraViT(resolve_config(TWELVE, **overrides), trained_heads=trained_heads, backend=kernels)
    return model, torch.compile(model, fullgraph=True, backend=compiler)


ORDERS = {"falling": range(12, 0, -1), "rising": range(1, 13), "mixed": [5, 1, 12, *range(2, 12)]}


@native
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", ["argument", "attribute"])
@pytest.mark.parametrize("grad", [False, True])
def test_two_graphs_serve_twelve_widths(way, grad, order):
    model, graph = compiled("native")
    images = torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(grad):
        for heads in ORDERS[order]:
            if way == "argument":
                logits = graph(images, heads=heads)
            else:
                model.heads = heads
                logits = graph(images)
            expected = model(images, heads=heads)
            torch.testing.assert_close(logits, expected)
            if grad and heads in (1, 5):
                check_gradients(model, logits, expected)
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]


@native
def test_one_graph_serves_every_mixture_of_widths():
    model, graph = compiled("native")
    images = torch.randn(3, 3, 32, 32)
    for widths in ([1, 12, 5], [3, 3, 3], [7, 2, 11]):
        logits = graph(images, heads=torch.tensor(widths))
        torch.testing.assert_close(logits, model(images, heads=torch.tensor(widths)))
        check_gradients(model, logits, model(images, heads=torch.tensor(widths)))
    assert counters["stats"]["unique_graphs"] == 1


def test_impossible_widths_in_a_compiled_mixture(backend):
    """What the values are is not known when the graph is made; the op finds it out, and no image gets another width."""
    model, graph = compiled(backend, trained_heads=(1, 3, 12))
    for impossible in (13, -1, 0, 2, 100):
        with pytest.raises(RuntimeError, match="width_index"):
            graph(torch.randn(3, 3, 32, 32), heads=torch.tensor([3, impossible, 1]))


@native
@pytest.mark.parametrize("config", [{}, {"separate_classifiers": (1, 3, 6, 9, 10, 11, 12)}])
def test_two_graphs_serve_widths_with_gaps(config):
    trained = None if config else (1, 3, 6, 9, 10, 11, 12)
    model, graph = compiled("native", trained_heads=trained, **config)
    images = torch.randn(2, 3, 32, 32)
    assert model.allowed_heads == (1, 3, 6, 9, 10, 11, 12)
    for heads in model.allowed_heads:
        torch.testing.assert_close(graph(images, heads=heads), model(images, heads=heads))
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]


def test_export_with_a_dynamic_batch(backend):
    model = hydravit.fused_model(3, config=TWELVE, backend=backend).eval()
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), model(images))


@native
def test_gradients_in_place_compile():
    """The buffers are inputs that the compiled backward mutates; still two graphs."""
    model, graph = compiled("native")
    images = torch.randn(2, 3, 32, 32)
    orders = [9, 4, 1, 12]
    expected = []
    for heads in orders:
        model.zero_grad()
        model(images, heads=heads).square().sum().backward()
        expected.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    gradients = SliceGradients(model)
    for heads, wanted in zip(orders, expected, strict=True):
        gradients.zero_()
        graph(images, heads=heads).square().sum().backward()
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]


@pytest.mark.parametrize(
    "kernels, compiler, graphs",
    [("reference", "aot_eager", 3), pytest.param("native", "inductor", 2, marks=[native, pytest.mark.long])],
)
def test_other_compilations(kernels, compiler, graphs):
    """The reference takes views of a symbolic width; one head has its own graph: PyTorch specialises size one."""
    model, graph = compiled(kernels, compiler)
    images = torch.randn(2, 3, 32, 32)
    for heads in (12, 3, 7, 1, 2):
        logits, expected = graph(images, heads=heads), model(images, heads=heads)
        torch.testing.assert_close(logits, expected)
        check_gradients(model, logits, expected)
    assert counters["stats"]["unique_graphs"] <= graphs


class LargestAllocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest tensor, in elements, that any op returned in storage that was not there before."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("heads", [1, 5, 12])
def test_forward_allocates_nothing_of_a_weights_size(backend, heads):
    """Few tokens and large weights: whatever is as large as the smallest sliced weight matrix would be a copy of it."""
    config = HydraViTConfig(image_size=32, patch_size=16, depth=2, max_heads=12, head_dim=32, num_classes=10)
    model = hydravit.fused_model(config=config, backend=backend).eval()
    images = torch.randn(1, 3, 32, 32)
    width = heads * config.head_dim
    with torch.no_grad(), LargestAllocation([images, *model.parameters()]) as seen:
        model(images, heads=heads)
    assert 0 < seen.largest <= config.tokens * 4 * width, seen.largest  # the hidden layer is the largest activation
    if heads > 1:
        assert seen.largest < width * width


def test_switching_width_prepares_nothing(backend):
    """The first call at a width resolves its slices; from then on nothing is made per width."""
    model, images = hydravit.fused_model(config=TWELVE, backend=backend), torch.randn(1, 3, 32, 32)
    for heads in range(1, 13):
        model(images, heads=heads)
    resolved = {heads: id(model.subnetwork(heads)) for heads in range(1, 13)}
    for heads in (3, 12, 3, 1):
        model(images, heads=heads)
    assert {heads: id(model.subnetwork(heads)) for heads in range(1, 13)} == resolved


def test_switching_width_is_a_few_calls_of_python():
    """All that another width adds to a call: setting it and looking its slices up; the suite of bench/ times it."""
    model, images, calls = hydravit.fused_model(config=TWELVE).eval(), torch.randn(1, 3, 32, 32), []
    with torch.inference_mode():
        for heads in (3, 4):
            model(images, heads=heads)
    with LargestAllocation([]) as seen:
        sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
        model.heads = 3
        model.select(None, 1)
        sys.setprofile(None)
    assert seen.largest == 0 and 0 < len(calls) < 40, calls


def _worker(rank, store, backend, queue, check):
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    torch.manual_seed(0)
    pairs = check(hydravit.fused_model(config=TWELVE, backend=backend), rank)
    error = max((a - b).abs().max().item() for a, b in pairs)
    if rank == 0:
        queue.put(error)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _ddp(model, rank):
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    images = torch.randn(4, 3, 32, 32)
    parallel(images[2 * rank : 2 * rank + 2], heads=(3, 7)[rank]).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    halves = [model(images[:2], heads=3).square().mean(), model(images[2:], heads=7).square().mean()]
    (sum(halves) / 2).backward()
    return [(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True)]


def _fsdp(model, rank):
    plain = copy.deepcopy(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    images = torch.randn(2, 3, 32, 32)
    model(images, heads=3).square().mean().backward()
    plain(images, heads=3).square().mean().backward()
    return [(a.grad.full_tensor(), b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("check", [_ddp, _fsdp])
def test_two_ranks(check, backend, tmp_path):
    """DDP with another width on every rank: full-size gradients make that an ordinary all-reduce. FSDP2 by blocks."""
    store = f"file://{tmp_path}/store"
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, store, backend, queue, check)) for rank in range(2)]
    for worker in workers:
        worker.start()
    assert queue.get(timeout=900) < 1e-5
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
