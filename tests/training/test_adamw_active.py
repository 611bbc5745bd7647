"""AdamW on the slice: what no step trains rests; and the regions that took part in the same steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from adamw_runs import BACKENDS, CASES, OPTIONS, Run, assert_same, batch, dense, ema_decay
from small import poison
from torch.optim.swa_utils import get_ema_multi_avg_fn

pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not there")


def elementwise(run, subnetworks, ages, states):
    """One step of AdamW on whole tensors of counts: entries that no subnetwork reads keep everything."""
    inside = copy.deepcopy(run.model)
    with torch.no_grad():
        for parameter in inside.parameters():
            parameter.zero_()
    poison_free = poison(inside, subnetworks)
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
@pytest.mark.parametrize("case", CASES)
def test_it_is_adamw_with_a_count_per_entry(case, backend):
    changes, steps = CASES[case]
    # A large epsilon: AdamW divides the rounding of gradients that are zero (those of key biases) by itself otherwise.
    run = Run(backend, options={**OPTIONS, "eps": 1e-4}, **changes)
    ages = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in run.model.named_parameters()}
    states = {
        name: (p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double(), p.detach().double())
        for name, p in run.model.named_parameters()
    }
    for widths in steps:
        run.step(*widths)
        subnetworks = [g for heads in widths for g in run.model.select(heads, 4).subnetworks]
        elementwise(run, subnetworks, ages, states)
    for name, parameter in run.model.named_parameters():
        state = run.optimizer.state[parameter]
        found = (parameter, state["exp_avg"], state["exp_avg_sq"], run.average.get_parameter(name))
        for value, expected in zip(found, states[name], strict=True):
            close = {"rtol": 1e-5, "atol": 1e-6, "msg": lambda m, name=name: f"{name}: {m}"}
            torch.testing.assert_close(value.detach().double(), expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_neither_reads_nor_writes_outside(backend):
    run = Run(backend)
    run.step(4)
    subnetworks = [run.model.subnetwork(2)]
    holders = [poison(module, subnetworks) for module in (run.model, run.average)]
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


def test_without_a_forward_nothing_moves():
    run = Run(BACKENDS[0])
    before = copy.deepcopy(run.model)
    run.optimizer.step()
    assert_same(run.model, before)


@native
@pytest.mark.parametrize("averaged", [False, True])
def test_at_the_full_width_it_is_torchs_to_the_bit(averaged):
    if (torch.backends.cpu.get_cpu_capability() == "DEFAULT") != (torch.ops.hydravit.cpu_isa() == "portable"):
        pytest.skip("either torch or the kernels have no fused multiply-add here")
    run, theirs = Run("native", averaged=averaged), Run("native", dense, averaged=averaged)
    for count in range(12):
        assert torch.equal(run.step(4), theirs.step(4))
        if averaged:
            update = get_ema_multi_avg_fn(ema_decay(count) if count else 0.0)
            update(list(theirs.average.parameters()), list(theirs.model.parameters()), count)
    assert_same(run.model, theirs.model)
    if averaged:
        assert_same(run.average, theirs.average)


@native
def test_threads_do_not_show(isa, threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        run = Run("native", max_heads=8, mlp_ratio=4.0)
        for heads in (8, 1, 5, 1, 8):
            run.step(heads)
        found.append(run)
    assert sum(p.numel() for p in found[0].model.parameters()) > 2**15  # enough for three threads
    for run in found[1:]:
        assert_same(run.model, found[0].model)


def test_backward_after_a_step_raises():
    run = Run(BACKENDS[0])
    images, labels = batch(0)
    loss = F.cross_entropy(run.model(images, heads=2), labels)
    loss.backward(retain_graph=True)
    run.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_that_a_scaler_skips_are_none():
    run = Run(BACKENDS[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, heads in enumerate((4, 1, 2, 1, 1, 3)):
        before = copy.deepcopy((run.model, run.average))
        run.gradients.zero_()
        images, labels = batch(step)
        scaler.scale(F.cross_entropy(run.model(images, heads=heads), labels)).backward()
        if step in (1, 4):
            run.model.head.bias.grad[0] = float("inf")
        scaler.step(run.optimizer)
        scaler.update()
        if step in (1, 4):
            assert_same(run.model, before[0]), assert_same(run.average, before[1])
    assert {region.age for region in run.optimizer._regions.all} == {1, 2, 3, 4}


# Regions ------------------------------------------------------------------------------------------------------------


def test_rings_have_few_rectangles():
    """In whatever order widths appear, a ring is two boxes of a square weight, and rings of one age are joined."""
    run = Run("reference", averaged=False)
    regions, name = run.optimizer._regions, "blocks.0.attn.proj.weight"
    index = list(run.optimizer._parameters).index(name)

    def table(heads):
        by_age = regions.read_by(frozenset([run.model.subnetwork(heads)]))
        return regions.table(by_age.values())

    def rectangles(heads):
        return [row[1:] for row in table(heads).tolist() if row[0] == index]

    for heads in (3, 1, 4, 2):
        table(heads)
    assert sorted(len(region.boxes[name]) for region in regions.all if name in region.boxes) == [1, 2, 2, 2]
    assert table(3) is table(3)  # backends keep what they derive from it
    assert rectangles(3) == [[0, 0, 24, 32, 24]]
    run.step(2)
    assert rectangles(2) == [[0, 0, 16, 32, 16]]
    assert sorted(rectangles(3)) == [[0, 0, 16, 32, 16], [1, 16, 16, 32, 8], [1, 512, 8, 32, 24]]
