"""When the packed copy is made, and that it is never older than the weights."""

import copy

import pytest
import small
import torch
from packing import WIDE, block_by_block, is_packed, make, warm
from small import images, shake
from torch import nn

from hydravit import HydraViT
from hydravit.geometry import parameter_slices
from hydravit.training import SliceAdamW, SliceGradients
from hydravit_kernels import CpuNetwork
from hydravit_kernels.sample import ROTATIONS

pytestmark = [
    pytest.mark.needs("native"),
    pytest.mark.usefixtures("one_thread"),
]


# ---- When it is made ----


def test_made_by_the_second_call_that_finds_the_same_parameters():
    model, x = make(), images(WIDE)
    with torch.no_grad():
        model(x, heads=1)
        assert not is_packed(model)
        model.head.bias.add_(1.0)
        model(x, heads=2)
        assert not is_packed(model)
        model(x, heads=3)  # another width, the same parameters
        first = model.packed_inference.network
        assert first is not None
        for heads in (1, 2, 3, 4, torch.tensor([1, 4])):
            model(x, heads=heads)
            assert model.packed_inference.network is first


def test_training_in_turns_packs_nothing():
    model, x = make(), images(WIDE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model.eval()(x)
        assert not is_packed(model)


def test_parameters_made_under_inference_mode_are_never_packed():
    """They count no changes."""
    with torch.inference_mode():
        model, x = make(), images(WIDE)
        for _ in range(3):
            assert torch.equal(model(x), block_by_block(model, x))
            model.blocks[0].mlp.fc1.weight.mul_(1.5)
    assert not is_packed(model)


def test_parameters_of_wrong_shapes_raise_in_every_call():
    """The packed copy has no room for them: their neighbours would be read instead."""
    for name in ("blocks.1.attn.qkv.bias", "blocks.0.norm1.weight", "blocks.0.mlp.fc2.weight", "norm.bias"):
        model, x = make(), images(WIDE)
        layer, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(layer), leaf, nn.Parameter(model.get_parameter(name).detach()[:-1].clone()))
        for _ in range(3):
            with torch.no_grad(), pytest.raises(RuntimeError, match=": shape .* expected"):
                model(x)


# ---- When it is stale ----


def step(optimizer_of):
    def change(model, x):
        optimizer = optimizer_of(model.parameters())
        model(x).square().sum().backward()
        optimizer.step()

    return change


def slice_step(model, x):
    gradients, optimizer = SliceGradients(model), SliceAdamW(model.parameters(), model, lr=0.1)
    model(x, heads=2).square().sum().backward()
    optimizer.step()
    gradients.close()


@torch.no_grad()
def edit_in_place(model, x):
    model.blocks[1].mlp.fc1.weight.mul_(1.5)


@torch.no_grad()
def edit_data(model, x):
    model.blocks[1].mlp.fc1.weight.data.mul_(1.5)


def edit_every_data(model, x):
    torch._foreach_mul_([p.data for p in model.parameters()], 1.25)


def edit_a_quarter(model, x):
    """As small a part of one bias as is seen in the next call for sure: the channels of one head."""
    model.blocks[0].attn.proj.bias.data[:24] += 1.0


def edit_every_first_head(model, x):
    """The slice of the narrowest width, in every parameter."""
    slices = parameter_slices(model.config, model.subnetwork(1))
    for name, parameter in model.named_parameters():
        part = parameter.data
        for axis, ((start, length), *_) in enumerate(slices[name]):
            part = part.narrow(axis, start, length)
        part.mul_(1.25)


def edit_numpy(model, x):
    model.norm.bias.detach().numpy()[:] += 1.0


def edit_a_numpy_row(model, x):
    model.head.weight.detach().numpy()[0] += 1.0
    model.weights_changed()  # so small a write may never be noticed otherwise


def edit_storage(model, x):
    weight = model.blocks[0].attn.qkv.weight
    weight.untyped_storage().copy_((weight.detach() * 2).untyped_storage())


def edit_dlpack(model, x):
    torch.from_dlpack(model.blocks[2].mlp.fc2.weight.detach()).mul_(2)


def replace_data(model, x):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


def free_and_gather(model, x):
    """As sharded training does between its steps."""
    weight = model.blocks[0].mlp.fc1.weight
    kept, size = weight.detach() * 2, weight.untyped_storage().nbytes()
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    weight.data.copy_(kept)


def swap_with_averages(model, x):
    """As libraries of averages do: store, copy_to, evaluate, restore, and copy_to once more."""
    averages = [p.detach() * 1.5 for p in model.parameters()]
    stored = [p.detach().clone() for p in model.parameters()]

    def copy_to(values):
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.data.copy_(value)

    for values in (averages, stored, averages):
        copy_to(values)
        with torch.no_grad():
            assert torch.equal(model(x, heads=2), block_by_block(model, x, heads=2))


def load(assign):
    def change(model, x):
        state = {name: p.clone() * 1.25 for name, p in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)

    return change


def load_by_swapping(model, x):
    """torch refuses to swap tensors that have weak references."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(assign=False)(model, x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


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
    "AdamW of the slice": slice_step,
    "in place": edit_in_place,
    "data": edit_data,
    "every data": edit_every_data,
    "a quarter": edit_a_quarter,
    "every first head": edit_every_first_head,
    "numpy": edit_numpy,
    "a numpy row": edit_a_numpy_row,
    "storage": edit_storage,
    "dlpack": edit_dlpack,
    "replaced data": replace_data,
    "freed and gathered": free_and_gather,
    "swapped with averages": swap_with_averages,
    "load_state_dict": load(assign=False),
    "load_state_dict, assigned": load(assign=True),
    "load_state_dict, swapped": load_by_swapping,
    "replaced parameter": replace_parameter,
    "replaced layer": replace_layer,
    "replaced block": replace_block,
    "swapped blocks": swap_blocks,
    "more classes": reset(40),
    "no classes": reset(0),
    "float64 and back": double_and_back,
    "average": average,
}


def warm_or_run(model, x):
    if model.backend == "native":
        warm(model, x)
    return [model(x, heads=heads) for heads in (1, 3)]


@pytest.mark.filterwarnings("ignore:hydravit. using backend")  # float64
@pytest.mark.parametrize("name", CHANGES)
def test_changed_parameters_are_used_at_once(name, backend):
    model, x = small.make(WIDE, backend), images(WIDE)
    with torch.no_grad():
        before = warm_or_run(model, x)
    CHANGES[name](model, x)
    with torch.no_grad():
        fresh = HydraViT(model.config, backend=model.backend).eval()
        fresh.load_state_dict(model.state_dict())
        for heads, old in zip((1, 3), before, strict=True):
            expected = block_by_block(fresh, x, heads=heads)
            assert not torch.equal(old, expected)
            for _ in range(3):
                assert torch.equal(model(x, heads=heads), expected)
    assert is_packed(model) == (model.backend == "native")


@pytest.mark.filterwarnings("ignore:hydravit. using backend")  # float64
@pytest.mark.parametrize("name", CHANGES)
def test_an_engine_uses_changed_parameters_at_once(name):
    model, x = make(), images(WIDE)
    engine = model.engine()
    CHANGES[name](model, x)
    if name.endswith("classes"):
        with pytest.raises(RuntimeError, match="^the model's config has changed: make a new engine"):
            engine(x)
        return
    with torch.no_grad():
        for heads in (3, 1):
            assert torch.equal(engine(x, heads=heads), block_by_block(model, x, heads=heads))


def test_smaller_writes_are_noticed_within_sixteen_calls():
    """Here 1/32 of a matrix. A write to a few elements may never be: README and docs say so."""
    for part in (0, 5, 31):
        model, x = make(), images(WIDE)
        warm(model, x)
        rows = model.blocks[1].mlp.fc1.weight.data[12 * part : 12 * part + 12]
        rows += 1.0
        with torch.no_grad():
            for _ in range(ROTATIONS):
                logits = model(x, heads=4)
            assert torch.equal(logits, block_by_block(model, x, heads=4))


# ---- Written while it is packed ----

WRITES = {
    "in place": lambda weight: weight.mul_(1.5),
    "data": lambda weight: weight.data.mul_(1.5),
    "replaced data": lambda weight: setattr(weight, "data", weight.data * 1.5),
    "numpy": lambda weight: weight.detach().numpy().__imul__(1.5),
}


@pytest.fixture(params=WRITES)
def writer_while_packing(request, monkeypatch):
    """Returns a function that has the next packing followed by a write before anything else happens."""

    def arm(model):
        def pack(network, parameters):
            real(network, parameters)
            if armed:
                with torch.no_grad():
                    armed.pop()(model.blocks[0].mlp.fc2.weight)

        armed, real = [WRITES[request.param]], CpuNetwork.pack
        monkeypatch.setattr(CpuNetwork, "pack", pack)
        return armed

    return arm


@pytest.mark.parametrize("heads", [1, 4])
def test_a_weight_written_while_the_model_is_packed(writer_while_packing, heads):
    model, x = make(), images(WIDE)
    armed = writer_while_packing(model)
    with torch.no_grad():
        for _ in range(2):
            model(x, heads=heads)
        assert not armed
        assert torch.equal(model(x, heads=heads), block_by_block(model, x, heads=heads))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("again", [False, True])
def test_a_weight_written_while_an_engine_is_packed(writer_while_packing, again, heads):
    """When it is made, and when it packs again."""
    model, x = make(), images(WIDE)
    if not again:
        armed = writer_while_packing(model)
        engine = model.engine()
    else:
        engine = model.engine()
        armed = writer_while_packing(model)
        model.head.weight.data += 1.0
        engine(x, heads=heads)
    assert not armed
    with torch.no_grad():
        assert torch.equal(engine(x, heads=heads), block_by_block(model, x, heads=heads))


# ---- Memory that others own ----


@pytest.mark.parametrize("heads", [1, 4])
def test_freed_weights_raise(heads):
    model, x = make(), images(WIDE)
    engine = model.engine()
    model.blocks[1].mlp.fc1.weight.untyped_storage().resize_(0)
    for call in (model, engine, model, engine):
        with torch.no_grad(), pytest.raises(RuntimeError, match="storage"):
            call(x, heads=heads)


def test_shared_memory_is_never_packed():
    """Another process may write to any element at any time."""
    model, x = make(), images(WIDE)
    warm(model, x)
    engine = model.engine()
    model.share_memory()
    with torch.no_grad():
        for heads in (1, 4, 4, 4):
            model.head.bias.data[0] += 1.0  # too small to be noticed
            assert torch.equal(model(x, heads=heads), block_by_block(model, x, heads=heads))
            assert not is_packed(model)
    for make_or_run in (model.engine, lambda: engine(x)):
        with pytest.raises(RuntimeError, match="^packed weights: .* shared memory, .* copy.deepcopy"):
            make_or_run()
    assert torch.equal(copy.deepcopy(model).engine()(x, heads=1), model(x, heads=1))


def add_one(model):
    for parameter in model.parameters():
        parameter.data += 1.0


def test_another_process_writes():
    model, x = make(), images(WIDE)
    warm(model, x)
    model.share_memory()
    with torch.no_grad():
        before = model(x, heads=2)
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=add_one, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0
    with torch.no_grad():
        logits = model(x, heads=2)
    assert not torch.equal(logits, before) and torch.equal(logits, block_by_block(model, x, heads=2))


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


def test_parametrized_weights():
    """Every call computes them anew, perhaps in the memory of the last."""
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


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, weight):
        return weight * self.scale


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_buffers_of_parametrizations(write):
    """What reads them is never packed."""
    model, x = make(), images(WIDE)
    proj = model.blocks[0].attn.proj
    nn.utils.parametrize.register_parametrization(proj, "weight", Scaled())
    with torch.no_grad():
        before = [model(x, heads=heads) for heads in (1, 4)]
        for heads, old in zip((1, 4), before, strict=True):
            write(proj.parametrizations.weight[0].scale)
            expected = block_by_block(model, x, heads=heads)
            assert not torch.equal(expected, old)
            for _ in range(3):
                assert torch.equal(model(x, heads=heads), expected)
    with pytest.raises(ValueError, match="^engine: .* blocks.0.attn.proj is parametrized"):
        model.engine()
