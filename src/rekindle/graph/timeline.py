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

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, TypeAlias

from rekindle.graph.ir import Graph
from rekindle.graph.plan import Plan, Turn

_USER, _OURS = 1, 2  # who holds a value


class Holders(Protocol):
    """Who holds what at a moment of a step."""

    def holds(self, value: int) -> bool:
        """Whether anybody but a node of the backward pass holds a value."""

    def used(self, value: int) -> bool:
        """Whether user code does, or a replay that passes by."""

    def orphans(self) -> list[int]:
        """The values of which only nodes of the backward pass still hold a storage, once for each storage."""


Look: TypeAlias = "Callable[[int, int, Holders, Collection[int] | None], None]"
"""Is shown each op that has more bytes live than what came before since the last op of the step: its number, those
bytes, who holds what, and if it is replayed what is there in passing."""


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
        self.outputs = [op.outputs for op in graph.ops]
        self.temporaries = [op.temporaries for op in graph.ops]
        self.asked: list[list[int]] = [[] for _ in range(len(graph.ops) + 1)]
        self.dropped: list[list[int]] = [[] for _ in range(len(graph.ops) + 1)]
        self.overwrites = [value.overwrites for value in graph.values]
        for number, demand in enumerate(graph.demands):
            self.asked[demand.before].append(number)
        self.ends = ends(graph)
        for value, end in enumerate(self.ends):
            if end is not None:
                self.dropped[end].append(value)

    def run(self, plan: Plan, limit: float = math.inf, look: Look | None = None) -> Timeline | None:
        """The step under a plan; None if more than `limit` bytes are live at any moment."""
        turns = plan.turns or default_turns(self.graph)
        return self.play(plan.kept, lambda demand, _: turns[demand], limit, look)

    def play(
        self,
        kept: Iterable[int],
        turn: Callable[[int, list[int]], Turn],
        limit: float = math.inf,
        look: Look | None = None,
    ) -> Timeline | None:
        """The step with `kept` checkpoints, where `turn(demand, ops)` says what to hold and let go of when `ops` are
        replayed for a demand. None if more than `limit` bytes are live at any moment."""
        step = _Step(self, kept, look)
        history: list[int] = []
        replays: list[tuple[int, ...]] = [()] * len(self.graph.demands)
        for number in range(len(self.graph.ops) + 1):
            step.begin(number)
            for position in self.asked[number]:
                demand = self.graph.demands[position]
                if not self.evictable[demand.value]:
                    continue
                ops = [] if step.holders[demand.value] else self.missing(demand.value, step.holders)
                decided = turn(position, ops)
                if ops:
                    replays[position] = tuple(ops)
                    step.replay(demand.value, ops, decided.retained)
                if demand.until > number:
                    step.hand_over(demand.value, demand.until)
                for other in decided.dropped:
                    step.let_go(other, _OURS)
            if number < len(self.graph.ops):
                step.run(number)
                history.append(step.peak)
            if step.peak > limit:
                return None
        if history:
            history[-1] = max(history[-1], step.peak)
        return Timeline(tuple(history), step.seconds, tuple(replays))

    def bare(self) -> list[int]:
        """Bytes live while each op runs, without what we hold and recompute."""
        ops = self.graph.ops
        changes = [0] * (len(ops) + 1)
        for value in self.graph.values:
            if value.made_by is None:
                continue
            ends = [end for end in (self.ends[value.number], value.overwritten) if end is not None]
            changes[value.made_by] += value.nbytes
            changes[min([len(ops), *ends])] -= value.nbytes
        live = list(accumulate(changes, initial=self.graph.standing))[1:]
        return [nbytes + op.temporaries for nbytes, op in zip(live, ops, strict=False)]

    def rise(self, target: int, ops: Sequence[int], there: bytes, retained: frozenset[int]) -> int:
        """The most bytes that a replay has live beyond what is live before it; `there` says of each value whether it
        is."""
        step = _Step(self, (), None)
        step.holders[:] = there[: len(step.holders)]
        step.live = step.peak = 0
        step.replay(target, ops, retained)
        return step.peak

    def missing(self, target: int, holders: Sequence[int]) -> list[int]:
        """The ops to replay for a value, in order."""
        ops: set[int] = set()
        stack = [target]
        while stack:
            number = self.made_by[stack.pop()]
            assert number is not None
            if number not in ops:
                ops.add(number)
                stack += [source for source in self.sources[number] if not holders[source]]
        return sorted(ops)


@dataclass(slots=True)
class _Hands:
    """Nodes of the backward pass that have one storage of a value in hand.

    Attributes:
        value: number of the value.
        count: how many of them.
        orphan: only they hold it.
    """

    value: int
    count: int = 0
    orphan: bool = False


class _Step:
    """What is live while a step is played.

    Attributes:
        holders: who holds each value: user code, we, or both.
        live: bytes.
        peak: the most of them since the last op.
        seconds: of replays.
    """

    def __init__(self, simulator: Simulator, kept: Iterable[int], look: Look | None) -> None:
        self._simulator = simulator
        self._look = look
        self._nbytes = simulator.nbytes
        self._keeps = bytearray(len(simulator.nbytes))
        for value in kept:
            self._keeps[value] = 1
        self.holders = bytearray(len(simulator.nbytes))
        self.live = self.peak = simulator.graph.standing
        self.seconds = 0.0
        self._hands: dict[int, _Hands] = {}  # the nodes that have in hand what we or user code hold of a value
        self._handed: dict[int, list[_Hands]] = {}

    def begin(self, number: int) -> None:
        """What goes before an op and its demands."""
        holders, nbytes = self.holders, self._nbytes
        for value in self._simulator.dropped[number]:
            if holders[value] == _USER and value not in self._hands:  # as most often
                holders[value] = 0
                self.live -= nbytes[value]
            else:
                self.let_go(value, _USER)
        if number in self._handed:
            for hands in self._handed.pop(number):
                hands.count -= 1
                if hands.orphan and not hands.count:
                    self.live -= nbytes[hands.value]
        self.peak = self.live

    def let_go(self, value: int, who: int) -> None:
        """One of its holders lets go of a value."""
        if not self.holders[value] & who:
            return
        self.holders[value] -= who
        if self.holders[value]:
            return
        hands = self._hands.pop(value, None)
        if hands is not None and hands.count:
            hands.orphan = True
        else:
            self.live -= self._nbytes[value]

    def hand_over(self, value: int, until: int) -> None:
        """A node of the backward pass has a value in hand until an op."""
        hands = self._hands.setdefault(value, _Hands(value))
        hands.count += 1
        self._handed.setdefault(until, []).append(hands)

    def run(self, number: int) -> None:
        """An op of the step itself."""
        simulator, holders = self._simulator, self.holders
        live = self.live
        for value in simulator.outputs[number]:
            old = simulator.overwrites[value]
            if old is not None and holders[old]:
                live -= self._nbytes[old]
                holders[old] = 0
                self._hands.pop(old, None)
            live += self._nbytes[value]
            holders[value] = _USER + _OURS if self._keeps[value] else _USER
        self.live = live
        if live + simulator.temporaries[number] > self.peak:
            self.peak = live + simulator.temporaries[number]
            if self._look is not None:
                self._look(number, self.peak, self, None)

    def holds(self, value: int) -> bool:
        """Whether anybody but a node of the backward pass holds a value."""
        return bool(self.holders[value])

    def used(self, value: int) -> bool:
        """Whether user code does, or a replay that passes by."""
        return self.holders[value] != _OURS

    def orphans(self) -> list[int]:
        """The values of which only nodes of the backward pass still hold a storage, once for each storage."""
        pending = {id(hands): hands for group in self._handed.values() for hands in group}
        return [hands.value for hands in pending.values() if hands.orphan]

    def replay(self, target: int, ops: Sequence[int], retained: frozenset[int]) -> None:
        """Ops are repeated for a value."""
        nbytes, holders, sources = self._nbytes, self.holders, self._simulator.sources
        uses: dict[int, int] = {}
        for number in ops:
            for source in sources[number]:
                if not holders[source]:
                    uses[source] = uses.get(source, 0) + 1
        live, peak = self.live, self.peak
        there: set[int] = set()
        for number in ops:
            op = self._simulator.graph.ops[number]
            for value in op.outputs:
                old = self._simulator.overwrites[value]
                if old is not None and old in there and uses[old] == 1 and old not in retained:
                    there.discard(old)  # the op may have the original
                    live -= nbytes[old]
                live += nbytes[value]
            if live + op.temporaries > peak:
                peak = live + op.temporaries
                if self._look is not None:
                    self._look(number, peak, self, [*(v for v in there if not holders[v]), *op.outputs])
            self.seconds += op.seconds
            for value in op.outputs:
                if (value in retained or value == target) and not holders[value]:
                    holders[value] = _OURS
                    if value in uses:
                        there.add(value)
                elif uses.get(value):
                    there.add(value)
                else:
                    live -= nbytes[value]
            for source in sources[number]:
                if source in uses:
                    uses[source] -= 1
                    if not uses[source] and source in there:
                        there.discard(source)
                        if not holders[source]:
                            live -= nbytes[source]
        self.live, self.peak = live, peak


def simulate(graph: Graph, plan: Plan) -> Timeline:
    """What is live at each op of a step, and what is recomputed, under `plan`."""
    timeline = Simulator(graph).run(plan)
    assert timeline is not None  # there is no limit
    return timeline


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


def ends(graph: Graph) -> list[int | None]:
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
    found: list[int | None] = []
    for each in graph.values:
        if each.made_by is None or each.dropped is None:
            found.append(None)
        else:
            found.append(each.dropped if each.evictable else max(each.dropped, wanted[each.number]))
    return found
