"""What others keep and recompute, on the graphs that Rekindle records: each as a peak and the seconds that it repeats.

All are played by the simulator that judges Rekindle's own plans. Where a way leaves open how long a recomputed value is
held, both answers are tried, and the lower peak and the fewer seconds count, also if no single run has both.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from rekindle.graph import Graph, Plan, Simulator, Turn
from rekindle.policy.cuts import Cuts

COMPUTE = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product", "convolution", "_grouped_mm", "scaled_mm")


@dataclass(frozen=True)
class Point:
    """One way to run a step.

    Attributes:
        name: what it is called.
        peak: most bytes live.
        seconds: what is repeated takes.
    """

    name: str
    peak: int
    seconds: float


def points(graph: Graph, blocks: Sequence[Collection[int]]) -> Iterator[Point]:
    """All of them. `blocks` are the forward ops of each block that people checkpoint."""
    if len(blocks) > 1:
        root = max(2, round(math.sqrt(len(blocks))))
        segments = [frozenset().union(*blocks[i : i + root]) for i in range(0, len(blocks), root)]
        yield _played("one checkpoint per block", graph, _boundaries(graph, blocks), blocks)
        yield _played("every 2nd block", graph, _boundaries(graph, blocks[::2]), blocks[::2])
        yield _played("every 3rd block", graph, _boundaries(graph, blocks[::3]), blocks[::3])
        yield _played("square-root segments", graph, _boundaries(graph, segments), segments)
        selective = _boundaries(graph, blocks) | _keepable(graph, _computed(graph))
        yield _played("all but matmuls and attention", graph, selective, blocks)
    yield _played("PyTorch's min-cut", graph, _min_cut(graph), [])
    full = _played("", graph, _wanted(graph), []).peak
    for share in (0.7, 0.5):
        point = dtr(graph, int(graph.standing + share * (full - graph.standing)))
        if point is not None:
            yield replace(point, name=f"DTR at {share:.0%}")


def _wanted(graph: Graph) -> frozenset[int]:
    return _keepable(graph, {demand.value for demand in graph.demands})


def _keepable(graph: Graph, values: Collection[int]) -> frozenset[int]:
    return frozenset(v for v in values if graph.values[v].evictable and graph.values[v].overwritten is None)


def _computed(graph: Graph) -> frozenset[int]:
    """What matrix products, convolutions and attention made."""
    return frozenset(value for op in graph.forward if is_compute(op.name) for value in op.outputs)


def is_compute(name: str) -> bool:
    """Whether an op is one that PyTorch's own policies call compute-intensive."""
    return name.removeprefix("aten.").startswith(COMPUTE)


def _boundaries(graph: Graph, segments: Sequence[Collection[int]]) -> frozenset[int]:
    """What is kept if these are checkpointed: what they read from outside, and all that is wanted elsewhere."""
    inside = {op: index for index, ops in enumerate(segments) for op in ops}
    kept = {v for v in _wanted(graph) if inside.get(graph.values[v].made_by or 0) is None}
    for op, index in inside.items():
        for value in graph.ops[op].inputs:
            maker = graph.values[value].made_by
            if maker is not None and inside.get(maker) != index:
                kept.add(value)
    return _keepable(graph, kept)


def _min_cut(graph: Graph) -> frozenset[int]:
    """The fewest bytes from which all can be recomputed without repeating an op that is compute-intensive."""
    ops = tuple(replace(op, seconds=math.inf if is_compute(op.name) else 0.0) for op in graph.ops)
    wanted = sorted({d.value for d in graph.demands if graph.values[d.value].evictable})
    barred = {value.number for value in graph.values if value.overwritten is not None}
    return Cuts(replace(graph, ops=ops), wanted, (), barred).at(1.0).kept


def _played(name: str, graph: Graph, kept: frozenset[int], segments: Sequence[Collection[int]]) -> Point:
    simulator = Simulator(graph)
    lines = [simulator.run(_laid_out(simulator, kept, segments, all_)) for all_ in (True, False)]
    return Point(name, min(line.peak for line in lines if line), min(line.seconds for line in lines if line))


def _laid_out(simulator: Simulator, kept: frozenset[int], segments: Sequence[Collection[int]], hold: bool) -> Plan:
    """A plan in which each replay holds what is asked for later in the same segment (all that it makes there, if
    `hold`), and everything goes with its last use."""
    graph = simulator.graph
    where = {op: index for index, ops in enumerate(segments) for op in ops}
    last_demand = {demand.value: position for position, demand in enumerate(graph.demands)}
    last_use = dict(last_demand)
    made: dict[int, list[int]] = {}

    def turn(position: int, ops: list[int]) -> Turn:
        target = graph.demands[position].value
        if not ops:
            return Turn()
        home = where.get(graph.values[target].made_by or 0)
        fresh = [v for op in ops if where.get(op) == home for v in graph.ops[op].outputs if v != target]
        made[position] = [
            v
            for v in fresh
            if graph.values[v].overwritten is None
            and graph.values[v].evictable
            and (hold or last_demand.get(v, -1) > position)
        ]
        for op in ops:
            for source in graph.ops[op].inputs:
                last_use[source] = max(last_use.get(source, 0), position)
        return Turn(frozenset(made[position]))

    simulator.play(kept, turn)
    dropped: dict[int, list[int]] = {}
    for value, position in last_use.items():
        if graph.values[value].evictable:
            dropped.setdefault(position, []).append(value)
    turns = tuple(
        Turn(frozenset(v for v in made.get(i, ()) if last_use.get(v, -1) > i), tuple(dropped.get(i, ())))
        for i in range(len(graph.demands))
    )
    return Plan(kept, turns)


# -- Dynamic Tensor Rematerialization (Kirisame et al., 2021) ----------------------------------------------------------


def dtr(graph: Graph, budget: int) -> Point | None:
    """DTR at a budget: whenever it is full, evict what has the least cost of its evicted neighbourhood per byte and
    per second of staleness. None if it runs out of memory, or repeats the step more than twenty times."""
    try:
        return _Dtr(graph, budget).play()
    except MemoryError:
        return None


class _Dtr:
    """Values are there, or evicted and made again on demand; what user code holds is not evicted, as in Rekindle."""

    def __init__(self, graph: Graph, budget: int) -> None:
        self._graph, self._budget = graph, budget
        self._simulator = Simulator(graph)
        self._last = {demand.value: number for number, demand in enumerate(graph.demands)}
        self._children: list[list[int]] = [[] for _ in graph.values]
        for op in graph.forward:
            for value in op.inputs:
                self._children[value] += op.outputs
        self._live, self._peak = graph.standing, graph.standing
        self._seconds, self._clock = 0.0, 0.0
        self._most = 20 * sum(op.seconds for op in graph.ops)
        self._there: set[int] = set()
        self._user: set[int] = set()
        self._used: dict[int, float] = {}
        self._pins: dict[int, int] = {}

    def play(self) -> Point:
        """The whole step."""
        ends = self._simulator.dropped
        asked, hands = self._simulator.asked, []
        for number in range(len(self._graph.ops) + 1):
            for value in ends[number]:
                self._user.discard(value)
                self._tidy(value, number)
            while hands and hands[0][0] <= number:
                _, value, last = heapq.heappop(hands)
                self._pins[value] -= 1
                if last:
                    self._last.pop(value, None)
                self._tidy(value, number)
            for position in asked[number]:
                demand = self._graph.demands[position]
                if self._graph.values[demand.value].evictable:
                    self._bring(demand.value)
                    self._pins[demand.value] = self._pins.get(demand.value, 0) + 1
                    heapq.heappush(hands, (demand.until, demand.value, self._last[demand.value] == position))
            if number < len(self._graph.ops):
                self._run(number, again=False)
        return Point("DTR", self._peak, self._seconds)

    def _tidy(self, value: int, number: int) -> None:
        """Let go of what nobody can want any more."""
        if value in self._there and value not in self._user and not self._pins.get(value):
            evictable = self._graph.values[value].evictable
            if not evictable or (value not in self._last and not any(c in self._last for c in self._children[value])):
                self._evict(value)

    def _evict(self, value: int) -> None:
        self._there.discard(value)
        self._live -= self._graph.values[value].nbytes

    def _bring(self, target: int) -> None:
        """Make a value again, and all that it needs."""
        stack = [target]
        while stack:
            value = stack[-1]
            self._used[value] = self._clock
            if value in self._there:
                stack.pop()
                continue
            maker = self._graph.values[value].made_by
            assert maker is not None
            missing = [v for v in self._simulator.sources[maker] if v not in self._there]
            if missing:
                stack += missing
                if self._seconds > self._most or len(stack) > 10 * len(self._graph.values):
                    raise MemoryError
                continue
            self._run(maker, again=True)

    def _run(self, number: int, again: bool) -> None:
        op = self._graph.ops[number]
        values = self._graph.values
        for value in op.inputs:
            self._pins[value] = self._pins.get(value, 0) + 1
        outputs = [v for v in op.outputs if v not in self._there]
        self._room(sum(values[v].nbytes for v in outputs) + op.temporaries)
        self._clock += op.seconds
        self._seconds += op.seconds if again else 0.0
        for value in outputs:
            old = values[value].overwrites
            if old is not None and old in self._there and not again:
                self._evict(old)
                self._user.discard(old)
            self._there.add(value)
            self._live += values[value].nbytes
            self._used[value] = self._clock
        if not again:
            self._user.update(op.outputs)
        self._peak = max(self._peak, self._live + op.temporaries)
        for value in op.inputs:
            self._pins[value] -= 1
            self._used[value] = self._clock

    def _room(self, nbytes: int) -> None:
        while self._live + nbytes > self._budget:
            free = [
                v
                for v in self._there
                if self._graph.values[v].evictable
                and self._graph.values[v].nbytes
                and v not in self._user
                and not self._pins.get(v)
            ]
            if not free:
                raise MemoryError
            self._evict(min(free, key=self._score))

    def _score(self, value: int) -> float:
        """h_DTR: what it would take to make it and its evicted neighbours again, per byte and staleness."""
        made_by, values = self._simulator.made_by, self._graph.values
        ops: set[int] = {made_by[value] or 0}
        for up in (True, False):
            stack = [value]
            while stack:
                each = stack.pop()
                near = self._simulator.sources[made_by[each] or 0] if up else self._children[each]
                for other in near:
                    if values[other].evictable and other not in self._there and made_by[other] not in ops:
                        ops.add(made_by[other] or 0)
                        stack.append(other)
        cost = sum(self._graph.ops[op].seconds for op in ops)
        return cost / (values[value].nbytes * max(1e-9, self._clock - self._used[value]))
