"""A report that cannot measure; tests/test_layering.py holds the order of imports inside ``bench``."""

import re
import subprocess
import sys

from bench import ROOT


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
