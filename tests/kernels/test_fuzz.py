"""Random slices, shapes and options: every native op against the reference in float64, the network against its blocks.

Sizes are small and no multiples of anything; a case is a function of its seed alone. A failure names the case.
"""

import pytest
import torch
from blocks import hydravit
from cases import OPS, Case, check_op
from machine import ISAS, isa_why_not
from small import poison, shake

from hydravit import HydraViT, HydraViTConfig
from hydravit.geometry import Selection
from hydravit_kernels import (
    AttentionSlice,
    CpuNetwork,
    EmbedSlice,
    HeadSlice,
    MlpSlice,
    Subnetwork,
)
from hydravit_kernels.networks.cpu import PANEL_MULTIPLE

pytestmark = pytest.mark.needs("native")
CASES = 50  # of one test


@pytest.fixture
def each_case(threads):
    """Runs ``check(case)`` for every case of a test; whatever one raises is told together with its choices."""
    before, isas = hydravit.cpu_isa(), [isa for isa in ISAS if not isa_why_not(isa)]

    def run(name, batch, check):
        for i in range(CASES):
            case = Case(f"{name} {batch * CASES + i}")
            hydravit.set_cpu_isa(case.one_of("isa", *isas))
            threads(case.one_of("threads", 1, 1, 2, 3))
            try:
                check(case)
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise AssertionError(f"{reason}\nin the case {case}") from error

    yield run
    hydravit.set_cpu_isa(before)


# ---- The ops ----


@pytest.mark.parametrize("batch", range(10))
@pytest.mark.parametrize("name", OPS)
def test_op_is_the_reference(each_case, name, batch):
    """Forward and every gradient, within the error budget; NaN outside the slices; see ``Block.check``."""
    each_case(name, batch, lambda case: check_op(name, case))


# ---- The whole network ----


def random_config(case):
    head_dim, patch = case.one_of("head_dim", 5, 8, 12, 16, 24, 32, 40), case.between("patch", 1, 6)
    heads = case.between("max_heads", 1, 5)
    pool = case.one_of("pool", "token", "avg")
    return HydraViTConfig(
        image_size=(patch * case.between("down", 1, 5), patch * case.between("across", 1, 5)),
        patch_size=patch,
        in_channels=case.between("channels", 1, 4),
        num_classes=case.between("classes", 0, 70),
        depth=case.between("depth", 1, 3),
        max_heads=heads,
        head_dim=head_dim,
        mlp_ratio=case.between("hidden of a head", 1, 80) / head_dim,
        qkv_bias=case.coin("qkv_bias"),
        proj_bias=case.coin("proj_bias"),
        class_token=pool == "token" or case.coin("class_token"),
        register_tokens=case.between("registers", 0, 3),
        no_embed_class=case.coin("no_embed_class"),
        pool=pool,
        layer_scale=case.one_of("layer_scale", None, 0.3),
        separate_classifiers=tuple(range(1, heads + 1)) if case.coin("separate_classifiers", 0.2) else (),
    )


def random_subnetwork(case, config):
    """Any subnetwork that a packed copy serves: rows from a panel on, heads side by side, all else as it comes."""

    def part(size):
        offset = PANEL_MULTIPLE * case.random.randrange(-(-size // PANEL_MULTIPLE))
        return offset, case.random.randint(1, size - offset)

    full, attention, mlp = config.embed, [], []
    embed = EmbedSlice(*part(full))
    for _ in range(config.depth):
        heads = case.random.choice([0, 1, 1, 2, 3, 4])
        head_dim = value_dim = pitch = case.random.randint(1, max(1, full // max(heads, 1)))
        if heads == 1:
            value_dim, pitch = case.random.randint(1, full), case.random.randint(0, 9)
        heads = min(heads, full // head_dim)
        lengths = [max(heads, 1) * dim for dim in (head_dim, head_dim, value_dim)]
        rows = [case.place(length, 3 * full, PANEL_MULTIPLE) for length in lengths]
        column = case.place(lengths[2], full)
        scale = case.random.choice([0.2, head_dim**-0.5])
        attention.append(AttentionSlice(*embed, *rows, column, heads, head_dim, value_dim, pitch, scale))
        mlp.append(MlpSlice(*embed, *((0, 0) if case.random.random() < 0.1 else part(config.hidden))))
    classes = config.num_classes
    offsets = range(0, classes * len(config.separate_classifiers), PANEL_MULTIPLE)
    if config.separate_classifiers:
        head = HeadSlice(*embed, case.random.choice([i for i in offsets if i % classes == 0] or [0]), classes)
    else:
        head = HeadSlice(*embed, *(part(classes) if classes else (0, 0)))
    return config.sizes.validate(Subnetwork(1, embed, tuple(attention), tuple(mlp), head, 1e-5))


@torch.no_grad()
def check_network(case):
    torch.manual_seed(case.random.getrandbits(32))
    config = case.keep("config", random_config(case))
    batch, count = case.between("batch", 1, 5), case.between("widths", 1, 3)
    subnetworks = case.keep("subnetworks", tuple(random_subnetwork(case, config) for _ in range(count)))
    model = poison(shake(HydraViT(config, backend="native").eval()), subnetworks)
    images = case.images(batch, config.in_channels, *config.image_size)
    selection = Selection(subnetworks, case.width_index(batch, count))
    fused = model.structure().fused
    expected = model._head(model._trunk(images, selection, fused), selection)
    assert torch.isfinite(expected).all(), "a block read outside the slice"

    network = CpuNetwork(model.network_parameters(), config.sizes)
    for pooled_only in (True, False):
        logits = network.run(images, *selection, pooled_only=pooled_only)
        assert torch.equal(logits, expected), f"other bits, pooled_only={pooled_only}"


@pytest.mark.parametrize("batch", range(12))
def test_packed_network_is_its_blocks(each_case, batch):
    """Bit for bit; NaN in every parameter outside the slices, before packing."""
    each_case("network", batch, check_network)
