"""Memory that a peer holds, in a process of its own."""

import pytest
import torch

from bench.measuring.memory import held_bytes
from bench.measuring.peer import Absent
from bench.measuring.workloads import Workload, make_model
from bench.peers.eager import PEERS
from hydravit import HydraViTConfig
from hydravit.evaluation.cost import costs

CPU = torch.device("cpu")
CONFIG = HydraViTConfig(image_size=32, patch_size=16, depth=12, max_heads=6, head_dim=64, num_classes=10)
BY_NAME = {peer.name: peer for peer in PEERS}

pytestmark = pytest.mark.long


def test_memory_of_all_widths():
    """Views hold the full model, extraction every width's own weights."""
    workload = Workload("memory", (3, 6), 1, config=CONFIG)
    weights = {k: 4 * cost.params for k, cost in costs(CONFIG).items()}
    assert held_bytes(workload, BY_NAME["views"], CPU) == pytest.approx(weights[6], rel=0.25)
    assert held_bytes(workload, BY_NAME["extracted"], CPU) == pytest.approx(weights[3] + weights[6], rel=0.25)


def test_most_memory_of_a_training_step():
    """Weights, gradients and two moments at least; a peer that keeps more shows it, even if it releases it at once."""
    workload = Workload("training_memory", (6,), 1, config=CONFIG)
    weights = 4 * sum(parameter.numel() for parameter in make_model(workload, CPU).parameters())
    assert 4 * weights < held_bytes(workload, BY_NAME["views"], CPU) < 8 * weights
    with pytest.raises(Absent, match="nested no more"):
        held_bytes(workload, BY_NAME["extracted"], CPU)
