"""``hydravit demo`` end to end, quickly: what it writes, and that an interrupted one goes on where it stopped."""

import json
import signal

import pytest
import torch

from hydravit.checkpoint import read_checkpoint
from hydravit.cli import demo, main, train
from hydravit.data import load_dataset
from hydravit.evaluation import supernet
from hydravit.evaluation.memory import Memory
from hydravit.recipes import get_recipe
from hydravit.training import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = list(get_recipe("demo").trained_heads)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "demo"


@pytest.fixture
def run(out, monkeypatch):
    """Run the demo for one epoch, with the smallest supernet and without the processes that measure memory."""
    nothing = Memory(None, dict.fromkeys(range(1, 13)), "not measured: a test")
    monkeypatch.setattr(supernet, "measure_memory", lambda model, heads, batch_size: nothing)

    def run(epochs=1):
        return main(["demo", "--out", str(out), "--config", "tiny", "--epochs", str(epochs), "--seconds", "0.001"])

    return run


@pytest.fixture
def trainings(monkeypatch):
    """The arguments of every training that was started."""
    started, original = [], train.run

    def noted(args):
        started.append(args)
        original(args)

    monkeypatch.setattr(train, "run", noted)
    return started


def test_it_writes_a_model_a_table_and_a_picture(run, out, trainings, capsys):
    assert run() == 0
    text = capsys.readouterr().out
    for words in ("95 % interval", "599 digits held out", "eager ms", "ours ms", "eager/ours", "results.png"):
        assert words in text
    results = json.loads((out / "results.json").read_text())
    assert [row["heads"] for row in results["widths"]] == HEADS
    assert [row["heads"] for row in results["supernet"]["widths"]] == [1, 2, 3]
    assert results["environment"]["images"] == 599 and results["recipe"]["epochs"] == 1
    assert read_checkpoint(out / "model.safetensors").trained_heads == tuple(HEADS)
    assert (out / "results.png").stat().st_size > 10_000

    assert run() == 0 and len(trainings) == 2  # a finished demo starts anew
    del results["supernet"]
    (out / "results.json").write_text(json.dumps(results))
    assert run() == 0 and len(trainings) == 2  # one that was stopped while it took times has a model
    assert "is trained already" in capsys.readouterr().out
    assert "supernet" in json.loads((out / "results.json").read_text())


def test_one_thread_trains_and_all_measure(out, monkeypatch):
    seen = []

    def stopped(args):
        seen.append(torch.get_num_threads())
        raise SystemExit(3)

    monkeypatch.setattr(train, "run", stopped)
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(out), "--threads", "2"])
    measuring = torch.get_num_threads()
    torch.set_num_threads(1)
    assert (seen, measuring) == ([1], 2)


def test_a_model_of_another_recipe_is_not_taken(out):
    out.mkdir()
    (out / "model.safetensors").touch()
    args = {epochs: demo.argparse.Namespace(epochs=epochs) for epochs in (1, 2)}
    recipe = train.make_recipe(demo._training_arguments(args[1], out))
    (out / "results.json").write_text(json.dumps({"recipe": recipe.to_dict()}))
    assert demo._unfinished(out, demo._training_arguments(args[1], out))
    assert not demo._unfinished(out, demo._training_arguments(args[2], out))
    (out / "results.json").write_text("{")
    assert not demo._unfinished(out, demo._training_arguments(args[1], out))


def test_an_interrupted_training_goes_on(run, out, trainings, monkeypatch, capsys):
    from hydravit.training import Trainer

    def stopped(self):
        raise Interrupted(signal.SIGINT, self.step, self.save())

    original = Trainer.run
    out.mkdir()
    monkeypatch.setattr(Trainer, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 130 and (out / "checkpoint.pt").exists()
    monkeypatch.setattr(Trainer, "run", original)
    assert run() == 0
    assert "Going on from" in capsys.readouterr().out and trainings[-1].resume == ""


def test_the_held_out_part_is_looked_at_after_training_only(run, out, monkeypatch):
    import hydravit.data
    import hydravit.training.data

    order, original = [], train.run
    loaded = hydravit.data.load_dataset
    for module in (hydravit.data, hydravit.training.data):
        monkeypatch.setattr(module, "load_dataset", lambda *a, **k: order.append(k["split"]) or loaded(*a, **k))
    monkeypatch.setattr(train, "run", lambda args: (original(args), order.append("trained")))
    assert run() == 0
    assert order == ["train", "trained", "test"]
    assert len(load_dataset("digits", split="test")) == 599
