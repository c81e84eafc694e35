"""A step on paper: what is live at each of its ops under a plan, and what is recomputed.

Problem: whether a plan fits must be known before it is obeyed.
Source: the rules of the runtime (`runtime.replay`), repeated here op by op: what is missing is replayed in the order of
the forward pass, each value on the way goes with its last reader, an in-place op works on a copy unless it may have the
original.
Regime: exact where the step repeats the recorded one. Milliseconds for thousands of ops.
Known gaps: what user code or autograd holds beyond what the record says is not known; a value is counted until the node
that asked for it is done, though some let go of it before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

from rekindle.graph.ir import Graph
from rekindle.graph.plan import Plan, Turn

_USER, _OURS = 1, 2  # who holds a value; a node of the backward pass holds by steps of _NODE
_NODE = 4


@dataclass(frozen=True, slots=True)
class Timeline:
    """How a step goes under a plan.

    Attributes:
        live: most bytes live while each op runs, and while what is missing before it is replayed.
        seconds: what the replays take.
        replays: for each demand, the numbers of the ops that are replayed.
    """

    live: tuple[int, ...]
    seconds: float
    replays: tuple[tuple[int, ...], ...]

    @property
    def peak(self) -> int:
        """Most bytes live at any moment."""
        return max(self.live, default=0)

    @property
    def peak_at(self) -> int:
        """Number of the op at which that is."""
        return self.live.index(self.peak) if self.live else 0


class Simulator:
    """Plays steps of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nbytes = [value.nbytes for value in graph.values]
        self.made_by = [value.made_by for value in graph.values]
        self.evictable = [value.evictable for value in graph.values]
        self.sources = [[v for v in op.inputs if graph.values[v].evictable] for op in graph.ops]
        self.asked: list[list[int]] = [[] for _ in range(len(graph.ops) + 1)]
        self._handed: list[list[int]] = [[] for _ in range(len(graph.ops) + 1)]
        self._dropped: list[list[int]] = [[] for _ in range(len(graph.ops) + 1)]
        self._overwrites = [value.overwrites for value in graph.values]
        for number, demand in enumerate(graph.demands):
            self.asked[demand.before].append(number)
        self._ends = _ends(graph)
        for value, end in enumerate(self._ends):
            if end is not None:
                self._dropped[end].append(value)

    def run(self, plan: Plan) -> Timeline:
        """The step under a plan."""
        turns = plan.turns or default_turns(self.graph)
        return self.play(plan.kept, lambda demand, _: turns[demand])

    def play(self, kept: Iterable[int], turn: Callable[[int, list[int]], Turn]) -> Timeline:
        """The step with `kept` checkpoints, where `turn(demand, ops)` says what to hold and let go of when `ops` are
        replayed for a demand."""
        graph, nbytes, made_by, overwrites = self.graph, self.nbytes, self.made_by, self._overwrites
        holders = [0] * len(nbytes)
        keeps = bytearray(len(nbytes))
        for value in kept:
            keeps[value] = 1
        live, peak, seconds = graph.standing, 0, 0.0
        history: list[int] = []
        replays: list[tuple[int, ...]] = [()] * len(graph.demands)
        for number in range(len(graph.ops) + 1):
            peak = live
            for value in self._dropped[number]:
                if holders[value] & _USER:
                    holders[value] -= _USER
                    if not holders[value]:
                        live -= nbytes[value]
            for value in self._handed[number]:
                holders[value] -= _NODE
                if not holders[value]:
                    live -= nbytes[value]
            self._handed[number] = []
            for position in self.asked[number]:
                demand = graph.demands[position]
                value = demand.value
                if made_by[value] is None or not self.evictable[value]:
                    continue
                ops: list[int] = [] if holders[value] & 3 else self.missing(value, holders)
                decided = turn(position, ops)
                if ops:
                    replays[position] = tuple(ops)
                    live, high, took = self._replay(value, ops, decided.retained, holders, live)
                    peak, seconds = max(peak, high), seconds + took
                if demand.until > number:
                    holders[value] += _NODE
                    self._handed[demand.until].append(value)
                for other in decided.dropped:
                    if holders[other] & _OURS:
                        holders[other] -= _OURS
                        if not holders[other]:
                            live -= nbytes[other]
            if number == len(graph.ops):
                break
            op = graph.ops[number]
            for value in op.outputs:
                old = overwrites[value]
                if old is not None and holders[old]:
                    live -= nbytes[old]
                    holders[old] = 0
                live += nbytes[value]
                holders[value] = _USER + _OURS if keeps[value] else _USER
            history.append(max(peak, live + op.temporaries))
        if history:
            history[-1] = max(history[-1], peak)
        return Timeline(tuple(history), seconds, tuple(replays))

    def bare(self) -> list[int]:
        """Bytes live while each op runs, without what we hold and recompute."""
        ops = self.graph.ops
        changes = [0] * (len(ops) + 1)
        for value in self.graph.values:
            if value.made_by is None:
                continue
            ends = [end for end in (self._ends[value.number], value.overwritten) if end is not None]
            changes[value.made_by] += value.nbytes
            changes[min([len(ops), *ends])] -= value.nbytes
        live = list(accumulate(changes, initial=self.graph.standing))[1:]
        return [nbytes + op.temporaries for nbytes, op in zip(live, ops, strict=False)]

    def missing(self, target: int, holders: list[int]) -> list[int]:
        """The ops to replay for a value, in order."""
        ops: set[int] = set()
        stack = [target]
        while stack:
            number = self.made_by[stack.pop()]
            assert number is not None
            if number not in ops:
                ops.add(number)
                stack += [source for source in self.sources[number] if not holders[source] & 3]
        return sorted(ops)

    def _replay(
        self, target: int, ops: list[int], retained: frozenset[int], holders: list[int], live: int
    ) -> tuple[int, int, float]:
        """Replay ops. Returns the bytes live afterwards, the most on the way, and the seconds."""
        nbytes, overwrites = self.nbytes, self._overwrites
        uses: dict[int, int] = {}
        for number in ops:
            for source in self.sources[number]:
                if not holders[source] & 3:
                    uses[source] = uses.get(source, 0) + 1
        peak, seconds = live, 0.0
        there: set[int] = set()
        for number in ops:
            op = self.graph.ops[number]
            for value in op.outputs:
                old = overwrites[value]
                if old is not None and old in there and uses[old] == 1 and old not in retained:
                    there.discard(old)  # the op may have the original
                    live -= nbytes[old]
                live += nbytes[value]
            peak = max(peak, live + op.temporaries)
            seconds += op.seconds
            for value in op.outputs:
                if (value in retained or value == target) and not holders[value] & 3:
                    holders[value] += _OURS
                    if value in uses:
                        there.add(value)
                elif uses.get(value):
                    there.add(value)
                else:
                    live -= nbytes[value]
            for source in self.sources[number]:
                if source in uses:
                    uses[source] -= 1
                    if not uses[source] and source in there:
                        there.discard(source)
                        if not holders[source] & 3:
                            live -= nbytes[source]
        return live, peak, seconds


def simulate(graph: Graph, plan: Plan) -> Timeline:
    """What is live at each op of a step, and what is recomputed, under `plan`."""
    return Simulator(graph).run(plan)


def default_turns(graph: Graph) -> tuple[Turn, ...]:
    """The turns of a plan without any: what is asked for later is retained, and goes when it was asked for last."""
    last = {demand.value: position for position, demand in enumerate(graph.demands)}
    wanted = set(last)
    turns: list[Turn] = []
    for position, demand in enumerate(graph.demands):
        turns.append(Turn(frozenset(wanted), (demand.value,) if last[demand.value] == position else ()))
        if last[demand.value] == position:
            wanted.discard(demand.value)
    return tuple(turns)


def _ends(graph: Graph) -> list[int | None]:
    """For each value, the op before which it is gone, as far as not we hold it; None for what stays.

    What is not evictable stays as long as something may be recomputed from it.
    """
    wanted = [0] * len(graph.values)
    for demand in graph.demands:
        wanted[demand.value] = max(wanted[demand.value], demand.until)
    for op in reversed(graph.ops):
        latest = max((wanted[value] for value in op.outputs), default=0)
        for value in op.inputs:
            wanted[value] = max(wanted[value], latest)
    ends: list[int | None] = []
    for each in graph.values:
        if each.made_by is None or each.dropped is None:
            ends.append(None)
        else:
            ends.append(each.dropped if each.evictable else max(each.dropped, wanted[each.number]))
    return ends
