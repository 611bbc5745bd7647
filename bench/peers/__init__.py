"""The peers: every way to run one width of a nested ViT that a user would choose, and ours.

``bench.measuring.peer`` says what a peer is. Peers share nothing but the model's full parameters.
"""

from __future__ import annotations

from bench.measuring.peer import Peer


def every_peer() -> list[Peer]:
    """Every peer; the one that is ready soonest comes first. A peer for another device says so when it is set up."""
    from bench.peers import compiled, eager, ours, runtimes

    return [*ours.PEERS, *eager.PEERS, *runtimes.PEERS, *compiled.PEERS]
