"""Copies of weights are counted, however they are made."""

import torch

from bench.measuring.copies import copied_bytes


def test_a_hidden_copy_is_counted():
    weight = torch.randn(8, 8)
    assert copied_bytes(lambda: torch.ones(1, 4) @ weight[:4, :4], [weight]) == 0
    assert copied_bytes(lambda: torch.ones(1, 4) @ weight[:4, :4].contiguous(), [weight]) == 64
    buffer = torch.empty(4, 4)
    assert copied_bytes(lambda: torch.ones(1, 4) @ buffer.copy_(weight[:4, :4]), [weight]) == 64
    assert copied_bytes(lambda: [buffer[i].copy_(weight[i, :4]) for i in range(4)], [weight]) == 64
    assert copied_bytes(lambda: torch.ones(1, 4).double() @ weight[:4, :4].double(), [weight]) == 128
