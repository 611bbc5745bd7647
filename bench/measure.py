"""One workload, all peers: set up, compared, then timed in turns. Every peer gets a row, also one that cannot run."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check import Reference, Refused
from bench.copies import copied_bytes
from bench.machine import precision
from bench.memory import SECONDS, held_bytes
from bench.peers import Absent, Peer, Step
from bench.results import AGREEMENT, COLUMNS, baseline
from bench.timer import SPREAD, Broken, Effort, Times, Witness, captured, interleave, quantiles, spread
from bench.workloads import DTYPES, Workload, images_of, make_images, make_labels, make_model, make_stream, needs
from hydravit import HydraViT

_CYCLES = 2  # in switching, how often each width is called, one after the other or in turns
_REPLAYS_COMPARED = ("inference", "switching", "mixed")
Progress = Callable[[str], None]


class _Ready(NamedTuple):
    """A peer, set up and right, launched one way."""

    peer: Peer
    launch: str
    outputs: dict[int, Callable[[], dict[str, Tensor]]]  # per width what is compared again after the timing
    variants: dict[str, Callable[[], object]]  # what is timed
    facts: dict  # with which its row begins


def row(workload: Workload, peer: Peer, status: str, reason: str = "", launch: str = "call", **values) -> dict:
    """A row of ``results.COLUMNS``; what is not given is None."""
    floating, moved = needs(workload, peer.bound, peer.pooled_only, 1 if peer.weights == "e4m3" else None)
    return {
        **dict.fromkeys(COLUMNS),
        "task": workload.task,
        "config": workload.model,
        "heads": ",".join(map(str, workload.heads)),
        "batch": workload.batch,
        "dtype": workload.dtype,
        "cache": "cold" if workload.cold else "warm",
        "launch": launch,
        "peer": peer.name,
        "about": peer.about,
        "weights": peer.weights,
        "ours": peer.ours,
        "bound": peer.bound,
        "status": status,
        "reason": reason,
        "gflop": floating / 1e9,
        "mbyte": moved / 1e6,
        "peer_version": peer.version,
        **values,
    }


def measure(
    workload: Workload,
    peers: Sequence[Peer],
    device: torch.device,
    effort: Effort,
    progress: Progress,
    witness: Witness | None = None,
) -> list[dict]:
    """Rows of one timed workload: inference, a block, training, switching or mixed widths."""
    rows, ready = [], []
    with precision(workload.dtype):
        progress("reference")
        try:
            model = make_model(workload, device)
            reference = Reference(workload, model)
        except Exception as error:
            return [row(workload, peer, "failed", f"the reference: {one_line(error)}") for peer in peers]
        for index, peer in enumerate(peers):
            progress(f"{peer.name}, {index + 1} of {len(peers)}")
            if time.monotonic() > effort.deadline:
                rows.append(row(workload, peer, "skipped", "no time left to prepare it"))
                continue
            try:
                start = time.perf_counter()
                steps = _set_up(peer, workload, model)
                prepared, outputs = time.perf_counter() - start, {k: step.outputs for k, step in steps.items()}
                facts = {"prepare_s": prepared, **_check(reference, peer, outputs)}
            except Exception as error:
                rows.append(_reason_row(workload, peer, error))
                continue
            runs = {k: step.run for k, step in steps.items()}
            alone = {str(k): step.alone for k, step in steps.items() if step.alone is not None}
            ready.append(_Ready(peer, "call", outputs, {**_variants(workload, runs), **alone}, facts))
            if device.type == "cuda":
                try:
                    ready.append(_graph(workload, peer, runs, reference, facts, device))
                except Exception as error:
                    rows.append(_reason_row(workload, peer, error, "graph"))
        times = _time(workload, ready, device, effort, witness, progress, rows)
        if workload.task != "training":  # which has changed its weights
            _check_again(workload, ready, reference, rows)
    return rows + _timed_rows(workload, ready, times)


def _set_up(peer: Peer, workload: Workload, model: HydraViT) -> dict[int, Step]:
    """The peer's closures per width. Raises ``Absent``, or whatever the peer raises."""
    device = model.pos_embed.device
    kind, _, backward = workload.task.partition("_")
    if kind in ("inference", "switching", "mixed"):
        _offered(peer, peer.inference)
        images = make_images(workload, device)
        if kind == "mixed":
            runs, alone = _set_up_mixed(peer, workload, model, images)
        else:
            runs, alone = peer.inference(model, images, workload.heads), {}
        return {k: Step(run, partial(_logits, workload, k, run), alone.get(k)) for k, run in runs.items()}
    if kind in ("attention", "mlp"):
        _offered(peer, peer.block)
        x, grad = make_stream(workload, device)
        return {workload.heads[0]: peer.block(model, kind, workload.heads[0], x, grad if backward else None)}
    _offered(peer, peer.training)
    amp = DTYPES[workload.dtype] if workload.dtype in ("bf16", "fp16") else None
    return peer.training(model, make_images(workload, device), make_labels(workload, device), workload.heads, amp)


def _set_up_mixed(peer: Peer, workload: Workload, model: HydraViT, images: Tensor) -> tuple[dict, dict]:
    """Per width the closure that its images are in, perhaps the same for all, and the whole batch at that width."""
    if peer.mixed is None:
        parts = {k: images[images_of(workload, k)].contiguous() for k in workload.heads}
        return {k: peer.inference(model, part, (k,))[k] for k, part in parts.items()}, {}
    turns = itertools.islice(itertools.cycle(workload.heads), workload.batch)
    run = peer.mixed(model, images, list(turns))
    return dict.fromkeys(workload.heads, run), peer.inference(model, images, workload.heads)


def _logits(workload: Workload, heads: int, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Those of the width's images; ``run`` gives them alone or with the others of the batch."""
    logits = run()
    return {"logits": logits[images_of(workload, heads)] if len(logits) == workload.batch else logits}


def _check(reference: Reference, peer: Peer, outputs: dict[int, Callable[[], dict[str, Tensor]]]) -> dict:
    """The worst error of all widths and what is allowed. Raises ``Refused``."""
    errors = [reference.check(k, compute(), peer.weights == "e4m3") for k, compute in outputs.items()]
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    return {"error": error, "allowed": allowed}


def _check_again(workload: Workload, ready: list[_Ready], reference: Reference, rows: list[dict]) -> None:
    """Who is wrong after the timing gets a row that says so, and no time."""
    for entry in list(ready):
        try:
            if entry.outputs:
                _check(reference, entry.peer, entry.outputs)
        except Exception as error:
            ready.remove(entry)
            found = _reason_row(workload, entry.peer, error, entry.launch)
            rows.append({**found, "reason": f"after timing, {found['reason']}"})


def _reason_row(workload: Workload, peer: Peer, error: Exception, launch: str = "call") -> dict:
    """Why there is no time. A peer is foreign code: whatever it raises becomes a row and does not end the run."""
    if isinstance(error, Absent):
        return row(workload, peer, "absent", str(error), launch)
    if isinstance(error, Refused):
        known = {"error": error.error, "allowed": error.allowed} if math.isfinite(error.error) else {}
        return row(workload, peer, "refused", str(error), launch, **known)
    return row(workload, peer, "failed", one_line(error), launch)


def _time(
    workload: Workload,
    ready: list[_Ready],
    device: torch.device,
    effort: Effort,
    witness: Witness | None,
    progress: Progress,
    rows: list[dict],
) -> dict[tuple[str, str, str], Times]:
    """By peer, launch and variant. Who breaks gets a row and is left out."""
    while True:
        closures = {(e.peer.name, e.launch, variant): run for e in ready for variant, run in e.variants.items()}
        try:
            return interleave(closures, device, effort, cold=workload.cold, witness=witness, progress=progress)
        except Broken as broken:
            entry = next(e for e in ready if (e.peer.name, e.launch) == broken.name[:2])
            ready.remove(entry)
            rows.append(_reason_row(workload, entry.peer, broken.__cause__, entry.launch))
            if device.type == "cuda":
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()


def _offered(peer: Peer, set_up: Callable | None) -> None:
    if set_up is None:
        raise Absent(peer.without)


def _graph(
    workload: Workload, peer: Peer, runs: dict[int, Callable], reference: Reference, facts: dict, device: torch.device
) -> _Ready:
    """The peer as replays of CUDA graphs. Raises ``Absent`` for what no graph can hold, ``Refused`` for a replay whose
    logits are wrong; what has gradients leaves nothing to compare."""
    if peer.uncapturable:
        raise Absent(peer.uncapturable)
    try:
        by_run = {run: captured(run, device) for run in dict.fromkeys(runs.values())}
        replays = {k: by_run[run] for k, run in runs.items()}
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # a failed capture may leave its error behind
            torch.cuda.synchronize(device)
        raise Absent(f"cannot be captured: {one_line(error)}") from error
    outputs = {}
    if workload.task in _REPLAYS_COMPARED:
        outputs = {k: partial(_logits, workload, k, replay) for k, replay in replays.items()}
        with torch.inference_mode():
            for replay in replays.values():
                replay().fill_(float("nan"))  # what the capture left there would pass
        _check(reference, peer, outputs)
    return _Ready(peer, "graph", outputs, _variants(workload, replays), facts)


def _variants(workload: Workload, runs: dict[int, Callable]) -> dict[str, Callable]:
    """What is timed: one call; of a mix, one step of every width; of switching, as many calls with and without."""
    closures = list(dict.fromkeys(runs.values()))  # one may serve all widths
    if workload.task == "switching":
        steady = [run for run in closures for _ in range(_CYCLES)]
        return {"": _sequence(closures * _CYCLES), "steady": _sequence(steady)}
    return {"": closures[0] if len(closures) == 1 else _sequence(closures)}


def _sequence(closures: list[Callable]) -> Callable[[], None]:
    def run():
        for closure in closures:
            closure()

    return run


def _timed_rows(workload: Workload, ready: list[_Ready], times: dict[tuple[str, str, str], Times]) -> list[dict]:
    rows = []
    for peer, launch, _, _, facts in ready:
        reason = "" if launch == "call" or workload.task in _REPLAYS_COMPARED else "its replays were not compared"
        found = times[peer.name, launch, ""]
        values = {**facts, "samples": len(found.samples), "attempts": found.attempts}
        values["witness_ms"] = found.witness
        cycles = 1
        if workload.task == "switching":
            cycles, steady = _CYCLES, times[peer.name, launch, "steady"].samples
            _, ratio, _ = quantiles([with_it / without for with_it, without in zip(found.samples, steady, strict=True)])
            # Steady, one call in so many switches all the same: the ratio is n (call + cost) / (n call + cost).
            values["switch_cost"] = _CYCLES * (ratio - 1.0) / (_CYCLES - ratio)
        if workload.task == "mixed" and (peer.name, launch, str(workload.heads[0])) in times:
            alone = torch.tensor([times[peer.name, launch, str(k)].samples for k in workload.heads])
            images = [len(range(workload.batch)[images_of(workload, k)]) for k in workload.heads]
            shares = (torch.tensor(images, dtype=alone.dtype) @ alone / workload.batch).tolist()
            ratios = [ms / share for ms, share in zip(found.samples, shares, strict=True)]
            values["switch_cost"] = quantiles(ratios)[1] - 1.0
        values["times_ms"] = [round(ms / cycles, 5) for ms in found.samples]  # in JSON only
        values["p20_ms"], values["p50_ms"], values["p80_ms"] = quantiles(values["times_ms"])
        values["wall_ms"] = quantiles(found.wall)[1] / cycles if found.wall else None
        values["noisy"] = spread(found.samples) > SPREAD
        rows.append(row(workload, peer, "measured", reason, launch, **values))
    _add_ratios(rows)
    return rows


def _add_ratios(rows: list[dict]) -> None:
    """Times by those of ours in the same rounds; ours launched likewise where it can be."""
    own = baseline(rows)
    ours = {entry["launch"]: entry for entry in rows if entry["peer"] == own}
    for entry in rows:
        mine = ours.get(entry["launch"]) or ours.get("call")
        if mine is None or entry["peer"] == own:
            continue
        ratios = [theirs / our for theirs, our in zip(entry["times_ms"], mine["times_ms"], strict=True)]
        entry["ratio_p20"], entry["ratio"], entry["ratio_p80"] = quantiles(ratios)
        entry["noisy"] = entry["noisy"] or spread(ratios) > AGREEMENT


def measure_memory(
    workload: Workload, peers: Sequence[Peer], device: torch.device, deadline: float, progress: Progress
) -> list[dict]:
    """Rows of the memory that each peer holds to have every width ready, or needs in training; nothing is begun after
    ``deadline``."""
    rows = []
    for peer in peers:
        left = min(deadline - time.monotonic(), SECONDS)
        if left > 0:
            held = partial(held_bytes, workload, peer.name, device, left)
            found = _counted(workload, peer, held, progress)
            late = found["status"] == "failed" and time.monotonic() >= deadline
            rows.append(row(workload, peer, "skipped", "no time left") if late else found)
        else:
            rows.append(row(workload, peer, "skipped", "no time left"))
    return rows


def measure_copies(workload: Workload, peers: Sequence[Peer], device: torch.device, progress: Progress) -> list[dict]:
    """Rows of the weight bytes that a call of each peer copies."""
    model, images = make_model(workload, device), make_images(workload, device)

    def count(peer: Peer) -> int:
        _offered(peer, peer.inference)
        if peer.opaque:
            raise Absent("its operators are hidden from PyTorch, so its copies cannot be counted")
        (run,) = peer.inference(model, images, workload.heads).values()
        return copied_bytes(run, model.parameters())

    return [_counted(workload, peer, partial(count, peer), progress) for peer in peers]


def _counted(workload: Workload, peer: Peer, count: Callable[[], int], progress: Progress) -> dict:
    progress(peer.name)
    inside = "its kernels' insides are not seen" if workload.task == "copies" and peer.ours else ""
    try:
        return row(workload, peer, "measured", inside, bytes=count())
    except Exception as error:
        return _reason_row(workload, peer, error)


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
