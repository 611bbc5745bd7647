"""The training loop: one width per step, one per image, or several one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import hydravit_kernels as kernels
from hydravit import __version__
from hydravit.checkpoint import model_metadata
from hydravit.compression import CalibrationImages
from hydravit.compression.planning import grow, prices_of
from hydravit.compression.source import working_copy
from hydravit.evaluation.accuracy import SizedDataset, accuracy
from hydravit.evaluation.evaluate import environment
from hydravit.model import HydraViT
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import Recipe
from hydravit.training.batches import Batches
from hydravit.training.folder import RunFolder
from hydravit.training.gradients import SliceGradients
from hydravit.training.losses import Loss, pupil
from hydravit.training.optimization import freeze, make_average, make_optimizer, make_scheduler
from hydravit.training.progress import Progress
from hydravit.training.resuming import Interrupt, load_state, save_state
from hydravit.training.sampler import WidthSampler
from hydravit.training.tensorboard import TensorBoard

CALIBRATION_IMAGES = 1024
AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(RuntimeError):
    """``signal`` stopped the training after a whole step; it resumes from ``checkpoint``."""

    def __init__(self, received, step: int, checkpoint: Path | None):
        saved = f"resume from {checkpoint}" if checkpoint else "nothing was saved: there is no output folder"
        super().__init__(f"stopped by {received.name} after step {step}; {saved}")
        self.signal, self.checkpoint = received, checkpoint


class Trainer:
    """Trains a model by a recipe; every step draws a width and trains that (HydraViT, arXiv 2409.17978, section 3).

    A recipe's ``sandwich`` trains several widths in a step, on the same images: their losses add up, and a wider one
    can teach a narrower one (``transfer``). That costs the sum of their forward and backward passes and one update.

    Gradients are in place (``SliceGradients``), so that backward, clearing and clipping cost what the width costs. So
    do the optimizer and the average of the weights if the recipe's ``optimizer`` is ``"active"``. Under torchrun every
    rank makes a Trainer after ``init_process_group``, and rank 0 writes. All ranks draw the same widths, and exchange
    only gradients of these. If the recipe's ``rank_shared`` is False, every rank draws its own,
    DistributedDataParallel averages ordinary gradients, and the optimizer must be ``"dense"``.

    Args:
        model: trained on the device where it is. Frozen parameters stay as they are.
        dataset: items ``(image (C, H, W), target)``; uint8 images are divided by 255; a target is a class or a float
            tensor ``(classes,)`` of probabilities.
        out: folder for ``checkpoint.pt``, ``recipe.json`` and ``log.jsonl`` (a line per epoch: losses, images/s), or
            None.
        preprocessing, class_names: of the data, for those who use the checkpoint.
        validation: data set whose top-1 at the smallest and largest width is logged every ``validate_every`` epochs.
        mix: ``(images, labels) -> (images, targets)`` on every batch, such as timm's ``Mixup``.
        teacher: ``images -> logits (B, classes)`` for the recipe's distillation: see ``make_teacher``.
        calibration: for the recipe's ``grow_epochs``: the images of training without augmentation, of which some, the
            same every time, tell what matters.
        checkpoint_every, checkpoint_steps: epochs and steps between checkpoints; 0: only the last. Each is written
            during the next step, when its loss is known to be finite, so that one can go on from every checkpoint.
        workers: processes that load the data.
        progress: whether rank 0 shows how far it is, on standard error: see ``Progress``.
        tensorboard: whether the log is also written for TensorBoard, to ``out``/tensorboard.
    """

    def __init__(
        self,
        model: HydraViT,
        recipe: Recipe,
        dataset: SizedDataset,
        *,
        out: RunFolder | str | Path | None = None,
        preprocessing: Preprocessing | None = None,
        class_names: Sequence[str] | None = None,
        validation: SizedDataset | None = None,
        validate_every: int = 10,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
        calibration: SizedDataset | None = None,
        checkpoint_every: int = 1,
        checkpoint_steps: int = 0,
        workers: int = 0,
        progress: bool = True,
        tensorboard: bool = False,
    ):
        self.model, self.recipe, self.mix = model, recipe, mix
        self.loss, self.teacher = Loss(recipe), teacher
        if recipe.distillation and teacher is None:
            raise ValueError(f"recipe: distillation {recipe.distillation!r} needs a teacher")
        if teacher is not None and not recipe.distillation:
            raise ValueError("recipe: distillation must be 'hard' or 'soft' where there is a teacher, not ''")
        if recipe.grow_epochs and calibration is None:
            raise ValueError("recipe: grow_epochs needs calibration images")
        self.calibration = calibration
        self.amp = AUTOCAST[recipe.amp]
        self.folder = out if out is None or isinstance(out, RunFolder) else RunFolder(out)
        self.preprocessing, self.class_names = preprocessing, class_names
        self.validation, self.validate_every = validation, validate_every
        self.checkpoint_every, self.checkpoint_steps = checkpoint_every, checkpoint_steps
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.progress = progress and self.rank == 0
        self.tensorboard = self.folder.tensorboard if tensorboard and self.rank == 0 and self.folder else None
        self.device = next(model.parameters()).device
        self.heads = recipe.trained_heads
        self._config = model.config  # as training starts, without the cuts that come
        self._grown = 0  # in how many epochs the list of cuts has grown
        for heads in () if recipe.grow_epochs else self.heads:  # the widths of a growing list come later
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
        if not self._in_place and model.config.geometry == "skd":  # DistributedDataParallel waits for every gradient
            raise ValueError("recipe: rank_shared must be True for geometry 'skd', whose widths can skip branches")
        freeze(model, recipe)
        self.average = make_average(model, recipe)
        self.optimizer = make_optimizer(model, recipe, self.world, self.average)
        self.scheduler = make_scheduler(self.optimizer, recipe, len(self.batches))
        self.scaler = torch.amp.GradScaler("cuda", enabled=recipe.amp == "fp16" and self.device.type == "cuda")
        self.gradients: SliceGradients | None = None
        self._network: Callable[..., Tensor] = model
        self.epoch = self.batch = self.step = 0  # `batch` is the next one of the epoch, `step` counts those done
        self._losses: dict[int, list[float]] = {}  # per width, sum and number of images in this epoch
        self._due = bool(checkpoint_every or checkpoint_steps)  # whether the next step writes a checkpoint
        self._before: dict = {}  # the random state before this step
        self._changed: dict[str, list] = {}  # what the recipe says now and said in the checkpoint that is resumed from
        self.saved_step: int | None = None  # the number of steps done in the last checkpoint
        if recipe.grow_epochs:
            self._adopt(model.config.cuts)

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
        locked = contextlib.nullcontext() if self.folder is None or self.rank else self.folder.lock()
        with locked, Interrupt() as interrupt:
            return self._run(interrupt)

    def _run(self, interrupt: Interrupt) -> HydraViT:
        if self.folder is not None and self.rank == 0:
            self.folder.rewind_log(self.epoch)
            self._describe(self.folder)
        board = None if self.tensorboard is None else TensorBoard(self.tensorboard, self.step, self._label)
        if self._in_place:
            self._share_weights()
            self.gradients = SliceGradients(self.model)
        else:
            devices = [self.device] if self.device.type == "cuda" else None
            self._network = torch.nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        self.model.train()
        try:
            if self.recipe.compile:
                self._network = torch.compile(self._network, backend=self.recipe.compile)
            if self.recipe.grad_checkpointing:
                self.model.set_grad_checkpointing(True)
            if self.model.config.distilled and (self.teacher is not None or self.recipe.transfer):
                self.model.set_distilled_training(True)
            steps = self.recipe.epochs * len(self.batches)
            shown = Progress(self.recipe.epochs, steps, self.step, self._label, shown=self.progress)
            with shown as progress:
                while self.epoch < self.recipe.epochs:
                    self._run_epoch(interrupt, progress, board)
            self._stop_if_asked(interrupt)
            self.save()
        finally:
            if self.gradients is not None:
                self.gradients.close()
            self.gradients, self._network = None, self.model  # the process group may end after this
            if self.recipe.grad_checkpointing:
                self.model.set_grad_checkpointing(False)
            if self.model.config.distilled:
                self.model.set_distilled_training(False)
            self.model.zero_grad(set_to_none=True)
            if board is not None:
                board.close()
        return self.trained

    def _share_weights(self) -> None:
        """Give all ranks the weights of rank 0, as DistributedDataParallel does."""
        for module in (self.model, self.average):
            if self.world > 1 and module is not None:
                for tensor in module.state_dict().values():
                    sent = tensor.contiguous()
                    dist.broadcast(sent, 0)
                    tensor.copy_(sent)

    def _run_epoch(self, interrupt: Interrupt, progress: Progress, board: TensorBoard | None) -> None:
        self._grow()
        start, done = time.perf_counter(), 0
        for images, labels in self._loaded():
            self._before = self._random_state() if self._due else {}
            widths = self._draw(len(images))
            loss = self._step(images, labels, widths)
            self.batch += 1
            self.step += 1
            done += len(images)
            progress.step(self.epoch + 1, loss, widths[0] if len(widths) == 1 else widths)
            self._stop_if_asked(interrupt)
            if self.checkpoint_steps and self.step % self.checkpoint_steps == 0:
                self._due = True
        if not self.rank:
            entry = self._log(done / (time.perf_counter() - start))
            progress.epoch(entry)
            if board is not None:
                board.epoch(entry)
        self.epoch, self.batch = self.epoch + 1, 0
        self._losses.clear()
        if self.checkpoint_every and self.epoch % self.checkpoint_every == 0:
            self._due = True

    def _label(self, heads: int) -> str:
        return self.model.config.label(heads)

    def _grow(self) -> None:
        """Extend the list of cuts, once in each of the first epochs (SKD, arXiv 2511.11683, section 3)."""
        recipe, epoch = self.recipe, self.epoch + 1
        if self.calibration is None or not self._grown < epoch <= recipe.grow_epochs:
            return
        share = (1 - recipe.keep) * epoch / recipe.grow_epochs
        images = CalibrationImages(
            self.calibration, CALIBRATION_IMAGES, seed=recipe.seed, num_workers=self.batches.workers
        )
        working = working_copy(self.model)
        try:
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
                cuts = [grow(working, images, self.model.config.cuts, share, prices_of(working))]
        except (ValueError, OSError):  # an image that cannot be read
            if self.world == 1:
                self.save()
            raise
        if self.world > 1:  # other processors may round otherwise
            dist.broadcast_object_list(cuts)
        self._adopt(cuts[0])
        self._grown = epoch

    def _adopt(self, cuts: tuple[tuple[int, str, int], ...]) -> None:
        """Train the widths of this list from now on; before the first cut, the full width."""
        config = dataclasses.replace(self.model.config, cuts=cuts)
        self.heads = tuple(range(1, config.widths + 1)) if cuts else (config.widths,)
        models = [self.model] if self.average is None else [self.model, self.trained]
        for model in models:
            model.adopt(config)
            if model.trained_heads is not None:
                model.trained_heads = self.heads
            model.heads = config.widths
        self.sampler.choose_from(self.heads)

    def _loaded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the rest of the epoch's batches. If they cannot be loaded, what was trained is saved first."""
        try:
            yield from self.batches.epoch(self.epoch, self.batch)
        except (RuntimeError, ValueError, OSError):
            if self.world == 1:  # other ranks would not take part
                self.save()
            raise

    def _draw(self, batch: int) -> Sequence[int | Tensor]:
        """Draw the widths that a step trains one after another. Each is a number of heads, or one for every image."""
        if self.epoch < self.recipe.full_epochs:
            return [max(self.heads)]
        if self.recipe.sandwich:
            return self.sampler.sandwich(self.recipe.sandwich, self.recipe.bins)
        return [self.sampler.draw(batch)]

    def _step(self, images: Tensor, labels: Tensor, widths: Sequence[int | Tensor]) -> float:
        """Do one optimizer step; return the mean loss of an image at a width."""
        self._zero_gradients()
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        parts, losses, trained = min(self.recipe.accumulate, len(images)), [], []
        for part in torch.arange(len(images), dtype=torch.int64, device="cpu").tensor_split(parts):
            start, stop = int(part[0]), int(part[-1]) + 1
            wider: Tensor | None = None  # the logits of the width that teaches the next one
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                taught = None if self.teacher is None else self.teacher(images[start:stop])
            for heads in widths:
                own = heads if isinstance(heads, int) else heads[start:stop]
                with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                    logits = self._network(images[start:stop], heads=own)
                if wider is None:
                    loss = self.loss(logits, labels[start:stop], taught)
                else:
                    loss = self.loss.transfer(logits, labels[start:stop], wider)
                self.scaler.scale(loss.sum() / len(images)).backward()
                losses.append(loss.detach())
                trained.append(torch.as_tensor(own, dtype=torch.int64, device="cpu").expand(stop - start))
                if self.recipe.transfer == "next" or (self.recipe.transfer and wider is None):
                    wider = pupil(logits).detach()
        image_losses, trained_widths = torch.cat(losses).double().cpu(), torch.cat(trained)
        self._check(image_losses, trained_widths)
        if self._due:
            self.save(self._before)
        self._track(image_losses, trained_widths)
        self._update()
        return float(image_losses.mean())

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

    def _check(self, losses: Tensor, widths: Tensor) -> None:
        """Raise ``RuntimeError`` if the images' losses ``(B,)`` are not all finite."""
        if not losses.isfinite().all():
            bad = sorted(set(widths[~losses.isfinite()].tolist()))
            raise RuntimeError(
                f"the loss is {float(losses.mean())} in step {self.step} (epoch {self.epoch + 1}, batch "
                f"{self.batch + 1}) at heads={', '.join(map(str, bad))}: "
                "a lower lr, clip_norm or amp=bf16 in place of fp16 may help"
            )

    def _track(self, losses: Tensor, widths: Tensor) -> None:
        """Add the images' losses ``(B,)`` to their widths'."""
        for heads in set(widths.tolist()):
            chosen = losses[widths == heads]
            entry = self._losses.setdefault(heads, [0.0, 0])
            entry[0] += float(chosen.sum())
            entry[1] += len(chosen)

    def _log(self, images_per_second: float) -> dict:
        """Log one line for the epoch, with rank 0's loss, and the validation if it is due; return what it says."""
        entry: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": max(self.scheduler.get_last_lr()),  # with layer decay: that of the classifier
            "loss": sum(s for s, _ in self._losses.values()) / sum(n for _, n in self._losses.values()),
            "loss_per_width": {k: s / n for k, (s, n) in sorted(self._losses.items())},
        }
        if images_per_second:  # a run that goes on after the last step of an epoch has none of it
            entry["images_per_second"] = round(images_per_second, 1)
        due = self.validate_every and (self.epoch + 1) % self.validate_every == 0
        if self.validation is not None and due:
            ends = sorted({min(self.heads), max(self.heads)})
            training = self.trained.training
            self.trained.eval()
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
                found = accuracy(self.trained, self.validation, ends)
            self.trained.train(training)
            entry["validation_top1"] = {k: top1 for k, (top1, _) in found.items()}
        if self.folder is not None:
            self.folder.log_line(entry)
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
        identity = {
            "recipe": recipe,
            "config": self._config.to_dict(),
            "images": len(self.batches.dataset),
            "classes": list(self.class_names or ()),
            "ranks": self.world,
            "trainable": [name for name, p in self.model.named_parameters() if p.requires_grad],
        }
        return json.loads(json.dumps(identity))  # equal values are equal bytes, whatever objects they were

    def _describe(self, folder: RunFolder) -> None:
        """Write what this run is to its folder."""
        recipe = self.recipe.replace(config=self._config)
        about = {"recipe": recipe.to_dict(), "images": len(self.batches.dataset), "ranks": self.world}
        changed = {"changed": self._changed} if self._changed else {}
        folder.describe(about, {"step": self.step, **changed, "hydravit": __version__, **environment(self.model)})

    def _random_state(self) -> dict:
        """Return the states of this rank's random generators."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"sampler": self.sampler.state_dict(), "torch": torch.get_rng_state(), "cuda": cuda}

    def save(self, random: dict | None = None) -> Path | None:
        """Write ``checkpoint.pt``; return its path, or None without an output folder. Every rank must call it.

        Args:
            random: the state of the random generators where the next step begins; None: that of now.
        Raises:
            RuntimeError: weights are not finite; an older checkpoint stays.
            OSError: the file could not be written; an older checkpoint stays.
        """
        if self.folder is None:
            return None
        for name, weight in self.model.named_parameters():
            if not weight.isfinite().all():
                raise RuntimeError(f"{name} is not finite after step {self.step}: a lower lr or clip_norm may help")
        own = self._random_state() if random is None else random
        ranks = [own] * self.world
        if self.world > 1:
            dist.all_gather_object(ranks, own)
        if self.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "model_ema": None if self.average is None else self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ranks": ranks,
                "position": [self.epoch, self.batch, self.step],
                "losses": self._losses,
                "cuts": [list(map(list, self.model.config.cuts)), self._grown],
            }
            metadata = model_metadata(
                self.model.config,
                trained_heads=self.heads,
                preprocessing=self.preprocessing,
                class_names=self.class_names,
                split_seed=self.recipe.split_seed,
            )
            save_state(self.folder.checkpoint, state, self._identity(), metadata)
        self.saved_step, self._due = self.step, False
        return self.folder.checkpoint

    def resume(self, path: str | Path, *, verify: bool = True) -> dict[str, list]:
        """Resume from a checkpoint. The weights at the end are exactly those of a run that was never interrupted.

        The recipe may have other ``epochs``, learning rates and the like than the interrupted run's (``CHANGEABLE`` in
        ``resuming.py``). The learning rate goes on as if the whole run had had the new ones.

        Args:
            verify: whether to check the file's checksums.
        Returns:
            What differs: names of fields, and their values in the interrupted run and now.
        Raises:
            OSError, ValueError: those of ``load_state``, or more epochs are done than the recipe has; nothing is
                changed then.
        """
        state, self._changed = load_state(path, self._identity(), verify=verify)
        epoch, batch, step = state["position"]
        if self.recipe.epochs < epoch + bool(batch):
            raise ValueError(f"{path}: epochs must be at least {epoch + bool(batch)}, not {self.recipe.epochs}")
        cuts, self._grown = state["cuts"]
        if self.recipe.grow_epochs:
            self._adopt(tuple(tuple(cut) for cut in cuts))
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["model_ema"])
        options = [{**group, "params": None} for group in self.optimizer.param_groups]  # this recipe's
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update({**own, "params": group["params"]})
        self.scheduler = make_scheduler(self.optimizer, self.recipe, len(self.batches), done=step)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        random = state["ranks"][self.rank]
        self.sampler.load_state_dict(random["sampler"])
        torch.set_rng_state(random["torch"])
        if random["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.epoch, self.batch, self.step = epoch, batch, step
        self._losses = state["losses"]
        self.saved_step, self._due = step, False
        return self._changed
