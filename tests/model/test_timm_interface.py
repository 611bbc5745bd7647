"""The methods that timm's tools call besides the forward, against timm's own ViT, at any width."""

from importlib.util import find_spec

import pytest
import torch
from small import SMALL, images, make
from torch import nn

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

import hydravit.timm_models  # noqa: F401, I001  before timm: it repairs torchvision's import
import timm
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters, save_for_hf
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

from hydravit.checkpoint import extract, extract_config
from hydravit.training import SliceGradients

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = [2, 4]
both = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.needs("native"))])
at_widths = pytest.mark.parametrize("heads", WIDTHS)
VARIANTS = [{}, {"register_tokens": 2, "no_embed_class": True}, {"pool": "avg"}, {"pool": "avg", "class_token": False}]
variants = pytest.mark.parametrize("overrides", VARIANTS, ids=str)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def timms(model, heads):
    """timm's ViT with the weights of one width."""
    vit = VisionTransformer(**extract_config(model, heads)).eval()
    vit.load_state_dict(extract(model, heads), strict=model.num_classes > 0)  # a pruned model has no final norm
    return vit


# Intermediate features ------------------------------------------------------------------------------------------------


@both
@at_widths
@variants
def test_forward_intermediates(backend, heads, overrides):
    model, x = make(backend=backend, depth=3, **overrides), images(SMALL)
    vit = timms(model, heads)
    for arguments in (
        {},
        {"indices": 1},
        {"indices": [-1, 0], "return_prefix_tokens": True},
        {"indices": (1,), "norm": True, "output_fmt": "NLC"},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"indices": [0, 1], "stop_early": True, "norm": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ):
        close(model.forward_intermediates(x, heads=heads, **arguments), vit.forward_intermediates(x, **arguments))
    for n, arguments in ((2, {"reshape": True, "norm": True}), ([0, 2], {"return_prefix_tokens": True})):
        ours = model.get_intermediate_layers(x, n, heads=heads, **arguments)
        close(ours, vit.get_intermediate_layers(x, n, **arguments))
    model.heads = heads
    close(model.get_intermediate_layers(x), vit.get_intermediate_layers(x))


@both
def test_intermediates_of_one_width_per_image(backend):
    model, x = make(backend=backend), images(SMALL, 3)
    features, maps = model.forward_intermediates(x, norm=True, heads=torch.tensor([4, 2, 1]))
    close(features, model.forward_features(x, heads=torch.tensor([4, 2, 1])))
    for i, heads in enumerate((4, 2, 1)):
        one = model.forward_intermediates(x[i : i + 1], norm=True, intermediates_only=True, heads=heads)
        for found, expected in zip(maps, one, strict=True):
            close(found[i : i + 1, : 16 * heads], expected)
            assert not found[i, 16 * heads :].any()


@both
@at_widths
def test_gradients_of_intermediates(backend, heads):
    model, x = make(backend=backend), images(SMALL)
    vit = timms(model, heads)
    for network, width in ((model, {"heads": heads}), (vit, {})):
        maps = network.forward_intermediates(x, norm=True, intermediates_only=True, **width)
        sum(y.square().sum() for y in maps).backward()
    embed = 16 * heads
    close(model.patch_embed.proj.weight.grad[:embed], vit.patch_embed.proj.weight.grad)
    close(model.norm.weight.grad[:embed], vit.norm.weight.grad)


def test_what_is_no_intermediate():
    model, x = make(), images(SMALL)
    for arguments, words in (
        ({"indices": 3}, r"indices: the number of last blocks must be in 1\.\.2, not 3"),
        ({"indices": [2]}, r"indices must be blocks in -2\.\.1, not \[2\]"),
        ({"output_fmt": "NHWC"}, "output_fmt must be 'NCHW' or 'NLC', not 'NHWC'"),
    ):
        with pytest.raises(ValueError, match=words):
            model.forward_intermediates(x, **arguments)


@both
@at_widths
@variants
def test_pruned(backend, heads, overrides):
    model, x = make(backend=backend, depth=3, **overrides), images(SMALL)
    vit = timms(model, heads)
    with torch.no_grad():
        for _ in range(3):
            model(x, heads=heads)  # packs the weights
        assert model.prune_intermediate_layers([0, -2]) == vit.prune_intermediate_layers([0, -2]) == [0, 1]
        assert model.depth == model.config.depth == len(model.blocks) == len(model.feature_info) == 2
        assert model.num_classes == 0
        for _ in range(3):
            close(model.forward_intermediates(x, [0, 1], heads=heads), vit.forward_intermediates(x, [0, 1]))
            close(model.forward_features(x, heads), vit.forward_features(x))
            close(model(x, heads=heads), vit(x))
        assert model.prune_intermediate_layers(2, prune_norm=True, prune_head=False) == [0, 1]
        vit.prune_intermediate_layers(2, prune_norm=True, prune_head=False)
        close(model.forward_features(x, heads), vit.forward_features(x))


@at_widths
def test_pruned_with_its_classifier(heads):
    model, x = make(depth=3), images(SMALL)
    model.prune_intermediate_layers([1], prune_head=False)
    close(model(x, heads=heads), timms(model, heads)(x))


@both
@at_widths
def test_features_only(backend, heads):
    arguments = {"img_size": 32, "depth": 3, "features_only": True}
    features = timm.create_model("hydravit_small_patch16_224", heads=heads, backend=backend, **arguments).eval()
    width = {2: 128, 4: 256}[heads]
    assert features.feature_info.channels() == [width] * 3 and features.feature_info.reduction() == [16] * 3
    assert features.feature_info.module_name() == ["blocks.0", "blocks.1", "blocks.2"]
    assert features.pretrained_cfg["input_size"] == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    maps = features(x)
    assert [m.shape for m in maps] == [(2, width, 2, 2)] * 3
    close(maps, timms(features.model, heads).forward_intermediates(x, intermediates_only=True))
    kept = timm.create_model("hydravit_small_patch16_224", out_indices=[0, -2], backend=backend, **arguments)
    assert len(kept.model.blocks) == 2 and [m.shape for m in kept(x)] == [(2, 384, 2, 2)] * 2
    with pytest.raises(ValueError, match="feature_cls: only 'getter'"):
        timm.create_model("hydravit_small_patch16_224", feature_cls="hook", **arguments)


# Training -------------------------------------------------------------------------------------------------------------


@both
@at_widths
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_grad_checkpointing_keeps_the_bits(backend, heads, in_place, hooked):
    model, x = make(backend=backend, drop_path=0.5).train(), images(SMALL, 4)
    held = SliceGradients(model) if in_place else None
    if hooked:
        model.blocks[1].attn.register_forward_hook(lambda *_: None)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        held.zero_() if held else model.zero_grad()
        torch.manual_seed(3)
        for width in (heads, 1):
            logits = model(x, heads=width)
            logits.square().sum().backward()
        results.append([logits.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *results)) and results[0][2].any()
    model.set_grad_checkpointing()
    model.forward_intermediates(x, heads=heads)[0].sum().backward()
    if held:
        held.close()


def test_grad_checkpointing_runs_the_blocks_anew():
    model, x, seen = make().train(), images(SMALL), []
    model.blocks[0].norm2.register_forward_hook(lambda *_: seen.append("norm2"))
    model.set_grad_checkpointing()
    model(x, heads=2).sum().backward()
    assert len(seen) == 2
    with torch.no_grad():
        model(x, heads=2)
    assert len(seen) == 3


@pytest.mark.long
@both
def test_grad_checkpointing_compiled(backend):
    model, x = make(backend=backend).train(), images(SMALL)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for heads in WIDTHS:
        gradients = []
        for enable, network in ((False, model), (True, compiled)):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            network(x, heads=heads).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        close(*gradients)


def test_weight_decay_and_layer_decay_are_timms():
    model = make(register_tokens=2)
    vit = timms(model, 4)
    assert model.no_weight_decay() == vit.no_weight_decay()
    for coarse in (False, True):
        ours, theirs = (group_parameters(m, m.group_matcher(coarse), reverse=True) for m in (model, vit))
        assert ours == theirs and len(set(ours.values())) == 2 + model.depth
    for make_groups in (param_groups_weight_decay, param_groups_layer_decay):
        ours, theirs = (make_groups(m, 0.05, no_weight_decay_list=m.no_weight_decay()) for m in (model, vit))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a["weight_decay"] == b["weight_decay"] and a.get("lr_scale") == b.get("lr_scale")
            assert sorted(p.shape for p in a["params"]) == sorted(p.shape for p in b["params"])
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 2 + model.depth


# Attributes and input sizes -------------------------------------------------------------------------------------------


@variants
def test_attributes_are_timms(overrides):
    model = make(**overrides)
    vit = timms(model, 4)
    for name in (
        "num_classes", "num_features", "head_hidden_size", "embed_dim", "num_prefix_tokens", "num_reg_tokens",
        "has_class_token", "no_embed_class", "global_pool", "grad_checkpointing", "feature_info",
    ):  # fmt: skip
        assert getattr(model, name) == getattr(vit, name), name
    for name in ("img_size", "patch_size", "grid_size", "num_patches"):
        assert getattr(model.patch_embed, name) == getattr(vit.patch_embed, name), name
    assert model.in_chans == 3 and model.depth == len(model.blocks)
    model.heads = 2
    assert [info["num_chs"] for info in model.feature_info] == [32, 32]


@both
@at_widths
@variants
@pytest.mark.parametrize("size", [48, (24, 40), (16, 64)], ids=str)
def test_set_input_size(backend, heads, overrides, size):
    model = make(backend=backend, **overrides)
    vit = timms(model, heads)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        for _ in range(3):
            model(images(SMALL), heads=heads)  # packs the weights
        model.pos_embed.requires_grad_(False)
        covered = model.pos_embed.shape[1] - 16
        expected = resample_abs_pos_embed(model.pos_embed, [height // 8, width // 8], num_prefix_tokens=covered)
        model.set_input_size(size)
        vit.set_input_size((height, width))
        assert torch.equal(model.pos_embed, expected) and not model.pos_embed.requires_grad
        assert model.patch_embed.grid_size == model.config.grid == (height // 8, width // 8)
        x = torch.randn(2, 3, height, width)
        for _ in range(3):
            close(model(x, heads=heads), vit(x))
        close(model.forward_intermediates(x, heads=heads), vit.forward_intermediates(x))
    with pytest.raises(ValueError, match="images must be"):
        model(images(SMALL))


@pytest.mark.needs("native")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.set_input_size((16, 64)),
        lambda model: model.prune_intermediate_layers([0], prune_head=False),
        lambda model: model.reset_classifier(3),
    ],
)
def test_an_engine_of_other_sizes_says_so(change):
    model = make(backend="native")
    engine = model.engine()
    model.set_input_size(32)
    model.reset_classifier(10)
    x = images(SMALL)
    close(engine(x, heads=2), model(x, heads=2))
    change(model)
    with pytest.raises(RuntimeError, match="config has changed: make a new engine"):
        engine(images(model.config), heads=2)
    assert model.engine()(images(model.config), heads=2).shape == (2, model.num_classes)


def test_set_input_size_refuses():
    model = make()
    before = model.pos_embed
    model.set_input_size()
    model.set_input_size((32, 32), 8)
    assert model.pos_embed is before, "nothing changed"
    with pytest.raises(ValueError, match="image_size 30 must be one or two multiples of patch_size 8"):
        model.set_input_size(30)
    with pytest.raises(ValueError, match="patch_size stays 8"):
        model.set_input_size(32, patch_size=16)
    held = SliceGradients(model)
    for call in (lambda: model.set_input_size(64), lambda: model.prune_intermediate_layers(1)):
        with pytest.raises(ValueError, match="gradients in place: call it before training"):
            call()
    held.close()


@both
@at_widths
@variants
@pytest.mark.parametrize("in_place", [False, True])
def test_dynamic_img_size(backend, heads, overrides, in_place):
    model = make(backend=backend, **overrides)
    vit = VisionTransformer(**extract_config(model, heads), dynamic_img_size=True).eval()
    vit.load_state_dict(extract(model, heads))
    model.dynamic_img_size = True
    for size in ((32, 32), (48, 48), (24, 40)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            for _ in range(3):
                close(model(x, heads=heads), vit(x))
            features = model.forward_features(x, heads)
            close(features, vit.forward_features(x))
            close(model.forward_head(features, heads), vit.forward_head(features))
            arguments = {"norm": True, "return_prefix_tokens": True}
            ours = model.forward_intermediates(x, heads=heads, **arguments)
            close(ours, vit.forward_intermediates(x, **arguments))
            assert model.attention_maps(x, heads)[0].shape[-1] == features.shape[1]
    held = SliceGradients(model) if in_place else None
    for size in ((48, 48), (32, 32)):
        x = torch.randn(2, 3, *size)
        model(x, heads=heads).square().sum().backward()
        vit(x).square().sum().backward()
    embed = 16 * heads
    for name in ("patch_embed.proj.weight", "blocks.0.norm1.weight"):
        ours, theirs = model.get_parameter(name).grad[:embed], vit.get_parameter(name).grad
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.pos_embed.grad[..., :embed], vit.pos_embed.grad, rtol=1e-3, atol=1e-3)
    if held:
        held.close()
    with pytest.raises(ValueError, match=r"image_size \(30, 32\) must be one or two multiples of patch_size 8"):
        model(torch.randn(1, 3, 30, 32))


@at_widths
def test_dynamic_img_size_of_registered_models(heads):
    model = timm.create_model("hydravit_small_patch16_224", depth=1, img_size=64, dynamic_img_size=True, heads=heads)
    assert model.eval()(torch.randn(1, 3, 32, 48)).shape == (1, 1000)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(Exception, match=r"a compiled model has one size, which model\.set_input_size changes"):
        compiled(torch.randn(1, 3, 32, 48))


@both
@at_widths
@pytest.mark.parametrize("before", ["token", "avg"])
@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", ""])
def test_reset_classifier_with_another_pooling(backend, heads, before, pool):
    model, x = make(backend=backend, pool=before), images(SMALL, 3)
    with torch.no_grad():
        for _ in range(3):
            model(x, heads=heads)  # packs the weights
        vit = timms(model, heads)
        for network in (model, vit):
            network.reset_classifier(7, pool)
        vit.load_state_dict(extract(model, heads))
        for _ in range(3):
            close(model(x, heads=heads), vit(x))
        mixed = model(x, heads=torch.tensor([heads, 1, heads]))
        close(mixed[::2], vit(x)[::2])
        features = model.forward_features(x, heads)
        close(features, vit.forward_features(x))
        for pre_logits in (False, True):
            close(model.forward_head(features, heads, pre_logits=pre_logits), vit.forward_head(features, pre_logits))
        again = make(model.config, backend)
        again.load_state_dict(model.state_dict())
        close(again(x, heads=heads), vit(x))
    model(x, heads=heads).square().sum().backward()
    vit(x).square().sum().backward()
    close(model.blocks[0].mlp.fc2.weight.grad[: 16 * heads, : 64 * heads], vit.blocks[0].mlp.fc2.weight.grad)
    if not model.config.pooling_is_fused and backend == "native":
        with pytest.raises(ValueError, match=f"engine: .* pool='{pool}' with .* has no fused op"):
            model.engine()


def test_a_pooling_that_does_not_fit_changes_nothing():
    model = make(pool="avg", class_token=False)
    before, head = model.config, model.head
    for pool, words in (("token", "pool='token' needs class_token=True"), ("map", "pool must be 'token', 'avg'")):
        with pytest.raises(ValueError, match=words):
            model.reset_classifier(3, pool)
    assert model.config == before and model.head is head


# timm's scripts -------------------------------------------------------------------------------------------------------


@both
@at_widths
def test_channels_last(backend, heads):
    model, x = make(backend=backend), images(SMALL)
    expected = model(x, heads=heads)
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for _ in range(3):
            close(model(x, heads=heads), expected)
    model.train()(x, heads=heads).square().sum().backward()
    close(model(x, heads=heads), expected)
    vit = timms(model, heads)
    vit(x).square().sum().backward()
    torch.testing.assert_close(
        model.patch_embed.proj.weight.grad[: 16 * heads], vit.patch_embed.proj.weight.grad, rtol=1e-3, atol=1e-3
    )


@both
def test_feature_and_logit_distillation(backend):
    from timm.task import FeatureDistillationTask, LogitDistillationTask

    student, teacher = make(backend=backend).train(), make(backend=backend, max_heads=6)
    for model in (student, teacher):
        model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    x, labels = images(SMALL), torch.tensor([1, 2])
    for task in (LogitDistillationTask, FeatureDistillationTask):
        trained = task(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)
        trained.train()
        trained(x, labels)["loss"].backward()
        assert student.blocks[0].attn.qkv.weight.grad.any()


def test_a_name_of_the_hub_is_pretrained(monkeypatch):
    from timm.models import _builder, _factory

    source = timm.create_model("hydravit_tiny_patch16_224", depth=1, img_size=32, num_classes=5, backend="reference")
    found = {"hf_hub_id": "somebody/model", "source": "hf-hub", "num_classes": 5, "input_size": (3, 32, 32)}
    answer = timm.models.PretrainedCfg(**found), "hydravit_tiny_patch16_224", {"depth": 1, "img_size": 32}
    monkeypatch.setattr(_factory, "load_model_config_from_hf", lambda *_, **__: answer)
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: source.state_dict())
    monkeypatch.setattr(_builder, "has_hf_hub", lambda *_, **__: True)
    model = timm.create_model("hf-hub:somebody/model", pretrained=True, num_classes=5)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_local_folder_of_timm_is_pretrained(tmp_path, heads):
    arguments = {"depth": 1, "img_size": 32, "num_classes": 5}
    source = timm.create_model("hydravit_tiny_patch16_224", backend="reference", **arguments).eval()
    save_for_hf(source, tmp_path, model_args={"depth": 1, "img_size": 32})
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, heads=heads, backend="reference").eval()
    assert model.config == source.config and model.heads == heads
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), source(x, heads=heads))
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).num_classes == 3
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    torch.testing.assert_close(grey.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
    with pytest.raises(ValueError, match="no pretrained weights: pass checkpoint_path"):
        timm.create_model("hydravit_tiny_patch16_224", pretrained=True)
