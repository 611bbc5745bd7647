"""AdamW on the slice: which parameters, saving and going on, other optimizers before and after, wrong input."""

import copy
import pickle

import pytest
import torch
from adamw_runs import BACKENDS, WIDTHS, Run, assert_same, dense, make_model, two_groups

from hydravit.training import SliceAdamW, SliceGradients

pytestmark = pytest.mark.usefixtures("one_thread")


def freeze_first_block(model):
    model.blocks[0].requires_grad_(False)
    return two_groups(model)


def test_frozen_parameters_rest():
    run = Run(BACKENDS[0], groups=freeze_first_block)
    before = copy.deepcopy(run.model.blocks[0].state_dict())
    for heads in (4, 1, 2):
        run.step(heads)
    assert all(torch.equal(value, before[name]) for name, value in run.model.blocks[0].state_dict().items())
    assert not any(p in run.optimizer.state for p in run.model.blocks[0].parameters())


def test_parameters_may_come_later():
    def first_group(model):
        return two_groups(model)[:1]

    run = Run(BACKENDS[0], groups=first_group, averaged=False)
    run.step(2)
    run.step(1)
    late = two_groups(run.model)[1]
    run.optimizer.add_param_group(late)
    run.base.append(late["lr"])
    expected = {p: p.detach().clone() for p in late["params"]}
    run.step(4, clip=None)
    for parameter, before in expected.items():
        before.requires_grad_()
        optimizer = torch.optim.AdamW([before], lr=late["lr"], betas=(0.88, 0.99), eps=1e-8, weight_decay=0.0)
        before.grad = parameter.grad
        optimizer.step()
        torch.testing.assert_close(parameter, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_in_the_middle(backend):
    whole, first = Run(backend), Run(backend)
    for widths in WIDTHS[:5]:
        whole.step(*widths), first.step(*widths)
    second = Run(backend)
    second.step(3)  # it forgets whatever it did before
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


@pytest.mark.parametrize("into", ["ours", "torch's"])
def test_states_of_torchs_adamw_and_ours_are_one(into):
    ours, theirs = Run(BACKENDS[0], averaged=False), Run(BACKENDS[0], dense, averaged=False)
    source, target = (theirs, ours) if into == "ours" else (ours, theirs)
    for _ in range(3):
        source.step(4)
    target.model.load_state_dict(source.model.state_dict())
    target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))  # torch's keeps the very tensors
    target.count = source.count
    for _ in range(3):
        torch.testing.assert_close(target.step(4), source.step(4))
    source_state, target_state = source.optimizer.state_dict()["state"], target.optimizer.state_dict()["state"]
    for index, state in source_state.items():
        assert float(state["step"]) == float(target_state[index]["step"]) == 6.0
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[key], target_state[index][key], rtol=1e-3, atol=1e-6)


# Wrong input --------------------------------------------------------------------------------------------------------


def test_wrong_options_raise():
    model, other = make_model(), make_model(depth=1)
    for match, error, options in [
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
