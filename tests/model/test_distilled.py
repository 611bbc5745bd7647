"""A distilled DeiT: two tokens and two classifiers, as in timm, at every width."""

import copy
import pickle
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from small import SMALL, images, make, poison, quietly, shake
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

import hydravit
from hydravit import cli
from hydravit.checkpoint import extract, extract_config, load_weights, save_checkpoint
from hydravit.config import resolve_config
from hydravit.evaluation.cost import cost
from hydravit.inference import with_e4m3_weights
from hydravit.timm_models import config_of, timm
from hydravit.training import SliceAdamW, SliceGradients

pytestmark = pytest.mark.usefixtures("one_thread")
both = pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=pytest.mark.needs("native"))])
WIDTHS = [2, 4]
at_widths = pytest.mark.parametrize("heads", WIDTHS)
Distilled = timm.models.deit.VisionTransformerDistilled
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def deit(**options):
    return shake(Distilled(**{**SIZES, **options})).eval()


def timms(model, heads):
    """The width in timm's distilled DeiT."""
    vit = Distilled(**extract_config(model, heads)).train(model.training)
    vit.load_state_dict(extract(model, heads))
    return vit


# Logits ---------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("source", ["model", "state dict", "file"])
def test_timms_distilled_deit_is_computed(backend, source, tmp_path):
    vit = deit()
    given = {"model": vit, "state dict": vit.state_dict(), "file": tmp_path / "deit.pth"}[source]
    if source == "file":
        torch.save({"model": vit.state_dict()}, given)
    fields = {} if source == "model" else {"head_dim": 16}
    model = quietly(hydravit.fused_model, checkpoint=given, backend=backend, **fields).eval()
    assert model.config == resolve_config(SMALL, distilled=True) == config_of(vit)
    assert model.state_dict().keys() == vit.state_dict().keys()
    x = images(SMALL, 3)
    with torch.no_grad():
        for _ in range(3):  # it is never packed
            close(model(x), vit(x))
        assert model.packed_inference.network is None
        for heads in WIDTHS:
            narrow = timms(model, heads)
            close(model(x, heads=heads), narrow(x))
            features = model.forward_features(x, heads=heads)
            close(features, narrow.forward_features(x))
            close(model.forward_head(features, heads), narrow.forward_head(features))
            close(model.forward_head(features, heads, pre_logits=True), narrow.forward_head(features, pre_logits=True))
        close(
            model(x, heads=torch.tensor([4, 2, 3])),
            torch.cat([model(x[i : i + 1], heads=k) for i, k in enumerate((4, 2, 3))]),
        )
        assert model(x[:0]).shape == (0, 10)


@both
@at_widths
@pytest.mark.parametrize("geometry", ["hydravit", "sortednet", "matformer"])
def test_nothing_outside_the_slice_is_read(backend, heads, geometry):
    model, x = make(SMALL, backend, distilled=True, geometry=geometry), images(SMALL)
    expected = model(x, heads=heads)
    poison(model, [model.subnetwork(heads)])
    assert torch.equal(model(x, heads=heads), expected)


# Training -------------------------------------------------------------------------------------------------------------


@both
@at_widths
@pytest.mark.parametrize("distilled_training", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_are_timms(backend, heads, distilled_training, in_place, hooked):
    model, x = make(SMALL, backend, distilled=True).train(), images(SMALL)
    narrow = timms(model, heads)
    if hooked:
        model.head_dist.register_forward_hook(lambda *_: None)
    held = SliceGradients(model) if in_place else None
    for network, width in ((model, {"heads": heads}), (narrow, {})):
        network.set_distilled_training(distilled_training)
        found = network(x, **width)
        if distilled_training:
            logits, of_distillation = found
            (logits.square().sum() + of_distillation.sin().sum()).backward()
        else:
            found.square().sum().backward()
    expected = dict(narrow.named_parameters())
    slices = hydravit.geometry.parameter_slices(model.config, model.subnetwork(heads))
    for name, parameter in model.named_parameters():
        close(hydravit.checkpoint.take(parameter.grad, slices[name]), expected[name].grad)
        assert parameter.grad.count_nonzero() <= expected[name].numel()  # none outside the slice
    if held is not None:
        held.close()
    assert isinstance(model.eval()(x, heads=heads), torch.Tensor)  # evaluation always has the mean


@both
@pytest.mark.parametrize("kind", ["in place", "SliceAdamW"])
def test_steps_of_optimizers(backend, kind):
    """With the full width alone, gradients in place and ``SliceAdamW`` do what plain AdamW does."""
    plain = make(SMALL, backend, distilled=True).train()
    model, x, labels = copy.deepcopy(plain), images(SMALL), torch.tensor([1, 2])
    gradients = SliceGradients(model)
    of_plain = torch.optim.AdamW(plain.parameters(), lr=0.01)
    of_model = torch.optim.AdamW(model.parameters(), lr=0.01)
    if kind == "SliceAdamW":
        of_model = SliceAdamW(model.parameters(), model, lr=0.01)
    for _ in range(3):
        of_plain.zero_grad()
        gradients.zero_()
        for network, optimizer in ((plain, of_plain), (model, of_model)):
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()
    close(model(x), plain(x))
    for name in ("dist_token", "head_dist.weight", "head_dist.bias", "norm.weight"):  # a key's bias has no gradient
        close(model.get_parameter(name), plain.get_parameter(name))


def test_only_a_distilled_model_trains_so():
    with pytest.raises(ValueError, match="set_distilled_training needs a model with distilled=True"):
        make().set_distilled_training()


# Modules and timm's tools ---------------------------------------------------------------------------------------------


@both
@at_widths
def test_modules_run_where_somebody_could_tell(backend, heads):
    model, x, seen = make(SMALL, backend, distilled=True), images(SMALL), []
    expected = model(x, heads=heads)
    handle = model.head_dist.register_forward_hook(lambda module, inputs, logits: seen.append((*inputs, logits)))
    close(model(x, heads=heads), expected)
    ((token, logits),) = seen
    close(token, model.forward_features(x, heads)[:, 1])
    close(
        (logits + model.head(token * 0 + model.forward_features(x, heads)[:, 0], columns=((0, 16 * heads),))) / 2,
        expected,
    )
    handle.remove()
    model.head, model.head_dist = nn.Linear(64, 5), nn.Linear(64, 5)
    assert model.num_classes == 5
    close(model(x, heads=heads), timms(model, heads)(x))
    model.head_dist = nn.Linear(64, 7)
    with pytest.raises(RuntimeError, match=r"head_dist.weight: shape \(5, 64\) expected, \(7, 64\) given"):
        model(x, heads=heads)


@both
@at_widths
def test_what_timms_tools_call(backend, heads):
    model, x = make(SMALL, backend, distilled=True), images(SMALL)
    narrow = timms(model, heads)
    assert model.num_prefix_tokens == narrow.num_prefix_tokens == 2
    found = model.forward_intermediates(x, return_prefix_tokens=True, norm=True, heads=heads)
    expected = narrow.forward_intermediates(x, return_prefix_tokens=True, norm=True)
    close(found[0], expected[0])
    for mine, theirs in zip(found[1], expected[1], strict=True):
        close(mine, theirs)
    assert set(narrow.no_weight_decay()) <= model.no_weight_decay()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert "dist_token" in next(iter(groups.values())) and {"head.weight", "head_dist.weight"} <= set(
        sum(groups.values(), [])
    )
    assert model.get_classifier() == (model.head, model.head_dist)
    model.reset_classifier(3)
    assert model(x, heads=heads).shape == (2, 3)
    close(model(x, heads=heads), timms(model, heads)(x))
    with pytest.raises(ValueError, match="distilled=True needs pool='token'"):
        model.reset_classifier(3, "avg")
    model.set_input_size(48)
    assert model.eval()(torch.randn(1, 3, 48, 48), heads=heads).shape == (1, 3)
    model.prune_intermediate_layers([0])
    assert model(torch.randn(1, 3, 48, 48), heads=heads).shape == (1, 16 * heads)


@both
def test_registry_name_copies_pickles_and_exports(backend):
    name, options = "hydravit_tiny_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 4}
    model = shake(timm.create_model(name, distilled=True, backend=backend, **options)).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x, heads=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, heads=2), expected)
    model.heads = 2
    close(torch.export.export(model, (x,)).module()(x), expected)
    features = timm.create_model(name, distilled=True, features_only=True, backend=backend, **options, out_indices=[0])
    assert [m.shape for m in features(x)] == [(2, 192, 2, 2)]


@pytest.mark.parametrize("classes", [10, 3])
def test_timm_loads_its_weights_into_the_registered_model(classes, tmp_path):
    vit = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=10).eval()
    torch.save(vit.state_dict(), tmp_path / "deit.pth")
    model = timm.create_model(
        "hydravit_tiny_patch16_224", distilled=True, depth=1, num_classes=classes, pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "deit.pth"), "num_classes": 10},
    ).eval()  # fmt: skip
    assert torch.equal(model.dist_token, vit.dist_token) and model.head_dist.out_features == classes
    if classes == 10:
        x = torch.randn(1, 3, 224, 224)
        close(model(x), vit(x))


@pytest.mark.needs("native")
@pytest.mark.long
def test_one_graph_serves_all_widths():
    model, x = make(SMALL, "native", distilled=True), images(SMALL)
    compiled = torch.compile(model, fullgraph=True)
    for heads in (2, 3, 4):
        close(compiled(x, heads=heads), model(x, heads=heads))


@pytest.mark.needs("native")
def test_packed_networks_do_not_serve_it():
    model = make(SMALL, "native", distilled=True)
    with pytest.raises(ValueError, match="engine: .* head_dist is a second classifier, which packed networks do not"):
        model.engine()
    with pytest.raises(ValueError, match="head_dist is a second classifier"):
        with_e4m3_weights(model)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_files_and_the_command_line(tmp_path, capsys):
    model, path, plain = (
        make(num_classes=10, image_size=8, patch_size=4, in_channels=1, distilled=True),
        *(tmp_path / f"{name}.safetensors" for name in ("model", "narrow")),
    )
    save_checkpoint(path, model)
    again = hydravit.fused_model(checkpoint=path, backend="reference").eval()
    x = torch.randn(2, 1, 8, 8)
    close(again(x, heads=2), model(x, heads=2))
    assert cli.main(["extract", "--checkpoint", str(path), "--heads", "2", "--out", str(plain)]) == 0
    assert "\ntimm.models.deit.VisionTransformerDistilled(" in capsys.readouterr().out
    close(hydravit.fused_model(checkpoint=plain, backend="reference").eval()(x), model(x, heads=2))
    assert (
        cli.main(["evaluate", "--checkpoint", str(path), "--data", "digits", "--heads", "2,4", "--accuracy-only"]) == 0
    )


def test_weights_that_do_not_fit_are_adapted_or_named():
    source = make(distilled=True)
    with pytest.warns(UserWarning) as told:
        other = make(SMALL, image_size=48, num_classes=3, distilled=True)
        load_weights(other, source.state_dict())
    texts = [str(warning.message) for warning in told]
    assert any("pos_embed is resampled from 4 x 4 to 6 x 6" in text for text in texts)
    assert sum("initialised anew" in text for text in texts) == 2
    assert torch.equal(other.pos_embed[:, :2], source.pos_embed[:, :2])
    narrow, wide = make(max_heads=2, distilled=True), make(distilled=True)
    quietly(load_weights, wide, narrow.state_dict())
    x = images(SMALL)
    close(wide(x, heads=2), narrow(x))
    plain = make()
    with pytest.raises(ValueError, match="the checkpoint lacks dist_token"):
        quietly(load_weights, make(distilled=True), plain.state_dict())
    kept = make(distilled=True)
    token = kept.dist_token.clone()
    quietly(load_weights, kept, plain.state_dict(), strict=False)
    assert torch.equal(kept.dist_token, token) and not kept.pos_embed[:, 1].any()
    assert torch.equal(kept.pos_embed[:, 2:], plain.pos_embed[:, 1:])


@pytest.mark.parametrize(
    "fields", [{"pool": "avg"}, {"register_tokens": 1}, {"separate_classifiers": (1, 2)}, {"fc_norm": True}], ids=str
)
def test_other_options_are_refused(fields):
    with pytest.raises(ValueError, match="distilled=True needs pool='token' .*, as timm's distilled DeiT"):
        resolve_config(SMALL, distilled=True, **fields)


@pytest.mark.needs("native")
def test_its_cost_is_counted():
    model = make(SMALL, "native", distilled=True)
    counted = cost(model.config, model.subnetwork(4), pooled_only=True)
    assert counted.params == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(SMALL, 1))
    assert counter.get_total_flops() == 2 * counted.macs
