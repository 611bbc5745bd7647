"""Models of timm given as they are: timm's logits at full width, or one line that says what is not computed here."""

import warnings
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from small import images, make, quietly, shake
from torch import nn

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

import hydravit
from hydravit.checkpoint import extract, extract_config, infer_config, load_weights
from hydravit.cli import main
from hydravit.timm_models import config_of, timm

pytestmark = pytest.mark.usefixtures("one_thread")
VisionTransformer = timm.models.vision_transformer.VisionTransformer
vits = timm.models.vision_transformer
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}


def vit(**options):
    return shake(VisionTransformer(**{**SMALL, **options})).eval()


COMPUTED = {
    "plain": {},
    "other number of heads": {"num_heads": 2},
    "epsilon": {"norm_layer": partial(nn.LayerNorm, eps=1e-2)},
    "oblong grid as long as a square": {"img_size": (16, 64)},
    "MLP of no whole number per head": {"mlp_ratio": 2.5625},
    "fc_norm after token pooling": {"fc_norm": True},
    "average pooling": {"global_pool": "avg", "reg_tokens": 2},
    "no class token, no classifier": {"global_pool": "avg", "class_token": False, "num_classes": 0},
    "average pooling after the norm": {"global_pool": "avg", "fc_norm": False, "reg_tokens": 2},
    "the same without a class token": {"global_pool": "avg", "fc_norm": False, "class_token": False},
    "maximum": {"global_pool": "max"},
    "mean and maximum after the norm": {"global_pool": "avgmax", "fc_norm": False},
    "no pooling": {"global_pool": "", "reg_tokens": 2},
    "registers and layer scale": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.3},
    "grey, no bias": {"in_chans": 1, "qkv_bias": False},
    "projections without bias": {"proj_bias": False},
    "dynamic image size": {"dynamic_img_size": True},
    "norm before the blocks": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "torch's tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "quick GELU": {"act_layer": "quick_gelu", "pre_norm": True},
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("case", COMPUTED)
def test_a_model_of_timm_is_computed(case, backend):
    source = vit(**COMPUTED[case])
    model = hydravit.fused_model(checkpoint=source, backend=backend).eval()
    x = images(model.config)
    narrow = VisionTransformer(**extract_config(model, 1)).eval()
    narrow.load_state_dict(extract(model, 1))
    with torch.no_grad():
        for _ in range(3):  # in place, then packed
            torch.testing.assert_close(model(x), source(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model(x, heads=1), narrow(x), rtol=1e-4, atol=1e-4)
    model.train()
    model(x, heads=1).sum().backward()
    assert model.blocks[1].mlp.fc2.weight.grad.any()


class Lora(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) + x.mean()


def changed(change):
    model = vit()
    change(model)
    return model


REFUSED = {
    "norms after branches": (lambda: vit(block_fn=vits.ResPostBlock), "norms after the branches"),
    "parallel": (lambda: vit(block_fn=vits.ParallelScalingBlock), "attention and MLP in parallel"),
    "several": (lambda: vit(block_fn=vits.ParallelThingsBlock), "several branches in parallel"),
    "qk_norm": (lambda: vit(qk_norm=True), "q_norm is a LayerNorm .*qk_norm"),
    "scale_attn_norm": (lambda: vit(scale_attn_norm=True), "attn.norm is a LayerNorm .*scale_attn_norm"),
    "scale_mlp_norm": (lambda: vit(scale_mlp_norm=True), "mlp.norm is a LayerNorm .*scale_mlp_norm"),
    "differential": (lambda: vit(attn_layer="diff"), "differential attention"),
    "gated": (lambda: vit(mlp_layer=timm.layers.SwiGLU), "a gated MLP"),
    "packed gated": (lambda: vit(mlp_layer=timm.layers.SwiGLUPacked), r"a gated MLP \(SwiGLU\)"),
    "map": (lambda: vit(global_pool="map"), "attn_pool is a AttentionPoolLatent .attention pooling"),
    "all tokens": (lambda: vit(global_pool="avg", pool_include_prefix=True), "pool_include_prefix"),
    "no norm": (lambda: vit(final_norm=False), "final_norm=False"),
    "RMS norm": (lambda: vit(norm_layer=timm.layers.RmsNorm), "norm1 is a RmsNorm"),
    "ReLU": (lambda: vit(act_layer="relu"), "mlp.act is a ReLU"),
    "no position": (lambda: vit(pos_embed="none"), "no position embedding"),
    "bias of one": (
        lambda: changed(lambda m: [b.mlp.register_module("fc2", nn.Linear(192, 48, bias=False)) for b in m.blocks]),
        "biases of one projection of three",
    ),
    "padded images": (lambda: vit(dynamic_img_pad=True), "padded to whole patches"),
    "cut images": (lambda: vit(img_size=36), "image_size .36, 36. must be one or two multiples of patch_size 8"),
    "oblong patches": (lambda: vit(patch_size=(8, 4)), "patches that are no squares"),
    "distilled with registers": (
        lambda: timm.models.deit.VisionTransformerDistilled(**SMALL, reg_tokens=1),
        "distilled=True needs .* no register tokens",
    ),
    "another epsilon": (lambda: changed(lambda m: setattr(m.norm, "eps", 1e-3)), "norms with different epsilons"),
    "another scale": (lambda: changed(lambda m: setattr(m.blocks[1].attn, "scale", 1.0)), "layers that differ"),
    "patched": (lambda: changed(lambda m: setattr(m.blocks[1].mlp, "forward", abs)), "mlp is a Mlp .its forward is"),
    "wrapped": (
        lambda: changed(lambda m: setattr(m.blocks[1].attn, "qkv", Lora(m.blocks[1].attn.qkv))),
        "blocks.1.attn.qkv is a Lora",
    ),
    "another head": (
        lambda: changed(lambda m: setattr(m, "head", nn.Sequential(m.head, nn.Softmax(-1)))),
        "head is a Sequential",
    ),
    "subclass": (lambda: type("MyViT", (VisionTransformer,), {})(**SMALL), "MyViT computes what this package does not"),
    "torchvision's": (
        lambda: import_module("torchvision").models.VisionTransformer(32, 8, 1, 2, 16, 32),
        "torchvision.models.vision_transformer.VisionTransformer .take the same model from timm: timm.create_model",
    ),
    "another kind": (lambda: nn.Linear(2, 2), "Linear computes what this package does not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_arithmetic_is_refused_in_one_line(case):
    build, message = REFUSED[case]
    model = build()
    for take in (hydravit.config_of, lambda m: hydravit.fused_model(checkpoint=m), lambda m: load_weights(make(), m)):
        with pytest.raises(ValueError, match=message) as caught:
            take(model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_huge_patch14_224", "deit3_huge_patch14_224"])
def test_heads_of_80_channels(name):
    """Their width divides by 64 too."""
    config = config_of(name)
    assert (config.max_heads, config.head_dim, config.hidden) == (16, 80, 5120)
    source = timm.create_model(name, depth=1, img_size=28, num_classes=3).eval()
    x = torch.randn(1, 3, 28, 28)
    models = [
        hydravit.fused_model(checkpoint=source, backend="reference"),
        quietly(hydravit.fused_model, checkpoint=source.state_dict(), backend="reference"),
        hydravit.fused_model(config=config_of(name, depth=1, img_size=28, num_classes=3), backend="reference"),
    ]
    load_weights(models[2], source.state_dict())
    for model in models:
        torch.testing.assert_close(model.eval()(x), source(x), rtol=1e-4, atol=1e-4)


def test_what_weights_do_not_tell_is_asked_for_or_named():
    state = vit().state_dict()
    with pytest.raises(
        ValueError, match="48 channels have no usual number of heads: pass the head_dim, or timm's model"
    ):
        hydravit.fused_model(checkpoint=state)
    with pytest.warns(UserWarning, match=r"assumed: norm_eps=1e-06, pool='token', image_size=\(32, 32\), exact GELU"):
        hydravit.fused_model(checkpoint=state, head_dim=12)
    known = {"head_dim": 12, "norm_eps": 1e-3, "pool": "token", "image_size": (16, 64)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert infer_config(state, **known).grid == (2, 8)
    usual = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    with pytest.warns(UserWarning, match="assumed: head_dim=64, norm_eps"):
        assert infer_config(usual).max_heads == 3
    one_of_two = timm.create_model("vit_base_patch16_rpn_224", depth=1).state_dict()
    with pytest.raises(ValueError, match="norms before or after the branches"):
        infer_config(one_of_two)


def test_a_checkpoint_with_a_config_is_not_loaded_into_other_arithmetic():
    source = vit(num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-3))
    with pytest.raises(ValueError, match="head_dim is 24, the model's is 12"):
        load_weights(make(max_heads=4, head_dim=12), source)
    with pytest.warns(UserWarning, match="norm_eps is 0.001, the model's is 1e-06"):
        load_weights(make(max_heads=2, head_dim=24), source)


def test_models_are_taken_out_of_wrappers_and_keep_their_preprocessing():
    source = timm.create_model("vit_tiny_patch16_224.augreg_in21k", depth=1, num_classes=5)
    assert hydravit.config_of(nn.DataParallel(source)) == config_of(torch.compile(source))
    assert hydravit.checkpoint.checkpoint_of(source).preprocessing.mean == (0.5, 0.5, 0.5)
    ours = make()
    assert hydravit.config_of(ours) == ours.config
    with pytest.warns(UserWarning, match="dropout is left out"):
        hydravit.config_of(vit(drop_rate=0.1))
    with pytest.raises(TypeError, match="must be an nn.Module, not str"):
        hydravit.config_of("vit_tiny_patch16_224")


def test_the_command_line_takes_a_name_of_timm(tmp_path, capsys):
    state = timm.create_model("vit_so400m_patch14_siglip_224", depth=1, img_size=28).state_dict()
    torch.save(state, tmp_path / "siglip.pt")
    assert main(["info", "--checkpoint", str(tmp_path / "siglip.pt"), "--timm", "vit_so400m_patch14_siglip_224"]) == 2
    assert "attention pooling" in capsys.readouterr().err
    state = timm.create_model("vit_base_patch16_224", depth=1, img_size=32, num_heads=16).state_dict()
    torch.save(state, tmp_path / "vit.pt")
    for name, heads in (("vit_base_patch16_224", "12"), ("vit_tiny_patch16_224", "12")):
        assert main(["info", "--checkpoint", str(tmp_path / "vit.pt"), "--timm", name]) == 0
        assert f"max_heads             {heads}" in capsys.readouterr().out
