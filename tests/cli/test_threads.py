"""With how many threads commands compute, and how these wait."""

import os
import subprocess
import sys

import pytest
import torch

from hydravit.cli import main, parser
from hydravit.cli.threads import usable_processors

V1, V2 = "2:cpuacct,cpu:/docker/42\n1:memory:/docker/42\n0::/\n", "0::/user/session\n"
CASES = {
    "no Linux": ({}, 8),
    "no limit": ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/session/cpu.max": "max 100000\n"}, 8),
    "a limit": ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/session/cpu.max": "300000 100000\n"}, 3),
    "part of a core": ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/session/cpu.max": "20000 100000\n"}, 1),
    "a core and a half": ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/session/cpu.max": "150000 100000\n"}, 2),
    "more than there is": ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/session/cpu.max": "9900000 100000\n"}, 8),
    "a limit around it": (
        {
            "proc/self/cgroup": V2,
            "sys/fs/cgroup/user/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/user/session/cpu.max": "max 100000\n",
        },
        2,
    ),
    "a container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "version 1": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/docker/42/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/docker/42/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, a container": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
        },
        2,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": V1,
            "sys/fs/cgroup/cpu/docker/42/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/docker/42/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_of_containers_and_jobs(case, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    files, expected = CASES[case]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert usable_processors(tmp_path) == expected


def test_affinity_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5}, raising=False)
    assert usable_processors(tmp_path) == 2


def test_threads_of_a_command(threads, monkeypatch, capsys):
    """An option, or else what the user told OpenMP, or else as many as can run."""
    monkeypatch.setattr("hydravit.cli.threads.usable_processors", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads(4)

    def after(*arguments):
        main(["predict", "nothing.png", "--checkpoint", "nothing.pt", *arguments])
        assert "nothing.pt does not exist" in capsys.readouterr().err
        return torch.get_num_threads()

    assert after() == 4
    assert after("--threads", "3") == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert after() == 2


@pytest.mark.parametrize("command", ["demo", "train", "compare", "evaluate", "predict", "benchmark"])
def test_every_command_that_computes_has_the_option(command, capsys):
    if command == "benchmark":
        from bench.run import _parser

        options = _parser()
    else:
        options = parser()._subparsers._group_actions[0].choices[command]
    assert "--threads" in options.format_help()


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP")
@pytest.mark.parametrize(
    "chosen, policy",
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "5"}, None)],
    ids=["by default", "the user's policy", "the user's spinning"],
)
def test_waiting_threads_sleep(chosen, policy):
    """OpenMP itself says, when torch loads it, how its threads wait."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **chosen}
    done = subprocess.run(
        [sys.executable, "-m", "hydravit", "info", "--config", "tiny"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    if policy:
        assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    else:
        assert "GOMP_SPINCOUNT = '5'" in done.stderr
