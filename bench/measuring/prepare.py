"""Makes a peer ready to be timed: set up at every width, compared with the reference, perhaps captured."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measuring.check import Reference
from bench.measuring.clock import Clock
from bench.measuring.cuda_graph import captured
from bench.measuring.peer import Absent, Peer, Step, offered
from bench.measuring.workloads import Workload, images_of, make_images, make_labels, make_residual
from hydravit import HydraViT

CYCLES = 2  # switching: how often each width is called, one after the other or in turns
REPLAYS_COMPARED = ("inference", "switching", "mixed")


class Ready(NamedTuple):
    """A peer that is set up, whose outputs are right, launched one way."""

    peer: Peer
    launch: str  # "call" or "graph"
    runs: dict[int, Callable[[], Any]]  # per width
    outputs: Mapping[int, Callable[[], dict[str, Tensor]]]  # per width; compared again after the timing
    variants: dict[str, Callable[[], object]]  # what is timed
    facts: dict  # columns of its row that are known before the timing


def ready_calls(workload: Workload, peer: Peer, model: HydraViT, reference: Reference, clock: Clock) -> Ready:
    """The peer as plain calls. Raises ``Absent``, ``Refused``, or whatever the peer raises."""
    start = clock.now()
    steps = _set_up(workload, peer, model)
    facts = {"prepare_s": clock.now() - start}
    outputs = {k: step.outputs for k, step in steps.items()}
    runs = {k: step.run for k, step in steps.items()}
    facts |= check(reference, peer, outputs)
    alone = {str(k): step.alone for k, step in steps.items() if step.alone is not None}
    return Ready(peer, "call", runs, outputs, {**_variants(workload, runs), **alone}, facts)


def ready_graphs(workload: Workload, calls: Ready, reference: Reference, device: torch.device) -> Ready:
    """The same peer as replays of CUDA graphs.

    Raises ``Absent`` for a call that no graph can hold, ``Refused`` for a replay whose logits are wrong. Replays with
    gradients leave nothing to compare.
    """
    if calls.peer.uncapturable:
        raise Absent(calls.peer.uncapturable)
    try:
        by_run: dict[Callable, Callable[[], Any]] = {
            run: captured(run, device) for run in dict.fromkeys(calls.runs.values())
        }
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # a failed capture may leave its error behind
            torch.cuda.synchronize(device)
        raise Absent(f"cannot be captured: {one_line(error)}") from error
    replays = {k: by_run[run] for k, run in calls.runs.items()}
    outputs: dict[int, Callable[[], dict[str, Tensor]]] = {}
    if workload.task in REPLAYS_COMPARED:
        outputs = {k: partial(_logits, workload, k, replay) for k, replay in replays.items()}
        with torch.inference_mode():
            for replay in replays.values():
                replay().fill_(float("nan"))  # else the logits of the capture would pass for those of a replay
        check(reference, calls.peer, outputs)
    return Ready(calls.peer, "graph", replays, outputs, _variants(workload, replays), calls.facts)


def check(reference: Reference, peer: Peer, outputs: Mapping[int, Callable[[], dict[str, Tensor]]]) -> dict:
    """The worst error of all widths, and the allowed one. Raises ``Refused``."""
    errors = [reference.check(k, compute(), peer.weights == "e4m3") for k, compute in outputs.items()]
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    return {"error": error, "allowed": allowed}


def one_line(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _set_up(workload: Workload, peer: Peer, model: HydraViT) -> dict[int, Step]:
    """The peer's steps per width. Raises ``Absent``, or whatever the peer raises."""
    device = model.pos_embed.device
    kind, _, backward = workload.task.partition("_")
    if kind in ("inference", "switching", "mixed"):
        set_up, images = offered(peer, peer.inference), make_images(workload, device)
        if kind == "mixed":
            runs, alone = _set_up_mixed(workload, peer, model, images)
        else:
            runs, alone = set_up(model, images, workload.heads), {}
        return {k: Step(run, partial(_logits, workload, k, run), alone.get(k)) for k, run in runs.items()}
    if kind in ("attention", "mlp"):
        set_up, (x, grad) = offered(peer, peer.block), make_residual(workload, device)
        return {workload.heads[0]: set_up(model, kind, workload.heads[0], x, grad if backward else None)}
    set_up, labels = offered(peer, peer.training), make_labels(workload, device)
    return set_up(model, make_images(workload, device), labels, workload.heads, workload.autocast)


def _set_up_mixed(workload: Workload, peer: Peer, model: HydraViT, images: Tensor) -> tuple[dict, dict]:
    """Per width the closure that computes its images, perhaps one for all widths, and the whole batch at that width."""
    inference = offered(peer, peer.inference)
    if peer.mixed is None:
        parts = {k: images[images_of(workload, k)].contiguous() for k in workload.heads}
        return {k: inference(model, part, (k,))[k] for k, part in parts.items()}, {}
    turns = itertools.islice(itertools.cycle(workload.heads), workload.batch)
    run = peer.mixed(model, images, list(turns))
    return dict.fromkeys(workload.heads, run), inference(model, images, workload.heads)


def _logits(workload: Workload, heads: int, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Logits of the width's images; ``run`` returns them alone or with the others of the batch."""
    logits = run()
    return {"logits": logits[images_of(workload, heads)] if len(logits) == workload.batch else logits}


def _variants(workload: Workload, runs: dict[int, Callable]) -> dict[str, Callable]:
    """The closures to time: one call; of several widths one each; in switching as many calls with and without it."""
    closures = list(dict.fromkeys(runs.values()))  # one may serve all widths
    if workload.task == "switching":
        steady = [run for run in closures for _ in range(CYCLES)]
        return {"": _sequence(closures * CYCLES), "steady": _sequence(steady)}
    return {"": closures[0] if len(closures) == 1 else _sequence(closures)}


def _sequence(closures: list[Callable]) -> Callable[[], None]:
    def run():
        for closure in closures:
            closure()

    return run
