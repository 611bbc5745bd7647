"""The sample of contents: which writes it shows in the next call, and which in one of the calls after it."""

import pytest
import torch

from hydravit_kernels import ContentSample
from hydravit_kernels.sample import ROTATIONS

pytestmark = pytest.mark.needs("native")

SIZES = [1, 2, 15, 16, 17, 19, 31, 64, 100, 257, 768, 1000, 4099]


def changed_at_once(tensors, write):
    """Whether the call after the write notices it, whichever set has its turn then, and every later call too."""
    for calls in range(ROTATIONS):
        sample = ContentSample(tensors)
        assert all(sample.holds() for _ in range(calls))
        write(*tensors)
        if any(sample.holds() for _ in range(ROTATIONS)):
            return False
    return True


@pytest.mark.parametrize("numel", SIZES)
def test_any_contiguous_quarter(numel):
    quarter = -(-numel // 4)
    for start in range(0, numel - quarter + 1, max(1, numel // 17)):
        part = slice(start, start + quarter)
        assert changed_at_once([torch.randn(5), torch.randn(numel)], lambda _, t, part=part: t.data[part].add_(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
def test_dtypes(dtype):
    for numel in (3, 1000):
        tensors = [torch.randn(7), torch.zeros(numel, dtype=dtype), torch.randn(40, 30)]
        assert changed_at_once(tensors, lambda _, t, __: t.data.logical_not_())
        assert changed_at_once(tensors, lambda *t: t[2].data.neg_())


def test_bits_are_compared():
    """NaN equals itself, and minus zero is not zero."""
    tensor = torch.full((100,), float("nan"))
    sample = ContentSample([tensor])
    assert all(sample.holds() for _ in range(ROTATIONS))
    zeros = torch.zeros(100)
    assert changed_at_once([zeros], lambda t: t.data.neg_())


def test_strides():
    """Quarters count in the order of the shape; memory between the rows belongs to nobody."""
    room = torch.randn(64, 50)
    for view in (room[:, :30], room.t(), room[::2, ::3], room[1].expand(64, 50), room.view(64, 5, 10).permute(1, 2, 0)):
        assert changed_at_once([view], lambda _: room.data.add_(1.0))
    sample = ContentSample([room[:, :30]])
    room.data[:, 30:] = 0.0
    assert all(sample.holds() for _ in range(ROTATIONS))


def test_smaller_writes_are_seen_when_their_turn_comes():
    for part in range(32):
        tensor = torch.randn(3200)
        sample = ContentSample([torch.randn(10), tensor])
        tensor.data[100 * part : 100 * part + 100] = 0.0
        assert not all(sample.holds() for _ in range(ROTATIONS))


def test_columns_of_a_matrix():
    """The samples of a set do not lie in one column, and each tensor has others."""
    tensors = [torch.randn(rows, 768) for rows in (768, 2304, 768, 3072) * 4]
    for columns in (slice(0, 192), slice(192, 384), slice(576, 768)):
        assert changed_at_once(tensors, lambda *all, c=columns: [t.data[:, c].add_(1.0) for t in all])


def test_nothing_to_sample():
    assert ContentSample([]).holds()
    assert ContentSample([torch.empty(0, 3), torch.empty(0)]).holds()


def test_wrong_arguments_raise():
    sample_native, holds = torch.ops.hydravit.sample_native, torch.ops.hydravit.sample_holds_native
    with pytest.raises(RuntimeError, match="^tensors: CPU tensors expected, a tensor of another device given"):
        ContentSample([torch.empty(3, device="meta")])
    freed = torch.randn(10)
    freed.untyped_storage().resize_(12)
    with pytest.raises(RuntimeError, match="^tensors: a storage of 40 bytes expected .*, 12 bytes given"):
        ContentSample([freed])
    with pytest.raises(RuntimeError, match="^rotations: 1 to 1024 expected, 0 given"):
        sample_native([torch.randn(3)], 0)
    sample = sample_native([torch.randn(3)], 2)
    for rotation in (-1, 2):
        with pytest.raises(RuntimeError, match="^rotation: one of"):
            holds(sample, rotation)
    with pytest.raises(RuntimeError, match="^sample: dtype int64 expected"):
        holds(sample.double(), 0)
    for other in (sample[:-1], sample[1:], sample[:2], sample[None], sample.repeat_interleave(2)[::2], 0 * sample):
        with pytest.raises(RuntimeError, match="^sample: a tensor of sample_native expected"):
            holds(other, 0)
