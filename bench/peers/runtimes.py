"""The extracted width exported to a file: AOTInductor, ONNX Runtime, OpenVINO. ``CACHE`` keeps the files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from bench import CACHE
from bench.measuring.peer import Absent, Peer
from bench.peers.compiled import compiling
from bench.peers.eager import plain_vit
from bench.peers.training import without_gradients
from hydravit import HydraViT


def _version(package: str) -> str:
    return f"{package} {version(package)}" if find_spec(package) else ""


def _need(*packages: str, extra: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise Absent(f"{package} is not installed (pip install 'hydravit[{extra}]')")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences exporters, which print a lot."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def _exported(
    suffix: str, vit: nn.Module, images: Tensor, export: Callable[[Path], object], **settings: object
) -> Path:
    """The file of this network for these shapes, in a folder of its own; ``export(path)`` makes it if it is missing.

    The file's name depends on weights, shape, dtype, device, the versions of the exporters, and ``settings``.
    """
    packages = [_version(package) for package in ("torch", "timm", "onnx", "onnxscript", "openvino")]
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    if images.is_cuda:
        machine += [torch.cuda.get_device_name(), torch.version.cuda]
    facts = [str(vit), tuple(images.shape), images.dtype, packages, machine, sorted(settings.items())]
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in vit.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    path = CACHE / "exported" / digest.hexdigest()[:32] / f"vit{suffix}"
    if not path.exists():
        part = path.with_name(f"{os.getpid()}{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet(), torch.no_grad():
            export(part)
        part.replace(path)
    return path


# AOTInductor. ---------------------------------------------------------------------------------------------------------


def _aot_inference(settings: dict, model: HydraViT, images: Tensor, heads: Sequence[int]):
    settings = {"freezing": True, **settings}

    def ready(k: int) -> Callable[[], Tensor]:
        vit = plain_vit(model, k).eval()

        def export(path: Path) -> None:
            program = torch.export.export(vit, (images,))
            configs = dict(settings)  # a copy, because it adds entries
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)

        with compiling():
            path = _exported(".pt2", vit, images, export, **settings)
            network = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
            run = without_gradients(partial(network, images))
            run()
        return run

    return {k: ready(k) for k in heads}


# ONNX Runtime. --------------------------------------------------------------------------------------------------------

OPSET = 20  # the first with Gelu, exact by default; 23 has Attention, which is slower on a CPU than what it replaces


def _onnxruntime_inference(model: HydraViT, images: Tensor, heads: Sequence[int]):
    _need("onnxruntime", extra="peers")
    _need("onnx", "onnxscript", extra="export")
    import onnxruntime

    if images.is_cuda or images.dtype != torch.float32:
        raise Absent("measured in float32 on the CPU only")
    return {k: _onnxruntime_ready(onnxruntime, plain_vit(model, k).eval(), images) for k in heads}


def _onnxruntime_ready(onnxruntime, vit: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def export(path: Path) -> None:
        torch.onnx.export(vit, (images,), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False)

    path = _exported(".onnx", vit, images, export, opset=OPSET)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Its threads spin between operators; if they went on after the call, they would slow the peer that runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits = images.new_empty(session.get_outputs()[0].shape)
    binding = session.io_binding()
    for bind, node, tensor in (
        (binding.bind_input, session.get_inputs()[0], images),
        (binding.bind_output, session.get_outputs()[0], logits),
    ):
        bind(node.name, "cpu", 0, numpy.float32, tuple(tensor.shape), tensor.data_ptr())

    def run(_bound: Tensor = images) -> Tensor:  # keeps the images alive: a binding holds only their address
        session.run_with_iobinding(binding)
        return logits

    run()
    return run


# OpenVINO. ------------------------------------------------------------------------------------------------------------


@cache
def openvino_core() -> Any:
    """The only one of this process, for ever.

    OpenVINO's CPU plugin gives the process another stack for signals, and the one before back when it goes. Of two that
    go in the order they came in, the second gives the first one's back, which is gone: the next signal with a handler,
    such as Ctrl-C, is then a segmentation fault (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


def _openvino_inference(model: HydraViT, images: Tensor, heads: Sequence[int]):
    if images.is_cuda:
        raise Absent("OpenVINO does not run on NVIDIA GPUs")
    _need("openvino", extra="peers")
    import openvino

    if images.dtype != torch.float32:
        raise Absent("measured in float32 only: the precision of other types is up to OpenVINO")
    return {k: _openvino_ready(openvino, plain_vit(model, k).eval(), images) for k in heads}


def _openvino_ready(openvino, vit: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    def export(path: Path) -> None:
        network = openvino.convert_model(vit, example_input=images, input=[tuple(images.shape)])
        openvino.save_model(network, path, compress_to_fp16=False)
        path.with_suffix(".bin").replace(path.parent / "vit.bin")

    path = _exported(".xml", vit, images, export)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    core = openvino_core()
    compiled = core.compile_model(core.read_model(path, path.with_suffix(".bin")), "CPU", settings)
    logits = images.new_empty(tuple(compiled.output(0).shape))
    request = compiled.create_infer_request()
    # Both tensors use torch's memory, so that a call copies nothing.
    request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(logits.numpy(), shared_memory=True))

    def run(_bound: Tensor = images) -> Tensor:  # keeps the images alive: a request holds only their address
        request.infer()
        return logits

    run()
    return run


PEERS = [
    Peer(
        "aot",
        "AOTInductor of the extracted width, weights frozen and packed",
        opaque=True,
        inference=partial(_aot_inference, {}),
    ),
    Peer(
        "aot-max",
        "AOTInductor of the extracted width, weights frozen and packed, max-autotune",
        opaque=True,
        inference=partial(_aot_inference, {"max_autotune": True}),
    ),
    Peer(
        "onnxruntime",
        "ONNX Runtime on the extracted width",
        version=_version("onnxruntime"),
        opaque=True,
        inference=_onnxruntime_inference,
    ),
    Peer(
        "openvino",
        "OpenVINO on the extracted width",
        version=_version("openvino"),
        opaque=True,
        inference=_openvino_inference,
    ),
]
