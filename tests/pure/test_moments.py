"""What several moments of a step need together, against every plan of tiny steps."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brute import best_within, frontier, turns_to_try
from paper import backwarded, build, chain_step, steps, transformer_step, unhurried
from rekindle.graph import Demand, Graph, Plan, simulate
from rekindle.graph.timeline import Simulator
from rekindle.policy import Planner
from rekindle.policy.exact import exact
from rekindle.policy.moments import Need, _Model, need_at
from rekindle.policy.schedule import hold

FULL = os.environ.get("REKINDLE_TESTS") == "full"
MOST_TURNS = 11  # what can be tried in a moment
fuzzed = settings(unhurried, max_examples=3000 if FULL else 60, derandomize=not FULL, database=None)


def need(graph: Graph, budget: int, *numbers: int) -> Need:
    """What a step needs at some ops."""
    simulator = Simulator(graph)
    barred = {value.number for value in graph.values if value.overwritten is not None}
    return need_at(simulator, numbers, budget, simulator.bare(), barred)


@st.composite
def tiny(draw: st.DrawFn) -> tuple[Graph, list[int]]:
    """A step of which every plan can be tried, and some of its ops."""
    graph = draw(steps(max_ops=5).filter(lambda graph: turns_to_try(graph) <= MOST_TURNS))
    return graph, draw(st.lists(st.sampled_from(range(len(graph.ops))), min_size=1, max_size=4, unique=True))


@fuzzed
@given(tiny())
def test_no_plan_needs_less(drawn: tuple[Graph, list[int]]) -> None:
    """Whatever the moments and the budget, no plan within it repeats less than the bound says: not one that lets go of
    what it made and makes it again, nor one that holds a copy of what was written over."""
    graph, numbers = drawn
    for peak, _ in (found := frontier(graph)):
        for budget in (peak, peak + 1):
            assert need(graph, budget, *numbers).bound <= best_within(found, budget) + 1e-9


@fuzzed
@given(tiny())
def test_the_planner_promises_no_more(drawn: tuple[Graph, list[int]]) -> None:
    """Nor does a planner's bound, before it planned and after."""
    graph, _ = drawn
    found, planner = frontier(graph), Planner(graph)
    for peak, _ in found:
        before = planner.bound(peak)
        planner._from_moments(peak)
        assert before <= planner.bound(peak) <= best_within(found, peak) * (1 + 1e-9)


@settings(unhurried, max_examples=60)
@given(tiny(), st.integers(0, 40))
def test_more_moments_need_no_less(drawn: tuple[Graph, list[int]], room: int) -> None:
    """All moments together need at least what each of them needs, but for what the solver leaves open."""
    graph, numbers = drawn
    budget = max(Simulator(graph).bare()) + room
    together = need(graph, budget, *numbers)
    if together.since is not None:
        assert together.bound >= 0.98 * max(need(graph, budget, number).bound for number in numbers)


def in_part(graph: Graph, budget: int, *numbers: int) -> float:
    """The bound if values may be held, and ops repeated, in part."""
    simulator = Simulator(graph)
    model = _Model(simulator, numbers, simulator.bare(), ())
    model._program.integral = [0] * len(model._program.integral)
    return model.solve(budget).bound


@pytest.mark.parametrize("tenths", [5, 6, 7])
def test_more_moments_need_no_less_in_part(tenths: int) -> None:
    """That is so even before the solver turns to integers, though what is repeated half twice needs half its sources:
    otherwise it would have to find out by trying, and does not get far in the time it has."""
    graph = transformer_step(3)
    budget, middle = Planner(graph).full * tenths // 10, len(graph.forward)
    one = in_part(graph, budget, middle)
    assert one > 0
    assert in_part(graph, budget, middle, middle + 5, middle + 9) >= one * 0.999


@pytest.mark.parametrize("layers", [1, 2])
def test_below_the_proven_best_of_blocks(layers: int) -> None:
    """On blocks of a transformer, the bound of three moments is nearer the proven best than that of one."""
    graph = transformer_step(layers)
    planner = Planner(graph)
    nearer = 0
    for place in range(1, 5):
        budget = planner.floor() + (planner.full - planner.floor()) * place // 5
        best, middle = exact(graph, budget), len(graph.forward)
        one = need(graph, budget, middle).bound
        three = need(graph, budget, middle, middle + 3, middle + 6).bound
        assert one * 0.99 <= three <= best.seconds + 1e-6
        nearer += three > one * 1.01
    assert nearer


def full_twice() -> Graph:
    """A value of ten bytes is asked for after each of two ops that have no room for it."""
    graph = build(((), (0,)), ((0,), (1,)), ((), (2,)), ((0,), (3,)), ((), (4,)), ((0,), (5,)), kept={1, 2, 3, 4, 5})
    ops = [replace(op, backward=op.number > 1, seconds=5.0) for op in graph.ops]
    ops[2], ops[4] = (replace(ops[number], temporaries=95) for number in (2, 4))
    values = [replace(value, nbytes=0, dropped=None) for value in graph.values]
    values[0] = replace(values[0], nbytes=10, dropped=2, saved_in=(0,))
    return replace(graph, ops=tuple(ops), values=tuple(values), demands=(Demand(0, 3, 4), Demand(0, 5, 6)))


def test_a_second_moment() -> None:
    """What is repeated after one moment, and has to go before the next, is repeated again: each alone does not tell."""
    graph = full_twice()
    assert [need(graph, 100, *numbers).bound for numbers in ((2,), (4,), (2, 4))] == [
        pytest.approx(5, rel=1e-4),
        pytest.approx(5, rel=1e-4),
        pytest.approx(10, rel=1e-4),
    ]
    assert exact(graph, 100).seconds == 10


def test_what_is_held_obeys() -> None:
    """The plan that holds what is best fits at the moments that were looked at, and repeats what the bound says."""
    graph = transformer_step(3)
    simulator = Simulator(graph)
    planner = Planner(graph)
    numbers = len(graph.forward), len(graph.forward) + 4
    for budget in (planner.full * share // 10 for share in (6, 7, 8)):
        found = need(graph, budget, *numbers)
        assert found.since is not None
        timeline = simulate(graph, hold(simulator, found.since)[0])
        assert timeline.seconds >= found.bound


def test_nothing_to_repeat() -> None:
    """Where nothing is asked for, or all is held by others, nothing has to be repeated or held."""
    graph = replace(chain_step(3), demands=())
    assert need(graph, 100, 1, 3) == Need(0.0, {})
    assert need(build(((), (0,)), ((0,), (1,)), kept={0, 1}), 100, 0) == Need(0.0, {})


def test_no_room_at_all() -> None:
    """Where even what nobody decides about is too much, nothing is said: that there is no plan, others say."""
    assert need(chain_step(4), 0, 4) == Need(0.0, None)


def test_a_copy_of_what_was_written_over() -> None:
    """A value that was written over may be held again once a demand had it replayed, and is no more barred then."""
    graph = build(((), (0,)), ((0,), (1,)), ((0,), (2,)), ((), (3,)), ((), (4,)), ((), (5,)), ((), (6,)))
    ops = [replace(op, backward=op.number > 2) for op in graph.ops]
    ops[0], ops[4] = replace(ops[0], seconds=5.0), replace(ops[4], temporaries=90)
    values = [
        replace(v, nbytes=4 if v.number < 3 else 0, evictable=v.number < 3, dropped=3 if v.number < 3 else None)
        for v in graph.values
    ]
    values[0], values[2] = replace(values[0], overwritten=2), replace(values[2], overwrites=0)
    demands = (Demand(1, 3, 4), Demand(1, 5, 6), Demand(2, 6, 7))
    graph = replace(graph, ops=tuple(ops), values=tuple(values), demands=demands)
    assert need(graph, 94, 4).bound == pytest.approx(2, rel=1e-4)  # from a copy of value 0; without, it takes 6
    assert best_within(frontier(graph), 94) >= 2


def test_what_is_in_hand() -> None:
    """What a node of the backward pass holds takes its bytes once, also if we hold it for later."""
    graph = full_twice()
    demands = (Demand(0, 3, 5), Demand(0, 5, 6))
    graph = replace(graph, demands=demands)
    assert need(graph, 104, 4).bound == 0.0  # what does not fit at all is not for us to say
    assert need(graph, 105, 4).bound == 0.0


def test_what_is_yet_to_be_written_over() -> None:
    """Until it is written over, a value may be kept."""
    graph = build(((), (0,)), ((), (1,)), ((), (2,)), ((0,), (3,)), kept={1, 2})
    values = list(graph.values)
    values[0] = replace(values[0], overwritten=3, dropped=1)
    values[3] = replace(values[3], overwrites=0)
    graph = replace(graph, values=tuple(values), demands=(Demand(0, 2, 2),))
    assert need(graph, 100, 1).bound == 0.0
    assert simulate(graph, Plan(frozenset({0}))).seconds == 0.0


def test_from_the_fullest_moment() -> None:
    """What is there at the fullest moment in any case, such as the result of a loss's softmax, is held for nothing:
    plans near the bound, which prices for all bytes alike do not find."""
    graph = wide_at_the_end(12, 400)
    planner = Planner(graph)
    for tenths in (4, 5, 6):
        forecast = planner.plan(planner.full * tenths // 10).forecast
        assert forecast is not None
        assert forecast.bound > 0
        assert forecast.gap <= 0.005


def wide_at_the_end(layers: int, nbytes: int) -> Graph:
    """A step through blocks of a transformer, and then a loss over many classes."""
    forward: list[tuple[tuple[int, ...], int, float, tuple[int, ...]]] = [((), 8, 1.0, ())]
    for _ in range(layers):
        x = len(forward) - 1
        n = x + 1
        forward += [
            ((x,), 8, 1.0, (x,)),
            ((n,), 24, 12.0, (n,)),
            ((n + 1,), 8, 6.0, (n + 1, n + 2)),
            ((n + 2,), 8, 4.0, (n + 2,)),
            ((x, n + 3), 8, 1.0, ()),
            ((n + 4,), 8, 1.0, (n + 4,)),
            ((n + 5,), 32, 16.0, (n + 5,)),
            ((n + 6,), 32, 2.0, (n + 6,)),
            ((n + 7,), 8, 16.0, (n + 7,)),
            ((n + 4, n + 8), 8, 1.0, ()),
        ]
    x = len(forward) - 1
    forward += [((x,), nbytes, 4.0, (x,)), ((x + 1,), nbytes, 1.0, (x + 2,)), ((x + 2,), 1, 1.0, (x + 2,))]
    return backwarded(*forward)


def test_the_planner_looks_at_another_moment() -> None:
    """Where what is best held at the fullest moment is too much later on, the planner looks at both: its plans are then
    proven to be the best."""
    planner = Planner(transformer_step(12))
    for tenths in (3, 4):
        forecast = planner.plan(planner.full * tenths // 10).forecast
        assert forecast is not None
        assert forecast.gap <= 0.002


def test_less_held_than_frames_hold() -> None:
    """The floor is below what the best frame needs: less is held in its plan, and in what holds all. Without, these
    are 120 and 281 bytes."""
    assert Planner(transformer_step(12)).floor() <= 104
    assert Planner(wide_at_the_end(12, 100)).floor() <= 208
