"""Every plan of a tiny step, tried out on paper: what there is nothing better than."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from rekindle.graph import Graph, Plan, Turn, simulate

Frontier = list[tuple[int, float]]
"""(peak, seconds) of plans that no other plan beats in both, the lowest peak first."""


def frontier(graph: Graph) -> Frontier:
    """Of all plans. Exponential in the values and in the demands: for four or so of each."""
    points = set()
    for plan in plans(graph):
        timeline = simulate(graph, plan)
        points.add((timeline.peak, timeline.seconds))
    return best_of(points)


def turns_to_try(graph: Graph) -> int:
    """How large a step is for `frontier`, which takes about two to the power of this: values times demands."""
    return len(_of_use(graph, 0)) * sum(graph.values[demand.value].evictable for demand in graph.demands)


def best_of(points: Iterable[tuple[int, float]]) -> Frontier:
    """The points that no other beats in both."""
    found: Frontier = []
    for peak, seconds in sorted(points):
        if not found or seconds < found[-1][1]:
            found.append((peak, seconds))
    return found


def best_within(found: Frontier, budget: int) -> float:
    """The fewest seconds of any plan within a budget; infinite if there is none."""
    return min((seconds for peak, seconds in found if peak <= budget), default=math.inf)


def plans(graph: Graph) -> Iterator[Plan]:
    """Every plan that holds nothing in vain."""
    for kept in subsets(_of_use(graph, 0)):
        yield from _with_turns(graph, frozenset(kept), frozenset(kept), ())


def subsets(values: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """All of them, the smallest first."""
    values = sorted(values)
    return itertools.chain.from_iterable(itertools.combinations(values, count) for count in range(len(values) + 1))


def _with_turns(graph: Graph, kept: frozenset[int], held: frozenset[int], turns: tuple[Turn, ...]) -> Iterator[Plan]:
    """The plans that begin so; `held` is what they hold at the next demand."""
    position = len(turns)
    rest = len(graph.demands) - position
    if not rest:
        yield Plan(kept, turns)
        return
    target = graph.demands[position].value
    if not graph.values[target].evictable:
        yield from _with_turns(graph, kept, held, (*turns, Turn()))
        return
    replays = simulate(graph, Plan(kept, turns + (Turn(),) * rest)).replays[position]
    made = {value for number in replays for value in graph.ops[number].outputs}
    later = _of_use(graph, position + 1)
    held |= made & {target}
    for retained in subsets((made & later) - held):
        for still in subsets(held & later):
            turn = Turn(frozenset(retained), tuple(sorted(held.difference(still))))
            yield from _with_turns(graph, kept, frozenset((*still, *retained)), (*turns, turn))


def _of_use(graph: Graph, position: int) -> set[int]:
    """The values that a demand from that one on asks for, or that such a value may be recomputed from."""
    wanted = {demand.value for demand in graph.demands[position:]}
    for op in reversed(graph.ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
    return {value for value in wanted if graph.values[value].evictable}
