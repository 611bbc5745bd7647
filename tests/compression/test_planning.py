"""SKD's nested list: what is cut first, that budgets are met, and that every command takes the result."""

import dataclasses
import json

import plain
import pytest
import torch
import torch.nn.functional as F
from compressible import VARIANTS, random_batches
from plain_training import assert_equal, cross_entropy, loop, thirty_steps
from small import SMALL, make, same

from hydravit import cli, fused_model
from hydravit.checkpoint import read_checkpoint, save_checkpoint
from hydravit.compression import plan, planning, wpac
from hydravit.config import resolve_config
from hydravit.data import load_dataset
from hydravit.evaluation import costs, widest_within
from hydravit.geometry import every_width
from hydravit.recipes import RECIPES, Recipe
from hydravit.training import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SKD = resolve_config(SMALL, geometry="skd")


def lengths(subnetwork):
    return [(a.head_dim if a.heads else 0, m.hidden) for a, m in zip(subnetwork.attention, subnetwork.mlp, strict=True)]


# The list -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_widths_are_a_chain_down_to_the_budget(variant):
    model = wpac(make(**VARIANTS[variant]), random_batches(resolve_config(SMALL, **VARIANTS[variant])))
    planned = plan(model, random_batches(model.config), rounds=3)
    config = planned.config
    assert same(planned, model) and dataclasses.replace(config, cuts=()) == model.config
    assert not any(module._forward_hooks for module in model.modules())
    every = [lengths(subnetwork) for subnetwork in every_width(config).values()]
    assert len(every) == len(config.cuts) + 1 and every[-1] == [(config.head_dim, config.hidden)] * config.depth
    for narrow, wide in zip(every, every[1:], strict=False):
        (changed,) = [(n, w) for n, w in zip(narrow, wide, strict=True) if n != w]
        assert sum(n < w for n, w in zip(*changed, strict=True)) == 1
    prices = planning.prices_of(model, "macs")
    costs_of = [sum(prices["attn"] * r + prices["mlp"] * m for r, m in each) for each in every]
    largest = max(wide - narrow for narrow, wide in zip(costs_of, costs_of[1:], strict=False))
    assert (
        0 <= costs_of[0] - 0.125 * costs_of[-1] + 1e-9 * costs_of[-1] and costs_of[0] - 0.125 * costs_of[-1] < largest
    )


def test_budgets_are_met_within_one_group(trained, digits):
    """Where importance falls towards the end of every branch, so that no groups go together."""
    compressed = wpac(trained, digits.batches)
    full = {(layer, branch): n for layer in range(3) for branch, n in planning._channels(compressed.config).items()}
    falling = {branch: torch.arange(n, 0, -1) ** 2.0 for branch, n in full.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            planning, "_importance", lambda model, batches, left: {b: falling[b][:n] for b, n in left.items()}
        )
        planned = plan(compressed, digits.batches, groups=(4, 8), rounds=3)
    found = costs(planned.config)
    prices = planning.prices_of(compressed, "macs")
    group = max(prices["attn"] * 1, prices["mlp"] * 4)
    for share in (0.3, 0.5, 0.7, 0.9):
        budget = share * found[max(found)].macs
        assert 0 <= budget - found[widest_within(planned, budget)].macs <= group


def test_what_matters_least_for_its_cost_goes_first():
    """Groups of two channels from the end on; one that matters less than those behind it goes together with them."""
    importance = torch.tensor([9.0, 9.0, 1.0, 1.0, 4.0, 2.0, 1.0, 1.0])
    found = planning._operations((3, "mlp"), importance, 8, 4, price=10.0)
    assert [(each.channels, each.importance, each.cost) for each in found] == [
        (6, 2.0, 20.0), (2, 8.0, 40.0), (0, 18.0, 20.0)
    ]  # fmt: skip
    left = planning._operations((3, "mlp"), importance[:6], 8, 4, price=10.0)
    assert [(each.channels, each.importance) for each in left] == [(2, 8.0), (0, 18.0)]


def test_importance_is_the_squared_derivative_of_the_loss_by_a_factor():
    """Of one factor before a channel of all heads, measured by differences, in a network that is cut already."""
    model = make(config=SKD, depth=2).double()
    images, labels = torch.randn(3, 3, 32, 32).double(), torch.tensor([1, 4, 7])
    left = {(0, "attn"): 12, (0, "mlp"): 96, (1, "attn"): 16, (1, "mlp"): 0}
    found = planning._importance(model, [(images, labels)], left)
    assert set(found) == {(0, "attn"), (0, "mlp"), (1, "attn")}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    cut = plain.skd(model.config, [(12, 96), (16, 0)])

    def slopes(rows_of):
        """Scale what the rows compute, of one image after the other."""
        result = []
        for i in range(3):
            losses = []
            for factor in (1 + 1e-5, 1 - 1e-5):
                scaled = {name: w.clone() for name, w in weights.items()}
                for name, rows in rows_of:
                    scaled[name][rows] *= factor
                logits = plain.forward(scaled, model.config, cut, images[i : i + 1])
                losses.append(F.cross_entropy(logits, labels[i : i + 1]))
            result.append((losses[0] - losses[1]) / 2e-5)
        return torch.stack(result)

    for layer, channel in ((0, 0), (0, 11), (1, 5)):
        rows = [role * 64 + head * 16 + channel for role in (0, 2) for head in range(4)]
        slope = slopes([(f"blocks.{layer}.attn.qkv.{kind}", rows) for kind in ("weight", "bias")])
        torch.testing.assert_close(found[layer, "attn"][channel], slope.square().sum(), rtol=1e-5, atol=1e-12)

    def hidden_slopes(channel):
        result = []
        for i in range(3):
            losses = []
            for factor in (1 + 1e-5, 1 - 1e-5):
                scaled = {**weights, "blocks.0.mlp.fc2.weight": weights["blocks.0.mlp.fc2.weight"].clone()}
                scaled["blocks.0.mlp.fc2.weight"][:, channel] *= factor
                logits = plain.forward(scaled, model.config, cut, images[i : i + 1])
                losses.append(F.cross_entropy(logits, labels[i : i + 1]))
            result.append((losses[0] - losses[1]) / 2e-5)
        return torch.stack(result)

    for channel in (0, 95):
        expected = hidden_slopes(channel).square().sum()
        torch.testing.assert_close(found[0, "mlp"][channel], expected, rtol=1e-5, atol=1e-12)


def test_a_list_by_latency_cuts_what_is_slow(monkeypatch):
    model, batches = wpac(make(), random_batches(SMALL)), random_batches(SMALL)
    for slow, other in (("attn", "mlp"), ("mlp", "attn")):
        found = {"": 1.0, other: 1.0, slow: 0.6}
        monkeypatch.setattr(planning, "_latencies", lambda model, subnetworks, found=found: found)
        prices = planning.prices_of(model, "latency")
        assert prices[slow] > 1e6 * prices[other]
        cuts = plan(model, batches, cost="latency", keep=0.5, rounds=2).config.cuts
        assert {cut[1] for cut in cuts} == {slow}


def test_latency_is_measured():
    model = wpac(make(), random_batches(SMALL))
    calls = planning._latencies(model, {"": model.subnetwork(4), "half": model.subnetwork(2)}, calls=3)
    assert set(calls) == {"", "half"} and all(0 < seconds < 60 for seconds in calls.values())


def test_layers_of_their_own_lengths_keep_more_than_equal_ones(trained, digits):
    """At the cost of width 3 of 8, by more than a point."""
    compressed = wpac(trained, digits.batches, fold_mean=True)
    planned = plan(compressed, digits.batches, groups=(4, 8))
    torch.testing.assert_close(planned(digits.test_images), trained(digits.test_images), rtol=1e-5, atol=1e-5)
    budget = costs(compressed.config)[3].macs
    assert digits.top1(planned, widest_within(planned, budget)) > digits.top1(compressed, 3) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "joules"}, "cost must be one of macs, params, latency, not 'joules'"),
        ({"keep": 1.0}, r"keep must be in \[0, 1\), not 1.0"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"groups": (0, 32)}, r"groups must be at least 1, not \(0, 32\)"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        plan(make(config=SKD), random_batches(SMALL), **options)


def test_a_list_without_cuts_is_refused():
    with pytest.raises(ValueError, match="keep 0.999 leaves no room for a cut of one group"):
        plan(make(config=SKD), random_batches(SMALL), keep=0.999)


def test_what_else_a_list_means():
    """Widths have classifiers of their own, layers cannot be removed, and shares name no width."""
    cuts = ((1, "mlp", 96), (0, "attn", 8))
    own = make(config=SKD, cuts=cuts, separate_classifiers=(1, 3))
    assert {k: s.head.class_offset for k, s in every_width(own.config).items()} == {1: 0, 3: 10}
    model = make(config=SKD, cuts=cuts)
    with pytest.raises(ValueError, match="config.cuts names all layers"):
        model.prune_intermediate_layers([0])
    assert len(model.blocks) == 2
    with pytest.raises(ValueError, match="width=0.5: the widths of a list of cuts have no shares"):
        model.config.width_of(0.5)
    assert (model.config.counted, model.config.label(2)) == ("step", "step 2")


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="geometry 'skd', as wpac makes it, not 'hydravit'"):
        plan(make(), random_batches(SMALL))
    with pytest.raises(ValueError, match="several passes need a list"):
        plan(make(config=SKD), iter(random_batches(SMALL)))


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ("all", "cuts must be a tuple of"),
        (((0, "attn"),), r"cuts: \(0, 'attn'\) is no"),
        (((0, "head", 3),), "is no"),
        (((0.0, "attn", 3),), "is no"),
        ((([0], "attn", 3),), "is no"),
        (((9, "attn", 3),), "is no"),
        (((0, "attn", 16),), "fewer channels.*which has 16 channels"),
        (((0, "attn", 8), (0, "attn", 12)), r"\(0, 'attn', 12\) is no .*which has 8 channels"),
    ],
)
def test_lists_are_checked(cuts, message):
    with pytest.raises(ValueError, match=message):
        resolve_config(SKD, cuts=cuts)
    with pytest.raises(ValueError, match="cuts need geometry='skd'"):
        resolve_config(SMALL, cuts=((0, "attn", 3),))


# Use ------------------------------------------------------------------------------------------------------------------


def test_thirty_steps_are_those_of_a_plain_loop():
    """One width per step learns from the labels, and all weights decay."""
    config = resolve_config(SMALL, image_size=8, patch_size=4, num_classes=5, geometry="skd",
                            cuts=((1, "mlp", 96), (0, "attn", 8), (1, "mlp", 0), (0, "attn", 0)))  # fmt: skip
    images, labels = torch.randn(12, 3, 8, 8).double(), torch.arange(12) % 5
    data = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    constant = {"lr": 1e-3, "min_lr": 1e-3, "lr_batch": 0, "warmup_epochs": 0.0}
    recipe = Recipe(config=config, epochs=30, batch_size=12, **constant)
    model = make(config=config).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn, found = thirty_steps(Trainer(model, recipe, data, progress=False))
    assert {width for (width,) in drawn} == {1, 2, 3, 4, 5}
    target = 0.9 * F.one_hot(labels, 5).double() + 0.1 / 5
    every = {width: plain.skd(config, lengths(s)) for width, s in every_width(config).items()}

    def losses_of(weights, widths):
        return [cross_entropy(plain.forward(weights, config, every[width], images), target) for width in widths]

    weights, losses = loop(before, drawn, losses_of, 1e-3, recipe.weight_decay)
    assert_equal(model, found, weights, losses)


def run(*arguments):
    assert cli.main([str(each) for each in arguments]) == 0


def test_commands_take_a_planned_model(tmp_path, capsys):
    digits = load_dataset("digits", split="test")
    vit = make(image_size=8, patch_size=4, in_channels=1, max_heads=2)
    save_checkpoint(tmp_path / "vit.safetensors", vit, preprocessing=digits.preprocessing)
    out, data = tmp_path / "planned.safetensors", ["--data", "digits"]
    run("compress", "--checkpoint", tmp_path / "vit.safetensors", "--method", "wpac", "--plan", "macs", "--keep", "0.3",
        "--images", 64, *data, "--out", out)  # fmt: skip
    checkpoint = read_checkpoint(out)
    counted = costs(checkpoint.config)
    first, last = (f"{each.macs / 1e9:.3g}" for each in (counted[1], counted[max(counted)]))
    assert f"geometry skd, {len(counted)} widths of {first} to {last} GMACs" in capsys.readouterr().out
    assert checkpoint.method == "wpac planned by macs, 64 images of digits"
    assert fused_model(checkpoint=out).allowed_heads == tuple(counted)
    run("info", "--checkpoint", out)
    capsys.readouterr()
    budgets = f"{counted[1].macs},{counted[3].macs + 1}"
    run("evaluate", "--checkpoint", out, *data, "--accuracy-only", "--budget", budgets)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["1", "3"]
    few = [*data, "--batch-size", 600, "--accuracy-only"]
    for setting in ("amp=none", "rand_augment=", "color_jitter=0", "random_erasing=0", "mixup=0", "cutmix=0"):
        few += ["--set", setting]
    run("train", "--recipe", "skd", "--checkpoint", out, *few, "--epochs", 1, "--set", "grow_epochs=0",
        "--out", tmp_path / "run")  # fmt: skip
    assert cli.main(["train", "--recipe", "skd", "--checkpoint", str(tmp_path / "vit.safetensors"), *data,
                     "--out", str(tmp_path / "other")])  # fmt: skip
    assert "the checkpoint must have geometry 'skd'" in capsys.readouterr().err
    run("extract", "--checkpoint", out, "--heads", max(counted), "--out", tmp_path / "full.safetensors")
    x = digits.images[:4]
    torch.testing.assert_close(
        *(fused_model(checkpoint=each).eval()(x) for each in (tmp_path / "full.safetensors", out))
    )
    trained = read_checkpoint(tmp_path / "run" / "model.safetensors")
    assert trained.config.cuts == checkpoint.config.cuts and trained.trained_heads == tuple(counted)
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert recipe["weight_decay"] == RECIPES["skd"].weight_decay

    run("compress", "--checkpoint", tmp_path / "vit.safetensors", "--method", "wpac", "--images", 64, *data,
        "--out", tmp_path / "wpac.safetensors")  # fmt: skip
    run("train", "--recipe", "skd", "--checkpoint", tmp_path / "wpac.safetensors", *few, "--epochs", 3,
        "--out", tmp_path / "grown")  # fmt: skip
    assert "grows in the first 1 epoch(s); its narrowest width keeps 0.125 of the cost" in capsys.readouterr().out
    grown = read_checkpoint(tmp_path / "grown" / "model.safetensors")
    evaluated = json.loads((tmp_path / "grown" / "results.json").read_text())["widths"]
    assert 10 <= len(evaluated) <= 20 and evaluated[-1]["heads"] == len(grown.config.cuts) + 1
    assert grown.config.cuts and grown.trained_heads == tuple(range(1, len(grown.config.cuts) + 2))
    run("info", "--checkpoint", tmp_path / "grown" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "order-heads", "--plan", "macs"], "--plan is an option of --method wpac, not of order-heads"),
        (["--method", "wpac", "--keep", "0.5"], "--keep is an option of --plan"),
    ],
)
def test_options_of_the_command(arguments, message, tmp_path, capsys):
    command = ["compress", "--checkpoint", "vit.pth", *arguments, "--data", "digits", "--out", str(tmp_path / "x.pt")]
    assert cli.main(command) and message in capsys.readouterr().err
