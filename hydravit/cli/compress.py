"""``hydravit compress``: rearrange the weights of a trained ViT so that narrower widths work without training."""

from __future__ import annotations

import argparse
import sys

import torch

from hydravit.cli.images import add_image_arguments
from hydravit.cli.loading import (
    add_data_arguments,
    add_device_argument,
    add_reading_arguments,
    add_threads_argument,
    load_data,
    load_model,
    positive,
)

_EXAMPLES = """examples:
  hydravit compress --method wpac --checkpoint deit_small.pth --data imagenet/ --out wpac.safetensors
  hydravit compress --method wpac --balanced --checkpoint deit_small.pth --data imagenet/ --out wpac.safetensors
  hydravit compress --method wpac --plan latency --checkpoint deit_small.pth --data imagenet/ --out planned.safetensors
  hydravit compress --method order-heads --checkpoint deit_small.pth --data imagenet/ --out ordered.safetensors
  hydravit evaluate --checkpoint wpac.safetensors --data imagenet/ --accuracy-only
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compress",
        help="narrower widths of a trained ViT, without training",
        description="Rearrange the weights of a trained plain ViT, the most important ones first. The full width "
        "computes the same as before. The result is a checkpoint for every other command.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="weights: .safetensors, .pt or .pth")
    parser.add_argument(
        "--method",
        required=True,
        choices=["wpac", "order-heads"],
        help="wpac: all heads, each cut to its principal channels; order-heads: the most important heads and channels",
    )
    add_data_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".safetensors, .pt or .pth")
    parser.add_argument("--fold-mean", action="store_true", help="wpac: keep the mean of the value channels cut away")
    parser.add_argument("--balanced", action="store_true", help="wpac: choose query and key channels by their products")
    parser.add_argument(
        "--plan",
        choices=["macs", "params", "latency"],
        help="wpac: widths that lose, layer by layer, what matters least for this cost; then name them by --budget",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="--plan: of the cost, at the narrowest width (default: 0.125)",
    )
    parser.add_argument(
        "--images", type=positive, default=1024, metavar="N", help="of the training part (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of images (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    add_device_argument(parser)
    add_threads_argument(parser)
    add_reading_arguments(parser)
    add_image_arguments(parser)
    parser.set_defaults(backend="reference", allow_untrained=False)  # of the model as it is loaded


def run(args: argparse.Namespace) -> None:
    from hydravit.checkpoint import check_suffix, save_checkpoint
    from hydravit.compression import CalibrationImages, order_heads, plan, wpac
    from hydravit.evaluation import costs

    check_suffix(args.out)
    options = {"fold_mean": args.fold_mean, "balanced": args.balanced}
    if args.method != "wpac" and any(options.values()):
        raise ValueError(f"--fold-mean and --balanced are options of --method wpac, not of {args.method}")
    if args.plan and args.method != "wpac":
        raise ValueError(f"--plan is an option of --method wpac, not of {args.method}")
    if args.keep is not None and not args.plan:
        raise ValueError("--keep is an option of --plan")
    model, checkpoint, preprocessing = load_model(args)
    dataset = load_data(args, "train", checkpoint, preprocessing, model.num_classes)
    images = CalibrationImages(
        dataset,
        args.images,
        batch_size=args.batch_size,
        seed=args.seed,
        num_workers=args.workers,
        progress=sys.stderr.isatty(),
    )
    compressed = wpac(model, images, **options) if args.method == "wpac" else order_heads(model, images)
    if args.plan:
        compressed = plan(compressed, images, cost=args.plan, keep=0.125 if args.keep is None else args.keep)
    chosen = [args.method, *(name for name, wanted in options.items() if wanted)]
    chosen += [f"planned by {args.plan}"] if args.plan else []
    save_checkpoint(
        args.out,
        compressed,
        preprocessing=preprocessing,
        class_names=checkpoint.class_names,
        split_seed=checkpoint.split_seed,
        method=f"{' '.join(chosen)}, {min(args.images, len(dataset))} images of {args.data}",
    )
    counted = costs(compressed.config)
    widths = f"heads {', '.join(map(str, counted))}"
    if args.plan:
        first, *_, last = (f"{each.macs / 1e9:.3g}" for each in counted.values())
        widths = f"{len(counted)} widths of {first} to {last} GMACs"
    print(f"wrote {args.out}: geometry {compressed.config.geometry}, {widths}")
    print(f"logits at full width differ by {_difference(model, compressed, images):.1e}, relative to the largest")


@torch.inference_mode()
def _difference(before, after, images) -> float:
    """Compare the logits of the first batch."""
    batch, _ = next(iter(images))
    expected, found = (model(batch.to(model.pos_embed.device)) for model in (before, after))
    return float((found - expected).abs().max() / expected.abs().max())
