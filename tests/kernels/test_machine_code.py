"""What the compiler made of the CPU kernels' innermost loop: a value on the stack there costs a tenth of the speed."""

import pytest

from hydravit_kernels import _native
from tests.machine_code import register_tiles


@pytest.mark.needs("native", "program objdump")
def test_register_tiles_stay_in_registers():
    """Without fused multiply-adds, as ``portable`` on x86, products are not told from other operations."""
    isas = {isa for isa in ("avx2", "avx512") if isa in _native.build_info["cpu_isas"].split()}
    tiles = register_tiles(_native.path)
    assert isas <= {isa for isa, _ in tiles}
    for loop in tiles.values():
        if loop.isa in isas:
            assert loop.products > 0 and loop.products % (2 * loop.rows) == 0, loop
            assert not loop.on_stack, loop
