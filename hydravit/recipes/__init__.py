"""Named recipes. A recipe is a frozen value of everything that decides the weights of a training run."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from hydravit.config import HydraViTConfig, resolve_config
from hydravit.integers import plain_int

AMP = ("none", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run. The defaults are HydraViT's (arXiv 2409.17978, section 4, and its public code).

    Args:
        config: the full model; the number of the data's classes replaces its own.
        data, split_seed, skip_corrupt: ``source``, ``seed`` and ``skip_corrupt`` of ``hydravit.data.load_dataset``.
        checkpoint, part: the file whose weights training starts from, and which model in it; "": random weights.
        strict: whether names that the checkpoint lacks or has too many are an error.
        heads: widths to train; empty: all.
        weights: how often each of ``heads`` is drawn, relative to the others; empty: equally often.
        per_image: every image of a batch draws its own width, instead of one for the batch.
        sandwich: how many widths a step trains on all of its images: the widest, the narrowest, and others drawn
            between them (US-Net, arXiv 1903.05134, section 3.3); 0: one drawn width.
        bins: draw each width between the ends from a range of its own. Where the ranges cannot be equally long, those
            above are longer by one ("upper", as in Scala's code) or those below ("lower", as in its paper, section
            3.2). "": draw all of them from all.
        transfer: who teaches the other widths of a step: its "widest" (US-Net), or the "next" wider one (Scala, arXiv
            2412.04786, section 3.3); "": nobody.
        label_weight: the weight of the cross entropy to the labels for those that are taught (Scala: 1).
        full_epochs: passes over the data, at the beginning, that train the widest width only (Scala's code: 10).
        grow_epochs: passes over the data, the first ones, before each of which the list of cuts grows (PIAD of SKD,
            arXiv 2511.11683); 0: it stays as the config has it.
        keep: the share of the cost of all channels that the narrowest width of a grown list keeps, at the least.
        rank_shared: all ranks of a distributed run draw the same widths. The paper's do not, and wait for the widest.
        epochs: passes over the data, of which the last ``cooldown_epochs`` run at ``min_lr``.
        batch_size: images per step and rank.
        accumulate: parts in which a step's images go through the model, to save memory.
        lr: peak learning rate for ``lr_batch`` images per step; scaled linearly to the batch of all ranks, unless
            ``lr_batch`` is 0. ``min_lr`` and ``warmup_lr`` are scaled with it.
        min_lr: learning rate where the cosine ends.
        warmup_lr, warmup_epochs: learning rate where the linear warm-up starts, and its length.
        weight_decay, betas, eps: AdamW's. Biases, norms, tokens, position embedding and layer scale do not decay.
        optimizer: "dense": decay and momentum change the weights outside a step's slice too, as in the paper's code, at
            the cost of the full model. "active": these weights stay as they are, and a step costs what its slice costs
            (``hydravit.training.SliceAdamW``); on several ranks it needs ``rank_shared``.
        layer_decay: each layer's learning rate relative to that of the layer behind it, as for fine-tuning (BEiT,
            arXiv 2106.08254); the final norm and the classifier have ``lr``. 1: all alike.
        freeze: modules and parameters by name, such as "patch_embed" or "blocks.0", that stay as they begin.
        smoothing: label smoothing.
        mixup, cutmix: alphas of timm's mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899); 0: none.
        distillation: "hard" or "soft": learn from a teacher too, as ``hydravit.training.Loss`` says; "": do not.
        distillation_weight, temperature: the weight of that loss in (0, 1]; what "soft" divides the logits by.
        teacher: a name of timm's registry, or a checkpoint file of ours or of a ViT.
        teacher_checkpoint: the file of weights of timm's teacher; "": those that timm downloads.
        clip_norm: largest norm of a step's gradient; 0: not clipped.
        ema: decay of the average of the weights, which is then evaluated and saved; 0: none.
        mean, std: per channel, of pixels in 0..1; empty: the data set's own, which for photos are ImageNet's.
        augment: whether the data set augments lightly.
        rand_augment, color_jitter, random_erasing: timm's heavy augmentation, for folders of photos; "" and 0: none.
        grad_checkpointing: whether backward computes each block anew instead of keeping its activations; the weights
            have the same bits.
        compile: a backend of ``torch.compile``, such as "inductor", with which the model's forward is compiled; "": it
            is not. Needs the "dense" optimizer, because compiled forwards do not tell which slices they read.
        amp: "bf16" or "fp16" for mixed precision, or "none".
        seed: the seed of initial weights, order of the data, augmentation and widths.
    """

    config: HydraViTConfig = field(default_factory=HydraViTConfig)
    data: str = "digits"
    split_seed: int = 0
    skip_corrupt: bool = False
    checkpoint: str = ""
    part: str = ""
    strict: bool = True
    heads: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    per_image: bool = False
    sandwich: int = 0
    bins: str = ""
    transfer: str = ""
    label_weight: float = 0.0
    full_epochs: int = 0
    grow_epochs: int = 0
    keep: float = 0.125
    rank_shared: bool = True
    epochs: int = 300
    cooldown_epochs: int = 0
    batch_size: int = 512
    accumulate: int = 1
    lr: float = 5e-4
    lr_batch: int = 512
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: str = "dense"
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    distillation: str = ""
    distillation_weight: float = 0.5
    temperature: float = 1.0
    teacher: str = ""
    teacher_checkpoint: str = ""
    clip_norm: float = 0.0
    ema: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: bool = True
    rand_augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    grad_checkpointing: bool = False
    compile: str = ""
    amp: str = "none"
    seed: int = 42

    def __post_init__(self):
        for name in ("heads", "weights", "betas", "mean", "std", "freeze"):
            object.__setattr__(self, name, tuple(map(plain_int, getattr(self, name))))
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, plain_int(getattr(self, each.name)))
            values = getattr(self, each.name)
            numbers = [v for v in (values if isinstance(values, tuple) else (values,)) if isinstance(v, float)]
            self._check(each.name, all(map(math.isfinite, numbers)), "finite")
        for name in ("epochs", "batch_size", "accumulate"):
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an integer of at least 1")
        for name in ("lr", "eps", "temperature"):
            self._check(name, getattr(self, name) > 0, "positive")
        for name in "min_lr warmup_lr warmup_epochs weight_decay mixup cutmix clip_norm color_jitter lr_batch".split():
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("smoothing", "ema", "random_erasing"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("cooldown_epochs", 0 <= self.cooldown_epochs < self.epochs, "at least 0 and less than epochs")
        falling = self.epochs - self.cooldown_epochs
        self._check("warmup_epochs", self.warmup_epochs < falling, f"less than epochs - cooldown_epochs, {falling}")
        for name in ("min_lr", "warmup_lr"):
            self._check(name, getattr(self, name) <= self.lr, f"at most lr, {self.lr}")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._check("betas", good, "two numbers in [0, 1)")
        self._check("amp", self.amp in AMP, f"one of {', '.join(map(repr, AMP))}")
        self._check("optimizer", self.optimizer in ("dense", "active"), "'dense' or 'active'")
        self._check("optimizer", self.optimizer == "dense" or not self.compile, "'dense' with compile")
        for name in ("layer_decay", "distillation_weight"):
            self._check(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self._check("distillation", self.distillation in ("", "hard", "soft"), "'hard' or 'soft', or '' for none")
        self._check("distillation", not self.teacher or bool(self.distillation), "'hard' or 'soft' where a teacher is")
        self._check_widths()

    def _check_widths(self) -> None:
        first, last = self.config.narrowest, self.config.widths
        different = len(set(self.heads)) == len(self.heads)
        within = all(type(heads) is int and first <= heads <= last for heads in self.heads)
        self._check("heads", different and within, f"different integers in {first}..{last}")
        if self.weights:
            fits = len(self.weights) == len(self.trained_heads) and min(self.weights) >= 0 and sum(self.weights) > 0
            self._check("weights", fits, f"one number of at least 0 for each of heads {list(self.trained_heads)}")
        count = len(self.trained_heads)
        self._check("sandwich", self.sandwich in (0, *range(2, count + 1)), f"0, or 2 to {count}, the number of widths")
        self._check("sandwich", not (self.sandwich and self.per_image), "0 with per_image")
        if self.weights and self.sandwich:
            ends = (min(self.trained_heads), max(self.trained_heads))
            drawn = sum(w > 0 for k, w in zip(self.trained_heads, self.weights, strict=True) if k not in ends)
            self._check("sandwich", self.sandwich <= drawn + 2, f"at most {drawn + 2}: weights leave out the others")
        self._check("bins", self.bins in ("", "upper", "lower"), "'upper' or 'lower', or '' for none")
        fits = not self.bins or (self.sandwich > 2 and not self.weights)
        self._check("bins", fits, "'' with weights, and without a sandwich of 3 or more")
        self._check("transfer", self.transfer in ("", "widest", "next"), "'widest' or 'next', or '' for none")
        self._check("transfer", bool(self.sandwich) or not self.transfer, "'' without sandwich")
        self._check("label_weight", self.label_weight >= 0, "at least 0")
        self._check("label_weight", bool(self.transfer) or not self.label_weight, "0 without transfer")
        fits = type(self.full_epochs) is int and 0 <= self.full_epochs <= self.epochs
        self._check("full_epochs", fits, f"an integer in 0..{self.epochs}, the epochs")
        fits = type(self.grow_epochs) is int and 0 <= self.grow_epochs <= self.epochs
        self._check("grow_epochs", fits, f"an integer in 0..{self.epochs}, the epochs")
        if self.grow_epochs:
            fits = self.config.geometry == "skd" and self.config.width_steps is None and self.config.narrowest == 1
            fits = fits and not self.config.separate_classifiers and len(self.trained_heads) == self.config.widths
            self._check("grow_epochs", fits, "0 unless geometry is 'skd' and all widths are trained")
            fits = not (self.weights or self.sandwich or self.compile) and self.rank_shared
            self._check("grow_epochs", fits, "0 with weights, sandwich, compile or rank_shared=False")
        self._check("keep", 0 <= self.keep < 1, "in [0, 1)")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f"recipe: {name} must be {expected}, not {getattr(self, name)!r}")

    @property
    def trained_heads(self) -> tuple[int, ...]:
        """The widths that are trained."""
        config = self.config
        return self.heads or config.separate_classifiers or tuple(range(config.narrowest, config.widths + 1))

    def replace(self, **values) -> Recipe:
        """Return a recipe with some fields replaced. Raise ``ValueError`` for an unknown field or a wrong value."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in values:
            if name not in known:
                raise ValueError(f"recipe: unknown field {name!r}; known: {', '.join(known)}")
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict:
        """Return plain values only; ``config`` is a dict too."""
        return dataclasses.asdict(self)


RECIPES = {
    # scikit-learn's 8x8 digits: minutes on two CPU cores. Its steps are too few for one width per step.
    "demo": Recipe(
        config=HydraViTConfig(
            image_size=8,
            patch_size=2,
            in_channels=1,
            num_classes=10,
            depth=4,
            max_heads=6,
            head_dim=16,
            mlp_ratio=2.0,
            drop_path=0.1,
        ),
        data="digits",
        per_image=True,
        epochs=100,
        batch_size=64,
        lr=2e-3,
        lr_batch=0,
        warmup_epochs=4.0,
        clip_norm=1.0,
        ema=0.99,
        seed=0,
    ),
    # Fashion-MNIST's 60,000 photos of clothes, in 28x28 grey pixels.
    "fashion-mnist": Recipe(
        config=HydraViTConfig(
            image_size=28,
            patch_size=4,
            in_channels=1,
            num_classes=10,
            depth=6,
            max_heads=6,
            head_dim=16,
            mlp_ratio=2.0,
            drop_path=0.1,
        ),
        data="fashion-mnist",
        epochs=30,
        batch_size=128,
        lr=1e-3,
        lr_batch=0,
        warmup_epochs=2.0,
        clip_norm=1.0,
        ema=0.999,
        seed=0,
    ),
    # A folder of hundreds or a few thousand photos, from random weights. Its steps are few too.
    "photos": Recipe(
        config=resolve_config("tiny", image_size=128, depth=6, drop_path=0.1),
        data="photos",
        per_image=True,
        epochs=100,
        batch_size=32,
        lr=1e-3,
        lr_batch=0,
        warmup_epochs=5.0,
        clip_norm=1.0,
        ema=0.99,
        seed=0,
    ),
    # Photos, from the weights of a pretrained ViT, whose config takes the place of this one: short and slow.
    "finetune": Recipe(
        config=resolve_config("base", drop_path=0.1),
        data="photos",
        epochs=30,
        batch_size=32,
        lr=1e-4,
        lr_batch=0,
        min_lr=1e-6,
        warmup_epochs=3.0,
        clip_norm=1.0,
        ema=0.99,
        seed=0,
    ),
    # The paper's run on ImageNet-1K (300 epochs; it also reports 400, 500 and 800): 2 GPUs with 512 images each, fp32.
    "hydravit-imagenet": Recipe(
        config=resolve_config("base", drop_path=0.1),
        data="imagenet",
        heads=tuple(range(3, 13)),
        rank_shared=False,
        epochs=310,
        cooldown_epochs=10,
        mixup=0.8,
        cutmix=1.0,
        ema=0.99996,
        augment=False,
        rand_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.3,
        random_erasing=0.25,
    ),
}
# US-Net's steps (arXiv 1903.05134) in the place of HydraViT's, on the same data: the widest width, two others and the
# narrowest, which learn from the widest.
RECIPES["usnet"] = RECIPES["hydravit-imagenet"].replace(sandwich=4, transfer="widest")
# Scala's DeiT-S (arXiv 2412.04786, and its public code): 4 GPUs with 256 images each. Unlike here, its code also halves
# the learning rate in the first ten epochs, of which the paper says nothing, and its ranks draw widths of their own.
RECIPES["scala"] = RECIPES["hydravit-imagenet"].replace(
    config=resolve_config(
        "small", geometry="scala", width_steps=16, narrowest=4, distilled=True, norm_eps=1e-5, drop_path=0.1
    ),
    heads=(),
    sandwich=4,
    bins="upper",
    transfer="next",
    label_weight=1.0,
    full_epochs=10,
    rank_shared=True,
    epochs=100,
    cooldown_epochs=0,
    batch_size=256,
    lr=2e-3,
    min_lr=5e-6,  # 1e-5 and 1e-6 at 1024 images per step: with these the rates are scaled here
    warmup_lr=5e-7,
    warmup_epochs=3.0,
    distillation="hard",
    teacher="deit_small_patch16_224",
    ema=0.0,  # the code keeps an average and evaluates the weights themselves
    rand_augment="rand-m1-mstd0.5-inc1",
    amp="fp16",
)
RECIPES["scala-paper"] = RECIPES["scala"].replace(
    config=resolve_config(RECIPES["scala"].config, geometry="scala-paper"), bins="lower"
)
RECIPES["scala-per-role"] = RECIPES["scala"].replace(
    config=resolve_config(RECIPES["scala"].config, geometry="scala-per-role")
)
# SKD's DeiT-B (arXiv 2511.11683, and its public code): 2 GPUs with 128 images each. It starts from a pretrained ViT,
# whose channels `hydravit compress --method wpac` has put in order. Unlike here, its ranks draw widths of their own.
RECIPES["skd"] = RECIPES["hydravit-imagenet"].replace(
    config=resolve_config("base", geometry="skd"),
    heads=(),
    grow_epochs=50,
    rank_shared=True,
    epochs=150,
    cooldown_epochs=0,
    batch_size=128,
    warmup_epochs=0.0,
    min_lr=2e-5,  # 1e-5 at 256 images per step: with these the rates are scaled here
    ema=0.0,  # the code keeps an average and takes subnetworks from the weights themselves
    amp="fp16",
)

# Recipes whose model is that of the checkpoint that training starts from.
OF_CHECKPOINTS = ("finetune", "skd")


def usual_recipe(kind: str, checkpoint: bool) -> str:
    """Return the name of the recipe for a kind of data (see ``hydravit.data.kind_of``), from a checkpoint or not."""
    folder = "finetune" if checkpoint else "photos"
    return {"digits": "demo", "fashion-mnist": "fashion-mnist", "folder": folder}[kind]


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name, or the one in the file ``recipe.json`` of a run's folder.

    Raises:
        ValueError: an unknown name, or a file that holds no recipe; the message says which names are known.
        OSError: the file cannot be read.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}, and recipe.json of a run's folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        return Recipe().replace(**{**fields, "config": HydraViTConfig.from_dict(fields["config"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no recipe of a run ({type(error).__name__}: {error})") from error


def resumed_with(name: str) -> list[str]:
    """Return the fields that changed while the run of a ``recipe.json`` was trained; none for other recipes."""
    if name in RECIPES:
        return []
    starts = json.loads(Path(name).read_text(encoding="utf-8")).get("starts", [])
    return sorted({field for start in starts for field in start.get("changed", {})} - {"data"})
