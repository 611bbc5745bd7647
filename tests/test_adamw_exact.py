"""AdamW on the slice, mode "exact": what dense AdamW makes of everything, bit by bit, whenever somebody looks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from adamw_runs import (
    BACKENDS,
    CASES,
    OPTIONS,
    WIDTHS,
    Dense,
    Run,
    assert_same,
    assert_same_runs,
    batch,
    ema_decay,
    exact,
    two_groups,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hydravit.checkpoint import extract
from hydravit.training import adamw as slice_adamw

pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not there")


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
