"""The optimizer's kernel: as exact as the reference, the same bits for an element wherever it lies, nothing outside."""

import pytest
import torch
from blocks import equal
from budget import assert_within_budget

import hydravit_kernels as kernels

BACKENDS = kernels.available_backends()
TARGETS = [pytest.param((backend, "cpu"), id=backend) for backend in BACKENDS]  # triton: on its interpreter
GPU = "triton" in kernels.available_backends("cuda") and "triton" not in BACKENDS
if GPU:
    TARGETS.append(pytest.param(("triton", "cuda"), id="triton on a GPU", marks=pytest.mark.gpu))
COMPILED = [target for target in TARGETS if target.id != "reference"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.needs("native")


def targets_in(**dtypes):
    """The targets of these backends, each in its dtypes."""
    return pytest.mark.parametrize(
        "target, dtype",
        [
            pytest.param(*target.values, dtype, id=f"{target.id}-{dtype}", marks=target.marks)
            for target in TARGETS
            for dtype in dtypes.get(target.values[0][0], ())
        ],
    )


def work(dtype=torch.float32, average=True, device="cpu"):
    """Rectangles of four parameters, several steps; ``(tensors, rectangles, steps)``, alike in every call.

    Widths are multiples of a vector and others, of one column and of more than a Triton program takes.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = [(37, 50), (1, 5, 130), (77,), (23, 336)]

    def values():
        return [torch.randn(shape, generator=generator) for shape in shapes]

    weights, gradients, firsts, averages = (values() for _ in range(4))
    seconds = [value.square() + 0.01 for value in values()]  # none of them is zero in float16
    boxes = [
        [(0, 0, (3, 20), (0, 33)), (0, 1, (3, 20), (33, 17)), (0, 2, (24, 13), (5, 1))],
        [(1, 1, (0, 1), (1, 3), (7, 100)), (1, 0, (0, 1), (4, 1), (0, 130))],
        [(2, 2, (0, 64)), (2, 0, (70, 7))],
        [(3, i % 3, (1, 21), interval) for i, interval in enumerate([(0, 1), (2, 5), (8, 63), (71, 65), (136, 200)])],
        [(3, 1, (0, 1), (0, 336)), (3, 2, (22, 1), (100, 36))],
    ]
    rectangles = [
        (tensor, step, *rectangle)
        for of_tensor in boxes
        for tensor, step, *box in of_tensor
        for rectangle in kernels.rectangles_of(weights[tensor], box)
    ]
    steps = [kernels.AdamWStep.at(age, 1e-2, (0.9, 0.99), 1e-2, 0.1, 0.1 * age) for age in (1, 6, 2)]
    tensors = [[t.to(device, dtype) for t in group] for group in (weights, gradients, firsts, seconds, averages)]
    if not average:
        tensors[4] = []
    return tensors, torch.tensor(rectangles), steps


def result(backend, dtype=torch.float32, average=True, device="cpu"):
    """Weights, moments and averages after one call."""
    tensors, rectangles, steps = work(dtype, average, device)
    kernels.adamw(*tensors, rectangles, steps, backend=backend)
    return [t.cpu() for group in (tensors[0], *tensors[2:]) for t in group]


def assert_as_exact(found, dtype, average):
    expected = (result("reference", precision, average) for precision in (dtype, torch.float64))
    for ours, *draw in zip(found, *expected, strict=True):
        assert_within_budget(ours, [draw])


@targets_in(native=[torch.float32], triton=FLOATS)
@pytest.mark.parametrize("average", [False, True])
def test_as_exact_as_the_reference(target, dtype, average):
    backend, device = target
    assert_as_exact(result(backend, dtype, average, device), dtype, average)


@native
@pytest.mark.parametrize("average", [False, True])
def test_every_instruction_set_is_as_exact(isa, average):
    assert_as_exact(result("native", average=average), torch.float32, average)


@pytest.mark.needs("isa avx512", "isa avx2")
def test_instruction_sets_with_fused_multiply_add_agree():
    before, found = torch.ops.hydravit.cpu_isa(), []
    for isa in ("avx512", "avx2"):
        torch.ops.hydravit.set_cpu_isa(isa)
        found.append(result("native"))
    torch.ops.hydravit.set_cpu_isa(before)
    assert equal(*found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shift", [0, 1])
def test_the_rectangle_does_not_show(target, shift):
    """The same bits from one rectangle as from many, whether memory can be read in vectors or not."""
    backend, device = target
    [groups, _, steps], found = work(device=device), []
    columns = [[(0, 336)], [(0, 1), (1, 3), (4, 64), (68, 268)]]
    for intervals in columns:
        tensors = []
        for group in groups:
            room = torch.full((23 * 336 + shift,), float("nan"), device=device)
            tensors.append([room[shift:].view(23, 336).copy_(group[3])])
        rows = [(0, 1, *r) for one in intervals for r in kernels.rectangles_of(tensors[0][0], ((0, 23), one))]
        kernels.adamw(*tensors, torch.tensor(rows), steps, backend=backend)
        found.append([group[0] for group in tensors])
    assert equal(*found)
    assert not torch.equal(found[0][0], groups[0][3])


@pytest.mark.parametrize("target", TARGETS)
def test_only_the_rectangles_are_touched(target):
    backend, device = target
    tensors, rectangles, steps = work(device=device)
    inside = [torch.zeros(t.numel(), dtype=torch.bool) for t in tensors[0]]
    for tensor, _, offset, rows, stride, columns in rectangles.tolist():
        for row in range(rows):
            part = inside[tensor][offset + row * stride :][:columns]
            assert not part.any()
            part[:] = True
    for group in tensors:
        for tensor, read in zip(group, inside, strict=True):
            tensor.view(-1)[~read.to(device)] = float("nan")
    kernels.adamw(*tensors, rectangles, steps, backend=backend)
    for group in tensors:
        for tensor, read in zip(group, inside, strict=True):
            assert torch.equal(tensor.isnan().view(-1).cpu(), ~read)


@pytest.mark.parametrize("target", TARGETS)
def test_without_decay_the_average_is_the_weights(target):
    """They are equal to the bit, as the first step of an average needs."""
    backend, device = target
    tensors, rectangles, _ = work(device=device)
    steps = [kernels.AdamWStep.at(1, 1e-2, (0.9, 0.99), 1e-8, 0.1, 0.0)] * 3
    kernels.adamw(*tensors, rectangles, steps, backend=backend)
    for tensor, _, offset, rows, stride, columns in rectangles.tolist():
        pair = (tensors[group][tensor].as_strided((rows, columns), (stride, 1), offset) for group in (0, 4))
        assert torch.equal(*pair)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_that_lie_apart(target):
    """A parameter may be a part of a larger tensor: nothing between its rows is read or written."""
    backend, device = target
    groups, _, steps = work(device=device)
    whole, apart = [[[group[0]] for group in work(device=device)[0]] for _ in range(2)]
    for group in apart:
        room = torch.full((37, 59), float("nan"), device=device)
        group[0] = room[:, 4:54].copy_(group[0])
    for tensors in (whole, apart):
        rows = [(0, 2, *rectangle) for rectangle in kernels.rectangles_of(tensors[0][0], ((0, 37), (0, 50)))]
        kernels.adamw(*tensors, torch.tensor(rows), steps, backend=backend)
    for (a,), (b,) in zip(whole, apart, strict=True):
        assert torch.equal(a, b) and int(b._base.isnan().sum()) == 37 * 9
    assert not torch.equal(whole[0][0], groups[0][0])


@pytest.mark.parametrize("target", TARGETS)
def test_a_table_serves_other_tensors(target):
    """What a backend keeps for a table belongs to the tensors that came with it. A table may also be empty."""
    backend, device = target
    [first, rectangles, steps], expected = work(device=device), result(backend, device=device)
    kernels.adamw(*first, rectangles, steps, backend=backend)
    again = work(device=device)[0]
    kernels.adamw(*again, rectangles, steps, backend=backend)
    found = [t.cpu() for group in (again[0], *again[2:]) for t in group]
    assert equal(found, expected)
    kernels.adamw(*again, rectangles[:0].clone(), steps, backend=backend)
    assert all(torch.equal(t.cpu(), e) for t, e in zip([*again[0], *again[2]], expected, strict=False))


@pytest.mark.needs("GPU", "triton_compiler")
@pytest.mark.gpu
def test_a_graph_cannot_hold_the_numbers_of_a_step():
    tensors, rectangles, steps = work(device="cuda")
    kernels.adamw(*tensors, rectangles, steps, backend="triton")
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels.adamw(*tensors, rectangles, steps, backend="triton")


@pytest.mark.parametrize(
    ("shape", "order", "box", "count"),
    [
        ((4, 6), (0, 1), ((0, 4), (0, 6)), 1),
        ((4, 6), (0, 1), ((1, 2), (2, 3)), 1),
        ((4, 6), (1, 0), ((1, 2), (2, 3)), 1),
        ((4, 3, 2, 5), (0, 2, 3, 1), ((1, 2), (0, 3), (0, 2), (0, 5)), 1),
        ((3, 4, 5), (0, 1, 2), ((1, 2), (1, 2), (1, 3)), 2),
        ((1, 1, 8), (0, 1, 2), ((0, 1), (0, 1), (3, 2)), 1),
        ((5,), (0,), ((2, 1),), 1),
    ],
)
def test_rectangles_cover_the_box(shape, order, box, count):
    size = torch.Size(shape).numel()
    tensor = torch.zeros([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    assert tensor.shape == shape
    memory = tensor.as_strided((size,), (1,))
    found = kernels.rectangles_of(tensor, box)
    for offset, rows, stride, columns in found:
        memory.as_strided((rows, columns), (stride, 1), offset).add_(1)
    view = tensor[tuple(slice(start, start + length) for start, length in box)]
    assert len(found) == count and bool((view == 1).all()) and int(tensor.sum()) == view.numel()


@pytest.mark.parametrize("target", COMPILED)
def test_opcheck(target):
    backend, device = target
    tensors, rectangles, steps = work(device=device)
    torch.library.opcheck(
        getattr(torch.ops.hydravit, f"adamw_{backend}").default,
        (*tensors, rectangles, torch.tensor(steps)),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("target", COMPILED)
def test_wrong_arguments_of_the_op_raise(target):
    backend, device = target

    def refuses(match, change):
        tensors, rectangles, steps = work(device=device)
        arguments = {"tensors": tensors, "rectangles": rectangles, "steps": steps}
        change(arguments)
        with pytest.raises(RuntimeError, match=match):
            kernels.adamw(*arguments["tensors"], arguments["rectangles"], arguments["steps"], backend=backend)

    def replace(group, value):
        def change(arguments):
            arguments["tensors"][group] = value(arguments["tensors"][group])

        return change

    def rectangle(row):
        return lambda arguments: arguments.update(rectangles=torch.tensor([row]))

    refuses("gradients: as many", replace(1, lambda group: group[:2]))
    refuses(r"firsts\[0\]: shape", replace(2, lambda group: [group[0].mT.contiguous(), *group[1:]]))
    refuses(r"averages\[0\]: .*strides", replace(4, lambda group: [group[0].mT.contiguous().mT, *group[1:]]))
    refuses("seconds: dtype (torch.)?float32", replace(3, lambda group: [t.double() for t in group]))
    refuses("weights: dtype (torch.)?float32", replace(0, lambda group: [t.double() for t in group]))
    refuses("rectangles: dtype int64", lambda a: a.update(rectangles=a["rectangles"].int()))
    refuses("rectangles: a contiguous", lambda a: a.update(rectangles=a["rectangles"][:, :5].contiguous()))
    refuses("tensor in .0, 4.", rectangle([4, 0, 0, 1, 1, 1]))
    refuses("step in .0, 3.", rectangle([0, 3, 0, 1, 1, 1]))
    refuses("step in .0, 3.", rectangle([0, -1, 0, 1, 1, 1]))
    outside = ([2, 0, 70, 1, 8, 8], [2, 0, -1, 1, 8, 8], [0, 0, 1, 37, 50, 50], [0, 0, 0, 2, 2**62, 5])
    for row in (*outside, [0, 0, 0, 3, 4, 5], [0, 0, 0, 0, 0, 1]):
        refuses("rectangles: rows of columns inside", rectangle(row))
