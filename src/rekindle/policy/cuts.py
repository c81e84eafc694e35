"""What to keep at a price per byte, and all that any price can buy.

Problem: of the values that the backward pass asks for, and of those they are computed from, keep a set with few bytes
from which the rest is recomputed in few seconds, each op once.
Source: at a fixed price per byte this is a minimum cut, as in PyTorch's partitioner (Dao, "Min-cut optimal
recomputation", 2022) but with the seconds of ops as capacities; prices at which the answer changes are found as in
parametric search (Eisner and Severance, 1976): the line through two known answers gives the next price to try.
Regime: a cut takes milliseconds for thousands of ops. The answers are the corners of a convex curve, and the curve is a
lower bound: no schedule that has fewer bytes live at that moment recomputes less.
Known gaps: between two corners the true optimum may lie above the curve; integer programming (`policy.moments`) tells
by how much. What is live while recomputing is not priced. Capacities are rounded to 2**-28 of their sum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from rekindle.graph import Graph

_ENDLESS = 1 << 30  # capacities are 32-bit integers
_TOTAL = 1 << 28
_SOURCE, _SINK = 0, 1
_TINY = 1e-6  # of all seconds


@dataclass(frozen=True, slots=True)
class Corner:
    """The best for some price.

    Attributes:
        nbytes: bytes of what is kept.
        seconds: what the ops take that are repeated.
        kept: numbers of the values that are kept.
    """

    nbytes: int
    seconds: float
    kept: frozenset[int]


class Cuts:
    """Which values to keep, of those that are needed for what `wanted` asks for."""

    def __init__(self, graph: Graph, wanted: Iterable[int], free: Collection[int], barred: Collection[int]) -> None:
        """`free` values are there anyway; `barred` ones cannot be kept."""
        self._graph = graph
        wanted = set(wanted)
        values, ops = _needed(graph, wanted, free)
        self._values = values
        nodes = {("value", value): 2 + index for index, value in enumerate(values)}
        nodes |= {("op", op): len(nodes) + 2 + index for index, op in enumerate(ops)}
        rows: list[int] = []
        columns: list[int] = []
        seconds: list[float] = []
        nbytes: list[float] = []

        def edge(start: int, end: int, cost: float, size: float) -> None:
            rows.append(start)
            columns.append(end)
            seconds.append(cost)
            nbytes.append(size)

        for value in wanted:
            if ("value", value) in nodes:
                edge(_SOURCE, nodes["value", value], np.inf, 0)
        for value in values:
            maker = graph.values[value].made_by
            assert maker is not None
            size = np.inf if value in barred else graph.values[value].nbytes
            edge(nodes["value", value], nodes["op", maker], 0, size)
        for op in ops:
            edge(nodes["op", op], _SINK, graph.ops[op].seconds, 0)
            for source in graph.ops[op].inputs:
                if ("value", source) in nodes:
                    edge(nodes["op", op], nodes["value", source], np.inf, 0)
        self._nodes = nodes
        self._count = len(nodes) + 2
        order = np.lexsort((columns, rows))
        self._rows, self._columns = np.array(rows, int)[order], np.array(columns, int)[order]
        self._seconds, self._nbytes = np.array(seconds)[order], np.array(nbytes, float)[order]
        self._ops = ops

    def at(self, price: float) -> Corner:
        """The best for a price, in seconds for each byte."""
        costs = self._seconds + (price * self._nbytes if price else np.where(np.isinf(self._nbytes), np.inf, 0.0))
        finite = np.isfinite(costs)
        scale = _TOTAL / (float(costs[finite].sum()) or 1.0)
        capacity = np.full(len(costs), _ENDLESS, np.int32)
        capacity[finite] = np.round(costs[finite] * scale).astype(np.int32)
        pointers = np.searchsorted(self._rows, np.arange(self._count + 1)).astype(np.int32)
        matrix = csr_array((capacity, self._columns.astype(np.int32), pointers), shape=(self._count, self._count))
        residual = matrix - maximum_flow(matrix, _SOURCE, _SINK).flow
        residual.eliminate_zeros()
        inside = np.zeros(self._count, bool)
        inside[breadth_first_order(residual, _SOURCE, return_predecessors=False)] = True
        kept = [
            value
            for value in self._values
            if inside[self._nodes["value", value]] and not inside[self._nodes["op", self._maker(value)]]
        ]
        repeated = [op for op in self._ops if inside[self._nodes["op", op]]]
        values, ops = self._graph.values, self._graph.ops
        return Corner(sum(values[v].nbytes for v in kept), sum(ops[op].seconds for op in repeated), frozenset(kept))

    def bound(self, nbytes: int) -> float:
        """Seconds that are repeated at least if no more than `nbytes` bytes are kept: the curve at that place."""
        total = sum(self._graph.ops[op].seconds for op in self._ops)
        low, high = self._ends()
        if nbytes >= high.nbytes:
            return 0.0
        if nbytes < low.nbytes:
            return low.seconds
        while low.nbytes < high.nbytes and high.seconds < low.seconds:
            price = (low.seconds - high.seconds) / (high.nbytes - low.nbytes)
            middle = self.at(price)
            # Whatever is kept costs no less at this price, but for what rounding may have hidden from the cut.
            line = middle.seconds + price * (middle.nbytes - nbytes) - self._rounding(price)
            if (
                middle.nbytes in (low.nbytes, high.nbytes)
                or line > low.seconds - price * (nbytes - low.nbytes) - _TINY * total
            ):
                return max(0.0, line)
            low, high = (middle, high) if middle.nbytes <= nbytes else (low, middle)
        return high.seconds

    def _rounding(self, price: float) -> float:
        """Seconds by which the best for a price may be missed: each capacity is off by half a unit, in two cuts."""
        costs = self._seconds + price * self._nbytes
        return len(costs) * float(costs[np.isfinite(costs)].sum()) / _TOTAL

    def _ends(self) -> tuple[Corner, Corner]:
        """With the fewest bytes, and with the fewest seconds."""
        total = sum(self._graph.ops[op].seconds for op in self._ops)
        least = min((self._graph.values[value].nbytes for value in self._values), default=0)
        return self.at(2 * total / max(1, least) + 1.0), self.at(0.0)

    def corners(self, most: int = 64) -> list[Corner]:
        """The corners of the curve, from the fewest bytes to the fewest seconds; about `most` of them at most."""
        total = sum(self._graph.ops[op].seconds for op in self._ops)
        first, last = self._ends()
        found = [first, last] if last.seconds < first.seconds else [first]
        gaps = [(first, last)]
        while gaps and len(found) < most:
            gaps.sort(key=lambda gap: (gap[1].nbytes - gap[0].nbytes) * (gap[0].seconds - gap[1].seconds))
            low, high = gaps.pop()
            if high.nbytes <= low.nbytes or low.seconds <= high.seconds:
                continue
            price = (low.seconds - high.seconds) / (high.nbytes - low.nbytes)
            middle = self.at(price)
            gain = (low.seconds + price * low.nbytes) - (middle.seconds + price * middle.nbytes)
            if low.nbytes < middle.nbytes < high.nbytes and gain > _TINY * total:
                found.append(middle)
                gaps += [(low, middle), (middle, high)]
        return sorted(found, key=lambda corner: corner.nbytes)

    def _maker(self, value: int) -> int:
        maker = self._graph.values[value].made_by
        assert maker is not None
        return maker


def _needed(graph: Graph, wanted: Iterable[int], free: Collection[int]) -> tuple[list[int], list[int]]:
    """The values that `wanted` may have to be recomputed from, and the ops that do."""
    values: set[int] = set()
    ops: set[int] = set()
    stack = [value for value in wanted if graph.values[value].evictable and value not in free]
    while stack:
        value = stack.pop()
        if value in values:
            continue
        values.add(value)
        maker = graph.values[value].made_by
        assert maker is not None
        if maker not in ops:
            ops.add(maker)
            stack += [v for v in graph.ops[maker].inputs if graph.values[v].evictable and v not in free]
    return sorted(values), sorted(ops)
