"""The network of the CPU: which subnetworks it serves, its three ops, the layout of packed weights, wrong arguments."""

import math

import pytest
import torch
from blocks import hydravit
from packing import WIDE, make, tensors_held_by
from small import SMALL, images

from hydravit import geometry
from hydravit.config import resolve_config
from hydravit_kernels import CpuNetwork, NetworkSizes

pytestmark = [
    pytest.mark.needs("native"),
    pytest.mark.usefixtures("one_thread"),
]


def network_of(model):
    return CpuNetwork(model.network_parameters(), model.config.sizes)


# ---- The network ----


def test_the_reason_why_a_subnetwork_is_not_served():
    for subnetwork, reason in (
        (geometry.hydravit(WIDE, 3), ""),
        (
            geometry.hydravit(resolve_config(WIDE, max_heads=5, head_dim=16), 2),
            "its rows begin at 80, which is no multiple of 32",
        ),
        (geometry.scala(WIDE, 48, suffix=True), "its rows begin at 48, which is no multiple of 32"),
        (geometry.skd(WIDE, [(24, 96), (23, 96), (24, 96)]), "the heads of layer 1 do not lie side by side"),
    ):
        assert CpuNetwork.why_not(subnetwork) == reason


def test_packing_again():
    first, second, x = make(), make(), images(WIDE)
    network = network_of(first)
    before = network.run(x, [first.subnetwork(3)])
    network.pack(second.network_parameters())
    after = network.run(x, [first.subnetwork(3)])
    assert not torch.equal(before, after)
    assert torch.equal(after, network_of(second).run(x, [second.subnetwork(3)]))


def test_plans_do_not_pile_up():
    """Every call may bring another subnetwork."""
    config = resolve_config(WIDE, depth=1, head_dim=8, image_size=8)
    network, x = network_of(make(config)), images(config, 1)
    for i in range(128):
        for j in (0, 8, 4):
            subnetwork = geometry.skd(config, [(j, 1 + i)])
            if not CpuNetwork.why_not(subnetwork):
                network.run(x, [subnetwork])
    assert 1 < len(tensors_held_by(network)) <= 1 + 256


def test_more_subnetworks_in_one_call_than_plans_are_kept():
    config = resolve_config(WIDE, depth=1, image_size=8)
    model, x = make(config), images(config, 300)
    network, subnetworks = network_of(model), [geometry.skd(config, [(24, 1 + i)]) for i in range(300)]
    together = network.run(x, subnetworks, torch.arange(300))
    for i in (0, 1, 298, 299):
        assert torch.equal(together[i : i + 1], network.run(x[i : i + 1], [subnetworks[i]]))


def test_missing_and_misshapen_parameters_are_named():
    model = make()
    parameters, sizes = model.network_parameters(), model.config.sizes
    attention = [parameters.attention[0], parameters.attention[1]._replace(qkv_weight=None), parameters.attention[2]]
    with pytest.raises(ValueError, match=r"^blocks.1.attn.qkv.weight: a tensor expected, None given"):
        CpuNetwork(parameters._replace(attention=attention), sizes)
    with pytest.raises(ValueError, match="^parameters: 3 layers expected, 2 given"):
        CpuNetwork(parameters._replace(attention=parameters.attention[:2], mlp=parameters.mlp[:2]), sizes)
    with pytest.raises(RuntimeError, match=r"^head.bias: shape \(32,\) expected, \(31,\) given"):
        CpuNetwork(parameters._replace(head=parameters.head._replace(bias=parameters.head.bias[:-1])), sizes)


# ---- The ops and their arguments ----


LAYERS = SMALL.depth


def pack(model):
    """The packed tensor, where every parameter begins in it, and the rows of a panel."""
    return hydravit.pack_network_native(detached(model), model.config.sizes)


def detached(model):
    return [None if p is None else p.detach() for p in model.network_parameters().flat()]


def call():
    """Arguments of the ops of the whole network, by name; ``use`` makes the plans of the forward from the plan."""
    model = make(SMALL)
    packed, offsets, panel = pack(model)
    integers, scales = model.subnetwork(2).flat()
    return {
        "images": images(SMALL, 3),
        "tensor": packed,
        "offsets": offsets,
        "panel": panel,
        "sizes": list(SMALL.sizes),
        "subnetwork": integers,
        "scales": scales,
        "use": lambda plan: [plan],
        "packed": packed,
        "columns": SMALL.num_classes,
        "width_index": None,
    }


def plan_of(arguments):
    names = ("tensor", "offsets", "panel", "sizes", "subnetwork", "scales")
    return hydravit.plan_network_native(*(arguments[name] for name in names), SMALL.norm_eps)


def run(arguments):
    plans = arguments["use"](plan_of(arguments))
    rest = (plans, arguments["columns"], arguments["width_index"], True)
    return hydravit.network_native(arguments["images"], arguments["packed"], *rest)


def with_offset(index, value):
    def change(arguments):
        arguments["offsets"][index] = value

    return change


def with_sizes(**values):
    def change(arguments):
        for name, value in values.items():
            arguments["sizes"][NetworkSizes._fields.index(name)] = value

    return change


def with_slices(embed=(), attention=(), mlp=(), head=()):
    """The same slices in every layer."""

    def change(arguments):
        flat = arguments["subnetwork"]
        flat[: len(embed)] = embed
        flat[len(flat) - len(head) :] = head
        for layer in range(2, 2 + 14 * LAYERS, 14):
            flat[layer : layer + len(attention)] = attention
            flat[layer + 10 : layer + 10 + len(mlp)] = mlp

    return change


def with_arguments(**changed):
    def change(arguments):
        for name, value in changed.items():
            arguments[name] = value(arguments[name]) if callable(value) else value

    return change


def with_plans(use):
    def change(arguments):
        arguments["use"] = use

    return change


def huge(arguments):
    """The product of these sizes is zero in 64 bits."""
    none = dict.fromkeys(("cls_tokens", "reg_tokens", "positions", "classes"), 0)
    patch = {"channels": 4, "patch_height": 2**30, "patch_width": 16, "image_height": 2**30, "image_width": 16}
    with_sizes(embed=2**30, hidden=64, **patch, **none)(arguments)


WRONG = {
    "too few offsets": (with_arguments(offsets=lambda o: o[:-1]), "^offsets: one for head.bias"),
    "no offsets": (with_arguments(offsets=[]), "^offsets: one for patch_embed.proj.weight"),
    "too many offsets": (with_arguments(offsets=lambda o: [*o, 0]), "^offsets: 1 too many"),
    "offset at the end": (lambda a: with_offset(5, a["tensor"].numel())(a), "^offsets: blocks.0.norm1.weight"),
    "offset behind the end": (with_offset(7, 10**9), "^offsets: blocks.0.attn.qkv.weight"),
    "negative offset": (with_offset(6, -2), "^offsets: blocks.0.norm1.bias"),
    "largest offset": (with_offset(5, 2**63 - 1), "^offsets: blocks.0.norm1.weight"),
    "no stem weight": (with_offset(0, -1), "^offsets: patch_embed.proj.weight expected"),
    "no norm": (with_offset(5, -1), "^offsets: blocks.0.norm1.weight expected"),
    "no qkv": (with_offset(7, -1), "^offsets: blocks.0.attn.qkv.weight expected"),
    "no projection": (with_offset(23, -1), "^offsets: blocks.1.attn.proj.weight expected"),
    "no norm bias": (with_offset(27, -1), "^offsets: blocks.1.norm2.bias expected"),
    "no fc1": (with_offset(14, -1), "^offsets: blocks.0.mlp.fc1.weight expected"),
    "no fc2": (with_offset(30, -1), "^offsets: blocks.1.mlp.fc2.weight expected"),
    "half a norm": (with_offset(33, -1), "^norm.bias: given with norm.weight"),
    "a bias of no classifier": (with_offset(35, -1), "^head.bias: None expected, as head.weight"),
    "narrower": (with_sizes(embed=16), "^patch_embed.proj.weight: output channels"),
    "wider": (with_sizes(embed=4096), "^offsets: patch_embed.proj.weight"),
    "negative size": (with_sizes(hidden=-1), "^sizes"),
    "size beyond 32 bits": (with_sizes(embed=2**31), "^sizes"),
    "sizes of a product beyond 64 bits": (huge, "packed patch_embed.proj.weight: a shape of fewer"),
    "thirteen sizes": (with_arguments(sizes=lambda s: s[:-1]), "^sizes: 14 integers expected, 13 given"),
    "other patches": (with_sizes(patch_height=4), "^pos_embed: shape"),
    "no patch": (with_sizes(patch_width=0), "^patch_embed.proj.weight: a patch of at least one pixel"),
    "no embed": (with_sizes(embed=0), "^embed: at least 1"),
    "fewer classes": (with_sizes(classes=5), "^head.weight: rows"),
    "no layers": (with_sizes(layers=0), "^layers: at least 1"),
    "three layers": (with_sizes(layers=3), "^subnetwork: 48 integers and 3 scales expected for 3 layers, 34 and 2"),
    "images of no whole patches": (with_sizes(image_height=30), "^images: height and width"),
    "images of no pixels": (with_sizes(image_height=0), "^images: height and width"),
    "larger images": (with_sizes(image_height=40), "^pos_embed: shape"),
    "packed of another dtype": (with_arguments(tensor=torch.Tensor.double), "^packed: dtype float32"),
    "packed of two dimensions": (with_arguments(tensor=lambda t: t[None]), "^packed: shape"),
    "packed with gaps": (with_arguments(tensor=lambda t: t.repeat_interleave(2)[::2]), "^packed: innermost stride"),
    "short packed": (with_arguments(tensor=lambda t: t[:-100]), "^offsets: head.weight"),
    "panels of no rows": (with_arguments(panel=0), "^panel: a divisor of 32 expected, 0 given"),
    "panels of other rows": (
        with_arguments(panel=4),
        "^plans: panels of .* as this instruction set has, panels of 4 rows",
    ),
    "pool behind the end": (with_sizes(pool_stop=18), "^pool_start, pool_stop"),
    "pool of nothing": (with_sizes(pool_start=3, pool_stop=3), "^pool_start, pool_stop"),
    "stem off a panel": (with_slices(embed=[16, 32]), "packed patch_embed.proj.weight: rows that lie side by side"),
    "classes off a panel": (with_slices(head=[0, 32, 1, 9]), "packed head.weight: rows that lie side by side"),
    "hidden off a panel": (with_slices(mlp=[0, 32, 16, 64]), "packed blocks.0.mlp.fc1.weight: rows"),
    "keys off a panel": (
        with_slices(attention=[0, 32, 0, 65, 128, 0, 2, 16, 16, 16]),
        "packed blocks.0.attn.qkv.weight: rows that lie side by side",
    ),
    "heads apart": (
        with_slices(attention=[0, 32, 0, 64, 128, 0, 2, 12, 12, 16]),
        "packed blocks.0.attn.qkv.weight: rows that lie side by side .* apart",
    ),
    "rows outside": (with_slices(mlp=[0, 32, 192, 128]), "^blocks.0.mlp.fc1.weight: rows"),
    "another embed in the stem": (with_slices(embed=[0, 16]), "^slices: one embed"),
    "another embed in the head": (with_slices(head=[0, 16, 0, 10]), "^slices: one embed"),
    "an embed of nothing": (with_slices(embed=[0, 0]), "^slices: an embed of at least 1"),
    "negative integer": (with_slices(embed=[-32, 32]), "^slices: integers in"),
    "no subnetwork": (with_arguments(subnetwork=[]), "^subnetwork: 34 integers"),
    "an integer less": (with_arguments(subnetwork=lambda s: s[:-1]), "^subnetwork: 34 integers"),
    "no scales": (with_arguments(scales=[]), "^subnetwork: 34 integers and 2 scales"),
    "images of other channels": (with_arguments(images=lambda x: x[:, :2]), "^images: shape .any, 3, 32, 32. expected"),
    "smaller images": (with_arguments(images=lambda x: x[:, :, :24]), "^images: shape"),
    "images of three dimensions": (with_arguments(images=lambda x: x[0]), "^images: shape"),
    "images of another dtype": (with_arguments(images=torch.Tensor.double), "^images: dtype float32"),
    "no plans": (with_plans(lambda plan: []), "^plans: at least one"),
    "plan of another packed": (with_arguments(packed=torch.zeros(10)), "^plans: plans of this packed"),
    "forward with packed of another dtype": (with_arguments(packed=torch.zeros(10).double()), "^packed: dtype"),
    "plan of another dtype": (with_plans(lambda plan: [plan.view(torch.int64)]), "^plans: dtype uint8"),
    "plan of two dimensions": (with_plans(lambda plan: [plan[None]]), "^plans: a tensor of plan_network"),
    "short plan": (with_plans(lambda plan: [plan[:-8]]), "^plans: .* other bytes"),
    "plan of nothing": (with_plans(lambda plan: [plan[:0]]), "^plans: a tensor of plan_network"),
    "plan off its alignment": (with_plans(lambda plan: [plan[4:]]), "^plans: a tensor of plan_network"),
    "zeros": (with_plans(lambda plan: [torch.zeros_like(plan)]), "^plans: .* other bytes"),
    "fewer columns": (with_arguments(columns=9), "^columns: 10 expected"),
    "more columns": (with_arguments(columns=11), "^columns: 10 expected"),
    "no width_index": (with_plans(lambda plan: [plan, plan]), "^width_index: an int64 tensor"),
    "width_index out of range": (with_arguments(width_index=torch.tensor([0, 1, 0])), "^width_index: values in"),
    "negative width_index": (with_arguments(width_index=torch.tensor([0, -1, 0])), "^width_index: values in"),
    "short width_index": (with_arguments(width_index=torch.tensor([0, 0])), "^width_index: shape"),
    "width_index of another dtype": (with_arguments(width_index=torch.zeros(3)), "^width_index: dtype int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name):
    change, message = WRONG[name]
    arguments = call()
    run(arguments)
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        run(arguments)


def test_plans_of_two_networks():
    """Both in one packed tensor: the forward takes sizes from the first."""
    arguments = call()
    one = plan_of(arguments)
    with_sizes(pool_stop=2)(arguments)
    with_plans(lambda plan: [one, plan])(arguments)
    with pytest.raises(RuntimeError, match="^plans: plans of one network"):
        run(arguments)


@pytest.mark.parametrize("index", range(5 + 14 * LAYERS + 4))
def test_an_absent_parameter_is_an_error_or_no_part_of_the_sum(index):
    arguments = call()
    arguments["offsets"][index] = -1
    try:
        assert torch.isfinite(run(arguments)).all()
    except RuntimeError as error:
        assert "expected" in str(error)


def test_no_images():
    arguments = call()
    arguments["images"] = arguments["images"][:0]
    assert run(arguments).shape == (0, 10)


def replaced(index, value):
    """Another parameter; by a function, the same one in another form."""

    def change(parameters, sizes):
        parameters[index] = value(parameters[index]) if callable(value) else value

    return change


def shortened(parameter):
    return parameter[..., :-1]


UNPACKABLE = {
    "no parameters": (lambda p, s: p.clear(), "^parameters: 37 expected for 2 layers, 0 given"),
    "a parameter less": (lambda p, s: p.pop(), "^parameters: 37 expected for 2 layers, 36 given"),
    "a size less": (lambda p, s: s.pop(), "^sizes: 14 integers expected, 13 given"),
    "no patch embedding": (replaced(0, None), "^patch_embed.proj.weight: a tensor expected, None given"),
    "no fc1": (replaced(14, None), "^blocks.0.mlp.fc1.weight: a tensor expected, None given"),
    "no norm": (replaced(27, None), "^blocks.1.norm2.bias: a tensor expected, None given"),
    "no projection": (replaced(23, None), "^blocks.1.attn.proj.weight: a tensor expected, None given"),
    "short cls_token": (replaced(2, shortened), r"^cls_token: shape \(1, 1, 64\) expected, \(1, 1, 63\) given"),
    "short norm": (replaced(5, shortened), "^blocks.0.norm1.weight: shape"),
    "short qkv bias": (replaced(8, shortened), "^blocks.0.attn.qkv.bias: shape"),
    "narrow fc1": (replaced(14, shortened), "^blocks.0.mlp.fc1.weight: shape"),
    "fewer classes": (replaced(36, shortened), "^head.bias: shape"),
    "a matrix for a vector": (replaced(5, torch.zeros(64, 1)), "^blocks.0.norm1.weight: shape"),
    "doubles in a weight": (
        replaced(7, torch.Tensor.double),
        "^blocks.0.attn.qkv.weight: dtype float32 expected, float64 given",
    ),
    "columns apart": (
        replaced(7, lambda p: p.repeat_interleave(2, 1)[:, ::2]),
        "^blocks.0.attn.qkv.weight: contiguous rows expected, strides",
    ),
}


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed(name):
    change, message = UNPACKABLE[name]
    model = make(SMALL)
    parameters, sizes = detached(model), list(SMALL.sizes)
    change(parameters, sizes)
    with pytest.raises(RuntimeError, match=message):
        hydravit.pack_network_native(parameters, sizes)


def test_parameters_of_any_strides():
    """Vectors are converted; rows of a weight may lie apart."""
    model = make(SMALL)
    parameters, (expected, expected_offsets, _) = detached(model), pack(model)
    parameters[5] = parameters[5].double()
    parameters[6] = parameters[6].repeat_interleave(2)[::2]
    parameters[7] = torch.cat((parameters[7], parameters[7]), 1)[:, : parameters[7].shape[1]]
    packed, offsets, _ = hydravit.pack_network_native(parameters, SMALL.sizes)
    assert offsets == expected_offsets and packed.shape == expected.shape
    for parameter, offset in zip(parameters, offsets, strict=True):
        if parameter is not None:
            place = slice(offset, offset + parameter.numel())
            assert torch.equal(packed[place], expected[place])


@pytest.mark.parametrize("classes", [1, 31, 32, 33, 70])
def test_layout(isa, classes):
    """Every parameter begins on a cache line, one after the other. Element (row, column) of a weight lies at
    ``row // panel`` panels on, in column ``column``, at ``row % panel``.
    """
    model = make(SMALL, num_classes=classes, patch_size=4, layer_scale=0.5)
    (packed, offsets, panel), stop = pack(model), 0
    for parameter, offset in zip(detached(model), offsets, strict=True):
        assert offset == (-1 if parameter is None else stop)
        if parameter is None:
            continue
        if parameter.dim() in (2, 4):  # tokens and positions have three axes
            rows, columns = parameter.shape[0], parameter[0].numel()
            size = math.ceil(rows / panel) * panel * columns
            panels = packed[offset : offset + size].view(-1, columns, panel).transpose(1, 2)
            assert torch.isfinite(panels).all()
            values = panels.reshape(-1, columns)[:rows]
        else:
            size = math.ceil(parameter.numel() / 16) * 16
            values = packed[offset : offset + parameter.numel()]
        assert torch.equal(values, parameter.view_as(values))
        stop += size
    assert stop == packed.numel()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("classes", [10, 0])
def test_fake_kernel(classes, mixed):
    """A mixture is as wide as its widest image, with and without a classifier.

    opcheck copies its arguments, and a plan belongs to one packed tensor, not to its copy.
    """
    model = make(SMALL, num_classes=classes)
    selection = model.select(torch.tensor([2, 1, 4]) if mixed else 2, 3)
    packed, offsets, panel = pack(model)
    plans = [
        hydravit.plan_network_native(packed, offsets, panel, model.config.sizes, *s.flat(), s.eps)
        for s in selection.subnetworks
    ]
    columns = max(s.head.classes if classes else s.embed.embed for s in selection.subnetworks)
    arguments = (images(SMALL, 3), packed, plans, columns, selection.width_index)
    logits = hydravit.network_native(*arguments, True)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        faked = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        fake = hydravit.network_native(*faked, True)
    assert (fake.shape, fake.stride(), fake.dtype) == (logits.shape, logits.stride(), logits.dtype)


def test_schemas_of_packing_and_planning():
    model = make(SMALL)
    packed, offsets, panel = pack(model)
    for op, arguments in (
        (hydravit.pack_network_native, (detached(model), list(SMALL.sizes))),
        (
            hydravit.plan_network_native,
            (packed, offsets, panel, list(SMALL.sizes), *model.subnetwork(2).flat(), SMALL.norm_eps),
        ),
    ):
        torch.library.opcheck(op.default, arguments, test_utils="test_schema")
