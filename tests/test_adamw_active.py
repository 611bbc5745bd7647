"""AdamW on the slice, mode "active": what no step trains rests; and the regions that share a history."""

import copy

import pytest
import torch
from adamw_runs import BACKENDS, CASES, OPTIONS, Run, active, assert_same, ema_decay
from small import poison

from hydravit.training.regions import intersection, join, subtract

pytestmark = pytest.mark.usefixtures("one_thread")


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
    geometries = [run.model.subnetwork(2)]
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


# Regions ------------------------------------------------------------------------------------------------------------


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
        regions.read_by([run.model.subnetwork(heads)])
    assert sorted(len(region.boxes[name]) for region in regions.all if name in region.boxes) == [1, 2, 2, 2]
    table = regions.table([regions.read_by([run.model.subnetwork(3)])], 1)
    assert table is regions.table([regions.read_by([run.model.subnetwork(3)])], 1)  # backends keep what they make of it
    index = list(run.optimizer._parameters).index(name)
    assert [row[2:] for row in table.tolist() if row[0] == index] == [[0, 24, 32, 24]]
