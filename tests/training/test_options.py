"""Options of a recipe: what each changes and leaves alone, and that training resumes with all, also on two ranks."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from small import same
from training_runs import RECIPE, Images, assert_ranks_agree, make_model, on_two_ranks, read_log, train

import hydravit_kernels as kernels
from hydravit import fused_model
from hydravit.checkpoint import save_checkpoint
from hydravit.cli import main
from hydravit.data import load_dataset
from hydravit.preprocessing import Preprocessing
from hydravit.training import Loss, Teacher, Trainer, make_optimizer, make_teacher

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = kernels.available_backends()


def teach(images):
    """A teacher whose logits follow from each image alone."""
    return images.mean((1, 2, 3))[:, None] * torch.arange(5.0) - torch.arange(5.0) ** 2 / 4


# Each of these changes what a step computes; together they are the rest of a long recipe.
OPTIONS = {
    "accumulate": 2,
    "layer_decay": 0.7,
    "freeze": ("patch_embed", "blocks.0.mlp.fc1.weight"),
    "distillation": "soft",
    "temperature": 2.0,
    "grad_checkpointing": True,
}


def trained_weights(recipe, backend="reference", dataset=None, **options):
    model = make_model(backend=backend, drop_path=0.2)
    Trainer(model, recipe, dataset or Images(), progress=False, **options).run()
    return model


# Learning rates and frozen parameters -------------------------------------------------------------------------------


def rates(model, recipe):
    groups = make_optimizer(model, recipe).param_groups
    of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: of[id(parameter)] for name, parameter in model.named_parameters()}


def test_layer_decay():
    found = rates(make_model(pre_norm=True), RECIPE.replace(layer_decay=0.5))
    after = {"head": 0, "norm": 0, "blocks.1": 1, "blocks.0": 2, "norm_pre": 3, "cls_token": 3, "pos_embed": 3}
    for name, rate in found.items():
        part = next((part for part in after if f"{name}.".startswith(f"{part}.")), "cls_token")
        assert rate == RECIPE.lr * 0.5 ** after[part], name
    assert set(rates(make_model(), RECIPE).values()) == {RECIPE.lr}


@pytest.mark.needs("package timm")
def test_layer_decay_is_that_of_timm():
    """But for the final norm, which timm gives the rate of the last block, and BEiT that of the classifier."""
    import hydravit.timm_models  # noqa: F401, I001
    from timm.optim import param_groups_layer_decay

    model = make_model()
    groups = param_groups_layer_decay(model, layer_decay=0.6)
    expected = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    for name, rate in rates(model, RECIPE.replace(layer_decay=0.6, lr=1.0)).items():
        if not name.startswith("norm."):
            assert rate == pytest.approx(expected[id(model.get_parameter(name))]), name


def test_the_log_has_the_largest_learning_rate(tmp_path):
    rates = {decay: [] for decay in (1.0, 0.5)}
    for decay, found in rates.items():
        train(tmp_path / str(decay), RECIPE.replace(layer_decay=decay))
        found += [entry["lr"] for entry in read_log(tmp_path / str(decay))]
    assert rates[0.5] == rates[1.0]


@pytest.mark.parametrize("optimizer", ["dense", "active"])
def test_what_is_frozen_stays(optimizer):
    begun = make_model(drop_path=0.2).state_dict()
    weights = trained_weights(RECIPE.replace(optimizer=optimizer, freeze=("blocks.0", "pos_embed"))).state_dict()
    for name, before in begun.items():
        assert torch.equal(weights[name], before) == name.startswith(("blocks.0.", "pos_embed")), name


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match="freeze: the model has no 'block'; it has patch_embed, blocks, norm, head, "):
        train(recipe=RECIPE.replace(freeze=("block",)))
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        train(recipe=RECIPE.replace(freeze=tuple(name for name, _ in make_model().named_parameters())))


# Distillation -------------------------------------------------------------------------------------------------------


def test_losses_of_distillation():
    """As in the public code of DeiT, but for its division of the soft term by the number of classes."""
    logits, taught, targets = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    for smoothing in (0.0, 0.1):
        base = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        recipe = RECIPE.replace(smoothing=smoothing, distillation_weight=0.3, temperature=3.0)
        torch.testing.assert_close(Loss(recipe)(logits, targets), base)
        hard = Loss(recipe.replace(distillation="hard"))(logits, targets, taught)
        torch.testing.assert_close(hard.mean(), 0.7 * base.mean() + 0.3 * F.cross_entropy(logits, taught.argmax(1)))
        soft = Loss(recipe.replace(distillation="soft"))(logits, targets, taught)
        log_p, log_q = F.log_softmax(logits / 3.0, dim=1), F.log_softmax(taught / 3.0, dim=1)
        deit = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * (3.0 * 3.0) / logits.numel()
        torch.testing.assert_close(soft.mean(), 0.7 * base.mean() + 0.3 * 5 * deit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_a_teacher_who_knows_the_labels(distillation, backend):
    """It teaches what the labels do: the images' brightness tells their class."""
    recipe = RECIPE.replace(smoothing=0.0, warmup_epochs=0.0, epochs=1)
    plain = trained_weights(recipe, backend)
    distilled = recipe.replace(distillation=distillation, distillation_weight=1.0)

    def knows(images):
        return 1e3 * F.one_hot((images.mean((1, 2, 3)) / 0.5).round().long(), 5).float()

    taught = trained_weights(distilled, backend, teacher=knows)
    for ours, expected in zip(taught.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["dense", "active"])
def test_a_distillation_token_learns_from_the_teacher(optimizer):
    """Its classifier from the teacher alone, the other one from the labels alone."""
    recipe = RECIPE.replace(distillation="hard", weight_decay=0.0, optimizer=optimizer, epochs=1, warmup_epochs=0.0)
    for weight, resting in ((1.0, "head."), (1e-9, "head_dist.")):
        model = make_model(distilled=True)
        before = copy.deepcopy(model.state_dict())
        recipe = recipe.replace(distillation_weight=weight, eps=1e-3)
        Trainer(model, recipe, Images(), teacher=teach, progress=False).run()
        for name, value in model.state_dict().items():
            if name.startswith(("head.", "head_dist.")):
                assert torch.allclose(value, before[name], rtol=0.0, atol=1e-6) == name.startswith(resting), name
        assert model(torch.ones(2, 1, 8, 8)).shape == (2, 5)  # the mean again


def test_distillation_and_a_teacher_belong_together():
    with pytest.raises(ValueError, match="distillation 'soft' needs a teacher"):
        Trainer(make_model(), RECIPE.replace(distillation="soft"), Images())
    with pytest.raises(ValueError, match="distillation must be 'hard' or 'soft'"):
        Trainer(make_model(), RECIPE, Images(), teacher=teach)
    with pytest.raises(ValueError, match="distillation must be 'hard' or 'soft' where a teacher is"):
        RECIPE.replace(teacher="resnet18")


def test_a_teacher_gets_images_as_it_knows_them():
    """Other means and deviations, another size, colour for grey."""

    class Keeps(torch.nn.Module):
        weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            self.images = images
            return images.mean((2, 3)) * self.weight

    grey, colour = Preprocessing(8, (0.5,), (0.25,)), Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    pixels = torch.rand(2, 1, 1, 1).expand(2, 1, 8, 8)
    teacher = Teacher(Keeps(), grey, colour)
    logits = teacher((pixels - 0.5) / 0.25)
    assert teacher.network.images.shape == (2, 3, 16, 16)
    for channel, (mean, std) in enumerate(zip(colour.mean, colour.std, strict=True)):
        torch.testing.assert_close(logits[:, channel], (pixels[:, 0, 0, 0] - mean) / std)
    with pytest.raises(ValueError, match="the teacher takes images of 1 channels, not of 3"):
        Teacher(Keeps(), colour, grey)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", split="train")


@pytest.fixture
def checkpoint(digits, tmp_path):
    """A checkpoint file of ours, for the digits."""
    model = fused_model(config=RECIPE.config, num_classes=10)
    save_checkpoint(
        tmp_path / "teacher.safetensors", model, preprocessing=digits.preprocessing, class_names=digits.class_names
    )
    return tmp_path / "teacher.safetensors"


def test_a_teacher_from_a_checkpoint(digits, checkpoint):
    recipe = RECIPE.replace(distillation="hard", teacher=str(checkpoint))
    images = torch.stack([digits[i][0] for i in range(3)])
    model = fused_model(checkpoint=checkpoint).eval()
    torch.testing.assert_close(make_teacher(recipe, digits)(images), model(images).detach())
    assert make_teacher(RECIPE, digits) is None
    other = copy.copy(digits)
    other.class_names = tuple("abcdefghij")
    with pytest.raises(ValueError, match="has the classes 0, 1, .* and the data a, b"):
        make_teacher(recipe, other)


def test_distillation_by_the_command_line(checkpoint, tmp_path, capsys):
    few = ("--set", "depth=1", "--set", "max_heads=2", "--epochs", "1", "--set", "warmup_epochs=0.0", "--no-evaluate")
    train = ["train", "--recipe", "demo", "--out", str(tmp_path / "run"), *few, "--set", f"teacher={checkpoint}"]
    assert main(train) == 2 and "distillation must be 'hard' or 'soft' where a teacher is" in capsys.readouterr().err
    assert main([*train, "--set", "distillation=soft", "--set", "freeze=patch_embed,cls_token"]) == 0
    said = capsys.readouterr()
    assert "epoch 1/1: loss" in said.err and "frozen: patch_embed, cls_token" in said.out
    assert f"{checkpoint}: soft distillation of weight 0.5" in said.out


@pytest.mark.long
@pytest.mark.needs("package timm")
def test_a_teacher_of_timm(digits, tmp_path):
    from hydravit.timm_models import timm

    network = timm.create_model("test_resnet", num_classes=10)
    torch.save(network.state_dict(), tmp_path / "resnet.pt")
    recipe = RECIPE.replace(distillation="soft", teacher="test_resnet", teacher_checkpoint=str(tmp_path / "resnet.pt"))
    images = torch.stack([digits[i][0] for i in range(2)])
    teacher = make_teacher(recipe, digits)
    assert teacher(images).shape == (2, 10)
    given = F.interpolate((images * 0.376 + 0.305 - 0.5).expand(2, 3, 8, 8) / 0.5, 160, mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(images), network.eval()(given).detach(), rtol=1e-3, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="teacher_checkpoint: nothing.pt does not exist"):
        make_teacher(recipe.replace(teacher_checkpoint="nothing.pt"), digits)


# How the model computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_changes_no_bit(backend):
    recipe = RECIPE.replace(per_image=True, optimizer="active")
    models = [trained_weights(recipe.replace(grad_checkpointing=on), backend) for on in (False, True)]
    assert same(*models)
    assert not models[1].grad_checkpointing


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_trains_alike(backend):
    torch._dynamo.reset()
    recipe = RECIPE.replace(epochs=1, warmup_epochs=0.0, eps=1e-3)
    models = []
    for backend_of_compile in ("", "aot_eager"):
        model = make_model(backend=backend)
        Trainer(model, recipe.replace(compile=backend_of_compile), Images(), progress=False).run()
        models.append(model)
    for ours, expected in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_needs_the_dense_optimizer():
    with pytest.raises(ValueError, match="optimizer must be 'dense' with compile, not 'active'"):
        RECIPE.replace(compile="inductor", optimizer="active")


# Going on, and several ranks ----------------------------------------------------------------------------------------


def assert_same_runs(whole, parts):
    assert parts.step == whole.step
    assert same(whole.model, parts.model) and same(whole.average.module, parts.average.module)


@pytest.mark.parametrize("optimizer, per_image", [("dense", False), ("active", True)])
def test_resumed_with_every_option(tmp_path, optimizer, per_image):
    recipe = RECIPE.replace(**OPTIONS, optimizer=optimizer, per_image=per_image)
    whole = train(tmp_path / "whole", recipe, teacher=teach)
    train(tmp_path / "parts", recipe, teacher=teach, stop_at=7)
    assert_same_runs(whole, train(tmp_path / "parts", recipe, teacher=teach, resume=True))


@pytest.mark.long
def test_resumed_when_compiled(tmp_path):
    torch._dynamo.reset()
    recipe = RECIPE.replace(compile="aot_eager", epochs=1, warmup_epochs=0.0, heads=(3,))
    whole = train(tmp_path / "whole", recipe)
    train(tmp_path / "parts", recipe, stop_at=2)
    assert_same_runs(whole, train(tmp_path / "parts", recipe, resume=True))


# As for the options alone, but no drop-path or augmentation, whose draws go by the rank, and a large epsilon: AdamW
# divides the rounding of gradients that are zero by itself otherwise.
SHARED = RECIPE.replace(**OPTIONS, epochs=2, warmup_epochs=0.0, eps=1e-3, clip_norm=0.1)
SHARED_CASES = {
    "dense": SHARED,
    "active": SHARED.replace(optimizer="active"),
    "a width per rank": SHARED.replace(rank_shared=False, heads=(3,), grad_checkpointing=False),
}


def on_a_rank(folder, rank):
    torch.set_num_threads(1)
    for name, recipe in SHARED_CASES.items():
        trainer = Trainer(make_model(seed=rank), recipe, Images(augment=False), teacher=teach, progress=False)
        trainer.run()
        assert_ranks_agree(trainer)
        torch.save(trainer.model.state_dict(), folder / f"{name} {rank}")


@pytest.mark.long
def test_two_ranks_are_one_with_both_batches(tmp_path):
    on_two_ranks(on_a_rank, tmp_path)
    for name, recipe in SHARED_CASES.items():
        model = make_model()
        Trainer(model, recipe.replace(batch_size=16), Images(augment=False), teacher=teach, progress=False).run()
        found = torch.load(tmp_path / f"{name} 0")
        for key, expected in model.state_dict().items():
            torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)


# TensorBoard --------------------------------------------------------------------------------------------------------


@pytest.mark.needs("package tensorboard")
def test_tensorboard_shows_the_log(tmp_path):
    """Also of an interrupted run, whose epochs it shows once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "validation": Images(augment=False), "validate_every": 2}
    train(tmp_path, stop_at=7, **options)
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    for _ in range(2):  # the second time from a checkpoint that is older than what TensorBoard shows
        (tmp_path / "checkpoint.pt").write_bytes(checkpoint)
        train(tmp_path, resume=True, **options)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    log = read_log(tmp_path)
    for name in ("loss", "lr"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert len(events.Scalars(name)) == 3
        assert shown == pytest.approx({entry["step"]: entry[name] for entry in log})
    (validated,) = events.Scalars("validation_top1/4 heads")
    assert (validated.step, validated.value) == (10, pytest.approx(log[1]["validation_top1"]["4"]))


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not installed
    with pytest.raises(RuntimeError, match=r"pip install 'hydravit\[tensorboard\]'"):
        train(tmp_path, tensorboard=True)
