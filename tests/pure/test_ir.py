"""What a graph says of its values: who reads them, what is computed from them, how far the end is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given

from paper import build, chain, diamond, graphs, unhurried
from rekindle.graph import Graph, Plan

# A chain of three with a normalisation in the middle: its statistics, value 3, are read by nobody.
WITH_STATISTICS = build(((0,), (1,)), ((1,), (2, 3)), ((2,), (4,)), ((4,), (5,)))
# A residual: value 1 skips the op that makes 2.
RESIDUAL = build(((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((1, 3), (4,)))
# The backward pass reads value 1 and makes value 3.
WITH_BACKWARD = build(((0,), (1,)), ((1,), (2,)), ((1, 2), (3,)), kept=(3,), backward=(2,))
# Two results, each an end: a loss and what is only looked at.
TWO_ENDS = build(((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((1,), (4,)))
# The second op gives no tensor: a print of value 1.
WITHOUT_RESULT = build(((0,), (1,)), ((1,), ()), ((1,), (2,)), ((2,), (3,)))
SHARED_LEAF = build(((0, 1), (2,)), ((0, 2), (3,)))


@pytest.mark.parametrize(
    ("graph", "readers", "descendants", "distances"),
    [
        pytest.param(chain(3), ((0,), (1,), (2,), ()), (3, 2, 1, 0), (3, 2, 1, 0), id="chain"),
        pytest.param(diamond(), ((0,), (1, 2), (3,), (3,), ()), (4, 3, 1, 1, 0), (3, 2, 1, 1, 0), id="diamond"),
        pytest.param(RESIDUAL, ((0,), (1, 3), (2,), (3,), ()), (4, 3, 2, 1, 0), (2, 1, 2, 1, 0), id="residual"),
        pytest.param(
            WITH_STATISTICS,
            ((0,), (1,), (2,), (), (3,), ()),
            (5, 4, 2, 0, 1, 0),
            (4, 3, 2, 2, 1, 0),
            id="a side output is no end",
        ),
        pytest.param(WITH_BACKWARD, ((0,), (1,), (), ()), (2, 1, 0, 0), (2, 1, 0, None), id="backward is not counted"),
        pytest.param(TWO_ENDS, ((0,), (1, 3), (2,), (), ()), (4, 3, 1, 0, 0), (2, 1, 1, 0, 0), id="the nearer end"),
        pytest.param(
            WITHOUT_RESULT, ((0,), (1, 2), (3,), ()), (3, 2, 1, 0), (3, 2, 1, 0), id="an op without result is no end"
        ),
        pytest.param(SHARED_LEAF, ((0, 1), (0,), (1,), ()), (2, 2, 1, 0), (1, 2, 1, 0), id="shared leaf"),
        pytest.param(build(), (), (), (), id="empty"),
    ],
)
def test_neighbourhood(
    graph: Graph,
    readers: tuple[tuple[int, ...], ...],
    descendants: tuple[int, ...],
    distances: tuple[int | None, ...],
) -> None:
    """Readers, descendants and distances of small graphs are those counted by hand."""
    assert graph.readers == readers
    assert graph.descendants == descendants
    assert graph.distances == distances


def test_forward_and_evictable() -> None:
    """`forward` leaves the backward ops out, `evictable` what no policy decides about."""
    assert [op.number for op in WITH_BACKWARD.forward] == [0, 1]
    assert [value.number for value in WITH_BACKWARD.evictable] == [1, 2]


@unhurried
@given(graphs())
def test_descendants_are_what_can_be_reached(graph: Graph) -> None:
    """`descendants` counts what a walk along the readers finds, each value once."""
    for value in graph.values:
        found: set[int] = set()
        front = [value.number]
        while front:
            reached = {made for op in graph.readers[front.pop()] for made in graph.ops[op].outputs}
            front += reached - found
            found |= reached
        assert graph.descendants[value.number] == len(found)


@unhurried
@given(graphs())
def test_distances_go_down_by_one_along_some_reader(graph: Graph) -> None:
    """A value is one op farther from the end than the nearest of what is made from it."""
    for value in graph.values:
        distance = graph.distances[value.number]
        steps = [graph.ops[op].outputs for op in graph.readers[value.number] if graph.ops[op].outputs]
        below = [min(graph.distances[made] for made in outputs) for outputs in steps]
        made_forward = value.made_by is not None and not graph.ops[value.made_by].backward
        if below:
            assert distance == min(below) + 1
        else:
            assert (distance is not None) == made_forward


def test_ten_thousand_ops_in_a_row() -> None:
    """Long chains neither recurse nor stall."""
    graph = chain(10_000)
    assert graph.descendants[0] == graph.distances[0] == 10_000


@pytest.mark.parametrize("field", ["ops", "values", "calls"])
def test_a_graph_cannot_be_changed(field: str) -> None:
    """A graph is a frozen value, so what was worked out from it stays true; a changed copy is worked out anew."""
    graph = chain(2)
    assert graph.descendants == (2, 1, 0)
    with pytest.raises(FrozenInstanceError):
        setattr(graph, field, ())
    assert replace(graph, ops=graph.ops[:1]).descendants == (1, 0, 0)


def test_a_plan_is_what_it_keeps() -> None:
    """Plans that keep the same are equal, and say of each value whether they keep it."""
    plan = Plan(frozenset({1, 3}))
    assert plan == Plan(frozenset({3, 1}))
    assert [plan.keeps(number) for number in range(4)] == [False, True, False, True]
