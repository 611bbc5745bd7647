"""The commands end to end on a tiny checkpoint, and what users get for wrong input: one line and exit code 2."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hydravit import HydraViT, HydraViTConfig, __version__, fused_model
from hydravit.checkpoint import read_checkpoint, save_checkpoint
from hydravit.cli import main, parse_heads
from hydravit.data import load_dataset

TINY = HydraViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=10, depth=2, max_heads=3, head_dim=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint trained at widths 1 and 3 (or so it says), and two pictures."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = HydraViT(TINY, trained_heads=(1, 3), backend="reference")
    data = load_dataset("digits", split="test")
    save_checkpoint(
        folder / "model.safetensors", model, preprocessing=data.preprocessing, class_names=[f"n{i}" for i in range(10)]
    )
    save_checkpoint(folder / "digits.pt", model, preprocessing=data.preprocessing, class_names=data.class_names)
    (folder / "pictures").mkdir()
    for i in range(2):
        Image.effect_noise((20, 16), 60).save(folder / "pictures" / f"{i}.png")
    return folder


def hydravit(*arguments, backend="reference") -> int:
    if arguments[0] in ("evaluate", "predict"):
        arguments = (*arguments, "--backend", backend)
    return main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    """The one line of a command that must fail."""
    assert hydravit(*arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("hydravit: warning:")]
    assert len(lines) == 1 and lines[0].startswith("hydravit: error: ") and "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("text", "heads"),
    [("6", (6,)), ("12, 3,6", (3, 6, 12)), ("3-5", (3, 4, 5)), ("1,3-4,3", (1, 3, 4)), ("all", tuple(range(1, 13)))],
)
def test_lists_of_heads(text, heads):
    assert parse_heads(text, 12) == heads


@pytest.mark.parametrize("text", ["", "0", "13", "3-13", "5-3", "-3", "3-", "1,,2", "1.5", "three", "3:6"])
def test_wrong_lists_of_heads(text):
    with pytest.raises(ValueError, match="heads"):
        parse_heads(text, 12)


def test_evaluate_writes_table_json_and_plot(folder, capsys):
    out = folder / "results"
    digits = ("evaluate", "--checkpoint", folder / "digits.pt", "--data", "digits")
    assert hydravit(*digits, "--out", out, "--seconds", 0.1, "--heads", "1,3") == 0
    table = capsys.readouterr().out
    assert "GMACs" in table and "top-5 %" in table
    part = "a third of every class"
    assert f"599 images of digits, {part}; " in table and ", batch 64\n" in table
    results = json.loads((out / "results.json").read_text())
    assert [row["heads"] for row in results["widths"]] == [1, 3]
    assert results["data"] == {"source": "digits", "split": "test", "part": part, "skipped": 0}
    assert (out / "results.png").exists()
    assert hydravit(*digits, "--accuracy-only", "--heads", "all") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["1", "3"]
    assert hydravit(*digits, "--accuracy-only", "--heads", "2", "--allow-untrained", "--weights", "e4m3") == 0
    assert "e4m3 top-1" in capsys.readouterr().out


def test_evaluate_skips_and_counts_corrupt_files(folder, tmp_path, capsys):
    for name in ("n3", "n7"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.effect_noise((20, 16), 60).save(tmp_path / name / f"{i}.png")
    (tmp_path / "n3" / "bad.png").write_bytes(b"")
    photos = ("evaluate", "--checkpoint", folder / "model.safetensors", "--data", tmp_path, "--accuracy-only")
    assert "bad.png: cannot be read as an image (empty file)" in fails(capsys, *photos)
    assert hydravit(*photos, "--split", "all", "--skip-corrupt") == 0
    out, err = capsys.readouterr()
    assert "6 images" in out and "skipped 1 unreadable file(s)" in out and "hydravit: warning: " in err


def test_predict_shows_names_and_probabilities(folder, capsys):
    predict = ("predict", folder / "pictures", "--checkpoint", folder / "model.safetensors")
    assert hydravit(*predict) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 6 and lines[0].endswith("0.png") and lines[1].split()[1].startswith("n")
    assert hydravit(*predict, "--heads", "all", "--top", "2") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["k=1", "k=3"]
    assert hydravit(*predict, "--json", "--top", "10", "--batch-size", "1") == 0
    answers = json.loads(capsys.readouterr().out)
    for answer in answers:
        (width,) = answer["widths"]
        assert width["heads"] == 3 and sum(c["probability"] for c in width["classes"]) == pytest.approx(1)
        assert all(c["name"] == f"n{c['label']}" for c in width["classes"])


def test_predict_skips_corrupt_files(folder, tmp_path, capsys):
    Image.effect_noise((20, 16), 60).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no")
    predict = ("predict", tmp_path, "--checkpoint", folder / "model.safetensors")
    assert "bad.png: cannot be read as an image" in fails(capsys, *predict)
    assert hydravit(*predict, "--skip-corrupt") == 0
    assert "skipped 1" in capsys.readouterr().err


def test_info(folder, capsys):
    assert hydravit("info") == 0
    assert torch.__version__ in capsys.readouterr().out
    assert hydravit("info", "--config", "base") == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["12", "?", "86.6", "M", "17.56"]
    assert hydravit("info", "--checkpoint", folder / "digits.pt") == 0
    out = capsys.readouterr().out
    assert "trained widths" in out and [line.split()[1] for line in out.splitlines()[-3:]] == ["yes", "no", "yes"]


def test_extract_writes_a_plain_vit(folder, tmp_path, capsys):
    out = tmp_path / "vit.safetensors"
    assert hydravit("extract", "--checkpoint", folder / "digits.pt", "--heads", 1, "--out", out) == 0
    imports, call = capsys.readouterr().out.splitlines()[1:]
    assert "embed_dim=4, depth=2, num_heads=1" in call
    if find_spec("timm"):  # the line can be pasted
        names = {}
        exec(imports, names)
        vit = eval(call, names)
        vit.load_state_dict(load_file(out))
    assert load_file(out)["blocks.0.attn.qkv.weight"].shape == (12, 4)
    tops = []
    for checkpoint in (folder / "digits.pt", out):
        evaluate = ("evaluate", "--checkpoint", checkpoint, "--data", "digits", "--heads", "1", "--accuracy-only")
        assert hydravit(*evaluate) == 0
        tops.append(capsys.readouterr().out.splitlines()[1])
    assert tops[0] == tops[1]
    assert hydravit("extract", "--checkpoint", folder / "digits.pt", "--heads", 3, "--out", out) == 0
    assert read_checkpoint(out).trained_heads == (1, 3)
    before, after = (fused_model(checkpoint=file).eval() for file in (folder / "digits.pt", out))
    x = torch.randn(2, *TINY.image_shape)
    for heads in (1, 3):
        torch.testing.assert_close(after(x, heads=heads), before(x, heads=heads))
    assert "not trained" in fails(
        capsys, "extract", "--checkpoint", folder / "digits.pt", "--heads", 2, "--out", tmp_path / "x.pt"
    )


def test_checkpoints_of_others_are_read_as_the_command_line_says(tmp_path, capsys):
    """What weights do not tell, which of several models, and names that do not fit."""
    model = HydraViT(dataclasses.replace(TINY, norm_eps=1e-5), backend="reference")
    both = {"student": model.state_dict(), "teacher": model.state_dict() | {"extra.weight": torch.ones(2)}}
    torch.save(both, tmp_path / "both.pt")
    info = ("info", "--checkpoint", tmp_path / "both.pt")
    assert "part= chooses one of 'student', 'teacher'" in fails(capsys, *info)
    assert "12 channels have no usual number of heads: pass the head_dim" in fails(capsys, *info, "--part", "student")
    fields = ("--field", "head_dim=4", "--field", "norm_eps=1e-5", "--field", "pool=token")
    assert hydravit(*info, "--part", "student", *fields) == 0
    out = capsys.readouterr().out
    assert "1e-05" in out and "not recorded" in out
    extract = ("extract", "--checkpoint", tmp_path / "both.pt", "--heads", 2, "--out", tmp_path / "vit.pt")
    assert "no place for extra.weight" in fails(capsys, *extract, "--part", "teacher", *fields)
    assert hydravit(*extract, "--part", "teacher", *fields, "--no-strict") == 0
    assert read_checkpoint(tmp_path / "vit.pt").config.norm_eps == 1e-5
    assert "expected NAME=VALUE" in fails(capsys, *info, "--field", "head_dim")


def test_a_damaged_file_is_loaded_only_by_name_of_the_flag(folder, tmp_path, capsys):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    predict = ("predict", folder / "pictures", "--checkpoint", tmp_path / "flipped.safetensors")
    line = fails(capsys, *predict)
    assert "flipped.safetensors cannot be read" in line and "--no-verify loads it" in line
    assert hydravit(*predict, "--no-verify") == 0


@pytest.fixture
def foreign(folder, tmp_path):
    """The weights of the digits' model as another project would write them, and folders of photos with its classes."""
    torch.save(fused_model(checkpoint=folder / "digits.pt").state_dict(), tmp_path / "foreign.pt")
    for digit in range(10):
        (tmp_path / "photos" / f"{digit}").mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((20, 16), 60).save(tmp_path / "photos" / f"{digit}" / f"{i}.png")
    fields = ("--field", "head_dim=4", "--field", "image_size=8")
    return ("--checkpoint", tmp_path / "foreign.pt", *fields), tmp_path / "photos"


def test_what_a_foreign_checkpoint_does_not_tell_of_images_is_said_and_can_be_given(foreign, folder, capsys):
    model, photos = foreign
    predict = ("predict", photos, *model, "--json")
    assert hydravit(*predict) == 0
    out, err = capsys.readouterr()
    assumed = json.loads(out)
    text = "does not tell how images were prepared; assumed: mean 0.5, std 0.5, crop 1.0, interpolation bicubic ("
    assert f"foreign.pt: {text}--mean, --std, --crop, --interpolation or --timm)" in err
    known = read_checkpoint(folder / "digits.pt").preprocessing
    assert hydravit(*predict, "--mean", known.mean[0], "--std", known.std[0]) == 0
    out, err = capsys.readouterr()
    assert "assumed: crop 1.0, interpolation bicubic (--crop, --interpolation or --timm)" in err
    assert hydravit("predict", photos, "--checkpoint", folder / "digits.pt", "--json") == 0
    ours, err = capsys.readouterr()
    assert ours == out and json.loads(out) != assumed and "prepared" not in err
    extract = ("extract", *model, "--heads", 1, "--out", photos / "vit.pt")
    assert hydravit(*extract) == 0
    assert read_checkpoint(photos / "vit.pt").preprocessing is None
    assert hydravit(*extract, "--mean", "0.25", "--std", "0.5", "--crop", "0.75", "--interpolation", "bilinear") == 0
    found = read_checkpoint(photos / "vit.pt").preprocessing
    assert (found.mean, found.std, found.crop, found.interpolation) == ((0.25,), (0.5,), 0.75, "bilinear")
    assert "one per channel, not 3" in fails(capsys, *predict, "--mean", "0.1,0.2,0.3", "--std", "1,1,1")


def test_classes_are_matched_by_name_or_it_is_said(foreign, folder, tmp_path, capsys):
    model, photos = foreign
    evaluate = ("evaluate", *model, "--data", photos, "--split", "all", "--accuracy-only")

    def top1(*arguments):
        assert hydravit(*evaluate, *arguments) == 0
        out, err = capsys.readouterr()
        return out.splitlines()[1:3], "names no classes: its outputs are taken for" in err

    by_position, said = top1()
    assert said
    names = [str(digit) for digit in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert top1("--classes", tmp_path / "names.txt") == (by_position, False)
    (tmp_path / "names.json").write_text(json.dumps(dict(enumerate(names))))
    assert top1("--classes", tmp_path / "names.json") == (by_position, False)
    for digit in range(10):  # other folders for the same images, in another order
        (photos / f"{digit}").rename(photos / f"{'zyxwvutsrq'[digit]} {digit}")
    (tmp_path / "renamed.json").write_text(json.dumps([f"{'zyxwvutsrq'[digit]} {digit}" for digit in range(10)]))
    assert top1("--classes", tmp_path / "renamed.json") == (by_position, False)
    assert "10 of its 10 classes are unknown to the model" in fails(
        capsys, *evaluate, "--classes", tmp_path / "names.txt"
    )
    (tmp_path / "few.txt").write_text("a\nb\na")
    message = fails(capsys, *evaluate, "--classes", tmp_path / "few.txt")
    assert "few.txt: expected 10 different names, one for each output, not 2 different ones in 3" in message
    (photos / "z 0").rename(tmp_path / "z 0")
    message = fails(capsys, *evaluate)
    assert "names no classes and has 10 outputs, where" in message and "has 9 classes ('q 9', 'r 8', 's 7'" in message


@pytest.mark.needs("package timm")
def test_timm_tells_how_images_are_prepared(tmp_path, capsys):
    from hydravit.timm_models import timm

    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=2).state_dict(), tmp_path / "vit.pt")
    Image.effect_noise((20, 16), 60).save(tmp_path / "1.png")
    predict = ("predict", tmp_path / "1.png", "--checkpoint", tmp_path / "vit.pt", "--json")
    assert hydravit(*predict, "--timm", "vit_tiny_patch16_224") == 0
    told, err = capsys.readouterr()
    assert "prepared" not in err
    assert hydravit(*predict, "--mean", "0.5", "--std", "0.5", "--crop", "0.9", "--interpolation", "bicubic") == 0
    out, err = capsys.readouterr()
    assert out == told and "prepared" not in err


def test_wrong_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys):
    model = ("--checkpoint", folder / "model.safetensors")
    (tmp_path / "bad.safetensors").write_text("no")
    evaluate, digits = ("evaluate", *model, "--accuracy-only", "--data"), folder / "digits.pt"
    assert "nowhere.pt does not exist" in fails(capsys, "predict", tmp_path, "--checkpoint", "nowhere.pt")
    assert "bad.safetensors cannot be read" in fails(capsys, "info", "--checkpoint", tmp_path / "bad.safetensors")
    assert "unknown config 'huge'" in fails(capsys, "info", "--config", "huge")
    assert "neither digits, fashion-mnist nor a folder" in fails(capsys, *evaluate, "cifar10")
    assert "classes are unknown to the model" in fails(capsys, *evaluate, "digits")
    assert "heads '4': the model has the widths 1..3; all names every one" in fails(
        capsys, *evaluate, "digits", "--heads", 4
    )
    assert "[2] were not trained; trained: [1, 3]" in fails(capsys, *evaluate, "digits", "--heads", "1-2")
    assert "device string: toaster" in fails(capsys, *evaluate, "digits", "--device", "toaster")
    assert "no such file or folder" in fails(capsys, "predict", tmp_path / "x.png", *model)
    assert "folder without images" in fails(capsys, "predict", tmp_path, *model)
    (tmp_path / "file").touch()
    good = ("evaluate", "--checkpoint", digits, "--data", "digits", "--accuracy-only", "--out")
    assert str(tmp_path / "file") in fails(capsys, *good, tmp_path / "file")
    train = ("train", "--recipe", "demo", "--out", tmp_path / "run", "--set", "optimizer=exact")
    assert "optimizer must be 'dense' or 'active', not 'exact'" in fails(capsys, *train)
    assert "vit.bin" in fails(capsys, "extract", "--checkpoint", digits, "--heads", 1, "--out", tmp_path / "vit.bin")
    assert main(["evaluate", *map(str, model), "--data", "digits", "--backend", "quantum"]) == 2
    assert "unknown backend 'quantum'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["evaluate"], ["predict", "x.png"], ["evaluate", "--batch-size", "0"]]
)
def test_wrong_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["demo", "train", "compare", "compress", "evaluate", "predict", "info", "extract"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"hydravit {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"hydravit {__version__}\n"


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HYDRAVIT_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown config"):
        main(["info", "--config", "huge"])


def test_the_program_ends_quietly_when_its_reader_has_enough():
    code = "import sys; from hydravit.cli import main; sys.exit(main(['info', '--config', 'base']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and "Traceback" not in done.stderr


_INTERRUPTED = """
import builtins
load = builtins.__import__
def interrupted(name, *arguments, **options):
    if name == "torch":
        raise KeyboardInterrupt
    return load(name, *arguments, **options)
builtins.__import__ = interrupted
from hydravit.__main__ import main
raise SystemExit(main())
"""


def test_an_interrupt_while_torch_is_imported_is_one_line():
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED, "info"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "hydravit: interrupted\n")
