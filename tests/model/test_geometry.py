"""Slice geometry: the trap tables of the papers, validation, and parameter slices against plain index lists."""

import dataclasses
from collections import Counter

import pytest
import torch

import hydravit
from hydravit import HydraViTConfig, geometry
from hydravit.config import CONFIGS, resolve_config

DEIT_S = resolve_config("small")


def indices(intervals):
    return [i for offset, length in intervals for i in range(offset, offset + length)]


def test_a_subnetwork_is_small_frozen_and_hashable():
    one, two = geometry.hydravit(CONFIGS["base"], 3), geometry.hydravit(CONFIGS["base"], 3)
    assert one == two and hash(one) == hash(two) and one is not two
    with pytest.raises(AttributeError):
        one.eps = 1.0


# Which roles of the full model (DeiT-S) a Scala subnetwork's queries, keys and values come from, with rows of each.
SCALA_ROLES = {
    (96, False): ({"Q": 96}, {"Q": 96}, {"Q": 96}),
    (120, True): ({"V": 120}, {"V": 120}, {"V": 120}),
    (192, True): ({"K": 192}, {"V": 192}, {"V": 192}),
    (288, True): ({"Q": 96, "K": 192}, {"K": 192, "V": 96}, {"V": 288}),
    (384, True): ({"Q": 384}, {"K": 384}, {"V": 384}),
}


@pytest.mark.parametrize(("width", "suffix"), SCALA_ROLES)
def test_scala_mixes_roles(width, suffix):
    resolved = DEIT_S.sizes.validate(geometry.scala(DEIT_S, width, suffix=suffix))
    rows, columns = map(indices, geometry.parameter_slices(DEIT_S, resolved)["blocks.0.attn.qkv.weight"])
    assert columns == list(range(384 - width, 384) if suffix else range(width))
    roles = ["QKV"[row // 384] for row in rows]
    assert tuple(dict(Counter(roles[i * width : (i + 1) * width])) for i in range(3)) == SCALA_ROLES[width, suffix]
    attention = resolved.attention[0]
    assert (attention.scale, attention.heads, attention.head_dim, resolved.eps) == (0.125, 6, width // 6, 1e-5)


def test_widths_in_steps():
    """Methods that cut heads have finer widths than heads; those of whole heads have what these steps allow."""
    sixteenths = {"width_steps": 16, "narrowest": 4}
    scala = resolve_config("small", geometry="scala", **sixteenths)
    assert [s.embed.embed for s in geometry.every_width(scala).values()] == list(range(96, 385, 24))
    assert [scala.width_name(k) for k in (4, 7, 16)] == ["0.25", "0.4375", "1"]
    assert scala.width_of(0.4375) == 7 and resolve_config("large", width_steps=32).width_of(0.2812) == 9
    assert (scala.counted, scala.label(7), resolve_config("small").label(3)) == ("width", "width 0.4375", "3 heads")
    assert resolve_config("small").width_of(0.5) == 3
    for share in (0.1875, 0.45, 1.0625):
        with pytest.raises(ValueError, match=r"width=[0-9.]+ is none of the model's: 0.25, 0.3125, 0.375"):
            scala.width_of(share)
    assert [*geometry.every_width(resolve_config("base", **sixteenths))] == [4, 8, 12, 16]  # 3, 6, 9 and 12 heads
    matformer = geometry.every_width(resolve_config("base", **sixteenths, geometry="matformer"))
    assert [s.mlp[0].hidden for s in matformer.values()] == list(range(768, 3073, 192))
    dynabert = geometry.every_width(resolve_config("base", width_steps=4, geometry="dynabert")).values()
    assert [s.attention[0].heads for s in dynabert] == [3, 6, 9, 12]
    assert [s.mlp[0].hidden for s in dynabert] == [768, 1536, 2304, 3072]
    for wrong in ({"width_steps": 0}, {"width_steps": 2.5}, {"narrowest": 0}, {"narrowest": 7}, {"narrowest": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            resolve_config("small", **wrong)


def test_skd_segments_inside_heads():
    resolved = DEIT_S.sizes.validate(geometry.skd(DEIT_S, [(24, 480)] * 11 + [(0, 0)]))
    slices = geometry.parameter_slices(DEIT_S, resolved)
    rows, columns = slices["blocks.0.attn.qkv.weight"]
    assert rows[:2] == ((0, 24), (64, 24)) and len(rows) == 18 and columns == ((0, 384),)
    assert slices["blocks.0.attn.proj.weight"][1] == tuple((64 * head, 24) for head in range(6))
    assert slices["blocks.11.attn.proj.bias"] == ((),) and slices["blocks.11.norm2.weight"] == ((),)


def test_skd_by_a_number_of_heads():
    """Every head is as wide as its share of so many whole ones; a width without a channel per head does not exist."""
    config = dataclasses.replace(DEIT_S, geometry="skd")
    widths = geometry.every_width(config)
    assert [(s.heads, s.attention[0].head_dim, s.mlp[0].hidden) for s in widths.values()] == [
        (1, 10, 256), (2, 21, 512), (3, 32, 768), (4, 42, 1024), (5, 53, 1280), (6, 64, 1536)
    ]  # fmt: skip
    lengths = geometry.skd(config, [(32, 768)] * 12)
    assert widths[3] == lengths._replace(heads=3)
    assert list(geometry.every_width(dataclasses.replace(config, head_dim=4))) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", geometry.GEOMETRIES)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_parameter_slices_are_what_gradients_touch(name, heads):
    """`parameter_slices` is the one statement of what a width reads; the gradients say the same."""
    config = HydraViTConfig(
        image_size=16, patch_size=8, depth=2, max_heads=4, head_dim=8, num_classes=5, geometry=name,
        layer_scale=0.1, register_tokens=1, separate_classifiers=(1, 2, 4),
    )  # fmt: skip
    model = hydravit.fused_model(config=config, backend="reference").double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model(torch.randn(8, 3, 16, 16).double(), heads=heads).square().sum().backward()
    slices = geometry.parameter_slices(config, model.subnetwork(heads))
    for parameter_name, parameter in model.named_parameters():
        read = torch.zeros(parameter.shape, dtype=torch.bool)
        axes = [torch.tensor(indices(intervals)) for intervals in slices[parameter_name]]
        read[torch.meshgrid(*axes, indexing="ij")] = True
        touched = parameter.grad != 0
        assert not (touched & ~read).any(), f"{parameter_name}: gradient outside"
        # A key bias shifts all scores of a query alike, so its gradient is zero but for rounding.
        if not parameter_name.endswith("qkv.bias"):
            assert (touched == read).all(), f"{parameter_name}: read but no gradient"


GOOD = geometry.hydravit(DEIT_S, 2)
ATTENTION, MLP = GOOD.attention[0], GOOD.mlp[0]
BAD = {
    "for 12 layers": GOOD._replace(attention=GOOD.attention[:3]),
    "eps must be positive": GOOD._replace(eps=0.0),
    "embed .* is not inside": GOOD._replace(embed=GOOD.embed._replace(embed=385)),
    "head does not use the embed interval": GOOD._replace(head=GOOD.head._replace(embed_offset=1)),
    "layer 0 does not use the embed interval": GOOD._replace(mlp=(MLP._replace(embed=64),) * 12),
    "classes .* is not inside": GOOD._replace(head=GOOD.head._replace(classes=1001)),
    "heads that overlap": GOOD._replace(attention=(ATTENTION._replace(pitch=63),) * 12),
    "query rows .* is not inside": GOOD._replace(attention=(ATTENTION._replace(query_row=-1),) * 12),
    "value rows .* is not inside": GOOD._replace(attention=(ATTENTION._replace(value_row=1100),) * 12),
    "proj columns .* is not inside": GOOD._replace(attention=(ATTENTION._replace(proj_column=300),) * 12),
    "hidden .* is not inside": GOOD._replace(mlp=(MLP._replace(hidden_offset=1500),) * 12),
    "heads without channels": GOOD._replace(attention=(ATTENTION._replace(head_dim=0),) * 12),
    "negative length": GOOD._replace(mlp=(MLP._replace(hidden=-1),) * 12),
}


@pytest.mark.parametrize("message", BAD)
def test_a_subnetwork_that_does_not_fit_is_refused(message):
    DEIT_S.sizes.validate(GOOD)
    with pytest.raises(ValueError, match=message):
        DEIT_S.sizes.validate(BAD[message])


def test_config_round_trip_and_named_widths():
    for config in CONFIGS.values():
        assert HydraViTConfig.from_dict(config.to_dict()) == config
    for name, heads in (("tiny", 3), ("small", 6), ("base", 12)):
        assert CONFIGS[name].max_heads == heads
        assert dataclasses.replace(CONFIGS[name], max_heads=12) == CONFIGS["base"]
