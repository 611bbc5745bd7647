"""AdamW on the active slice: what dense AdamW makes of everything, bit by bit; or nothing outside the slice."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from small import poison
from torch.optim.swa_utils import get_ema_multi_avg_fn

import hydravit_kernels as kernels
from hydravit import HydraViT, HydraViTConfig
from hydravit.extract import extract
from hydravit.geometry import scala, skd
from hydravit.training import SliceAdamW, SliceGradients
from hydravit.training import adamw as slice_adamw
from hydravit.training.regions import intersection, join, subtract

BACKENDS = kernels.available_backends()
pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not there")

# Sizes are such that torch's kernels have whole vectors only: what they compute beyond is rounded in another way.
CONFIG = HydraViTConfig(
    image_size=8, patch_size=4, in_channels=2, num_classes=32, depth=2, max_heads=4, head_dim=8, mlp_ratio=2.0
)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def ema_decay(count):
    return min(0.9, (1 + count) / (10 + count))


def make_model(backend="reference", config=CONFIG, **changes):
    torch.manual_seed(0)
    model = HydraViT(dataclasses.replace(config, **changes), backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(step, count=4):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(count, 2, 8, 8, generator=generator)
    return images, torch.randint(32, (count,), generator=generator)


class Dense:
    """What ``SliceAdamW`` has to equal: every entry of every parameter takes part in every step, by the same kernel."""

    def __init__(self, groups, model, average=None, **options):
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in groups]
        self.param_groups = [{**OPTIONS, **options, **group, "params": list(group["params"])} for group in groups]
        self.backend, self.count = model.backend, 0
        averages = {} if average is None else dict(average.named_parameters())
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.entries = [
            (parameter, torch.zeros_like(parameter), torch.zeros_like(parameter), averages.get(names[parameter]), group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def step(self):
        decay = ema_decay(self.count) if self.count else 0.0
        self.count += 1
        for weight, first, second, average, group in self.entries:
            numbers = {name: group[name] for name in OPTIONS}
            step = kernels.AdamWStep.at(self.count, average_decay=decay, **numbers)
            whole = torch.tensor([[0, 0, 0, 1, weight.numel(), weight.numel()]])
            averages = [] if average is None else [average]
            kernels.adamw([weight], [weight.grad], [first], [second], averages, whole, [[step]], backend=self.backend)


def two_groups(model):
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


class Run:
    """A model in training with one optimizer, its gradients in place."""

    def __init__(self, optimizer, backend, averaged=True, groups=two_groups, options=OPTIONS, **changes):
        self.model = make_model(backend, **changes)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if averaged else None
        self.gradients = SliceGradients(self.model)
        self.optimizer = optimizer(groups(self.model), self.model, average=self.average, **options)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.count = 0

    def step(self, *widths, clip=1.0):
        """One step of the mean loss at these widths, its learning rate and momentum its own; returns the logits."""
        for group, lr in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = lr / (1 + 0.3 * self.count)
            group["betas"] = (0.9 - 0.01 * (self.count % 3), 0.99)
        self.gradients.zero_()
        images, labels = batch(self.count)
        results = []
        for heads in widths:
            results.append(self.model(images, heads=heads))
            F.cross_entropy(results[-1], labels).backward()
        if clip:
            self.gradients.clip_norm_(clip)
        self.optimizer.step()
        self.count += 1
        return torch.stack([logits.detach() for logits in results])


def exact(groups, model, average=None, **options):
    return SliceAdamW(groups, model, average=average, ema_decay=ema_decay, **options)


def active(groups, model, average=None, **options):
    return SliceAdamW(groups, model, mode="active", average=average, ema_decay=ema_decay, **options)


def assert_same(model, other):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def assert_same_runs(run, dense):
    """Weights, average and moments, to the bit."""
    assert_same(run.model, dense.model)
    if run.average is not None:
        assert_same(run.average, dense.average)
    run.optimizer.flush()
    for weight, first, second, _, _ in dense.optimizer.entries:
        name = next(name for name, parameter in dense.model.named_parameters() if parameter is weight)
        state = run.optimizer.state[run.model.get_parameter(name)]
        assert torch.equal(state["exp_avg"], first) and torch.equal(state["exp_avg_sq"], second), name


# Exact --------------------------------------------------------------------------------------------------------------

WIDTHS = [[2], [1], [1], [4], [1], [3], [2], [1], [4], [1], [1]]
CASES = {
    "widths": ({}, WIDTHS),
    "widest never": ({}, [[2], [1], [3], [1], [1], [2]]),
    "per image": ({}, [[torch.tensor(ks)] for ks in ([1, 3, 1, 1], [2, 2, 1, 2], [1, 1, 4, 4], [1, 1, 1, 1])]),
    "accumulated": ({}, [[1, 3], [2], [1, 1], [4, 1], [2, 1]]),
    "separate classifiers": ({"separate_classifiers": (1, 2, 4)}, [[2], [1], [4], [1], [2]]),
    "layer scale, registers": ({"layer_scale": 0.5, "register_tokens": 2, "pool": "avg"}, [[3], [4], [1], [2], [1]]),
    "prefix and suffix": ({}, [[scala(CONFIG, w, suffix=s)] for w, s in ((8, 1), (8, 0), (16, 1), (8, 1))]),
    "per layer": ({}, [[skd(CONFIG, layers)] for layers in ([(4, 0), (0, 24)], [(8, 64), (2, 8)], [(4, 0), (0, 24)])]),
    "sortednet": ({"geometry": "sortednet"}, [[1], [3], [1], [2]]),
    "dynabert": ({"geometry": "dynabert"}, [[2], [4], [1], [1]]),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_exact_is_dense(case, backend):
    changes, steps = CASES[case]
    run, dense = Run(exact, backend, **changes), Run(Dense, backend, **changes)
    for widths in steps:
        assert torch.equal(run.step(*widths), dense.step(*widths)), f"a forward pass of step {run.count - 1}"
    assert run.optimizer._history, "no step was put off, which this test is about"
    assert_same_runs(run, dense)


@pytest.mark.parametrize("seed", range(3))
def test_random_widths(seed):
    generator = torch.Generator().manual_seed(seed)
    run, dense = Run(exact, BACKENDS[0]), Run(Dense, BACKENDS[0])
    for _ in range(40):
        heads = int(torch.randint(1, 5, (), generator=generator))
        assert torch.equal(run.step(heads), dense.step(heads))
        if torch.rand((), generator=generator) < 0.1:
            assert_same_runs(run, dense)
    assert_same_runs(run, dense)


LOOKS = {
    "state_dict": lambda model: model.state_dict(),
    "eval": lambda model: dict(model.eval().train().named_parameters()),
    "deepcopy": lambda model: copy.deepcopy(model).state_dict(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)).state_dict(),
    "extract": lambda model: {name: tensor for k in (1, 3) for name, tensor in extract(model, k).items()},
    "without gradients": lambda model: {"logits": _logits(model, torch.no_grad)},
    "inference": lambda model: {"logits": _logits(model, torch.inference_mode)},
    "features": lambda model: {"features": model.forward_features(batch(99)[0], heads=4).detach()},
    "to": lambda model: dict(model.float().named_parameters()),
}


def _logits(model, without_gradients):
    with without_gradients():
        return torch.stack([model(batch(99)[0], heads=heads) for heads in (1, 1, 4, 4)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["model", "average"])
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_the_dense_weights(look, which, backend):
    run, dense = Run(exact, backend), Run(Dense, backend)
    for widths in WIDTHS[:7]:
        for side in (run, dense):
            side.step(*widths)
    assert run.optimizer._history
    seen = [LOOKS[look](getattr(side, which)) for side in (run, dense)]
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]), name
    for widths in WIDTHS[7:]:
        assert torch.equal(run.step(*widths), dense.step(*widths))
    assert_same_runs(run, dense)


@native
@pytest.mark.parametrize("inference", [True, False])
def test_packed_weights_are_made_of_current_ones(inference):
    """A call of one width packs for all of them; and a step makes what was packed stale.

    With gradients enabled only the average is packed: none of its parameters asks for one.
    """
    run, dense = Run(exact, "native"), Run(Dense, "native")
    for side in (run, dense):
        side.model.eval(), side.average.eval()  # also while it is trained
    dense.model.packed_inference = dense.average.packed_inference = None
    for widths in WIDTHS:
        for side in (run, dense):
            side.step(*widths)
            side.packing = (side.model, side.average) if inference else (side.average,)
            with torch.inference_mode(inference):
                side.seen = [module(batch(98)[0], heads=heads) for module in side.packing for heads in (1, 1, 4, 2)]
        assert all(module.packed_inference._packed is not None for module in run.packing)
        assert all(torch.equal(a, b) for a, b in zip(run.seen, dense.seen, strict=True))


def test_history_is_bounded(monkeypatch):
    monkeypatch.setattr(slice_adamw, "_HISTORY", 3)
    run, dense = Run(exact, BACKENDS[0]), Run(Dense, BACKENDS[0])
    lengths = []
    for heads in [2, *[1] * 9]:
        run.step(heads), dense.step(heads)
        lengths.append(len(run.optimizer._history))
    assert max(lengths) == 3 and lengths.count(0) == 2
    assert_same_runs(run, dense)


def test_trained_steps_are_forgotten():
    run = Run(exact, BACKENDS[0])
    for heads in (4, 4):
        run.step(heads)
        assert not run.optimizer._history
    run.step(3)
    run.step(2)
    assert len(run.optimizer._history) == 2
    run.step(4)
    assert not run.optimizer._history


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forward_passes_before_one_backward(backend):
    """The second needs weights that the first has not read; making up for them must not disturb the first's graph."""
    losses = []
    for optimizer in (exact, Dense):
        run = Run(optimizer, backend)
        for heads in (4, 1, 1):
            run.step(heads)
        run.gradients.zero_()
        images, labels = batch(50)
        loss = sum(F.cross_entropy(run.model(images, heads=heads), labels) for heads in (1, 2, 4))
        loss.backward()
        run.optimizer.step()
        losses.append((loss.detach(), run))
    assert torch.equal(losses[0][0], losses[1][0])
    assert_same_runs(losses[0][1], losses[1][1])


def test_backward_after_a_step_raises():
    run = Run(exact, BACKENDS[0])
    images, labels = batch(0)
    loss = F.cross_entropy(run.model(images, heads=2), labels)
    loss.backward(retain_graph=True)
    run.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_that_a_scaler_skips_are_none():
    finished = []
    for optimizer in (exact, Dense):
        run = Run(optimizer, BACKENDS[0])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step, heads in enumerate((4, 1, 2, 1, 1, 3)):
            run.gradients.zero_()
            images, labels = batch(step)
            scaler.scale(F.cross_entropy(run.model(images, heads=heads), labels)).backward()
            if step in (1, 4):
                run.model.head.bias.grad[0] = float("inf")
            scaler.step(run.optimizer)
            scaler.update()
        finished.append(run)
    assert finished[0].optimizer._done == finished[1].optimizer.count == 4
    assert_same_runs(*finished)


def freeze_first_block(model):
    model.blocks[0].requires_grad_(False)
    return two_groups(model)


def test_frozen_parameters_rest():
    for optimizer in (exact, active):
        run = Run(optimizer, BACKENDS[0], groups=freeze_first_block)
        before = copy.deepcopy(run.model.blocks[0].state_dict())
        for heads in (4, 1, 2):
            run.step(heads)
        run.optimizer.flush()
        assert all(torch.equal(value, before[name]) for name, value in run.model.blocks[0].state_dict().items())
        assert not any(p in run.optimizer.state for p in run.model.blocks[0].parameters())


def test_parameters_may_come_later():
    def first_group(model):
        return two_groups(model)[:1]

    run = Run(exact, BACKENDS[0], groups=first_group, averaged=False)
    run.step(2)
    run.step(1)
    late = two_groups(run.model)[1]
    run.optimizer.add_param_group(late)
    run.base.append(late["lr"])
    expected = {p: p.detach().clone() for p in late["params"]}
    run.step(1, clip=None)
    run.optimizer.flush()
    for parameter, before in expected.items():
        before.requires_grad_()
        optimizer = torch.optim.AdamW([before], lr=late["lr"], betas=(0.88, 0.99), eps=1e-8, weight_decay=0.0)
        before.grad = parameter.grad
        optimizer.step()
        torch.testing.assert_close(parameter, before)


@native
@pytest.mark.parametrize("average", [False, True])
def test_dense_is_torchs_to_the_bit(average):
    if (torch.backends.cpu.get_cpu_capability() == "DEFAULT") != (torch.ops.hydravit.cpu_isa() == "portable"):
        pytest.skip("either torch or the kernels have no fused multiply-add here")
    run, theirs = Run(exact, "native", averaged=average), Run(Dense, "native", averaged=average)
    theirs.optimizer = torch.optim.AdamW(two_groups(theirs.model), fused=True, **OPTIONS)
    widths = torch.randint(1, 5, (40,), generator=torch.Generator().manual_seed(0))
    for count, heads in enumerate(widths.tolist()):
        assert torch.equal(run.step(heads), theirs.step(heads))
        if average:
            update = get_ema_multi_avg_fn(ema_decay(count) if count else 0.0)
            update(list(theirs.average.parameters()), list(theirs.model.parameters()), count)
    assert_same(run.model, theirs.model)
    if average:
        assert_same(run.average, theirs.average)


# Saving and going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [exact, active])
@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_in_the_middle(mode, backend):
    whole, first = Run(mode, backend), Run(mode, backend)
    for widths in WIDTHS[:5]:
        whole.step(*widths), first.step(*widths)
    second = Run(mode, backend)
    second.step(3)  # whatever it did before is forgotten, also what it still owes
    for part in ("model", "average", "optimizer"):
        state = pickle.loads(pickle.dumps(getattr(first, part).state_dict()))
        getattr(second, part).load_state_dict(state)
    second.count = first.count
    for widths in WIDTHS[5:]:
        expected = whole.step(*widths)
        assert torch.equal(first.step(*widths), expected) and torch.equal(second.step(*widths), expected)
    for run in (first, second):
        assert_same(run.model, whole.model)
        assert_same(run.average, whole.average)


@pytest.mark.parametrize("into", ["exact", "dense"])
def test_states_of_torchs_adamw_and_ours_are_one(into):
    ours, theirs = Run(exact, BACKENDS[0], averaged=False), Run(Dense, BACKENDS[0], averaged=False)
    theirs.optimizer = torch.optim.AdamW(two_groups(theirs.model), fused=True, **OPTIONS)
    source, target = (theirs, ours) if into == "exact" else (ours, theirs)
    for heads in (4, 1, 2):
        source.step(heads)
    target.model.load_state_dict(source.model.state_dict())
    target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))  # torch's keeps the very tensors
    target.count = source.count
    for heads in (1, 3, 1):
        torch.testing.assert_close(target.step(heads), source.step(heads))
    source_state, target_state = source.optimizer.state_dict()["state"], target.optimizer.state_dict()["state"]
    for index, state in source_state.items():
        assert float(state["step"]) == float(target_state[index]["step"]) == 6.0
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], target_state[index][key], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", [exact, active])
def test_a_new_optimizer_takes_over(mode):
    run, dense = Run(exact, BACKENDS[0], averaged=False), Run(Dense, BACKENDS[0], averaged=False)
    for heads in (4, 1):
        run.step(heads), dense.step(heads)
    old = run.optimizer
    run.optimizer = mode(two_groups(run.model), run.model, **OPTIONS)
    assert_same(run.model, dense.model)
    with pytest.raises(RuntimeError, match="another SliceAdamW"):
        old.step()


# Active -------------------------------------------------------------------------------------------------------------


def elementwise(run, geometries, ages, states):
    """One step of AdamW on whole tensors of counts: entries that no geometry reads keep everything."""
    inside = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in inside.parameters():
            parameter.zero_()
    poison_free = poison(inside, geometries)
    for group in run.optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            name = next(name for name, p in run.model.named_parameters() if p is parameter)
            read = ~poison_free.get_parameter(name).detach().isnan()
            weight, first, second, average = states[name]
            age, grad = ages[name], parameter.grad.double()
            decay = torch.tensor([ema_decay(count) if count else 0.0 for count in range(20)]).double()[age]
            age = age + 1
            new_weight = weight * (1 - group["lr"] * group["weight_decay"])
            new_first = first + (1 - beta1) * (grad - first)
            new_second = beta2 * second + (1 - beta2) * grad * grad
            denominator = new_second.sqrt() / (1 - beta2**age).sqrt() + group["eps"]
            new_weight = new_weight - group["lr"] / (1 - beta1**age) * new_first / denominator
            new_average = average + (1 - decay) * (new_weight - average)
            for old, new in zip(states[name], (new_weight, new_first, new_second, new_average), strict=True):
                old[read] = new[read]
            ages[name][read] += 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["widths", "per image", "separate classifiers", "prefix and suffix", "per layer"])
def test_active_is_adamw_with_a_count_per_entry(case, backend):
    changes, steps = CASES[case]
    # A large epsilon: AdamW divides the rounding of gradients that are zero (those of key biases) by itself otherwise.
    run = Run(active, backend, options={**OPTIONS, "eps": 1e-4}, **changes)
    ages = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in run.model.named_parameters()}
    states = {
        name: (p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double(), p.detach().double())
        for name, p in run.model.named_parameters()
    }
    for widths in steps:
        run.step(*widths)
        geometries = [g for heads in widths for g in run.model.widths(heads, 4).geometries]
        elementwise(run, geometries, ages, states)
    for name, parameter in run.model.named_parameters():
        state = run.optimizer.state[parameter]
        found = (parameter, state["exp_avg"], state["exp_avg_sq"], run.average.get_parameter(name))
        for value, expected in zip(found, states[name], strict=True):
            close = {"rtol": 1e-5, "atol": 1e-6, "msg": lambda m, name=name: f"{name}: {m}"}
            torch.testing.assert_close(value.detach().double(), expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_active_neither_reads_nor_writes_outside(backend):
    run = Run(active, backend)
    run.step(4)
    geometries = [run.model.geometry(2)]
    holders = [poison(module, geometries) for module in (run.model, run.average)]
    for key in ("exp_avg", "exp_avg_sq"):
        holders.append(copy.deepcopy(run.model))
        for name, parameter in run.model.named_parameters():
            state = run.optimizer.state[parameter]
            state[key][parameter.isnan()] = float("nan")
            holders[-1].get_parameter(name).data = state[key]
    before = [copy.deepcopy(holder) for holder in holders]
    run.step(2)
    run.step(1)
    for holder, old in zip(holders, before, strict=True):
        for (name, a), b in zip(holder.named_parameters(), old.parameters(), strict=True):
            bits = [t.detach().view(torch.int32) for t in (a, b)]
            assert torch.equal(bits[0][b.isnan()], bits[1][b.isnan()]), name
            assert torch.equal(a.isnan(), b.isnan()), name
            assert not torch.equal(a, b) or b.isnan().all() or "reg" in name, f"{name} did not move"


def test_active_without_a_forward_moves_nothing():
    run = Run(active, BACKENDS[0])
    before = copy.deepcopy(run.model)
    run.optimizer.step()
    assert_same(run.model, before)


# Regions and threads ------------------------------------------------------------------------------------------------


def test_boxes():
    box, hole = ((0, 4), (0, 6)), ((2, 9), (1, 2))
    assert intersection(box, hole) == ((2, 2), (1, 2)) and intersection(box, ((4, 1), (0, 6))) is None
    rest = subtract(box, [hole])
    cells = torch.zeros(4, 6)
    for (row, rows), (column, columns) in [*rest, intersection(box, hole)]:
        cells[row : row + rows, column : column + columns] += 1
    assert bool((cells == 1).all()) and join([*rest, intersection(box, hole)]) == [box]


def test_rings_have_few_rectangles():
    """However widths come up, a ring is two boxes of a square weight, and a width whose rings are alike is one."""
    run = Run(active, "reference", averaged=False)
    regions, name = run.optimizer._regions, "blocks.0.attn.proj.weight"
    for heads in (3, 1, 4, 2):
        regions.read_by([run.model.geometry(heads)])
    assert sorted(len(region.boxes[name]) for region in regions.all if name in region.boxes) == [1, 2, 2, 2]
    table = regions.table([regions.read_by([run.model.geometry(3)])], 1)
    index = list(run.optimizer._parameters).index(name)
    assert [row[2:] for row in table.tolist() if row[0] == index] == [[0, 24, 32, 24]]


@native
def test_threads_do_not_show(isa, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        run = Run(exact, "native", max_heads=8, mlp_ratio=4.0)
        for heads in (8, 1, 5, 1, 8):
            run.step(heads)
        found.append(run)
    assert sum(p.numel() for p in found[0].model.parameters()) > 2**15  # enough for three threads
    for run in found[1:]:
        assert_same(run.model, found[0].model)


# Wrong input --------------------------------------------------------------------------------------------------------


def test_wrong_options_raise():
    model, other = make_model(), make_model(depth=1)
    for match, error, options in [
        ("mode must be 'exact' or 'active', not 'lazy'", ValueError, {"mode": "lazy"}),
        ("lr must be", ValueError, {"lr": -1.0}),
        ("eps must be", ValueError, {"eps": float("nan")}),
        ("betas must be", ValueError, {"betas": (0.9, 1.0)}),
        ("weight_decay must be", ValueError, {"weight_decay": -0.1}),
        ("ema_decay must be", ValueError, {"ema_decay": 1.5}),
        ("average: its blocks.1", ValueError, {"average": other}),
        ("average: its", ValueError, {"average": make_model().double()}),
        ("average: its cls_token is the model's own", ValueError, {"average": model}),
        ("average must be a copy", TypeError, {"average": torch.optim.swa_utils.AveragedModel(model)}),
    ]:
        with pytest.raises(error, match=match):
            SliceAdamW(model.parameters(), model, **options)
    with pytest.raises(ValueError, match="not one of the model's"):
        SliceAdamW(other.parameters(), model)
    for name in ("amsgrad", "maximize"):
        with pytest.raises(ValueError, match=name):
            SliceAdamW([{"params": model.parameters(), name: True}], model)


def test_wrong_states_raise():
    model = make_model()
    optimizer = SliceAdamW(model.parameters(), model)
    state = torch.optim.AdamW(model.parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of .* has shape \(3,\)"):
        optimizer.load_state_dict(state)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_a_step_needs_gradients_in_place():
    model = make_model()
    optimizer = SliceAdamW(model.parameters(), model)
    with pytest.raises(RuntimeError, match="no gradients in place"):
        optimizer.step()
    gradients = SliceGradients(model)
    model.head.bias.grad = None
    with pytest.raises(RuntimeError, match=r"head\.bias.*is gone"):
        optimizer.step()
    gradients.close()
    with pytest.raises(RuntimeError, match="no gradients in place"):
        optimizer.step()


@native
def test_a_compiled_forward_refuses_weights_that_are_owed_steps():
    torch._dynamo.reset()
    run, dense = Run(exact, "native"), Run(Dense, "native")
    graph = torch.compile(run.model, fullgraph=True, backend="aot_eager")
    images, _ = batch(0)
    for heads in (4, 2):
        with torch.no_grad():
            assert torch.equal(graph(images, heads=heads), dense.model(images, heads=heads))
        run.step(4), dense.step(4)  # the step leaves nothing out
    run.step(1), dense.step(1)
    with torch.no_grad(), pytest.raises(Exception, match="flush"):
        graph(images, heads=4)
    run.optimizer.flush()
    with torch.no_grad():
        assert torch.equal(graph(images, heads=4), dense.model(images, heads=4))
