"""Where a long recomputation is broken: cuts through the forward pass, and which of them are held at a time.

Problem: when a value is asked for, all that lies between it and what is live is replayed, and held as far as it will be
asked for too. Broken at cuts, that is one leaf of the forward pass at a time. If not even what crosses all cuts can be
held, some of it is itself recomputed, from a cut further up.
Source: cuts at which little crosses, with leaves of bounded size, by dynamic programming; which of them to hold by the
binomial schedule of Revolve (Griewank and Walther, 2000), which needs a logarithm of their number.
Regime: networks that are narrow somewhere. What crosses every cut, such as the output of an encoder, is held once.
Known gaps: leaves count as equally long. In a U-Net the skips cross the cuts, and are held.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import comb

from rekindle.graph import Graph

_MOST_SITES = 1200
_SLOPES = (0.0, 0.25)


@dataclass(frozen=True, slots=True)
class Frame:
    """Cuts through the forward pass.

    Attributes:
        cuts: numbers of the ops before which the cuts are, ascending.
        held: for each leaf between cuts, the cuts that are held from when it is reached first; for the last one, which
            the forward pass itself reaches, from the forward pass on.
    """

    cuts: tuple[int, ...] = ()
    held: tuple[tuple[int, ...], ...] = ((),)

    def leaf(self, op: int) -> int:
        """The position of the leaf that an op is in."""
        return bisect_right(self.cuts, op)


class Sites:
    """All places where a forward pass can be cut."""

    def __init__(self, graph: Graph, wanted: Collection[int]) -> None:
        """`wanted` are the values that the backward pass asks for."""
        self._graph = graph
        self._end = 1 + max((op.number for op in graph.forward), default=-1)
        self.crossing = self._crossings()
        self._bytes = [sum(graph.values[v].nbytes for v in values) for values in self.crossing]
        wanted_at = [0] * (self._end + 1)
        for value in wanted:
            maker = graph.values[value].made_by
            if maker is not None and maker < self._end:
                wanted_at[maker + 1] += graph.values[value].nbytes
        for number in range(self._end):
            wanted_at[number + 1] += wanted_at[number]
        self._wanted = wanted_at  # bytes wanted of what the ops before each one make
        self._narrow = self._narrow_places()

    @property
    def total(self) -> int:
        """Bytes of all that is wanted."""
        return self._wanted[-1]

    def frames(self) -> Iterator[Frame]:
        """Frames from one leaf to as many as there are narrow places. All cuts are held from the forward pass on."""
        yield Frame()
        seen: set[tuple[int, ...]] = set()
        for slope in _SLOPES:
            for parts in _ladder(len(self._narrow) + 1):
                cuts = self._cut(self.total // parts, slope)
                if cuts and cuts not in seen:
                    seen.add(cuts)
                    yield Frame(cuts, (*((),) * len(cuts), cuts))

    def deep_frames(self) -> Iterator[Frame]:
        """Frames of which a few cuts only are held at a time."""
        seen: set[tuple[int, ...]] = set()
        for parts in _ladder(len(self._narrow) + 1):
            cuts = self._cut(self.total // parts, 0.0)
            if len(cuts) < 2 or cuts in seen:
                continue
            seen.add(cuts)
            slots = len(cuts) - 1
            while slots:
                yield Frame(cuts, _binomial(cuts, slots))
                slots = min(slots - 1, slots * 2 // 3)

    def _crossings(self) -> list[frozenset[int]]:
        """For each op, the evictable values from before it that it or a later one reads."""
        graph, last = self._graph, {}
        for op in graph.forward:
            for value in op.inputs:
                last[value] = op.number
        crossing: list[frozenset[int]] = []
        open_: set[int] = set()
        closing: dict[int, list[int]] = {}
        for number in range(self._end):
            crossing.append(frozenset(open_))
            open_.difference_update(closing.get(number, ()))
            for value in graph.ops[number].outputs:
                if graph.values[value].evictable and last.get(value, -1) > number:
                    open_.add(value)
                    closing.setdefault(last[value], []).append(value)
        return crossing

    def _narrow_places(self) -> list[int]:
        """Ops before which no more crosses than before their neighbours, and nothing that will be overwritten."""
        values, size = self._graph.values, self._bytes
        fit = [
            number
            for number in range(1, self._end)
            if self.crossing[number] and not any(values[v].overwritten is not None for v in self.crossing[number])
        ]
        narrow = [
            number
            for before, number, after in zip([None, *fit], fit, [*fit[1:], None], strict=False)
            if (before is None or size[number] <= size[before]) and (after is None or size[number] <= size[after])
        ]
        narrow = [n for n in narrow if size[n] <= 2 * min(size[m] for m in narrow if abs(m - n) <= 8)]
        return narrow[:: len(narrow) // _MOST_SITES + 1]

    def _cut(self, most: int, slope: float) -> tuple[int, ...]:
        """The cuts with the fewest bytes across them all so that no leaf has more than `most` bytes that are wanted, as
        far as the narrow places allow. Of what is wanted from later ops, that share is gone when the backward pass gets
        to a leaf, and may be added to it."""
        places = [0, *self._narrow, self._end]
        wanted = [self._wanted[place] for place in places]
        best, previous = [0.0] + [math.inf] * (len(places) - 1), [0] * len(places)
        start = 0
        for index in range(1, len(places)):
            room = most + slope * (self.total - wanted[index])
            while start < index - 1 and wanted[index] - wanted[start] > room:
                start += 1
            low = min(range(start, index), key=lambda i: (best[i], -i))
            cost = self._bytes[places[index]] if places[index] < self._end else 0
            best[index], previous[index] = best[low] + cost, low
        cuts: list[int] = []
        index = previous[-1]
        while index:
            cuts.append(places[index])
            index = previous[index]
        return tuple(reversed(cuts))


def _ladder(most: int) -> Iterator[int]:
    parts = 2
    while parts < most:
        yield parts
        parts = max(parts + 1, parts * 3 // 2)
    yield most
    yield 2 * most


def _binomial(cuts: tuple[int, ...], slots: int) -> tuple[tuple[int, ...], ...]:
    """For each leaf, the cuts that are held from when it is reached first, with at most `slots` held at a time."""
    held: list[list[int]] = [[] for _ in range(len(cuts) + 1)]
    stack = [(0, len(cuts) + 1, slots, len(cuts))]  # leaves from, to, slots, and the leaf whose pass reaches the end
    while stack:
        first, end, free, reached = stack.pop()
        if end - first == 1:
            continue
        if not free:
            stack.append((first, end - 1, 0, end - 2))
            continue
        middle = first + _advance(end - first, free + 1)  # the beginning is there anyway
        held[reached].append(cuts[middle - 1])
        stack.append((middle, end, free - 1, reached))
        stack.append((first, middle, free, middle - 1))
    return tuple(tuple(sorted(each)) for each in held)


def _advance(length: int, slots: int) -> int:
    """How many leaves to go before the next cut is held: Revolve's choice, for which the fewest ops are repeated."""
    repeats = 1
    while comb(slots + repeats, slots) < length:
        repeats += 1
    small = comb(slots + repeats - 2, slots) if repeats > 1 else 1
    large = comb(slots + repeats - 1, slots)
    rest = length - comb(slots + repeats - 2, slots - 1) if repeats > 1 else 1
    return max(1, min(length - 1, max(small, min(large, rest))))
