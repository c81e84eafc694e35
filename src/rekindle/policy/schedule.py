"""From what is held to a whole plan: what each replay holds on to, and when everything goes.

Problem: what is kept, and what is held of a replay for later, does not say yet until when.
Source: a first pass over the step finds out what is replayed and when everything is used for the last time; then it
goes. What is held is said by a frame, leaf by leaf (`schedule`), or for each value by itself (`hold`).
Regime: linear in what is replayed.
Known gaps: a value is held from one demand on without a gap. Before that it may be made for as many demands as ask for
it, and goes each time.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from typing import TypeAlias

from rekindle.graph import Graph, Plan, Turn
from rekindle.graph.timeline import Simulator
from rekindle.policy.frames import Frame, Sites

FORWARD = -1
NEVER = 1 << 62

Since: TypeAlias = Mapping[int, int]
"""From when on each value is held until it is used for the last time: from `FORWARD`, when the forward pass makes it,
or from the demand at that position, if its replay makes it. What is not in it never is: it goes as soon as the demand
that it was made for is met."""


class _FirstPass:
    """What a first pass over a step finds out.

    Attributes:
        uses: for each value, the positions of the demands that it is made for, or whose replays read it.
    """

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._made: dict[int, frozenset[int]] = {}
        self._passing: set[int] = set()
        self.uses: dict[int, list[int]] = {}

    def use(self, position: int, ops: list[int]) -> set[int]:
        """Note what a replay uses, or what is handed over without one; returns what it makes."""
        outputs, sources = self._simulator.outputs, self._simulator.sources
        fresh = {value for number in ops for value in outputs[number]}
        read = {source for number in ops for source in sources[number] if source not in fresh}
        for value in (self._simulator.graph.demands[position].value, *read):
            self.uses.setdefault(value, []).append(position)
        return fresh

    def hold(self, position: int, values: Iterable[int]) -> Turn:
        """Have a replay hold what it makes until its last use."""
        self._made[position] = frozenset(values)
        return Turn(self._made[position])

    def pass_on(self, position: int) -> Turn:
        """Have what a demand asks for go as soon as it is met."""
        self._passing.add(position)
        return Turn(self._made[position], (self._simulator.graph.demands[position].value,))

    def plan(self, kept: Collection[int]) -> Plan:
        """The plan that lets go of everything when it was used last, or passed on."""
        last = {value: positions[-1] for value, positions in self.uses.items()}
        demands = self._simulator.graph.demands
        dropped = {position: {demands[position].value} for position in self._passing}
        for value, position in last.items():
            dropped.setdefault(position, set()).add(value)
        turns = tuple(
            Turn(
                frozenset(v for v in self._made.get(position, ()) if last.get(v, -1) > position),
                tuple(sorted(dropped.get(position, ()))),
            )
            for position in range(len(demands))
        )
        return Plan(frozenset(value for value in kept if value in last), turns)


def schedule(
    simulator: Simulator, sites: Sites, frame: Frame, kept: Collection[int], holds: Container[int] | None
) -> Plan:
    """A plan that keeps `kept`, and recomputes the rest leaf by leaf of `frame`.

    Of what a replay makes in its leaf, `holds` is held as long as it is needed, and anything else is replayed again
    each time; None stands for all that the backward pass asks for later.
    """
    graph, made_by = simulator.graph, simulator.made_by
    last_demand = {demand.value: position for position, demand in enumerate(graph.demands)}
    barred = {value.number for value in graph.values if value.overwritten is not None}
    first = _FirstPass(simulator)
    reached = list(range(len(frame.cuts)))  # leaves yet to be reached by a replay; the forward pass reached the last

    def turn(position: int, ops: list[int]) -> Turn:
        target = graph.demands[position].value
        fresh = first.use(position, ops)
        if not ops:
            return Turn()
        maker = made_by[target]
        assert maker is not None
        leaf = frame.leaf(maker)
        held: set[int] = set()
        while reached and reached[-1] >= leaf:  # some leaves needed no replay: what they asked for crossed a cut
            for cut in frame.held[reached.pop()]:
                held |= sites.crossing[cut] if cut <= maker else frozenset()
        for number in ops:
            if frame.leaf(number) == leaf:
                outputs = graph.ops[number].outputs
                if holds is None:
                    held.update(v for v in outputs if last_demand.get(v, -1) > position)
                else:
                    held.update(v for v in outputs if v in holds)
        return first.hold(position, (v for v in (fresh & held) - barred if v != target))

    simulator.play(kept, turn)
    return first.plan(kept)


def hold(simulator: Simulator, since: Since) -> tuple[Plan, dict[int, list[int]]]:
    """A plan that holds each value from when `since` says, and for each value the demands that use it."""
    first = _FirstPass(simulator)
    kept = [value for value, start in since.items() if start == FORWARD]

    def turn(position: int, ops: list[int]) -> Turn:
        fresh = first.use(position, ops)
        if not ops:
            return Turn()
        held = first.hold(position, (v for v in fresh if since.get(v, NEVER) <= position))
        target = simulator.graph.demands[position].value
        return held if since.get(target, NEVER) <= position else first.pass_on(position)

    simulator.play(kept, turn)
    return first.plan(kept), first.uses


def since_of(graph: Graph, plan: Plan) -> dict[int, int]:
    """From when on a plan holds each value."""
    since = dict.fromkeys(plan.kept, FORWARD)
    for position, (demand, turn) in enumerate(zip(graph.demands, plan.turns, strict=False)):
        for value in turn.retained:
            since.setdefault(value, position)
        if demand.value not in turn.dropped:
            since.setdefault(demand.value, position)
    return since


def held_once_asked_for(graph: Graph, since: Since) -> dict[int, int]:
    """The same, with each value held from the first demand for it on at the latest."""
    first: dict[int, int] = {}
    for position, demand in enumerate(graph.demands):
        first.setdefault(demand.value, position)
    return {value: min(since.get(value, NEVER), first.get(value, NEVER)) for value in {**since, **first}}
