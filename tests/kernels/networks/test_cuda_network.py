"""The CUDA network on the emulator: what it packs and what it refuses. tests/inference compares its logits."""

import pytest
import torch
from small import SMALL_CUDA, images, make

from hydravit import HydraViT, HydraViTConfig
from hydravit.inference import make_network
from hydravit_kernels import CudaNetwork, to_e4m3
from hydravit_kernels.networks import cuda


def in_panels(rows):
    """8-bit rows as csrc/cuda/phase.h says they lie, panel by panel."""
    height, width = rows.shape[0] + -rows.shape[0] % 8, rows.shape[1] + -rows.shape[1] % 64
    padded = torch.nn.functional.pad(rows.view(torch.uint8), (0, width - rows.shape[1], 0, height - rows.shape[0]))
    # (eights of rows, row, panel, sixteens of channels, eights, pairs, channel)
    return padded.view(height // 8, 8, width // 64, 4, 2, 4, 2).permute(2, 0, 3, 1, 5, 4, 6).contiguous()


def hard_to_round():
    """All values of E4M3, the numbers halfway between two of them, and the neighbours of these, of both signs."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    found = torch.cat([values, middle, middle.nextafter(values[1:]), middle.nextafter(values[:-1])])
    return torch.cat([found, -found])


@pytest.mark.long
def test_packing_rounds_to_e4m3_as_pytorch_does(cuda_on_the_cpu):
    """Rows of zeros, of tiny and of huge numbers, of NaN and infinity; and rows of scale 1, which 448 gives."""
    model = make(SMALL_CUDA, in_channels=1, num_classes=70)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[3, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38])
        model.blocks[0].mlp.fc2.weight[:3].mul_(torch.tensor([[1e-30], [1e-37], [1e-42]]))
        for row, values in zip(model.blocks[1].mlp.fc1.weight, hard_to_round().split(191), strict=False):
            row[0], row[1 : 1 + len(values)] = -448.0, values
        model.blocks[1].attn.qkv.weight[5] = 0.0
    packed = make_network(model, torch.float8_e4m3fn, 1).packed.numpy().tobytes()
    for parameter in model.network_parameters().flat():
        if parameter is not None and parameter.dim() in (2, 4):
            rows, scales = to_e4m3(parameter)
            for expected in (*in_panels(rows), scales):
                assert expected.numpy().tobytes() in packed, parameter.shape


@pytest.mark.long
def test_e4m3_halves_what_is_packed(emulated):
    sizes = HydraViTConfig().sizes
    fp16, e4m3 = (emulated.CudaNetwork(sizes, dtype, 1, 0, "best") for dtype in ("float16", "float8_e4m3fn"))
    assert e4m3.packed_bytes <= 0.52 * fp16.packed_bytes


@pytest.mark.long
@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"head_dim": 32, "max_heads": 4}, "heads of 64 channels"),
        ({"max_heads": 17, "depth": 1}, "at most 1024"),
        ({"mlp_ratio": 2.625}, "hidden channels: a multiple of 64"),
        ({"num_classes": 0}, "a classifier expected"),
        ({"image_size": 256}, "attention needs .* bytes of shared memory"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_models_that_the_kernels_cannot_compute(cuda_on_the_cpu, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_network(make(SMALL_CUDA, **overrides), torch.bfloat16, 8)


@pytest.mark.long
def test_wrong_arguments_raise(cuda_on_the_cpu):
    model = make(SMALL_CUDA)
    parameters, sizes, subnetworks = model.network_parameters(), SMALL_CUDA.sizes, [model.subnetwork(1)]
    with pytest.raises(ValueError, match="^dtype: bfloat16, float16 or float8_e4m3fn expected, float32 given"):
        CudaNetwork(parameters, sizes, subnetworks, torch.float32, 1)
    with pytest.raises(ValueError, match="^loader: best or async expected, worst given"):
        CudaNetwork(parameters, sizes, subnetworks, torch.bfloat16, 1, "worst")
    with pytest.raises(ValueError, match="^positions: .* expected, 5 given"):
        cuda._cuda.CudaNetwork(sizes._replace(positions=5), "bfloat16", 1, 0, "best")
    without_norm = parameters._replace(head=parameters.head._replace(norm_weight=None, norm_bias=None))
    with pytest.raises(ValueError, match="^norm.weight: a tensor expected, None given"):
        CudaNetwork(without_norm, sizes, subnetworks, torch.bfloat16, 1)
    with pytest.raises(ValueError, match="^subnetworks: one for all images expected on CUDA, 2 given"):
        CudaNetwork(parameters, sizes, subnetworks, torch.bfloat16, 1).run(images(SMALL_CUDA), 2 * subnetworks)


def test_without_a_network_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    assert "was not built: " in CudaNetwork.why_not(torch.device("cuda"))
    assert "has no kernels for device 'meta'" in CudaNetwork.why_not(torch.device("meta"))
    with pytest.raises(RuntimeError, match="has no kernels for device 'meta'"):
        HydraViT(SMALL_CUDA).to("meta").engine()
