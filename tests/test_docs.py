"""README and docs hold what they say: their Python runs, their commands parse, their files and numbers exist."""

import importlib.util
import json
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import hydravit
import hydravit_kernels as kernels
from hydravit import cli
from hydravit.cli.train import make_recipe
from hydravit.geometry import GEOMETRIES
from hydravit.recipes import get_recipe

ROOT = Path(__file__).resolve().parent.parent
README, ARCHITECTURE = ROOT / "README.md", ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "bench" / "results" / "amd-epyc-family-25-model-17-2-threads"

# Side and classes of the images in `loader`, the only name that blocks use without making it.
IMAGES = {"README.md": (224, 1000), "training.md": (32, 10), "compression.md": (32, 10)}


class Block(NamedTuple):
    """A fenced block. ``needs``: a package without which it is left out, from ``needs=NAME`` behind the language."""

    line: int
    language: str
    needs: str
    text: str


def blocks(page):
    found = []
    for match in re.finditer(r"^```(\w*)(?: needs=(\w+))?\n(.*?)^```$", page.read_text(), re.M | re.S):
        line = page.read_text()[: match.start(3)].count("\n")
        found.append(Block(line, match[1], match[2] or "", match[3]))
    return found


def section(page, heading):
    """The text below a heading, up to the next heading of the same level or a higher one."""
    level = len(re.match("#+", heading)[0])
    text = page.read_text().split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.M)[0]


def by_name(page):
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_has_a_language_that_is_checked(page):
    fences = re.findall(r"^```", page.read_text(), re.M)
    assert len(fences) == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= {"python", "sh", "text"}


# Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=by_name)
@pytest.mark.filterwarnings("ignore::UserWarning")  # adapted weights are warnings too
def test_python_blocks_run(page, tmp_path, monkeypatch, request):
    """One page is one session: its blocks run in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    size, classes = IMAGES.get(page.name, (0, 0))
    batch = torch.randn(2, 3, size, size), torch.randint(max(classes, 1), (2,))
    namespace = {"loader": [batch] * 2}
    with mock.patch.dict(GEOMETRIES):
        for block in blocks(page):
            if block.language != "python" or (block.needs and importlib.util.find_spec(block.needs) is None):
                continue
            if block.needs == "openvino":
                request.getfixturevalue("openvino")
            # Empty lines in front, so that an error names the page's own line.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


# Commands ---------------------------------------------------------------------------------------------------------


def commands():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                lines = block.text.replace("\\\n", " ").splitlines()
                yield from (pytest.param(line, id=f"{page.name}: {line.split('  ')[0]}") for line in lines if line)


@pytest.mark.parametrize("line", list(commands()))
def test_commands_exist(line, capsys):
    words = shlex.split(line, comments=True)
    while re.match("[A-Z_]+=", words[0]):
        words = words[1:]
    program, *arguments = words
    CHECKS[Path(program).name](arguments)


def check_make(arguments):
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        variable, equals, value = argument.partition("=")
        if not equals:
            assert re.search(rf"^{argument}:", makefile, re.M), f"no target {argument}"
        else:
            assert f"$({variable})" in makefile, f"no variable {variable}"
        if variable == "ARGS":
            check_hydravit(["benchmark", *shlex.split(value)])


def check_hydravit(arguments):
    """The command's own parser takes the arguments; training makes its recipe, if no file takes part; ``info`` runs."""
    if "--help" in arguments:
        with pytest.raises(SystemExit) as exited:
            parse(arguments)
        assert exited.value.code == 0
        return
    args = parse(arguments)
    files = {"--checkpoint", "--set-from"}
    if arguments[0] == "train" and not files & set(arguments) and args.recipe != "runs/demo/recipe.json":
        make_recipe(args)
    if arguments[0] in ("evaluate", "predict") and args.heads is not None:  # readers try these on the demo's model
        cli.parse_heads(args.heads, get_recipe("demo").config.widths)
    if arguments[0] == "info" and "--checkpoint" not in arguments:
        assert cli.main(arguments) == 0


def parse(arguments):
    if arguments[0] != "benchmark":
        return cli.parser().parse_args(arguments)
    from bench import run

    return run._parser().parse_args(arguments[1:])


def check_pip(arguments):
    project = (ROOT / "pyproject.toml").read_text()
    assert arguments.pop(0) == "install"
    if arguments[0] == "-c":
        assert (ROOT / arguments[1]).is_file()
        arguments = arguments[2:]
    for argument in arguments:
        name, extra = re.fullmatch(r"(\.|[\w-]+)(?:\[(\w+)\])?", argument).groups()
        assert name == "." or re.search(rf'^dependencies = .*"{name}\b', project, re.M), argument
        assert extra is None or re.search(rf"^{extra} = \[", project, re.M), argument


def check_python(arguments):
    assert arguments[0] == "-m"
    assert importlib.util.find_spec(arguments[1]) is not None, arguments[1]
    if arguments[1] == "pytest":
        assert all((ROOT / argument).exists() for argument in arguments[2:] if argument.startswith("tests"))


def check_torchrun(arguments):
    assert "--no-python" in arguments
    check_hydravit(arguments[arguments.index("hydravit") + 1 :])


CHECKS = {
    "make": check_make,
    "hydravit": check_hydravit,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
}


# Names ------------------------------------------------------------------------------------------------------------


def paths_in(text):
    """Files and folders of the repository that a text names."""
    return re.findall(r"(?<![\w/.-])(?:csrc|hydravit|hydravit_kernels|bench|tests|docs)/(?:[\w./-]*[\w/])?", text)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_named_files_exist(page):
    assert not [path for path in paths_in(page.read_text()) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_named_objects_exist(page):
    for name in re.findall(r"`(hydravit(?:_kernels)?(?:\.\w+)+)`", page.read_text()):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], link


# Bounds -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_glossary_is_short():
    rows = [line for line in section(ARCHITECTURE, "## Glossary").splitlines() if line.startswith("| ")]
    assert len(rows) - 1 <= 30  # without the header


def steps(heading):
    """The files of a numbered walk, in order."""
    found = re.findall(r"^ *(\d+)  (\S+)", section(ARCHITECTURE, heading), re.M)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [path for _, path in found]


@pytest.mark.parametrize("heading", ["## One packed CPU call", "## One training step", "## One engine call on CUDA"])
def test_walks_name_files(heading):
    assert steps(heading) and all((ROOT / path).is_file() for path in steps(heading))


def test_a_packed_call_crosses_the_files_of_its_walk():
    """At most 14 steps; their Python files are those whose functions really run, but for three that the text names."""
    walk = steps("## One packed CPU call")
    assert len(walk) <= 14
    if "native" not in kernels.available_backends():
        pytest.skip("needs the native backend")
    model = hydravit.fused_model(config="tiny", image_size=32, depth=2).eval()
    images, files = torch.randn(1, 3, 32, 32), set()
    with torch.inference_mode():
        for _ in range(3):  # the second call packs, and the first packed one makes the plan
            model(images, heads=3)
        sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
        try:
            model(images, heads=3)
        finally:
            sys.setprofile(None)
    packages = Path(hydravit.__file__).parents[1]
    ours = {str(Path(file).relative_to(packages)) for file in files if file.startswith(f"{packages}/hydravit")}
    assert ours - {f"hydravit_kernels/{name}.py" for name in ("export", "ranges", "transforms")} == {
        path for path in walk if path.endswith(".py")
    }


# Numbers ----------------------------------------------------------------------------------------------------------

TOOLS = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "aot": "AOTInductor", "aot-max": "AOTInductor"}


def rows_of(name, task, heads, batch):
    """The measured rows of one workload, by peer."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    keys = {"task": task, "heads": str(heads), "batch": batch, "status": "measured"}
    return {row["peer"]: row for row in rows if all(row[key] == value for key, value in keys.items())}


def milliseconds(row):
    text = f"{row['p50_ms']:.3g}" if row["p50_ms"] < 1000 else f"{row['p50_ms']:.0f}"
    return f"{text} ms" + (", noisy" if row["noisy"] else "")


def megabytes(row):
    return f"{row['bytes'] / 1e6:.0f} MB"


def expected_columns():
    """The columns of the README's table, as the committed results give them."""
    for heads in (3, 6, 12):
        one, eight = (rows_of("suite", "inference", heads, batch) for batch in (1, 8))
        column = []
        for rows in (one, eight):
            others = [row for row in rows.values() if not row["ours"]]
            best = min(others, key=lambda row: row["p50_ms"])
            column += [milliseconds(rows["native"]), f"{TOOLS[best['peer']]} × {best['ratio']:.2f}"]
        column.insert(2, f"× {one['views']['ratio']:.2f}")
        step = rows_of("training", "training", heads, 16)
        column += [milliseconds(step["native"]), f"× {step['views']['ratio']:.2f}"]
        memory = rows_of("training-memory", "training_memory", heads, 16)
        yield [*column, megabytes(memory["native-active"]), megabytes(memory["views"])]


def test_the_benchmark_table_is_that_of_the_results():
    table = [line for line in section(README, "## Benchmarks").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in table[1:]]
    assert list(zip(*cells, strict=True)) == [tuple(column) for column in expected_columns()]
    for name in ("suite", "training", "training-memory"):
        environment = json.loads((RESULTS / f"{name}.json").read_text())["environment"]
        text = section(README, "## Benchmarks")
        for fact in ("name", "threads", "torch", "commit"):
            assert str(environment[fact]) in text, f"{name}: {fact} {environment[fact]}"
