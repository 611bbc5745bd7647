"""Operations and bytes of workloads, and the order in which a run goes through them."""

import math

import pytest
from small import SMALL

from bench.measuring.workloads import PARTS, Workload, needs, workloads
from hydravit.evaluation.cost import costs


def test_operations_are_counted():
    """ViT-Ti, ViT-S and ViT-B have the literature's multiply-accumulates; a network has twelve blocks."""
    for k, gmacs in ((3, 1.254), (6, 4.599), (12, 17.564)):
        assert needs(Workload("inference", (k,), 1)).flops == pytest.approx(2e9 * gmacs, rel=1e-3)
    network = needs(Workload("inference", (3,), 4)).flops
    blocks = 12 * sum(needs(Workload(kind, (3,), 4)).flops for kind in ("attention", "mlp"))
    stem_and_classifier = 2 * 4 * 192 * (196 * 768 + 1000)
    assert network == blocks + stem_and_classifier
    assert needs(Workload("mlp_backward", (3,), 4)).flops == 3 * needs(Workload("mlp", (3,), 4)).flops
    assert needs(Workload("switching", (3, 6), 1)).flops == sum(
        needs(Workload("inference", (k,), 1)).flops for k in (3, 6)
    )


def test_training_steps_every_parameter():
    workload = Workload("training", (2,), 4, config=SMALL)
    images = 4 * math.prod(SMALL.image_shape)
    assert needs(workload).bytes == 4 * images + 28 * costs(SMALL)[SMALL.max_heads].params
    stem = 2 * 4 * 16 * 2 * 16 * 3 * 64  # images, patches, channels of the residual and of a patch; no gradient
    assert needs(workload).flops == 3 * needs(Workload("inference", (2,), 4, config=SMALL)).flops - stem


def test_bytes_are_counted():
    params, _ = costs(SMALL)[2]
    images = 2 * 3 * 32 * 32
    assert needs(Workload("inference", (2,), 2, config=SMALL)).bytes == 4 * (params + images + 2 * 10)
    assert needs(Workload("inference", (2,), 2, "bf16", SMALL)).bytes == 2 * (params + images + 2 * 10)


def test_the_most_informative_workloads_come_first():
    found = workloads(PARTS, [3, 6, 12], [1, 8], ["fp32"], "base")
    assert found[:4] == [
        Workload("inference", (3,), 1),
        Workload("inference", (12,), 1),
        Workload("inference", (6,), 1),
        Workload("inference", (3,), 8),
    ]
    assert Workload("training", (3, 6, 12), 8) in found and Workload("memory", (3, 6, 12), 1) in found
    assert len(found) == len(set(found))
