"""Checkpoints: round trips, foreign weights, damaged files, full disks; and the preprocessing they carry."""

import argparse
import errno
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small import SMALL, images, make

from hydravit import fused_model
from hydravit.config import resolve_config
from hydravit.fitting import infer_config, load_weights
from hydravit.preprocessing import IMAGENET_MEAN, Preprocessing
from hydravit.weights import Checkpoint, atomic_write, read_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def quietly(function, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Files ----------------------------------------------------------------------------------------------------------------


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


# Writing that fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("zip"), KeyError("x")]
)
def test_a_failing_writer_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")

    def writer(file):
        file.write_text("half of the ne")
        raise failure

    with pytest.raises(KeyError if isinstance(failure, KeyError) else OSError) as caught:
        atomic_write(path, writer)
    if not isinstance(failure, KeyError):
        assert str(path) in str(caught.value) and caught.value.__cause__ is failure
        assert caught.value.errno == getattr(failure, "errno", None)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_atomic_write_keeps_links_and_usual_permissions(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", lambda file: file.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    (tmp_path / "plain").write_text("")
    save_checkpoint(tmp_path / "a.safetensors", make())
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, suffix):
    """The operating system itself refuses to let the file grow, halfway through; the library's own writers run."""
    path = tmp_path / f"model{suffix}"
    model = make()
    save_checkpoint(path, model)
    before, limit = path.read_bytes(), path.stat().st_size // 2
    script = (
        "import resource, signal, sys\n"
        "from hydravit.weights import read_checkpoint, save_checkpoint\n"
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


# Fitting weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "variant", [{}, {"register_tokens": 2, "layer_scale": 0.1}, {"pool": "avg", "class_token": False}]
)
def test_a_smaller_vit_becomes_the_first_heads(heads, variant):
    small, model = make(max_heads=heads, **variant), make(**variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match=f"a ViT of {heads} heads becomes the first {heads} of 4"):
        messages = load_weights(model, small.state_dict())
    assert len(messages) == 1
    x = images(model.config)
    torch.testing.assert_close(model(x, heads=heads), small(x), rtol=1e-5, atol=1e-5)
    width = heads * 16
    for name, tensor in model.state_dict().items():
        if name.endswith("attn.qkv.weight"):
            assert torch.equal(tensor[64 + width : 128], before[name][64 + width : 128])
            assert torch.equal(tensor[:, width:], before[name][:, width:])
        elif name.endswith(("norm1.weight", "fc2.bias", "proj.bias")):
            assert torch.equal(tensor[width:], before[name][width:])


def test_one_classifier_serves_all_separate_ones():
    single, model = make(), make(separate_classifiers=(2, 3, 4))
    with pytest.warns(UserWarning, match="copied to every width's own"):
        load_weights(model, single.state_dict())
    x = images(model.config)
    for heads in (2, 3, 4):
        torch.testing.assert_close(model(x, heads=heads), single(x, heads=heads), rtol=1e-5, atol=1e-5)
    small = make(max_heads=2)
    quietly(load_weights, model, small.state_dict())
    torch.testing.assert_close(model(x, heads=2), small(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full_width", [True, False])
def test_listed_classifiers_are_stacked(full_width):
    source, model = make(separate_classifiers=(2, 4)), make(separate_classifiers=(2, 4))
    state = source.state_dict()
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    for i, heads in enumerate((2, 4)):
        state[f"head.{i}.weight"] = weight[i] if full_width else weight[i, :, : heads * 16]
        state[f"head.{i}.bias"] = bias[i]
    load_weights(model, state)
    x = images(model.config)
    for heads in (2, 4):
        assert torch.equal(model(x, heads=heads), source(x, heads=heads))
    with pytest.raises(ValueError, match=r"separate classifiers: .*separate_classifiers are \[\]"):
        load_weights(make(), state)
    for name, wrong in (("head.0.weight", (10, 65)), ("head.1.weight", (10,)), ("head.1.bias", (9,))):
        with pytest.raises(ValueError, match="separate classifiers differ in shape"):
            load_weights(model, state | {name: torch.ones(wrong)})


@pytest.mark.parametrize("separate", [(), (2, 4)])
def test_other_number_of_classes(separate):
    model = make(num_classes=5, separate_classifiers=separate)
    with pytest.warns(UserWarning, match="num_classes is 10, the model's is 5: its classifier is initialised anew"):
        load_weights(model, make(separate_classifiers=separate).state_dict())
    assert model.head.weight.std() < 0.05 and not model.head.bias.any()
    with pytest.warns(UserWarning, match="left out, because the model has num_classes=0"):
        load_weights(make(num_classes=0), make().state_dict())
    with pytest.warns(UserWarning, match="there is no classifier"):
        load_weights(make(), make(num_classes=0).state_dict())


def test_positions_of_prefix_tokens_do_not_change_the_function():
    covering, free = make(register_tokens=2), make(register_tokens=2, no_embed_class=True)
    x = images(covering.config)
    with pytest.warns(UserWarning, match="added to these tokens"):
        load_weights(free, covering.state_dict())
    torch.testing.assert_close(free(x), covering(x), rtol=1e-5, atol=1e-5)
    covering = make(register_tokens=2)
    with pytest.warns(UserWarning, match="zeros for the class and register tokens"):
        load_weights(covering, free.state_dict())
    torch.testing.assert_close(free(x), covering(x), rtol=1e-5, atol=1e-5)


def test_the_grid_of_the_checkpoint_is_known_from_its_config():
    source, model = make(image_size=(16, 64)), make()  # 2 x 8 patches and 4 x 4: as many
    load_weights(model, source.state_dict())
    assert torch.equal(model.pos_embed, source.pos_embed)
    messages = quietly(load_weights, model, Checkpoint(source.state_dict(), source.config))
    assert messages == ["pos_embed is resampled from 2 x 8 to 4 x 4"]


def test_norm_serves_the_other_pooling_and_old_layer_scale_names():
    source, model = make(), make(pool="avg")
    with pytest.warns(UserWarning, match="norm is used as fc_norm, because the model has pool='avg'"):
        load_weights(model, source.state_dict())
    assert torch.equal(model.fc_norm.weight, source.norm.weight)
    source, model = make(layer_scale=0.1), make(layer_scale=0.1)
    names = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
    state = {name.replace(name[8:], names.get(name[8:], name[8:])): t for name, t in source.state_dict().items()}
    assert "blocks.1.gamma_2" in state
    load_weights(model, state)
    assert same(model, source)


def test_distilled_deit():
    source, model = make(), make()
    state = source.state_dict()
    state["dist_token"] = torch.randn(1, 1, 64)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], torch.randn(1, 1, 64), state["pos_embed"][:, 1:]], 1)
    state |= {"head_dist.weight": torch.randn(10, 64), "head_dist.bias": torch.randn(10)}
    with pytest.raises(ValueError, match="distilled DeiT .*strict=False drops"):
        load_weights(model, state)
    with pytest.warns(UserWarning, match="dropped dist_token, head_dist"):
        load_weights(model, state, strict=False)
    assert same(model, source)


def test_not_strict_keeps_what_is_missing_and_drops_what_is_left():
    source, model = make(), make(register_tokens=2)
    tokens = model.reg_token.clone()
    messages = quietly(load_weights, model, source.state_dict() | {"extra": torch.ones(1)}, strict=False)
    assert messages == ["the checkpoint lacks reg_token", "the model has no place for extra"]
    assert torch.equal(model.reg_token, tokens) and torch.equal(model.pos_embed[:, 3:], source.pos_embed[:, 1:])
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1]) and not model.pos_embed[:, 1:3].any()
    model = make(pool="avg", class_token=False)
    quietly(load_weights, model, make(pool="avg").state_dict(), strict=False)


def without(name):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


# How good weights are spoilt, or the model differs from them, and what the message says.
BAD_WEIGHTS = {
    "foreign": (lambda s: {"conv1.weight": torch.ones(3)}, {}, "not the weights of a Vision.*found conv1.weight"),
    "missing": (without("blocks.1.mlp.fc1.bias"), {}, "the checkpoint lacks blocks.1.mlp.fc1.bias"),
    "half a head": (without("head.weight"), {}, "the checkpoint lacks head.weight"),
    "unexpected": (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, {}, "no place for .*q_norm"),
    "shape": (lambda s: s | {"cls_token": torch.ones(1, 2, 64)}, {}, "pos_embed has 17 tokens, 2 of them"),
    "token": (lambda s: s | {"cls_token": torch.ones(64)}, {}, r"cls_token has shape \(64,\); expected \(1,"),
    "flat head": (lambda s: s | {"head.weight": torch.ones(640)}, {}, r"head.weight has shape \(640,\); expected 2"),
    "transposed": (
        lambda s: s | {"blocks.0.mlp.fc1.weight": s["blocks.0.mlp.fc2.weight"]},
        {},
        r"blocks.0.mlp.fc1.weight has shape \(64, 256\); expected \(256, 64\)",
    ),
    "integers": (lambda s: s | {"pos_embed": s["pos_embed"].int()}, {}, r"floating-point .*pos_embed \(torch.int32\)"),
    "head": (lambda s: s | {"head.bias": torch.ones(3)}, {}, "head.weight is for 10 classes, head.bias for 3"),
    "positions": (lambda s: s | {"pos_embed": torch.ones(17, 64)}, {}, r"pos_embed has shape \(17, 64\)"),
    "grid": (lambda s: s | {"pos_embed": torch.ones(1, 20, 64)}, {}, "20 tokens, 1 of them .* nor a square"),
    "in_channels": (None, {"in_channels": 1}, "in_channels is 3, the model's is 1"),
    "patch_size": (None, {"patch_size": 16}, "patch_size is 8, the model's is 16"),
    "too wide": (None, {"max_heads": 2}, "the width is 64 channels, the model has only 32"),
    "other head dim": (None, {"head_dim": 24}, "only a multiple of head_dim 24 fits"),
    "other nesting": (None, {"max_heads": 8, "geometry": "matformer"}, "not 'matformer'"),
    "deeper": (None, {"depth": 3}, "lacks blocks.2.* and 8 more; depth is 2, expected 3"),
    "shallower": (None, {"depth": 1}, "no place for blocks.1.*; depth is 2, expected 1"),
    "hidden": (None, {"mlp_ratio": 2.0}, r"blocks.0.mlp.fc1.weight has shape \(256, 64\); expected \(128, 64\)"),
    "no bias": (None, {"qkv_bias": False}, "no place for blocks.0.attn.qkv.bias"),
    "registers": (None, {"register_tokens": 4}, "lacks reg_token"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_wrong_weights_are_refused_and_change_nothing(case):
    spoil, overrides, message = BAD_WEIGHTS[case]
    state, model = make().state_dict(), make(**overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, Checkpoint(spoil(state) if spoil else state, path="some/file.pt"))
    assert "some/file.pt" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Configs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"register_tokens": 2, "no_embed_class": True, "layer_scale": 1e-5},
        {"register_tokens": 2},
        {"pool": "avg", "class_token": False, "qkv_bias": False, "in_channels": 1},
        {"pool": "avg", "mlp_ratio": 2.5, "num_classes": 0},
    ],
    ids=str,
)
def test_config_from_shapes(variant):
    model = make(**variant)
    assert infer_config(model.state_dict(), head_dim=16) == model.config


def test_config_from_shapes_needs_help():
    state = make(image_size=(16, 40)).state_dict()
    with pytest.raises(ValueError, match="no square grid; pass the image_size"):
        infer_config(state, head_dim=16)
    assert infer_config(state, head_dim=16, image_size=(16, 40)).grid == (2, 5)
    for head_dim in (48, 0):
        with pytest.raises(ValueError, match=f"64 is not a multiple of head_dim {head_dim}"):
            infer_config(state, head_dim=head_dim)
    with pytest.raises(ValueError, match="pos_embed is missing"):
        infer_config(without("pos_embed")(state))
    with pytest.raises(ValueError, match="separate classifiers .* pass a config"):
        infer_config(make(separate_classifiers=(2,)).state_dict(), head_dim=16)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("patch_embed.proj.weight", (32, 3, 0, 0), r"damaged: patch_embed.proj.weight has shape \(32, 3, 0, 0\)"),
        ("patch_embed.proj.weight", (0, 3, 8, 8), r"damaged: patch_embed.proj.weight has shape \(0, 3, 8, 8\)"),
        ("patch_embed.proj.weight", (64, 3, 8, 4), "patches of 8 x 4 pixels; expected squares"),
        ("pos_embed", (1, 0, 64), "damaged: pos_embed has shape"),
        ("blocks.0.mlp.fc1.weight", (0, 64), "damaged: blocks.0.mlp.fc1.weight has shape"),
        ("head.weight", (640,), r"head.weight has shape \(640,\); expected \(classes, 64\)"),
    ],
)
def test_config_from_damaged_weights(name, shape, message):
    with pytest.raises(ValueError, match=message):
        infer_config(make().state_dict() | {name: torch.ones(shape)}, head_dim=16)
    model = make()
    with pytest.raises(ValueError):
        load_weights(model, make().state_dict() | {name: torch.ones(shape)})


@pytest.mark.parametrize("size", ["32", None, (32,), (32, 0), 30, True, 32.0], ids=str)
def test_config_from_shapes_refuses_a_wrong_image_size(size):
    with pytest.raises(ValueError, match=r"image_size .* must be one or two multiples of patch_size 8"):
        infer_config(make().state_dict(), head_dim=16, image_size=size)


def test_config_from_shapes_of_an_inexact_mlp_ratio():
    model = make(max_heads=1, head_dim=49, mlp_ratio=3 / 49)
    config = infer_config(model.state_dict(), head_dim=49)
    assert config == model.config and config.hidden == 3


def test_fused_model_and_the_config_of_a_checkpoint(tmp_path):
    model, path = make(), tmp_path / "model.safetensors"
    save_checkpoint(path, model, trained_heads=(1, 2, 4))
    assert same(fused_model(config=SMALL, checkpoint=path, backend="reference"), model)
    with pytest.raises(ValueError, match=r"config 'base' is not that of checkpoint .*model.safetensors: image_size"):
        fused_model(config="base", checkpoint=path)
    with pytest.raises(ValueError, match=r"depth 3 \(checkpoint: 2\)"):
        fused_model(config=resolve_config(SMALL, depth=3), checkpoint=path)
    with pytest.raises(ValueError, match="unknown config 'huge'"):
        fused_model(config="huge")
    with pytest.raises(ValueError, match="unknown config field.*colour"):
        fused_model(checkpoint=path, colour=True)
    with pytest.raises(ValueError, match="heads=3 was not trained"):
        fused_model(3, checkpoint=path)
    other = quietly(
        fused_model, 2, checkpoint=path, num_classes=3, image_size=48, dtype=torch.float64, backend="reference"
    )
    assert other.heads == 2 and other.trained_heads == (1, 2, 4) and other.config.depth == 2
    assert other(images(other.config).double()).shape == (2, 3)


def test_fused_model_of_plain_weights(tmp_path):
    model, path = make(), tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert same(fused_model(checkpoint=path, head_dim=16, backend="reference"), model)
    wider = quietly(fused_model, 4, config=resolve_config(SMALL, max_heads=6), checkpoint=path, backend="reference")
    x = images(model.config)
    torch.testing.assert_close(wider.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    resampled = quietly(fused_model, checkpoint=path, head_dim=16, image_size=(16, 40), backend="reference")
    assert resampled.config == resolve_config(SMALL, image_size=(16, 40))
    oblong = make(image_size=(16, 40))
    torch.save(oblong.state_dict(), path)
    with pytest.raises(ValueError, match="model.pt.*no square grid; pass the image_size"):
        fused_model(checkpoint=path, head_dim=16)
    assert same(fused_model(checkpoint=path, head_dim=16, image_size=(16, 40), backend="reference"), oblong)
    torch.save(without("pos_embed")(model.state_dict()), path)
    with pytest.raises(ValueError, match="model.pt.*pos_embed is missing"):
        fused_model(checkpoint=path)


# Preprocessing --------------------------------------------------------------------------------------------------------


def test_preprocessing_of_images_and_tensors():
    pixels = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    preprocess = Preprocessing(image_size=32)
    result = preprocess(image)
    assert result.shape == (3, 32, 32) and result.dtype == torch.float32 and result.is_contiguous()
    assert torch.equal(result, preprocess(pixels))
    exact = Preprocessing(image_size=(40, 60), crop=1.0)(pixels)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, preprocess.std))
    torch.testing.assert_close(exact * std + mean, pixels / 255)
    assert preprocess(image.convert("L")).shape == preprocess(image.convert("P")).shape == (3, 32, 32)
    assert preprocess(image.convert("RGBA").resize((7, 90))).shape == (3, 32, 32)
    assert Preprocessing(image_size=(16, 48))(image).shape == (3, 16, 48)


def test_preprocessing_of_other_channels():
    grey = Preprocessing.for_model(resolve_config(SMALL, in_channels=1))
    assert grey.mean == (0.5,) and grey.crop == 1.0 and grey.image_size == (32, 32)
    deep = Image.fromarray(np.full((32, 32), 128 << 8, np.uint16))
    assert torch.allclose(grey(deep), torch.tensor((128 / 255 - 0.5) / 0.5), atol=1e-6)
    five = Preprocessing.for_model(resolve_config(SMALL, in_channels=5), crop=0.8)
    assert five(torch.zeros(5, 20, 20, dtype=torch.uint8)).shape == (5, 32, 32)
    with pytest.raises(ValueError, match="the model has 5: pass a uint8 tensor"):
        five(Image.new("RGB", (8, 8)))
    assert Preprocessing.from_dict(five.to_dict()) == five


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": (0.5,)}, "one value per channel"),
        ({"std": (0.1, 0.1, 0.0)}, "std must be positive"),
        ({"crop": 0}, r"crop must be in \(0, 1\]"),
        ({"image_size": 0}, "image_size must be"),
        ({"interpolation": "cubic"}, "interpolation must be one of nearest"),
        ({"sharpen": 1}, "unknown preprocessing field.*sharpen"),
    ],
)
def test_preprocessing_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(values)


def test_preprocessing_refuses_images():
    preprocess = Preprocessing()
    with pytest.raises(TypeError, match="Pillow image or a uint8 tensor, not ndarray"):
        preprocess(np.zeros((4, 4, 3), np.uint8))
    for tensor in (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 tensor \(3, height, width\)"):
            preprocess(tensor)
    with pytest.raises(ValueError, match="mode 'F'"):
        preprocess(Image.new("F", (4, 4)))
