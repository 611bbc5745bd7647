"""Modules as users of PyTorch and timm know them: hooked, wrapped, replaced, patched and parametrized, at any width."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as parametrize
from small import SMALL, images, make
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

import hydravit
from hydravit.checkpoint import extract
from hydravit.config import resolve_config
from hydravit.training import SliceGradients

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = [2, 4]
INNER = [
    "patch_embed", "patch_embed.proj", "norm", "head", "blocks.1",
    *(f"blocks.1.{name}" for name in (
        "norm1", "attn", "attn.qkv", "attn.attn_drop", "attn.proj", "ls1", "drop_path1",
        "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "ls2", "drop_path2",
    )),
]  # fmt: skip
both = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.needs("native"))])
at_widths = pytest.mark.parametrize("heads", WIDTHS)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def gradients(model, x, heads):
    model.zero_grad()
    model(x, heads=heads).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def narrow(model, heads):
    """A model of its own for one width, which no slice leads astray."""
    config = resolve_config(model.config, max_heads=heads)
    small = hydravit.HydraViT(config, backend="reference").eval()
    small.load_state_dict(extract(model, heads))
    return small


# ---- Hooks ----


@both
@at_widths
@pytest.mark.parametrize("name", INNER)
def test_hooks_fire_and_change_nothing(backend, heads, name):
    model, x = make(SMALL, backend, layer_scale=0.5), images(SMALL)
    with torch.no_grad():
        expected = [model(x, heads=heads) for _ in range(3)][-1]
    expected_gradients = gradients(model, x, heads)
    seen = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(len(inputs))),
        model.get_submodule(name).register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    with torch.no_grad():
        for _ in range(3):
            close(model(x, heads=heads), expected)
    assert seen == [1, 1, 1], "a hook sees one input, as in timm, in every call"
    for key, grad in gradients(model, x, heads).items():
        torch.testing.assert_close(grad, expected_gradients[key], rtol=1e-3, atol=1e-3)
    assert seen == [1, 1, 1, 1, "backward"]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x, heads=heads), expected)
    assert len(seen) == 5


@both
@pytest.mark.parametrize(
    "overrides", [{"pool": "avg"}, {"register_tokens": 2, "no_embed_class": True}, {"geometry": "dynabert"}]
)
def test_every_module_hooked(backend, overrides):
    model, x = make(SMALL, backend, **overrides), images(SMALL, 3)
    for heads in (*WIDTHS, torch.tensor([1, 4, 2])):
        expected, seen = model(x, heads=heads), []
        handles = [m.register_forward_hook(lambda module, *_, seen=seen: seen.append(module)) for m in model.modules()]
        close(model(x, heads=heads), expected)
        close(model.forward_head(model.forward_features(x, heads), heads), expected)
        for handle in handles:
            handle.remove()
        never = {name for name, module in model.named_modules() if module not in seen}
        assert never <= {"blocks"}, "the blocks are called one by one"


@both
@at_widths
def test_what_a_hook_returns_counts(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    expected = model(x, heads=heads)
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    model.blocks[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    other = model(x, heads=heads)
    assert not torch.allclose(other, expected)
    small = narrow(make_like(model), heads)
    small.blocks[0].attn.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    small.blocks[1].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    close(other, small(x))


def make_like(model):
    """A model with the same weights and none of its hooks."""
    fresh = hydravit.HydraViT(model.config, backend="reference").eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


@both
@at_widths
def test_attention_rollout_and_grad_cam(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    weights, activations, slopes = [], [], []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(output.detach()))
    model.blocks[-1].norm1.register_forward_hook(lambda module, inputs, output: activations.append(output))
    model.blocks[-1].norm1.register_full_backward_hook(lambda module, before, after: slopes.append(after[0]))
    model(x, heads=heads)[:, 3].sum().backward()
    for found, expected in zip(weights, make_like(model).attention_maps(x, heads), strict=True):
        assert found.shape == (2, heads, 17, 17)
        close(found, expected)
    assert activations[0].shape == slopes[0].shape == (2, 17, 16 * heads) and slopes[0].any()


@both
def test_hooks_in_new_tables(backend):
    """As code does it that removes all hooks of a module, whoever made them."""
    model, x, seen = make(SMALL, backend), images(SMALL), []
    expected, act = model(x), model.blocks[0].mlp.act
    act.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.allclose(model(x), expected)
    act._forward_hooks = type(act._forward_hooks)()
    assert torch.equal(model(x), expected) and all(model.structure().fused.blocks)
    act.register_forward_hook(lambda *_: seen.append(1))
    close(model(x), expected)
    assert seen == [1]


@pytest.mark.needs("native")
def test_packed_inference_and_engines_stand_aside():
    model, x = make(SMALL, "native"), images(SMALL)
    engine = model.engine()
    with torch.no_grad():
        expected = [model(x, heads=2) for _ in range(3)][-1]
        assert model.packed_inference.network is not None
        handle = model.blocks[1].mlp.act.register_forward_hook(lambda module, inputs, output: output * 0)
        assert not torch.allclose(model(x, heads=2), expected)
        for call in (lambda: engine(x, heads=2), model.engine):
            with pytest.raises(ValueError, match=r"^engine: it runs none .* blocks\.1\.mlp\.act has a hook"):
                call()
        handle.remove()
        assert torch.equal(model(x, heads=2), expected) and torch.equal(engine(x, heads=2), expected)


@both
def test_compiled_with_hooks(backend):
    model, x, seen = make(SMALL, backend), images(SMALL), []
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for heads in WIDTHS:
        close(compiled(x, heads=heads), model(x, heads=heads))
    assert seen == [2, 2, 4, 4]


# ---- Wrapped, replaced and patched modules ----


class LoRA(nn.Module):
    """As libraries write it: a wrapper of full size."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(64, 4, bias=False), nn.Linear(4, 192, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LowRank(nn.Module):
    """The same as a parametrization of the weight."""

    def __init__(self, rows, columns):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(rows, 4) * 0.1), nn.Parameter(torch.randn(4, columns) * 0.1)

    def forward(self, weight):
        return weight + self.up @ self.down


@both
def test_lora_by_a_wrapper(backend):
    model, x = make(SMALL, backend), images(SMALL)
    expected = model(x)
    wrapper = model.blocks[0].attn.qkv = LoRA(model.blocks[0].attn.qkv)
    assert not torch.allclose(model(x), expected)
    model(x).square().sum().backward()
    assert wrapper.down.weight.grad.any() and wrapper.up.weight.grad.any() and wrapper.base.weight.grad.any()
    for heads in (2, torch.tensor([4, 2])):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is a LoRA, which knows nothing of widths; param"):
            model(x, heads=heads)
    with torch.no_grad():
        merged = make_like_without(model, wrapper)
        close(model(x), merged(x))


def make_like_without(model, wrapper):
    merged = copy.deepcopy(model)
    merged.blocks[0].attn.qkv = merged.blocks[0].attn.qkv.base
    merged.blocks[0].attn.qkv.weight += wrapper.up.weight @ wrapper.down.weight
    return merged


@both
@at_widths
@pytest.mark.parametrize("in_place", [False, True])
def test_lora_by_parametrization(backend, heads, in_place):
    model, x = make(SMALL, backend), images(SMALL)
    merged = copy.deepcopy(model)
    low_rank = LowRank(192, 64)
    parametrize.register_parametrization(model.blocks[0].attn.qkv, "weight", low_rank)
    with torch.no_grad():
        merged.blocks[0].attn.qkv.weight += low_rank.up @ low_rank.down
        for _ in range(3):
            close(model(x, heads=heads), merged(x, heads=heads))
    held = SliceGradients(model) if in_place else None
    model(x, heads=heads).square().sum().backward()
    expected = gradients(merged, x, heads)
    torch.testing.assert_close(
        low_rank.up.grad, expected["blocks.0.attn.qkv.weight"] @ low_rank.down.detach().T, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        model.blocks[1].mlp.fc1.weight.grad, expected["blocks.1.mlp.fc1.weight"], rtol=1e-3, atol=1e-3
    )
    if held:
        held.close()


@both
@at_widths
def test_a_wrapper_that_hands_the_slice_on(backend, heads):
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x, **slices):
            return 2 * self.base(x, **slices)

    model, x = make(SMALL, backend), images(SMALL)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.blocks[0].mlp.fc1.weight *= 2
        expected.blocks[0].mlp.fc1.bias *= 2
    model.blocks[0].mlp.fc1 = Doubled(model.blocks[0].mlp.fc1)
    close(model(x, heads=heads), expected(x, heads=heads))


@both
@at_widths
def test_another_activation(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    small = narrow(make_like(model), heads)
    for block in (*model.blocks, *small.blocks):
        block.mlp.act = nn.ReLU()
    close(model(x, heads=heads), small(x))
    for block in (*model.blocks, *small.blocks):
        block.mlp.act = nn.GELU("tanh")
    assert not model.structure().fused.blocks[0]
    close(model(x, heads=heads), small(x))
    for block in model.blocks:
        block.mlp.act = nn.GELU()  # computes what ours does
    assert all(model.structure().fused.blocks)


@both
@at_widths
def test_removed_parts(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    small = narrow(make_like(model), heads)
    for each in (model, small):
        each.blocks[0].attn = nn.Identity()
        each.blocks[1].norm2 = nn.Identity()
        each.norm = nn.Identity()
    close(model(x, heads=heads), small(x))
    model.blocks[1], small.blocks[1] = nn.Identity(), nn.Identity()
    close(model(x, heads=heads), small(x))


@both
def test_patched_forwards(backend):
    model, x = make(SMALL, backend), images(SMALL)
    expected, calls, attention = model(x), [], model.blocks[1].attn
    original = attention.forward

    def patched(x):
        calls.append(x.shape)
        return original(x)

    attention.forward = patched
    close(model(x), expected)
    assert len(calls) == 1
    with pytest.raises(ValueError, match=r"blocks\.1\.attn has a patched forward, which knows nothing of widths"):
        model(x, heads=2)
    attention.forward = lambda x, **slices: original(x, **slices) * 0
    assert model(x, heads=2).shape == (2, 10) and not torch.allclose(model(x), expected)
    del attention.forward
    assert torch.equal(model(x), expected)


@both
@at_widths
def test_another_way_through_the_model(backend, heads):
    """``forward`` goes through ``forward_features`` and ``forward_head`` where they are not the model's own."""

    class Scaled(hydravit.HydraViT):
        def forward_features(self, images, heads=None):
            return super().forward_features(images, heads) * 2

    model, x = make(SMALL, backend), images(SMALL)
    scaled = Scaled(model.config, backend=backend).eval()
    scaled.load_state_dict(model.state_dict())
    expected = model.forward_head(model.forward_features(x, heads) * 2, heads)
    with torch.no_grad():
        for _ in range(3):
            close(scaled(x, heads=heads), expected)
    original = model.forward_head
    model.forward_head = lambda *arguments, **keywords: original(*arguments, **keywords) * 0
    assert not model(x, heads=heads).any()


@both
@at_widths
def test_a_block_in_a_wrapper(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    expected = model(x, heads=heads)
    model.blocks[0] = nn.Sequential(model.blocks[0], nn.Identity())
    close(model(x, heads=heads), expected)


def test_a_wrapped_block_where_the_residual_does_not_tell_the_width():
    model, x = make(SMALL, geometry="dynabert"), images(SMALL)
    expected = model(x)
    model.blocks[0] = nn.Sequential(model.blocks[0], nn.Identity())
    close(model(x), expected)
    with pytest.raises(ValueError, match=r"blocks\.0 is a Sequential, which knows nothing of widths"):
        model(x, heads=2)


@both
@at_widths
def test_blocks_run_alone(backend, heads):
    model = make(SMALL, backend, layer_scale=0.5)
    small = narrow(make_like(model), heads)
    tokens = torch.randn(2, 5, 16 * heads)
    close(model.blocks[0](tokens), small.blocks[0](tokens))
    close(model.blocks(tokens), small.blocks(tokens))
    with pytest.raises(ValueError, match="x has 40 channels; the widths of this model have 16, 32, 48, 64"):
        model.blocks[0](torch.randn(2, 5, 40))


# ---- Weights that are computed ----


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)


def spectral(layer):
    nn.utils.parametrizations.spectral_norm(layer)


COMPUTED = {
    "old weight norm": nn.utils.weight_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": spectral,
    "pruning": pruned,
}


@both
@at_widths
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights(backend, heads, how):
    """Right in every call, and in training step after training step."""
    model, x = make(SMALL, backend), images(SMALL)
    for block in model.blocks:
        COMPUTED[how](block.mlp.fc1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        plain = make(SMALL)
        with torch.no_grad():
            logits = model(x, heads=heads)
            for name, parameter in plain.named_parameters():
                owner, _, leaf = name.rpartition(".")
                parameter.copy_(getattr(model.get_submodule(owner), leaf))
        close(logits, plain(x, heads=heads))
        optimizer.zero_grad()
        model(x, heads=heads).square().mean().backward()
        optimizer.step()


class Scaled(nn.Module):
    """An activation with one number per channel, which takes the slice of the call."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels))

    def forward(self, x, s=None):
        scale = self.scale if s is None else self.scale[s.hidden_offset : s.hidden_offset + s.hidden]
        return (scale * x).relu()


@both
@at_widths
@pytest.mark.parametrize("kind", [nn.PReLU, lambda: Scaled(256)], ids=["PReLU", "Scaled"])
def test_activations_with_parameters(backend, heads, kind):
    """One parameter serves all channels; more serve every width if the module takes the slice."""
    model, x = make(SMALL, backend), images(SMALL)
    small = narrow(model, heads)
    model.blocks[0].mlp.act = kind()
    (parameter,) = model.blocks[0].mlp.act.parameters()
    cut = parameter.detach()[: 64 * heads]
    small.blocks[0].mlp.act = nn.PReLU() if len(cut) == 1 else Scaled(len(cut))
    with torch.no_grad():
        next(small.blocks[0].mlp.act.parameters()).copy_(cut)
    close(model(x, heads=heads), small(x))
    model(x, heads=heads).square().sum().backward()
    assert parameter.grad.any()


@both
def test_an_activation_of_full_size_names_the_way_out(backend):
    model, x = make(SMALL, backend), images(SMALL)
    model.blocks[0].mlp.act = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
    model(x)
    with pytest.raises(
        ValueError, match=r"mlp\.act is a Sequential, .* give it one parameter for all channels, or let"
    ):
        model(x, heads=2)


@both
def test_dynamic_quantization_finds_nothing_to_replace(backend):
    model, x = make(SMALL, backend), images(SMALL)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    for heads in WIDTHS:
        close(quantized(x, heads=heads), model(x, heads=heads))


@pytest.mark.needs("native")
def test_a_function_mode_sees_the_modules_under_a_hook_on_all():
    class Seen(TorchFunctionMode):
        def __init__(self):
            self.functions = set()

        def __torch_function__(self, function, types, arguments=(), keywords=None):
            self.functions.add(function)
            return function(*arguments, **(keywords or {}))

    model, x = make(SMALL, "native"), images(SMALL)
    with Seen() as alone:
        model(x, heads=2)
    assert F.linear not in alone.functions
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with Seen() as hooked:
            model(x, heads=2)
    finally:
        handle.remove()
    assert {F.linear, F.layer_norm, F.gelu, torch.Tensor.softmax} <= hooked.functions


# ---- The head ----


@both
@at_widths
def test_head_as_timm_users_assign_it(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    assert isinstance(model.head, nn.Linear) and (model.head.in_features, model.head.out_features) == (64, 10)
    features = model.forward_head(model.forward_features(x, heads), heads, pre_logits=True)
    model.head = nn.Linear(64, 5)
    assert model.num_classes == 5
    with torch.no_grad():
        for _ in range(3):
            logits = model(x, heads=heads)
            close(logits, F.linear(features, model.head.weight[:, : 16 * heads], model.head.bias))
        model.head = nn.Linear(64, 5, bias=False)
        close(model(x, heads=heads), F.linear(features, model.head.weight[:, : 16 * heads]))
        model.head = nn.Identity()
        for _ in range(3):
            close(model(x, heads=heads), features)
    model.head = nn.Sequential(nn.Linear(64, 7), nn.Tanh())
    assert model(x).shape == (2, 7)
    if heads < 4:
        with pytest.raises(ValueError, match="head is a Sequential, which knows nothing of widths"):
            model(x, heads=heads)


@both
def test_copies_of_a_hooked_model(backend):
    model, x, seen = make(SMALL, backend), images(SMALL), []
    model(x)
    model.blocks[0].attn.register_forward_hook(print_nothing)
    expected = model(x, heads=2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.blocks[0].mlp.register_forward_hook(lambda module, *_: seen.append(module))
        close(copied(x, heads=2), expected)
        assert seen.pop() is copied.blocks[0].mlp


def print_nothing(module, inputs, output):
    return None


# ---- Attributes, classes and sizes ----


@both
@at_widths
def test_a_norm_has_its_own_eps(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    small, before = narrow(make_like(model), heads), model(x, heads=heads)
    for each in (model, small):
        each.blocks[0].norm1.eps, each.norm.eps = 5.0, 2.0
    assert not torch.allclose(model(x, heads=heads), before)
    small.blocks[0].norm1.register_forward_hook(print_nothing)  # the modules run by themselves there
    close(model(x, heads=heads), small(x))
    wide = nn.LayerNorm(64, eps=1.0)
    model.blocks[1].norm2, small.blocks[1].norm2 = wide, nn.LayerNorm(16 * heads, eps=1.0)
    close(model(x, heads=heads), small(x))


@both
@at_widths
def test_norms_without_weight_or_bias(backend, heads):
    model, x = make(SMALL, backend), images(SMALL)
    small = narrow(make_like(model), heads)
    for each, channels in ((model, 64), (small, 16 * heads)):
        each.blocks[0].norm1 = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        each.norm = nn.LayerNorm(channels, eps=1e-6, bias=False)
    close(model(x, heads=heads), small(x))


@both
@at_widths
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_blocks_may_change_the_number_of_tokens(backend, heads, pool):
    """As token merging and prompts do: the pooled tokens are the class token, or all after it."""
    model, x = make(SMALL, backend, pool=pool), images(SMALL)
    for change in (lambda block, inputs, y: y[:, :9], lambda block, inputs, y: torch.cat([y, y[:, 3:5]], 1)):
        tokens = change(None, None, model.blocks[0](model._stem(x, model.select(heads, 2), model.structure().fused)))
        tokens = model.blocks[1](tokens)
        pooled = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
        norm = model.get_submodule(model.config.final_norm)
        s = model.subnetwork(heads).head
        expected = model.head(norm(pooled, s=s), columns=((0, 16 * heads),))
        handle = model.blocks[0].register_forward_hook(change)
        close(model(x, heads=heads), expected)
        handle.remove()


@both
@at_widths
def test_patched_classes(backend, heads, monkeypatch):
    model, x = make(SMALL, backend), images(SMALL)
    expected = model(x, heads=heads)
    own = hydravit.layers.Mlp.forward
    monkeypatch.setattr(hydravit.layers.Mlp, "forward", lambda self, x, **slices: 0 * own(self, x, **slices))
    assert not torch.allclose(model(x, heads=heads), expected)
    monkeypatch.undo()
    assert torch.equal(model(x, heads=heads), expected)

    class Logged(hydravit.layers.Attention):
        def __call__(self, *arguments, **keywords):
            calls.append(1)
            return super().__call__(*arguments, **keywords)

    calls = []
    model.blocks[0].attn.__class__ = Logged
    close(model(x, heads=heads), expected)
    assert calls == [1]


class Pruned(hydravit.layers.Block):
    def forward(self, x):
        return x + self.attn(self.norm1(x))


@both
def test_what_serves_no_narrower_width_is_refused_by_name(backend):
    class KeywordLoRA(LoRA):
        def forward(self, x, *arguments, **keywords):
            return self.base(x, *arguments, **keywords) + self.up(self.down(x))

    for change in (
        lambda model: setattr(model.blocks[0].attn, "qkv", KeywordLoRA(model.blocks[0].attn.qkv)),
        lambda model: setattr(model.blocks[0], "__class__", Pruned),
    ):
        model, x = make(SMALL, backend), images(SMALL)
        change(model)
        assert model(x).shape == (2, 10)
        with pytest.raises(ValueError, match=r"only the full width is possible, because blocks\.0"):
            model(x, heads=2)


@both
def test_what_cannot_run_is_refused_by_name(backend):
    for change, message in {
        lambda m: setattr(
            m, "head_drop", nn.Dropout(0.9)
        ): "head_drop is a Dropout, but this model runs no module there",
        lambda m: setattr(m.blocks[0].attn, "q_norm", nn.LayerNorm(16)): r"blocks\.0\.attn\.q_norm is a LayerNorm, but",
        lambda m: setattr(
            m.blocks[1].mlp, "fc1", nn.Linear(64, 512)
        ): r"blocks\.1\.mlp\.fc1\.weight: shape .256, 64. exp",
        lambda m: setattr(m.patch_embed.proj, "padding", (4, 4)): "patch_embed makes 25 patches, the config has 16",
    }.items():
        model, x = make(SMALL, backend), images(SMALL)
        change(model)
        with pytest.raises((ValueError, RuntimeError), match=message):
            model(x)
    model = make(SMALL, backend)
    model.head_drop = nn.Dropout(0.0)
    model(x)
    with pytest.raises(ValueError, match="x has 32 channels, the norm 64: pass the slice"):
        model.norm(torch.randn(2, 32))
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace .* forward_intermediates"):
        torch.fx.symbolic_trace(model)


@both
def test_other_patch_convolutions(backend):
    model, x = make(SMALL, backend), images(SMALL)
    conv = nn.Conv2d(3, 64, 16, 8, padding=4)
    with pytest.raises(RuntimeError, match=r"patch_embed\.proj\.weight: shape .* expected"):
        model.patch_embed.proj = conv
        model(x)
