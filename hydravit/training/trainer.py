"""The training loop: one width per step, or one per image."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import hydravit_kernels as kernels
from hydravit.evaluation.accuracy import SizedDataset, accuracy
from hydravit.model import HydraViT
from hydravit.recipes import Recipe
from hydravit.training.batches import Batches
from hydravit.training.gradients import SliceGradients
from hydravit.training.optimization import make_average, make_optimizer, make_scheduler
from hydravit.training.progress import Progress
from hydravit.training.resuming import Interrupt, load_state, save_state
from hydravit.training.sampler import WidthSampler

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"


class Interrupted(RuntimeError):
    """``signal`` stopped the training after a whole step; it resumes from ``checkpoint``."""

    def __init__(self, received, step: int, checkpoint: Path | None):
        saved = f"resume from {checkpoint}" if checkpoint else "nothing was saved: there is no output folder"
        super().__init__(f"stopped by {received.name} after step {step}; {saved}")
        self.signal, self.checkpoint = received, checkpoint


class Trainer:
    """Trains a model by a recipe; every step draws a width and trains that (HydraViT, arXiv 2409.17978, section 3).

    Gradients are in place (``SliceGradients``), so that backward, clearing and clipping cost what the width costs. So
    do the optimizer and the average of the weights if the recipe's ``optimizer`` is ``"active"``. Under torchrun every
    rank makes a Trainer after ``init_process_group``, and rank 0 writes. All ranks draw the same widths, and exchange
    only gradients of these. If the recipe's ``rank_shared`` is False, every rank draws its own,
    DistributedDataParallel averages ordinary gradients, and the optimizer must be ``"dense"``.

    Args:
        model: trained on the device where it is. Frozen parameters stay as they are.
        dataset: items ``(image (C, H, W), target)``; uint8 images are divided by 255; a target is a class or a float
            tensor ``(classes,)`` of probabilities.
        out: folder for ``checkpoint.pt`` and ``log.jsonl`` (a line per epoch: losses, images/s), or None.
        validation: data set whose top-1 at the smallest and largest width is logged every ``validate_every`` epochs.
        mix: ``(images, labels) -> (images, targets)`` on every batch, such as timm's ``Mixup``.
        checkpoint_every, checkpoint_steps: epochs and steps between checkpoints; 0: none.
        workers: processes that load the data.
        progress: whether rank 0 shows how far it is, on standard error: see ``Progress``.
    """

    def __init__(
        self,
        model: HydraViT,
        recipe: Recipe,
        dataset: SizedDataset,
        *,
        out: str | Path | None = None,
        validation: SizedDataset | None = None,
        validate_every: int = 10,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        checkpoint_every: int = 1,
        checkpoint_steps: int = 0,
        workers: int = 0,
        progress: bool = True,
    ):
        self.model, self.recipe, self.mix = model, recipe, mix
        self.amp = AUTOCAST[recipe.amp]
        self.out = None if out is None else Path(out)
        self.validation, self.validate_every = validation, validate_every
        self.checkpoint_every, self.checkpoint_steps = checkpoint_every, checkpoint_steps
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.progress = progress and self.rank == 0
        self.device = next(model.parameters()).device
        self.heads = recipe.trained_heads
        for heads in self.heads:
            model.subnetwork(heads)  # refuses a width that the model does not have, before any training

        torch.manual_seed(recipe.seed + self.rank)  # for drop-path
        self.batches = Batches(
            dataset, recipe.batch_size, seed=recipe.seed, rank=self.rank, world=self.world, workers=workers
        )
        self.sampler = WidthSampler(
            self.heads,
            recipe.weights or None,
            per_image=recipe.per_image,
            seed=recipe.seed,
            rank=0 if recipe.rank_shared else self.rank,
        )
        self._in_place = self.world == 1 or recipe.rank_shared
        if not self._in_place and recipe.optimizer != "dense":
            raise ValueError(
                f"recipe: optimizer must be 'dense', not {recipe.optimizer!r}, where {self.world} ranks draw widths of "
                "their own; with rank_shared=True they draw alike"
            )
        self.average = make_average(model, recipe)
        self.optimizer = make_optimizer(model, recipe, self.world, self.average)
        self.scheduler = make_scheduler(self.optimizer, recipe, len(self.batches))
        self.scaler = torch.amp.GradScaler("cuda", enabled=recipe.amp == "fp16" and self.device.type == "cuda")
        self.gradients: SliceGradients | None = None
        self._network: nn.Module = model
        self.epoch = self.batch = self.step = 0  # `batch` is the next one of the epoch, `step` counts those done
        self._losses: dict[int, list[float]] = {}  # per width, sum and number of images in this epoch

    @property
    def trained(self) -> HydraViT:
        """The model to evaluate and save: the average of the weights if the recipe has one."""
        return self.model if self.average is None else cast(HydraViT, self.average.module)

    def run(self) -> HydraViT:
        """Train to the end of the recipe; return ``trained``.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with a checkpoint written.
            RuntimeError: the loss is not finite; the message names step and width.
            OSError: a checkpoint could not be written.
        """
        if self.out is not None and self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self._forget_log(self.out / LOG)
        if self._in_place:
            self._share_weights()
            self.gradients = SliceGradients(self.model)
        else:
            devices = [self.device] if self.device.type == "cuda" else None
            self._network = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        self.model.train()
        try:
            steps = self.recipe.epochs * len(self.batches)
            shown = Progress(self.recipe.epochs, steps, self.step, shown=self.progress)
            with Interrupt() as interrupt, shown as progress:
                while self.epoch < self.recipe.epochs:
                    self._run_epoch(interrupt, progress)
        finally:
            if self.gradients is not None:
                self.gradients.close()
            self.gradients, self._network = None, self.model  # the process group may end after this
            self.model.zero_grad(set_to_none=True)
        return self.trained

    def _share_weights(self) -> None:
        """Give all ranks the weights of rank 0, as DistributedDataParallel does."""
        for module in (self.model, self.average):
            if self.world > 1 and module is not None:
                for tensor in module.state_dict().values():
                    sent = tensor.contiguous()
                    dist.broadcast(sent, 0)
                    tensor.copy_(sent)

    def _run_epoch(self, interrupt: Interrupt, progress: Progress) -> None:
        start, done = time.perf_counter(), 0
        for images, labels in self.batches.epoch(self.epoch, self.batch):
            heads = self.sampler.draw(len(images))
            loss = self._step(images, labels, heads)
            self.batch += 1
            self.step += 1
            done += len(images)
            progress.step(self.epoch + 1, loss, heads)
            self._stop_if_asked(interrupt)
            if self.checkpoint_steps and self.step % self.checkpoint_steps == 0:
                self.save()
        if not self.rank:
            progress.epoch(self._log(done / (time.perf_counter() - start)))
        self.epoch, self.batch = self.epoch + 1, 0
        self._losses.clear()
        last = self.epoch == self.recipe.epochs
        if self.checkpoint_every and (last or self.epoch % self.checkpoint_every == 0):
            self.save()

    def _step(self, images: Tensor, labels: Tensor, heads: int | Tensor) -> float:
        """Do one optimizer step; return the batch's mean loss."""
        self._zero_gradients()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        widths = torch.as_tensor(heads, dtype=torch.int64, device="cpu").expand(len(images))
        parts, losses = min(self.recipe.accumulate, len(images)), []
        for part in torch.arange(len(images), dtype=torch.int64, device="cpu").tensor_split(parts):
            start, stop = int(part[0]), int(part[-1]) + 1
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                logits = self._network(images[start:stop], heads=heads if isinstance(heads, int) else heads[start:stop])
            loss = F.cross_entropy(
                logits.float(), labels[start:stop], label_smoothing=self.recipe.smoothing, reduction="none"
            )
            self.scaler.scale(loss.sum() / len(images)).backward()
            losses.append(loss.detach())
        mean = self._track(torch.cat(losses), widths)
        self._update()
        return mean

    def _zero_gradients(self) -> None:
        if self.gradients is not None:
            self.gradients.zero_()
        else:  # zeros instead of None, so that parameters that no width of this step uses still decay
            self.optimizer.zero_grad(set_to_none=False)

    @kernels.annotate("optimizer")
    def _update(self) -> None:
        """Update the weights from the gradients, and everything else that changes once a step."""
        if self.gradients is not None and self.world > 1:
            self.gradients.average_()
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            if self.gradients is not None:
                self.gradients.clip_norm_(self.recipe.clip_norm)
            else:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None and self.recipe.optimizer == "dense":
            self.average.update_parameters(self.model)

    def _track(self, losses: Tensor, widths: Tensor) -> float:
        """Add the images' losses ``(B,)`` to their widths'; return the mean, which must be finite."""
        losses = losses.double().cpu()
        mean = float(losses.mean())
        if not math.isfinite(mean):
            bad = sorted(set(widths[~losses.isfinite()].tolist()))
            raise RuntimeError(
                f"the loss is {mean} in step {self.step} (epoch {self.epoch + 1}, batch {self.batch + 1}) at "
                f"heads={', '.join(map(str, bad))}; the weights are those before this step. "
                "A lower lr, clip_norm or amp=bf16 in place of fp16 may help"
            )
        for heads in set(widths.tolist()):
            chosen = losses[widths == heads]
            entry = self._losses.setdefault(heads, [0.0, 0])
            entry[0] += float(chosen.sum())
            entry[1] += len(chosen)
        return mean

    def _log(self, images_per_second: float) -> dict:
        """Log one line for the epoch, with rank 0's loss, and the validation if it is due; return what it says."""
        entry: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.scheduler.get_last_lr()[0],
            "loss": sum(s for s, _ in self._losses.values()) / sum(n for _, n in self._losses.values()),
            "loss_per_width": {k: s / n for k, (s, n) in sorted(self._losses.items())},
            "images_per_second": round(images_per_second, 1),
        }
        due = self.validate_every and (self.epoch + 1) % self.validate_every == 0
        if self.validation is not None and due:
            ends = sorted({min(self.heads), max(self.heads)})
            training = self.trained.training
            self.trained.eval()
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
                found = accuracy(self.trained, self.validation, ends)
            self.trained.train(training)
            entry["validation_top1"] = {k: top1 for k, (top1, _) in found.items()}
        if self.out is not None:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return entry

    def _stop_if_asked(self, interrupt: Interrupt) -> None:
        asked = interrupt.signal is not None
        if self.world > 1:  # all ranks stop at the same step; otherwise the others would wait for ever
            anyone = torch.tensor(int(asked), dtype=torch.int64, device=self.device)
            dist.all_reduce(anyone)
            asked = bool(anyone)
        if asked:
            path = self.save()
            raise Interrupted(interrupt.signal or signal.SIGTERM, self.step, path)

    # Saving and going on ----------------------------------------------------------------------------------------------

    def _identity(self) -> dict:
        recipe = self.recipe.to_dict()
        del recipe["config"]  # the model has the one that counts
        return {
            "recipe": recipe,
            "config": self.model.config.to_dict(),
            "images": len(self.batches.dataset),
            "ranks": self.world,
            "trainable": [name for name, p in self.model.named_parameters() if p.requires_grad],
        }

    def save(self) -> Path | None:
        """Write ``checkpoint.pt``; return its path, or None without an output folder. Every rank must call it."""
        if self.out is None:
            return None
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        own = {"sampler": self.sampler.state_dict(), "torch": torch.get_rng_state(), "cuda": cuda}
        ranks = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(ranks, own)
        path = self.out / CHECKPOINT
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ranks": ranks,
                "position": [self.epoch, self.batch, self.step],
                "losses": self._losses,
            }
            save_state(path, state, self._identity())
        return path

    def resume(self, path: str | Path, *, verify: bool = True) -> None:
        """Resume from a checkpoint. The weights at the end are exactly those of a run that was never interrupted.

        Raises:
            FileNotFoundError, ValueError: those of ``load_state``; nothing is changed then.
        """
        state = load_state(path, self._identity(), verify=verify)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        own = state["ranks"][self.rank]
        self.sampler.load_state_dict(own["sampler"])
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], self.device)
        self.epoch, self.batch, self.step = state["position"]
        self._losses = state["losses"]

    def _forget_log(self, log: Path) -> None:
        """Drop the lines of epochs that are still to come: the log may be newer than the checkpoint."""
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["epoch"] <= self.epoch]
            log.write_text("".join(kept), encoding="utf-8")
