"""Forked processes compute with one thread.

A fork copies the calling thread only. OpenMP does not know that its other threads are gone, so the first parallel loop
in the child would wait for them for ever, torch's own loops included. torch's loader workers have one thread too.
"""

from __future__ import annotations

import os

import torch

if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
