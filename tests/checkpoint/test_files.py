"""Checkpoint files: round trips, wrappers, damaged files, full disks."""

import argparse
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from small import SMALL, images, make, same

from hydravit import fused_model
from hydravit.checkpoint import load_weights, read_checkpoint, save_checkpoint
from hydravit.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("variant", [{}, {"separate_classifiers": (2, 4)}, {"image_size": (16, 40)}], ids=str)
def test_round_trip_keeps_everything(tmp_path, suffix, variant):
    model, path = make(**variant), tmp_path / f"model{suffix}"
    preprocessing = Preprocessing.for_model(model.config, interpolation="bilinear")
    names = [f"class {i}" for i in range(10)]
    save_checkpoint(path, model, trained_heads=(2, 4), preprocessing=preprocessing, class_names=names)
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == model.config
    assert checkpoint.trained_heads == (2, 4)
    assert checkpoint.preprocessing == preprocessing
    assert checkpoint.class_names == tuple(names)
    loaded = fused_model(checkpoint=path, backend="reference")
    assert same(model, loaded)
    assert loaded.training and loaded.heads == 4
    refused = "3 has no classifier" if "separate_classifiers" in variant else "3 was not trained"
    with pytest.raises(ValueError, match=refused):
        loaded(images(loaded.config), heads=3)
    if not variant.get("separate_classifiers"):
        loaded = fused_model(3, checkpoint=path, backend="reference", allow_untrained=True)
        assert loaded.heads == 3
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_trained_widths_are_kept_once_and_ascending(tmp_path):
    model = make()
    save_checkpoint(tmp_path / "ours.safetensors", model, trained_heads=[4, 2, 4])
    theirs = {"config": SMALL.to_dict(), "trained_heads": [4, 2, 4]}
    torch.save({"state_dict": model.state_dict(), "hydravit": theirs}, tmp_path / "theirs.pt")
    for name in ("ours.safetensors", "theirs.pt"):
        assert read_checkpoint(tmp_path / name).trained_heads == (2, 4)
    for wrong in ([], [5], [1, "2"], 3):
        with pytest.raises(ValueError, match=r"trained_heads must be numbers of heads in 1\.\.4"):
            save_checkpoint(tmp_path / "a.pt", model, trained_heads=wrong)


def test_low_precision_and_wrapped_models_are_saved_as_they_are(tmp_path):
    model = make().to(torch.bfloat16)
    save_checkpoint(tmp_path / "a.safetensors", torch.nn.DataParallel(model))
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert set(checkpoint.state_dict) == set(model.state_dict())
    assert checkpoint.state_dict["pos_embed"].dtype == torch.bfloat16
    assert checkpoint.trained_heads is None and checkpoint.preprocessing is None and checkpoint.class_names is None


def test_wrappers_and_prefixes(tmp_path):
    average, latest = make(), make()
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in latest.state_dict().items()}
    swa = {"n_averaged": torch.tensor(3)} | {f"module.{n}": t for n, t in average.state_dict().items()}
    arguments = argparse.Namespace(model="hydravit_dyn_patch16_224", lr=0.1)
    path = tmp_path / "timm.pth.tar"
    for content in (
        {"state_dict": prefixed, "state_dict_ema": average.state_dict(), "args": arguments, "epoch": 3},
        {"model": {"state_dict": prefixed}, "model_ema": swa},
    ):
        torch.save(content, path)
        for prefer_ema, expected in ((True, average), (False, latest)):
            model = make()
            assert load_weights(model, read_checkpoint(path, prefer_ema=prefer_ema)) == []
            assert same(model, expected)
    torch.save(prefixed, path)
    model = make()
    load_weights(model, read_checkpoint(path))
    assert same(model, latest)


# What a bad file holds, how the file is called, and what the message says besides the file's name.
BAD_FILES = {
    "empty torch": (b"", "a.pt", "cannot be read"),
    "empty safetensors": (b"", "a.safetensors", "cannot be read; expected a whole safetensors file"),
    "text": (b"not a checkpoint at all", "a.pth", "cannot be read; expected a whole torch file"),
    "html as safetensors": (b"<html>404 not found</html>", "a.safetensors", "cannot be read"),
    "no tensors": ([1, 2], "a.pt", "expected named tensors, found list"),
    "nothing": ({}, "a.pt", "expected named tensors, found dict with nothing in it"),
    "a number among tensors": ({"pos_embed": torch.ones(1), "epoch": 3}, "a.pt", "'epoch' is a int, not a tensor"),
    "code": ({"state_dict": print}, "a.pt", "cannot be read"),
    "twice": ({"a": torch.ones(1), "module.a": torch.ones(1)}, "a.pt", "'a' occurs twice"),
    "unknown field": ({"hydravit": {"config": {"widht": 3}}}, "a.pt", "unknown config field.*widht"),
    "wrong field": ({"hydravit": {"config": {"depth": "x"}}}, "a.pt", "depth must be an integer"),
    "wrong metadata": ({"hydravit": 3}, "a.pt", "metadata 'hydravit' must be a dict"),
    "untrainable": (
        {"hydravit": {"config": {}, "trained_heads": [13]}},
        "a.pt",
        r"trained_heads .*1\.\.12, not \[13\]",
    ),
    "no trained widths": ({"hydravit": {"trained_heads": []}}, "a.pt", r"trained_heads must be .*not \[\]"),
    "a trained bool": ({"hydravit": {"trained_heads": [True]}}, "a.pt", r"trained_heads must be .*not \[True\]"),
    "a trained text": ({"hydravit": {"trained_heads": "12"}}, "a.pt", "trained_heads must be .*not '12'"),
    "no config": ({"hydravit": {"config": 3}}, "a.pt", "config must be a dict of fields, not int"),
    "class names": ({"hydravit": {"config": {}, "class_names": ["a"]}}, "a.pt", "class_names must be 1000"),
    "preprocessing": ({"hydravit": {"preprocessing": {"crop": 2}}}, "a.pt", "crop must be in"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, case):
    content, name, message = BAD_FILES[case]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if isinstance(content, dict) and "hydravit" in content:
            content = {"state_dict": make().state_dict(), **content}
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        fused_model(checkpoint=path)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, suffix, part):
    path = tmp_path / f"model{suffix}"
    save_checkpoint(path, make())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(ValueError, match="cannot be read; expected a whole") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_bad_safetensors_metadata(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path, {"hydravit": "{"})
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read"):
        read_checkpoint(path)


def test_missing_files_and_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        fused_model(checkpoint=tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"must end in .safetensors, .pt or .pth, not 'a.bin'"):
        save_checkpoint(tmp_path / "a.bin", make())
    with pytest.raises(OSError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "a.pt", make())
    with pytest.raises(TypeError, match="model must be a HydraViT, not Linear"):
        save_checkpoint(tmp_path / "a.pt", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="class_names must be 10"):
        save_checkpoint(tmp_path / "a.pt", make(), class_names=["one"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, suffix):
    """The operating system itself refuses to let the file grow, halfway through; the library's own writers run."""
    path = tmp_path / f"model{suffix}"
    model = make()
    save_checkpoint(path, model)
    before, limit = path.read_bytes(), path.stat().st_size // 2
    script = (
        "import resource, signal, sys\n"
        "from hydravit.checkpoint import save_checkpoint\n"
        "from hydravit import fused_model\n"
        "path = sys.argv[1]\n"
        "model = fused_model(checkpoint=path, backend='reference')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    save_checkpoint(path, model)\n"
        "except OSError as error:\n"
        "    print('refused', error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused") and str(path) in done.stdout
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
