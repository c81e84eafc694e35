"""Policies that score the values of a graph and keep the highest.

Problem: choose checkpoints from local properties of each value, without a budget and without simulation.
Source: the smart selection of cgadimpl (memory-optimal, speed-optimal, balanced, by depth); cost per byte is the
classical ratio rule for knapsacks (Dantzig 1957), used for recomputation by DTR (Kirisame et al. 2021, without its
neighbourhood and staleness terms).
Regime: any graph, linear time but for the descendants, which take a bit of memory for each pair of values.
Known gaps: the scores see neither where the peak is nor what is already kept nearby, so a high score may keep two
values that make each other cheap, and a higher ratio may not be faster. A byte budget does better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.graph import Graph, Plan
from rekindle.policy.base import check_count, check_share


@dataclass(frozen=True, slots=True)
class MemoryOptimal:
    """Keep the share `ratio` of the evictable activations that are large and that much is computed from, so that what
    lies between them can go. The score of a value is `nbytes * log2(1 + descendants)`.

    Raises:
        PolicyError: `ratio` is not in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def __call__(self, graph: Graph) -> Plan:
        """Keep the values of the highest score."""
        return _highest(graph, memory_scores(graph), self.ratio)


@dataclass(frozen=True, slots=True)
class SpeedOptimal:
    """Keep the share `ratio` of the evictable activations that are expensive to recompute and small. The score of a
    value is the seconds of its op for each byte it holds.

    Raises:
        PolicyError: `ratio` is not in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)

    def __call__(self, graph: Graph) -> Plan:
        """Keep the values of the highest score."""
        return _highest(graph, speed_scores(graph), self.ratio)


@dataclass(frozen=True, slots=True)
class Balanced:
    """Keep the share `ratio` of the evictable activations that both of the above would. The score of a value is
    `memory_weight * m + (1 - memory_weight) * s`, where `m` and `s` are its places in the orders of `MemoryOptimal` and
    `SpeedOptimal`, from 0 (the lowest score) to 1: ranks, since the scores themselves range over many powers of ten.

    Raises:
        PolicyError: `ratio` is not in (0, 1], or `memory_weight` not in [0, 1].
    """

    ratio: float
    memory_weight: float = 0.5

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        check_share("memory_weight", self.memory_weight, zero=True)

    def __call__(self, graph: Graph) -> Plan:
        """Keep the values of the highest score."""
        memory, speed = _ranks(memory_scores(graph)), _ranks(speed_scores(graph))
        weight = self.memory_weight
        return _highest(graph, [weight * m + (1 - weight) * s for m, s in zip(memory, speed, strict=True)], self.ratio)


@dataclass(frozen=True, slots=True)
class ByDepth:
    """Keep the evictable activations that are at least `depth` ops away from the end of the forward pass, by the
    shortest way: the last ones, which the backward pass asks for first, are recomputed.

    Raises:
        PolicyError: `depth` is not a positive int.
    """

    depth: int

    def __post_init__(self) -> None:
        check_count("depth", self.depth)

    def __call__(self, graph: Graph) -> Plan:
        """Keep the values that are deep enough."""
        distances = graph.distances
        deep = (value.number for value in graph.evictable if (distances[value.number] or 0) >= self.depth)
        return Plan(frozenset(deep))


def memory_scores(graph: Graph) -> list[float]:
    """The score of `MemoryOptimal` for each of `graph.evictable`, in bytes."""
    return [value.nbytes * math.log2(1 + graph.descendants[value.number]) for value in graph.evictable]


def speed_scores(graph: Graph) -> list[float]:
    """The score of `SpeedOptimal` for each of `graph.evictable`, in seconds per byte."""
    seconds = {value: op.seconds for op in graph.ops for value in op.outputs}
    return [seconds.get(value.number, 0.0) / max(1, value.nbytes) for value in graph.evictable]


def _ranks(scores: Sequence[float]) -> list[float]:
    """The place of each score from 0 to 1; equal scores share the lowest of their places."""
    places: dict[float, int] = {}
    for place, score in enumerate(sorted(scores)):
        places.setdefault(score, place)
    last = max(1, len(scores) - 1)
    return [places[score] / last for score in scores]


def _highest(graph: Graph, scores: Sequence[float], ratio: float) -> Plan:
    """Keep the share `ratio`, rounded up, of the evictable values; of equal scores the earlier value."""
    values = graph.evictable
    count = max(1, math.ceil(round(ratio * len(values), 6)))  # 0.07 * 100 is a little more than 7
    best = sorted(range(len(values)), key=lambda index: (-scores[index], index))[:count]
    return Plan(frozenset(values[index].number for index in best))
