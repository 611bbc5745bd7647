"""Models that packed weights serve, and the comparison of a packed forward with the model's blocks, one by one."""

import small
import torch

from hydravit import HydraViTConfig

# Every width begins on a panel; embed is none that the products' tiles divide.
WIDE = HydraViTConfig(image_size=(24, 32), patch_size=8, depth=3, max_heads=4, head_dim=24, num_classes=32)
VARIANTS = {
    "plain": {},
    "registers, no_embed_class": {"register_tokens": 3, "no_embed_class": True},
    "average pooling": {"pool": "avg", "register_tokens": 2},
    "no class token": {"pool": "avg", "class_token": False},
    "one token": {"pool": "avg", "class_token": False, "image_size": 8},
    "layer scale": {"layer_scale": 0.3},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "no classifier": {"num_classes": 0},
    "separate classifiers": {"separate_classifiers": (1, 2, 4)},
    "grey, odd sizes": {"in_channels": 1, "image_size": (15, 35), "patch_size": 5, "mlp_ratio": 2.625},
    "one layer": {"depth": 1},
    "many tokens": {"image_size": (96, 88), "depth": 2},
    **{name: {"geometry": name} for name in ("sortednet", "dynabert", "matformer")},
}


def make(config=WIDE, **overrides):
    return small.make(config, backend="native", **overrides)


def block_by_block(model, *arguments, **options):
    """What the model computes where nothing is packed."""
    kept, model.packed_inference = model.packed_inference, None
    try:
        return model(*arguments, **options)
    finally:
        model.packed_inference = kept


def is_packed(model):
    """Whether there is a packed copy now."""
    return model.packed_inference.network is not None


def warm(model, x, **options):
    """Make the packed copy: by the second call that finds the same parameters."""
    with torch.no_grad():
        for _ in range(2):
            model(x, **options)
    assert is_packed(model)


@torch.no_grad()
def check(model, x, heads, served=True):
    """Every call has the bits of the blocks; ``served``: whether the packed copy is made."""
    expected = block_by_block(model, x, heads=heads)
    assert torch.isfinite(expected).all()
    for _ in range(3):
        assert torch.equal(model(x, heads=heads), expected)
    assert is_packed(model) == served


def tensors_held_by(root):
    """All tensors that an object refers to, through its attributes and containers."""
    held, todo, seen = [], [root], set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            held.append(thing)
        elif isinstance(thing, dict):
            todo += [*thing, *thing.values()]
        elif isinstance(thing, (tuple, list, set)):
            todo += thing
        else:
            todo += vars(thing).values() if hasattr(thing, "__dict__") else ()
    return held
