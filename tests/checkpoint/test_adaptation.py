"""Weights of other models: every adaptation, and weights that no adaptation can save."""

from importlib.util import find_spec

import pytest
import torch
from small import images, make, quietly, same, without

from hydravit import fused_model
from hydravit.checkpoint import Checkpoint, load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "variant", [{}, {"register_tokens": 2, "layer_scale": 0.1}, {"pool": "avg", "class_token": False}]
)
def test_a_smaller_vit_becomes_the_first_heads(heads, variant):
    small, model = make(max_heads=heads, **variant), make(**variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match=f"a ViT of {heads} heads becomes the first {heads} of 4"):
        messages = load_weights(model, small.state_dict())
    assert len(messages) == 1
    x = images(model.config)
    torch.testing.assert_close(model(x, heads=heads), small(x), rtol=1e-5, atol=1e-5)
    width = heads * 16
    for name, tensor in model.state_dict().items():
        if name.endswith("attn.qkv.weight"):
            assert torch.equal(tensor[64 + width : 128], before[name][64 + width : 128])
            assert torch.equal(tensor[:, width:], before[name][:, width:])
        elif name.endswith(("norm1.weight", "fc2.bias", "proj.bias")):
            assert torch.equal(tensor[width:], before[name][width:])


def test_one_classifier_serves_all_separate_ones():
    single, model = make(), make(separate_classifiers=(2, 3, 4))
    with pytest.warns(UserWarning, match="copied to every width's own"):
        load_weights(model, single.state_dict())
    x = images(model.config)
    for heads in (2, 3, 4):
        torch.testing.assert_close(model(x, heads=heads), single(x, heads=heads), rtol=1e-5, atol=1e-5)
    small = make(max_heads=2)
    quietly(load_weights, model, small.state_dict())
    torch.testing.assert_close(model(x, heads=2), small(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("full_width", [True, False])
def test_listed_classifiers_are_stacked(full_width):
    source, model = make(separate_classifiers=(2, 4)), make(separate_classifiers=(2, 4))
    state = source.state_dict()
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    for i, heads in enumerate((2, 4)):
        state[f"head.{i}.weight"] = weight[i] if full_width else weight[i, :, : heads * 16]
        state[f"head.{i}.bias"] = bias[i]
    load_weights(model, state)
    x = images(model.config)
    for heads in (2, 4):
        assert torch.equal(model(x, heads=heads), source(x, heads=heads))
    with pytest.raises(ValueError, match=r"separate classifiers: .*separate_classifiers are \[\]"):
        load_weights(make(), state)
    for name, wrong in (("head.0.weight", (10, 65)), ("head.1.weight", (10,)), ("head.1.bias", (9,))):
        with pytest.raises(ValueError, match="separate classifiers differ in shape"):
            load_weights(model, state | {name: torch.ones(wrong)})


@pytest.mark.parametrize("separate", [(), (2, 4)])
def test_other_number_of_classes(separate):
    model = make(num_classes=5, separate_classifiers=separate)
    with pytest.warns(UserWarning, match="num_classes is 10, the model's is 5: its classifier is initialised anew"):
        load_weights(model, make(separate_classifiers=separate).state_dict())
    assert model.head.weight.std() < 0.05 and not model.head.bias.any()
    with pytest.warns(UserWarning, match="left out, because the model has num_classes=0"):
        load_weights(make(num_classes=0), make().state_dict())
    with pytest.warns(UserWarning, match="there is no classifier"):
        load_weights(make(), make(num_classes=0).state_dict())


def test_positions_of_prefix_tokens_do_not_change_the_function():
    covering, free = make(register_tokens=2), make(register_tokens=2, no_embed_class=True)
    x = images(covering.config)
    with pytest.warns(UserWarning, match="added to these tokens"):
        load_weights(free, covering.state_dict())
    torch.testing.assert_close(free(x), covering(x), rtol=1e-5, atol=1e-5)
    covering = make(register_tokens=2)
    with pytest.warns(UserWarning, match="zeros for the class and register tokens"):
        load_weights(covering, free.state_dict())
    torch.testing.assert_close(free(x), covering(x), rtol=1e-5, atol=1e-5)


def test_the_grid_of_the_checkpoint_is_known_from_its_config():
    source, model = make(image_size=(16, 64)), make()  # 2 x 8 patches and 4 x 4: as many
    load_weights(model, source.state_dict())
    assert torch.equal(model.pos_embed, source.pos_embed)
    messages = quietly(load_weights, model, Checkpoint(source.state_dict(), source.config))
    assert messages == ["pos_embed is resampled from 2 x 8 to 4 x 4"]


def test_norm_serves_the_other_pooling_and_old_layer_scale_names():
    source, model = make(), make(pool="avg")
    with pytest.warns(UserWarning, match="norm is used as fc_norm, because the model has pool='avg'"):
        load_weights(model, source.state_dict())
    assert torch.equal(model.fc_norm.weight, source.norm.weight)
    source, model = make(layer_scale=0.1), make(layer_scale=0.1)
    names = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
    state = {name.replace(name[8:], names.get(name[8:], name[8:])): t for name, t in source.state_dict().items()}
    assert "blocks.1.gamma_2" in state
    load_weights(model, state)
    assert same(model, source)


def test_distilled_deit():
    source, model = make(), make()
    state = source.state_dict()
    state["dist_token"] = torch.randn(1, 1, 64)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], torch.randn(1, 1, 64), state["pos_embed"][:, 1:]], 1)
    state |= {"head_dist.weight": torch.randn(10, 64), "head_dist.bias": torch.randn(10)}
    with pytest.raises(ValueError, match="distilled DeiT .*strict=False drops"):
        load_weights(model, state)
    with pytest.warns(UserWarning, match="dropped dist_token, head_dist"):
        load_weights(model, state, strict=False)
    assert same(model, source)


def test_the_encoder_of_mae_is_loaded_and_its_decoder_named():
    source = make(num_classes=0)
    decoder = {name: torch.ones(1, 1, 8) for name in ("mask_token", "decoder_pos_embed", "decoder_embed.weight")}
    decoder |= {f"decoder_blocks.0.{name}": torch.ones(8) for name in ("norm1.weight", "norm1.bias")}
    state = {"model": source.state_dict() | decoder}
    for model in (make(num_classes=0), quietly(fused_model, checkpoint=state, head_dim=16, backend="reference")):
        with pytest.warns(
            UserWarning, match="left out mask_token, decoder_pos_embed, .* and 1 more, which pretraining"
        ):
            load_weights(model, state)
        x = images(model.config)
        for heads in (2, 4):
            torch.testing.assert_close(model.eval()(x, heads=heads), source(x, heads=heads))


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("size", [32, 48])
def test_dinov2(chunks, size):
    """Registers have no positions there, only the class token has; layers of FSDP's chunks have two numbers."""
    source = make(register_tokens=3, layer_scale=0.2, no_embed_class=True, num_classes=0)
    state = source.state_dict()
    state["register_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 64)
    position = torch.randn(1, 1, 64)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - position
    if chunks:
        state = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in state.items()}
    model = quietly(
        fused_model, checkpoint={"teacher": state}, head_dim=16, image_size=size, backend="reference"
    ).eval()
    expected = make(source.config, image_size=size)
    quietly(load_weights, expected, source.state_dict())
    x = images(model.config)
    for heads in (1, 4):
        torch.testing.assert_close(model(x, heads=heads), expected(x, heads=heads), rtol=1e-5, atol=1e-5)
    gated = state | {"blocks.0.mlp.w12.weight": torch.ones(8, 64)}
    with pytest.raises(ValueError, match=r"a gated MLP \(SwiGLU\), which this package does not compute"):
        fused_model(checkpoint=gated, head_dim=16)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_a_patch_embedding_of_rgb_serves_other_channels(channels):
    source, model = make(), make(in_channels=channels)
    with pytest.warns(UserWarning, match=f"the patch embedding of 3 channels is adapted to {channels}"):
        load_weights(model, source.state_dict())
    grey = torch.randn(2, 1, 32, 32)
    x = grey.expand(-1, channels, -1, -1)  # all channels alike: what the three see of the same image
    for heads in (2, 4):
        if channels in (1, 6):
            expected = source(grey.expand(-1, 3, -1, -1), heads=heads)
            torch.testing.assert_close(model(x, heads=heads), expected, rtol=1e-4, atol=1e-4)
    if find_spec("timm") is not None:
        from hydravit.timm_models import timm

        adapted = timm.models.adapt_input_conv(channels, source.patch_embed.proj.weight)
        torch.testing.assert_close(model.patch_embed.proj.weight, adapted)


def test_strictness_is_an_argument_of_fused_model():
    state = make().state_dict() | {"extra.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="no place for extra.weight"):
        fused_model(checkpoint=state, head_dim=16)
    model = quietly(fused_model, checkpoint=state, head_dim=16, strict=False, backend="reference")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_not_strict_keeps_what_is_missing_and_drops_what_is_left():
    source, model = make(), make(register_tokens=2)
    tokens = model.reg_token.clone()
    messages = quietly(load_weights, model, source.state_dict() | {"extra": torch.ones(1)}, strict=False)
    assert messages == ["the checkpoint lacks reg_token", "the model has no place for extra"]
    assert torch.equal(model.reg_token, tokens) and torch.equal(model.pos_embed[:, 3:], source.pos_embed[:, 1:])
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1]) and not model.pos_embed[:, 1:3].any()
    model = make(pool="avg", class_token=False)
    quietly(load_weights, model, make(pool="avg").state_dict(), strict=False)


# How good weights are spoilt, or the model differs from them, and what the message says.
BAD_WEIGHTS = {
    "foreign": (lambda s: {"conv1.weight": torch.ones(3)}, {}, "not the weights of a Vision.*found conv1.weight"),
    "missing": (without("blocks.1.mlp.fc1.bias"), {}, "the checkpoint lacks blocks.1.mlp.fc1.bias"),
    "half a head": (without("head.weight"), {}, "the checkpoint lacks head.weight"),
    "unexpected": (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(16)}, {}, "no place for .*q_norm"),
    "shape": (lambda s: s | {"cls_token": torch.ones(1, 2, 64)}, {}, "pos_embed has 17 tokens, 2 of them"),
    "token": (lambda s: s | {"cls_token": torch.ones(64)}, {}, r"cls_token has shape \(64,\); expected \(1,"),
    "flat head": (lambda s: s | {"head.weight": torch.ones(640)}, {}, r"head.weight has shape \(640,\); expected 2"),
    "transposed": (
        lambda s: s | {"blocks.0.mlp.fc1.weight": s["blocks.0.mlp.fc2.weight"]},
        {},
        r"blocks.0.mlp.fc1.weight has shape \(64, 256\); expected \(256, 64\)",
    ),
    "integers": (lambda s: s | {"pos_embed": s["pos_embed"].int()}, {}, r"floating-point .*pos_embed \(torch.int32\)"),
    "head": (lambda s: s | {"head.bias": torch.ones(3)}, {}, "head.weight is for 10 classes, but head.bias is for 3"),
    "positions": (lambda s: s | {"pos_embed": torch.ones(17, 64)}, {}, r"pos_embed has shape \(17, 64\)"),
    "grid": (
        lambda s: s | {"pos_embed": torch.ones(1, 20, 64)},
        {},
        "20 tokens, 1 of them .* no square grid, nor",
    ),
    "in_channels": (
        lambda s: s | {"patch_embed.proj.weight": torch.ones(64, 2, 8, 8)},
        {"in_channels": 1},
        "in_channels is 2, the model's is 1",
    ),
    "patch_size": (None, {"patch_size": 16}, "patch_size is 8, the model's is 16"),
    "too wide": (None, {"max_heads": 2}, "the width is 64 channels, the model has only 32"),
    "other head dim": (None, {"head_dim": 24}, "only a multiple of head_dim 24 fits"),
    "other nesting": (None, {"max_heads": 8, "geometry": "matformer"}, "not 'matformer'"),
    "deeper": (None, {"depth": 3}, "lacks blocks.2.* and 8 more; depth is 2, expected 3"),
    "shallower": (None, {"depth": 1}, "no place for blocks.1.*; depth is 2, expected 1"),
    "hidden": (None, {"mlp_ratio": 2.0}, r"blocks.0.mlp.fc1.weight has shape \(256, 64\); expected \(128, 64\)"),
    "no bias": (None, {"qkv_bias": False}, "no place for blocks.0.attn.qkv.bias"),
    "registers": (None, {"register_tokens": 4}, "lacks reg_token"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_wrong_weights_are_refused_and_change_nothing(case):
    spoil, overrides, message = BAD_WEIGHTS[case]
    state, model = make().state_dict(), make(**overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, Checkpoint(spoil(state) if spoil else state, path="some/file.pt"))
    assert "some/file.pt" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
