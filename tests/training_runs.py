"""Trainings of a few steps, in one process and on two ranks, for the tests of training."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import shake

from hydravit import HydraViT, HydraViTConfig
from hydravit.recipes import Recipe
from hydravit.training import Interrupted, Trainer

CONFIG = HydraViTConfig(
    image_size=8, patch_size=4, in_channels=1, num_classes=5, depth=2, max_heads=4, head_dim=8, mlp_ratio=2.0
)
RECIPE = Recipe(
    config=CONFIG, epochs=3, batch_size=8, lr=1e-3, lr_batch=0, warmup_epochs=1.0, clip_norm=1.0, ema=0.9, seed=3
)


class Images(torch.utils.data.Dataset):
    """Random images whose brightness is their class, with augmentation from torch's global generator."""

    def __init__(self, count=44, augment=True):
        self.labels = torch.arange(count) % 5
        noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.images = self.labels[:, None, None, None] * 0.5 + 0.1 * noise
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = 0.05 * torch.randn(1, 8, 8) if self.augment else 0.0
        return self.images[index] + noise, int(self.labels[index])


def make_model(seed=0, backend="reference", config=CONFIG, **changes):
    torch.manual_seed(seed)
    return shake(HydraViT(dataclasses.replace(config, **changes), backend=backend))


def train(out=None, recipe=RECIPE, stop_at=None, resume=False, dataset=None, **options):
    """The trainer after its run, or after SIGTERM in step ``stop_at``."""
    dataset = Images() if dataset is None else dataset
    model = make_model(config=recipe.config, drop_path=0.2)
    trainer = Trainer(model, recipe, dataset, out=out, progress=False, **options)
    if resume:
        trainer.resume(out / "checkpoint.pt")
    if stop_at is None:
        trainer.run()
        return trainer
    step = trainer._step

    def stopping(*arguments):
        if trainer.step + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    trainer._step = stopping
    with pytest.raises(Interrupted, match=f"SIGTERM after step {stop_at}"):
        trainer.run()
    return trainer


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


_RANK = """
import sys, torch, torch.distributed as dist
sys.path[:0] = {folders!r}
from {module} import {function} as run
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size=2)
run(__import__("pathlib").Path({folder!r}), rank)
dist.barrier()
dist.destroy_process_group()
"""


def on_two_ranks(function, folder):
    """``function(folder, rank)`` of a test's file in two processes that are ranks of one group."""
    file = Path(function.__code__.co_filename)
    folders = [str(Path(__file__).parent), str(file.parent)]
    script = _RANK.format(folders=folders, module=file.stem, folder=str(folder), function=function.__name__)
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=900) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def assert_ranks_agree(trainer):
    for module in (trainer.model, trainer.average.module):
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        both = [torch.empty_like(weights) for _ in range(2)]
        torch.distributed.all_gather(both, weights)
        assert torch.equal(*both)
