"""The benchmark suite: what it counts, that it refuses wrong peers, and a whole run on a tiny network."""

import copy
import csv
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import SMALL

from bench import agree, results
from bench.check import Reference, Refused
from bench.copies import copied_bytes
from bench.machine import Machine
from bench.measure import measure, measure_copies, measure_memory
from bench.peers import Absent, Peer, ours
from bench.peers.eager import PEERS as EAGER
from bench.run import main
from bench.timer import SPREAD, Effort, Witness, interleave, spread
from bench.workloads import PARTS, Workload, make_images, make_model, needs, workloads
from hydravit import HydraViTConfig
from hydravit.evaluation.cost import costs
from hydravit.inference import with_e4m3_weights

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
QUICK = Effort(rounds=2, most=2, seconds=0.0, attempts=1)
INFERENCE = Workload("inference", (3,), 2, config=SMALL)

pytestmark = pytest.mark.usefixtures("one_thread")


def peer(name):
    return next(peer for peer in [*EAGER, *ours.PEERS] if peer.name == name)


def wrong(change):
    """The peer ``views`` on a copy of the model to which ``change`` was applied."""

    def inference(model, images, heads):
        model = copy.deepcopy(model)
        with torch.no_grad():
            change(model)
        return peer("views").inference(model, images, heads)

    return Peer("wrong", "a peer with a mistake", inference=inference)


def quiet(text):
    pass


# Correctness before speed ---------------------------------------------------------------------------------------------


def test_a_wrong_peer_is_refused_and_its_error_shown():
    """One weight of many thousands, changed by a tenth of its layer's deviation."""

    def change(model):
        model.blocks[1].mlp.fc2.weight[5, 7] += 0.1 * model.blocks[1].mlp.fc2.weight.std()

    right, refused = measure(INFERENCE, [peer("views"), wrong(change)], CPU, QUICK, quiet)[::-1]
    assert right["status"] == "measured" and 0 < right["error"] <= right["allowed"]
    assert refused["status"] == "refused" and refused["p50_ms"] is None and refused["ratio"] is None
    assert refused["error"] > refused["allowed"] and f"{refused['error']:.1e}" in refused["reason"]


def test_one_changed_weight_of_the_full_size_network_is_refused():
    workload = Workload("inference", (3,), 1)
    model = make_model(workload, CPU)
    reference, images = Reference(workload, model), make_images(workload, CPU)
    with torch.inference_mode():
        reference.check(3, {"logits": model(images, heads=3)})
        model.blocks[6].attn.qkv.weight[0, 0] += 1.0
        with pytest.raises(Refused, match="logits at k=3 is off by"):
            reference.check(3, {"logits": model(images, heads=3)})


def test_rounded_weights_are_allowed_what_they_change_and_no_more():
    def change(model):
        model.load_state_dict(with_e4m3_weights(model).state_dict())

    def and_a_mistake(model):
        change(model)
        model.blocks[1].mlp.fc2.weight[5] *= 2  # as if its scale were wrong

    apart = [wrong(c)._replace(name=c.__name__, ours=True, weights="e4m3") for c in (change, and_a_mistake)]
    found = {row["peer"]: row for row in measure(INFERENCE, [peer("views"), *apart, wrong(change)], CPU, QUICK, quiet)}
    assert {name: row["status"] for name, row in found.items()} == {
        "views": "measured", "change": "measured", "and_a_mistake": "refused", "wrong": "refused",
    }  # fmt: skip
    assert found["change"]["error"] > found["views"]["allowed"]
    assert found["change"]["weights"] == "e4m3" and results.baseline(found.values()) is None
    assert found["views"]["mbyte"] - found["change"]["mbyte"] == pytest.approx(3e-6 * costs(SMALL)[3].params)


def test_a_peer_that_goes_wrong_while_it_is_timed_is_refused():
    def inference(model, images, heads):
        calls, (run,) = [], peer("views").inference(model, images, heads).values()

        def drift():
            calls.append(1)
            return run() + (len(calls) > 3)

        return {heads[0]: drift}

    (found,) = measure(INFERENCE, [Peer("drifts", "", inference=inference)], CPU, QUICK, quiet)
    assert found["status"] == "refused" and found["reason"].startswith("after timing, logits at k=3 is off")


def test_a_peer_that_breaks_while_it_is_timed_does_not_end_the_run():
    def inference(model, images, heads):
        calls, (run,) = [], peer("views").inference(model, images, heads).values()

        def breaks():
            calls.append(1)
            if len(calls) > 3:
                raise MemoryError("no more")
            return run()

        return {heads[0]: breaks}

    found = measure(INFERENCE, [Peer("breaks", "", inference=inference), peer("views")], CPU, QUICK, quiet)
    assert {row["peer"]: row["status"] for row in found} == {"breaks": "failed", "views": "measured"}
    assert found[0]["reason"] == "MemoryError: no more"


def test_nothing_is_prepared_after_the_deadline():
    def inference(model, images, heads):
        time.sleep(5.0)
        return peer("views").inference(model, images, heads)

    peers = [Peer("slow", "", inference=inference), peer("views")]
    effort = QUICK._replace(deadline=time.monotonic() + 4.5)
    found = {row["peer"]: row for row in measure(INFERENCE, peers, CPU, effort, quiet)}
    assert found["slow"]["status"] == "measured"
    assert found["views"]["status"] == "skipped" and "no time left to prepare" in found["views"]["reason"]


@pytest.mark.parametrize(
    "outputs, message",
    [
        ({}, "missing or unknown: logits"),
        ({"logits": torch.zeros(2, 9)}, "has shape"),
        ({"logits": torch.full((2, 10), float("nan"))}, "off by inf"),
    ],
)
def test_outputs_of_another_form_are_refused(outputs, message):
    reference = Reference(INFERENCE, make_model(INFERENCE, CPU))
    with pytest.raises(Refused, match=message):
        reference.check(3, outputs)


def test_every_peer_gets_a_row():
    def broken(model, images, heads):
        raise RuntimeError("it\nbroke")

    def impossible(model, images, heads):
        raise Absent("no such processor")

    others = Peer("broken", "", inference=broken), Peer("impossible", "", inference=impossible), Peer("none", "")
    found = measure(INFERENCE, [peer("views"), *others], CPU, QUICK, quiet)
    states = {row["peer"]: (row["status"], row["reason"]) for row in found}
    assert states == {
        "views": ("measured", ""),
        "broken": ("failed", "RuntimeError: it broke"),
        "impossible": ("absent", "no such processor"),
        "none": ("absent", "does not apply"),
    }
    assert all(set(results.COLUMNS) <= set(row) for row in found)


@pytest.mark.parametrize(
    "task, heads",
    [("switching", (1, 3)), ("mixed", (1, 2)), ("attention", (3,)), ("mlp_backward", (3,)), ("training", (1, 3))],
)
def test_every_task_is_measured(task, heads):
    workload = Workload(task, heads, 2, config=SMALL)
    rows = measure(workload, [*EAGER, *ours.PEERS], CPU, QUICK, quiet)
    states = {row["peer"]: (row["status"], row["reason"]) for row in rows}
    nothing = ("absent", "same as native")
    assert states["authors"] == states["views"] == states["reference"] == ("measured", "")
    assert states["alone" if task == "training" else "extracted"] == ("measured", "")
    in_place = task in ("mlp_backward", "training")
    if states["native"][0] == "measured":
        assert states["native-inplace"] == (("measured", "") if in_place else nothing)
        assert states["native-active"] == (("measured", "") if task == "training" else nothing)
    bounds = {row["peer"] for row in rows if row["bound"]}
    assert bounds == {"alone"}
    json.dumps(rows, allow_nan=False)


# Counting -------------------------------------------------------------------------------------------------------------


def test_operations_are_counted():
    """ViT-Ti, ViT-S and ViT-B in the literature's multiply-accumulates; a block is what a network has twelve of."""
    for k, gmacs in ((3, 1.254), (6, 4.599), (12, 17.564)):
        assert needs(Workload("inference", (k,), 1)).flops == pytest.approx(2e9 * gmacs, rel=1e-3)
    network = needs(Workload("inference", (3,), 4)).flops
    blocks = 12 * sum(needs(Workload(kind, (3,), 4)).flops for kind in ("attention", "mlp"))
    stem_and_head = 2 * 4 * 192 * (196 * 768 + 1000)
    assert network == blocks + stem_and_head
    assert needs(Workload("mlp_backward", (3,), 4)).flops == 3 * needs(Workload("mlp", (3,), 4)).flops
    assert needs(Workload("switching", (3, 6), 1)).flops == sum(
        needs(Workload("inference", (k,), 1)).flops for k in (3, 6)
    )


def test_training_alone_moves_the_widths_own_parameters():
    workload = Workload("training", (2,), 4, config=SMALL)
    full, own = (costs(SMALL)[k].params for k in (SMALL.max_heads, 2))
    assert needs(workload).bytes - needs(workload, alone=True).bytes == 28 * (full - own)
    stem = 2 * 4 * 16 * 2 * 16 * 3 * 64  # images, patches, channels of the stream, channels of a patch; no gradient
    assert needs(workload).flops == 3 * needs(Workload("inference", (2,), 4, config=SMALL)).flops - stem


def test_bytes_are_counted():
    params, _ = costs(SMALL)[2]
    images = 2 * 3 * 32 * 32
    assert needs(Workload("inference", (2,), 2, config=SMALL)).bytes == 4 * (params + images + 2 * 10)
    assert needs(Workload("inference", (2,), 2, "bf16", SMALL)).bytes == 2 * (params + images + 2 * 10)


def test_what_tells_most_comes_first():
    found = workloads(PARTS, [3, 6, 12], [1, 8], ["fp32"], "base")
    assert found[:4] == [
        Workload("inference", (3,), 1),
        Workload("inference", (12,), 1),
        Workload("inference", (6,), 1),
        Workload("inference", (3,), 8),
    ]
    assert Workload("training", (3, 6, 12), 8) in found and Workload("memory", (3, 6, 12), 1) in found
    assert len(found) == len(set(found))


def test_copied_weight_bytes():
    """Index lists copy three rows' worth of every layer's QKV; views and the kernels copy nothing."""
    workload = Workload("copies", (3,), 1, config=SMALL)
    found = {row["peer"]: row for row in measure_copies(workload, [*EAGER, *ours.PEERS], CPU, quiet)}
    width = 3 * SMALL.head_dim
    assert found["authors"]["bytes"] >= SMALL.depth * 4 * 3 * width * (width + 1)
    assert found["views"]["bytes"] == found["reference"]["bytes"] == 0
    if "native" in found and found["native"]["status"] == "measured":
        assert found["native"]["bytes"] == 0


def test_a_hidden_copy_is_counted():
    weight = torch.randn(8, 8)
    assert copied_bytes(lambda: torch.ones(1, 4) @ weight[:4, :4], [weight]) == 0
    assert copied_bytes(lambda: torch.ones(1, 4) @ weight[:4, :4].contiguous(), [weight]) == 64
    buffer = torch.empty(4, 4)
    assert copied_bytes(lambda: torch.ones(1, 4) @ buffer.copy_(weight[:4, :4]), [weight]) == 64
    assert copied_bytes(lambda: [buffer[i].copy_(weight[i, :4]) for i in range(4)], [weight]) == 64
    assert copied_bytes(lambda: torch.ones(1, 4).double() @ weight[:4, :4].double(), [weight]) == 128


# Timing ---------------------------------------------------------------------------------------------------------------


def test_closures_take_turns_and_short_ones_go_in_groups():
    calls = []

    def call(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    times = interleave({"long": call("long", 0.12), "short": call("short", 0.004)}, CPU, Effort(3, 3, 0.0, 1))
    assert [len(t.samples) for t in times.values()] == [3, 3]
    assert times["long"].samples == pytest.approx([120] * 3, rel=0.25)
    assert times["short"].samples == pytest.approx([4] * 3, rel=0.5)
    measured = calls[calls.index("short") + 2 :]  # the first calls of each only warm up
    blocks = [name for i, name in enumerate(measured) if i == 0 or measured[i - 1] != name]
    assert blocks.count("long") >= 3 and blocks.count("short") >= 2
    assert measured.count("short") > 6


def test_a_noisy_measurement_is_repeated_and_the_calmest_counts():
    state = {"calls": 0}

    def restless():
        state["calls"] += 1
        time.sleep(0.12 if state["calls"] % 2 or state["calls"] > 12 else 0.2)

    times = interleave({"restless": restless}, CPU, Effort(6, 6, 0.0, 3))["restless"]
    assert times.attempts > 1
    assert spread(times.samples) <= SPREAD


def test_cold_calls_go_alone():
    calls = []
    times = interleave({"a": lambda: calls.append(time.sleep(0.002))}, CPU, Effort(3, 3, 0.0, 1), cold=True)
    assert len(times["a"].samples) == 3 and min(times["a"].samples) >= 2
    assert len(calls) == 2 + 3  # to warm up and to estimate, then one in every round


def test_a_mixed_batch_is_compared_image_by_image_and_with_its_shares():
    """10 ms per image and head: a batch of one width costs 30 or 90 ms, so the images' shares are 10, 30 and 10."""

    def inference(model, images, heads):
        closures = peer("views").inference(model, images, heads)

        def call(k):
            time.sleep(0.010 * k * len(images))
            return closures[k]()

        return {k: (lambda k=k: call(k)) for k in heads}

    def mixed(model, images, heads):
        assert heads == [1, 3, 1]
        single = [peer("views").inference(model, images[i : i + 1], (k,))[k] for i, k in enumerate(heads)]

        def run():
            time.sleep(0.050 + 0.025)
            return torch.cat([closure() for closure in single])

        return run

    def wrong(model, images, heads):
        return peer("views").inference(model, images, (3,))[3]

    workload = Workload("mixed", (1, 3), 3, config=SMALL)
    entries = {"one pass": mixed, "in groups": None, "wrong": wrong}
    entries = [Peer(name, "", inference=inference, mixed=closure) for name, closure in entries.items()]
    found = {row["peer"]: row for row in measure(workload, entries, CPU, Effort(5, 5, 0.0, 3), quiet)}
    assert found["one pass"]["switch_cost"] == pytest.approx(0.5, rel=0.15)
    assert found["in groups"]["p50_ms"] == pytest.approx(50, rel=0.15) and found["in groups"]["switch_cost"] is None
    assert found["wrong"]["status"] == "refused" and "k=1" in found["wrong"]["reason"]


def test_switching_costs_what_it_costs():
    """A call that takes 30 ms, and 15 more where the width is another than in the call before."""
    last = []

    def inference(model, images, heads):
        closures = peer("views").inference(model, images, heads)

        def call(k):
            time.sleep(0.030 if last == [k] else 0.045)
            last[:] = [k]
            return closures[k]()

        return {k: (lambda k=k: call(k)) for k in heads}

    workload = Workload("switching", (1, 3), 1, config=SMALL)
    (found,) = measure(workload, [Peer("switches", "", inference=inference)], CPU, Effort(5, 5, 0.0, 3), quiet)
    # On a busy machine everything takes longer; half of the cost, or a median without it, would be farther off.
    assert found["switch_cost"] == pytest.approx(15 / 30.6, rel=0.3)
    assert found["p50_ms"] == pytest.approx(2 * 45.6, rel=0.3)


@pytest.mark.long
def test_held_memory():
    """Views hold the full model, extraction every width's own weights."""
    config = HydraViTConfig(image_size=32, patch_size=16, depth=12, max_heads=6, head_dim=64, num_classes=10)
    workload = Workload("memory", (3, 6), 1, config=config)
    found = {row["peer"]: row["bytes"] for row in measure_memory(workload, EAGER[:3], CPU, float("inf"), quiet)}
    weights = {k: 4 * cost.params for k, cost in costs(config).items()}
    assert found["views"] == pytest.approx(weights[6], rel=0.25)
    assert found["extracted"] == pytest.approx(weights[3] + weights[6], rel=0.25)
    workload = workload._replace(heads=(6,))
    (late,) = measure_memory(workload, EAGER[:1], CPU, time.monotonic(), quiet)
    assert late["status"] == "skipped"


class Scripted(Witness):
    """Takes the next of ``ms`` in every attempt of three rounds, two calls each, after the two that estimate it."""

    def __init__(self, *ms):
        super().__init__()
        self.best, self.calls, self.ms = 10.0, -2, ms

    def __call__(self):
        self.calls += 1
        time.sleep(self.ms[max(0, min((self.calls - 1) // 6, len(self.ms) - 1))] / 1e3)


def test_an_attempt_while_the_machine_was_slow_is_repeated_and_counts_only_if_all_were():
    run = {"call": lambda: time.sleep(0.002)}
    witness = Scripted(40, 10, 10)
    times = interleave(run, CPU, Effort(3, 3, 0.0, 3), witness=witness)["call"]
    assert times.attempts == 2 and not witness.slow(times.witness)
    witness = Scripted(40)
    times = interleave(run, CPU, Effort(3, 3, 0.0, 2), witness=witness)["call"]
    assert times.attempts == 2 and witness.slow(times.witness)
    assert not Witness().slow(None)


def test_the_deadline_ends_rounds_and_attempts():
    start = time.monotonic()
    effort = Effort(2, 1000, 60.0, 50, deadline=start)
    interleave({"call": lambda: time.sleep(0.001)}, CPU, effort)
    assert time.monotonic() - start < 5


@pytest.mark.long
def test_most_memory_of_a_training_step():
    """Weights, gradients and two moments at least; a peer that keeps more shows it, even where it is let go at once."""
    config = HydraViTConfig(image_size=32, patch_size=16, depth=12, max_heads=6, head_dim=64, num_classes=10)
    workload = Workload("training_memory", (6,), 1, config=config)
    weights = 4 * sum(parameter.numel() for parameter in make_model(workload, CPU).parameters())
    found = {row["peer"]: row["bytes"] for row in measure_memory(workload, EAGER[:3], CPU, float("inf"), quiet)}
    assert 4 * weights < found["views"] < 8 * weights
    assert found["extracted"] is None  # it has no training; that of the extracted network is "alone"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is glibc's malloc")
def test_freed_memory_is_kept():
    """In a process of its own: 48 MB that come and go cost no page any more, even where every page was given back."""
    code = """
import ctypes, resource, torch
from bench.machine import keep_freed_memory
ctypes.CDLL(None).mallopt(-3, 2**17)  # from here on the system is asked for whatever is larger
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(2**21) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""
    given_back, kept = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=ROOT).split())
    assert kept < 200 < 100_000 < given_back


def test_the_machine_shows_its_limits():
    machine = Machine(CPU, ["fp32"])
    machine.probe()
    found = machine.environment()
    assert set(found) == set(results.ENVIRONMENT)
    assert found["peak_gflops"]["fp32"] > 1 and found["bandwidth_gb_s"] > 0.1
    peak_ms, limit = machine.limit_ms("fp32", 1e12, 1)
    assert limit == "peak" and peak_ms == pytest.approx(1e6 / found["peak_gflops"]["fp32"], rel=1e-2)
    assert machine.limit_ms("fp32", 1, 1e12)[1] == "bandwidth"


# A whole run ----------------------------------------------------------------------------------------------------------


ARGUMENTS = "--config tiny --heads 1,3 --batch 1 --peers authors,views,native --rounds 2 --seconds 0 --attempts 1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    parts = ["--parts", "inference,switching,copies", "--name", "suite"]
    assert main([*ARGUMENTS.split(), *parts, "--out", str(out)]) == 0
    return out


def test_a_run_writes_rows_that_stand_alone(finished):
    environment, rows = results.read(finished / "suite.json")
    assert {row["task"] for row in rows} == {"inference", "switching", "copies"}
    assert all(row["status"] == "measured" for row in rows), [row["reason"] for row in rows]
    with open(finished / "suite.csv") as file:
        flat = list(csv.DictReader(file))
    assert len(flat) == len(rows)
    assert all(row["torch"] == torch.__version__ and row["threads"] == str(torch.get_num_threads()) for row in flat)
    timed = [row for row in rows if row["task"] == "inference"]
    assert all(0 < row["share"] <= 1 and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in timed)
    assert all((row["ratio"] is None) == (row["peer"] == "native") for row in timed)
    assert "<html" in (finished / "suite.html").read_text()


def test_an_impossible_share_fails_the_run(finished, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "limit_ms", lambda *_: (1e6, "peak"))
    out = finished / "impossible"
    arguments = ARGUMENTS.replace("1,3", "1")
    assert main([*arguments.split(), "--parts", "inference", "--out", str(out)]) == 1
    assert "% of the limit" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.run.measure_copies", interrupt)
    assert main([*ARGUMENTS.split(), "--parts", "inference,copies", "--out", str(tmp_path)]) == 130
    _, rows = results.read(tmp_path / "inference-copies.json")
    assert len(rows) == 6 and (tmp_path / "inference-copies.html").exists()


def test_what_no_time_was_left_for_is_named(tmp_path):
    assert main([*ARGUMENTS.split(), "--parts", "inference", "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    _, rows = results.read(tmp_path / "suite.json")
    assert {row["status"] for row in rows} == {"skipped"} and len(rows) == 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--parts speed", "--parts 'speed'"),
        ("--heads 13", "must be in 1..12"),
        ("--batch 0", "--batch '0'"),
        ("--dtype int8", "--dtype 'int8'"),
        ("--peers nobody", "--peers 'nobody'"),
        ("--config huge", "huge"),
        ("--device cuda", "no CUDA device"),
        ("--device cuda:1", "expected cpu or cuda"),
        ("--device meta", "expected cpu or cuda"),
        ("--threads -1", "--threads must be positive"),
        ("--minutes 0", "--minutes must be positive"),
        ("--rounds 0", "--rounds must be positive"),
        ("--seconds -1", "--seconds must not be negative"),
        ("--trained nowhere.json", "nowhere.json"),
        ("--out /proc/nowhere", "/proc/nowhere"),
    ],
)
def test_wrong_input_is_named(arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_two_runs_are_compared(finished, tmp_path, capsys):
    environment, rows = results.read(finished / "suite.json")
    path = str(finished / "suite.json")
    assert agree.main([path, path]) == 0
    ratios = [row for row in rows if row["ratio"] is not None]
    for row in ratios:
        row["noisy"], row["ratio"] = True, row["ratio"] * 1.1
    results.write(tmp_path, "other", environment, rows)
    other = str(tmp_path / "other.json")
    assert agree.main([path, other]) == 1
    assert "10 % apart, marked noisy" in capsys.readouterr().out
    for row in (more := ratios * 4):
        row["noisy"], row["ratio"] = False, 2.0
    for noisy, code in ((True, 0), (False, 1)):  # one of many is apart
        many = [{**row, "batch": index} for index, row in enumerate(more)]
        results.write(tmp_path, "first", environment, many)
        many[0].update(ratio=3.0, noisy=noisy)
        results.write(tmp_path, "other", environment, many)
        assert agree.main([str(tmp_path / "first.json"), other]) == code
    (tmp_path / "empty.json").write_text(json.dumps({"environment": {}, "rows": []}))
    assert agree.main([path, str(tmp_path / "empty.json")]) == 2
