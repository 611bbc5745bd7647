"""Costs against the literature's figures, and what ``evaluate`` returns and refuses."""

import json

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from hydravit import CONFIGS, HydraViT, HydraViTConfig
from hydravit.config import resolve_config
from hydravit.evaluation import (
    cost,
    costs,
    evaluate,
    format_accuracy,
    format_supernet,
    format_table,
    interval,
    measure_supernet,
    picture,
    plot,
    write_results,
)
from hydravit.evaluation.latency import measure_latency, with_backend
from hydravit.evaluation.memory import measure_memory
from hydravit.geometry import hydravit, matformer, scala, skd
from hydravit.inference import with_e4m3_weights

TINY = HydraViTConfig(image_size=8, patch_size=4, in_channels=1, num_classes=7, depth=2, max_heads=3, head_dim=4)


@pytest.fixture
def model():
    return HydraViT(TINY, backend="reference")


@pytest.fixture
def dataset():
    return TensorDataset(torch.randn(10, 1, 8, 8), torch.arange(10) % 7)


# Costs


@pytest.mark.parametrize(
    ("heads", "gmacs", "params"), [(3, 1.25, 5_717_416), (6, 4.60, 22_050_664), (12, 17.56, 86_567_656)]
)
def test_vit_tiny_small_and_base_cost_what_the_literature_says(heads, gmacs, params):
    config = CONFIGS["base"]
    counted = cost(config, hydravit(config, heads))
    assert round(counted.macs / 1e9, 2) == gmacs and counted.params == params


def test_the_full_width_has_all_parameters_of_any_model():
    for changes in (
        {},
        {"pool": "avg"},
        {"register_tokens": 2, "layer_scale": 0.1},
        {"qkv_bias": False},
        {"proj_bias": False},
    ):
        config = resolve_config(TINY, **changes)
        elements = sum(p.numel() for p in HydraViT(config, backend="reference").parameters())
        assert cost(config, hydravit(config, 3)).params == elements


def test_separate_classifiers_count_once():
    config = resolve_config(TINY, separate_classifiers=(1, 3))
    assert costs(config)[3] == costs(TINY)[3] and list(costs(config)) == [1, 3]


def test_costs_of_other_geometries():
    full = cost(TINY, hydravit(TINY, 3))
    half_mlp = cost(TINY, matformer(TINY, 1))
    tokens, hidden = TINY.tokens, TINY.hidden * 2 // 3  # what two of the three heads' share leaves out
    assert full.macs - half_mlp.macs == TINY.depth * tokens * TINY.embed * 2 * hidden
    assert full.params - half_mlp.params == TINY.depth * (2 * TINY.embed * hidden + hidden)
    assert cost(TINY, scala(TINY, 6, suffix=True)) == cost(TINY, scala(TINY, 6, suffix=False))
    skipped = cost(TINY, skd(TINY, [(4, 48), (0, 0)]))
    block = sum(p.numel() for p in HydraViT(TINY, backend="reference").blocks[0].parameters())
    assert full.params - skipped.params == block


# Evaluation


def test_rows_have_what_results_json_promises(model, dataset, tmp_path):
    results = evaluate(model, dataset, batch_size=4, seconds=0.02)
    assert [row["heads"] for row in results["widths"]] == [1, 2, 3]
    for row in results["widths"]:
        assert {"heads", "params", "gmacs", "top1", "latency_ms"} <= set(row)
        assert set(row["latency_ms"]) == {"eager", "fused"} and row["latency_ms"]["eager"] > 0
        assert row["latency_ms"]["fused"] is None and 0 <= row["top1"] <= row["top5"] <= 100
        low, high = row["latency_spread_ms"]["eager"]
        assert low <= row["latency_ms"]["eager"] <= high
    about = results["environment"]
    assert about["fused_missing"] == "the reference backend was asked for" and about["torch"] == torch.__version__
    assert {"cpu", "threads", "backend", "commit", "memory"} <= set(about)
    assert len(format_table(results).splitlines()) >= 6
    paths = write_results(results, tmp_path / "made" / "here")
    assert json.loads(paths[0].read_text()) == results
    with Image.open(paths[1]) as image:
        assert image.format == "PNG" and image.width > image.height


def test_accuracy_is_what_counting_says(model, dataset):
    images, labels = dataset.tensors
    results = evaluate(model.train(), dataset, heads=[2], batch_size=3, latency=False, memory=False)
    assert model.training  # put back
    with torch.no_grad():
        order = model.eval()(images, heads=2).argsort(1, descending=True)
    (row,) = results["widths"]
    assert row["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert row["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert row["latency_ms"] == {"eager": None, "fused": None} and row["peak_memory_mib"] is None


def test_accuracy_with_rounded_weights_comes_beside(model):
    images = torch.randn(500, 1, 8, 8)
    with torch.no_grad():
        labels = with_e4m3_weights(model.eval())(images, heads=3).argmax(1)
    dataset, options = TensorDataset(images, labels), {"heads": [1, 3], "latency": False, "memory": False}
    results, plain = evaluate(model, dataset, e4m3_weights=True, **options), evaluate(model, dataset, **options)
    for row, without in zip(results["widths"], plain["widths"], strict=True):
        assert without.items() <= row.items() and row.keys() - without.keys() == {"e4m3_top1", "e4m3_top5"}
    narrow, full = results["widths"]
    assert full["e4m3_top1"] == 100 and 50 < full["top1"] < 100 and narrow["e4m3_top1"] < 100
    assert "e4m3 top-1" in format_table(results) and "e4m3" not in format_table(plain)


@pytest.mark.parametrize(("correct", "count"), [(585, 599), (300, 599), (1, 10)])
def test_the_interval_of_an_accuracy_is_wilsons(correct, count):
    """By definition its ends are the accuracies whose own normal interval just reaches what was found."""
    found = correct / count
    for end in interval(100 * found, count):
        p = end / 100
        assert abs(found - p) == pytest.approx(1.959964 * (p * (1 - p) / count) ** 0.5)


def test_the_interval_stays_inside_and_shrinks():
    for percent in (0.0, 100.0):
        low, high = interval(percent, 599)
        assert 0 <= low <= percent <= high <= 100 and 0 < high - low < 1
    few, many = (interval(97.0, count) for count in (100, 10_000))
    assert few[0] < many[0] < 97 < many[1] < few[1]


def test_rows_have_the_interval_of_their_accuracy(model, dataset):
    for row in evaluate(model, dataset, latency=False, memory=False)["widths"]:
        low, high = row["top1_interval"]
        assert low <= row["top1"] <= high and high - low > 20  # of ten images


def test_the_supernets_widths_are_measured_beside_eager_pytorch(model, dataset, tmp_path):
    supernet = measure_supernet(TINY, seconds=0.01, memory=False)
    rows, about = supernet["widths"], supernet["environment"]
    assert [row["heads"] for row in rows] == [1, 2, 3]
    assert [row["params"] for row in rows] == [counted.params for counted in costs(TINY).values()]
    assert all(row["latency_ms"]["eager"] > 0 for row in rows)
    fused = [row["latency_ms"]["fused"] for row in rows]
    assert all(fused) if not about["fused_missing"] else not any(fused)
    weights = about["weights_mib"]
    assert weights["eager"] is None and weights["separate"] * 2**20 == 4 * sum(row["params"] for row in rows)
    assert len(format_supernet(supernet).splitlines()) >= 6

    weights.update(eager=330.0, fused=660.0)
    for row in rows:
        row["peak_memory_mib"] = {"eager": 5.0 + row["heads"], "fused": 2.0}
    lines = format_supernet(supernet).splitlines()
    assert "eager MiB" in lines[0] and lines[3].split()[-2:] == ["338", "662"]
    results = {**evaluate(model, dataset, latency=False, memory=False), "supernet": supernet}
    assert "95 % interval" in format_accuracy(results)
    with Image.open(write_results(results, tmp_path)[1]) as image:
        assert image.width > 2 * image.height  # accuracy, latency, memory


def test_a_supernet_without_fused_kernels_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRAVIT_BACKEND", "reference")
    supernet = measure_supernet(TINY, seconds=0.01, memory=False)
    assert all(row["latency_ms"]["fused"] is None for row in supernet["widths"])
    text = format_supernet(supernet)
    assert "no latency of ours: the model runs on the reference backend" in text and "memory: not asked for" in text
    rows = [{**row, "top1": 50.0, "top1_interval": [40.0, 60.0]} for row in supernet["widths"]]
    plot({"widths": rows, "environment": {"images": 9}, "supernet": supernet}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_plot_needs_no_latency(model, dataset, tmp_path):
    plot(evaluate(model, dataset, latency=False, memory=False), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_memory_is_measured_or_says_why_not(model):
    weights, peaks, measured = measure_memory(model, [1, 3], batch_size=64)
    assert set(peaks) == {1, 3}
    if "not measured" in measured:
        assert {weights, *peaks.values()} == {None} and len(measured) > 20
    else:
        assert 0 <= peaks[1] <= peaks[3] < 500 and -1 < weights < 50


def test_the_eager_twin_shares_every_weight(model):
    twin = with_backend(model, "reference")
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError, match="unknown backend"):
        with_backend(model, "quantum")


@pytest.mark.needs("native")
def test_fused_latency_is_measured_where_there_is_a_native_backend(dataset):
    results = evaluate(HydraViT(TINY, backend="native"), dataset, heads=[1, 3], seconds=0.02, memory=False)
    for row in results["widths"]:
        assert row["latency_ms"]["fused"] > 0 and row["difference"] < 1e-3
    assert results["environment"]["fused_missing"] == ""


def test_backends_that_disagree_are_not_timed(model, dataset):
    other = HydraViT(TINY, backend="reference")
    with pytest.raises(RuntimeError, match="heads=1: fused .* differs from eager"):
        measure_latency({"eager": model, "fused": other}, dataset[0][0][None], [1])


def test_evaluate_refuses(model, dataset):
    with pytest.raises(ValueError, match="dataset is empty"):
        evaluate(model, TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="label 7 in the data, but the model has 7 classes"):
        evaluate(model, TensorDataset(torch.zeros(1, 1, 8, 8), torch.tensor([7])))
    with pytest.raises(ValueError, match="heads"):
        evaluate(model, dataset, heads=[4])
    with pytest.raises(ValueError, match="no classifier"):
        evaluate(HydraViT(resolve_config(TINY, num_classes=0), backend="reference"), dataset)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        evaluate(model, dataset)


def test_the_picture_says_where_a_ratio_says_little():
    spreads = {1: ([4.0, 8.0], [2.0, 3.0]), 2: ([4.0, 8.0], [2.0, 4.5])}
    rows = [{"heads": k, "latency_spread_ms": {"eager": pair[0], "fused": pair[1]}} for k, pair in spreads.items()]
    assert picture._overlapping(rows) == ["2"]
    assert picture._overlapping([{"heads": 3, "latency_spread_ms": {"eager": [1.0, 2.0]}}]) == []
