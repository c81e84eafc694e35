"""The fullest moment of a step: as full as the timeline says, and told apart by what holds it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper import chain_step, steps, unhurried
from rekindle import BudgetInfeasible
from rekindle.graph import Graph, Plan, Share, fullest, simulate
from rekindle.policy import Planner


@unhurried
@given(steps(), st.data())
def test_as_full_as_the_timeline_says(graph: Graph, data: st.DataObject) -> None:
    """Whatever is kept, what is live at the fullest moment adds up to the peak of the timeline."""
    kept = data.draw(st.sets(st.sampled_from([v.number for v in graph.evictable]))) if graph.evictable else set()
    plan = Plan(frozenset(v for v in kept if graph.values[v].overwritten is None))
    assert fullest(graph, plan).nbytes == max(graph.standing, simulate(graph, plan).peak)


def test_what_holds_it() -> None:
    """All kept: at the first backward op what is kept is live, what its node has in hand, and its gradient."""
    graph = chain_step(4, nbytes=8)
    moment = fullest(graph, Plan(frozenset(range(4))))
    split = {share: nbytes for share, nbytes in moment.split.items() if nbytes}
    assert split == {Share.KEPT: 24, Share.IN_USE: 8, Share.BACKWARD: 8}
    assert (moment.op, moment.replayed) == (4, False)


def test_recomputed_bytes_are_told_apart() -> None:
    """Nothing kept: what a replay has brought back is counted as recomputed."""
    split = fullest(chain_step(4, nbytes=8), Plan(frozenset())).split
    assert split[Share.KEPT] == 0
    assert split[Share.RECOMPUTED] > 0


def test_the_largest_come_first_and_alike_together() -> None:
    """Values of one size, shape and module are one entry, before others that are smaller in all."""
    moment = fullest(chain_step(4, nbytes=[8, 8, 8, 20]), Plan(frozenset(range(4))))
    assert [(value.nbytes, count) for value, count in moment.largest(2)] == [(8, 3), (20, 1)]


def test_an_empty_step() -> None:
    """A step without ops is as full as what stands."""
    assert fullest(Graph((), (), standing=7), Plan(frozenset())).nbytes == 7


def test_infeasible_says_what_holds_the_floor() -> None:
    """The message names what was asked for, the floor, what holds it with shape and place, and a budget that works."""
    graph = chain_step(12, [1 << 20, 1 << 10, 3 << 20] * 4)
    planner = Planner(graph)
    with pytest.raises(BudgetInfeasible) as caught:
        planner.plan(1 << 20)
    message = str(caught.value)
    assert message.startswith("memory_budget is 1.0 MiB, but the step needs ")
    assert "The largest that are live then:\n  " in message
    assert 1 <= len(re.findall(r"\n  .*[KM]iB of aten\.layer", message)) <= 5
    named = re.search(r'Try memory_budget="(\d+)([KM])iB"', message)
    assert named is not None
    budget = int(named[1]) << (20 if named[2] == "M" else 10)
    forecast = planner.plan(budget).forecast
    assert forecast is not None
    assert forecast.peak <= budget


def test_parameters_alone_may_be_too_much() -> None:
    """Where most of the floor stands before the step begins, no smaller batch is recommended."""
    graph = chain_step(4, [8, 1, 8, 1])
    with pytest.raises(BudgetInfeasible, match="a smaller model"):
        Planner(Graph(graph.ops, graph.values, demands=graph.demands, standing=1 << 20)).plan(1 << 10)
    with pytest.raises(BudgetInfeasible, match="a smaller batch"):
        Planner(graph).plan(1)
