"""The engine on the CPU and, with the CUDA network on the emulator, what it does on a GPU."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from budget import assert_within_budget
from small import SMALL_CUDA as CONFIG
from small import draws_of_logits, images, poison, shake

from hydravit import HydraViT
from hydravit.config import resolve_config
from hydravit.inference import DTYPES, with_e4m3_weights
from hydravit.training import SliceAdamW, SliceGradients
from hydravit_kernels import CpuNetwork, CudaNetwork

pytestmark = [
    pytest.mark.needs("native"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.long)])
def kind(request):
    """For "cuda", engines of models on the CPU have the CUDA network on the emulator."""
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_the_cpu")
    return request.param


def make(**overrides):
    return shake(HydraViT(resolve_config(CONFIG, **overrides), backend="native").eval())


@torch.no_grad()
def check(engine, x, **options):
    """Within the error budget of eager PyTorch in the engine's dtype; of the CPU, the same bits as the model.

    Of 8-bit weights: of eager PyTorch in the activations' dtype with the same weights.
    """
    model, dtype = engine.model, engine.dtype
    logits = engine(x, **options)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    if dtype == torch.float32:
        assert torch.equal(logits, model(x, **options))
        return
    if dtype == torch.float8_e4m3fn:
        model, dtype = with_e4m3_weights(model), torch.float16
    assert_within_budget(logits.to(dtype), draws_of_logits(model, x, dtype, **options)[0])


def test_every_width_and_batch(kind):
    model = make()
    engine = model.engine(max_batch=3)
    for heads in (3, 1, 2):
        for batch in (1, 3):
            check(engine, images(CONFIG, batch), heads=heads)
    model.heads, x = 2, images(CONFIG, 2)
    assert torch.equal(engine(x), engine(x, heads=2))


@pytest.mark.parametrize(
    "overrides",
    [
        {"pool": "avg", "register_tokens": 2, "layer_scale": 0.3},
        {"qkv_bias": False, "no_embed_class": True, "separate_classifiers": (1, 2, 3), "num_classes": 64},
        {"in_channels": 1, "image_size": (15, 35), "patch_size": 5, "geometry": "dynabert"},
        {"geometry": "matformer", "pool": "avg", "class_token": False, "image_size": 4},
    ],
    ids=lambda overrides: ", ".join(overrides),
)
def test_variants(kind, overrides):
    model = make(**overrides)
    check(model.engine(), images(model.config, 2), heads=2)


def other_dtypes(kind):
    return DTYPES["cuda"][1:] if kind != "cpu" else ()


def test_other_dtypes(kind):
    model = make(separate_classifiers=(1, 2, 3), num_classes=64)
    for dtype in other_dtypes(kind):
        engine = model.engine(dtype=dtype)
        for heads in (1, 2, 3):
            check(engine, images(CONFIG, 2), heads=heads)


@pytest.mark.parametrize("dtype", DTYPES["cuda"], ids=str)
def test_the_cpu_has_float32_only(dtype):
    with pytest.raises(ValueError, match=f"^dtype must be torch.float32 on cpu, not {dtype}"):
        make().engine(dtype=dtype)


def test_a_nan_shows_in_the_widths_that_read_it(kind):
    for dtype in (None, *other_dtypes(kind)):
        model = make()
        with torch.no_grad():
            model.blocks[0].mlp.fc2.weight[0, 64] = float("nan")
        engine = model.engine(dtype=dtype)
        assert engine(images(CONFIG), heads=1).isfinite().all()
        assert engine(images(CONFIG), heads=2).isnan().all()


def test_e4m3_weights_for_any_device():
    model = make(separate_classifiers=(1, 2, 3), num_classes=64)
    rounded = with_e4m3_weights(model)
    for (name, before), after in zip(model.named_parameters(), rounded.parameters(), strict=True):
        if before.dim() == 1 or name in ("cls_token", "pos_embed", "head.bias"):
            assert torch.equal(after, before), name
            continue
        # Half a unit in the last of 3 places; below the smallest normal number, 2**-6, half of that's.
        columns = before[0].numel() if before.dim() == 4 else before.shape[-1]
        before, after = (p.detach().reshape(-1, columns) for p in (before, after))
        scale = before.abs().amax(1, keepdim=True) / 448
        unit = 2.0 ** (before / scale).abs().log2().floor().clamp(min=-6.0) / 8 * scale
        assert ((after - before).abs() <= unit / 2 * (1 + 1e-6)).all() and not torch.equal(after, before), name


def test_the_same_bits_at_any_batch(kind):
    """On CUDA within a kernel family: so few rows are multiplied by mma at every batch."""
    engine, x = make().engine(max_batch=9), images(CONFIG, 9)
    for heads in (1, 3):
        together = engine(x, heads=heads)
        assert torch.equal(engine(x, heads=heads), together)  # of so many images CUDA makes the graph in the first call
        assert torch.equal(together, torch.cat([engine(x[i : i + 1], heads=heads) for i in range(9)]))


def test_nothing_outside_the_slice_is_read(kind):
    for dtype in (None, *other_dtypes(kind)):
        for heads in (1, 2):
            model = make()
            poison(model, [model.subnetwork(heads)])
            assert model.engine(dtype=dtype)(images(CONFIG), heads=heads).isfinite().all()


def test_changed_weights_are_noticed(kind):
    model, x = make(), images(CONFIG)
    engine = model.engine()
    before = engine(x)

    def changed(change):
        nonlocal before
        change()
        after = engine(x)
        assert not torch.equal(after, before), change
        assert torch.equal(after, model.engine()(x))
        before = after

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    changed(optimizer.step)
    with torch.no_grad():
        changed(lambda: model.head.bias.add_(1.0))
    changed(lambda: model.load_state_dict(make().state_dict()))
    changed(lambda: setattr(model.norm, "weight", torch.nn.Parameter(model.norm.weight.detach() * 2)))
    changed(lambda: setattr(model.blocks[0], "mlp", make().blocks[0].mlp))
    model.head.bias.data[0] += 1.0
    changed(model.weights_changed)


def test_steps_of_the_slice_optimizer_are_noticed(kind):
    model, x = make(), images(CONFIG)
    average = copy.deepcopy(model)
    gradients, optimizer = SliceGradients(model), SliceAdamW(model.parameters(), model, lr=0.1, average=average)
    engines = model.engine(), average.engine()
    for heads in (3, 1):
        before = [engine(x) for engine in engines]
        gradients.zero_()
        model(x, heads=heads).sum().backward()
        optimizer.step()
        for used, old in zip(engines, before, strict=True):
            logits = used(x)
            assert not torch.equal(logits, old) and torch.equal(logits, used.model.engine()(x))


def test_unchanged_weights_are_packed_once(kind, monkeypatch):
    model, x = make(), images(CONFIG)
    engine = model.engine()
    for network in (CpuNetwork, CudaNetwork):
        monkeypatch.setattr(network, "pack", None)
    for heads in (1, 2, 3, 1):
        engine(x, heads=heads)


def test_a_weight_written_while_it_is_packed(kind, monkeypatch):
    """When the engine is made and when it packs again, a write meanwhile is seen by the next call."""
    model, x = make(), images(CONFIG)

    def write_after(real):
        def pack(network, parameters):
            real(network, parameters)
            if writes:
                writes.pop()()

        return pack

    for network in (CpuNetwork, CudaNetwork):
        monkeypatch.setattr(network, "pack", write_after(network.pack))
    for write in (lambda: model.norm.bias.detach().add_(1.0), lambda: model.head.weight.data.mul_(1.5)):
        writes = [write]
        engine = model.engine()
        for heads in (1, 3):
            assert not writes
            assert torch.equal(engine(x, heads=heads), model.engine()(x, heads=heads))
            writes = [write]
            model.blocks[1].mlp.fc1.bias.data.add_(1.0)
            engine(x, heads=heads)


@pytest.mark.parametrize("change", [copy.copy, copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_copies_and_pickles_pack_anew(kind, change):
    engine, x = make().engine(max_batch=3, dtype=other_dtypes(kind)[0] if kind == "cuda" else None), images(CONFIG, 3)
    other = change(engine)
    assert (other.max_batch, other.dtype) == (engine.max_batch, engine.dtype)
    for heads in (1, 3):
        assert torch.equal(other(x, heads=heads), engine(x, heads=heads))
    if change is not copy.copy:  # they have a model of their own
        expected = other(x)
        with torch.no_grad():
            engine.model.head.bias.add_(1.0)
        assert torch.equal(other(x), expected) and not torch.equal(engine(x), expected)
    assert len(pickle.dumps(engine)) < 1.2 * len(pickle.dumps(engine.model))


def test_engines_and_calls_of_a_model_share_one_packed_copy(monkeypatch):
    packed = []
    real = CpuNetwork.pack
    monkeypatch.setattr(CpuNetwork, "pack", lambda network, p: (packed.append(weakref.ref(network)), real(network, p)))
    model, x = make(), images(CONFIG)
    engines = [model.engine(max_batch=2), model.engine(max_batch=3)]
    with torch.no_grad():
        for heads in (1, 3):
            expected = model(x, heads=heads)
            assert all(torch.equal(engine(x, heads=heads), expected) for engine in engines)
        assert len(packed) == 1
        model.head.bias.add_(1.0)
        for engine in engines:
            torch.testing.assert_close(engine(x), expected + 1.0)
        torch.testing.assert_close(model(x), expected + 1.0)
        assert len(packed) == 2 and packed[0]() is None
        model.packed_inference = None  # the engines keep it
        assert torch.equal(engines[0](x), engines[1](x)) and len(packed) == 2
    other = make()
    other.engine()
    assert len(packed) == 3 and packed[2]() is None  # another model's, and its only engine is gone
    engines.clear()
    del engine
    gc.collect()
    assert packed[1]() is None


def test_a_model_that_packed_first_shares_with_its_engines(monkeypatch):
    model, x = make(), images(CONFIG)
    with torch.no_grad():
        expected = [model(x, heads=2) for _ in range(2)][-1]
    monkeypatch.setattr(CpuNetwork, "pack", None)
    assert torch.equal(model.engine()(x, heads=2), expected)


def test_other_weights_in_between_do_not_cost_the_engine_its_copy(monkeypatch):
    model, x = make(), images(CONFIG)
    engine = model.engine()
    expected, doubled = engine(x), {name: p.detach() * 2 for name, p in model.named_parameters()}
    monkeypatch.setattr(CpuNetwork, "pack", None)
    with torch.no_grad():
        assert not torch.equal(torch.func.functional_call(model, doubled, (x,)), expected)
        assert torch.equal(engine(x), expected)


def test_images_of_any_strides(kind):
    engine, x = make().engine(), images(CONFIG, 3)
    for view in (x.to(memory_format=torch.channels_last), x.flip(0)[::2], x.repeat_interleave(2, 3)[..., ::2]):
        assert torch.equal(engine(view), engine(view.contiguous()))


def test_wrong_arguments_raise(kind):
    model = make()
    with pytest.raises(ValueError, match="^max_batch must be an integer of at least 1, not 0"):
        model.engine(max_batch=0)
    with pytest.raises(ValueError, match="^dtype must be .* not torch.float64"):
        model.engine(dtype=torch.float64)
    with pytest.raises(ValueError, match="^loader='async' is for engines on CUDA only"):
        model.engine(loader="async")
    engine, x = model.engine(max_batch=2), images(CONFIG, 3)
    with pytest.raises(ValueError, match="^images: at most max_batch=2 expected, 3 given"):
        engine(x)
    with pytest.raises(ValueError, match="^heads must be in 1..3, not 4"):
        engine(x[:1], heads=4)
    with pytest.raises(TypeError, match="^heads must be an int"):
        engine(x[:1], heads=1.0)
    with pytest.raises(ValueError, match=r"^images must be \(B, 3, 16, 16\)"):
        engine(x[..., 1:])
    with pytest.raises(TypeError, match="^images are torch.float64"):
        engine(x[:1].double())


def test_untrained_widths_are_refused(kind):
    model = HydraViT(CONFIG, trained_heads=(1, 3)).eval()
    engine, x = model.engine(), images(CONFIG)
    with pytest.raises(ValueError, match="was not trained"):
        engine(x, heads=2)
    model.allow_untrained = True
    with pytest.raises(ValueError, match="was no width of the model when the engine was made"):
        engine(x, heads=2)
    assert model.engine()(x, heads=2).isfinite().all()


def test_models_that_packed_inference_cannot_serve():
    with pytest.raises(ValueError, match="^engine: packed weights cannot serve heads=1"):
        make(head_dim=16, geometry="hydravit").engine()


def test_a_moved_model_needs_a_new_engine():
    engine = HydraViT(CONFIG).engine()
    engine.model.to("meta")
    with pytest.raises(RuntimeError, match="^the model was moved from cpu to meta"):
        engine(images(CONFIG))
