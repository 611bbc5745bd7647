"""Steps that train several widths, of which a wider one teaches a narrower: US-Net's, Scala's, and what is refused."""

import plain
import pytest
import torch
import torch.nn.functional as F
from plain_training import assert_equal, cross_entropy, divergence, loop, thirty_steps
from training_runs import CONFIG, RECIPE, Images, make_model, read_log, train

from hydravit.recipes import RECIPES
from hydravit.training import Loss, Trainer, WidthSampler

pytestmark = pytest.mark.usefixtures("one_thread")

USNET = RECIPE.replace(sandwich=3, transfer="widest")
CHAIN = RECIPE.replace(sandwich=3, transfer="next", label_weight=1.0, full_epochs=1)


# Against a loop written from the papers ------------------------------------------------------------------------------


class Still(Images):
    """The images in float64, without augmentation."""

    def __getitem__(self, index):
        return self.images[index].double(), int(self.labels[index])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("teacher_of", "label_weight", "full_epochs"), [("", 0.0, 0), ("widest", 0.0, 0), ("next", 1.0, 4)]
)
def test_thirty_steps_are_those_of_a_plain_loop(teacher_of, label_weight, full_epochs, accumulate):
    lr, data = 1e-3, Still(20)
    constant = {"lr": lr, "min_lr": lr, "warmup_epochs": 0.0, "clip_norm": 0.0, "ema": 0.0}
    recipe = RECIPE.replace(epochs=30, batch_size=20, sandwich=3, accumulate=accumulate, **constant)
    recipe = recipe.replace(transfer=teacher_of, label_weight=label_weight, full_epochs=full_epochs)
    model = make_model().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, recipe, data, progress=False)
    drawn, found = thirty_steps(trainer)
    assert all(widths == [4] for widths in drawn[:full_epochs])
    assert {tuple(widths) for widths in drawn[full_epochs:]} == {(4, 3, 1), (4, 2, 1)}
    images, labels = torch.stack([image for image, _ in data]), data.labels
    target = 0.9 * F.one_hot(labels, 5).double() + 0.1 / 5

    def losses_of(weights, widths):
        logits, losses = [], []
        for i, heads in enumerate(widths):
            logits.append(plain.forward(weights, CONFIG, plain.prefix(CONFIG, heads), images))
            loss = cross_entropy(logits[i], target)
            if i and teacher_of:
                loss = label_weight * loss + divergence(logits[{"widest": 0, "next": i - 1}[teacher_of]], logits[i])
            losses.append(loss)
        return losses

    weights, losses = loop(before, drawn, losses_of, lr, recipe.weight_decay)
    assert_equal(model, found, weights, losses)


# Sampling ------------------------------------------------------------------------------------------------------------


def test_every_step_has_both_ends_and_others_between():
    sampler = WidthSampler([2, 6, 3, 5, 9], weights=[0, 1, 3, 0, 0], seed=1)
    drawn = [tuple(sampler.sandwich(3)) for _ in range(400)]
    assert set(drawn) == {(9, 6, 2), (9, 3, 2)}  # no weight of the ends counts, and 5 has none
    assert abs(drawn.count((9, 3, 2)) / 400 - 0.75) < 0.08
    assert sampler.sandwich(2) == [9, 2] and sampler.sandwich(4) == [9, 6, 3, 2]


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [3, 7])
@pytest.mark.parametrize("recipe", [USNET, CHAIN], ids=["widest", "next"])
@pytest.mark.parametrize("optimizer", ["dense", "active"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, recipe, stop_at, optimizer):
    recipe = recipe.replace(optimizer=optimizer)
    whole = train(tmp_path / "whole", recipe)
    train(tmp_path / "parts", recipe, stop_at=stop_at)
    resumed = train(tmp_path / "parts", recipe, resume=True)
    for (name, a), b in zip(whole.trained.state_dict().items(), resumed.trained.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_log_has_every_width_that_was_trained(tmp_path):
    train(tmp_path, CHAIN)
    first, *others = (set(entry["loss_per_width"]) for entry in read_log(tmp_path))
    assert first == {"4"} and all({"4", "1"} <= widths for widths in others)


def test_the_loss_of_a_distilled_model_is_between_its_second_classifiers():
    logits, wider = (torch.randn(6, 5), torch.randn(6, 5)), torch.randn(6, 5)
    labels = torch.arange(6) % 5
    loss = Loss(CHAIN).transfer(logits, labels, wider).mean()
    to_labels = F.cross_entropy(logits[0], labels, label_smoothing=CHAIN.smoothing)
    torch.testing.assert_close(loss, to_labels + divergence(wider, logits[1]))


def test_usnet_on_imagenet():
    recipe = RECIPES["usnet"]
    assert (recipe.sandwich, recipe.transfer, recipe.label_weight) == (4, "widest", 0.0)
    assert recipe.trained_heads == tuple(range(3, 13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sandwich": 1}, "sandwich must be 0, or 2 to 4, the number of widths, not 1"),
        ({"sandwich": 5}, "sandwich must be 0, or 2 to 4"),
        ({"sandwich": 4, "weights": (1, 0, 2, 1)}, "sandwich must be at most 3: weights leave out the others, not 4"),
        ({"sandwich": 2, "per_image": True}, "sandwich must be 0 with per_image, not 2"),
        ({"transfer": "next"}, "transfer must be '' without sandwich, not 'next'"),
        ({"sandwich": 2, "transfer": "first"}, "transfer must be 'widest' or 'next', or '' for none, not 'first'"),
        ({"label_weight": 1.0}, "label_weight must be 0 without transfer"),
        ({"sandwich": 2, "transfer": "next", "label_weight": -1.0}, "label_weight must be at least 0"),
        ({"full_epochs": 4}, "full_epochs must be an integer in 0..3, the epochs, not 4"),
    ],
)
def test_recipes_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        RECIPE.replace(**changes)
