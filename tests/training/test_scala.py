"""Scala (arXiv 2412.04786): its steps against a loop written from the paper and its code, and its checkpoints."""

import argparse
import dataclasses
import json

import plain
import pytest
import torch
import torch.nn.functional as F
from plain_training import assert_equal, cross_entropy, divergence, loop, thirty_steps
from torch._dynamo.testing import CompileCounter
from training_runs import CONFIG, RECIPE, Images, make_model, train

import hydravit
from hydravit import cli
from hydravit.checkpoint import extract, extract_config, save_checkpoint
from hydravit.evaluation import evaluate, format_accuracy, format_table, widest_within, write_results
from hydravit.evaluation.cost import cost
from hydravit.recipes import RECIPES
from hydravit.training import Trainer, WidthSampler

pytestmark = pytest.mark.usefixtures("one_thread")

SCALA = dataclasses.replace(
    CONFIG, max_heads=2, head_dim=32, geometry="scala", width_steps=16, narrowest=4, distilled=True
)
FIELDS = ("sandwich", "bins", "transfer", "label_weight", "distillation", "distillation_weight")


def recipe_of(name, **changes):
    """The recipe of that name for a small model, without what a loop of thirty steps would only repeat."""
    full = RECIPES[name]
    config = dataclasses.replace(SCALA, geometry=full.config.geometry)
    return RECIPE.replace(config=config, **{field: getattr(full, field) for field in FIELDS}, **changes)


class Still(Images):
    """The images in float64, without augmentation."""

    def __getitem__(self, index):
        return self.images[index].double(), int(self.labels[index])


def teacher(images):
    """Some fixed function of the images."""
    return torch.stack([images.flatten(1)[:, i::5].sum(1) for i in range(5)], 1)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scala", "scala-paper", "scala-per-role"])
def test_thirty_steps_are_those_of_a_plain_loop(name):
    lr, data = 1e-3, Still(20)
    constant = {"lr": lr, "min_lr": lr, "warmup_epochs": 0.0, "clip_norm": 0.0, "ema": 0.0}
    recipe = recipe_of(name, epochs=30, batch_size=20, full_epochs=3, **constant)
    config = recipe.config
    model = make_model(config=config).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn, found = thirty_steps(Trainer(model, recipe, data, teacher=teacher, progress=False))
    assert all(widths == [16] for widths in drawn[:3])
    middle = 10 if name == "scala-paper" else 9  # the last of the lower bin
    for widest, upper, lower, narrowest in drawn[3:]:
        assert (widest, narrowest) == (16, 4) and 4 < lower <= middle < upper < 16
    images, labels = torch.stack([image for image, _ in data]), data.labels
    soft, hard = 0.9 * F.one_hot(labels, 5).double() + 0.1 / 5, F.one_hot(teacher(images).argmax(1), 5).double()
    form = {"paper": name == "scala-paper", "per_role": name == "scala-per-role"}

    def losses_of(weights, widths):
        losses, wider = [], None
        for width in widths:
            subnetwork = plain.scala(config, width / 16, 4 / 16, **form)
            logits, distilled = plain.forward(weights, config, subnetwork, images)
            if wider is None:
                losses.append(0.5 * cross_entropy(logits, soft) + 0.5 * cross_entropy(distilled, hard))
            else:
                losses.append(cross_entropy(logits, soft) + divergence(wider, distilled))
            wider = distilled
        return losses

    weights, losses = loop(before, drawn, losses_of, lr, recipe.weight_decay)
    assert_equal(model, found, weights, losses)


@pytest.mark.parametrize(
    ("widths", "bins", "lower", "upper"),
    [
        (range(4, 17), "upper", range(5, 10), range(10, 16)),  # steps of 1/16: the code's ranges
        (range(4, 17), "lower", range(5, 11), range(11, 16)),  # the paper's
        (range(2, 9), "upper", (3, 4), (5, 6, 7)),  # 1/8
        (range(8, 33), "upper", range(9, 20), range(20, 32)),  # 1/32
        (range(1, 5), "upper", (2,), (3,)),  # 1/4, where the code has an empty range
        (range(1, 5), "lower", (2,), (3,)),
    ],
)
def test_stable_sampling(widths, bins, lower, upper):
    sampler = WidthSampler(list(widths), seed=1)
    drawn = [sampler.sandwich(4, bins) for _ in range(600)]
    assert {(first, last) for first, _, _, last in drawn} == {(max(widths), min(widths))}
    for place, expected in ((1, upper), (2, lower)):
        found = [step[place] for step in drawn]
        assert set(found) == set(expected)
        for width in expected:
            p = 1 / len(expected)
            assert abs(found.count(width) / 600 - p) <= 5 * (p * (1 - p) / 600) ** 0.5


def test_three_ranges():
    sampler = WidthSampler([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    for bins, ranges in (("upper", [(7, 8, 9), (4, 5, 6), (2, 3)]), ("lower", [(8, 9), (5, 6, 7), (2, 3, 4)])):
        drawn = [sampler.sandwich(5, bins)[1:4] for _ in range(200)]
        assert [set(each) for each in zip(*drawn, strict=True)] == [set(each) for each in ranges]


@pytest.mark.parametrize("optimizer", ["dense", "active"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer):
    recipe = recipe_of("scala", full_epochs=1, optimizer=optimizer)
    whole = train(tmp_path / "whole", recipe, teacher=teacher)
    for stop_at in (3, 8, 13):  # in an epoch of the widest alone, between, and in the last
        folder = tmp_path / str(stop_at)
        train(folder, recipe, stop_at=stop_at, teacher=teacher)
        resumed = train(folder, recipe, resume=True, teacher=teacher)
        for (name, a), b in zip(whole.trained.state_dict().items(), resumed.trained.state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, stop_at)


def test_the_recipes():
    for name in ("scala", "scala-paper", "scala-per-role"):
        recipe = RECIPES[name]
        assert recipe.trained_heads == tuple(range(4, 17)) and recipe.config.geometry == name
        assert (recipe.config.embed, recipe.config.norm_eps, recipe.lr * 1024 / recipe.lr_batch) == (384, 1e-5, 4e-3)
    assert [RECIPES[name].bins for name in ("scala", "scala-paper", "scala-per-role")] == ["upper", "lower", "upper"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sandwich": 4, "bins": "middle"}, "bins must be 'upper' or 'lower', or '' for none, not 'middle'"),
        ({"sandwich": 2, "bins": "upper"}, "bins must be '' with weights, and without a sandwich of 3 or more"),
        ({"sandwich": 3, "bins": "upper", "weights": (1, 1, 1, 1)}, "bins must be '' with weights"),
        ({"config": SCALA, "heads": (3, 16)}, r"heads must be different integers in 4\.\.16"),
    ],
)
def test_recipes_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        RECIPE.replace(**changes)


# Trained models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of Scala trained at 4, 8, 13 and 16 sixteenths, and its model."""
    model = make_model(config=dataclasses.replace(SCALA, in_channels=3)).eval()
    path = tmp_path / "scala.safetensors"
    save_checkpoint(path, model, trained_heads=(4, 8, 13, 16))
    return path, model


def test_a_checkpoint_says_all_that_its_use_needs(trained):
    path, model = trained
    loaded = hydravit.fused_model(checkpoint=path).eval()
    assert loaded.config == model.config and loaded.allowed_heads == (4, 8, 13, 16)
    images = torch.randn(2, 3, 8, 8)
    weights = dict(model.named_parameters())
    for width in (4, 8, 13, 16):
        expected = plain.forward(weights, model.config, plain.scala(model.config, width / 16, 4 / 16), images)
        torch.testing.assert_close(loaded(images, heads=width), sum(expected) / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="heads=7 was not trained"):
        loaded(images, heads=7)
    loaded.allow_untrained = True
    assert loaded(images, heads=7).isfinite().all()


def test_the_layout_of_the_released_checkpoints(tmp_path):
    """They are timm's distilled DeiT, beside the arguments of the script; what is no weight has to be told."""
    model = make_model(config=SCALA)
    content = {"model": model.state_dict(), "args": argparse.Namespace(smallest_ratio=0.25), "epoch": 99}
    torch.save(content, tmp_path / "scala.pth")
    fields = {"geometry": "scala", "width_steps": 16, "narrowest": 4, "head_dim": 32, "norm_eps": 1e-5}
    loaded = hydravit.fused_model(checkpoint=tmp_path / "scala.pth", **fields).eval()
    assert loaded.config.distilled and loaded.allowed_heads == tuple(range(4, 17))
    images = torch.randn(2, 1, 8, 8)
    for width in (4, 5, 16):
        subnetwork = plain.scala(SCALA, width / 16, 4 / 16)
        expected = plain.forward(dict(model.named_parameters()), SCALA, subnetwork, images)
        torch.testing.assert_close(loaded(images, heads=width), sum(expected) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.needs("package timm")
@pytest.mark.parametrize("method", ["scala", "scala-paper", "scala-per-role"])
def test_a_width_in_timm(method):
    from hydravit.timm_models import timm

    model = make_model(config=dataclasses.replace(SCALA, geometry=method)).eval()
    images = torch.randn(2, 1, 8, 8)
    for width in (4, 7, 13, 16):
        vit = timm.models.deit.VisionTransformerDistilled(**extract_config(model, width)).eval()
        vit.load_state_dict(extract(model, width))
        torch.testing.assert_close(vit(images), model(images, heads=width), rtol=1e-5, atol=1e-5)


def test_the_widest_within_a_budget(trained):
    model = hydravit.fused_model(checkpoint=trained[0])
    macs = {width: cost(model.config, model.subnetwork(width)).macs for width in model.allowed_heads}
    assert widest_within(model, macs[13]) == 13 and widest_within(model, macs[13] - 1) == 8
    assert widest_within(model, 1e12) == 16
    with pytest.raises(ValueError, match=f"budget {macs[4] - 1:g}: the narrowest width has {macs[4]:g}"):
        widest_within(model, macs[4] - 1)


def test_heads_in_steps_are_extracted_with_their_own_number(tmp_path):
    """Half of the steps of a HydraViT are half of its heads; the plain ViT counts heads."""
    model = make_model(config=dataclasses.replace(CONFIG, in_channels=3, width_steps=2))
    save_checkpoint(tmp_path / "steps.safetensors", model, trained_heads=(1, 2))
    for given, heads in (("0.5", 2), ("1", 4)):
        run("extract", "--checkpoint", tmp_path / "steps.safetensors", "--width", given, "--out", tmp_path / "x.pt")
        plain_vit = hydravit.fused_model(checkpoint=tmp_path / "x.pt")
        assert (plain_vit.heads, plain_vit.allowed_heads) == (heads, (heads,))


@pytest.mark.parametrize("method", ["scala", "scala-paper", "scala-per-role"])
def test_one_graph_serves_all_widths(method):
    torch.compiler.reset()
    model = make_model(config=dataclasses.replace(SCALA, geometry=method)).eval()
    counter = CompileCounter()
    graph, images = torch.compile(model, fullgraph=True, backend=counter), torch.randn(2, 1, 8, 8)
    for width in (16, 4, 5, 9, 13, 15):
        torch.testing.assert_close(graph(images, heads=width), model(images, heads=width), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_tables_and_pictures_name_the_share(trained, tmp_path):
    model = hydravit.fused_model(checkpoint=trained[0])
    data = [(torch.randn(3, 8, 8), i % 5) for i in range(10)]
    results = evaluate(model, data, latency=False, memory=False)
    assert format_table(results).splitlines()[0].split()[0] == "width"
    assert [line.split()[0] for line in format_accuracy(results).splitlines()] == [
        "width",
        "0.25",
        "0.5",
        "0.8125",
        "1",
    ]
    paths = write_results(results, tmp_path / "results")
    assert [row["width"] for row in json.loads(paths[0].read_text())["widths"]] == ["0.25", "0.5", "0.8125", "1"]
    assert paths[1].stat().st_size > 1000


def run(*arguments):
    assert cli.main([str(each) for each in arguments]) == 0


def test_commands_name_widths_by_share_and_budget(trained, tmp_path, capsys):
    path, model = trained
    run("info", "--checkpoint", path)
    table = capsys.readouterr().out.splitlines()[-14:]
    assert table[0].split() == ["width", "trained", "params", "GMACs"]
    assert [line.split()[:2] for line in table[1:4]] == [["0.25", "yes"], ["0.3125", "no"], ["0.375", "no"]]

    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8), (90, 160, 30)).save(photo)
    predict = ["predict", photo, "--checkpoint", path, "--json"]
    budget = cost(model.config, model.subnetwork(8)).macs
    for given, expected in (
        (["--width", "0.25,0.8125"], [(4, "0.25"), (13, "0.8125")]),
        (["--budget", budget], [(8, "0.5")]),
        ([], [(16, "1")]),
    ):
        run(*predict, *given)
        (answer,) = json.loads(capsys.readouterr().out)
        assert [(each["heads"], each["width"]) for each in answer["widths"]] == expected
    run("extract", "--checkpoint", path, "--width", "0.5", "--out", tmp_path / "half.safetensors")
    half = hydravit.fused_model(checkpoint=tmp_path / "half.safetensors").eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(half(images), model(images, heads=8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--width", "0.4375"], "width [0.4375] were not trained; trained: [0.25, 0.5, 0.8125, 1]"),
        (["--width", "0.3"], "width=0.3 is none of the model's: 0.25, 0.3125"),
        (["--width", "half"], "width 'half': expected numbers, such as 0.25,0.4375 or 1.2e9"),
        (["--budget", "1e9,all"], "budget 'all': expected numbers"),
        (["--budget", "10"], "budget 10: the narrowest width has"),
        (["--width", "0.25,0.5"], "expected one width, not 0.25, 0.5"),
        (["--width", "0.25", "--heads", "4"], "not allowed with argument"),
        ([], "one of the arguments --heads --width --budget is required"),
    ],
)
def test_what_commands_say_of_wrong_widths(trained, tmp_path, capsys, given, message):
    arguments = ["extract", "--checkpoint", str(trained[0]), *given, "--out", str(tmp_path / "x.safetensors")]
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    assert code and message in capsys.readouterr().err
