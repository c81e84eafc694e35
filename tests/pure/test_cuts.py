"""What any price can buy, against trying every set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paper import build, chain, steps, unhurried
from rekindle.graph import Graph
from rekindle.policy.cuts import Cuts

NOTHING = frozenset[int]()


@dataclass(frozen=True)
class Problem:
    """What is wanted of a graph, what is there anyway, and what cannot be kept."""

    graph: Graph
    wanted: tuple[int, ...]
    free: frozenset[int] = NOTHING
    barred: frozenset[int] = NOTHING

    def cuts(self) -> Cuts:
        """The network."""
        return Cuts(self.graph, self.wanted, self.free, self.barred)

    def seconds(self, kept: frozenset[int]) -> float:
        """What it takes to make all that is wanted from `kept`."""
        return sum(self.graph.ops[number].seconds for number in self.repeated(kept))

    def repeated(self, kept: frozenset[int]) -> set[int]:
        """The ops that are repeated, each once."""
        there, ops = kept | self.free, set[int]()
        lacking = {v for v in self.wanted if self.graph.values[v].evictable} - there
        for op in reversed(self.graph.ops):
            if lacking.intersection(op.outputs):
                ops.add(op.number)
                lacking |= {v for v in op.inputs if self.graph.values[v].evictable} - there
        return ops

    def nbytes(self, kept: frozenset[int]) -> int:
        """What is kept takes."""
        return sum(self.graph.values[value].nbytes for value in kept)

    def choices(self) -> Iterator[frozenset[int]]:
        """Every set that may be kept, of what is of any use."""
        useful = {v for number in self.repeated(NOTHING) for v in self.graph.ops[number].outputs}
        useful = {v for v in useful if self.graph.values[v].evictable} - self.free - self.barred
        for size in range(len(useful) + 1):
            yield from map(frozenset, combinations(sorted(useful), size))

    def points(self) -> list[tuple[int, float]]:
        """Bytes and seconds of each of them."""
        return [(self.nbytes(kept), self.seconds(kept)) for kept in self.choices()]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small ones."""
    graph = draw(steps(max_ops=5))
    evictable = sorted(value.number for value in graph.evictable)
    some = st.sets(st.sampled_from(evictable), max_size=2).map(frozenset) if evictable else st.just(NOTHING)
    wanted = sorted({demand.value for demand in graph.demands})
    return Problem(graph, tuple(wanted), draw(some), draw(some))


def assume_costs(problem: Problem) -> None:
    """Leave out steps that are replayed in no time: `test_no_seconds` has one."""
    assume(problem.seconds(NOTHING) or not problem.repeated(NOTHING))


def seconds_at(points: list[tuple[float, float]], nbytes: float) -> float:
    """The lower convex hull of points, at some number of bytes."""
    lowest = min((s for n, s in points if n <= nbytes), default=float("inf"))
    for (n, s), (m, t) in combinations(sorted(points), 2):
        if n <= nbytes < m:
            lowest = min(lowest, s + (t - s) * (nbytes - n) / (m - n))
    return lowest


@settings(unhurried, max_examples=150)
@given(problems(), st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 7.0]))
def test_cheapest_at_a_price(problem: Problem, price: float) -> None:
    """No set costs less in seconds and in bytes at the price, and the seconds are those of the set that is named."""
    assume_costs(problem)
    corner = problem.cuts().at(price)
    assert not corner.kept & (problem.free | problem.barred)
    assert corner.nbytes == problem.nbytes(corner.kept)
    assert corner.seconds == problem.seconds(corner.kept)
    least = min(seconds + price * nbytes for nbytes, seconds in problem.points())
    assert corner.seconds + price * corner.nbytes == pytest.approx(least, rel=1e-6)


@settings(unhurried, max_examples=150)
@given(problems())
def test_corners_lie_on_a_convex_curve(problem: Problem) -> None:
    """From the fewest bytes that any set takes to the fewest seconds, each corner is better than the last for less and
    less, and all sets lie on or above the lines between them."""
    assume_costs(problem)
    corners, points = problem.cuts().corners(1000), problem.points()
    if len(corners) > 1 and corners[-1].seconds == corners[-2].seconds:
        corners.pop()  # at no price at all, of several sets with as few seconds, it need not be the smallest
    assert corners[0].nbytes == min(nbytes for nbytes, _ in points)
    assert corners[-1].seconds == min(seconds for _, seconds in points)
    slopes = []
    for low, high in pairwise(corners):
        assert low.nbytes < high.nbytes
        assert low.seconds > high.seconds
        slopes.append((high.seconds - low.seconds) / (high.nbytes - low.nbytes))
    assert slopes == sorted(slopes)
    for corner in corners:
        assert corner.nbytes == problem.nbytes(corner.kept)
        assert corner.seconds == problem.seconds(corner.kept)
        if corner is not corners[-1]:
            assert corner.seconds == pytest.approx(seconds_at(list(points), corner.nbytes))
    for nbytes, seconds in points:
        assert seconds >= seconds_at([(c.nbytes, c.seconds) for c in corners], nbytes) - 1e-9


@settings(unhurried, max_examples=150)
@given(problems(), st.integers(0, 40))
def test_bound(problem: Problem, room: int) -> None:
    """No set within some bytes takes fewer seconds than the bound, which is on the curve unless all fits."""
    assume_costs(problem)
    bound = problem.cuts().bound(room)
    fitting = [seconds for nbytes, seconds in problem.points() if nbytes <= room]
    assert bound <= min(fitting, default=float("inf"))
    if fitting and bound:
        assert bound == pytest.approx(seconds_at(list(problem.points()), room), abs=1e-3)


def test_a_chain() -> None:
    """All that is asked for at the end of a chain is its last value; the cheapest cut is its smallest value near it."""
    graph = build(
        *(((number,), (number + 1,)) for number in range(5)), nbytes={1: 9, 2: 2, 3: 9, 4: 6, 5: 9}, seconds=[1] * 5
    )
    problem = Problem(graph, (5,))
    found = [(corner.nbytes, corner.seconds, set(corner.kept)) for corner in problem.cuts().corners()]
    assert found == [(0, 5, set()), (2, 3, {2}), (6, 1, {4}), (9, 0, {5})]


def test_free_and_barred() -> None:
    """What is there anyway costs nothing, what is barred is never kept, and what is not evictable is there."""
    graph = build(*(((number,), (number + 1,)) for number in range(5)), seconds=[1] * 5)
    assert [c.seconds for c in Problem(graph, (5,), frozenset({3})).cuts().corners()] == [2, 0]
    assert [(c.kept, c.seconds) for c in Problem(graph, (5,), barred=frozenset({5, 4})).cuts().corners()][-1] == (
        frozenset({3}),
        2,
    )
    fixed = build(*(((number,), (number + 1,)) for number in range(5)), seconds=[1] * 5, kept={3})
    assert [c.seconds for c in Problem(fixed, (5,)).cuts().corners()] == [2, 0]


@pytest.mark.parametrize("wanted", [(), (0,), (3,)], ids=["nothing", "a leaf", "what is there"])
def test_nothing_to_decide(wanted: tuple[int, ...]) -> None:
    """Where nothing has to be made, nothing is kept, at any price, in no seconds."""
    cuts = Cuts(chain(4), wanted, frozenset({3}), NOTHING)
    assert [(corner.nbytes, corner.seconds) for corner in cuts.corners()] == [(0, 0)]
    assert cuts.at(1.0).kept == frozenset()


def test_no_seconds() -> None:
    """Ops that take no time at all are no special case: nothing need be kept."""
    corners = Problem(build(((), (0,)), seconds=[0]), (0,)).cuts().corners()
    assert [(corner.nbytes, corner.seconds) for corner in corners] == [(0, 0)]


def test_most() -> None:
    """The number of corners is limited on request, and the ends are among them."""
    graph = build(
        *(((), (number,)) for number in range(20)),
        nbytes={number: 1 + number for number in range(20)},
        seconds=[1.0] * 20,
    )
    problem = Problem(graph, tuple(range(20)))
    everything, few = problem.cuts().corners(), problem.cuts().corners(5)
    assert len(everything) == 21
    assert len(few) == 5
    assert {c.nbytes for c in few} < {c.nbytes for c in everything}
    assert (few[0], few[-1]) == (everything[0], everything[-1])


def test_sizes_of_a_real_step() -> None:
    """Gigabytes and microseconds lose nothing to the rounding of capacities that is worth a thousandth."""
    graph = build(
        *(((number,), (number + 1,)) for number in range(8)),
        nbytes={number: (1 << 30) + 7 * number for number in range(9)},
        seconds=[1e-6 * (1 + number) for number in range(8)],
    )
    problem = Problem(graph, tuple(range(1, 9)))
    for corner in problem.cuts().corners():
        hull = seconds_at(list(problem.points()), corner.nbytes)
        assert corner.seconds == pytest.approx(hull, rel=1e-3, abs=1e-9)
