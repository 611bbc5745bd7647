"""Random choices of the width, or the widths, that the next step trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydravit.integers import plain_int


class WidthSampler:
    """Draws numbers of heads at random, from its own random state (HydraViT, arXiv 2409.17978, section 3).

    Args:
        heads: the widths to choose from.
        weights: their relative frequencies; None: all alike.
        per_image: one width per image instead of one per batch.
        seed: equal seeds draw equal widths.
        rank: the rank in a distributed run: each rank then draws widths of its own, as in the paper's code, and waits
            for the widest. Or 0 on all ranks, which then draw the same widths.
    Raises:
        ValueError: there are no widths, one is repeated, or the weights do not fit them.
    """

    def __init__(
        self,
        heads: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        per_image: bool = False,
        seed: int = 0,
        rank: int = 0,
    ):
        self.choose_from(heads, weights)
        self.per_image = per_image
        self._generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + rank)

    def choose_from(self, heads: Sequence[int], weights: Sequence[float] | None = None) -> None:
        """Draw from these widths from now on; the random state stays. Raises as the constructor does."""
        widths = [plain_int(k) for k in heads]
        if not widths or len(set(widths)) != len(widths) or any(type(k) is not int for k in widths):
            raise ValueError(f"heads must be one or more different widths, not {widths}")
        weights = [1.0] * len(heads) if weights is None else list(weights)
        if len(weights) != len(widths) or min(weights) < 0 or not sum(weights) > 0:
            raise ValueError(f"weights must be {len(widths)} numbers of at least 0 and not all 0, not {weights}")
        self._heads = torch.tensor(widths, dtype=torch.int64, device="cpu")
        self._weights = torch.tensor(weights, dtype=torch.float64, device="cpu")

    def sandwich(self, count: int, bins: str = "") -> list[int]:
        """Draw ``count`` different widths, the widest first: it, the narrowest, and others between them.

        US-Net (arXiv 1903.05134, section 3.3) draws those between independently of each other. Here they differ, and
        ``count - 2`` of them need a weight above 0.

        With ``bins`` each comes from a range of its own, in which all are equally likely (Scala, arXiv 2412.04786,
        section 3.2). The ranges are equally long, or those above are longer by one ("upper"), or those below ("lower").
        """
        narrowest, widest = int(self._heads.min()), int(self._heads.max())
        inner = (self._heads > narrowest) & (self._heads < widest)
        drawn: list[int] = []
        if bins:
            between, parts = sorted(self._heads[inner].tolist()), count - 2
            up = parts - 1 if bins == "lower" else 0
            for i in reversed(range(parts)):
                first, stop = ((len(between) * end + up) // parts for end in (i, i + 1))
                chosen = torch.randint(first, stop, (), generator=self._generator, dtype=torch.int64, device="cpu")
                drawn.append(between[int(chosen)])
        elif count > 2:
            chosen = torch.multinomial(self._weights[inner], count - 2, generator=self._generator)
            drawn = sorted(self._heads[inner][chosen].tolist(), reverse=True)
        return [widest, *drawn, narrowest]

    def draw(self, batch: int) -> int | Tensor:
        """Draw the width of the next batch, or an int64 tensor ``(batch,)`` with one width per image."""
        count = batch if self.per_image else 1
        chosen = self._heads[torch.multinomial(self._weights, count, replacement=True, generator=self._generator)]
        return chosen if self.per_image else int(chosen)

    def state_dict(self) -> dict:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self._generator.set_state(state["generator"])
