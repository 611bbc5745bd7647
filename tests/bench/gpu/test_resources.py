"""The committed report of what the CUDA kernels take of an SM."""

import os

import pytest

from bench.gpu import resources


def test_the_report_is_of_these_sources():
    """If it is not: ``make resources``, where nvcc is."""
    assert resources.read()[0].endswith(f"sources {resources.fingerprint()}")


def test_comments_and_line_breaks_have_no_part_in_the_fingerprint():
    plain = resources.without_comments('int f(int a) { return a - -1; }\nauto s = "a // b", t = "/*\\"//";\n')
    assert plain == 'int f(int a){return a- -1;}auto s="a // b",t="/*\\"//";'
    for same in (
        'int f(int a) {  // one "quote\n  return a - -1;\n}\nauto s = "a // b",\n     t = "/*\\"//";',
        'int/* a */f(int a) { /* it\'s\n// */ return a - // \\\n still\n -1; }auto s="a // b", t = "/*\\"//";//',
    ):
        assert resources.without_comments(same) == plain
    assert resources.without_comments("x = 1'000'000;  // it's\nc = '\"';") == "x=1'000'000;c='\"';"
    assert resources.without_comments("""R"a(// " )b" )a" /**/ + 'x'""") == """R"a(// " )b" )a"+'x'"""


def test_no_kernel_spills():
    rows = resources.read()[1]
    assert {row["architecture"] for row in rows} == set(resources.ARCHITECTURES)
    assert len(rows) > 40
    for row in rows:
        assert row["spill_stores"] == row["spill_loads"] == row["stack"] == "0", row


def test_many_rows_are_multiplied_by_warpgroups():
    """One block has an SM to itself, so each of its 288 threads may have 224 registers; the sums take 64 of them."""
    rows = [row for row in resources.read()[1] if row["kernel"].startswith("warpgroup_kernel")]
    assert len(rows) == 2 * len(resources.ARCHITECTURES)
    assert all(64 < int(row["registers"]) <= 224 for row in rows if row["architecture"] == "sm_90a")
    assert all(int(row["registers"]) < 32 for row in rows if row["architecture"] == "sm_80")  # nothing but a trap


def test_two_blocks_share_an_sm():
    """Of the chain's kernels, whose threads number 256 at most: an SM has 65536 registers."""
    for row in resources.read()[1]:
        if row["kernel"].startswith(("product_kernel", "attention_kernel")):
            assert int(row["registers"]) <= 128, row


def test_serialized_wgmma_is_an_error(tmp_path, monkeypatch):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho 'ptxas info : (C7510) wgmma.mma_async instructions are serialized' >&2\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="C7510"):
        list(resources.resources("sm_90a"))


@pytest.mark.long
@pytest.mark.needs("program nvcc")
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_compiling_says_the_same(architecture):
    first, rows = resources.read()
    found = list(resources.resources(architecture))
    assert not any(int(row["spill_stores"]) + int(row["spill_loads"]) for row in found)
    if first == resources.text([]).splitlines()[0]:  # this compiler
        assert found == [row for row in rows if row["architecture"] == architecture]
