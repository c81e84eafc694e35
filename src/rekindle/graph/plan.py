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
class Forecast:
    """What a plan was made for, and what it promises.

    Attributes:
        budget: bytes that may be live.
        peak: most bytes live at any moment.
        seconds: what the replays take.
        bound: seconds of replays that no plan within the budget does without.
    """

    budget: int
    peak: int
    seconds: float
    bound: float

    @property
    def gap(self) -> float:
        """How much more is recomputed than what is certainly needed, as a share of the latter."""
        if self.seconds <= self.bound:
            return 0.0
        return self.seconds / self.bound - 1 if self.bound else float("inf")


@dataclass(frozen=True, slots=True)
class Plan:
    """The checkpoints of a step: what is kept. Everything else that is evictable is recomputed when asked for.

    Attributes:
        kept: numbers of the values that are kept as they are made.
        turns: one for each demand of the graph. Without any, a recomputed value that is asked for later on is held
            until the backward pass has asked for it the last time, and so is what is kept.
        forecast: what it promises, if it was made for a budget.
    """

    kept: frozenset[int]
    turns: tuple[Turn, ...] = ()
    forecast: Forecast | None = None

    def keeps(self, value: int) -> bool:
        """Whether the value of that number is kept."""
        return value in self.kept
