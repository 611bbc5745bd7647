"""The folder of a training run: what describes it, what protects it, and what goes on after any end of a run."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from hydravit.checkpoint import read_checkpoint
from hydravit.cli import main
from hydravit.recipes import get_recipe
from hydravit.training.folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")
# The smallest training that is one: two epochs of two steps.
QUICK = ["--set", "depth=1", "--set", "warmup_epochs=0.0", "--batch-size", "400", "--epochs", "2"]
FILES = {".lock", "checkpoint.pt", "log.jsonl", "model.safetensors", "recipe.json"}


def train(out, *arguments) -> int:
    return main(["train", "--out", str(out), "--no-evaluate", *map(str, arguments)])


def messages(err) -> list:
    """The lines on standard error but those that show how far training is, and warnings."""
    return [line for line in err.splitlines() if not line.startswith(("epoch ", "hydravit: warning:"))]


def fails(capsys, out, *arguments) -> str:
    """The one line of a training that must fail."""
    capsys.readouterr()
    assert train(out, *arguments) == 2
    lines = messages(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith("hydravit: error: ") and str(out) in lines[0]
    return lines[0]


def description(out) -> dict:
    return json.loads((out / "recipe.json").read_text())


def epochs_in_log(out) -> list:
    return [json.loads(line)["epoch"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run. Tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert train(out, *QUICK) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for file in finished.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_a_run_tells_what_it_was_and_can_be_made_again(finished, tmp_path):
    assert {file.name for file in finished.iterdir()} == FILES
    about = description(finished)
    (start,) = about["starts"]
    assert start["step"] == 0 and start["torch"] == torch.__version__ and start["backend"] and start["hydravit"]
    assert start["command"] and about["images"] == 1198 and about["ranks"] == 1
    recipe = get_recipe(str(finished / "recipe.json"))
    assert (recipe.epochs, recipe.batch_size, recipe.config.depth, recipe.config.num_classes) == (2, 400, 1, 10)
    assert train(tmp_path / "again", "--recipe", finished / "recipe.json") == 0
    for name in ("model.safetensors", "checkpoint.pt"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def test_what_is_no_description_of_a_run_is_refused(tmp_path, capsys):
    wrong = {"torn.json": '{"recipe"', "list.json": "[]", "field.json": '{"recipe": {"config": {}, "speed": 1}}'}
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: no recipe of a run"):
            get_recipe(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="none.json"):
        get_recipe("none.json")


def test_a_run_is_replaced_only_if_asked(run, capsys):
    before = (run / "model.safetensors").read_bytes()
    assert "a finished run: --resume goes on with it (for more --epochs)" in fails(capsys, run, *QUICK)
    assert (run / "model.safetensors").read_bytes() == before
    (run / "model.safetensors").unlink()
    assert "an interrupted run: --resume goes on with it and --overwrite replaces it" in fails(capsys, run, *QUICK)
    (run / "results.json").write_text("of the earlier run")
    assert train(run, *QUICK, "--seed", 5, "--overwrite") == 0
    assert {file.name for file in run.iterdir()} == FILES
    assert (run / "model.safetensors").read_bytes() != before and epochs_in_log(run) == [1, 2]
    assert description(run)["recipe"]["seed"] == 5 and len(description(run)["starts"]) == 1


def test_a_finished_run_is_trained_for_longer(run, tmp_path, capsys):
    assert train(run, "--resume") == 0 and epochs_in_log(run) == [1, 2]  # nothing is left to do
    assert train(run, "--resume", "--epochs", 4) == 0
    said = capsys.readouterr().out
    assert "after step 4, epochs is 4; it was 2" in said and epochs_in_log(run) == [1, 2, 3, 4]
    assert f"goes on from {run}/checkpoint.pt after step 4;" in said and "; goes on at " in said
    about = description(run)
    assert about["recipe"]["epochs"] == 4 and [start["step"] for start in about["starts"]] == [0, 4, 4]
    assert about["starts"][-1]["changed"] == {"epochs": [2, 4]}
    # The learning rate goes on as that of a run of four epochs.
    assert train(tmp_path / "whole", *QUICK, "--epochs", 4) == 0
    rates = [[json.loads(line)["lr"] for line in (out / "log.jsonl").open()][2:] for out in (run, tmp_path / "whole")]
    assert rates[0] == rates[1]
    assert "epochs must be at least 4, not 3" in fails(capsys, run, "--resume", "--epochs", 3)
    assert "recipe.batch_size was 400" in fails(capsys, run, "--resume", "--batch-size", 100)


def test_after_a_loss_that_is_not_finite_training_goes_on_otherwise(tmp_path, capsys):
    """The first update ruins the weights, which the loss of the second step shows; the last epoch's end is between."""
    out = tmp_path / "run"
    one_step_per_epoch = ["--batch-size", 1198, "--epochs", 3]
    line = fails(capsys, out, *QUICK, *one_step_per_epoch, "--lr", 1e30)
    assert "the loss is nan in step 1 (epoch 2, batch 1)" in line
    assert f"{out}/checkpoint.pt holds the state after step 0: go on with: hydravit train --out {out} --resume" in line
    assert train(out, "--resume", "--lr", 1e-3) == 0
    assert "after step 0, lr is 0.001; it was 1e+30" in capsys.readouterr().out
    assert epochs_in_log(out) == [1, 2, 3]
    assert train(tmp_path / "good", *QUICK, *one_step_per_epoch, "--lr", 1e-3) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "good" / "model.safetensors").read_bytes()


def test_a_checkpoint_of_a_run_is_a_checkpoint_for_every_command(run, tmp_path, capsys):
    model, state = (read_checkpoint(run / name) for name in ("model.safetensors", "checkpoint.pt"))
    assert (state.config, state.trained_heads, state.preprocessing, state.class_names) == (
        model.config, model.trained_heads, model.preprocessing, model.class_names,
    )  # fmt: skip
    assert all(torch.equal(state.state_dict[name], value) for name, value in model.state_dict.items())
    latest = read_checkpoint(run / "checkpoint.pt", prefer_ema=False)
    assert not torch.equal(latest.state_dict["head.weight"], model.state_dict["head.weight"])
    use = ["--checkpoint", str(run / "checkpoint.pt")]
    assert main(["evaluate", *use, "--data", "digits", "--accuracy-only", "--heads", "1,6"]) == 0
    assert main(["extract", *use, "--heads", "2", "--out", str(tmp_path / "vit.safetensors")]) == 0
    assert main(["info", *use]) == 0
    assert train(tmp_path / "next", *QUICK, *use, "--epochs", 1) == 0
    assert description(tmp_path / "next")["recipe"]["checkpoint"] == str(run / "checkpoint.pt")


def test_half_written_files_of_killed_runs_are_removed(run):
    left = [".checkpoint.pt.0123abcd.tmp", ".model.safetensors.00000000.tmp"]
    others = [".checkpoint.pt.tmp", "notes.tmp"]
    for name in left + others:
        (run / name).write_text("half")
    assert train(run, "--resume") == 0
    assert {file.name for file in run.iterdir()} == FILES | set(others)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(run, finished, tmp_path, capsys):
    (run / "checkpoint.pt").unlink()
    (run / "model.safetensors").unlink()
    assert train(run, "--resume") == 0
    assert f"{run}/checkpoint.pt was not written yet" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert "checkpoint.pt does not exist" in fails(capsys, tmp_path / "nothing", "--resume")


def test_torn_lines_of_the_log_do_not_keep_a_run_from_going_on(run, capsys):
    first, second = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_bytes(f'{first}\n{second[:40]}\n[]\n{{"epoch": "x"}}\n'.encode() + b"\xff\xfe")
    assert train(run, "--resume", "--epochs", 3) == 0
    assert f"{run}/log.jsonl: line 2 is damaged; 4 such line(s) left out" in capsys.readouterr().err
    assert epochs_in_log(run) == [1, 3]


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log_line({"epoch": 1})
    before, limits = folder.log.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match=r"log\.jsonl could not be written: .*File too large"):
            folder.log_line({"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.log.read_text() == before


_HOLDER = """
import sys
from hydravit.training.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_trains_in_a_folder(run, capsys):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", _HOLDER, run], env=environment, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        before = (run / "model.safetensors").read_bytes()
        line = fails(capsys, run, "--overwrite", *QUICK)
        assert f"{run}: process {holder.pid} on " in line and "trains there" in line
        assert (run / "model.safetensors").read_bytes() == before
        holder.kill()
    assert train(run, "--resume") == 0  # the lock went with the process


def test_folders_without_locks_are_used_with_a_warning(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.warns(UserWarning, match="two runs there at once are not noticed .No locks available"):
        with RunFolder(tmp_path).lock():
            pass


_STOPPED = """
import sys
from hydravit.cli import main
from hydravit.training import Trainer
step = Trainer._step
def waiting(self, *arguments):
    if self.step == 2:
        print("waiting", flush=True)
        sys.stdin.read()
    return step(self, *arguments)
Trainer._step = waiting
main(["train", "--out", sys.argv[1], "--no-evaluate", "--workers", "2", *sys.argv[2:]])
"""


@pytest.mark.long
def test_a_signal_to_all_processes_stops_training_after_a_whole_step(tmp_path, finished):
    """As Slurm and Kubernetes send it, also to the processes that load data."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    out, pipes = tmp_path / "run", dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", _STOPPED, out, *QUICK]
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes) as process:
        while process.stdout.readline() not in ("waiting\n", ""):
            pass
        os.killpg(process.pid, signal.SIGTERM)
        (message,) = messages(process.communicate()[1])
    assert process.returncode == 128 + signal.SIGTERM, message
    assert f"SIGTERM after step 3; resume from {out}/checkpoint.pt" in message
    assert train(out, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
