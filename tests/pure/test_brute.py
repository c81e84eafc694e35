"""Every plan of tiny steps is tried out, and the planner's own is near the best of them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from brute import Frontier, best_of, best_within, frontier, plans, turns_to_try
from paper import chain_step, steps, unhurried
from rekindle import BudgetInfeasible
from rekindle.graph import Call, Demand, Graph, Op, Value, simulate, verify_plan
from rekindle.policy import Planner

FULL = os.environ.get("REKINDLE_TESTS") == "full"
STATED = 5.0
"""Times the fewest seconds that any plan takes: no plan for a tiny step takes more. Chains and blocks of usual sizes
are judged more strictly in `test_budget.test_near_the_best`."""
STATED_FLOOR = 1.4
"""Times the true floor: the floor that is told is not above."""
MOST_TURNS = 12  # what can be tried in a moment
fuzzed = settings(unhurried, max_examples=2000 if FULL else 40, derandomize=not FULL, database=None)


def tiny() -> st.SearchStrategy[Graph]:
    """A step of which every plan can be tried."""
    return steps(max_ops=4).map(_timed).filter(lambda graph: turns_to_try(graph) <= MOST_TURNS)


def _timed(graph: Graph) -> Graph:
    """With no op that takes no time, so that ratios mean something."""
    return replace(graph, ops=tuple(replace(op, seconds=op.seconds + 1) for op in graph.ops))


def test_all_plans_of_a_chain() -> None:
    """Two layers: each kept or not, and dropped as soon as it was asked for or held for no reason."""
    found = list(plans(chain_step(2)))
    assert len(found) == len(set(found))
    assert {plan.kept for plan in found} == {frozenset(kept) for kept in ((), (0,), (1,), (0, 1))}
    assert frontier(chain_step(2)) == [(24, 0)]


def test_best_of() -> None:
    """Only what nothing beats in both is left, the lowest peak first."""
    assert best_of([(3, 1.0), (1, 5.0), (2, 5.0), (3, 2.0), (1, 6.0), (4, 1.0)]) == [(1, 5.0), (3, 1.0)]
    assert best_within([(1, 5.0), (3, 1.0)], 2) == 5.0
    assert best_within([(1, 5.0), (3, 1.0)], 0) == float("inf")


@fuzzed
@given(tiny())
def test_every_plan_is_near_the_best(graph: Graph) -> None:
    """At every budget at which the best plan changes: legal, within the budget, never better than the best there is,
    monotone, and worse by no more than stated."""
    found, planner = frontier(graph), Planner(graph)
    floor, least = planner.floor(), found[0][0]
    assert least <= floor <= STATED_FLOOR * least
    before = float("inf")
    for budget in budgets(found, floor):
        plan = verify_plan(graph, planner.plan(budget))
        timeline, best = simulate(graph, plan), best_within(found, budget)
        assert timeline.peak <= budget
        assert best <= timeline.seconds <= min(before, STATED * best)
        before = timeline.seconds


def test_floor_of_what_is_asked_for_twice() -> None:
    """A value that is asked for before and after another op takes room goes in between: found by the search above, with
    a floor of two bytes where one is enough."""
    values = tuple(
        Value(number, int(number == 2), number, evictable=number == 2, dropped=end)
        for number, end in enumerate((3, 2, 3, 5, 6, 6))
    )
    inputs = ((), (0,), (0,), (2,), (1, 3), (2, 4))
    ops = tuple(
        Op(number, "aten.op", read, (number,), 0, 1.0, backward=number > 2, temporaries=int(number == 4))
        for number, read in enumerate(inputs)
    )
    demands = (Demand(2, 3, 4), Demand(1, 4, 5), Demand(2, 5, 6))
    graph = Graph(ops, values, (Call(0, None, "", ()),), demands)
    assert frontier(graph)[0][0] == 1
    assert Planner(graph).floor() == 1


@fuzzed
@given(tiny())
def test_what_is_refused_is_below_the_floor(graph: Graph) -> None:
    """Where no plan fits, the planner says so."""
    assume(frontier(graph)[0][0] > 0)
    with pytest.raises(BudgetInfeasible):
        Planner(graph).plan(frontier(graph)[0][0] - 1)


def budgets(found: Frontier, floor: int) -> list[int]:
    """The floor, and above it where the best plan changes, and a byte below that."""
    return sorted({floor, *(budget for peak, _ in found for budget in (peak - 1, peak) if budget > floor)})
