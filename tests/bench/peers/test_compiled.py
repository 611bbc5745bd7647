"""Peers that compile or export the width: right at all widths together, from caches too, or absent with a reason."""

import dataclasses
import importlib.util
import os
import subprocess
import sys

import plain
import pytest
import torch
from small import SMALL

from bench.measuring.peer import Absent
from bench.measuring.workloads import Workload, make_images, make_labels, make_model, make_residual
from bench.peers import compiled, runtimes

HEADS = (1, 3)
CONFIG = dataclasses.replace(SMALL, depth=1)
WORKLOAD = Workload("inference", HEADS, 2, config=CONFIG)
CPU = torch.device("cpu")
PEERS = {peer.name: peer for peer in [*compiled.PEERS, *runtimes.PEERS]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    for module in (compiled, runtimes):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    return tmp_path


def exact(model, images):
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    return {k: plain.forward(weights, model.config, plain.prefix(model.config, k), images.double()) for k in HEADS}


def close(actual, expected):
    return torch.linalg.vector_norm(actual - expected) < 1e-5 * torch.linalg.vector_norm(expected)


def check(closures, expected):
    assert list(closures) == list(HEADS)
    for _ in range(2):  # in turns, all held ready
        for k, run in closures.items():
            assert close(run(), expected[k]), k


def files(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "exported").rglob("vit.*")}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes(name, cache, capfd):
    for package in {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    model, images = make_model(WORKLOAD, CPU), make_images(WORKLOAD, CPU)
    expected = exact(model, images)
    ready = PEERS[name].inference(model, images.clone(), HEADS)
    rubbish = [torch.full_like(images, float("nan")) for _ in range(100)]  # takes the images' memory if it was released
    check(ready, expected)
    del rubbish
    first = files(cache)
    assert capfd.readouterr() == ("", "")
    check(PEERS[name].inference(model, images, HEADS), expected)
    assert first and files(cache) == first
    with torch.no_grad():
        model.head.bias.add_(1.0)  # other weights need another file
    run = PEERS[name].inference(model, images, HEADS[:1])[HEADS[0]]
    assert close(run(), exact(model, images)[HEADS[0]])
    assert len(files(cache)) == len(first) * 3 / 2


_SIGNALLED = """
import signal, sys
import torch
from bench.measuring.workloads import Workload, make_images, make_model
from bench.peers.runtimes import PEERS
from hydravit import HydraViTConfig

config = HydraViTConfig(image_size=8, patch_size=4, depth=1, max_heads=1, head_dim=4, num_classes=2)
workload, cpu = Workload("inference", (1,), 1, config=config), torch.device("cpu")
peer = next(peer for peer in PEERS if peer.name == "openvino")
ready = [peer.inference(make_model(workload, cpu), make_images(workload, cpu), (1,)) for _ in range(2)]
while ready:
    del ready[0]
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
signal.raise_signal(signal.SIGINT)
sys.exit(1)
"""


def test_a_signal_after_openvino_has_gone_is_handled():
    pytest.importorskip("openvino")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", _SIGNALLED], check=True, env=environment)


@pytest.mark.long
@pytest.mark.parametrize("name", ["compiled", "compiled-max", "compiled-sliced", "aot", "aot-max"])
def test_compiled(name, cache, capfd):
    model, images = make_model(WORKLOAD, CPU), make_images(WORKLOAD, CPU)
    expected = exact(model, images)
    ready = PEERS[name].inference(model, images, HEADS)
    check(ready, expected)
    first = files(cache)
    check(PEERS[name].inference(model, images, HEADS), expected)
    assert files(cache) == first
    check(ready, expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_sliced_steps():
    """Blocks and training give what eager autograd through the same slices gives."""
    from bench.peers import eager

    peer, reference = PEERS["compiled-sliced"], next(peer for peer in eager.PEERS if peer.name == "views")
    workload = WORKLOAD._replace(task="attention_backward", heads=(3,))
    model, (x, grad) = make_model(workload, CPU), make_residual(workload, CPU)
    for kind in ("attention", "mlp"):
        for gradient in (None, grad):
            step, right = (p.block(model, kind, 3, x, gradient) for p in (peer, reference))
            torch.testing.assert_close(step.outputs(), right.outputs(), rtol=1e-4, atol=1e-5)
    workload = WORKLOAD._replace(task="training")
    data = make_images(workload, CPU), make_labels(workload, CPU)
    steps, right = (p.training(model, *data, HEADS, None) for p in (peer, reference))
    for k in HEADS:
        torch.testing.assert_close(steps[k].outputs(), right[k].outputs(), rtol=1e-4, atol=1e-5)
    steps[3].run()
    assert not torch.equal(steps[3].outputs()["head.bias"], right[3].outputs()["head.bias"])  # it stepped
    torch.testing.assert_close(model.state_dict(), make_model(workload, CPU).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, package", [("onnxruntime", "onnxruntime"), ("onnxruntime", "onnxscript"), ("openvino", "openvino")]
)
def test_missing_packages(name, package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(runtimes, "find_spec", lambda wanted: None if wanted == package else found(wanted))
    model, images = make_model(WORKLOAD, CPU), make_images(WORKLOAD, CPU)
    with pytest.raises(Absent, match=f"{package} is not installed"):
        PEERS[name].inference(model, images, HEADS)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_only_float32_on_the_cpu(name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    workload = WORKLOAD._replace(dtype="bf16")
    with pytest.raises(Absent, match="float"):
        PEERS[name].inference(make_model(workload, CPU), make_images(workload, CPU), HEADS)


def test_a_failure_to_compile_is_a_reason():
    with pytest.raises(Absent, match="^does not compile: no such operator$"), compiled.compiling():
        raise torch._dynamo.exc.Unsupported("no such operator\nand a trace")


@pytest.mark.long
def test_no_compiler():
    # Torch's own patch: pytest's would leave the option deleted, for every later test of the process.
    missing = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with missing, pytest.raises(Absent, match="does not compile: .*compiler"):
        PEERS["compiled"].inference(make_model(WORKLOAD, CPU), make_images(WORKLOAD, CPU), (1,))
