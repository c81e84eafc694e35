"""The judge, judged: integer programming against trying everything, and against what is known of chains."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings

from brute import frontier, turns_to_try
from paper import build, chain_step, steps, unhurried
from rekindle import BudgetInfeasible
from rekindle.graph import Demand, Graph, Op, Plan, Value
from rekindle.graph.timeline import ends, simulate
from rekindle.policy.exact import exact


def check_all(graph: Graph) -> None:
    """At each budget at which the best plan changes, the program finds what trying everything finds, and proves it."""
    frontier = brute_force(graph)
    for budget, seconds in frontier:
        found = exact(graph, budget)
        assert found.proven
        assert found.plan is not None
        timeline = simulate(graph, found.plan)
        assert timeline.peak <= budget
        assert timeline.seconds == found.seconds == pytest.approx(found.bound) == pytest.approx(seconds)
    with pytest.raises(BudgetInfeasible):
        exact(graph, frontier[0][0] - 1)


@settings(unhurried, max_examples=150)
@given(steps(max_ops=5))
def test_as_good_as_trying_everything(graph: Graph) -> None:
    """No plan within the budget recomputes less, and where there is none, that is said: whatever the step does."""
    check_all(graph)


@settings(unhurried, max_examples=60)
@given(steps(max_ops=4).filter(lambda graph: turns_to_try(graph) <= 12))
def test_as_good_as_every_plan_on_the_simulator(graph: Graph) -> None:
    """The same by another way to try everything: each legal plan, played by the simulator."""
    found = frontier(graph)
    assert found == brute_force(graph)
    for budget, seconds in found:
        assert exact(graph, budget).seconds == pytest.approx(seconds)


@pytest.mark.parametrize("unit", [1, 512, 10**9 + 7])
def test_chains_as_good_as_trying_everything(unit: int) -> None:
    """Down to the lowest budgets, where values are recomputed again and again; bytes count each, of billions, too."""
    sizes = [7 * unit, 2 * unit + 1, 5 * unit, 3 * unit, 4 * unit - 1, 6 * unit]
    check_all(chain_step(6, sizes, [3, 1, 4, 1, 5, 9]))


def test_double_backward() -> None:
    """Ops of a backward pass that is itself recorded are recomputed like any other, with the demands between them."""
    reads = [(), (0,), (1,), (1, 2), (0, 3), (4,), (4,), (3, 6), (0, 7)]
    ops = tuple(
        Op(n, "aten.op", reads[n], (n,), seconds=1 + n % 3, backward=n > 5, temporaries=9 if n == 5 else 0)
        for n in range(9)
    )
    sizes, dropped = [5, 3, 4, 6, 2, 1, 1, 1, 1], [2, 3, 4, 5, 6, 6, 8, 9, None]
    values = tuple(Value(n, sizes[n], n, evictable=n < 6, dropped=dropped[n]) for n in range(9))
    demands = tuple(Demand(value, op, op + 1) for value, op in ((1, 3), (0, 4), (4, 6), (3, 7), (0, 8)))
    graph = Graph(ops, values, demands=demands)
    check_all(graph)
    assert len(brute_force(graph)) > 3


def test_what_is_retained_counts_in_the_rest_of_the_replay() -> None:
    """Nothing can be kept beside op 3. Value 0 is asked for again after value 2: held while that is replayed, it stands
    beside value 1; else its op runs a third time."""
    ops = (
        Op(0, "aten.op", (), (0,), seconds=9),
        Op(1, "aten.op", (0,), (1,), seconds=1),
        Op(2, "aten.op", (1,), (2,), seconds=1),
        Op(3, "aten.op", (), (3,), temporaries=14),
        Op(4, "aten.op", (2,), (4,), backward=True),
        Op(5, "aten.op", (0,), (5,), backward=True),
    )
    sizes, ends = [4, 10, 4, 0, 0, 0], [2, 3, 3, 4, 5, 6]
    values = tuple(Value(n, sizes[n], n, evictable=n < 3, dropped=ends[n]) for n in range(6))
    graph = Graph(ops, values, demands=(Demand(2, 4, 5), Demand(0, 5, 6)))
    check_all(graph)
    assert brute_force(graph) == [(14, 9 + 1 + 1 + 9), (18, 1 + 1), (22, 0)]


def test_an_in_place_op_takes_the_original() -> None:
    """Replayed, too, an op that writes over a value needs no room for a copy of it."""
    ops = (
        Op(0, "aten.op", (), (0,), seconds=1),
        Op(1, "aten.op_", (0,), (1,), seconds=1),
        Op(2, "aten.op", (), (2,), temporaries=9),
        Op(3, "aten.op", (1,), (3,), backward=True),
    )
    values = (
        Value(0, 8, 0, dropped=2, overwritten=1),
        Value(1, 8, 1, dropped=2, overwrites=0),
        Value(2, 0, 2),
        Value(3, 0, 3, evictable=False),
    )
    graph = Graph(ops, values, demands=(Demand(1, 3, 4),))
    check_all(graph)
    assert brute_force(graph) == [(9, 1 + 1), (17, 0)]


def test_what_is_about_to_be_overwritten_is_still_there() -> None:
    """What user code holds is there for a replay until the op that writes over it has run."""
    ops = (
        Op(0, "aten.op", (), (0,), seconds=9),
        Op(1, "aten.op", (0,), (1,), seconds=1),
        Op(2, "aten.op", (1,), (2,), temporaries=8),
        Op(3, "aten.op_", (0, 1), (3,), backward=True),
    )
    values = (
        Value(0, 4, 0, overwritten=3),
        Value(1, 4, 1, dropped=2),
        Value(2, 0, 2),
        Value(3, 4, 3, evictable=False, overwrites=0),
    )
    graph = Graph(ops, values, demands=(Demand(1, 3, 4),))
    check_all(graph)
    assert brute_force(graph) == [(12, 1), (16, 0)]


@pytest.mark.parametrize(("length", "share"), [(30, 0.9), (30, 0.7), (20, 0.5)])
def test_longer_chains(length: int, share: float) -> None:
    """A chain of 30 equal layers is solved: each evicted value saves its bytes and costs its op once, for the values
    between two checkpoints are recomputed together."""
    graph = chain_step(length, 100)
    full = simulate(graph, Plan(frozenset(range(length)))).peak
    found = exact(graph, int(share * full))
    assert found.proven
    assert found.seconds == math.ceil((full - int(share * full)) / 100)


def test_everything_fits() -> None:
    """Where there is room for all, nothing is recomputed."""
    assert exact(chain_step(8), 10**9).seconds == 0


def test_a_step_without_demands() -> None:
    """A forward pass alone, in which nothing is asked for, is no special case."""
    graph = build(((0,), (1,)), ((1,), (2,)))
    found = exact(graph, 16)
    assert (found.seconds, found.bound, found.proven) == (0, 0, True)
    with pytest.raises(BudgetInfeasible, match=r"15 B \(15 bytes\): 16 B \(16 bytes\) are there whatever"):
        exact(graph, 15)


@pytest.mark.parametrize("time_limit", [0.0, 0.2])
def test_time_runs_out(time_limit: float) -> None:
    """What was found until then is returned and not called proven; the truth lies between the bound and it."""
    graph = chain_step(40, [20 + 37 * i % 180 for i in range(40)], [1 + 7 * i % 20 for i in range(40)])
    full = simulate(graph, Plan(frozenset(range(40)))).peak
    found = exact(graph, full * 3 // 10, time_limit=time_limit)
    assert not found.proven
    assert 0 <= found.bound <= found.seconds
    if found.plan is None:
        assert found.seconds == math.inf
    else:
        assert simulate(graph, found.plan).peak <= full * 3 // 10


# -- trying everything -------------------------------------------------------------------------------------------------

Held = frozenset[int]
Costs = set[tuple[float, int]]  # of different ways to come to hold the same: seconds and peak, none worse in both


def brute_force(graph: Graph) -> list[tuple[int, float]]:
    """Every peak for which there is a plan that no other beats in both, with its seconds; the lowest peak first.

    By trying, at each op and demand, to hold any of what could be held; its own bookkeeping, by sets.
    """
    states: dict[Held, Costs] = {frozenset(): {(0.0, 0)}}
    for number in range(len(graph.ops) + 1):
        for position, demand in enumerate(graph.demands):
            if demand.before == number and graph.values[demand.value].evictable:
                states = _asked(graph, position, states)
        if number < len(graph.ops):
            states = _run(graph, number, states)
    found: list[tuple[int, float]] = []
    for seconds, peak in sorted(set().union(*states.values())):
        if not found or peak < found[-1][0]:
            found.append((peak, seconds))
    return found[::-1]


def _subsets(values: Iterable[int]) -> Iterator[Held]:
    values = sorted(values)
    return map(
        frozenset, itertools.chain.from_iterable(itertools.combinations(values, r) for r in range(len(values) + 1))
    )


def _add(states: dict[Held, Costs], held: Held, costs: Costs, seconds: float, high: int) -> None:
    best, lowest = set[tuple[float, int]](), math.inf
    for cost in sorted(states.get(held, set()) | {(s + seconds, max(p, high)) for s, p in costs}):
        if cost[1] < lowest:
            best.add(cost)
            lowest = cost[1]
    states[held] = best


def _user_holds(graph: Graph, number: int, *, running: bool) -> set[int]:
    """What user code holds when something is asked for before an op, or while that runs."""
    holds: set[int] = set()
    for op in graph.ops[: number + running]:
        for value in op.outputs:
            holds.add(value)
            holds.discard(-1 if (old := graph.values[value].overwrites) is None else old)
    last = ends(graph)
    return {v for v in holds if (end := last[v]) is None or end > number}


def _node_holds(demands: Iterable[Demand], graph: Graph, number: int) -> set[int]:
    return {d.value for d in demands if d.before <= number < d.until and graph.values[d.value].evictable}


def _bytes(graph: Graph, values: Iterable[int]) -> int:
    return sum(graph.values[value].nbytes for value in values)


def _run(graph: Graph, number: int, states: dict[Held, Costs]) -> dict[Held, Costs]:
    op, after = graph.ops[number], dict[Held, Costs]()
    others = _user_holds(graph, number, running=True) | _node_holds(graph.demands, graph, number)
    wanted = _wanted(graph, [d for d in graph.demands if d.before > number])
    gone = {graph.values[value].overwrites for value in op.outputs}
    for held, costs in states.items():
        for more in _subsets(v for v in op.outputs if graph.values[v].evictable and v in wanted):
            new = (held - gone) | more
            _add(after, new, costs, 0.0, graph.standing + op.temporaries + _bytes(graph, new | others))
    return after


def _asked(graph: Graph, position: int, states: dict[Held, Costs]) -> dict[Held, Costs]:
    demand, after = graph.demands[position], dict[Held, Costs]()
    user = _user_holds(graph, demand.before, running=False)
    nodes = _node_holds(graph.demands[:position], graph, demand.before)
    wanted = _wanted(graph, graph.demands[position + 1 :])
    for held, costs in states.items():
        ops = _missing(graph, demand.value, held | user)
        if ops and demand.value in nodes:
            continue  # it would be there twice, and be held twice
        made = {v for number in ops for v in graph.ops[number].outputs} - held - user
        seconds = sum(graph.ops[number].seconds for number in ops)
        for retained in _subsets(v for v in made & wanted - nodes if graph.values[v].evictable):
            live = graph.standing + _bytes(graph, held | user | nodes)
            high = live + _replay_peak(graph, ops, demand.value, retained, held | user)
            for kept in _subsets(held):
                _add(after, kept | retained, costs, seconds, high)
    return after


def _wanted(graph: Graph, demands: Iterable[Demand]) -> set[int]:
    """What may still be of use for these demands."""
    wanted = {demand.value for demand in demands}
    for op in reversed(graph.ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
    return wanted


def _missing(graph: Graph, target: int, there: Iterable[int]) -> list[int]:
    lacking = {target}.difference(there)
    for op in reversed(graph.ops):
        if lacking.intersection(op.outputs):
            lacking |= {v for v in op.inputs if graph.values[v].evictable}.difference(there)
    return sorted({graph.values[v].made_by for v in lacking})  # type: ignore[type-var]


def _replay_peak(graph: Graph, ops: list[int], target: int, retained: Held, there: Iterable[int]) -> int:
    """The most bytes beside what is there already."""
    high, here = 0, set[int]()
    for place, number in enumerate(ops):
        op, rest = graph.ops[number], [graph.ops[later] for later in ops[place + 1 :]]
        read_later = {v for later in rest for v in later.inputs}.difference(there)
        taken = {graph.values[v].overwrites for v in op.outputs} - read_later - retained
        high = max(high, _bytes(graph, here - taken) + _bytes(graph, op.outputs) + op.temporaries)
        here = {v for v in here.union(op.outputs) if v in read_later | retained or v == target}.difference(there)
    return high
