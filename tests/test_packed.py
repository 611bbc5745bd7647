"""Inference through one packed copy of the weights: the bits of the blocks, and never weights of another moment."""

import copy
import math
import pickle
import sys
import threading

import pytest
import torch
from blocks import hydravit
from small import SMALL, images, poison, shake
from torch import nn

import hydravit_kernels as kernels
from hydravit import HydraViT, HydraViTConfig, geometry, inference, layers
from hydravit.config import resolve_config
from hydravit.geometry import GEOMETRIES
from hydravit_kernels.packed import PANEL
from hydravit_kernels.parameters import NetworkSizes

pytestmark = [
    pytest.mark.needs("native"),
    pytest.mark.usefixtures("one_thread"),
]

# Every width begins on a panel; embed is none that the products' tiles divide.
WIDE = HydraViTConfig(image_size=(24, 32), patch_size=8, depth=3, max_heads=4, head_dim=24, num_classes=32)
VARIANTS = {
    "plain": {},
    "registers, no_embed_class": {"register_tokens": 3, "no_embed_class": True},
    "average pooling": {"pool": "avg", "register_tokens": 2},
    "no class token": {"pool": "avg", "class_token": False},
    "one token": {"pool": "avg", "class_token": False, "image_size": 8},
    "layer scale": {"layer_scale": 0.3},
    "no qkv bias": {"qkv_bias": False},
    "no classifier": {"num_classes": 0},
    "separate classifiers": {"separate_classifiers": (1, 2, 4)},
    "grey, odd sizes": {"in_channels": 1, "image_size": (15, 35), "patch_size": 5, "mlp_ratio": 2.625},
    "one layer": {"depth": 1},
    "many tokens": {"image_size": (96, 88), "depth": 2},
    **{name: {"geometry": name} for name in GEOMETRIES if name != "hydravit"},
}


def make(config=WIDE, **overrides):
    return shake(HydraViT(resolve_config(config, **overrides), backend="native").eval())


def block_by_block(model, *arguments, **options):
    kept, model.packed_inference = model.packed_inference, None
    try:
        return model(*arguments, **options)
    finally:
        model.packed_inference = kept


def is_packed(model):
    """Whether there is a packed copy now."""
    return model.packed_inference._packed is not None


def warm(model, x, **options):
    """The second call that finds the same parameters makes the packed copy."""
    with torch.no_grad():
        for _ in range(2):
            model(x, **options)
    assert is_packed(model)


@torch.no_grad()
def check(model, x, heads, served=True):
    """The same bits; ``served``: by the packed copy."""
    expected = block_by_block(model, x, heads=heads)
    assert torch.isfinite(expected).all()
    for _ in range(3):
        assert torch.equal(model(x, heads=heads), expected)
    assert is_packed(model) == served


def of_network(geometries):
    return kernels.slices_of_network(*zip(*((g.embed, g.attention, g.mlp, g.head) for g in geometries), strict=True))


# ---- The same bits ----


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_width_has_the_bits_of_its_blocks(isa, variant, batch):
    config = resolve_config(WIDE, **VARIANTS[variant])
    model, x = make(config), images(config, batch)
    for heads in model.allowed_heads:
        check(model, x, heads)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(isa, threads, count, batch):
    threads(count)
    for config in (WIDE, resolve_config(WIDE, pool="avg", image_size=(96, 88), depth=2)):
        model, x = make(config), images(config, batch)
        for heads in model.allowed_heads:
            check(model, x, heads)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("variant", ["plain", "average pooling", "no classifier", "separate classifiers", "dynabert"])
def test_every_image_at_its_own_width(isa, threads, variant, count):
    threads(count)
    config = resolve_config(WIDE, **VARIANTS[variant])
    model, x = make(config), images(config, 8)
    for widths in ([4, 1, 2, 2, 4, 1, 1, 4], [2] * 8, [1, 1, 1, 1, 4, 4, 4, 4]):
        check(model, x, torch.tensor(widths))
        with torch.no_grad():
            mixed = model(x, heads=torch.tensor(widths))
            for i, heads in enumerate(widths):
                alone = model(x[i : i + 1], heads=heads)[0]
                assert torch.equal(mixed[i, : len(alone)], alone) and not mixed[i, len(alone) :].any()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_block_may_compute_pooled_tokens_only(isa, threads, variant, count):
    threads(count)
    config = resolve_config(WIDE, **VARIANTS[variant])
    model, x = make(config), images(config, 5)
    packed = kernels.pack(inference.in_order(model))
    for heads in (1, 4, torch.tensor([4, 1, 2, 2, 1])):
        widths = model.widths(heads, 5)
        arguments = (x, packed, of_network(widths.geometries), model.pool_range, widths.eps, widths.subnet)
        assert torch.equal(*(kernels.network(*arguments, pooled_only=pooled_only) for pooled_only in (True, False)))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "separate classifiers"])
def test_nothing_outside_the_slice_is_read(variant):
    config = resolve_config(WIDE, **VARIANTS[variant])
    for heads in make(config).allowed_heads:
        model = make(config)
        check(poison(model, [model.geometry(heads)]), images(config, 3), heads)


@pytest.mark.parametrize("suffix, width, served", [(False, 32, True), (False, 96, True), (False, 8, False)])
@pytest.mark.parametrize("head_dim", [24, 32])
def test_scala_prefix(isa, suffix, width, served, head_dim):
    """Its key rows follow its query rows: a width that is no whole number of panels is served by the blocks."""
    config = resolve_config(WIDE, head_dim=head_dim)
    model, sub = make(config), geometry.scala(config, width, suffix=suffix)
    assert (of_network([sub]) is not None) == served
    check(poison(model, [sub]), images(config, 3), sub, served)


@pytest.mark.parametrize("width, served", [(32, True), (64, True), (96, True), (48, False), (4, False)])
def test_scala_suffix(isa, width, served):
    model, sub = make(WIDE), geometry.scala(WIDE, width, suffix=True)
    assert (of_network([sub]) is not None) == served
    check(poison(model, [sub]), images(WIDE, 3), sub, served)


@pytest.mark.parametrize(
    "table, served",
    [
        ([(24, 96), (0, 40), (24, 0)], True),
        ([(0, 0), (24, 1), (0, 0)], True),
        ([(24, 384), (24, 7), (0, 384)], True),
        ([(0, 0)] * 3, True),
        ([(24, 96), (23, 96), (24, 96)], False),  # the heads' rows lie apart
    ],
)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_skipped_branches(isa, table, served, pool):
    config = resolve_config(WIDE, pool=pool)
    model, sub = make(config), geometry.skd(config, table)
    assert (of_network([sub]) is not None) == served
    check(poison(model, [sub]), images(config, 3), sub, served)


def test_widths_that_begin_off_a_panel_are_refused():
    """SMALL's second classifier begins in row 10; 80 channels put the keys in row 80."""
    config = resolve_config(SMALL, separate_classifiers=(1, 3, 4))
    model, x = make(config), images(config)
    check(model, x, 3, served=False)
    check(model, x, 1)
    check(make(max_heads=5, head_dim=16), images(WIDE), 2, served=False)
    mixture = torch.tensor([1, 3])
    check(make(config), x, mixture, served=False)


def test_values_of_any_strides():
    """Rows apart and images of any strides, as the blocks take them."""
    model, x = make(), images(WIDE, 3)
    qkv = model.blocks[0].attn.qkv
    room = torch.full((qkv.weight.shape[0], 2 * qkv.weight.shape[1]), float("nan"))
    room[:, : qkv.weight.shape[1]] = qkv.weight.detach()
    qkv.weight = nn.Parameter(room[:, : qkv.weight.shape[1]])
    assert not qkv.weight.is_contiguous()
    for view in (x, x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2], x.flip(0)[::2]):
        check(model, view, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_and_autocast(mode):
    model, x = make(separate_classifiers=(1, 2, 4)), images(WIDE)
    for _ in range(2):
        with mode():
            logits = [model(x, heads=2) for _ in range(3)]
            assert is_packed(model)
            expected = block_by_block(model, x, heads=2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits.append(model(x, heads=2))
                assert torch.equal(logits.pop(), block_by_block(model, x, heads=2))
        assert all(torch.equal(one, expected) for one in logits)
        mode = torch.no_grad  # what was packed under inference_mode serves outside


# ---- When it is made, and when it is stale ----


def test_made_by_the_second_call_that_finds_the_same_parameters():
    model, x = make(), images(WIDE)
    with torch.no_grad():
        model(x, heads=1)
        assert not is_packed(model)
        model.head.bias.add_(1.0)
        model(x, heads=2)
        assert not is_packed(model)
        model(x, heads=3)  # another width, the same parameters
        assert is_packed(model)
        first = model.packed_inference._packed[1]
        for heads in (1, 2, 3, 4, torch.tensor([1, 4])):
            model(x, heads=heads)
        assert model.packed_inference._packed[1] is first


def test_training_in_turns_packs_nothing():
    model, x = make(), images(WIDE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        assert not is_packed(model)


def step(optimizer_of):
    def change(model, x):
        optimizer = optimizer_of(model.parameters())
        model(x).square().sum().backward()
        optimizer.step()

    return change


@torch.no_grad()
def edit_in_place(model, x):
    model.blocks[1].mlp.fc1.weight.mul_(1.5)


def edit_data(model, x):
    model.blocks[1].mlp.fc1.weight.data.mul_(1.5)
    model.weights_changed()


def edit_numpy(model, x):
    model.norm.bias.detach().numpy()[:] += 1.0
    model.weights_changed()


def load(assign):
    def change(model, x):
        state = {name: p.clone() * 1.25 for name, p in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def replace_parameter(model, x):
    model.blocks[0].attn.proj.weight = nn.Parameter(model.blocks[0].attn.proj.weight.detach() * 2)


def replace_layer(model, x):
    model.blocks[0].mlp = shake(copy.deepcopy(model.blocks[0].mlp))


def replace_block(model, x):
    model.blocks[0] = shake(copy.deepcopy(model.blocks[1]))


def swap_blocks(model, x):
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def reset(classes):
    def change(model, x):
        model.reset_classifier(classes)
        shake(model.head)

    return change


def double_and_back(model, x):
    model.requested_backend = "auto"
    model.to(torch.float64)
    with torch.no_grad():
        model(x.double())
        model.head.weight.mul_(1.5)
    model.to(torch.float32)


def average(model, x):
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    average.update_parameters(shake(copy.deepcopy(model)))
    model.load_state_dict(average.module.state_dict())


CHANGES = {
    "SGD": step(lambda p: torch.optim.SGD(p, 0.1)),
    "AdamW": step(lambda p: torch.optim.AdamW(p, 0.1)),
    "fused AdamW": step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "fused SGD": step(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "foreach AdamW": step(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "in place": edit_in_place,
    "data": edit_data,
    "numpy": edit_numpy,
    "load_state_dict": load(assign=False),
    "load_state_dict, assigned": load(assign=True),
    "replaced parameter": replace_parameter,
    "replaced layer": replace_layer,
    "replaced block": replace_block,
    "swapped blocks": swap_blocks,
    "more classes": reset(40),
    "no classes": reset(0),
    "float64 and back": double_and_back,
    "average": average,
}


@pytest.mark.filterwarnings("ignore:hydravit. using backend")  # float64
@pytest.mark.parametrize("name", CHANGES)
def test_changed_parameters_are_used_at_once(name):
    model, x = make(), images(WIDE)
    warm(model, x)
    with torch.no_grad():
        before = model(x)
    CHANGES[name](model, x)
    with torch.no_grad():
        fresh = HydraViT(model.config, backend="native").eval()
        fresh.load_state_dict(model.state_dict())
        expected = block_by_block(fresh, x)
        assert not torch.equal(before, expected)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert is_packed(model)


def test_another_parameter_in_the_same_memory():
    """Neither the address nor the count of changes tells the new one from the old."""
    model, x, memory = make(), images(WIDE), torch.randn(WIDE.embed).numpy()
    with torch.no_grad():
        for _ in range(3):
            memory += 1.0
            model.norm.bias = nn.Parameter(torch.from_numpy(memory))
            for _ in range(3):
                assert torch.equal(model(x), block_by_block(model, x))
            assert is_packed(model)


def test_functional_call_uses_the_weights_it_is_given():
    model, x = make(), images(WIDE)
    own = dict(model.named_parameters())

    def scaled(scale):  # its tensors are gone when it returns, so that the next call's may have their memory
        return torch.func.functional_call(model, {name: p.detach() * scale for name, p in own.items()}, (x,))

    scales = [1.0, 1.0, 1.0, 1.5, 0.5, 0.5, 1.0]
    expected = []
    with torch.no_grad():
        for scale in scales:
            other = copy.deepcopy(model)
            for parameter in other.parameters():
                parameter.mul_(scale)
            expected.append(block_by_block(other, x))
        warm(model, x)
        assert all(torch.equal(scaled(scale), logits) for scale, logits in zip(scales, expected, strict=True))
        assert torch.equal(model(x), expected[0])


def test_parameters_made_under_inference_mode():
    """They count no changes, so they are never packed."""
    with torch.inference_mode():
        model, x = make(), images(WIDE)
        for _ in range(3):
            assert torch.equal(model(x), block_by_block(model, x))
            model.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert not is_packed(model)


def test_parametrized_weights():
    """Computed anew by every call, perhaps in the memory of the last."""
    model, x = make(), images(WIDE)
    proj = model.blocks[0].attn.proj

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(proj, "weight", Half())
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(x), block_by_block(model, x))
            proj.parametrizations.weight.original.mul_(1.5)


def test_parameters_of_wrong_shapes_raise_in_every_call():
    """The packed copy has no room for them: their neighbours would be read instead."""
    for name in ("blocks.1.attn.qkv.bias", "blocks.0.norm1.weight", "blocks.0.mlp.fc2.weight", "norm.bias"):
        model, x = make(), images(WIDE)
        layer, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(layer), leaf, nn.Parameter(model.get_parameter(name).detach()[:-1].clone()))
        for _ in range(3):
            with torch.no_grad(), pytest.raises(RuntimeError, match=": shape .* expected"):
                model(x)


# ---- Where it would be seen ----


def test_not_in_training():
    model, x = make(drop_path=0.5), images(WIDE)
    warm(model, x)
    model.train()
    with torch.no_grad():
        assert any(not torch.equal(model(x), block_by_block(model.eval(), x)) for _ in range(5) if model.train())


def test_not_where_a_gradient_is_wanted():
    model, x = make(), images(WIDE)
    warm(model, x)
    for packed in (model.packed_inference, None):
        model.packed_inference = packed
        model.zero_grad()
        model(x, heads=3).square().sum().backward()
        if packed is not None:
            gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert model.head.bias.grad.any()


def test_frozen_but_for_one_parameter():
    model, x = make().requires_grad_(False), images(WIDE)
    warm(model, x)
    assert not model(x).requires_grad
    model.norm.weight.requires_grad_()
    model(x).sum().backward()
    assert model.norm.weight.grad.any()


def test_gradient_of_the_images_of_a_frozen_model():
    model, x = make().requires_grad_(False), images(WIDE)
    warm(model, x)
    gradients = []
    for call in (model, lambda image: block_by_block(model, image)):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].any() and torch.equal(*gradients)


def test_not_in_a_compiled_graph():
    model, x = make(), images(WIDE)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        warm(model, x)
        compiled = torch.compile(model, backend=keep, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(compiled(x, heads=3), model(x, heads=3))
    assert graphs and not any("network_native" in graph for graph in graphs)


def test_hooks_on_blocks_fire():
    model, x, seen = make(), images(WIDE), []
    warm(model, x)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.blocks[1], register)(lambda *arguments: seen.append(arguments))
        with torch.no_grad():
            for count in (1, 2, 3):
                model(x)
                assert len(seen) == count
        handle.remove()
        seen.clear()
    with torch.no_grad():
        model(x)
    assert not seen and is_packed(model)


def test_a_hook_may_change_what_a_block_returns():
    model, x = make(), images(WIDE)
    warm(model, x)
    handle = model.blocks[1].register_forward_hook(lambda block, inputs, output: output * 0)
    with torch.no_grad():
        changed = model(x)
        handle.remove()
        assert not torch.equal(model(x), changed)


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_on_all_modules_fire(register):
    model, x, seen = make(), images(WIDE), []
    warm(model, x)
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert all(block in seen for block in model.blocks)


def test_another_block_is_called():
    class Quiet(layers.Block):
        def forward(self, x, *_):
            return x

    model, x = make(), images(WIDE)
    warm(model, x)
    quiet = Quiet(model.config, 0.0)
    quiet.load_state_dict(model.blocks[1].state_dict())
    own, model.blocks[1] = model.blocks[1], quiet
    with torch.no_grad():
        expected = block_by_block(model, x)
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        model.blocks[1] = own
        own.forward = quiet.forward  # as libraries do that wrap a module's forward
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
        del own.forward
        assert not torch.equal(model(x), expected)


def test_tensors_without_memory():
    """Under a fake mode and ``torch.func.vmap`` the blocks' own ops run."""
    model, x = make(), images(WIDE)
    warm(model, x)
    with torch.no_grad():
        weights = {name: torch.stack([p, 2 * p]) for name, p in model.named_parameters()}
        one = lambda w: torch.func.functional_call(model, w, (x,))  # noqa: E731
        for _ in range(3):
            both = torch.func.vmap(one)(weights)
        expected = [one({name: p[i] for name, p in weights.items()}) for i in range(2)]
        torch.testing.assert_close(both, torch.stack(expected))
        with torch._subclasses.fake_tensor.FakeTensorMode() as fake:
            weights = {name: fake.from_tensor(p) for name, p in model.named_parameters()}
            for _ in range(3):
                assert torch.func.functional_call(model, weights, (fake.from_tensor(x),)).shape == (2, 32)
        assert torch.equal(model(x), block_by_block(model, x))


def test_copies_start_without_the_packed_weights():
    model, x = make(), images(WIDE)
    warm(model, x)
    size = len(pickle.dumps(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model.packed_inference)):
        packed_inference = getattr(other, "packed_inference", other)
        assert packed_inference is not model.packed_inference and packed_inference._packed is None
    other = copy.deepcopy(model)
    model.packed_inference.drop()
    assert len(pickle.dumps(model)) == size
    with torch.no_grad():
        other.head.bias.add_(1.0)
        for _ in range(3):
            torch.testing.assert_close(other(x), model(x) + 1.0)


def test_switched_off():
    model, x = make(), images(WIDE)
    warm(model, x)
    model.packed_inference = None
    with torch.no_grad():
        expected = model(x)
        model.head.bias.add_(1.0)
        torch.testing.assert_close(model(x), expected + 1.0)
    model.weights_changed()
    assert copy.deepcopy(model.to(torch.float32)).packed_inference is None


def test_memory():
    """All widths ready: a tenth more than the parameters at most, and nothing per width."""
    config = HydraViTConfig(image_size=32, patch_size=16, depth=2, max_heads=6, num_classes=100)
    model, x = make(config), images(config)
    for heads in (*model.allowed_heads, torch.tensor([1, 6])):
        warm(model, x, heads=heads)
    held, todo, seen = [], [model.packed_inference], {id(p) for p in model.parameters()}
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            held.append(thing)
        elif isinstance(thing, dict):
            todo += [*thing, *thing.values()]
        elif isinstance(thing, (tuple, list, set)):
            todo += thing
        else:
            todo += vars(thing).values() if hasattr(thing, "__dict__") else ()
    parameters = sum(p.nbytes for p in model.parameters())
    assert len(held) == 1 and parameters < sum(t.untyped_storage().nbytes() for t in held) <= 1.1 * parameters


# ---- Python threads ----


def together(*works):
    """Each in its own thread, switching often; the first error, if any."""
    errors = []

    def guard(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        running = [threading.Thread(target=guard, args=(work,)) for work in works]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_threads_at_different_widths():
    model, x = make(), images(WIDE)
    widths = [1, 2, 3, 4, torch.tensor([1, 4])]
    with torch.no_grad():
        expected = [block_by_block(model, x, heads=heads) for heads in widths]

    def calls(heads, logits):
        @torch.no_grad()
        def work():
            for _ in range(30):
                assert torch.equal(model(x, heads=heads), logits)

        return work

    @torch.no_grad()
    def forget():  # so that some thread makes the packed copy while others use it
        for _ in range(30):
            model.weights_changed()
            model(x)

    together(forget, *(calls(*pair) for pair in zip(widths, expected, strict=True)))
    warm(model, x)


def test_a_table_that_another_thread_throws_away_at_once():
    class Emptied(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    model, x = make(), images(WIDE)
    model.packed_inference._slices = Emptied()
    check(model, x, 3)


def test_tables_do_not_pile_up():
    config = resolve_config(WIDE, depth=1, head_dim=8, image_size=8)
    model, x = make(config), images(config, 1)
    with torch.no_grad():
        for i in range(128):
            for j in (0, 8, 4):
                model(x, heads=geometry.skd(config, [(j, 1 + i)]))
    assert len(model.packed_inference._slices) <= 256


# ---- The op ----


def call():
    """Arguments of ``kernels.network``, by name."""
    model = make(SMALL)
    widths = model.widths(2, 3)
    packed = kernels.pack(inference.in_order(model))
    return {
        "images": images(SMALL, 3),
        **packed._asdict(),
        **of_network(widths.geometries)._asdict(),
        "pool": model.pool_range,
        "subnet": None,
    }


def run(arguments):
    packed = kernels.Packed(*(arguments[name] for name in kernels.Packed._fields))
    slices = kernels.NetworkSlices(*(arguments[name] for name in kernels.NetworkSlices._fields))
    return kernels.network(arguments["images"], packed, slices, arguments["pool"], 1e-6, arguments["subnet"])


def with_offset(index, value):
    def change(arguments):
        arguments["offsets"][index] = value

    return change


def with_sizes(**values):
    def change(arguments):
        arguments["sizes"] = arguments["sizes"]._replace(**values)

    return change


def with_arguments(**changed):
    def change(arguments):
        for name, value in changed.items():
            arguments[name] = value(arguments[name]) if callable(value) else value

    return change


def huge(arguments):
    """The product of these sizes is zero in 64 bits."""
    arguments["images"] = torch.zeros(1).expand(1, 4, 2**30, 16)
    none = dict.fromkeys(("cls_tokens", "reg_tokens", "positions", "classes"), 0)
    with_sizes(embed=2**30, hidden=64, patch_height=2**30, patch_width=16, **none)(arguments)


WRONG = {
    "too few offsets": (with_arguments(offsets=lambda o: o[:-1]), "^offsets: one for head.bias"),
    "no offsets": (with_arguments(offsets=[]), "^offsets: one for weight"),
    "too many offsets": (with_arguments(offsets=lambda o: [*o, 0]), "^offsets: 1 too many"),
    "offset at the end": (lambda a: with_offset(5, a["tensor"].numel())(a), "^offsets: norm1.weight"),
    "offset behind the end": (with_offset(7, 10**9), "^offsets: qkv.weight"),
    "negative offset": (with_offset(6, -2), "^offsets: norm1.bias"),
    "largest offset": (with_offset(5, 2**63 - 1), "^offsets: norm1.weight"),
    "no stem weight": (with_offset(0, -1), "^offsets: weight expected"),
    "no norm": (with_offset(5, -1), "^offsets: norm1.weight expected"),
    "no qkv": (with_offset(7, -1), "^offsets: qkv.weight expected"),
    "no projection": (with_offset(23, -1), "^offsets: proj.weight expected"),
    "no norm bias": (with_offset(27, -1), "^offsets: norm2.bias expected"),
    "no fc1": (with_offset(14, -1), "^offsets: fc1.weight expected"),
    "no fc2": (with_offset(30, -1), "^offsets: fc2.weight expected"),
    "half a norm": (with_offset(33, -1), "norm_bias: given with norm_weight"),
    "a bias of no classifier": (with_offset(35, -1), "bias: None expected"),
    "narrower": (with_sizes(embed=16), "weight: output channels"),
    "wider": (with_sizes(embed=4096), "^offsets: weight"),
    "negative size": (with_sizes(hidden=-1), "^sizes"),
    "size beyond 32 bits": (with_sizes(embed=2**31), "^sizes"),
    "sizes of a product beyond 64 bits": (huge, "packed weight: a shape of fewer"),
    "nine sizes": (with_arguments(sizes=lambda s: s[:-1]), "^sizes: 10 integers expected, 9 given"),
    "other channels": (with_sizes(channels=2), "packed weight: shape"),
    "other patches": (with_sizes(patch_height=4), "pos_embed: shape"),
    "no patch": (with_sizes(patch_width=0), "weight: a patch of at least one pixel"),
    "fewer classes": (with_sizes(classes=5), "head.weight: rows"),
    "depth of 0": (with_sizes(depth=0), "^depth: at least 1"),
    "depth of 3": (with_sizes(depth=3), "^slices: as many for each of 3 blocks"),
    "packed of another dtype": (with_arguments(tensor=torch.Tensor.double), "^packed: dtype float32"),
    "packed of two dimensions": (with_arguments(tensor=lambda t: t[None]), "^packed: shape"),
    "packed with gaps": (with_arguments(tensor=lambda t: t.repeat_interleave(2)[::2]), "^packed: innermost stride"),
    "short packed": (with_arguments(tensor=lambda t: t[:-100]), "^offsets: head.weight"),
    "smaller images": (with_arguments(images=lambda x: x[:, :, :24]), "pos_embed: shape"),
    "larger images": (with_arguments(images=torch.randn(1, 3, 40, 40)), "pos_embed: shape"),
    "images of no whole patches": (with_arguments(images=lambda x: x[:, :, :30]), "^images: height and width"),
    "images of three dimensions": (with_arguments(images=lambda x: x[0]), "^images: shape"),
    "images of another dtype": (with_arguments(images=torch.Tensor.double), "^images: dtype float32"),
    "pool behind the end": (with_arguments(pool=(0, 18)), "^pool_start, pool_stop"),
    "pool of nothing": (with_arguments(pool=(3, 3)), "^pool_start, pool_stop"),
    "stem off a panel": (with_arguments(stem=[16, 32]), "packed weight: rows that lie side by side"),
    "classes off a panel": (with_arguments(head=[0, 32, 1, 9]), "packed head.weight: rows that lie side by side"),
    "hidden off a panel": (with_arguments(mlp=[0, 32, 16, 64] * 2), "packed fc1.weight: rows"),
    "keys off a panel": (
        with_arguments(attention=[0, 32, 0, 65, 128, 0, 2, 16, 16, 16] * 2),
        "packed qkv.weight: rows that lie side by side",
    ),
    "heads apart": (
        with_arguments(attention=[0, 32, 0, 64, 128, 0, 2, 12, 12, 16] * 2),
        "packed qkv.weight: rows that lie side by side .* apart",
    ),
    "rows outside": (with_arguments(mlp=[0, 32, 192, 128] * 2), "fc1.weight: rows"),
    "another embed in the stem": (with_arguments(stem=[0, 16]), "^slices: one embed"),
    "another embed in the head": (with_arguments(head=[0, 16, 0, 10]), "^slices: one embed"),
    "no stem": (with_arguments(stem=[]), "^slices: a positive multiple of 2"),
    "an integer less": (with_arguments(attention=lambda s: s[:-1]), "^slices: as many for each"),
    "no scales": (with_arguments(scales=[]), "^slices: as many for each"),
    "no subnet": (with_arguments(stem=[0, 32, 0, 32]), "^subnet: an int64 tensor"),
    "subnet out of range": (with_arguments(subnet=torch.tensor([0, 1, 0])), "^subnet: values in"),
    "negative subnet": (with_arguments(subnet=torch.tensor([0, -1, 0])), "^subnet: values in"),
    "short subnet": (with_arguments(subnet=torch.tensor([0, 0])), "^subnet: shape"),
    "subnet of another dtype": (with_arguments(subnet=torch.zeros(3)), "^subnet: dtype int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name):
    change, message = WRONG[name]
    arguments = call()
    run(arguments)
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        run(arguments)


def without(*names):
    def change(parameters):
        known = [expected.name for expected in NetworkSizes.of(parameters).parameters()]
        for name in names:
            parameters[known.index(name)] = None

    return change


UNPACKABLE = {
    "a parameter less": (lambda p: p.pop(), "parameters: 5 \\+ 14 \\* depth \\+ 4 expected, 36 given"),
    "no block": (lambda p: p.__delitem__(slice(5, 33)), "parameters: .* 9 given"),
    "no patch embedding": (without("weight"), "^weight: a tensor of 4 axes expected, None given"),
    "no fc1": (without("fc1.weight"), "^fc1.weight: a tensor of 2 axes expected, None given"),
    "no norm": (without("norm2.bias"), "^norm2.bias: a tensor expected, None given"),
    "no projection": (without("proj.weight"), "^proj.weight: a tensor expected, None given"),
}


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed(name):
    change, message = UNPACKABLE[name]
    parameters = inference.in_order(make(SMALL))
    change(parameters)
    with pytest.raises(ValueError, match=message):
        kernels.pack(parameters)


@pytest.mark.parametrize("index", range(5 + 14 * 2 + 4))
def test_an_absent_parameter_is_an_error_or_no_part_of_the_sum(index):
    arguments = call()
    arguments["offsets"][index] = -1
    try:
        assert torch.isfinite(run(arguments)).all()
    except RuntimeError as error:
        assert "expected" in str(error)


def test_no_images():
    arguments = call()
    arguments["images"] = arguments["images"][:0]
    assert run(arguments).shape == (0, 10)


def test_wrong_parameters_are_not_packed():
    with pytest.raises(ValueError, match="^parameters: 5 \\+ 14"):
        kernels.pack([])
    parameters = inference.in_order(make(SMALL))
    for index, name in ((2, "cls_token"), (5, "norm1.weight"), (8, "qkv.bias"), (14, "fc1.weight"), (36, "head.bias")):
        wrong = [*parameters[:index], parameters[index].detach()[..., :-1], *parameters[index + 1 :]]
        with pytest.raises(RuntimeError, match=f"^{name}: shape"):
            kernels.pack(wrong)
    weight = torch.randn(10, 64)
    for arguments, message in (
        ((weight, torch.empty(640)), r"^panels: shape \(2048\) expected"),
        ((weight[0], torch.empty(64)), "^weight: at least 2 axes"),
        ((weight.t(), torch.empty(640)), "^weight: contiguous rows"),
        ((weight.double(), torch.empty(2048)), "^weight: dtype float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            hydravit.pack_weight_native(*arguments)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 70])
def test_panels(isa, rows):
    """Element (row, column) lies at ``row // PANEL`` panels on, in column ``column``, at ``row % PANEL``."""
    weight = torch.randn(rows, 3, 5)
    panels = torch.full((math.ceil(rows / PANEL) * PANEL * 15,), float("nan"))
    hydravit.pack_weight_native(weight, panels)
    unpacked = panels.view(-1, 15, PANEL).transpose(1, 2).reshape(-1, 3, 5)
    assert torch.equal(unpacked[:rows], weight) and torch.isfinite(panels).all()


@pytest.mark.parametrize("mixed", [False, True])
def test_opcheck(mixed):
    """Schema and fake kernel: a mixture is as wide as its widest image, with and without a classifier."""
    for classes in (10, 0):
        model = make(SMALL, num_classes=classes)
        widths = model.widths(torch.tensor([2, 1, 4]) if mixed else 2, 3)
        packed, slices = kernels.pack(inference.in_order(model)), of_network(widths.geometries)
        torch.library.opcheck(
            hydravit.network_native.default,
            (images(SMALL, 3), *packed, *model.pool_range, *slices, 1e-6, widths.subnet, True),
            test_utils=("test_schema", "test_faketensor"),
        )
    panels = torch.empty(32 * 7)
    torch.library.opcheck(
        hydravit.pack_weight_native.default, (torch.randn(10, 7), panels), test_utils=("test_schema", "test_faketensor")
    )
