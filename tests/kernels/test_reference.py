"""The oracle itself: gradients of first and second order against finite differences, in float64."""

import torch

import hydravit_kernels as kernels
from hydravit_kernels import AttentionParameters, HeadParameters, MlpParameters, StemParameters, reference

ATTENTION = [kernels.AttentionSlice(2, 6, 1, 13, 27, 3, 2, 3, 2, 4, 0.4)]
NARROW = [*ATTENTION, kernels.AttentionSlice(2, 4, 0, 12, 24, 0, 1, 3, 3, 3, 0.4)]
HEAD = [kernels.HeadSlice(1, 5, 2, 6)]
MLP = [kernels.MlpSlice(2, 6, 3, 5)]


def leaves(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check(function, inputs):
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-5)


def test_attention_block():
    inputs = leaves((2, 3, 6), (12,), (12,), (36, 12), (36,), (12, 12), (12,), (12,))
    scale = torch.tensor([0.0, 1.25], dtype=torch.float64)
    check(lambda x, *p: reference.attention_block(x, AttentionParameters(*p), scale, ATTENTION, 1e-3), inputs)
    check(
        lambda x, *p: reference.attention_block(x, AttentionParameters(*p), scale, ATTENTION, 1e-3, queries=2),
        inputs,
    )


def test_attention_block_with_one_width_per_image():
    inputs = leaves((2, 3, 6), (12,), (12,), (36, 12), (36,), (12, 12), (12,), (12,))
    width_index = torch.tensor([1, 0])
    check(lambda x, *p: reference.attention_block(x, AttentionParameters(*p), None, NARROW, 1e-3, width_index), inputs)


def test_mlp_block():
    inputs = leaves((2, 3, 6), (12,), (12,), (10, 12), (10,), (12, 10), (12,), (12,))
    check(lambda x, *p: reference.mlp_block(x, MlpParameters(*p), None, MLP, 1e-3), inputs)


def test_stem_and_head():
    inputs = leaves((1, 2, 4, 4), (8, 2, 2, 2), (8,), (1, 1, 8), (1, 2, 8), (1, 7, 8))
    check(lambda x, *p: reference.stem(x, StemParameters(*p), [kernels.EmbedSlice(1, 5)]), inputs)
    inputs = leaves((2, 4, 5), (8,), (8,), (9, 8), (9,))
    check(lambda x, *p: reference.head(x, HeadParameters(*p), 1, 4, [kernels.HeadSlice(1, 5, 2, 6)], 1e-3), inputs)


def test_both_attention_paths_agree():
    """The fused path of inference and the explicit one of training are one function."""
    inputs = leaves((2, 7, 6), (12,), (12,), (36, 12), (36,), (12, 12), (12,), (12,))
    x, p = inputs[0], AttentionParameters(*inputs[1:])
    explicit = reference.attention_block(x, p, None, ATTENTION, 1e-3)
    with torch.no_grad():
        torch.testing.assert_close(reference.attention_block(x, p, None, ATTENTION, 1e-3), explicit)
