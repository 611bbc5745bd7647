"""Every ViT and DeiT of timm's registry: timm's logits, or one line that names what is not computed here."""

import dataclasses
from importlib.util import find_spec

import pytest
import torch
from small import quietly, shake

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

import hydravit
from hydravit.checkpoint import extract, extract_config, infer_config
from hydravit.timm_models import config_of, timm

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.long]
NAMES = [name for name in timm.list_models() if name.startswith(("vit_", "deit"))]
VisionTransformer = timm.models.vision_transformer.VisionTransformer
VisionTransformerDistilled = timm.models.deit.VisionTransformerDistilled

# What no weights tell, so that a state dict may be refused though the model is computed, and the reverse never.
REASONS = (
    "rotary positions", "relative positions", "a convolutional network before the blocks", "attention pooling",
    "final_norm=False", "SwiGLU", "in parallel", "differential attention",
    "norms after the branches", "multiples of patch_size", "is a RmsNorm",
)  # fmt: skip


def on_meta(name):
    """The model without memory; two layers are enough, but some kinds must have all."""
    with torch.device("meta"):
        try:
            return timm.create_model(name, depth=2)
        except (TypeError, AssertionError):
            return timm.create_model(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_computed_or_refused(name):
    model = on_meta(name)
    try:
        config = config_of(model)
    except ValueError as error:
        assert any(reason in str(error) for reason in REASONS) and "\n" not in str(error), str(error)
        with pytest.raises(ValueError) as refused:
            quietly(infer_config, model.state_dict())
        assert "\n" not in str(refused.value)
        return
    known = {} if config.prefix_tokens else {"head_dim": config.head_dim}  # which weights without prefix do not tell
    known["act_layer"] = config.act_layer
    if config.pre_norm:
        with pytest.raises(ValueError, match="pass act_layer and norm_eps"):
            quietly(infer_config, model.state_dict(), **known)
        known["norm_eps"] = config.norm_eps
    inferred = quietly(infer_config, model.state_dict(), **known)
    assert dataclasses.replace(inferred, layer_scale=config.layer_scale) == config
    # Two heads and few patches, in the same relations, take no time.
    patch = config.patch_size
    small = {"depth": 2, "num_heads": 2, "embed_dim": 2 * config.head_dim, "img_size": (2 * patch, 3 * patch)}
    vit = shake(timm.create_model(name, num_classes=7, **small)).eval()
    x = torch.randn(2, 3, 2 * patch, 3 * patch)
    for backend in ("reference", "native"):
        ours = hydravit.fused_model(checkpoint=vit, backend=backend).eval()
        kind = VisionTransformerDistilled if config.distilled else VisionTransformer
        narrow = kind(**extract_config(ours, 1)).eval()
        narrow.load_state_dict(extract(ours, 1))
        with torch.no_grad():
            torch.testing.assert_close(ours(x), vit(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours(x, heads=1), narrow(x), rtol=1e-4, atol=1e-4)
    assert (ours.config.head_dim, ours.config.norm_eps, ours.config.pool) == (
        config.head_dim, config.norm_eps, config.pool,
    )  # fmt: skip
