"""One model in several Python threads: packed weights are made, dropped and used at any moment."""

import sys
import threading

import pytest
import small
import torch
from packing import WIDE, block_by_block, make, warm
from small import images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(*works):
    """Run each in its own thread; raise the first error, if any."""
    errors = []

    def guard(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("frequent_switches")
def test_threads_at_different_widths(backend):
    """A call's width is its own: calls that run at the same time do not disturb each other."""
    model, x = small.make(WIDE, backend), images(WIDE)
    widths = [1, 2, 3, 4, torch.tensor([1, 4])]
    with torch.no_grad():
        expected = [block_by_block(model, x, heads=heads) for heads in widths]

    def calls(heads, logits):
        @torch.no_grad()
        def work():
            for _ in range(30):
                assert torch.equal(model(x, heads=heads), logits)

        return work

    @torch.no_grad()
    def forget():  # so that some thread makes the packed copy while others use it
        for _ in range(30):
            model.weights_changed()
            model(x)

    together(forget, *(calls(*pair) for pair in zip(widths, expected, strict=True)))
    if backend == "native":
        warm(model, x)


@pytest.mark.needs("native")
@pytest.mark.usefixtures("frequent_switches")
def test_packing_again_beside_running_calls():
    """A call finishes with the copy it began with: its logits are those of the one or of the other."""
    model, other, x = make(), make(), images(WIDE)
    warm(model, x)
    network = model.packed_inference.network
    subnetworks = (model.subnetwork(3),)
    possible = [block_by_block(m, x, heads=3).detach() for m in (model, other)]

    def call():
        for _ in range(60):
            logits = network.run(x, subnetworks)
            assert any(torch.equal(logits, one) for one in possible)

    def pack():
        for _ in range(30):
            for source in (other, model):
                network.pack(source.network_parameters())

    together(pack, call, call)
