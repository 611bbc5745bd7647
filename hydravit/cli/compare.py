"""``hydravit compare``: compare settings of a recipe by cross-validation on the training part alone."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path

from hydravit.atomic import atomic_write
from hydravit.cli.loading import positive

_EXAMPLES = """examples:
  hydravit compare --recipe demo --try lr=2e-3 --try "lr=2e-3 epochs=60" --out runs/settings.jsonl
  hydravit compare --data photos/ --set max_heads=3 --try depth=4 --try depth=6 --out runs/photos.jsonl
The recipe as it is comes first. What the file holds already is not trained again.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="choose a recipe's settings without the test part",
        description="Train a recipe with each of several settings on all but one fold of the training part, and "
        "evaluate it on that fold, for every fold in turn. The test part takes no part in it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from hydravit.cli import train

    train.add_recipe_arguments(parser)
    parser.add_argument(
        "--try",
        dest="settings",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="FIELD=VALUE, or several in quotes: as --set, of this setting only",
    )
    parser.add_argument("--folds", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="a line of JSON for every setting and fold")
    parser.set_defaults(verify=True)  # of a checkpoint to start from


def run(args: argparse.Namespace) -> None:
    from hydravit.cli.train import make_recipe
    from hydravit.training.comparison import CrossValidation

    if args.folds < 2:
        raise ValueError(f"--folds {args.folds}: expected at least 2")
    settings = ["", *args.settings]
    recipes = {}
    for setting in settings:  # a wrong one raises before any training
        changed = copy.copy(args)
        changed.set = args.set + shlex.split(setting)
        recipes[setting] = make_recipe(changed)
        if recipes[setting].grow_epochs:
            raise ValueError("compare: a list of cuts grows to other widths in every fold: --set grow_epochs=0")
    results = _Results(Path(args.out))
    validation = CrossValidation(args.folds)
    for setting, recipe in recipes.items():
        found = []
        for fold in range(args.folds):
            identity = {"recipe": recipe.to_dict(), "folds": args.folds, "fold": fold}
            top1 = results.find(identity)
            if top1 is None:
                top1 = validation.fold(recipe, fold, backend=args.backend, progress=sys.stderr.isatty())
                results.add(identity, top1)
            found.append(top1)
        means = {heads: sum(top1[heads] for top1 in found) / args.folds for heads in found[0]}
        widths = "  ".join(f"{heads}: {mean:.2f}" for heads, mean in means.items())
        print(f"{sum(means.values()) / len(means):.2f}  ({widths})  {setting or 'as it is'}", flush=True)


class _Results:
    """A file with a line of JSON for every trained fold: its identity, and its top-1 at every width."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._entries = [json.loads(line) for line in lines]

    def find(self, identity: dict) -> dict[int, float] | None:
        identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        for entry in self._entries:
            if entry["identity"] == identity:
                return {int(heads): top1 for heads, top1 in entry["top1"].items()}
        return None

    def add(self, identity: dict, top1: dict[int, float]) -> None:
        self._entries.append({"top1": top1, "identity": identity})
        text = "".join(json.dumps(entry) + "\n" for entry in self._entries)
        atomic_write(self._path, lambda file: file.write_text(text, encoding="utf-8"))
