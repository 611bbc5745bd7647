"""``hydravit extract``: write one width as a plain Vision Transformer, for tools without slices."""

from __future__ import annotations

import argparse

from hydravit.cli.images import add_image_arguments, with_images
from hydravit.cli.loading import add_reading_arguments, add_width_arguments, chosen_heads, read_weights
from hydravit.config import HydraViTConfig
from hydravit.model import HydraViT

_EXAMPLES = """examples:
  hydravit extract --checkpoint runs/demo/model.safetensors --heads 3 --out vit3.safetensors
  hydravit evaluate --checkpoint vit3.safetensors --data digits --accuracy-only
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "extract",
        help="one width as a plain ViT's file",
        description="Write one width as a plain Vision Transformer under timm's names; it also is a checkpoint here.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="weights: .safetensors, .pt or .pth")
    add_reading_arguments(parser)
    add_image_arguments(parser)
    add_width_arguments(parser, "the width", required=True)
    parser.add_argument("--allow-untrained", action="store_true", help="also a width the checkpoint was not trained at")
    parser.add_argument("--out", required=True, metavar="FILE", help=".safetensors, .pt or .pth")


def run(args: argparse.Namespace) -> None:
    from hydravit.checkpoint import extract, extract_config, save_checkpoint
    from hydravit.config import resolve_config
    from hydravit.factory import fused_model

    checkpoint, fields = read_weights(args)
    model = fused_model(
        checkpoint=checkpoint,
        backend="reference",
        allow_untrained=args.allow_untrained,
        strict=args.strict,
        **fields,
    )
    checkpoint = with_images(checkpoint, model.config, args, assume=False)
    chosen = chosen_heads(args, model)
    if len(chosen) != 1:
        raise ValueError(f"expected one width, not {', '.join(map(model.config.width_name, chosen))}")
    weights, subnetwork = extract(model, chosen[0]), model.subnetwork(chosen[0])
    heads, width = subnetwork.attention[0].heads, subnetwork.embed.embed
    config = resolve_config(
        model.config,
        geometry="hydravit",  # its full width is the plain ViT
        width_steps=None,
        narrowest=1,
        cuts=(),
        max_heads=heads,
        head_dim=width // heads,
        mlp_ratio=subnetwork.mlp[0].hidden / width,
        norm_eps=subnetwork.eps,
        separate_classifiers=(),
    )
    plain = HydraViT(config, backend="reference")
    plain.load_state_dict(weights)
    save_checkpoint(
        args.out,
        plain,
        trained_heads=_nested(model, config, chosen[0]),
        preprocessing=checkpoint.preprocessing,
        class_names=checkpoint.class_names,
        split_seed=checkpoint.split_seed,
        method=checkpoint.method,
    )
    arguments = extract_config(model, chosen[0])
    print(f"wrote {args.out}: {sum(p.numel() for p in plain.parameters())} parameters")
    kind = "deit.VisionTransformerDistilled" if config.distilled else "vision_transformer.VisionTransformer"
    written = [f"{name}={value!r}" for name, value in arguments.items() if name != "norm_layer"]
    written.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={subnetwork.eps})")
    print("import functools, torch; from hydravit.timm_models import timm")
    print(f"timm.models.{kind}({', '.join(written)})")


def _nested(model: HydraViT, plain: HydraViTConfig, heads: int) -> tuple[int, ...] | None:
    """Return the trained widths of the extracted ViT: its own, and all narrower ones that it still holds.

    None, as in the checkpoint: they are not recorded.
    """
    config = model.config
    inside = config.geometry == "hydravit" and config.counted == "heads"
    if not inside or config.separate_classifiers:  # no widths inside, or classifiers left out
        return (plain.max_heads,)
    if model.trained_heads is None:
        return None
    narrower = (k for k in model.trained_heads if k < heads and plain.hidden_of(k) == config.hidden_of(k))
    return (*narrower, heads)
