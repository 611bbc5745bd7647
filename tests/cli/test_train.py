"""``hydravit train``: what decides data, images, model and schedule, and that it is said before training starts."""

import dataclasses
import re

import pytest
import torch
from PIL import Image

from hydravit import HydraViT, HydraViTConfig, fused_model
from hydravit.checkpoint import read_checkpoint, save_checkpoint
from hydravit.cli import main, parser
from hydravit.cli.train import make_recipe
from hydravit.data import load_dataset
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import get_recipe
from hydravit.training import load_training, make_model

VIT = HydraViTConfig(image_size=16, patch_size=8, num_classes=3, depth=2, max_heads=2, head_dim=8)


def recipe_of(*arguments):
    return make_recipe(parser().parse_args(["train", "--out", "out", *map(str, arguments)]))


@pytest.fixture
def photos(tmp_path):
    """Three classes of six photos, which differ in brightness."""
    for label, grey in {"bird": 40, "cat": 120, "dog": 200}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 16), (grey, grey + 5 * i, grey)).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def checkpoint(tmp_path):
    """A model of the same classes in another order, trained with another mean."""
    torch.manual_seed(1)
    model = HydraViT(VIT, trained_heads=(1, 2), backend="reference")
    half = Preprocessing(16, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_checkpoint(tmp_path / "vit.pt", model, preprocessing=half, class_names=["dog", "bird", "cat"])
    return tmp_path / "vit.pt"


# Recipes ------------------------------------------------------------------------------------------------------------


def test_the_data_choose_the_recipe(photos):
    assert recipe_of() == get_recipe("demo") == recipe_of("--data", "digits")
    assert recipe_of("--data", "fashion-mnist") == get_recipe("fashion-mnist")
    assert recipe_of("--data", photos) == get_recipe("photos").replace(data=str(photos))


def test_a_recipe_for_other_images_needs_their_size(photos):
    with pytest.raises(
        ValueError, match=r"recipe demo is for digits at 8x8 pixels, not for .*: choose --recipe photos"
    ):
        recipe_of("--recipe", "demo", "--data", photos)
    config = recipe_of("--recipe", "demo", "--data", photos, "--set", "image_size=16").config
    assert (config.image_size, config.in_channels) == ((16, 16), 3)
    assert recipe_of("--recipe", "demo", "--data", photos, "--config", "tiny").config.image_shape == (3, 224, 224)
    assert recipe_of("--config", "tiny", "--data", "digits").config.image_shape == (1, 224, 224)


def test_the_user_decides_channels_and_the_data_classes(photos):
    recipe = recipe_of("--data", photos, "--set", "in_channels=1")
    data = load_training(recipe)
    assert data[0][0].shape == (1, 128, 128) and data.preprocessing.mean == pytest.approx([0.449], abs=1e-3)
    assert make_model(recipe, data).config.image_shape == (1, 128, 128)
    assert load_training(recipe_of("--set", "in_channels=3"))[0][0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="--set num_classes: the data's number of classes decides it; leave it out"):
        recipe_of("--data", photos, "--set", "num_classes=7")
    given = recipe_of("--data", photos, "--set", "mean=(0.5,0.4,0.3)", "--set", "std=(0.1,0.2,0.3)")
    assert load_training(given).preprocessing.mean == (0.5, 0.4, 0.3)
    with pytest.raises(ValueError, match="mean and std must have 3 values, one per channel, not 2"):
        load_training(given.replace(mean=(0.5, 0.5)))


def test_fewer_epochs_shorten_warm_up_and_cool_down():
    def schedule(*arguments):
        recipe = recipe_of(*arguments)
        return recipe.epochs, recipe.warmup_epochs, recipe.cooldown_epochs

    paper = ("--recipe", "hydravit-imagenet", "--data", "photos")
    assert schedule(*paper) == (310, 5.0, 10) and schedule(*paper, "--epochs", 20) == (20, 5.0, 10)
    assert schedule("--epochs", 2) == (2, 0.08, 0)
    assert schedule(*paper, "--epochs", 12) == (12, pytest.approx(5 * 12 / 310), 0)
    with pytest.raises(ValueError, match="warmup_epochs must be less than epochs - cooldown_epochs, 4, not 5.0"):
        recipe_of("--epochs", 4, "--set", "warmup_epochs=5")


@pytest.mark.parametrize("setting", ["lr=inf", "lr=nan", "weight_decay=inf", "betas=(0.9,2.0)"])
def test_numbers_without_sense_are_refused(setting, tmp_path, capsys):
    assert (
        main(["train", "--out", str(tmp_path), "--set", setting.replace("inf", "1e999").replace("nan", "1e999")]) == 2
    )
    assert f"recipe: {setting.partition('=')[0]} must be" in capsys.readouterr().err


# Starting from weights ----------------------------------------------------------------------------------------------


def test_fine_tuning_takes_model_and_statistics_of_the_checkpoint(photos, checkpoint):
    recipe = recipe_of("--data", photos, "--checkpoint", checkpoint)
    fine = get_recipe("finetune")
    assert (recipe.epochs, recipe.lr) == (fine.epochs, fine.lr)
    assert recipe.config == dataclasses.replace(VIT, drop_path=fine.config.drop_path)
    data = load_training(recipe)
    assert data.preprocessing.mean == recipe.mean == (0.5, 0.5, 0.5)
    assert load_training(recipe.replace(mean=(), std=())).preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))
    grey = recipe_of("--data", photos, "--checkpoint", checkpoint, "--set", "in_channels=1")
    assert load_training(grey)[0][0].shape == (1, 16, 16)
    assert recipe.heads == (1, 2) and recipe_of("--data", photos, "--checkpoint", checkpoint, "--heads", 2).heads == (
        2,
    )
    with pytest.raises(ValueError, match="recipe finetune: give the weights to start from, --checkpoint FILE"):
        recipe_of("--recipe", "finetune", "--data", photos)


def test_what_weights_do_not_tell_of_their_model_can_be_set(photos, checkpoint, tmp_path):
    torch.save(fused_model(checkpoint=checkpoint).state_dict(), tmp_path / "foreign.pt")
    foreign = ("--data", photos, "--checkpoint", tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="16 channels have no usual number of heads: pass the head_dim"):
        recipe_of(*foreign)
    told = ("--set", "head_dim=8", "--set", "norm_eps=1e-6", "--set", "pool=token")
    with pytest.warns(UserWarning, match="weights do not tell everything; assumed: image_size"):
        recipe = recipe_of(*foreign, *told)
    assert recipe.config == dataclasses.replace(VIT, drop_path=recipe.config.drop_path)


def test_the_classifiers_rows_follow_the_names_of_classes(photos, checkpoint):
    recipe = recipe_of("--data", photos, "--checkpoint", checkpoint)
    data, source = load_training(recipe), fused_model(checkpoint=checkpoint).eval()
    with pytest.warns(UserWarning, match="its classifier's 3 rows are matched by name with the data's 3 classes"):
        model = make_model(recipe, data).eval()
    images = torch.randn(4, 3, 16, 16)
    rows = [["dog", "bird", "cat"].index(name) for name in data.class_names]
    torch.testing.assert_close(model(images), source(images)[:, rows])
    (photos / "bird").rename(photos / "fish")
    with pytest.warns(UserWarning, match="1 of the data's 3 classes are unknown to it, e.g. 'fish'"):
        model = make_model(recipe, load_training(recipe)).eval()
    assert not torch.allclose(model.head.weight, source.head.weight)
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


@pytest.fixture
def settings(tmp_path):
    def write(text):
        (tmp_path / "settings.yaml").write_text(text)
        return tmp_path / "settings.yaml"

    return write


# The summary --------------------------------------------------------------------------------------------------------


def summary(capsys, *arguments):
    assert main(["train", *map(str, arguments), "--no-evaluate", "--backend", "reference"]) == 0
    captured = capsys.readouterr()
    return re.sub(" +", " ", captured.out), captured.err


def test_before_training_it_is_said_what_was_decided_and_by_what(photos, tmp_path, capsys):
    small = ("--set", "image_size=32", "--set", "depth=1", "--epochs", 1, "--batch-size", 4)
    out, err = summary(capsys, "--data", photos, "--out", tmp_path / "out", *small)
    warmup = "0.05 epochs of warm-up (shortened with the epochs)"
    for line in (
        "recipe photos (the usual one for a folder of photos; --recipe chooses another)",
        f"data {photos} (--data), 3 classes",
        "training: 12 images, two thirds of every class by split seed 0",
        "images 32x32 pixels (--set), 3 channel(s), resized by bicubic, centre crop of 0.9",
        "mean 0.485,0.456,0.406, std 0.229,0.224,0.225 (ImageNet's, usual for photos)",
        "model 1 layers, 3 heads of 64 channels (--set), patches of 16 pixels, 3 classes (the data's)",
        "starts from random weights of seed 0; its moving average, ema 0.99, is what is evaluated and saved",
        "trained widths, a width for every image:",
        "steps 3 = 1 epochs (--epochs) of 3 steps with 4 images (--batch-size)",
        f"learning rate 0.001 (recipe photos) after {warmup}, a cosine to 1e-05",
    ):
        assert line in out.splitlines() or f" {line}" in out.splitlines(), line
    assert f"output {tmp_path / 'out'}" in out and "device cpu, backend reference, float32" in out
    assert not err.count("warning")


def test_of_a_file_of_settings_its_name_is_said(photos, settings, tmp_path, capsys):
    file = settings("config: tiny\nepochs: 1\nimage_size: 32\nbatch_size: 4\ndepth: 2\n")
    out, _ = summary(capsys, "--data", photos, "--set-from", file, "--set", "depth=1", "--out", tmp_path / "out")
    for text in (f"32x32 pixels ({file})", "64 channels (--set)", f"1 epochs ({file})", f"with 4 images ({file})"):
        assert text in out


def test_fine_tuning_says_so_and_evaluates(photos, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    said, err = summary(capsys, "--data", photos, "--checkpoint", checkpoint, "--out", out, "--epochs", 1)
    assert (
        "recipe finetune (the usual one for a folder of photos and weights to start from; --recipe chooses another)"
        in said
    )
    assert "16x16 pixels (the checkpoint's)" in said and "std 0.5,0.5,0.5 (the checkpoint's)" in said
    assert f"starts from {checkpoint}" in said and "rows are matched by name" in err
    trained = read_checkpoint(out / "model.safetensors")
    assert trained.class_names == ("bird", "cat", "dog") and trained.preprocessing.mean == (0.5, 0.5, 0.5)
    evaluate = ["evaluate", "--checkpoint", str(out / "model.safetensors"), "--data", str(photos), "--accuracy-only"]
    assert main(evaluate) == 0


def test_one_class_is_said_to_be_one(photos, tmp_path, capsys):
    for label in ("cat", "dog"):
        for file in (photos / label).iterdir():
            file.unlink()
        (photos / label).rmdir()
    small = ("--set", "image_size=32", "--set", "depth=1", "--epochs", 1, "--batch-size", 4)
    _, err = summary(capsys, "--data", photos, "--out", tmp_path / "out", *small)
    assert "one class only, 'bird': nothing to tell apart" in err


def test_usual_data_sets_keep_their_own_statistics():
    assert load_dataset("digits", split="test").preprocessing == load_training(get_recipe("demo")).preprocessing


# A file of settings --------------------------------------------------------------------------------------------------


def test_a_file_decides_as_arguments_would(settings):
    file = settings(
        "recipe: demo\nepochs: 50\nlr: 1e-3\nheads: [1, 3]\nfreeze: [patch_embed, blocks.0]\nbetas: [0.8, 0.9]\n"
        "depth: 3  # of the model\nper_image: false\namp: bf16\nweight_decay: 1e-2\n"
    )
    arguments = (
        "--epochs",
        50,
        "--lr",
        1e-3,
        "--heads",
        "1,3",
        "--amp",
        "bf16",
        "--set",
        "freeze=patch_embed,blocks.0",
    )
    fields = ("--set", "betas=(0.8, 0.9)", "--set", "depth=3", "--set", "per_image=False", "--set", "weight_decay=0.01")
    assert recipe_of("--set-from", file) == recipe_of("--recipe", "demo", *arguments, *fields)


def test_arguments_take_precedence_over_the_file(settings):
    file = settings("epochs: 50\nclip_norm: 0.5\ndepth: 3\n")
    found = recipe_of("--epochs", 60, "--set", "clip_norm=0.25", "--set-from", file)
    assert (found.epochs, found.clip_norm, found.config.depth) == (60, 0.25, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: many\n", r"settings.yaml: epochs: expected a value such as 300, not 'many'"),
        ("epochs: 2.5\n", r"settings.yaml: epochs: expected a value such as 300, not 2.5"),
        ("epoch: 3\n", r"settings.yaml: 'epoch' is no field of the recipe or the model, .*; did you mean epochs\?"),
        ("epochs: true\n", r"settings.yaml: epochs: expected a value such as 300, not True"),
        ("config: {depth: 3}\n", r"settings.yaml: config: expected a value such as 'small', not \{'depth': 3\}"),
        ("depht: 3\n", r"settings.yaml: 'depht' is no field of the recipe or the model"),
        ("- epochs\n", r"settings.yaml: expected lines of FIELD: VALUE, not list"),
        ("", r"settings.yaml: expected lines of FIELD: VALUE, not NoneType"),
        ("epochs: [1\n", r"settings.yaml: no YAML"),
    ],
)
def test_what_is_no_file_of_settings(settings, text, message):
    with pytest.raises(ValueError, match=message):
        recipe_of("--set-from", settings(text))
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        recipe_of("--set-from", "nothing.yaml")


# Misunderstandings ----------------------------------------------------------------------------------------------------

SMALL = ("--set", "image_size=32", "--set", "depth=1", "--epochs", 2, "--batch-size", 4, "--accuracy-only")


def train(*arguments):
    return main(["train", "--backend", "reference", *map(str, arguments)])


def test_a_checkpoint_remembers_what_was_held_out(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert train("--data", photos, "--split-seed", 3, "--out", out, *SMALL) == 0
    table = capsys.readouterr().out
    for file in ("model.safetensors", "checkpoint.pt"):
        assert read_checkpoint(out / file).split_seed == 3
        assert main(["evaluate", "--checkpoint", str(out / file), "--data", str(photos), "--accuracy-only"]) == 0
        assert "a third of every class by split seed 3" in capsys.readouterr().out
    evaluated = ["evaluate", "--checkpoint", str(out / "model.safetensors"), "--data", str(photos), "--accuracy-only"]
    assert main(evaluated) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
    assert len(rows) == 3 and rows == [line for line in table.splitlines() if line[:5].strip().isdigit()][-3:]
    assert main([*evaluated, "--split-seed", "0"]) == 0
    said = capsys.readouterr()
    assert "by split seed 0" in said.out and "trained with split seed 3: seed 0 holds out other images" in said.err
    assert main(["info", "--checkpoint", str(out / "model.safetensors")]) == 0
    assert re.search("split seed +3", capsys.readouterr().out)


def test_a_run_goes_on_where_its_data_are_now(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--data", "photos", "--out", "out", *SMALL) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train("--out", "../out", "--resume", "--epochs", 3, "--no-evaluate") == 2
    missing = tmp_path / "elsewhere" / "photos"
    error = capsys.readouterr().err
    assert f"nor a folder: {missing} does not exist; --data says where" in error
    resumed = ("--out", "../out", "--resume", "--no-evaluate", "--data", "../photos", "--epochs")
    assert train(*resumed, 3) == 0
    assert "data is '../photos'; it was 'photos'" in capsys.readouterr().out
    photos.joinpath("dog").rename(photos / "wolf")
    assert train(*resumed, 4) == 2
    assert "classes" in capsys.readouterr().err


def test_a_finished_run_is_not_described_anew(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert train("--data", photos, "--out", out, *SMALL) == 0
    before = (out / "recipe.json").read_bytes()
    assert train("--out", out, "--resume", "--lr", 1e-5) == 2
    assert "all 2 epochs are done, so another lr changes nothing; give more --epochs" in capsys.readouterr().err
    assert (out / "recipe.json").read_bytes() == before
    assert train("--out", out, "--resume", "--epochs", 3, "--no-evaluate") == 0
    capsys.readouterr()
    assert train("--recipe", out / "recipe.json", "--out", tmp_path / "again", "--no-evaluate") == 0
    assert "recipe.json: that run got other epochs when it was resumed" in capsys.readouterr().err


def test_a_start_that_fails_leaves_no_folder(photos, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert train("--data", photos, "--out", out, "--set", "dept=2") == 2
    assert "--set dept=2: no field of the recipe or the model; did you mean depth?" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    assert train("--data", photos, "--out", out, "--set", "zzz=2") == 2
    assert "expected FIELD=VALUE with one of " in capsys.readouterr().err and out.exists()


def test_more_images_than_there_are(photos, tmp_path, capsys):
    assert train("--data", photos, "--out", tmp_path / "out", *SMALL[:-2], 99, "--no-evaluate") == 0
    assert "1 steps with 12 images (all that there are; batch_size is 99)" in capsys.readouterr().out


def test_what_is_interrupted_after_the_training(photos, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hydravit.evaluation.evaluate", interrupted)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="130"):
        train("--data", photos, "--out", out, *SMALL)
    assert f"its evaluation is not; go on with: hydravit train --out {out} --resume" in capsys.readouterr().err
