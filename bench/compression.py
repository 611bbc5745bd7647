"""``python -m bench.compression``: what compressing a trained ViT keeps of its accuracy, beside other criteria.

It trains small plain ViTs on Fashion-MNIST, one per seed, in a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Subset
from tqdm import tqdm

from bench import RESULTS
from bench.rows import replace_file
from hydravit import HydraViT, HydraViTConfig
from hydravit.compression import CalibrationImages, order_heads, wpac
from hydravit.compression.calibration import Batches, activations, label_logits
from hydravit.data import load_dataset
from hydravit.data.dataset import ArrayDataset
from hydravit.evaluation import costs
from hydravit.geometry import skd
from hydravit.recipes import Recipe
from hydravit.training import Trainer

RESULT = RESULTS / "compression.json"
VIT = HydraViTConfig(
    image_size=28, patch_size=7, in_channels=1, num_classes=10, depth=4, max_heads=6, head_dim=8, mlp_ratio=2.0
)
RECIPE = Recipe(
    config=VIT,
    data="fashion-mnist",
    heads=(VIT.max_heads,),
    epochs=8,
    batch_size=128,
    lr=2e-3,
    lr_batch=0,
    warmup_epochs=1.0,
    augment=False,
)
# After compression: all widths are trained, one per image.
NESTED = RECIPE.replace(heads=(), per_image=True, epochs=2, lr=5e-4, warmup_epochs=0.0)
TRAINING_IMAGES, TEST_IMAGES, CALIBRATION_IMAGES = 6000, 2500, 1024
CRITERIA = ("random", "magnitude", "taylor")
OPTIONS = {
    "WPAC": {},
    "WPAC, fold_mean": {"fold_mean": True},
    "WPAC, balanced": {"balanced": True},
    "WPAC, fold_mean, balanced": {"fold_mean": True, "balanced": True},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the images are missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.compression", description=__doc__.partition(": ")[2])
    parser.add_argument("--data", default=RECIPE.data, help="fashion-mnist[:FOLDER] (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        data = {split: load_dataset(args.data, split=split) for split in ("train", "test")}
    except (ValueError, OSError) as error:
        print(f"bench.compression: error: {error}", file=sys.stderr)
        return 2
    rows: list[dict] = []
    for seed in tqdm(range(args.seeds), unit="seed", disable=not sys.stderr.isatty(), leave=False):
        rows += _measure(seed, data["train"], data["test"])
    results = {"torch": torch.__version__, "rows": rows}
    replace_file(args.out, json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"wrote {args.out}")
    return 0


def _measure(seed: int, train: ArrayDataset, test: ArrayDataset) -> Iterator[dict]:
    """Yield rows ``{"seed", "method", "kept", "top1"}`` of one ViT."""
    torch.manual_seed(seed)
    part = Subset(train, range(TRAINING_IMAGES))  # their order is random
    model = Trainer(HydraViT(VIT), RECIPE.replace(seed=seed), part, progress=False).run().eval()
    images = CalibrationImages(part, CALIBRATION_IMAGES, batch_size=256)

    def row(method: str, kept: str, model: HydraViT, heads) -> dict:
        return {"seed": seed, "method": method, "kept": kept, "top1": _top1(model, test, heads)}

    yield row("plain ViT", "all", model, VIT.max_heads)
    compressed = {name: wpac(model, images, **options) for name, options in OPTIONS.items()}
    for quarters in (1, 2, 3):
        channels, kept = VIT.head_dim * quarters // 4, _of_channels(quarters)
        narrow = skd(VIT, [(channels, VIT.hidden)] * VIT.depth)
        for criterion in CRITERIA:
            torch.manual_seed(seed)
            yield row(criterion, kept, without_channels(model, images, criterion, channels), VIT.max_heads)
        for name, result in compressed.items():
            yield row(name, kept, result, narrow)

    starts = {"raw heads": model, "ordered heads": order_heads(model, images), "WPAC": compressed["WPAC"]}
    for name, start in starts.items():
        recipe = NESTED.replace(seed=seed, config=start.config)
        trained = Trainer(copy.deepcopy(start), recipe, part, progress=False).run().eval()
        for heads in start.allowed_heads:
            yield row(name, _of_heads(heads), start, heads)
            yield row(f"{name}, trained", _of_heads(heads), trained, heads)


def without_channels(model: HydraViT, batches: Batches, criterion: str, channels: int) -> HydraViT:
    """Return the model with zeros for all but the best ``channels`` of every head, as one of ``CRITERIA`` ranks them.

    A channel of the queries and its channel of the keys go together; those of the values go by themselves.
    """
    config, model = model.config, copy.deepcopy(model)
    names = [f"blocks.{layer}.attn.qkv" for layer in range(config.depth)]
    taylor = {name: torch.zeros(3 * config.embed, dtype=torch.float64) for name in names}
    if criterion == "taylor":
        for found in activations(model, batches, names, label_logits, heads=config.max_heads):
            for name, (value, gradient) in found.items():
                taylor[name] += (value * gradient).abs().sum((0, 1))
    for name in names:
        qkv = model.get_submodule(name)
        scores = {
            "random": torch.rand(3 * config.embed),
            "magnitude": qkv.weight.detach().square().sum(1),
            "taylor": taylor[name],
        }[criterion]
        queries, keys, values = scores.view(3, config.max_heads, config.head_dim)
        scores = torch.stack([queries + keys, queries + keys, values])
        kept = (scores.argsort(-1, descending=True).argsort(-1) < channels).flatten()
        with torch.no_grad():
            qkv.weight.mul_(kept[:, None])
            qkv.bias.mul_(kept)
    return model


@torch.inference_mode()
def _top1(model: HydraViT, dataset: ArrayDataset, heads) -> float:
    """In percent, on the first of the images, whose order is random."""
    images, labels = dataset.images[:TEST_IMAGES], dataset.labels[:TEST_IMAGES]
    found = torch.cat([model(batch, heads=heads).argmax(1) for batch in images.split(500)])
    return 100 * float((found == labels).float().mean())


def table(results: dict) -> str:
    """Format the mean over the seeds, and the range of the seeds where there are several, as tables of Markdown."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in results["rows"]:
        cells.setdefault((row["method"], row["kept"]), []).append(row["top1"])
    quarters = [_of_channels(count) for count in (1, 2, 3)]
    heads = [_of_heads(count) for count in range(1, VIT.max_heads + 1)]
    starts = ("raw heads", "ordered heads", "WPAC")
    first = _rows("top-1 %, no training", quarters, [*CRITERIA, *OPTIONS], cells)
    second = _rows("top-1 %", heads, [name for start in starts for name in (start, f"{start}, trained")], cells)
    for name, geometry in (("of HydraViT's widths", "hydravit"), ("of WPAC's", "skd")):
        macs = [f"{cost.macs / 1e6:.2f}" for cost in costs(dataclasses.replace(VIT, geometry=geometry)).values()]
        second.append(f"| MACs {name}, 10^6 | {' | '.join(macs)} |")
    return "\n".join([*first, "", *second])


def _of_channels(quarters: int) -> str:
    return f"{quarters}/4 of the channels"


def _of_heads(count: int) -> str:
    return f"{count} of {VIT.max_heads} heads"


def _rows(corner: str, columns: list[str], names: Iterable[str], cells: dict) -> list[str]:
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    return lines + [
        f"| {name} | {' | '.join(_cell(cells.get((name, column))) for column in columns)} |" for name in names
    ]


def _cell(values: list[float] | None) -> str:
    if not values:
        return "—"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
