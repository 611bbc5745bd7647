"""Models whose modules were changed: their config and weights say what they compute, or one line says why not."""

import pytest
import torch
from small import SMALL, images, make, same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import hydravit
from hydravit.checkpoint import extract, extract_config, save_checkpoint
from hydravit.config import resolve_config

pytestmark = pytest.mark.usefixtures("one_thread")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def plain(model, heads):
    """The width as a network of its own, with the epsilon that ``extract_config`` names."""
    eps = extract_config(model, heads)["norm_layer"].keywords["eps"]
    found = hydravit.HydraViT(resolve_config(model.config, max_heads=heads, norm_eps=eps), backend="reference").eval()
    found.load_state_dict(extract(model, heads))
    return found


def reread(model, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", model)
    return hydravit.fused_model(checkpoint=tmp_path / "model.safetensors", backend="reference").eval()


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("change", ["epsilon", "weight norm", "parametrized token", "compiled block"])
def test_what_changed_is_extracted_saved_and_taken_over(change, heads, tmp_path):
    model = make()
    if change == "epsilon":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.1
    elif change == "weight norm":
        parametrizations.weight_norm(model.blocks[1].attn.qkv)
        parametrizations.orthogonal(model.blocks[0].mlp.fc1)
    elif change == "parametrized token":
        parametrize.register_parametrization(model, "cls_token", Doubled())
    else:
        model.blocks[1] = torch.compile(model.blocks[1])
    x = images(SMALL)
    taken = hydravit.fused_model(checkpoint=model, backend="reference").eval()
    if change == "compiled block":  # it serves the full width, and is never compiled here
        assert same(taken, make_equal(model)) and same(reread(model, tmp_path), taken) and extract(model, heads)
        return
    expected = model(x, heads=heads)
    for found in (plain(model, heads)(x), reread(model, tmp_path)(x, heads=heads), taken(x, heads=heads)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def make_equal(model):
    """The same weights without a wrapper."""
    equal = make()
    equal.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()})
    return equal


def patched(model):
    model.blocks[1].mlp.forward = lambda x, s=None: 0 * x


REFUSED = {
    "blocks.0.mlp.act is ReLU": lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    r"blocks.1.norm2 is LayerNorm\(\(64,\), eps=0.001": lambda m: setattr(m.blocks[1].norm2, "eps", 1e-3),
    "blocks.0.attn.qkv is Sequential": lambda m: setattr(m.blocks[0].attn, "qkv", nn.Sequential(m.blocks[0].attn.qkv)),
    "blocks.1.mlp has a patched forward": patched,
    "the model has 1 blocks, its config 2": lambda m: setattr(m, "blocks", m.blocks[:1]),
    "fc1.weight is computed by a hook, which torch.nn.utils.prune.remove": lambda m: prune.random_unstructured(
        m.blocks[0].mlp.fc1, "weight", 0.5
    ),
    "head is Sequential": lambda m: setattr(m, "head", nn.Sequential(nn.Linear(64, 10), nn.Tanh())),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_config_and_weights_do_not_tell_is_named(message, tmp_path):
    model = make()
    REFUSED[message](model)
    for use in (
        lambda: extract(model, 2),
        lambda: extract_config(model, 4),
        lambda: reread(model, tmp_path),
        lambda: hydravit.fused_model(checkpoint=model),
        lambda: hydravit.config_of(model),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value) and "model.state_dict()" in str(caught.value)


def test_hooks_and_idle_modules_are_no_change(tmp_path):
    model, x = make(), images(SMALL)
    expected = model(x, heads=2)
    model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    model.blocks[0].attn.attn_drop, model.blocks[1].drop_path1 = nn.Dropout(0.1), nn.Identity()
    for found in (plain(model, 2)(x), reread(model, tmp_path)(x, heads=2)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
