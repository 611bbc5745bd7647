"""Rows of workloads: wrong peers are refused, every peer gets a row, and costs are what they are."""

import copy
import json

import pytest
import torch
from fake_clock import FakeClock
from small import SMALL

from bench import rows as formats
from bench.measuring import measure as measuring
from bench.measuring.measure import measure
from bench.measuring.peer import Absent, Peer
from bench.measuring.timer import Effort, Timer
from bench.measuring.workloads import Workload
from bench.peers import ours
from bench.peers.eager import PEERS as EAGER
from hydravit.evaluation.cost import costs
from hydravit.inference import with_e4m3_weights

CPU = torch.device("cpu")
QUICK = Effort(rounds=2, most=2, seconds=0.0, attempts=1)
INFERENCE = Workload("inference", (3,), 2, config=SMALL)

pytestmark = pytest.mark.usefixtures("one_thread")


def timer(clock=None, effort=QUICK):
    """Without a clock every sample takes 50 ms."""
    return Timer(CPU, effort, clock or FakeClock(tick=0.05))


def peer(name):
    return next(peer for peer in [*EAGER, *ours.PEERS] if peer.name == name)


def views(model, images, heads):
    return peer("views").inference(model, images, heads)


def wrong(change):
    """The peer ``views`` on a copy of the model to which ``change`` was applied."""

    def inference(model, images, heads):
        model = copy.deepcopy(model)
        with torch.no_grad():
            change(model)
        return views(model, images, heads)

    return Peer("wrong", "a peer with a mistake", inference=inference)


# Correctness before speed ---------------------------------------------------------------------------------------------


def test_a_wrong_peer_is_refused_and_its_error_shown():
    """One weight of many thousands is wrong, by a tenth of its layer's deviation."""

    def change(model):
        model.blocks[1].mlp.fc2.weight[5, 7] += 0.1 * model.blocks[1].mlp.fc2.weight.std()

    right, refused = measure(INFERENCE, [peer("views"), wrong(change)], timer())[::-1]
    assert right["status"] == "measured" and 0 < right["error"] <= right["allowed"]
    assert refused["status"] == "refused" and refused["p50_ms"] is None and refused["ratio"] is None
    assert refused["error"] > refused["allowed"] and f"{refused['error']:.1e}" in refused["reason"]


def test_rounded_weights_are_allowed_what_they_change_and_no_more():
    def change(model):
        model.load_state_dict(with_e4m3_weights(model).state_dict())

    def and_a_mistake(model):
        change(model)
        model.blocks[1].mlp.fc2.weight[5] *= 2  # as if its scale were wrong

    apart = [wrong(c)._replace(name=c.__name__, ours=True, weights="e4m3") for c in (change, and_a_mistake)]
    found = {row["peer"]: row for row in measure(INFERENCE, [peer("views"), *apart, wrong(change)], timer())}
    assert {name: row["status"] for name, row in found.items()} == {
        "views": "measured", "change": "measured", "and_a_mistake": "refused", "wrong": "refused",
    }  # fmt: skip
    assert found["change"]["error"] > found["views"]["allowed"]
    assert found["change"]["weights"] == "e4m3" and formats.baseline(found.values()) is None
    assert found["views"]["mbyte"] - found["change"]["mbyte"] == pytest.approx(3e-6 * costs(SMALL)[3].params)


def test_a_peer_that_goes_wrong_while_it_is_timed_does_not_end_the_run():
    def after_three_calls(change):
        def inference(model, images, heads):
            calls, (run,) = [], views(model, images, heads).values()

            def call():
                calls.append(1)
                return change(run()) if len(calls) > 3 else run()

            return {heads[0]: call}

        return inference

    def breaks(logits):
        raise MemoryError("no more")

    changes = {"drifts": lambda logits: logits + 1, "breaks": breaks}
    peers = [Peer(name, "", inference=after_three_calls(change)) for name, change in changes.items()]
    found = {row["peer"]: row for row in measure(INFERENCE, [*peers, peer("views")], timer())}
    assert found["drifts"]["status"] == "refused" and found["views"]["status"] == "measured"
    assert found["drifts"]["reason"].startswith("after timing, logits at k=3 is off")
    assert (found["breaks"]["status"], found["breaks"]["reason"]) == ("failed", "MemoryError: no more")


# Every peer gets a row ------------------------------------------------------------------------------------------------


def test_every_peer_gets_a_row():
    def broken(model, images, heads):
        raise RuntimeError("it\nbroke")

    def impossible(model, images, heads):
        raise Absent("no such processor")

    others = Peer("broken", "", inference=broken), Peer("impossible", "", inference=impossible), Peer("none", "")
    found = measure(INFERENCE, [peer("views"), *others], timer())
    states = {row["peer"]: (row["status"], row["reason"]) for row in found}
    assert states == {
        "views": ("measured", ""),
        "broken": ("failed", "RuntimeError: it broke"),
        "impossible": ("absent", "no such processor"),
        "none": ("absent", "does not apply"),
    }
    assert all(set(formats.COLUMNS) <= set(row) for row in found)


def test_nothing_is_prepared_after_the_deadline():
    clock = FakeClock(tick=0.05)

    def inference(model, images, heads):
        clock.sleep(5.0)
        return views(model, images, heads)

    peers = [Peer("slow", "", inference=inference), peer("views")]
    found = measure(INFERENCE, peers, timer(clock, QUICK._replace(deadline=4.0)))
    found = {row["peer"]: row for row in found}
    assert found["slow"]["status"] == "measured" and found["slow"]["prepare_s"] == pytest.approx(5.05)
    assert found["views"]["status"] == "skipped" and "no time left to prepare" in found["views"]["reason"]


@pytest.mark.parametrize(
    "task, heads",
    [("switching", (1, 3)), ("mixed", (1, 2)), ("attention", (3,)), ("mlp_backward", (3,)), ("training", (1, 3))],
)
def test_every_task_is_measured(task, heads):
    rows = measure(Workload(task, heads, 2, config=SMALL), [*EAGER, *ours.PEERS], timer())
    states = {row["peer"]: (row["status"], row["reason"]) for row in rows}
    nothing = ("absent", "measured in training only, see native")
    assert states["views"] == states["reference"] == ("measured", "")
    if task in ("switching", "mixed"):
        assert states["extracted"] == ("measured", "")
    if states["native"][0] == "measured":
        assert states["native-inplace"] == (("measured", "") if task == "training" else nothing)
        assert states["native-active"] == (("measured", "") if task == "training" else nothing)
    json.dumps(rows, allow_nan=False)


def test_copied_weight_bytes():
    """Index lists copy three rows' worth of every layer's QKV; views and the kernels copy nothing."""
    found = measure(Workload("copies", (3,), 1, config=SMALL), [*EAGER, *ours.PEERS], timer())
    found = {row["peer"]: row for row in found}
    width = 3 * SMALL.head_dim
    assert found["authors"]["bytes"] >= SMALL.depth * 4 * 3 * width * (width + 1)
    assert found["views"]["bytes"] == found["reference"]["bytes"] == 0
    if found["native"]["status"] == "measured":
        assert found["native"]["bytes"] == 0


def test_memory_is_not_measured_after_the_deadline(monkeypatch):
    clock, given = FakeClock(), []

    def held_bytes(workload, peer, device, seconds):
        given.append(seconds)
        clock.sleep(60.0)
        if seconds < 60.0:
            raise RuntimeError("not ready")
        return 5

    monkeypatch.setattr(measuring, "held_bytes", held_bytes)
    late = timer(clock, QUICK._replace(deadline=100.0))
    found = measure(Workload("memory", (1, 3), 1, config=SMALL), EAGER[:3], late)
    assert [(row["status"], row["bytes"]) for row in found] == [("measured", 5), ("skipped", None), ("skipped", None)]
    assert given == [100.0, 40.0]


# Costs of differing widths --------------------------------------------------------------------------------------------


def test_a_mixed_batch_is_compared_image_by_image_and_with_its_shares():
    """10 ms per image and head: a batch of one width costs 30 or 90 ms, so the images' shares are 10, 30 and 10."""
    clock = FakeClock()

    def inference(model, images, heads):
        closures = views(model, images, heads)

        def call(k):
            clock.sleep(0.010 * k * len(images))
            return closures[k]()

        return {k: (lambda k=k: call(k)) for k in heads}

    def mixed(model, images, heads):
        assert heads == [1, 3, 1]
        single = [views(model, images[i : i + 1], (k,))[k] for i, k in enumerate(heads)]

        def run():
            clock.sleep(0.050 + 0.025)
            return torch.cat([closure() for closure in single])

        return run

    def wrong(model, images, heads):
        return views(model, images, (3,))[3]

    entries = {"one pass": mixed, "in groups": None, "wrong": wrong}
    entries = [Peer(name, "", inference=inference, mixed=closure) for name, closure in entries.items()]
    found = measure(Workload("mixed", (1, 3), 3, config=SMALL), entries, timer(clock))
    found = {row["peer"]: row for row in found}
    assert found["one pass"]["switch_cost"] == pytest.approx(0.5)
    assert found["in groups"]["p50_ms"] == pytest.approx(50) and found["in groups"]["switch_cost"] is None
    assert found["wrong"]["status"] == "refused" and "k=1" in found["wrong"]["reason"]


def test_switching_costs_what_it_costs():
    """A call takes 30 ms, and 15 more if the width is another than in the call before."""
    clock, last = FakeClock(), []

    def inference(model, images, heads):
        closures = views(model, images, heads)

        def call(k):
            clock.sleep(0.030 if last == [k] else 0.045)
            last[:] = [k]
            return closures[k]()

        return {k: (lambda k=k: call(k)) for k in heads}

    workload = Workload("switching", (1, 3), 1, config=SMALL)
    (found,) = measure(workload, [Peer("switches", "", inference=inference)], timer(clock))
    assert found["switch_cost"] == pytest.approx(15 / 30)
    assert found["p50_ms"] == pytest.approx(2 * 45)
