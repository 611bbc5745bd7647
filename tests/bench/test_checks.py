"""``python -m bench.checks``: what is timed, and the questions that a packed call asks."""

import pytest
import torch
from fake_clock import FakeClock

import hydravit
from bench.checks import after_calls, checks_of, main
from hydravit.config import CONFIGS, resolve_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.needs("backend native")]


def test_calls_and_checks_take_turns():
    clock, log = FakeClock(), []

    def run(name, seconds):
        log.append(name)
        clock.sleep(seconds)

    checks = {"one": lambda: run("one", 0.001), "two": lambda: run("two", 0.002)}
    calls, times = after_calls(lambda: run("call", 0.010), checks, 0.1, clock)
    assert log == ["call", "one", "two"] * len(calls) and len(calls) == 8  # of 13 ms, until 0.1 s have passed
    assert calls == pytest.approx([0.010] * 8)
    assert times == {"one": pytest.approx([0.001] * 8), "two": pytest.approx([0.002] * 8)}


def test_the_checks_are_those_of_a_packed_call():
    """They find a written weight and a hook, as the next call would."""
    model, images = hydravit.fused_model(config="tiny", image_size=32, depth=2).eval(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        model(images)
        model(images)
    checks = checks_of(model, images)
    packed, structure = model.packed_inference.network, model.structure()
    assert packed is not None and checks["contents"]() is packed and checks["structure"]() is structure
    assert checks["derivatives"]() is False
    model.head.weight.data.zero_()
    assert checks["contents"]() is None
    model.norm.register_forward_hook(lambda *_: None)
    assert checks["structure"]() is not structure


def test_the_command_names_the_machine_and_every_cost(capsys, monkeypatch):
    monkeypatch.setitem(CONFIGS, "thumbnails", resolve_config("tiny", image_size=32, depth=2))
    assert main("--config thumbnails --heads 1,2 --seconds 0".split()) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "commit" in text
    switching = "another width in every call (1, 2 heads) costs"
    assert all(words in text for words in ("a call at 1 heads", "structure ", "contents ", "all checks ", switching))


def test_wrong_input_is_named(capsys):
    assert main(["--config", "huge"]) == 2 and "huge" in capsys.readouterr().err
    assert main(["--heads", "13"]) == 2 and "1..12" in capsys.readouterr().err
