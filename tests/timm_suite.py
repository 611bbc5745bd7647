"""Runs timm's own tests of models on the models that this package registers.

    python tests/timm_suite.py FOLDER [NAME ...]

FOLDER is a checkout of timm's repository whose version fits the installed timm; names are those of the registry, by
default all that begin with ``hydravit_``. Nothing of timm is copied here: its test functions are called.
"""

import importlib.util
import inspect
import sys
import traceback
from pathlib import Path

from hydravit.timm_models import timm

# Tests that do not apply, and why.
_FX = "torch.fx traces nothing whose way depends on modules and widths; hooks and forward_intermediates serve instead"
NOT_APPLICABLE = {
    "test_model_inference": "compares pretrained weights of timm's test models with stored results",
    "test_model_load_pretrained": "the registered names have no pretrained weights",
    "test_model_features_pretrained": "the registered names have no pretrained weights",
    "test_model_default_cfgs": "for models of maps of features; timm runs it on no ViT, but the next one (non_std)",
    "test_model_forward_torchscript": "torch.jit.script compiles no width per call; models can be traced and exported",
    "test_model_forward_torchscript_with_features_fx": _FX,
    "test_model_forward_fx": _FX,
    "test_model_backward_fx": _FX,
    "test_model_forward_fx_torchscript": _FX,
}


def functions(folder):
    """The tests of models in timm's checkout that take a model's name and a batch size."""
    path = Path(folder) / "tests" / "test_models.py"
    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in found if [*inspect.signature(f).parameters] == ["model_name", "batch_size"]}


def run(folder, names):
    failed = 0
    for test, function in functions(folder).items():
        if test in NOT_APPLICABLE:
            print(f"n/a   {test}: {NOT_APPLICABLE[test]}")
            continue
        for name in names:
            try:
                function(name, 2 if "backward" in test else 1)
                print(f"pass  {test} {name}", flush=True)
            except BaseException as error:  # pytest's skip and fail derive from it
                if isinstance(error, KeyboardInterrupt):
                    raise
                word = "skip" if type(error).__name__ == "Skipped" else "FAIL"
                print(f"{word}  {test} {name}: {type(error).__name__} {error}", flush=True)
                if word == "FAIL":
                    failed += 1
                    traceback.print_exc()
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(bool(run(sys.argv[1], sys.argv[2:] or timm.list_models("hydravit_*"))))
