"""``hydravit benchmark``: its arguments reach the checkout's suite unchanged; without a checkout it says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hydravit
from hydravit.cli import benchmark, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def replaced(monkeypatch):
    """Program, arguments and environment of what the process would become."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--heads", "3,6", "-x", "--", "--y"], ["one", "--heads=3"], ["--out", "run here"]]
)
def test_arguments_go_through(replaced, arguments):
    assert main(["benchmark", *arguments]) == 0
    ((program, command, environment),) = replaced
    assert command == [sys.executable, "-m", "bench.run", *arguments] and program == sys.executable
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_without_a_checkout(monkeypatch, tmp_path, capsys, replaced):
    monkeypatch.setattr(hydravit, "__file__", str(tmp_path / "hydravit" / "__init__.py"))
    assert main(["benchmark"]) == 2
    assert "the benchmarks are part of the repository, not of the installed package" in capsys.readouterr().err
    assert not replaced


def test_from_another_folder(tmp_path):
    """A folder named bench there is not taken for ours, and the exit code is the suite's."""
    if sys.version_info >= (3, 11):
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "run.py").write_text("raise SystemExit(77)\n")
    command = [sys.executable, "-m", "hydravit", "benchmark", "--parts", "lunch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "lunch" in result.stderr


def test_the_command_is_listed():
    assert benchmark.__name__.rpartition(".")[2] in hydravit.cli.COMMANDS
