"""What a policy decided for each value of a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """What Rekindle holds and lets go of when autograd asks for one value.

    Attributes:
        retained: numbers of the values that are held from here on, of those made on the way to the one asked for.
        dropped: numbers of the values that are let go of once it has been handed over.
    """

    retained: frozenset[int] = frozenset()
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The checkpoints of a step: what is kept. Everything else that is evictable is recomputed when asked for.

    Attributes:
        kept: numbers of the values that are kept as they are made.
        turns: one for each demand of the graph. Without any, a recomputed value that is asked for later on is held
            until the backward pass has asked for it the last time, and so is what is kept.
    """

    kept: frozenset[int]
    turns: tuple[Turn, ...] = ()

    def keeps(self, value: int) -> bool:
        """Whether the value of that number is kept."""
        return value in self.kept
