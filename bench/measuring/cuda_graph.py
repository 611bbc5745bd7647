"""Closures as CUDA graphs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A closure that replays ``run`` as one CUDA graph and returns what the captured call returned.

    Raises for a call that cannot be captured, and for one that leaves the graph empty, as work on other streams does.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), warnings.catch_warnings():  # a failed capture too must give the stream back
        warnings.filterwarnings("error", message=".*CUDA Graph is empty")
        for _ in range(3):
            run()
        torch._C._cuda_clearCublasWorkspaces()  # the graph gets one in its own memory, which nobody frees
        try:
            with torch.cuda.graph(graph, stream=stream):
                output = run()
        except Exception:
            with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
                torch.ones(1, device=device)  # a capture that ends well sets the random generator free again
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.current_stream(device).wait_stream(stream)

    def replay():
        graph.replay()
        return output

    return replay
