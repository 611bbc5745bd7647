"""Where an optional package is missing, one line names the extra that installs it."""

import re
import sys

import numpy as np
import pytest

from hydravit.cli import main
from hydravit.data import load_dataset
from hydravit.data.dataset import ArrayDataset
from hydravit.evaluation import plot
from hydravit.extras import extra
from hydravit.preprocessing import Preprocessing
from hydravit.recipes import get_recipe, photos


@pytest.fixture
def missing(monkeypatch):
    """Make a package that is here fail to import."""

    def hide(name):
        for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return hide


def resize(tmp_path):
    ArrayDataset(np.zeros((1, 4, 4), np.uint8), ["a"], [0], Preprocessing(8, (0.5,), (0.5,)))


def preprocess(tmp_path):
    Preprocessing(8, (0.5,), (0.5,))(np.zeros((4, 4)))


def read_folder(tmp_path):
    load_dataset(tmp_path, split="train")


def use_timm(tmp_path):
    photos.mix(get_recipe("hydravit-imagenet"), 10)


@pytest.mark.parametrize(
    ("package", "name", "use"),
    [
        ("sklearn", "demo", lambda _: load_dataset("digits", split="test")),
        ("matplotlib", "demo", lambda path: plot({}, path / "plot.png")),
        ("PIL", "images", resize),
        ("PIL", "images", preprocess),
        ("PIL", "images", read_folder),
        ("hydravit.timm_models", "recipes", use_timm),
    ],
)
def test_a_missing_package_is_one_line_that_names_its_extra(package, name, use, missing, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "hydravit.data.folder", raising=False)
    missing(package)
    with pytest.raises(RuntimeError, match=re.escape(f"pip install 'hydravit[{name}]'")) as error:
        use(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--out", "{}"],
        ["train", "--recipe", "demo", "--out", "{}"],
        ["evaluate", "--checkpoint", "none.pt", "--data", "digits", "--out", "{}"],
        ["benchmark"],
    ],
    ids=lambda command: command[0],
)
def test_commands_miss_matplotlib_before_they_work(command, missing, capsys, tmp_path):
    missing("matplotlib")
    out = tmp_path / "out"
    assert main([part.format(out) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hydravit: error: ") and "pip install 'hydravit[demo]'" in error
    assert error.count("\n") == 1 and not out.exists()


def test_what_is_there_is_imported():
    with extra("demo", "nothing"):
        import json
    assert json
    with pytest.raises(ValueError, match="other"), extra("demo", "nothing"):
        raise ValueError("other errors pass")
