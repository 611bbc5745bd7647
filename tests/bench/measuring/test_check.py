"""The check of outputs: one wrong weight of a full-size network shows, and so do outputs of another form."""

import pytest
import torch
from small import SMALL

from bench.measuring.check import Reference, Refused
from bench.measuring.workloads import Workload, make_images, make_model

CPU = torch.device("cpu")


def test_one_changed_weight_of_the_full_size_network_is_refused():
    workload = Workload("inference", (3,), 1)
    model = make_model(workload, CPU)
    reference, images = Reference(workload, model), make_images(workload, CPU)
    with torch.inference_mode():
        reference.check(3, {"logits": model(images, heads=3)})
        model.blocks[6].attn.qkv.weight[0, 0] += 1.0
        with pytest.raises(Refused, match="logits at k=3 is off by"):
            reference.check(3, {"logits": model(images, heads=3)})


@pytest.mark.parametrize(
    "outputs, message",
    [
        ({}, "missing or unknown: logits"),
        ({"logits": torch.zeros(2, 9)}, "has shape"),
        ({"logits": torch.full((2, 10), float("nan"))}, "off by inf"),
    ],
)
def test_outputs_of_another_form_are_refused(outputs, message):
    workload = Workload("inference", (3,), 2, config=SMALL)
    reference = Reference(workload, make_model(workload, CPU))
    with pytest.raises(Refused, match=message):
        reference.check(3, outputs)
