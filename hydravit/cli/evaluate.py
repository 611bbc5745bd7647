"""``hydravit evaluate``: accuracy, cost, latency and memory of a checkpoint at every width."""

from __future__ import annotations

import argparse
import sys

from hydravit.cli.loading import (
    about_data,
    add_data_arguments,
    add_model_arguments,
    chosen_heads,
    load_data,
    load_model,
)

_EXAMPLES = """examples:
  hydravit evaluate --checkpoint runs/demo/model.safetensors --data digits
  hydravit evaluate --checkpoint model.safetensors --data photos/ --heads 1,3-6 --out runs/photos
  hydravit evaluate --checkpoint model.safetensors --data imagenet/ --heads 3-12 --accuracy-only --workers 8
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy, cost, latency and memory at every width",
        description="Evaluate a checkpoint at several widths: a table, and with --out results.json and results.png.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser, "default: all trained")
    add_data_arguments(parser)
    parser.add_argument("--split", default="test", choices=["train", "test", "all"], help="(default: %(default)s)")
    parser.add_argument(
        "--weights", choices=["e4m3"], help="also the accuracy with weights rounded as engines of this dtype round them"
    )
    parser.add_argument("--accuracy-only", action="store_true", help="do not measure latency and memory")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per width and backend (default: 1)")
    parser.add_argument("--out", metavar="FOLDER", help="where results.json and results.png go")


def run(args: argparse.Namespace) -> None:
    from hydravit.evaluation import evaluate, format_table, write_results
    from hydravit.evaluation.picture import check_plotting

    if args.out:
        check_plotting()
    model, checkpoint, preprocessing = load_model(args)
    heads = chosen_heads(args, model)
    dataset = load_data(args, args.split, checkpoint, preprocessing, model.num_classes)
    results = evaluate(
        model,
        dataset,
        heads=heads,
        batch_size=args.batch_size,
        num_workers=args.workers,
        latency=not args.accuracy_only,
        memory=not args.accuracy_only,
        seconds=args.seconds,
        e4m3_weights=args.weights == "e4m3",
        progress=sys.stderr.isatty(),
    )
    results["data"] = about_data(args.data, args.split, dataset)
    results["checkpoint"] = args.checkpoint
    print(format_table(results))
    if dataset.skipped:
        print(f"skipped {len(dataset.skipped)} unreadable file(s)")
    if args.out:
        print("wrote", *write_results(results, args.out))
