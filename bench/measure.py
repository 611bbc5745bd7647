"""One workload, all peers: set up, compared, then timed in turns. Every peer gets a row, also one that cannot run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check import Reference, Refused
from bench.copies import copied_bytes
from bench.machine import precision
from bench.memory import held_bytes
from bench.peers import Absent, Peer
from bench.results import COLUMNS, baseline
from bench.timer import SPREAD, Effort, Times, captured, interleave, quantiles, spread
from bench.workloads import DTYPES, Workload, make_images, make_labels, make_model, make_stream, needs
from hydravit import HydraViT

_CYCLES = 2  # in switching, how often each width is called, one after the other or in turns
Progress = Callable[[str], None]


class Candidate(NamedTuple):
    """What a set-up returned for one width: what is timed, and what is compared."""

    run: Callable[[], object]
    outputs: Callable[[], dict[str, Tensor]]


def row(workload: Workload, peer: Peer, status: str, reason: str = "", launch: str = "call", **values) -> dict:
    """A row of ``results.COLUMNS``; what is not given is None."""
    floating, moved = needs(workload)
    return {
        **dict.fromkeys(COLUMNS),
        "task": workload.task,
        "config": workload.config,
        "heads": ",".join(map(str, workload.heads)),
        "batch": workload.batch,
        "dtype": workload.dtype,
        "cache": "cold" if workload.cold else "warm",
        "launch": launch,
        "peer": peer.name,
        "about": peer.about,
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
    workload: Workload, peers: Sequence[Peer], device: torch.device, effort: Effort, progress: Progress
) -> list[dict]:
    """Rows of one timed workload: inference, a block, training or switching."""
    rows: list[dict] = []
    ready: dict[tuple[str, str], tuple[Peer, dict]] = {}  # by peer and launch; the facts that its row begins with
    closures: dict[tuple[str, str], Callable[[], object]] = {}
    with precision(workload.dtype):
        progress("reference")
        model = make_model(workload, device)
        reference = Reference(workload, model)
        for index, peer in enumerate(peers):
            progress(f"{peer.name}, {index + 1} of {len(peers)}")
            try:
                start = time.perf_counter()
                candidates = _set_up(peer, workload, model)
                prepared = time.perf_counter() - start
                errors = [reference.check(k, candidate.outputs()) for k, candidate in candidates.items()]
                error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
            except Absent as absent:
                rows.append(row(workload, peer, "absent", str(absent)))
                continue
            except Refused as refused:
                facts = {"error": refused.error, "allowed": refused.allowed}
                rows.append(row(workload, peer, "refused", str(refused), **facts))
                continue
            except Exception as error:  # a peer is foreign code: whatever it raises must not end the run
                rows.append(row(workload, peer, "failed", _one_line(error)))
                continue
            facts = {"prepare_s": prepared, "error": error, "allowed": allowed}
            for launch, found in _launches(workload, candidates, device):
                if isinstance(found, str):
                    rows.append(row(workload, peer, "absent", found, launch))
                    continue
                ready[peer.name, launch] = peer, facts
                for variant, run in found.items():
                    closures[peer.name, launch, variant] = run
        times = interleave(closures, device, effort, cold=workload.cold, progress=progress)
    return rows + _timed_rows(workload, ready, times)


def _set_up(peer: Peer, workload: Workload, model: HydraViT) -> dict[int, Candidate]:
    """The peer's closures per width. Raises ``Absent``, or whatever the peer raises."""
    device = model.pos_embed.device
    kind, _, backward = workload.task.partition("_")
    if kind in ("inference", "switching"):
        _offered(peer, peer.inference)
        found = peer.inference(model, make_images(workload, device), workload.heads)
        return {k: Candidate(run, lambda run=run: {"logits": run()}) for k, run in found.items()}
    if kind in ("attention", "mlp"):
        _offered(peer, peer.block)
        x, grad = make_stream(workload, device)
        step = peer.block(model, kind, workload.heads[0], x, grad if backward else None)
        return {workload.heads[0]: Candidate(*step)}
    _offered(peer, peer.training)
    amp = DTYPES[workload.dtype] if workload.dtype in ("bf16", "fp16") else None
    images, labels = make_images(workload, device), make_labels(workload, device)
    return {k: Candidate(*step) for k, step in peer.training(model, images, labels, workload.heads, amp).items()}


def _offered(peer: Peer, set_up: Callable | None) -> None:
    if set_up is None:
        raise Absent(peer.without)


def _launches(
    workload: Workload, candidates: dict[int, Candidate], device: torch.device
) -> Iterator[tuple[str, dict[str, Callable] | str]]:
    """Ways to launch the candidates and what to time, by name of variant; or why a way does not exist."""
    runs = {k: candidate.run for k, candidate in candidates.items()}
    yield "call", _variants(workload, runs)
    if device.type == "cuda":
        try:
            yield "graph", _variants(workload, {k: captured(run, device) for k, run in runs.items()})
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):  # a failed capture may leave its error behind
                torch.cuda.synchronize(device)
            yield "graph", f"cannot be captured: {_one_line(error)}"


def _variants(workload: Workload, runs: dict[int, Callable]) -> dict[str, Callable]:
    """What is timed: one call; of a mix, one step of every width; of switching, as many calls with and without."""
    closures = list(runs.values())
    if workload.task == "switching":
        steady = [run for run in closures for _ in range(_CYCLES)]
        return {"": _sequence(closures * _CYCLES), "steady": _sequence(steady)}
    return {"": closures[0] if len(closures) == 1 else _sequence(closures)}


def _sequence(closures: list[Callable]) -> Callable[[], None]:
    def run():
        for closure in closures:
            closure()

    return run


def _timed_rows(workload: Workload, ready: dict, times: dict[tuple, Times]) -> list[dict]:
    rows = []
    for (name, launch), (peer, facts) in ready.items():
        found = times[name, launch, ""]
        values = {**facts, "samples": len(found.samples), "attempts": found.attempts}
        cycles = 1
        if workload.task == "switching":
            cycles, steady = _CYCLES, times[name, launch, "steady"].samples
            costs = [with_it / without - 1.0 for with_it, without in zip(found.samples, steady, strict=True)]
            values["switch_cost"] = quantiles(costs)[1]
        values["times_ms"] = [round(ms / cycles, 5) for ms in found.samples]  # in JSON only
        values["p20_ms"], values["p50_ms"], values["p80_ms"] = quantiles(values["times_ms"])
        values["wall_ms"] = quantiles(found.wall)[1] if found.wall else None
        values["noisy"] = spread(found.samples) > SPREAD
        rows.append(row(workload, peer, "measured", launch=launch, **values))
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
        entry["noisy"] = entry["noisy"] or spread(ratios) > SPREAD


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def measure_memory(workload: Workload, peers: Sequence[Peer], device: torch.device, progress: Progress) -> list[dict]:
    """Rows of the memory that each peer holds to have every width ready."""
    return [
        _counted(workload, peer, lambda name=peer.name: held_bytes(workload, name, device), progress) for peer in peers
    ]


def measure_copies(workload: Workload, peers: Sequence[Peer], device: torch.device, progress: Progress) -> list[dict]:
    """Rows of the weight bytes that a call of each peer copies."""
    model, images = make_model(workload, device), make_images(workload, device)

    def count(peer: Peer) -> int:
        _offered(peer, peer.inference)
        if peer.opaque:
            raise Absent("its operators are hidden from PyTorch, so its copies cannot be counted")
        (run,) = peer.inference(model, images, workload.heads).values()
        return copied_bytes(run, model.parameters())

    return [_counted(workload, peer, lambda peer=peer: count(peer), progress) for peer in peers]


def _counted(workload: Workload, peer: Peer, count: Callable[[], int], progress: Progress) -> dict:
    progress(peer.name)
    try:
        return row(workload, peer, "measured", bytes=count())
    except Absent as absent:
        return row(workload, peer, "absent", str(absent))
    except Exception as error:  # as in measure
        return row(workload, peer, "failed", _one_line(error))
