"""``hydravit compress``: a checkpoint in, a checkpoint out that every other command takes."""

import pytest
import torch

from hydravit import HydraViT, HydraViTConfig, fused_model
from hydravit.checkpoint import read_checkpoint, save_checkpoint
from hydravit.cli import main
from hydravit.data import load_dataset

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = HydraViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=10, depth=2, max_heads=4, head_dim=8)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", split="test")


@pytest.fixture(scope="module")
def vit(tmp_path_factory, digits):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("compress") / "vit.safetensors"
    model = HydraViT(TINY, backend="reference")
    save_checkpoint(path, model, preprocessing=digits.preprocessing, class_names=digits.class_names)
    return path


def hydravit(*arguments):
    return main([str(argument) for argument in arguments])


def compress(checkpoint, *arguments):
    return hydravit("compress", "--checkpoint", checkpoint, *arguments)


@pytest.mark.parametrize(
    ("method", "geometry", "widths"),
    [
        (["wpac"], "skd", "1, 2, 3, 4"),
        (["wpac", "--fold-mean", "--balanced"], "skd", "1, 2, 3, 4"),
        (["order-heads"], "hydravit", "1, 2, 3, 4"),
    ],
    ids=" ".join,
)
def test_every_other_command_takes_the_result(method, geometry, widths, vit, digits, tmp_path, capsys):
    out = tmp_path / "narrow.safetensors"
    assert compress(vit, "--method", *method, "--data", "digits", "--images", 100, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"geometry {geometry}, heads {widths}" in printed and "differ by" in printed
    checkpoint = read_checkpoint(out)
    assert checkpoint.class_names == digits.class_names and checkpoint.preprocessing == digits.preprocessing
    assert checkpoint.method.startswith(method[0]) and checkpoint.method.endswith("100 images of digits")
    before, after = (fused_model(checkpoint=path).eval() for path in (vit, out))
    with torch.inference_mode():
        torch.testing.assert_close(after(digits.images), before(digits.images), rtol=1e-5, atol=1e-5)

    assert hydravit("info", "--checkpoint", out) == 0
    assert checkpoint.method in capsys.readouterr().out
    assert hydravit("evaluate", "--checkpoint", out, "--data", "digits", "--accuracy-only", "--heads", "all") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:5]] == list("1234")
    again = tmp_path / "again.safetensors"
    assert compress(out, "--method", "wpac", "--data", "digits", "--out", again) == 0


def test_the_same_command_gives_the_same_file(vit, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        assert compress(vit, "--method", "wpac", "--data", "digits", "--out", file) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_wrong_arguments_are_one_line(vit, tmp_path, capsys):
    out = ("--data", "digits", "--out", tmp_path / "x.safetensors")
    cases = {
        ("--method", "order-heads", "--balanced", *out): "--fold-mean and --balanced are options of --method wpac",
        ("--method", "wpac", *out[:3], tmp_path / "x.bin"): "x.bin",
        ("--method", "wpac", "--device", "toaster", *out): "toaster",
        ("--method", "wpac", "--data", "cifar10", *out[2:]): "neither digits, fashion-mnist nor a folder",
    }
    for arguments, message in cases.items():
        assert compress(vit, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        compress(vit, "--method", "magic", *out)
