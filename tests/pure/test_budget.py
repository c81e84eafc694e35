"""Plans for a byte budget: they fit, a larger budget never costs time, and how far they are from the best there is."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paper import chain_step, steps, transformer_step, unhurried
from rekindle import BudgetInfeasible
from rekindle.graph import Graph, Plan, simulate, verify_plan
from rekindle.policy import Constraints, Planner, least_recompute
from rekindle.policy.exact import exact

FULL = os.environ.get("REKINDLE_TESTS") == "full"
only_in_full = pytest.mark.skipif(not FULL, reason="REKINDLE_TESTS=full runs everything")


def grid(planner: Planner, points: int = 10) -> list[int]:
    """Budgets from the floor to where nothing has to be recomputed."""
    floor, full = planner.floor(), planner.full
    return [floor + (full - floor) * place // (points - 1) for place in range(points)]


def timed(graph: Graph) -> Graph:
    """The step with no op that takes no time: `test_cuts.test_no_seconds` has one."""
    return replace(graph, ops=tuple(replace(op, seconds=op.seconds + 1) for op in graph.ops))


def random_chain(seed: int, length: int = 12) -> Graph:
    """A chain of unequal layers."""
    chance = random.Random(seed)
    sizes = [chance.randint(10, 100) for _ in range(length)]
    return chain_step(length, sizes, [chance.randint(1, 9) for _ in range(length)])


BLOCKS: dict[str, Callable[[], Graph]] = {
    "chain-8": lambda: chain_step(8, 100),
    "chain-12": lambda: chain_step(12, 100),
    "chain-16": lambda: chain_step(16, 100),
    "random-chain-0": lambda: random_chain(0),
    "random-chain-1": lambda: random_chain(1),
    "random-chain-2": lambda: random_chain(2),
    "transformer-1": lambda: transformer_step(1),
    "transformer-2": lambda: transformer_step(2),
    "transformer-3": lambda: transformer_step(3),
}


# -- it fits -----------------------------------------------------------------------------------------------------------


def test_ops_that_take_no_time() -> None:
    """Steps of which nothing can be said to be slow are planned like others, also beyond the smallest."""
    graph = chain_step(130, seconds=0.0)
    planner = Planner(graph)
    for budget in grid(planner, 4):
        plan = planner.plan(budget)
        assert simulate(graph, plan).peak <= budget
        assert plan.forecast is not None
        assert plan.forecast.seconds == plan.forecast.bound == 0


@settings(unhurried, max_examples=30)
@given(steps().map(timed), st.floats(0, 1))
def test_fits(graph: Graph, share: float) -> None:
    """From the floor on there is a plan, whose simulated peak and seconds are those it promises, within the budget."""
    planner = Planner(graph)
    floor, full = planner.floor(), planner.full
    budget = floor + int(share * (full - floor))
    plan = verify_plan(graph, planner.plan(budget))
    timeline = simulate(graph, plan)
    assert plan.forecast is not None
    assert timeline.peak <= budget == plan.forecast.budget
    assert (timeline.peak, timeline.seconds) == (plan.forecast.peak, plan.forecast.seconds)


@settings(unhurried, max_examples=30)
@given(steps().map(timed))
def test_all_that_is_needed_costs_nothing(graph: Graph) -> None:
    """With room for all, what can be kept is, and nothing that was not written over is recomputed."""
    planner = Planner(graph)
    plan = planner.plan(planner.full)
    wanted = {demand.value for demand in graph.demands if graph.values[demand.value].evictable}
    assert plan.kept >= {value for value in wanted if graph.values[value].overwritten is None}
    assert plan.forecast is not None
    assert plan.forecast.seconds == plan.forecast.bound == plan.forecast.gap == 0


@settings(unhurried, max_examples=30)
@given(steps().map(timed))
def test_every_turn_is_of_use(graph: Graph) -> None:
    """What is held is used later, and let go of once, after the last use of it; before it is held, what a demand alone
    is made for goes when that is met; nothing else does."""
    planner = Planner(graph)
    for budget in grid(planner, 4):
        plan = planner.plan(budget)
        if not plan.turns:
            continue
        replays = simulate(graph, plan).replays
        dropped: dict[int, list[int]] = {}
        for position, turn in enumerate(plan.turns):
            assert len(set(turn.dropped)) == len(turn.dropped)
            for value in turn.dropped:
                dropped.setdefault(value, []).append(position)
        made = [{value for number in ops for value in graph.ops[number].outputs} for ops in replays]
        for position, turn in enumerate(plan.turns):
            assert turn.retained <= made[position]
            for value in turn.retained:
                assert position < dropped[value][-1]
        for value in plan.kept:
            assert len(dropped[value]) == 1
        for value, positions in dropped.items():
            for position in positions:
                read = {v for number in replays[position] for v in graph.ops[number].inputs} - made[position]
                assert value == graph.demands[position].value or value in read
            for position in positions[:-1]:
                assert value == graph.demands[position].value
                assert value in made[position]
                assert value not in plan.turns[position].retained


@pytest.mark.parametrize(
    "name",
    [
        "transformer-1",
        "transformer-3",
        "chain-8",
        "random-chain-0",
    ],
)
def test_below_the_floor(name: str) -> None:
    """Where no plan is found, that is said with both figures; at the floor there is one, and it needs just that."""
    planner = Planner(BLOCKS[name]())
    floor = planner.floor()
    forecast = planner.plan(floor).forecast
    assert forecast is not None
    assert forecast.peak == floor
    with pytest.raises(BudgetInfeasible, match=rf"budget is {floor - 1} B, but the step needs {floor} B at least"):
        planner.plan(floor - 1)


# -- monotone ----------------------------------------------------------------------------------------------------------


@settings(unhurried, max_examples=30)
@given(steps().map(timed))
def test_monotone(graph: Graph) -> None:
    """A larger budget never recomputes more seconds."""
    planner = Planner(graph)
    seconds = [simulate(graph, planner.plan(budget)).seconds for budget in grid(planner)]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("name", ["chain-12", "random-chain-1", "transformer-2"])
def test_monotone_over_every_budget(name: str) -> None:
    """Nor do blocks, at any byte; and what a planner said before does not change what it says next."""
    graph = BLOCKS[name]()
    planner = Planner(graph)
    budgets = sorted({*grid(planner, 40), *(budget + 1 for budget in grid(planner, 40))})
    random.Random(0).shuffle(budgets)
    plans = {budget: planner.plan(budget) for budget in budgets}
    seconds = [simulate(graph, plans[budget]).seconds for budget in sorted(plans)]
    assert seconds == sorted(seconds, reverse=True)
    for budget in sorted(plans)[::20]:
        assert least_recompute(graph, budget) == plans[budget]


# -- near the best -----------------------------------------------------------------------------------------------------


@settings(unhurried, max_examples=30)
@given(steps(max_ops=5).map(timed), st.floats(0, 1))
def test_bound_best_ours(graph: Graph, share: float) -> None:
    """Whatever the step, the bound is at most the proven best, and that is at most what is planned."""
    planner = Planner(graph)
    budget = planner.floor() + int(share * (planner.full - planner.floor()))
    forecast, best = planner.plan(budget).forecast, exact(graph, budget)
    assert forecast is not None
    assert best.proven
    assert forecast.bound <= best.seconds + 1e-6
    assert best.seconds <= forecast.seconds


@settings(unhurried, max_examples=30)
@given(steps(max_ops=5).map(timed))
def test_infeasible_is_never_said_above_the_floor(graph: Graph) -> None:
    """The floor that is told is never below the true one: what is planned there fits by the judge's word as well."""
    planner = Planner(graph)
    assert exact(graph, planner.floor()).plan is not None


@cache
def compared(name: str) -> list[tuple[int, float, float, float]]:
    """Budgets from a fifth to four fifths of the way from the floor, each with the bound, the proven best, and ours."""
    graph = BLOCKS[name]()
    planner = Planner(graph)
    found = []
    for budget in grid(planner, 6)[1:-1]:
        best, forecast = exact(graph, budget), planner.plan(budget).forecast
        assert best.proven
        assert forecast is not None
        found.append((budget, forecast.bound, best.seconds, forecast.seconds))
    return found


@pytest.mark.parametrize("name", BLOCKS)
def test_bound_and_best_of_blocks(name: str) -> None:
    """The bound is below the proven best, which is below ours, on blocks too."""
    for budget, bound, best, ours in compared(name):
        assert 0 < bound <= best + 1e-6 <= ours + 2e-6, budget


def test_near_the_best() -> None:
    """At most 1.05 times the proven best in nine of ten cases, and never above 1.15."""
    ratios = sorted(ours / best for name in BLOCKS for _, _, best, ours in compared(name))
    assert ratios[-1] <= 1.15
    assert ratios[math.ceil(len(ratios) * 0.9) - 1] <= 1.05


def test_floor_of_a_chain_is_the_true_floor() -> None:
    """Below the floor that is told, no plan fits: three values, of which one may be a gradient."""
    graph = chain_step(8, 100)
    with pytest.raises(BudgetInfeasible):
        exact(graph, Planner(graph).floor() - 1)


def test_floor_of_two_results() -> None:
    """The floor that is told is never above what a plan was found for."""
    graph = two_results()
    planner = Planner(graph)
    assert planner.plan(planner.full).forecast is not None
    assert planner.floor() <= planner.full


def two_results() -> Graph:
    """One op makes two values; one is held by user code, the other is kept, or made a second time beside both."""
    graph = chain_step(1, 12)
    first, second = graph.ops
    one, gradient = graph.values
    held = replace(one, number=1, saved_in=(), dropped=2)
    return replace(
        graph,
        ops=(replace(first, outputs=(0, 1)), replace(second, outputs=(2,))),
        values=(one, held, replace(gradient, number=2, nbytes=0)),
    )


# -- long chains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", [50, 100, *(pytest.param(n, marks=[pytest.mark.slow, only_in_full]) for n in (200, 400, 800))]
)
def test_long_chains(length: int) -> None:
    """The floor is three layers' bytes, whatever the length; with twice the logarithm of the length, layers are
    repeated so many times at most; with the square root, as of segments, less than twice."""
    graph = chain_step(length, 100)
    planner = Planner(graph)
    assert planner.full == 100 * (length + 1)
    assert planner.floor() == 300
    logarithm, root = math.ceil(math.log2(length)), math.isqrt(length)
    low, middle = (simulate(graph, planner.plan(100 * layers)) for layers in (2 * logarithm, 2 * root + 3))
    assert low.seconds <= length * logarithm / 2
    assert middle.seconds <= length


# -- constraints -------------------------------------------------------------------------------------------------------


@st.composite
def constrained(draw: st.DrawFn) -> tuple[Graph, Constraints]:
    """A step, and what its plans have to obey."""
    graph = timed(draw(steps()))
    evictable = sorted({v for d in graph.demands for v in [d.value] if graph.values[v].evictable})
    some = st.sets(st.sampled_from(evictable), max_size=2) if evictable else st.just(set[int]())
    keep = {value for value in draw(some) if graph.values[value].overwritten is None}
    recompute = draw(some) - keep
    cuts = st.lists(st.integers(0, len(graph.forward) - 1), max_size=1) if graph.forward else st.just([])
    return graph, Constraints(frozenset(keep), frozenset(recompute), tuple(draw(cuts)))


@settings(unhurried, max_examples=50)
@given(constrained(), st.floats(0, 1))
def test_constraints(drawn: tuple[Graph, Constraints], share: float) -> None:
    """What must be kept is, what must be recomputed is not, at every budget."""
    graph, constraints = drawn
    planner = Planner(graph, constraints)
    budget = planner.floor() + int(share * max(0, planner.full - planner.floor()))
    plan = planner.plan(max(budget, planner.full) if share == 1 else budget)
    assert not plan.kept & constraints.must_recompute
    assert plan.kept >= constraints.must_keep
    assert simulate(graph, plan).peak <= max(budget, planner.full)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_boundaries(share: float) -> None:
    """No recomputation of what is after a boundary repeats an op before it."""
    graph = transformer_step(3)
    boundaries = (11, 21)  # between blocks
    planner = Planner(graph, Constraints(boundaries=boundaries))
    plan = planner.plan(planner.floor() + int(share * (planner.full - planner.floor())))
    timeline = simulate(graph, plan)
    assert timeline.seconds > 0
    for demand, replay in zip(graph.demands, timeline.replays, strict=True):
        start = max((cut for cut in boundaries if cut <= demand.value), default=0)
        assert all(number >= start for number in replay)


def test_deterministic() -> None:
    """The same graph and budget, the same plan; also in a planner that has planned before."""
    graph = transformer_step(2)
    budget = grid(Planner(graph))[4]
    planner = Planner(graph)
    for other in grid(planner)[::-1]:
        planner.plan(other)
    assert planner.plan(budget) == Planner(graph).plan(budget) == least_recompute(graph, budget)


def test_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Planning leaves what the user's program prints alone: solvers that talk are not let to."""
    for graph in (transformer_step(3), random_chain(1)):
        planner = Planner(graph)
        for budget in grid(planner, 30):
            planner.plan(budget)
    assert capfd.readouterr() == ("", "")


def test_no_step_at_all() -> None:
    """A step in which nothing is asked for needs no recomputation."""
    graph = replace(chain_step(3), demands=())
    planner = Planner(graph)
    plan = planner.plan(planner.full)
    assert plan.kept == frozenset()
    assert simulate(graph, plan) == simulate(graph, Plan(frozenset()))


def test_no_ops() -> None:
    """A graph without ops is no special case."""
    assert least_recompute(Graph((), ()), 0).kept == frozenset()
