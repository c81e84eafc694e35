"""What a policy decided for each value of a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """The checkpoints of a step: what is kept. Everything else that is evictable is recomputed when asked for, and a
    recomputed value goes again as soon as the backward pass has asked for it the last time.

    Attributes:
        kept: numbers of the values that are kept.
    """

    kept: frozenset[int]

    def keeps(self, value: int) -> bool:
        """Whether the value of that number is kept."""
        return value in self.kept
