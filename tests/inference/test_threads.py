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


@pytest.mark.needs("native")
@pytest.mark.usefixtures("frequent_switches")
def test_threads_share_an_engine():
    model, x = make(), images(WIDE)
    engine = model.engine()
    with torch.no_grad():
        expected = {heads: block_by_block(model, x, heads=heads) for heads in (1, 3, 4)}

    def calls(heads, source):
        @torch.no_grad()
        def work():
            for _ in range(60):
                assert torch.equal(source(x, heads=heads), expected[heads])

        return work

    def declare():  # so that one thread packs while others run
        for _ in range(20):
            model.weights_changed()
            engine(x)

    together(declare, calls(1, engine), calls(3, engine), calls(4, model))


@pytest.mark.needs("native")
@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("unseen", [False, True])
def test_weights_reloaded_under_load(unseen):
    """Whenever they come, in the end model and engine have the last ones."""
    model, others, x, stop = make(), [make() for _ in range(4)], images(WIDE), threading.Event()
    engine = model.engine()

    def calls(source):
        @torch.no_grad()
        def work():
            while not stop.is_set():
                source(x, heads=3)

        return work

    def reload():
        try:
            for other in others * 3:
                if unseen:
                    for mine, new in zip(model.parameters(), other.parameters(), strict=True):
                        mine.data.copy_(new.data)
                else:
                    model.load_state_dict(other.state_dict())
                with torch.no_grad():
                    for heads in (1, 4):
                        expected = block_by_block(other, x, heads=heads)
                        assert torch.equal(engine(x, heads=heads), expected)
                        assert torch.equal(model(x, heads=heads), expected)
        finally:
            stop.set()

    together(reload, calls(engine), calls(model))
