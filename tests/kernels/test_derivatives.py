"""Derivatives beyond one backward pass: higher orders, forward mode, transforms, and saved tensors that are moved."""

import copy
import gc

import pytest
import small
import torch
import torch.autograd.forward_ad as forward_ad
from cases import OPS, Case
from packing import is_packed, warm
from torch.utils.checkpoint import checkpoint

import hydravit_kernels as kernels
from hydravit.training import SliceGradients
from hydravit_kernels import functional, reference
from hydravit_kernels.subnetwork import AttentionSlice

WIDTHS = [1, 3, torch.tensor([4, 2])]
native = pytest.mark.needs("native")


@pytest.fixture(params=[pytest.param("native", marks=native), "reference"])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def one(one_thread):
    pass


def pair(backend, **overrides):
    """A model on a backend, and the same in float64 on the reference, whose derivatives are autograd's own."""
    model = small.make(backend=backend, **overrides)
    exact = copy.deepcopy(small.make(backend="reference", **overrides)).double()
    exact.load_state_dict(model.state_dict())
    return model, exact


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * scale + 1e-9)


def both(models, function):
    """``function(model, images)`` on the model and on its exact twin must agree; it returns a list of tensors."""
    images = small.images(models[0].config)
    ours, theirs = (function(m, images.to(m.pos_embed.dtype).clone()) for m in models)
    assert len(ours) and all(torch.isfinite(value).all() for value in ours)
    assert any(value.any() for value in ours)
    assert_close(ours, theirs)


# ---- Higher orders ----


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_penalty_reaches_every_weight(backend, heads, training):
    def penalty(model, images):
        model.train(training)
        images.requires_grad_()
        logits = model(images, heads=heads)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), images, create_graph=True)
        (logits.square().mean() + gradient.square().sum()).backward()
        return [images.grad, *(p.grad for p in model.parameters())]

    both(pair(backend, layer_scale=0.5, register_tokens=1), penalty)


@pytest.mark.needs("backend triton")
def test_a_gradient_penalty_on_triton():
    test_a_gradient_penalty_reaches_every_weight("triton", 2, False)


def test_a_penalty_on_the_gradients_of_the_weights(backend):
    """The second backward goes through the gradients of all parameters, as in meta-learning."""

    def penalty(model, images):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(images, heads=3).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)

    both(pair(backend, pool="avg"), penalty)


@pytest.mark.parametrize("heads", [2, 4])
def test_third_order(backend, heads):
    def third(model, images):
        images.requires_grad_()
        value = model(images, heads=heads).logsumexp(1).sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, images, create_graph=True)
            value = gradient.pow(3).sum()
        value.backward()
        return [images.grad, model.pos_embed.grad, model.blocks[1].mlp.fc1.weight.grad]

    both(pair(backend), third)


def test_a_penalty_with_frozen_weights(backend):
    """Only what is wanted has a gradient: the images and one matrix."""

    def penalty(model, images):
        model.requires_grad_(False)
        model.blocks[0].attn.proj.weight.requires_grad_()
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(model(images, heads=2).square().sum(), images, create_graph=True)
        gradient.square().sum().backward()
        wanted = model.blocks[0].attn.proj.weight
        assert all(p.grad is None for p in model.parameters() if p is not wanted)
        return [images.grad, wanted.grad]

    both(pair(backend), penalty)


def test_a_penalty_through_a_block_that_is_used_twice(backend):
    def penalty(model, images):
        model.blocks[1] = model.blocks[0]
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(model(images, heads=3).square().sum(), parameters, create_graph=True)
        return [*gradients, *torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)]

    both(pair(backend), penalty)


@native
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", range(6))
def test_ops_of_any_slices(name, seed):
    """Random slices with NaN around them, widths per image, drop-path factors, absent parameters; native and exact."""
    torch.manual_seed(seed)
    block = OPS[name](Case(seed, tokens=6))

    def second(call):
        inputs = [None if t is None else t.detach().requires_grad_() for t in (block.x, *block.parameters)]
        leaves = [t for t in inputs if t is not None]
        y = call(inputs[0], inputs[1:])
        weights = torch.linspace(-1, 1, y.numel()).view_as(y).requires_grad_()
        first = torch.autograd.grad(y, leaves, weights, create_graph=True, materialize_grads=True)
        total = sum((g * g).sum() for g in first)
        return [*first, *torch.autograd.grad(total, [weights, *leaves], materialize_grads=True)]

    ours = second(lambda x, p: functional._run(name, "native", x, p, block.constants, None))
    for a, b in zip(ours, second(block.reference), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4 * b.abs().max().item() + 1e-6)


def test_a_skipped_branch_has_gradients_of_zero(backend):
    s = AttentionSlice(0, 8, 0, 8, 16, 0, 0, 4, 4, 4, 0.5)
    parameters = kernels.AttentionParameters(*(torch.randn(n) for n in (8, 8)), torch.randn(24, 8), None,
                                             torch.randn(8, 8), None, None)  # fmt: skip
    leaves = [p.requires_grad_() for p in parameters if p is not None]
    y = kernels.attention_block(torch.randn(2, 3, 8), parameters, None, [s], 1e-6, backend=backend)
    if y.requires_grad:
        gradients = torch.autograd.grad(y.sum(), leaves, create_graph=True)
        assert all(g.shape == p.shape and not g.any() for g, p in zip(gradients, leaves, strict=True))


def test_drop_path_factors_may_have_a_gradient(backend):
    model, exact = pair(backend)

    def gradient(model):
        x = torch.linspace(-1, 1, 2 * 3 * 32, dtype=model.pos_embed.dtype).view(2, 3, 32)
        factors = torch.tensor([0.5, 2.0], dtype=x.dtype, requires_grad=True)
        s = model.subnetwork(2)
        y = kernels.mlp_block(x, model.blocks[0].mlp_parameters(), factors, [s.mlp[0]], s.eps, backend=model.backend)
        return torch.autograd.grad(y.square().sum(), factors)

    assert_close(gradient(model), gradient(exact))


@pytest.mark.parametrize("backend", ["native"])
@native
def test_gradients_in_place_refuse_a_second_order(backend):
    model = small.make(backend=backend).train()
    gradients = SliceGradients(model)
    images = small.images(model.config).requires_grad_()
    for heads in (1, 3):
        with pytest.raises(RuntimeError, match="close SliceGradients"):
            torch.autograd.grad(model(images, heads=heads).sum(), images, create_graph=True)
        with pytest.raises(RuntimeError, match="close SliceGradients"):
            torch.autograd.grad(model(images, heads=heads), images, torch.ones(3, 2, 10), is_grads_batched=True)
        assert not any(p.grad.any() for p in model.parameters())
    gradients.close()
    (gradient,) = torch.autograd.grad(model(images, heads=3).square().sum(), images, create_graph=True)
    assert gradient.requires_grad


def test_mixed_precision_has_a_second_order():
    """Under autocast the activations of triton are narrower than the parameters, also in a later backward pass."""
    model = small.make(backend="reference")
    s = model.subnetwork(2)
    p = model.blocks[0].mlp_parameters()
    x = torch.randn(2, 3, 32).half().requires_grad_()

    class Context:
        op_name, constants = "mlp_block", (None, list(s.mlp[0]), s.eps, None)

    wanted = [True, *(t is not None for t in p)]
    gradients = functional._gradients_by_formulas(Context, torch.ones(2, 3, 32).half(), (x, *p), wanted)
    exact = x.detach().float().requires_grad_()
    y = reference.mlp_block(exact, p, None, [s.mlp[0]], s.eps)
    expected = torch.autograd.grad(y.sum(), [exact, *(t for t in p if t is not None)])
    gradients = [g for g in gradients if g is not None]
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


# ---- torch.func, torch.autograd.functional and forward mode ----


def values(*results):
    return [leaf.detach() for result in results for leaf in torch.utils._pytree.tree_leaves(result)]


def per_sample(model, images, heads):
    """Gradients of the weights for every image by itself."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],), {"heads": heads}).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)


def ensemble(model, images, heads):
    """Several models as one, their weights stacked."""
    models = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        models[1].pos_embed.mul_(2)
    weights, buffers = torch.func.stack_module_state(models)
    return torch.func.vmap(lambda w, b: torch.func.functional_call(model, (w, b), (images,), {"heads": heads}))(
        weights, buffers
    )


def along(function):
    """A function of two numbers, which move the images: its Hessian is small."""
    return lambda model, images, heads: function(
        lambda t: model(images * (1 + t[0]) + t[1], heads=heads).logsumexp(1).sum(),
        torch.zeros(2, dtype=images.dtype),
    )


def of_images(function):
    return lambda model, images, heads: function(lambda x: model(x, heads=heads), images)


TRANSFORMS = {
    "grad": lambda m, x, k: torch.func.grad(lambda x: m(x, heads=k).square().sum())(x),
    "grad_and_value": lambda m, x, k: torch.func.grad_and_value(lambda x: m(x, heads=k).square().sum())(x),
    "vjp": lambda m, x, k: torch.func.vjp(lambda x: m(x, heads=k), x)[1](torch.ones(2, 10, dtype=x.dtype)),
    "jvp": lambda m, x, k: torch.func.jvp(lambda x: m(x, heads=k), (x,), (x.cos(),)),
    "vmap": lambda m, x, k: torch.func.vmap(lambda x: m(x.expand(2, -1, -1, -1), heads=k))(x),
    "jacrev": of_images(lambda f, x: torch.func.jacrev(f)(x)),
    "jacfwd": along(lambda f, t: torch.func.jacfwd(f)(t)),
    "hessian": along(lambda f, t: torch.func.hessian(f)(t)),
    "hessian of jacrev": along(lambda f, t: torch.func.jacrev(torch.func.jacrev(f))(t)),
    "gradients per sample": lambda m, x, k: per_sample(m, x, k if isinstance(k, int) else k[:1]),
    "ensemble": ensemble,
    "functional.jacobian": of_images(lambda f, x: torch.autograd.functional.jacobian(f, x)),
    "functional.jacobian, vectorised": of_images(lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True)),
    "functional.jacobian, forward": along(
        lambda f, t: torch.autograd.functional.jacobian(f, t, vectorize=True, strategy="forward-mode")
    ),
    "functional.hessian": along(lambda f, t: torch.autograd.functional.hessian(f, t)),
    "functional.hvp": along(lambda f, t: torch.autograd.functional.hvp(f, t, torch.ones_like(t))),
    "functional.vhp": along(lambda f, t: torch.autograd.functional.vhp(f, t, torch.ones_like(t))),
    "functional.jvp": of_images(lambda f, x: torch.autograd.functional.jvp(f, x, x.cos())),
    "functional.vjp": of_images(lambda f, x: torch.autograd.functional.vjp(f, x, torch.ones(2, 10, dtype=x.dtype))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_transforms(backend, name, frozen):
    """Each gives the right value, whether the weights are packed or not, and with trainable weights or frozen ones."""
    model, exact = pair(backend)
    for each in (model, exact):
        each.requires_grad_(not frozen)
    if backend == "native":
        warm(model, small.images(model.config), heads=2)
    for heads in WIDTHS[1:]:
        both((model, exact), lambda m, x, k=heads: values(TRANSFORMS[name](m, x, k)))


def test_linearize(backend):
    """It traces the forward, which takes long."""

    def derivative(model, images):
        return [torch.func.linearize(lambda x: model(x, heads=2), images)[1](images.cos()).detach()]

    both(pair(backend, depth=1, max_heads=2), derivative)


@pytest.mark.parametrize("name", ["jvp", "vmap", "ensemble"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_transforms_without_gradients(backend, name, guard):
    model, exact = pair(backend)
    with guard():
        for heads in WIDTHS:
            both((model, exact), lambda m, x, k=heads: values(TRANSFORMS[name](m, x, k)))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_tangents_of_images(backend, grad, trainable):
    """They once vanished without a word wherever no gradient was wanted, packed or not."""

    def tangent(model, images):
        model.requires_grad_(trainable)
        results = []
        with torch.set_grad_enabled(grad):
            for heads in WIDTHS:
                model(images)  # packs the weights
                with forward_ad.dual_level():
                    dual = forward_ad.make_dual(images, images.cos())
                    results.append(forward_ad.unpack_dual(model(dual, heads=heads)).tangent.detach())
                    tokens = model.forward_features(dual, heads=heads)
                    results.append(forward_ad.unpack_dual(tokens).tangent.detach())
                    assert forward_ad.unpack_dual(model(images, heads=heads)).tangent is None
        return results

    both(pair(backend), tangent)


def test_tangents_of_weights(backend):
    def tangent(model, images):
        results = []
        for name in ("pos_embed", "blocks.1.attn.qkv.bias", "head.weight"):
            with forward_ad.dual_level(), torch.no_grad():
                weight = model.get_parameter(name)
                dual = {name: forward_ad.make_dual(weight.detach(), torch.ones_like(weight))}
                logits = torch.func.functional_call(model, dual, (images,), {"heads": 3})
                results.append(forward_ad.unpack_dual(logits).tangent)
        return results

    both(pair(backend), tangent)


@native
def test_engines_refuse_what_they_would_drop():
    model = small.make(backend="native")
    engine, images = model.engine(), small.images(model.config)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.vmap(lambda x: engine(x[None], heads=2))(images)
    with pytest.raises(RuntimeError, match='backend="reference"'), forward_ad.dual_level():
        engine(forward_ad.make_dual(images, images), heads=3)
    engine(images, heads=3)


@native
def test_transforms_neither_drop_nor_feed_the_packed_copy():
    model = small.make(backend="native")
    images = small.images(model.config)
    warm(model, images, heads=3)
    network = model.packed_inference.network
    torch.func.vmap(lambda x: model(x[None], heads=3))(images)
    torch.func.jvp(lambda x: model(x, heads=3), (images,), (images,))
    assert model.packed_inference.network is network and is_packed(model)


def test_gradcheck_of_a_model_in_float64():
    model = small.make(backend="reference", image_size=8, depth=1, max_heads=2, head_dim=4, num_classes=3).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for heads in (1, 2):
        call = lambda x, k=heads: model(x, heads=k)  # noqa: E731
        assert torch.autograd.gradcheck(call, images, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, images, fast_mode=True)


def test_other_dtypes_are_refused_by_name():
    with pytest.raises(RuntimeError, match="native.*float32"):
        kernels.select("native", "cpu", torch.float64)


# ---- Under torch.compile: right, or an error ----


@native
def test_a_compiled_model_refuses_a_second_order():
    model = small.make(backend="native")
    torch._dynamo.reset()
    compiled, images = torch.compile(model, backend="aot_eager"), small.images(model.config).requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(images, heads=2).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


COMPILED = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap": lambda f, x: torch.func.vmap(lambda x: f(x.expand(2, -1, -1, -1)))(x),
}


@pytest.fixture
def clean_ending():
    """Collects what a failed compilation leaves behind: of a jvp (torch 2.13) it changes the dispatch keys as it goes.

    Without this, some later test would compute no gradients, from the next collection on.
    """
    yield
    with torch._C._PreserveDispatchKeyGuard():
        gc.collect()


@native
@pytest.mark.usefixtures("clean_ending")
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("inside", [False, True])
def test_transforms_and_compile(name, inside):
    """Dynamo itself fails at a few (an error), but no value is wrong."""
    model, exact = pair("native")
    images = small.images(model.config)
    torch._dynamo.reset()
    if inside:
        run = torch.compile(lambda x: COMPILED[name](lambda x: model(x, heads=3), x), backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
        run = lambda x: COMPILED[name](lambda x: compiled(x, heads=3), x)  # noqa: E731
    try:
        ours = run(images)
    except RuntimeError as error:
        assert "fake tensor" in str(error) or "does not support" in str(error)
        return
    assert_close(values(ours), values(COMPILED[name](lambda x: exact(x, heads=3), images.double())))


@native
def test_tangents_and_compile():
    model, exact = pair("native")
    images = small.images(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")

    def tangent(call, images):
        with forward_ad.dual_level(), torch.no_grad():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(images, images.cos()), heads=3)).tangent

    with torch.no_grad():
        torch.testing.assert_close(compiled(images, heads=3), model(images, heads=3))
        assert_close([tangent(compiled, images)], [tangent(exact, images.double())])
        torch.testing.assert_close(compiled(images, heads=3), model(images, heads=3))


# ---- Saved tensors: recomputed, moved, used twice ----


def assert_same(backend, a, b):
    """``native`` repeats its bits; torch's kernels do not where addresses are aligned otherwise."""
    if backend == "native":
        assert torch.equal(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, heads, reentrant):
    model = small.make(backend=backend).train()
    images = small.images(model.config).requires_grad_()
    parameters = [images, *model.parameters()]
    expected = torch.autograd.grad(model(images, heads=heads).square().sum(), parameters)
    logits = checkpoint(lambda x: model(x, heads=heads), images, use_reentrant=reentrant)
    logits.square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_same(backend, parameter.grad, gradient)


def test_checkpointing_with_gradients_in_place(backend):
    model = small.make(backend=backend).train()
    images = small.images(model.config)
    model(images, heads=3).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    SliceGradients(model)
    checkpoint(lambda x: model(x, heads=3), images, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_checkpointing_and_a_second_order(backend):
    def penalty(model, images):
        images.requires_grad_()
        logits = checkpoint(lambda x: model(x, heads=3), images, use_reentrant=False)
        (gradient,) = torch.autograd.grad(logits.square().sum(), images, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(model.parameters()), materialize_grads=True)

    both(pair(backend), penalty)


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
def test_saved_tensors_may_be_moved(backend, heads):
    model = small.make(backend=backend)
    images = small.images(model.config).requires_grad_()
    parameters = [images, *model.parameters()]
    expected = torch.autograd.grad(model(images, heads=heads).square().sum(), parameters)
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.shape) or t.detach().numpy().copy(), lambda array: torch.from_numpy(array.copy())
    )
    for context in (torch.autograd.graph.save_on_cpu(), hooks):
        with context:
            loss = model(images, heads=heads).square().sum()
        for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
            assert_same(backend, ours, theirs)
    assert packed


@pytest.mark.parametrize("heads", WIDTHS, ids=str)
def test_a_graph_can_be_used_twice(backend, heads):
    model = small.make(backend=backend)
    images = small.images(model.config).requires_grad_()
    parameters = [images, *model.parameters()]
    loss = model(images, heads=heads).square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters, retain_graph=True)
    both_orders = torch.autograd.grad(loss, parameters, create_graph=True)
    for a, b, c in zip(first, second, both_orders, strict=True):
        assert_same(backend, a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4 * a.abs().max().item() + 1e-7)
    torch.autograd.grad(loss, parameters)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, parameters)
