"""The list of all peers."""

from __future__ import annotations

from bench.measuring.peer import Peer
from bench.peers import compiled, eager, ours, runtimes

# The one that is ready soonest comes first. A peer for another device says so when it is set up.
EVERY_PEER: list[Peer] = [*ours.PEERS, *eager.PEERS, *runtimes.PEERS, *compiled.PEERS]
