"""The optimizer's kernel: as exact as the reference, the same bits for an element wherever it lies, nothing outside."""

import pytest
import torch
from budget import assert_within_budget

import hydravit_kernels as kernels

BACKENDS = kernels.available_backends()
pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not there")


def work(dtype=torch.float32, average=True):
    """Rectangles of three parameters, several programs; ``(tensors, rectangles, programs)``, alike in every call."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(37, 50), (1, 5, 130), (77,)]

    def values():
        return [torch.randn(shape, generator=generator) for shape in shapes]

    weights, gradients, firsts, averages = (values() for _ in range(4))
    seconds = [value.square() for value in values()]
    boxes = [
        [(0, 0, (3, 20), (0, 33)), (0, 1, (3, 20), (33, 17)), (0, 2, (24, 13), (5, 1))],
        [(1, 1, (0, 1), (1, 3), (7, 100)), (1, 0, (0, 1), (4, 1), (0, 130))],
        [(2, 2, (0, 64)), (2, 0, (70, 7))],
    ]
    rectangles = [
        (tensor, program, *rectangle)
        for of_tensor in boxes
        for tensor, program, *box in of_tensor
        for rectangle in kernels.rectangles_of(weights[tensor], box)
    ]
    programs = [
        [kernels.AdamWStep.at(age, 1e-2, (0.9, 0.99), 1e-8, 0.1, 0.1 * age) for age in ages]
        for ages in ([1], [3, 4, 5, 6], [1, 2])
    ]
    tensors = [[t.to(dtype) for t in group] for group in (weights, gradients, firsts, seconds, averages)]
    if not average:
        tensors[4] = []
    return tensors, torch.tensor(rectangles), programs


def result(backend, dtype=torch.float32, average=True):
    tensors, rectangles, programs = work(dtype, average)
    kernels.adamw(*tensors, rectangles, programs, backend=backend)
    return [t for group in (tensors[0], *tensors[2:]) for t in group]


@native
@pytest.mark.parametrize("average", [False, True])
def test_native_is_as_exact_as_the_reference(isa, average):
    found = (result("native", average=average), result("reference", average=average))
    for ours, theirs, exactly in zip(*found, result("reference", torch.float64, average), strict=True):
        assert_within_budget(ours, theirs, exactly)


@native
def test_instruction_sets_with_fused_multiply_add_agree():
    before, found = torch.ops.hydravit.cpu_isa(), []
    try:
        for isa in ("avx512", "avx2"):
            try:
                torch.ops.hydravit.set_cpu_isa(isa)
            except RuntimeError as error:
                pytest.skip(str(error))
            found.append(result("native"))
    finally:
        torch.ops.hydravit.set_cpu_isa(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_at_once_are_steps_one_by_one(backend, dtype):
    if backend == "native" and dtype != torch.float32:
        pytest.skip("native computes in float32")
    (tensors, rectangles, programs), (others, _, _) = work(dtype), work(dtype)
    kernels.adamw(tensors[0], [], *tensors[2:], rectangles, programs, backend=backend)
    for i in range(4):
        one = [program[i : i + 1] for program in programs]
        kernels.adamw(others[0], [], *others[2:], rectangles, one, backend=backend)
    for group, other in zip(tensors, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(group, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rectangles_are_touched(backend):
    tensors, rectangles, programs = work()
    inside = [torch.zeros(t.numel(), dtype=torch.bool) for t in tensors[0]]
    for tensor, _, offset, rows, stride, columns in rectangles.tolist():
        for row in range(rows):
            part = inside[tensor][offset + row * stride :][:columns]
            assert not part.any()
            part[:] = True
    for group in tensors:
        for tensor, read in zip(group, inside, strict=True):
            tensor.view(-1)[~read] = float("nan")
    kernels.adamw(*tensors, rectangles, programs, backend=backend)
    for group in tensors:
        for tensor, read in zip(group, inside, strict=True):
            assert torch.equal(tensor.isnan().view(-1), ~read)


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


@native
def test_opcheck():
    tensors, rectangles, programs = work()
    bounds = [0, *torch.tensor([len(program) for program in programs]).cumsum(0).tolist()]
    steps = torch.tensor([step for program in programs for step in program])
    arguments = (*tensors, rectangles, bounds, steps)
    torch.library.opcheck(
        torch.ops.hydravit.adamw_native.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@native
def test_wrong_arguments_of_the_op_raise():
    def refuses(match, change):
        tensors, rectangles, programs = work()
        arguments = {"tensors": tensors, "rectangles": rectangles, "programs": programs}
        change(arguments)
        with pytest.raises(RuntimeError, match=match):
            kernels.adamw(*arguments["tensors"], arguments["rectangles"], arguments["programs"], backend="native")

    def replace(group, value):
        def change(arguments):
            arguments["tensors"][group] = value(arguments["tensors"][group])

        return change

    def rectangle(row):
        return lambda arguments: arguments.update(rectangles=torch.tensor([row]))

    refuses("gradients: as many", replace(1, lambda group: group[:2]))
    refuses(r"firsts\[0\]: shape", replace(2, lambda group: [group[0].mT.contiguous(), *group[1:]]))
    refuses(r"averages\[0\]: .*strides", replace(4, lambda group: [group[0].mT.contiguous().mT, *group[1:]]))
    refuses("seconds: dtype float32", replace(3, lambda group: [t.double() for t in group]))
    refuses("rectangles: dtype int64", lambda a: a.update(rectangles=a["rectangles"].int()))
    refuses("rectangles: a contiguous", lambda a: a.update(rectangles=a["rectangles"][:, :5].contiguous()))
    refuses("tensor in .0, 3.", rectangle([3, 0, 0, 1, 1, 1]))
    refuses("program in .0, 3.", rectangle([0, 3, 0, 1, 1, 1]))
    outside = ([2, 0, 70, 1, 8, 8], [2, 0, -1, 1, 8, 8], [0, 0, 1, 37, 50, 50], [0, 0, 0, 2, 2**62, 5])
    for row in (*outside, [0, 0, 0, 3, 4, 5], [0, 0, 0, 0, 0, 1]):
        refuses("rectangles: rows of columns inside", rectangle(row))
