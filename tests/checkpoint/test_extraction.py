"""A width extracted as a plain ViT computes in timm what it computes here."""

from importlib.util import find_spec

import pytest
import torch
from small import images, make

from hydravit import geometry
from hydravit.checkpoint import extract, extract_config

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

from hydravit.timm_models import timm

pytestmark = pytest.mark.usefixtures("one_thread")
VisionTransformer = timm.models.vision_transformer.VisionTransformer
VARIANTS = {
    "plain": {},
    "registers, no_embed_class": {"register_tokens": 3, "no_embed_class": True},
    "layer scale, no bias": {"layer_scale": 0.3, "qkv_bias": False},
    "average pooling": {"pool": "avg"},
    "projections without bias": {"proj_bias": False},
    "no class token, grey, oblong": {"pool": "avg", "class_token": False, "in_channels": 1, "image_size": (24, 40)},
    "other ratio, epsilon": {"mlp_ratio": 2.5625, "norm_eps": 1e-3},
    "separate classifiers": {"separate_classifiers": (1, 2, 3, 4)},
    "no classifier": {"num_classes": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_width_is_extracted_into_timm(variant):
    model = make(**VARIANTS[variant])
    x = images(model.config)
    for heads in (1, 3, 4):
        vit = VisionTransformer(**extract_config(model, heads)).eval()
        state = extract(model, heads)
        vit.load_state_dict(state, strict=True)
        torch.testing.assert_close(vit(x), model(x, heads=heads), rtol=1e-5, atol=1e-5)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for tensor in state.values():
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.untyped_storage().data_ptr() not in own
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_nestings_are_extracted_with_their_scale(dtype):
    model = make().to(dtype)
    x = images(model.config).to(dtype)
    cases = [
        geometry.scala(model.config, 48, suffix=True),
        geometry.scala(model.config, 16, suffix=False),
        geometry.sortednet(model.config, 3),
        geometry.matformer(model.config, 1),
    ]
    for case in cases:
        vit = VisionTransformer(**extract_config(model, case)).eval().to(dtype)
        vit.load_state_dict(extract(model, case), strict=True)
        torch.testing.assert_close(vit(x), model(x, heads=case), rtol=1e-5, atol=1e-5)


def test_what_is_no_plain_vit_is_not_extracted():
    model = make()
    config = model.config
    cases = [
        (geometry.dynabert(config, 2), "2 heads of 16 channels are not as wide as its residual, 64"),
        (geometry.skd(config, [(16, 256), (8, 256)]), "its layers differ"),
        (geometry.skd(config, [(8, 256), (8, 256)]), "4 heads of 8 channels"),
        (geometry.skd(config, [(0, 256), (0, 256)]), "it skips a branch"),
    ]
    for case, reason in cases:
        for function in (extract, extract_config):
            with pytest.raises(ValueError, match=f"cannot be extracted as a plain Vision Transformer: {reason}"):
                function(model, case)
    with pytest.raises(ValueError, match=r"heads must be in 1\.\.4, not 5"):
        extract(model, 5)
