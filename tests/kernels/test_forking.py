"""A process that is forked after its parent computed computes too, where OpenMP would wait for threads it lost."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, torch, hydravit
torch.set_num_threads(2)
model = hydravit.fused_model(config="tiny", depth=1, image_size=64).eval()
images = torch.randn(2, 3, 64, 64)
parallel = lambda: torch.ones(1 << 20).square().sum()  # torch's own loop
with torch.no_grad():
    expected, total = model(images), parallel()
    child = os.fork()
    if not child:
        same = torch.equal(model(images), expected) and parallel() == total
        os._exit(0 if same and torch.get_num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.get_num_threads() == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork")
def test_a_forked_process_computes():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=300)
