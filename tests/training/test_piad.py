"""PIAD of SKD (arXiv 2511.11683): the list of cuts grows while its widths are trained."""

import dataclasses
import json

import pytest
import torch
from small import same
from training_runs import CONFIG, RECIPE, Images, assert_ranks_agree, make_model, on_two_ranks, train

import hydravit
from hydravit.checkpoint import read_checkpoint
from hydravit.compression import CalibrationImages
from hydravit.compression.planning import grow, prices_of
from hydravit.compression.source import working_copy
from hydravit.evaluation import costs
from hydravit.recipes import RECIPES
from hydravit.training import Trainer
from hydravit.training import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("one_thread")

SKD = dataclasses.replace(CONFIG, geometry="skd")
PIAD = RECIPE.replace(config=SKD, epochs=4, grow_epochs=2, keep=0.3)
STILL = Images(augment=False)
SKIPPING = dataclasses.replace(SKD, cuts=((0, "attn", 0), (0, "mlp", 0), (1, "mlp", 0)))


def run(folder, recipe=PIAD, **options):
    return train(folder, recipe, calibration=STILL, **options)


def shares(config):
    """What the channels of every width cost, of those of the full one."""
    prices = prices_of(hydravit.HydraViT(dataclasses.replace(config, cuts=()), backend="reference"))
    left = {(layer, "attn"): config.head_dim for layer in range(config.depth)}
    left |= {(layer, "mlp"): config.hidden for layer in range(config.depth)}
    total = sum(prices[branch] * n for (_, branch), n in left.items())
    result = [1.0]
    for layer, branch, channels in config.cuts:
        left[layer, branch] = channels
        result.append(sum(prices[branch] * n for (_, branch), n in left.items()) / total)
    return result


def test_the_list_grows_in_the_first_epochs(tmp_path, monkeypatch):
    grown, original = [], Trainer._adopt

    def adopted(self, cuts):
        original(self, cuts)
        grown.append((self.epoch, cuts))

    monkeypatch.setattr(Trainer, "_adopt", adopted)
    trainer = run(tmp_path)
    assert [epoch for epoch, _ in grown] == [0, 0, 1] and grown[0][1] == ()
    _, (_, first), (_, second) = grown
    assert first and second[: len(first)] == first and len(second) > len(first)
    config = trainer.model.config
    assert trainer.trained.config == config and config.cuts == second
    assert trainer.heads == tuple(range(1, len(second) + 2)) and trainer.trained.heads == len(second) + 1
    assert 0.3 <= shares(config)[-1] + 1e-9 < 0.65 <= shares(dataclasses.replace(config, cuts=first))[-1] + 1e-9
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint.config == config and checkpoint.trained_heads == trainer.heads
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"]["config"]["cuts"] == []  # as it started
    macs = [each.macs for each in costs(config).values()]
    assert macs == sorted(set(macs))


def test_it_grows_by_the_weights_of_its_epoch():
    model = make_model(config=SKD)
    images = CalibrationImages(STILL, 1024, seed=PIAD.seed)
    expected = grow(working_copy(model), images, (), 0.35, prices_of(model))
    trainer = Trainer(model, PIAD, Images(), calibration=STILL, progress=False)
    before = torch.get_rng_state()
    trainer._grow()
    assert model.config.cuts == expected and torch.equal(torch.get_rng_state(), before)
    trainer._grow()  # once in an epoch
    assert model.config.cuts == expected
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.zero_()  # what does not matter any more goes first
    trainer.epoch = 1
    trainer._grow()
    after = grow(working_copy(model), images, expected, 0.7, prices_of(model))
    assert model.config.cuts == after and after[len(expected)][:2] == (1, "mlp")


@pytest.mark.parametrize("optimizer", ["dense", "active"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer):
    recipe = PIAD.replace(optimizer=optimizer)
    whole = run(tmp_path / "whole", recipe)
    for stop_at in (2, 5, 6, 8, 17):  # in the epochs that grow, at the end and the beginning of one, and later
        run(tmp_path / str(stop_at), recipe, stop_at=stop_at)
        resumed = run(tmp_path / str(stop_at), recipe, resume=True)
        assert resumed.model.config == whole.model.config and same(resumed.trained, whole.trained), stop_at


def grow_on_ranks(folder, rank):
    if rank == 1:  # what it would find does not count
        trainer_module.grow = lambda *arguments: ((0, "mlp", 0),)
    trainer = run(folder)
    assert_ranks_agree(trainer)
    (folder / f"cuts-{rank}.json").write_text(json.dumps(trainer.model.config.cuts))


@pytest.mark.long
def test_two_ranks_have_one_list(tmp_path):
    on_two_ranks(grow_on_ranks, tmp_path)
    first, second = ((tmp_path / f"cuts-{rank}.json").read_text() for rank in (0, 1))
    assert first == second and len(json.loads(first)) > 1


def test_ranks_that_draw_their_own_widths_are_refused(monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    recipe = PIAD.replace(config=SKIPPING, grow_epochs=0, rank_shared=False)
    with pytest.raises(ValueError, match="rank_shared must be True for geometry 'skd'"):
        Trainer(make_model(config=SKIPPING), recipe, Images(), progress=False)


def test_a_complete_list_stays():
    model = make_model(config=SKIPPING)
    trainer = Trainer(model, PIAD.replace(config=SKIPPING), Images(), calibration=STILL, progress=False)
    trainer._grow()
    assert model.config == SKIPPING and trainer.heads == (1, 2, 3, 4)


def test_the_full_width_is_trained_before_the_first_cut(monkeypatch):
    monkeypatch.setattr(trainer_module, "grow", lambda *arguments: ())
    model = make_model(config=SKD)
    model.trained_heads = (1, 4)  # of another training
    trainer = Trainer(model, PIAD, Images(), calibration=STILL, progress=False)
    assert trainer.heads == model.trained_heads == (4,)
    drawn, draw = [], trainer._draw
    monkeypatch.setattr(trainer, "_draw", lambda count: drawn.append(draw(count)) or drawn[-1])
    trainer.run()
    assert drawn and all(widths == [4] for widths in drawn)


def test_an_image_that_cannot_be_read_loses_no_epoch(tmp_path, monkeypatch):
    def unreadable(*arguments):
        if arguments[2]:
            raise OSError("no such image")
        return ((0, "mlp", 8),)

    monkeypatch.setattr(trainer_module, "grow", unreadable)
    with pytest.raises(OSError, match="no such image"):
        run(tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]["position"] == [1, 0, 5]


def test_the_recipe():
    recipe = RECIPES["skd"]
    assert (recipe.grow_epochs, recipe.keep, recipe.config.geometry, recipe.epochs) == (50, 0.125, "skd", 150)
    assert (recipe.lr * 256 / recipe.lr_batch, recipe.min_lr * 256 / recipe.lr_batch) == (2.5e-4, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": CONFIG}, "grow_epochs must be 0 unless geometry is 'skd' and all widths are trained, not 2"),
        ({"heads": (1, 4)}, "grow_epochs must be 0 unless geometry is 'skd'"),
        ({"sandwich": 3}, "grow_epochs must be 0 with weights, sandwich, compile or rank_shared=False, not 2"),
        ({"rank_shared": False}, "grow_epochs must be 0 with weights, sandwich, compile or rank_shared=False"),
        ({"grow_epochs": 9}, r"grow_epochs must be an integer in 0\.\.4, the epochs, not 9"),
        ({"keep": 1.0}, r"keep must be in \[0, 1\), not 1.0"),
    ],
)
def test_recipes_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        PIAD.replace(**changes)


def test_calibration_images_are_asked_for():
    with pytest.raises(ValueError, match="grow_epochs needs calibration images"):
        Trainer(make_model(config=SKD), PIAD, Images(), progress=False)
