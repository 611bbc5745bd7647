"""``hydravit info``: report on the installation, or on a model and the cost of each width."""

from __future__ import annotations

import argparse

from hydravit.cli.loading import add_reading_arguments, read_weights

_EXAMPLES = """examples:
  hydravit info                                  # what was built, what runs here, and why the rest does not
  hydravit info --config base                    # parameters and multiply-accumulates of every width
  hydravit info --checkpoint model.safetensors
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="the installation, or a model's configuration and costs",
        description="Report on the installation or, with --config or --checkpoint, on a model and each of its widths.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--config", metavar="NAME", help="tiny, small, base or large")
    which.add_argument("--checkpoint", metavar="FILE", help="weights: .safetensors, .pt or .pth")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.config is None and args.checkpoint is None:
        from hydravit import __version__
        from hydravit_kernels.__main__ import report

        print(f"hydravit {__version__}\n{report()}")
        return
    from hydravit.checkpoint import model_config
    from hydravit.config import resolve_config
    from hydravit.evaluation import costs
    from hydravit.evaluation.report import aligned, count

    checkpoint = None
    if args.checkpoint:
        checkpoint, fields = read_weights(args)
        config = model_config(checkpoint, strict=args.strict, **fields)
    else:
        config = resolve_config(args.config)
    rows = config.to_dict()
    if checkpoint:
        classes, preprocessing = checkpoint.class_names, checkpoint.preprocessing
        rows["trained widths"] = list(checkpoint.trained_heads) if checkpoint.trained_heads else "not recorded"
        if checkpoint.split_seed is not None:
            rows["split seed"] = checkpoint.split_seed
        if checkpoint.method:
            rows["method"] = checkpoint.method
        rows["preprocessing"] = preprocessing.to_dict() if preprocessing else "not recorded"
        some = [*classes[:10], "..."] if classes and len(classes) > 10 else classes
        rows["classes"] = ", ".join(some) if some else "not recorded"
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
    print()
    trained = checkpoint.trained_heads if checkpoint and checkpoint.trained_heads else None
    table = []
    for k, (params, macs) in costs(config).items():
        state = "?" if trained is None else "yes" if k in trained else "no"
        table.append([config.width_name(k), state, count(params), f"{macs / 1e9:.4g}"])
    print(aligned([config.counted, "trained", "params", "GMACs"], table))
