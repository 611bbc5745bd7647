"""One workload, all peers: set up, compared, then timed in turns. Every peer gets a row, even if it cannot run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from bench.measuring.check import Reference, Refused
from bench.measuring.copies import copied_bytes
from bench.measuring.dtypes import precision
from bench.measuring.memory import SECONDS, held_bytes
from bench.measuring.peer import Absent, Peer, offered
from bench.measuring.prepare import CYCLES, REPLAYS_COMPARED, Ready, check, one_line, ready_calls, ready_graphs
from bench.measuring.timer import SPREAD, Attempt, Broken, Timer, quantiles, spread
from bench.measuring.workloads import Workload, images_of, make_images, make_model, needs
from bench.rows import AGREEMENT, COLUMNS, baseline


def make_row(workload: Workload, peer: Peer, status: str, reason: str = "", launch: str = "call", **values) -> dict:
    """A row of ``bench.rows.COLUMNS``; columns that are not given are None."""
    floating, moved = needs(workload, peer.pooled_only, 1 if peer.weights == "e4m3" else None)
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
        "status": status,
        "reason": reason,
        "gflop": floating / 1e9,
        "mbyte": moved / 1e6,
        "peer_version": peer.version,
        **values,
    }


def measure(workload: Workload, peers: Sequence[Peer], timer: Timer) -> list[dict]:
    """Rows of any workload. No peer is begun after the timer's deadline."""
    if workload.task in ("memory", "training_memory"):
        return _measure_memory(workload, peers, timer)
    if workload.task == "copies":
        return _measure_copies(workload, peers, timer)
    return _measure_times(workload, peers, timer)


def _measure_times(workload: Workload, peers: Sequence[Peer], timer: Timer) -> list[dict]:
    rows, ready = [], []
    with precision(workload.dtype):
        timer.progress("reference")
        try:
            model = make_model(workload, timer.device)
            reference = Reference(workload, model)
        except Exception as error:
            return [make_row(workload, peer, "failed", f"the reference: {one_line(error)}") for peer in peers]
        for index, peer in enumerate(peers):
            timer.progress(f"{peer.name}, {index + 1} of {len(peers)}")
            if timer.late():
                rows.append(make_row(workload, peer, "skipped", "no time left to prepare it"))
                continue
            try:
                ready.append(ready_calls(workload, peer, model, reference, timer.clock))
            except Exception as error:
                rows.append(_reason_row(workload, peer, error))
                continue
            if timer.device.type == "cuda":
                try:
                    ready.append(ready_graphs(workload, ready[-1], reference, timer.device))
                except Exception as error:
                    rows.append(_reason_row(workload, peer, error, "graph"))
        times = _time(workload, ready, timer, rows)
        if workload.task != "training":  # which has changed its weights
            _check_again(workload, ready, reference, rows)
    return rows + _timed_rows(workload, ready, times)


def _time(workload: Workload, ready: list[Ready], timer: Timer, rows: list[dict]) -> Attempt:
    """Times by peer, launch and variant. A peer that breaks gets a row and is left out."""
    while True:
        closures = {(e.peer.name, e.launch, variant): run for e in ready for variant, run in e.variants.items()}
        try:
            return timer.interleave(closures, cold=workload.cold)
        except Broken as broken:
            entry = next(e for e in ready if (e.peer.name, e.launch) == broken.name[:2])
            ready.remove(entry)
            rows.append(_reason_row(workload, entry.peer, broken.__cause__, entry.launch))
            if timer.device.type == "cuda":
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()


def _check_again(workload: Workload, ready: list[Ready], reference: Reference, rows: list[dict]) -> None:
    """A peer that is wrong after the timing gets a row that says so, and no time."""
    for entry in list(ready):
        try:
            if entry.outputs:
                check(reference, entry.peer, entry.outputs)
        except Exception as error:
            ready.remove(entry)
            found = _reason_row(workload, entry.peer, error, entry.launch)
            rows.append({**found, "reason": f"after timing, {found['reason']}"})


def _reason_row(workload: Workload, peer: Peer, error: BaseException | None, launch: str = "call") -> dict:
    """A row without a time. A peer is foreign code: whatever it raises becomes a row and does not end the run."""
    if isinstance(error, Absent):
        return make_row(workload, peer, "absent", str(error), launch)
    if isinstance(error, Refused):
        known = {"error": error.error, "allowed": error.allowed} if math.isfinite(error.error) else {}
        return make_row(workload, peer, "refused", str(error), launch, **known)
    return make_row(workload, peer, "failed", one_line(error), launch)


def _timed_rows(workload: Workload, ready: list[Ready], times: Attempt) -> list[dict]:
    rows = []
    for entry in ready:
        peer, launch = entry.peer, entry.launch
        reason = "" if launch == "call" or workload.task in REPLAYS_COMPARED else "its replays were not compared"
        found = times[peer.name, launch, ""]
        values = {**entry.facts, "samples": len(found.samples), "attempts": found.attempts}
        values["witness_ms"] = found.witness
        cycles = 1
        if workload.task == "switching":
            cycles, steady = CYCLES, times[peer.name, launch, "steady"].samples
            _, ratio, _ = quantiles([with_it / without for with_it, without in zip(found.samples, steady, strict=True)])
            # One in n = CYCLES steady calls switches all the same: the ratio is n (call + cost) / (n call + cost).
            values["switch_cost"] = CYCLES * (ratio - 1.0) / (CYCLES - ratio)
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
        rows.append(make_row(workload, peer, "measured", reason, launch, **values))
    _add_ratios(rows)
    return rows


def _add_ratios(rows: list[dict]) -> None:
    """Each row's times by those of ours in the same rounds, launched likewise where ours can be."""
    own = baseline(rows)
    ours = {entry["launch"]: entry for entry in rows if entry["peer"] == own}
    for entry in rows:
        mine = ours.get(entry["launch"]) or ours.get("call")
        if mine is None or entry["peer"] == own:
            continue
        ratios = [theirs / our for theirs, our in zip(entry["times_ms"], mine["times_ms"], strict=True)]
        entry["ratio_p20"], entry["ratio"], entry["ratio_p80"] = quantiles(ratios)
        entry["noisy"] = entry["noisy"] or spread(ratios) > AGREEMENT


def _measure_memory(workload: Workload, peers: Sequence[Peer], timer: Timer) -> list[dict]:
    rows = []
    for peer in peers:
        left = min(timer.effort.deadline - timer.clock.now(), SECONDS)
        found = None
        if left > 0:
            found = _counted(workload, peer, partial(held_bytes, workload, peer, timer.device, left), timer)
        if found is None or (found["status"] == "failed" and timer.late()):
            found = make_row(workload, peer, "skipped", "no time left")
        rows.append(found)
    return rows


def _measure_copies(workload: Workload, peers: Sequence[Peer], timer: Timer) -> list[dict]:
    model, images = make_model(workload, timer.device), make_images(workload, timer.device)

    def count(peer: Peer) -> int:
        set_up = offered(peer, peer.inference)
        if peer.opaque:
            raise Absent("its operators are hidden from PyTorch, so its copies cannot be counted")
        (run,) = set_up(model, images, workload.heads).values()
        return copied_bytes(run, model.parameters())

    return [_counted(workload, peer, partial(count, peer), timer) for peer in peers]


def _counted(workload: Workload, peer: Peer, count: Callable[[], int], timer: Timer) -> dict:
    timer.progress(peer.name)
    inside = "its kernels' insides are not seen" if workload.task == "copies" and peer.ours else ""
    try:
        return make_row(workload, peer, "measured", inside, bytes=count())
    except Exception as error:
        return _reason_row(workload, peer, error)
