"""``hydravit compare``: settings of a recipe against each other, on the training part alone."""

import dataclasses
import json

import numpy as np
import pytest

from hydravit import HydraViT
from hydravit.checkpoint import save_checkpoint
from hydravit.cli import main
from hydravit.data.dataset import folds
from hydravit.recipes import get_recipe
from hydravit.training import comparison, data

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = "compare --recipe demo --epochs 1 --folds 2 --set depth=1 --set warmup_epochs=0.0".split()


def test_folds_spread_every_class_evenly():
    labels = np.repeat(np.arange(5), (30, 31, 32, 10, 2))
    fold = folds(labels, 3, seed=0)
    for label in range(5):
        counts = np.bincount(fold[labels == label], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert (fold == folds(labels, 3, seed=0)).all() and (fold != folds(labels, 3, seed=1)).any()


def test_settings_are_compared_without_the_test_part(tmp_path, capsys, monkeypatch):
    asked, load = [], data.load_dataset
    monkeypatch.setattr(data, "load_dataset", lambda *a, **k: asked.append(k["split"]) or load(*a, **k))
    out = tmp_path / "made" / "settings.jsonl"
    assert main([*QUICK, "--try", "lr=4e-3 heads=(1,2)", "--out", str(out)]) == 0
    as_it_is, changed = capsys.readouterr().out.splitlines()
    assert as_it_is.endswith("as it is") and changed.endswith("lr=4e-3 heads=(1,2)")
    assert set(asked) == {"train"}
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    trained = [(entry["identity"]["recipe"]["lr"], entry["identity"]["fold"]) for entry in entries]
    own = get_recipe("demo").lr
    assert trained == [(own, 0), (own, 1), (4e-3, 0), (4e-3, 1)]
    assert list(entries[-1]["top1"]) == ["1", "2"]
    mean = sum(entry["top1"][k] for entry in entries[2:] for k in "12") / 4
    assert changed.startswith(f"{mean:.2f} ")

    asked.clear()  # what is known is not trained again
    out.write_text("".join(json.dumps(entry) + "\n" for entry in entries[:3]))
    assert main([*QUICK, "--try", "lr=4e-3 heads=(1,2)", "--out", str(out)]) == 0
    assert len(asked) == 2 and capsys.readouterr().out.splitlines()[0] == as_it_is


def test_wrong_settings_are_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison.CrossValidation, "fold", None)
    for wrong, message in ((["--try", "speed=9"], "--set speed=9"), (["--folds", "1"], "--folds 1")):
        assert main([*QUICK, *wrong, "--out", str(tmp_path / "x.jsonl")]) == 2
        assert message in capsys.readouterr().err


def test_lists_that_grow_are_refused(tmp_path, capsys):
    vit = HydraViT(dataclasses.replace(get_recipe("demo").config, geometry="skd"), backend="reference")
    save_checkpoint(tmp_path / "vit.safetensors", vit)
    command = ["compare", "--recipe", "skd", "--checkpoint", str(tmp_path / "vit.safetensors"), "--data", "digits"]
    assert main([*command, "--out", str(tmp_path / "out.jsonl")])
    assert "compare: a list of cuts grows to other widths in every fold" in capsys.readouterr().err
