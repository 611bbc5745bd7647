"""The model at every width against a plain ViT with the sliced weights: logits and every gradient."""

import copy
import pickle
from contextlib import nullcontext

import plain
import pytest
import torch
from small import SMALL, poison

import hydravit
import hydravit_kernels as kernels
from hydravit import geometry
from hydravit.config import CONFIGS, resolve_config

VARIANTS = {
    "plain": {},
    "registers, no_embed_class": {"register_tokens": 3, "no_embed_class": True},
    "registers": {"register_tokens": 2},
    "layer scale": {"layer_scale": 0.3},
    "average pooling": {"pool": "avg"},
    "no class token": {"pool": "avg", "class_token": False},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
    "grey, oblong, odd head": {"in_channels": 1, "image_size": (24, 40), "head_dim": 12, "mlp_ratio": 2.5},
}


def randomise(model):
    """Weights at which every parameter matters: also norms, biases and tokens are far from their initial values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def make(backend, config=SMALL, **kwargs):
    return randomise(hydravit.fused_model(config=config, backend=backend, **kwargs))


def images_for(config, batch=3):
    return torch.randn(batch, config.in_channels, *config.image_size)


def plain_results(model, subnetworks, images):
    """Float64 logits of a plain ViT, one subnetwork per image or one for all, and all full-size gradients."""
    images = images.double()
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    if not isinstance(subnetworks, list):
        logits = plain.forward(weights, model.config, subnetworks, images)
    else:
        rows = [plain.forward(weights, model.config, s, images[i : i + 1]) for i, s in enumerate(subnetworks)]
        logits = torch.cat(rows)
    logits.square().sum().backward()
    zero = {name: torch.zeros_like(w) for name, w in weights.items()}
    return logits.detach(), {name: zero[name] if w.grad is None else w.grad for name, w in weights.items()}


def assert_equal_numbers(actual, exact, name):
    """Within 1e-4 of the float64 result in L2 norm; the blocks one by one are held to the error budget in test_ops."""
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    error = torch.linalg.vector_norm(actual.detach().double() - exact)
    size = torch.linalg.vector_norm(exact)
    assert error <= 1e-4 * size, f"{name}: relative error {error / size:.2e}"


def check(model, heads, subnetwork, images):
    """Logits and all gradients, with NaN in every parameter element outside the slice."""
    exact, gradients = plain_results(model, subnetwork, images)
    poison(model, model.select(heads, len(images)).subnetworks)
    model.zero_grad()
    logits = model(images, heads=heads)
    logits.square().sum().backward()
    assert_equal_numbers(logits, exact, "logits")
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_equal_numbers(gradient, gradients[name], name)
        assert (gradient[parameter.isnan()] == 0).all(), f"{name}: gradient outside the slice"
    with torch.no_grad():
        assert_equal_numbers(model(images, heads=heads), exact, "logits without gradients")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_every_width_is_a_plain_vit(backend, heads, variant):
    config = resolve_config(SMALL, **VARIANTS[variant])
    check(make(backend, config), heads, plain.prefix(config, heads), images_for(config))


@pytest.mark.parametrize("widths", [[1, 4, 2, 4], [3, 3, 3, 3], [4, 1, 1, 2]])
@pytest.mark.parametrize("variant", ["plain", "layer scale", "average pooling"])
def test_one_width_per_image(backend, widths, variant):
    config = resolve_config(SMALL, **VARIANTS[variant])
    model, images = make(backend, config), images_for(config, len(widths))
    check(model, torch.tensor(widths), [plain.prefix(config, k) for k in widths], images)
    mixed = model(images, heads=torch.tensor(widths))
    for i, k in enumerate(widths):
        alone = model(images[i : i + 1], heads=k)[0]
        if backend == "native":
            assert torch.equal(mixed[i], alone)
        else:
            torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-5)


def test_separate_classifiers(backend):
    config = resolve_config(SMALL, separate_classifiers=(1, 2, 4))
    widths = [4, 1, 2]
    subnetworks = [plain.prefix(config, k) for k in widths]
    for k, subnetwork in zip(widths, subnetworks, strict=True):
        start = config.separate_classifiers.index(k) * config.num_classes
        subnetwork.classes = list(range(start, start + config.num_classes))
    images = images_for(config)
    for k, subnetwork in zip(widths, subnetworks, strict=True):
        check(make(backend, config), k, subnetwork, images)
    check(make(backend, config), torch.tensor(widths), subnetworks, images)
    with pytest.raises(ValueError, match="heads=3 has no classifier"):
        make(backend, config)(images, heads=3)


def test_scala_suffix_with_fused_rows(backend):
    """The suffix of every axis; Q, K and V are thirds of the last 3 C rows, so roles mix; constant scale; eps 1e-5."""
    config = SMALL
    for width in (16, 32, 48):
        channels = list(range(config.embed - width, config.embed))
        rows = list(range(3 * config.embed - 3 * width, 3 * config.embed))
        layer = plain.Layer(
            rows[:width], rows[width : 2 * width], rows[2 * width :], channels, config.max_heads, config.head_dim**-0.5,
            list(range(config.hidden - 4 * width, config.hidden)),
        )  # fmt: skip
        subnetwork = plain.Subnetwork(channels, [layer] * config.depth, 1e-5, list(range(config.num_classes)))
        check(make(backend), geometry.scala(config, width, suffix=True), subnetwork, images_for(config))
    with pytest.raises(ValueError, match="divisible"):
        geometry.scala(config, 30, suffix=True)


SIXTEENTHS = {"image_size": 16, "depth": 1, "max_heads": 2, "head_dim": 64, "width_steps": 16, "narrowest": 4}


@pytest.mark.parametrize("method", ["scala", "scala-paper", "scala-per-role"])
@pytest.mark.parametrize("width", [4, 5, 7, 11, 13, 16])  # heads of 16, 20, 28, 44, 52 and 64 channels
def test_scala_by_its_width(backend, method, width):
    config = resolve_config(SMALL, **SIXTEENTHS, geometry=method)
    form = {"paper": method == "scala-paper", "per_role": method == "scala-per-role"}
    check(make(backend, config), width, plain.scala(config, width / 16, 4 / 16, **form), images_for(config))


def test_scala_with_one_width_per_image(backend):
    config = resolve_config(SMALL, **SIXTEENTHS, geometry="scala")
    widths = [16, 4, 13, 5]
    subnetworks = [plain.scala(config, width / 16, 4 / 16) for width in widths]
    check(make(backend, config), torch.tensor(widths), subnetworks, images_for(config, 4))


@pytest.mark.parametrize("method", ["scala", "scala-paper", "scala-per-role"])
def test_only_widths_that_together_exceed_the_full_one_share_weights_with_scalas_narrowest(method):
    """Isolated Activation: others read nothing that the narrowest reads, but the bias of the classifier."""
    config = resolve_config(SMALL, **SIXTEENTHS, geometry=method)
    model, images = make("reference", config), images_for(config)
    read = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    slices = geometry.parameter_slices(config, model.subnetwork(4))
    for name in read:
        inside = [torch.cat([torch.arange(start, start + length) for start, length in axis]) for axis in slices[name]]
        read[name][torch.meshgrid(*inside, indexing="ij")] = True
    for width in range(5, 17):
        model.zero_grad()
        model(images, heads=width).square().sum().backward()
        shared = {name for name, p in model.named_parameters() if (p.grad[read[name]] != 0).any()}
        if width <= 12:
            assert shared == {"head.bias"}, width
        else:
            assert {"blocks.0.mlp.fc1.weight", "blocks.0.attn.proj.weight", "norm.weight"} <= shared, width


def test_skd_widths_per_layer(backend):
    """A prefix inside every head, its own width in every layer, skipped branches; the stream is whole."""
    config = resolve_config(SMALL, depth=4)
    table = [(8, 96), (0, 40), (16, 0), (6, 256)]
    check(make(backend, config), geometry.skd(config, table), plain.skd(config, table), images_for(config))


def test_skd_by_its_cuts(backend):
    """The full width has no cut, the next has the first, and width 1 all of them."""
    cuts = ((1, "mlp", 96), (0, "attn", 8), (1, "mlp", 0), (0, "attn", 0))
    lengths = [[(16, 256)] * 2, [(16, 256), (16, 96)], [(8, 256), (16, 96)], [(8, 256), (16, 0)], [(0, 256), (16, 0)]]
    config = resolve_config(SMALL, geometry="skd", cuts=cuts)
    subnetworks = {5 - i: plain.skd(config, each) for i, each in enumerate(lengths)}
    for width, subnetwork in subnetworks.items():
        check(make(backend, config), width, subnetwork, images_for(config))
    check(make(backend, config), torch.tensor([5, 1, 3]), [subnetworks[w] for w in (5, 1, 3)], images_for(config))


@pytest.mark.parametrize("heads", [1, 3])
def test_other_nestings(backend, heads):
    config, full = SMALL, list(range(SMALL.embed))
    hidden = list(range(config.hidden_of(heads)))

    def subnetwork(embed, width, count, hidden):
        roles = [list(range(role * len(full), role * len(full) + width)) for role in range(3)]
        layer = plain.Layer(*roles, list(range(width)), count, config.head_dim**-0.5, hidden)
        return plain.Subnetwork(embed, [layer] * config.depth, config.norm_eps, list(range(config.num_classes)))

    width = heads * config.head_dim
    expected = {
        "dynabert": subnetwork(full, width, heads, hidden),
        "matformer": subnetwork(full, len(full), config.max_heads, hidden),
        "sortednet": subnetwork(list(range(width)), width, config.max_heads, hidden),
    }
    for name, plain_subnetwork in expected.items():
        nested = resolve_config(config, geometry=name)
        check(make(backend, nested), heads, plain_subnetwork, images_for(config))


def test_arbitrary_offsets(backend):
    """Every interval somewhere in the middle, value heads narrower than query heads, a pitch wider than both."""
    config = SMALL
    attention = kernels.AttentionSlice(5, 37, 7, 80, 131, 3, 3, 11, 9, 13, 0.21)
    mlp = kernels.MlpSlice(5, 37, 19, 101)
    head = kernels.HeadSlice(5, 37, 2, 7)
    embed = list(range(5, 42))

    def heads_of(start, length):
        return [start + h * 13 + j for h in range(3) for j in range(length)]

    layer = plain.Layer(
        heads_of(7, 11), heads_of(80, 11), heads_of(131, 9), heads_of(3, 9), 3, 0.21, list(range(19, 120))
    )
    subnetwork = plain.Subnetwork(embed, [layer] * 2, 1e-3, list(range(2, 9)))
    any_subnetwork = kernels.Subnetwork(3, kernels.EmbedSlice(5, 37), (attention,) * 2, (mlp,) * 2, head, 1e-3)
    check(make(backend), any_subnetwork, subnetwork, images_for(config))


def test_width_by_attribute_and_argument(backend):
    model, images = make(backend), images_for(SMALL)
    assert model.heads == 4
    wide = model(images)
    model.heads = 2
    assert model.heads == 2
    assert torch.equal(model(images), model(images, heads=2))
    assert torch.equal(model(images, heads=4), wide)
    assert model.heads == 2


def test_features_and_head_compose(backend):
    for variant in ("plain", "average pooling"):
        model = make(backend, resolve_config(SMALL, **VARIANTS[variant]))
        images = images_for(SMALL)
        for heads in (2, torch.tensor([1, 3, 2])):
            features = model.forward_features(images, heads)
            assert features.shape == (3, 17, 32 if isinstance(heads, int) else 48)
            logits = model.forward_head(features, heads)
            torch.testing.assert_close(logits, model(images, heads=heads), rtol=1e-4, atol=1e-5)
            assert model.forward_head(features, heads, pre_logits=True).shape == (3, features.shape[-1])


@pytest.mark.parametrize("variant", ["plain", "registers", "average pooling"])
@pytest.mark.parametrize("heads", [2, torch.tensor([4, 1, 2])], ids=["2", "mixed"])
def test_last_mlp_runs_for_the_class_token_alone_unless_somebody_looks(backend, variant, heads, monkeypatch):
    model = make(backend, resolve_config(SMALL, **VARIANTS[variant])).train()
    images, tokens = images_for(SMALL), model.config.tokens
    seen, mlp_block = [], kernels.mlp_block

    def spy(x, *arguments, **how):
        seen.append(x.shape[1])
        return mlp_block(x, *arguments, **how)

    monkeypatch.setattr(kernels, "mlp_block", spy)

    def step():
        model.zero_grad()
        logits = model(images, heads=heads)
        logits.square().sum().backward()
        return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    logits, gradients = step()
    assert seen == [tokens, tokens if variant == "average pooling" else 1]
    outputs = []
    hook = model.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output.shape[1]))
    watched_logits, watched_gradients = step()
    hook.remove()
    assert seen[2:] == [tokens, tokens] and outputs == [tokens]
    assert_equal_numbers(logits, watched_logits.double(), "logits")
    for name, gradient in gradients.items():
        assert_equal_numbers(gradient, watched_gradients[name].double(), name)
    model.forward_features(images, heads=heads)
    assert seen[4:] == [tokens, tokens]


def test_reset_classifier(backend):
    model, images = make(backend), images_for(SMALL)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(images, heads=2).shape == (3, 7)
    model.reset_classifier(0)
    assert model(images, heads=2).shape == (3, 32)
    assert model.get_classifier() is model.head


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_maps(backend, variant):
    config = resolve_config(SMALL, depth=3, **VARIANTS[variant])
    model, images = make(backend, config), images_for(config)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    for heads in (1, 3):
        expected = []
        plain.forward(weights, config, plain.prefix(config, heads), images.double(), expected)
        maps = model.attention_maps(images, heads=heads)
        assert len(maps) == len(expected) == config.depth
        for actual, exact in zip(maps, expected, strict=True):
            assert actual.shape == (3, heads, config.tokens, config.tokens)
            torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5)
    skipped = model.attention_maps(images, geometry.skd(config, [(4, 8), (0, 8), (4, 0)]))
    assert [m is None for m in skipped] == [False, True, False]


@pytest.mark.parametrize("branch", ["attn.proj", "mlp.fc2"])
def test_drop_path_keeps_the_mean(backend, branch):
    """In training a branch of an image is dropped or scaled by 1 / keep, forward and backward; in evaluation neither.

    The last of two layers has the largest rate, the first has none; one of the last layer's branches is skipped.
    """
    config, keep, count = resolve_config(SMALL, drop_path=0.25, pool="avg"), 0.75, 64
    model, images = make(backend, config).eval(), images_for(SMALL, 1).expand(count, -1, -1, -1).contiguous()
    first, last = (16, 256), (16, 0) if branch == "attn.proj" else (0, 256)
    with torch.no_grad():
        x = model.forward_features(images, geometry.skd(config, [first, (0, 0)]))
        y = model.forward_features(images, geometry.skd(config, [first, last])) - x
    assert (x[0] == x).all() and (y[0] == y).all() and y.square().mean() > 0.01
    model.train()
    features = model.forward_features(images, geometry.skd(config, [first, last]))
    part = ((features.detach() - x) * y).sum((1, 2)) / y.square().sum((1, 2))  # how often the branch was added
    kept = part > 0.5
    assert 0.75 - 0.22 < kept.float().mean() < 0.75 + 0.22  # four standard errors
    torch.testing.assert_close(features.detach(), x + y * (kept / keep)[:, None, None], rtol=1e-4, atol=1e-4)
    features.sum().backward()
    gradient = model.get_parameter(f"blocks.1.{branch}.bias").grad
    expected = torch.full_like(gradient, config.tokens * kept.sum() / keep)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_drop_path_draws_for_every_branch_and_grows_over_the_layers(backend):
    config = resolve_config(SMALL, depth=3, drop_path=0.5)
    model, images = make(backend, config).train(), images_for(SMALL, 1).expand(64, -1, -1, -1)
    for table, outcomes in (
        ([(16, 256), (0, 0), (0, 0)], 1),  # the first layer drops nothing
        ([(0, 0), (16, 256), (0, 0)], 4),
        ([(0, 0), (0, 0), (16, 256)], 4),
    ):
        with torch.no_grad():
            logits = model(images, geometry.skd(config, table))
        assert len(torch.unique(logits.round(decimals=3), dim=0)) == outcomes


def test_initial_values():
    """As in timm: deviation 0.02 of weights and positions, tokens near zero, biases zero, norms the identity."""
    config = resolve_config(SMALL, max_heads=8, register_tokens=8, layer_scale=0.1, num_classes=100)
    for name, parameter in hydravit.fused_model(config=config, backend="reference").named_parameters():
        values = parameter.detach()
        if name.startswith("patch_embed"):  # torch's own, as in timm
            continue
        if name in ("cls_token", "reg_token"):
            assert 0 < values.abs().max() < 1e-5, name
        elif name == "pos_embed" or values.dim() > 1:
            assert abs(values.mean()) < 1e-3 and 0.019 < values.std() < 0.021, name
        else:
            expected = 0.1 if name.endswith("gamma") else 1.0 if name.endswith("weight") else 0.0
            assert (values == expected).all(), name


def test_frozen_parameters_get_no_gradient(backend):
    model, images = make(backend), images_for(SMALL)
    reference = make(backend)
    reference.load_state_dict(model.state_dict())
    reference(images, heads=3).square().sum().backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc1" in name or "norm2" in name)
    model(images, heads=3).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)
        else:
            assert parameter.grad is None, name


def test_gradient_of_the_images(backend):
    model, images = make(backend), images_for(SMALL)
    images.requires_grad_()
    model(images, heads=2).square().sum().backward()
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    exact = images.detach().double().requires_grad_()
    plain.forward(weights, SMALL, plain.prefix(SMALL, 2), exact).square().sum().backward()
    torch.testing.assert_close(images.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_autograd_grad_and_accumulation(backend):
    model, images = make(backend), images_for(SMALL)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(model(images, heads=2).square().sum(), parameters)
    assert all(p.grad is None for p in parameters)
    for _ in range(2):
        model(images, heads=2).square().sum().backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles_share_no_state(backend):
    """Neither weights nor caches nor gradient buffers: a copy that gets other classes leaves the original as it was."""
    model, images = make(backend), images_for(SMALL)
    model.heads = 3
    narrow, expected = geometry.hydravit(SMALL, 2), [model(images, heads=heads) for heads in (None, 2)]
    model.slice_gradients = "buffers of this model's parameters"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.heads == 3 and other.backend == backend and other.slice_gradients is None
        assert torch.equal(other(images), expected[0])
        assert other._subnetworks is not model._subnetworks
        caches = [name for name, value in vars(model).items() if isinstance(value, (dict, set, list))]
        assert not [name for name in caches if vars(other)[name] is vars(model)[name]]
        with torch.no_grad():
            other.head.bias.add_(1.0)
        other.reset_classifier(3)
        assert other(images, heads=2).shape == (3, 3)
        assert other.subnetwork(2).head.classes == 3 and model.subnetwork(2).head.classes == 10
    model.slice_gradients = None
    assert torch.equal(model(images), expected[0])
    assert all(torch.equal(model(images, heads=heads), expected[1]) for heads in (2, narrow))


def test_autocast(backend):
    model, images = make(backend), images_for(SMALL)
    exact = model(images, heads=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images, heads=3)
        logits.float().square().sum().backward()
        also = model(images.bfloat16(), heads=3)
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.2)
    assert torch.isfinite(also).all()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_moving_chooses_the_backend_again(backend):
    model = make("auto")
    assert model.backend == kernels.select("auto")
    with pytest.warns(UserWarning) if model.backend == "native" else nullcontext():
        kernels.backends._fallbacks_told.clear()
        assert model.to(torch.bfloat16).backend == "reference"
    assert model.to(torch.float32).backend == kernels.select("auto")
    if backend == "native":
        with pytest.raises(RuntimeError, match="backend 'native'.*float32"):
            make("native").to(torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize("heads", range(1, 13))
def test_vit_base_at_every_width(heads):
    """The real shapes: 12 layers, 197 tokens, 12 heads of 64 channels; the backend that users get."""
    config = CONFIGS["base"]
    check(make("auto", config), heads, plain.prefix(config, heads), images_for(config, 1))


@pytest.mark.long
def test_vit_base_with_six_widths_in_a_batch(backend):
    config = CONFIGS["base"]
    model, widths, images = make(backend, config).eval(), [1, 3, 12, 6, 3, 9], images_for(config, 6)
    with torch.no_grad():
        mixed = model(images, heads=torch.tensor(widths))
        alone = torch.cat([model(image[None], heads=k) for image, k in zip(images, widths, strict=True)])
    torch.testing.assert_close(mixed, alone, rtol=0, atol=0 if backend == "native" else 1e-4)
