"""Sampled-width training: gradients in place, the sampler, exact resuming, checkpoints, errors."""

import copy
import os
import pickle
import signal
import sys
from collections import Counter
from pathlib import Path

import adamw_runs
import pytest
import torch
import torch.nn.functional as F
from training_runs import RECIPE, Images, assert_ranks_agree, make_model, on_two_ranks, read_log, train

import hydravit_kernels as kernels
from hydravit.recipes import RECIPES, get_recipe
from hydravit.training import (
    Batches,
    SliceAdamW,
    SliceGradients,
    Trainer,
    WidthSampler,
    load_state,
    make_optimizer,
)
from hydravit.training.gradients import merge
from hydravit.training.memory import zeros_like

BACKENDS = kernels.available_backends()


def batch(count=6):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 5


def backward(model, heads, data=None):
    images, labels = data or batch()
    F.cross_entropy(model(images, heads=heads), labels).backward()


def assert_same_gradients(model, ordinary):
    for (name, a), b in zip(model.named_parameters(), ordinary.parameters(), strict=True):
        expected = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", adamw_runs.CASES)
def test_in_place_gradients_are_the_ordinary_ones(case, backend):
    changes, steps = adamw_runs.CASES[case]
    model, ordinary = (adamw_runs.make_model(backend, **changes) for _ in range(2))
    gradients, data = SliceGradients(model), adamw_runs.batch(0)
    widths = [heads for step in steps[:2] for heads in step]
    for heads in widths:
        backward(model, heads, data)
        backward(ordinary, heads, data)
    assert_same_gradients(model, ordinary)

    live = {slices.name: sum(view.numel() for view in slices.views) for slices in gradients.live()}
    for name, parameter in model.named_parameters():
        assert int(parameter.grad.count_nonzero()) <= live.get(name, 0) <= parameter.numel(), name
    norm = gradients.clip_norm_(0.01)
    expected = torch.nn.utils.clip_grad_norm_(ordinary.parameters(), 0.01)
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0.0)
    assert_same_gradients(model, ordinary)

    gradients.zero_()
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert not list(gradients.live())
    ordinary.zero_grad()
    backward(model, 4, data)
    backward(ordinary, 4, data)
    assert_same_gradients(model, ordinary)


def test_live_part_is_the_slice():
    model = make_model()
    gradients = SliceGradients(model)
    backward(model, 1)
    live = {slices.name: [tuple(view.shape) for view in slices.views] for slices in gradients.live()}
    assert live["blocks.0.attn.qkv.weight"] == [(8, 8)] * 3
    assert live["blocks.1.mlp.fc2.weight"] == [(8, 16)]
    assert live["head.weight"] == [(5, 8)] and live["head.bias"] == [(5,)]
    assert live["patch_embed.proj.weight"] == [(8, 1, 4, 4)]
    assert merge([(4, 4), (0, 2), (1, 2), (8, 1)]) == ((0, 3), (4, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_clearing_between_forward_and_backward(backend):
    model = make_model(backend=backend)
    gradients = SliceGradients(model)
    images, labels = batch()
    loss = F.cross_entropy(model(images, heads=2), labels)
    gradients.zero_()
    loss.backward()
    gradients.zero_()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_frozen_parameters_have_no_buffer():
    model = make_model()
    model.blocks[0].requires_grad_(False)
    gradients = SliceGradients(model)
    backward(model, 2)
    assert model.blocks[0].mlp.fc1.weight.grad is None
    assert not any(slices.name.startswith("blocks.0.") for slices in gradients.live())


def test_ordinary_mode_comes_back():
    model = make_model()
    gradients = SliceGradients(model)
    with pytest.raises(RuntimeError, match="already"):
        SliceGradients(model)
    backward(model, 2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.slice_gradients is None
        backward(copied, 3)
    gradients.close()
    assert model.slice_gradients is None
    model.zero_grad()
    backward(model, 2)


def test_hooks_and_lost_buffers_raise():
    model = make_model()
    gradients = SliceGradients(model)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(model.blocks[1].norm1.weight, register)(lambda _: None)
        with pytest.raises(RuntimeError, match=r"blocks\.1\.norm1\.weight.*hook"):
            backward(model, 1)
        handle.remove()
    backward(model, 1)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="zero_grad"):
        gradients.clip_norm_(1.0)
    with pytest.raises(RuntimeError, match="zero_grad"):
        backward(model, 1)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_autograd_grad_raises_and_leaves_the_buffers_alone(backend):
    model = make_model(backend=backend)
    SliceGradients(model)
    images, labels = batch()
    for wanted in (list(model.parameters()), [model.pos_embed], [model.head.weight]):
        loss = F.cross_entropy(model(images, heads=2), labels)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(loss, wanted)
        assert all(not parameter.grad.any() for parameter in model.parameters())
    # For other tensors it is right, and does not touch the buffers either.
    images.requires_grad_()
    (of_images,) = torch.autograd.grad(F.cross_entropy(model(images, heads=2), labels), images)
    assert of_images.any() and all(not parameter.grad.any() for parameter in model.parameters())
    F.cross_entropy(model(images, heads=2), labels).backward(inputs=[model.pos_embed])
    assert model.pos_embed.grad.any() and not model.head.weight.grad.any()


# Sampler and batches ------------------------------------------------------------------------------------------------


def test_sampler_frequencies():
    sampler = WidthSampler([1, 2, 4], seed=1)
    counts = Counter(sampler.draw(1) for _ in range(3000))
    assert all(abs(counts[k] / 3000 - 1 / 3) < 0.04 for k in (1, 2, 4))
    drawn = WidthSampler([1, 2, 4], [1, 0, 3], per_image=True).draw(4000)
    assert drawn.shape == (4000,) and drawn.dtype == torch.int64
    assert abs(float((drawn == 4).double().mean()) - 0.75) < 0.04 and not (drawn == 2).any()


def test_sampler_state_and_ranks():
    def draws(sampler):
        return [sampler.draw(1) for _ in range(30)]

    a, b, other = (WidthSampler(range(1, 9), seed=5, rank=rank) for rank in (0, 0, 1))
    assert draws(a) == draws(b) != draws(other)
    state = a.state_dict()
    expected = draws(a)
    b.load_state_dict(state)
    assert draws(b) == expected


@pytest.mark.parametrize("arguments", [([],), ([1, 1],), ([1, 2], [1.0]), ([1, 2], [0, 0]), ([1, 2], [-1, 2])])
def test_sampler_refuses(arguments):
    with pytest.raises(ValueError, match="heads|weights"):
        WidthSampler(*arguments)


def test_batches_start_anywhere_and_split_over_ranks():
    dataset = Images()
    whole = list(Batches(dataset, 8, seed=2).epoch(1))
    assert len(whole) == 5 == len(Batches(dataset, 8))
    torch.rand(3)
    for (a, la), (b, lb) in zip(whole[2:], Batches(dataset, 8, seed=2).epoch(1, start=2), strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    plain = Images(augment=False)
    parts = [list(Batches(plain, 11, rank=rank, world=2).epoch(0)) for rank in (0, 1)]
    seen = torch.cat([images for part in parts for images, _ in part]).flatten(1)
    assert len(seen.unique(dim=0)) == len(plain)
    few = Images(count=7)
    assert [len(labels) for rank in (0, 1, 2) for _, labels in Batches(few, 11, rank=rank, world=3).epoch(0)] == [2] * 3


@pytest.mark.long
def test_batches_from_workers_are_the_same():
    dataset = Images()
    own, workers = (list(Batches(dataset, 8, workers=workers).epoch(0)) for workers in (0, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(own, workers, strict=True))


# The loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop_at, per_image, optimizer",
    [(7, False, "dense"), (10, True, "dense"), (7, True, "active"), (10, False, "active")],
)
def test_resumed_run_is_the_uninterrupted_one(tmp_path, stop_at, per_image, optimizer):
    recipe = RECIPE.replace(per_image=per_image, optimizer=optimizer)
    whole = train(tmp_path / "whole", recipe)
    train(tmp_path / "parts", recipe, stop_at=stop_at)
    torch.rand(5)
    parts = train(tmp_path / "parts", recipe, resume=True)
    assert parts.step == whole.step == 15
    for a, b in ((whole.model, parts.model), (whole.average, parts.average)):
        for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
    for a, b in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), strict=True):
        a.pop("images_per_second", None), b.pop("images_per_second", None)
        assert a == b
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_checkpoint_that_holds_code_is_refused_without_bad_advice(tmp_path):
    torch.save({"format": 1, "identity": {}, "state": make_model()}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt cannot be read; it holds a hydravit\.model\.HydraViT"
    ) as caught:
        train(tmp_path, resume=True)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_resume_refuses_another_run(tmp_path):
    train(tmp_path, RECIPE.replace(epochs=1, warmup_epochs=0.0, ema=0.0))
    with pytest.raises(ValueError, match=r"recipe\.ema was 0\.0 .* 0\.5"):
        train(tmp_path, RECIPE.replace(epochs=1, warmup_epochs=0.0, ema=0.5), resume=True)
    with pytest.raises(ValueError, match="images was 44"):
        train(tmp_path, RECIPE.replace(epochs=1, warmup_epochs=0.0, ema=0.0), resume=True, dataset=Images(20))
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "nothing.pt", {})
    (tmp_path / "checkpoint.pt").write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read; expected a whole torch file"):
        train(tmp_path, resume=True)


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = train(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint.pt", "log.jsonl", "recipe.json"]


def test_loss_that_is_not_finite_stops(tmp_path):
    dataset = Images(augment=False)
    dataset.images[:] = float("nan")
    with pytest.raises(RuntimeError, match=r"loss is nan in step 0 .* heads=\d"):
        train(tmp_path, dataset=dataset)


def test_loss_decreases_and_is_logged(tmp_path):
    recipe = RECIPE.replace(epochs=12, lr=3e-3, smoothing=0.0)
    trainer = train(tmp_path, recipe, validation=Images(augment=False), validate_every=6)
    log = read_log(tmp_path)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert {k for entry in log for k in entry["loss_per_width"]} == {"1", "2", "3", "4"}
    assert set(log[5]["validation_top1"]) == {"1", "4"} and "validation_top1" not in log[4]
    assert trainer.trained is trainer.average.module
    assert log[-1]["lr"] == pytest.approx(recipe.min_lr, rel=0.5)


def test_epochs_are_shown(capsys):
    Trainer(make_model(), RECIPE, Images()).run()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all(line.endswith(" left") and line.isprintable() for line in lines)


def test_accumulation_and_soft_targets():
    recipe = RECIPE.replace(epochs=1, warmup_epochs=0.0, smoothing=0.1, clip_norm=0.0)
    models = [make_model() for _ in range(2)]  # without drop-path, whose draws depend on the parts
    for model, accumulate in zip(models, (1, 3), strict=True):
        Trainer(model, recipe.replace(accumulate=accumulate, eps=1e-3), Images(), progress=False).run()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    soft = train(recipe=recipe, mix=lambda images, labels: (images, F.one_hot(labels, 5).float()))
    hard = train(recipe=recipe)
    for a, b in zip(soft.model.parameters(), hard.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads, same", [((4,), True), ((1, 2, 4), False)])
def test_the_optimizer_of_the_slice(tmp_path, backend, heads, same):
    """With one width "active" trains what "dense" does, but for rounding; with several it trains something else."""
    # A large epsilon: AdamW divides the rounding of gradients that are zero (those of key biases) by itself otherwise.
    recipe = RECIPE.replace(eps=1e-3, heads=heads)
    trainers = []
    for optimizer in ("dense", "active"):
        model = make_model(backend=backend, drop_path=0.2)
        trainers.append(
            Trainer(model, recipe.replace(optimizer=optimizer), Images(), out=tmp_path / optimizer, progress=False)
        )
        trainers[-1].run()
    for dense, active in zip(*([t.model, t.average.module] for t in trainers), strict=True):
        for a, b in zip(active.parameters(), dense.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6) == same
    if same:
        logs = [read_log(tmp_path / optimizer) for optimizer in ("dense", "active")]
        assert [entry["loss"] for entry in logs[1]] == pytest.approx([entry["loss"] for entry in logs[0]], rel=1e-5)


def test_the_optimizer_of_the_slice_needs_shared_widths(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    recipe = RECIPE.replace(optimizer="active", rank_shared=False)
    with pytest.raises(ValueError, match="optimizer must be 'dense', not 'active', where 2 ranks draw widths of their"):
        Trainer(make_model(), recipe, Images(), progress=False)


def test_learning_rate():
    from hydravit.training import make_scheduler

    recipe = RECIPE.replace(epochs=10, warmup_epochs=2.0, cooldown_epochs=2, lr=1e-2, lr_batch=4, min_lr=1e-4)
    optimizer = make_optimizer(make_model(), recipe, world=2)
    scheduler = make_scheduler(optimizer, recipe, steps_per_epoch=5)
    rates = []
    for _ in range(50):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[10] == max(rates) == pytest.approx(1e-2 * 8 * 2 / 4)
    assert rates[0] == pytest.approx(recipe.warmup_lr * 4)
    assert rates[40:] == pytest.approx([recipe.min_lr * 4] * 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_decay_leaves_out_vectors_and_tokens():
    model = make_model(layer_scale=1.0, separate_classifiers=(1, 2, 3, 4))
    groups = make_optimizer(model, RECIPE).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    matrices = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight")
    assert names == {name for name, _ in model.named_parameters() if name.endswith(matrices)}


# Recipes ------------------------------------------------------------------------------------------------------------


def test_recipes():
    assert len(get_recipe("demo").trained_heads) >= 4
    paper = RECIPES["hydravit-imagenet"]
    assert paper.trained_heads == tuple(range(3, 13)) and paper.config.embed == 768
    with pytest.raises(ValueError, match="demo"):
        get_recipe("nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"lr": -1.0},
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"weight_decay": float("inf")},
        {"betas": (0.9, float("nan"))},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"min_lr": 1.0},
        {"warmup_lr": 1.0},
        {"warmup_epochs": 3.0},
        {"warmup_epochs": 2.0, "cooldown_epochs": 1},
        {"heads": (9,)},
        {"weights": (1.0,)},
        {"smoothing": 1.0},
        {"nothing": 1},
        {"optimizer": "sgd"},
    ],
)
def test_recipe_refuses(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        RECIPE.replace(**changes)


# Several processes --------------------------------------------------------------------------------------------------

# One process and two that share its batches: no drop-path or augmentation, whose draws go by the rank. A large epsilon:
# AdamW divides the rounding of gradients that are zero (those of key biases) by itself otherwise.
SHARED = RECIPE.replace(epochs=2, warmup_epochs=0.0, accumulate=2, eps=1e-3, clip_norm=0.1)
SHARED_CASES = {
    "dense": SHARED,
    "active": SHARED.replace(optimizer="active", clip_norm=0.0),
    "a width per rank": SHARED.replace(rank_shared=False, heads=(3,)),
}


def train_shared(recipe, rank=0, **options):
    model = make_model(seed=rank)  # ranks begin with the weights of rank 0
    return Trainer(model, recipe, Images(augment=False), progress=False, **options)


def skipped_step(rank):
    """A step that a GradScaler skips on one rank is skipped on all; the next one is none but for the scale."""
    model = make_model()
    gradients = SliceGradients(model)
    optimizer = SliceAdamW(model.parameters(), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    for overflow in (True, False):
        gradients.zero_()
        images, labels = batch(count=4)
        part = slice(2 * rank, 2 * rank + 2)
        scaler.scale(F.cross_entropy(model(images[part], heads=2), labels[part])).backward()
        if overflow and rank == 1:
            model.head.bias.grad[0] = float("inf")
        gradients.average_()
        scaler.step(optimizer)
        scaler.update()
        after = model.state_dict()
        assert overflow == all(torch.equal(after[name], value) for name, value in before.items())
    assert scaler.get_scale() == 2.0


def shared_batches(folder, rank):
    torch.set_num_threads(1)
    skipped_step(rank)
    for name, recipe in SHARED_CASES.items():
        trainer = train_shared(recipe, rank)
        trainer.run()
        assert_ranks_agree(trainer)
        torch.save([trainer.model.state_dict(), trainer.average.module.state_dict()], folder / f"{name} {rank}")


def test_two_ranks_are_one_with_both_batches(tmp_path):
    on_two_ranks(shared_batches, tmp_path)
    for name, recipe in SHARED_CASES.items():
        trainer = train_shared(recipe.replace(batch_size=16))
        before = copy.deepcopy(trainer.model)
        trainer.run()
        assert trainer.step == 4
        found = torch.load(tmp_path / f"{name} 0")
        for module, ours in zip((trainer.model, trainer.average.module), found, strict=True):
            for key, expected in module.state_dict().items():
                close = {"rtol": 1e-4, "atol": 1e-6, "msg": lambda m, key=key, name=name: f"{name}, {key}: {m}"}
                torch.testing.assert_close(ours[key], expected, **close)
                assert not torch.allclose(expected, before.state_dict()[key], rtol=1e-4, atol=1e-6)


def resumed(folder, rank):
    torch.set_num_threads(1)
    for optimizer, per_image in (("active", False), ("active", True), ("dense", False)):
        recipe = RECIPE.replace(epochs=2, warmup_epochs=0.0, optimizer=optimizer, per_image=per_image)
        name = f"{optimizer} {per_image}"
        whole = train(folder / name, recipe)
        train(folder / "parts" / name, recipe, stop_at=3)
        torch.distributed.barrier()  # rank 0 has written the checkpoint
        parts = train(folder / "parts" / name, recipe, resume=True)
        assert parts.step == whole.step == 4
        assert_ranks_agree(parts)
        for a, b in ((whole.model, parts.model), (whole.average, parts.average)):
            assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
        assert len(read_log(folder / name)) == len(read_log(folder / "parts" / name)) == 2


@pytest.mark.long
def test_resumed_on_two_ranks(tmp_path):
    on_two_ranks(resumed, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_where_it_is_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    parameter = torch.empty(4096, 4096).t()
    before = resident()
    zeros = zeros_like(parameter)
    assert (zeros.shape, zeros.stride(), zeros.dtype) == (parameter.shape, parameter.stride(), parameter.dtype)
    zeros[:64, :64] += 1
    assert resident() - before < parameter.nbytes / 16
    assert zeros.sum() == 64 * 64
