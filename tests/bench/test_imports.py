"""One direction of imports inside ``bench``, and a report that cannot measure."""

import re
import subprocess
import sys

import pytest

from bench import ROOT

FILES = sorted((ROOT / "bench").rglob("*.py"))
MAY_IMPORT = {
    "rows.py": set(),
    "measuring": {"measuring", "rows"},
    "peers": {"peers", "measuring"},
    "report": {"report", "rows"},
    "run.py": {"measuring", "peers", "report", "rows"},
    "gpu": {"gpu", "measuring", "peers", "report", "rows"},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    place = path.relative_to(ROOT / "bench").parts[0]
    if place != "__init__.py":
        imported = re.findall(r"^\s*(?:from|import) bench\.(\w+)", path.read_text(), re.M)
        assert set(imported) <= MAY_IMPORT[place]


def test_the_report_cannot_measure():
    """It imports neither torch nor a clock: all that it shows was in the files."""
    code = """
import sys, bench.report.agree, bench.report.page, bench.report.plot, bench.report.summary
print([name for name in ("torch", "hydravit", "hydravit_kernels") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
    for path in [*(ROOT / "bench" / "report").glob("*.py"), ROOT / "bench" / "rows.py"]:
        assert not re.search(r"\b(import time|from time|perf_counter|timeit|datetime)\b", path.read_text()), path
