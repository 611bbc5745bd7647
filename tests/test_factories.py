"""Tensors are made with their dtype and device named: the defaults of torch are the caller's, not ours."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from small import SMALL, images, make

from hydravit import HydraViT
from hydravit.evaluation import evaluate
from hydravit.recipes import Recipe
from hydravit.training import SliceAdamW, SliceGradients, Trainer, WidthSampler

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
BOTH = {"dtype", "device"}
FACTORIES = dict.fromkeys(
    """arange as_tensor asarray bartlett_window blackman_window complex empty empty_permuted empty_strided eye full
    hamming_window hann_window kaiser_window linspace logspace normal ones rand randint randn randperm range
    scalar_tensor tensor tril_indices triu_indices zeros""".split(),
    BOTH,
) | {"frombuffer": {"dtype"}, "Generator": {"device"}}
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.needs("native"))]


# ---- The rule ----


def unnamed(source):
    """Yield line and name of every factory call that leaves something to torch's defaults."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        given = {keyword.arg for keyword in node.keywords}  # None stands for **keywords, which name them
        missing = FACTORIES.get(function.removeprefix("torch."), set()) if function.startswith("torch.") else set()
        if function == "torch.where" and all(isinstance(a, ast.Constant | ast.UnaryOp) for a in node.args[1:]):
            missing = {"a tensor, because the result of two numbers has the default dtype"}
        if None not in given and not missing <= given:
            yield node.lineno, function, missing - given


@pytest.mark.parametrize("package", ["hydravit", "hydravit_kernels"])
def test_every_factory_names_dtype_and_device(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {function} must name {', '.join(sorted(missing))}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, function, missing in unnamed(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_finds_what_it_is_for():
    source = """
torch.zeros(3)
torch.tensor([1], dtype=torch.int64)
torch.where(mask, -1.0, 1.0)
torch.Generator()
torch.zeros(3, dtype=torch.int64, device="cpu")
torch.empty(3, **factory)
torch.zeros_like(x), x.new_zeros(3), torch.where(mask, x, 0.0)
"""
    assert [line for line, *_ in unnamed(source)] == [2, 3, 4, 5]


# ---- What it is for ----


@pytest.fixture(params=[torch.bfloat16, torch.float64, "meta"], ids=str)
def defaults(request):
    """A function that changes torch's default dtype or device; the test's end restores it."""
    before = torch.get_default_dtype()
    yield (
        lambda: (
            torch.set_default_device(request.param)
            if isinstance(request.param, str)
            else torch.set_default_dtype(request.param)
        )
    )
    torch.set_default_dtype(before)
    torch.set_default_device(None)


class Images(torch.utils.data.Dataset):
    def __init__(self, x):
        self.images = x

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index


def logits(model, x, widths):
    found = []
    with torch.no_grad():
        for heads in (2, 4, widths):
            found += [model(x, heads=heads) for _ in range(3)]  # in place, then packed
        model.packed_inference = None
        found += [model(x, heads=heads) for heads in (2, 4, widths)]
        found += [model.forward_head(model.forward_features(x, heads=2), heads=2), *model.attention_maps(x, heads=2)]
    if model.backend == "native":
        engine = model.engine(max_batch=4)
        found += [engine(x, heads=heads) for heads in (2, 4)]
    return found


def steps(model, x, widths):
    average = copy.deepcopy(model)
    gradients = SliceGradients(model)
    optimizer = SliceAdamW(model.parameters(), model, lr=1e-2, average=average)
    for heads in (2, 4, widths, 2):
        gradients.zero_()
        model(x, heads=heads).square().mean().backward()
        optimizer.step()
    state = optimizer.state_dict()["state"]
    tensors = [value for each in state.values() for value in each.values()]
    return [*model.parameters(), *average.parameters(), *tensors]


def accuracies(model, x, widths):
    result = evaluate(model, Images(x), heads=[2, 4], batch_size=3, latency=False, memory=False)
    return [str(result)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, str):
            assert a == b
        else:
            assert (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("work", [logits, steps, accuracies], ids=lambda work: work.__name__)
def test_a_model_made_before(defaults, backend, work):
    model, x, widths = make(SMALL, backend), images(SMALL, 4), torch.tensor([2, 4, 1, 2])
    torch.manual_seed(1)
    expected = work(copy.deepcopy(model), x, widths)
    defaults()
    torch.manual_seed(1)
    same(work(model, x, widths), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("work", [logits, steps], ids=lambda work: work.__name__)
def test_a_model_made_after(defaults, backend, work):
    x, widths = images(SMALL, 4), torch.tensor([2, 4, 1, 2])

    def make_here():
        torch.manual_seed(1)
        return HydraViT(SMALL, backend=backend, device="cpu", dtype=torch.float32).eval()

    expected = work(make_here(), x, widths)
    defaults()
    same(work(make_here(), x, widths), expected)


def test_defaults_choose_where_a_new_model_is(defaults):
    defaults()
    parameter, expected = HydraViT(SMALL).pos_embed, torch.empty(0)
    assert (parameter.dtype, parameter.device) == (expected.dtype, expected.device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training(defaults, backend):
    recipe = Recipe(config=SMALL, heads=(2, 3, 4), epochs=1, batch_size=4, accumulate=2, ema=0.9, warmup_epochs=0)
    model, dataset = make(SMALL, backend), Images(images(SMALL, 9))

    def train(model):
        torch.manual_seed(2)
        trainer = Trainer(model, recipe, dataset, progress=False)
        trainer.run()
        return [*model.parameters()]

    expected = train(copy.deepcopy(model))
    defaults()
    same(train(model), expected)


def test_widths_drawn_per_image(defaults):
    expected = WidthSampler([1, 2, 3], per_image=True, seed=5).draw(8)
    defaults()
    same([WidthSampler([1, 2, 3], per_image=True, seed=5).draw(8)], [expected])
