"""From what is kept to a whole plan: what each replay holds on to, and when everything goes.

Problem: a set of checkpoints does not say yet what of a replay is held for later, nor until when.
Source: what is wanted later in the same leaf of the frame is held, and what the frame says, until it is used for the
last time; a first pass over the step finds out when that is.
Regime: linear in what is replayed.
Known gaps: a value is held from one replay on without a gap; it never goes to be replayed once more.
"""

from __future__ import annotations

from collections.abc import Collection, Container

from rekindle.graph import Plan, Turn
from rekindle.graph.timeline import Simulator
from rekindle.policy.frames import Frame, Sites


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
    last_use: dict[int, int] = {}
    made: dict[int, list[int]] = {}
    reached = list(range(len(frame.cuts)))  # leaves yet to be reached by a replay; the forward pass reached the last

    def turn(position: int, ops: list[int]) -> Turn:
        target = graph.demands[position].value
        last_use[target] = position
        if not ops:
            return Turn()
        maker = made_by[target]
        assert maker is not None
        leaf = frame.leaf(maker)
        held: set[int] = set()
        while reached and reached[-1] >= leaf:  # some leaves needed no replay: what they asked for crossed a cut
            for cut in frame.held[reached.pop()]:
                held |= sites.crossing[cut] if cut <= maker else frozenset()
        fresh = {value for number in ops for value in graph.ops[number].outputs}
        for number in ops:
            for source in simulator.sources[number]:
                if source not in fresh:
                    last_use[source] = position
            if frame.leaf(number) == leaf:
                outputs = graph.ops[number].outputs
                if holds is None:
                    held.update(v for v in outputs if last_demand.get(v, -1) > position)
                else:
                    held.update(v for v in outputs if v in holds)
        made[position] = [v for v in (fresh & held) - barred if v != target]
        return Turn(frozenset(made[position]))

    simulator.play(kept, turn)
    dropped: dict[int, list[int]] = {}
    for value, position in last_use.items():
        dropped.setdefault(position, []).append(value)
    turns = tuple(
        Turn(
            frozenset(v for v in made.get(position, ()) if last_use.get(v, -1) > position),
            tuple(sorted(dropped.get(position, ()))),
        )
        for position in range(len(graph.demands))
    )
    return Plan(frozenset(value for value in kept if value in last_use), turns)
