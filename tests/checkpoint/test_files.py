"""Checkpoint files: round trips, wrappers, damaged files, full disks."""

import argparse
import dataclasses
import io
import os
import pathlib
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import SMALL, images, make, quietly, same

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
    about = {"preprocessing": preprocessing, "class_names": names, "method": "wpac"}
    save_checkpoint(path, model, trained_heads=(2, 4), **about)
    checkpoint = read_checkpoint(path)
    assert checkpoint.config == model.config
    assert checkpoint.trained_heads == (2, 4)
    assert checkpoint.preprocessing == preprocessing
    assert checkpoint.class_names == tuple(names)
    assert checkpoint.method == "wpac"
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
        with pytest.raises(ValueError, match=r"trained_heads must be widths in 1\.\.4"):
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


PREFIXES = (
    "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "student.", "teacher.backbone.",
    "net.", "encoder.", "module.model.net._orig_mod.", "visual.trunk.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_removed(tmp_path, prefix):
    model = make()
    prefixed = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": prefixed, "epoch": 3}, tmp_path / "a.pt")
    save_file(prefixed, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        loaded = quietly(fused_model, checkpoint=tmp_path / name, head_dim=16, backend="reference")
        assert same(loaded, model)
    compiled = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in prefixed.items()}
    again = make()
    load_weights(again, compiled)
    assert same(again, model)
    with pytest.raises(ValueError, match="no place for text.weight"):
        load_weights(again, prefixed | {"text.weight": torch.ones(2)})


CONTAINERS = {
    "student and teacher": lambda s, t: {"student": s, "teacher": t, "epoch": 1},
    "model and teacher": lambda s, t: {"model": s, "teacher": {"module": t}},
    "prefixes": lambda s, t: {"model": prefixed("student.backbone.", s) | prefixed("teacher.backbone.", t)},
    "with heads": lambda s, t: (
        prefixed("student.", s) | prefixed("teacher.", t) | {"student.dino_head.last": torch.ones(1)}
    ),
    "encoders": lambda s, t: {
        "encoder": prefixed("module.", s),
        "target_encoder": t,
        "predictor": {"a": torch.ones(1)},
    },
}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("case", CONTAINERS)
def test_several_models_in_a_file_ask(case):
    first, second = make(), make()
    content = CONTAINERS[case](first.state_dict(), second.state_dict())
    names = {"encoders": ("encoder", "target_encoder"), "model and teacher": ("model", "teacher")}
    for part, expected in zip(names.get(case, ("student", "teacher")), (first, second), strict=True):
        file = io.BytesIO()
        torch.save(content, file)
        with pytest.raises(ValueError, match=rf"several models; part= chooses one of .*{part}"):
            read_checkpoint(io.BytesIO(file.getvalue()))
        with pytest.raises(ValueError, match="there is no 'nobody' in it; part= chooses one of"):
            read_checkpoint(io.BytesIO(file.getvalue()), part="nobody")
        model = make()
        quietly(load_weights, model, read_checkpoint(io.BytesIO(file.getvalue()), part=part), strict=False)
        assert same(model, expected)


def test_what_lies_beside_the_weights_is_no_model():
    model, file = make(), io.BytesIO()
    optimizer = torch.optim.AdamW(model.parameters())
    model(images(model.config)).sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(output=pathlib.Path("runs"), metric=np.float64(2.0))
    content = {
        "epoch": np.int64(3),
        "optimizer": optimizer.state_dict(),
        "args": arguments,
        "rng": torch.get_rng_state(),
    }
    content |= {"callbacks": {"best": {"score": torch.ones(())}}, "my_net": model.state_dict()}
    torch.save(content, file)
    file.seek(0)
    loaded = quietly(fused_model, checkpoint=file, head_dim=16, backend="reference")
    assert same(loaded, model)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_in_memory_and_open_files(tmp_path, suffix):
    model, path = make(), tmp_path / f"a{suffix}"
    save_checkpoint(path, model, trained_heads=(2, 4))
    with open(path, "rb") as file:
        for source in (file, io.BytesIO(path.read_bytes())):
            loaded = fused_model(checkpoint=source, backend="reference")
            assert same(loaded, model) and loaded.trained_heads == (2, 4)
    with pytest.raises(ValueError, match="checkpoint in memory cannot be read"):
        fused_model(checkpoint=io.BytesIO(path.read_bytes()[:200]))


def test_files_of_the_authors_tell_their_widths_and_crop():
    """Their script is timm's with ``--heads``; it stores its arguments."""
    config = dataclasses.replace(SMALL, head_dim=64, max_heads=3, depth=1)
    model = make(config)
    arguments = argparse.Namespace(model="hydravit_dyn_patch16_224", heads=[2, 3], img_size=32, gp=None, crop_pct=None)
    content = {"arch": "hydravit", "state_dict": model.state_dict(), "args": arguments}
    checkpoint = in_memory(content)
    assert checkpoint.trained_heads == (2, 3)
    assert checkpoint.preprocessing == Preprocessing(image_size=32, crop=0.875)
    loaded = fused_model(checkpoint=checkpoint, backend="reference")  # and asks nothing
    assert same(loaded, model) and loaded.allowed_heads == (2, 3)
    arguments.crop_pct, arguments.input_size = 1.0, [3, 32, 32]
    assert in_memory(content).preprocessing.crop == 1.0
    separate = make(config, separate_classifiers=(2, 3))
    state = separate.state_dict()
    for kind in ("weight", "bias"):
        state |= {f"heads.{i}.{kind}": part for i, part in enumerate(state.pop(f"head.{kind}"))}
    loaded = fused_model(checkpoint=in_memory({**content, "state_dict": state}), backend="reference")
    assert same(loaded, separate) and loaded.config.separate_classifiers == (2, 3)
    arguments.model = "vit_tiny_patch16_224"  # timm's own script has no such argument
    assert in_memory(content).trained_heads is None and in_memory(content).preprocessing is None


def in_memory(content):
    file = io.BytesIO()
    torch.save(content, file)
    return read_checkpoint(io.BytesIO(file.getvalue()))


def test_what_is_in_the_way_is_named_without_bad_advice(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    for content, found in (
        ({"model": make()}, "hydravit.model.HydraViT"),
        ({"state_dict": make().state_dict(), "optimizer": torch.optim.SGD([torch.ones(1)])}, "torch.optim.sgd.SGD"),
        ({"state_dict": print}, "print"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError) as caught:
            fused_model(checkpoint=path)
        message = str(caught.value)
        assert f"it holds a {found}," in message and "write model.state_dict() instead" in message
        assert not any(word in message for word in ("\n", "\x1b", "weights_only", "trust"))
    for content in (b"not a checkpoint at all", b"\x80\x02garbage", b"PK\3\4" + bytes(50), b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.pt cannot be read; expected a whole torch file of tensors") as caught:
            fused_model(checkpoint=path)
        assert not any(word in str(caught.value) for word in ("\n", "\x1b", "weights_only", "trust"))


# What a bad file holds, how the file is called, and what the message says besides the file's name.
BAD_FILES = {
    "empty torch": (b"", "a.pt", "cannot be read"),
    "empty safetensors": (b"", "a.safetensors", "cannot be read; expected a whole safetensors file"),
    "text": (b"not a checkpoint at all", "a.pth", "cannot be read; expected a whole torch file"),
    "html as safetensors": (b"<html>404 not found</html>", "a.safetensors", "cannot be read"),
    "no tensors": ([1, 2], "a.pt", "expected named tensors, found list"),
    "nothing": ({}, "a.pt", "expected named tensors, found dict with nothing in it"),
    "a number among tensors": ({"pos_embed": torch.ones(1), "epoch": 3}, "a.pt", "'epoch' is a int, not a tensor"),
    "code": ({"state_dict": print}, "a.pt", "cannot be read; it holds a print,"),
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


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_flipped_bits_never_load_other_weights(tmp_path, suffix):
    path, model = tmp_path / f"model{suffix}", make(depth=1, num_classes=2)
    save_checkpoint(path, model, trained_heads=(2, 4))
    whole, expected = path.read_bytes(), read_checkpoint(path)
    draws = torch.randint(8 * len(whole), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    refused = 0
    for bit in [*range(8 * 8), *draws]:  # the first bytes are the header's length, or zip's mark
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        # What no record holds, such as times and padding of zip, changes nothing.
        assert found.config == expected.config and found.trained_heads == expected.trained_heads
        assert all(torch.equal(found.state_dict[name], value) for name, value in expected.state_dict.items())
    assert refused > 250
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for file in (path, io.BytesIO(flipped)):
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="not what its checksum says, so it is damaged"):
            read_checkpoint(file)
    assert read_checkpoint(path, verify=False).config == expected.config


def test_files_without_checksums_are_read(tmp_path):
    model = make()
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(model.state_dict(), tmp_path / "fast.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("theirs.safetensors", "old.pt", "fast.pt"):
        found = read_checkpoint(tmp_path / name).state_dict
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_equal_models_are_equal_files(tmp_path, suffix):
    names = ["a", "\u00e9\n", '"']
    for i in range(6):  # safetensors puts the entries of metadata into a random order
        save_checkpoint(tmp_path / f"{i}{suffix}", make_seeded(), trained_heads=(1, 4), class_names=names)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert read_checkpoint(tmp_path / f"0{suffix}").class_names == tuple(names)


def make_seeded():
    torch.manual_seed(0)
    return make(num_classes=3)


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


OTHERS = {
    "vit.embeddings.cls_token": "a ViT of Hugging Face's transformers",
    "encoder.layer.0.attention.attention.query.weight": "a ViT of Hugging Face's transformers",
    "dinov2.embeddings.patch_embeddings.projection.weight": "a ViT of Hugging Face's transformers",
    "vision_model.encoder.layers.0.self_attn.k_proj.weight": "CLIP or SigLIP of Hugging Face's transformers",
    "visual.transformer.resblocks.0.attn.in_proj_weight": "CLIP of OpenAI or OpenCLIP",
    "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": "torchvision's VisionTransformer",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_libraries_are_named(name, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(4, 4), "classifier.weight": torch.zeros(2, 4)}, path)
    for load in (fused_model, partial(fused_model, config="tiny", strict=False)):
        with pytest.raises(ValueError) as caught:
            load(checkpoint=path)
        text = str(caught.value)
        assert f"these are weights of {OTHERS[name]} ({name}, ...)" in text and "timm.create_model(NAME" in text
        assert str(path) in text and "\n" not in text
