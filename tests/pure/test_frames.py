"""Cuts through forward passes: where they may be, how long the leaves are, how many are held at a time."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given

from paper import build, chain_step, steps, unhurried
from rekindle.graph import Graph
from rekindle.policy.frames import Frame, Sites, _binomial


def sites_of(graph: Graph) -> Sites:
    """All places where a step can be cut."""
    return Sites(graph, sorted({demand.value for demand in graph.demands if graph.values[demand.value].evictable}))


def all_frames(sites: Sites) -> list[Frame]:
    """Every frame that a planner would try."""
    return [*sites.frames(), *sites.deep_frames()]


def crossing(graph: Graph, cut: int) -> set[int]:
    """What is made before an op and read by it or a later one, op by op."""
    before = {v for op in graph.forward[:cut] for v in op.outputs if graph.values[v].evictable}
    return before & {v for op in graph.forward[cut:] for v in op.inputs}


@unhurried
@given(steps(max_ops=8))
def test_what_crosses(graph: Graph) -> None:
    """For each place, the values that have to be held there so that nothing from before is needed any more."""
    sites = sites_of(graph)
    for number in range(len(graph.forward)):
        assert sites.crossing[number] == crossing(graph, number)


@unhurried
@given(steps(max_ops=8))
def test_cuts_are_legal(graph: Graph) -> None:
    """In the forward pass, in order, each once, where something crosses and nothing that will be overwritten."""
    sites = sites_of(graph)
    for frame in all_frames(sites):
        assert all(low < high for low, high in pairwise((0, *frame.cuts, len(graph.forward))))
        assert len(frame.held) == len(frame.cuts) + 1
        for cut in frame.cuts:
            assert sites.crossing[cut]
            assert not any(graph.values[value].overwritten is not None for value in sites.crossing[cut])


@unhurried
@given(steps(max_ops=8))
def test_cuts_are_held_by_the_leaves_before_them(graph: Graph) -> None:
    """What a leaf's replay holds was passed on the way to it, and each cut is held by one leaf at most."""
    for frame in all_frames(sites_of(graph)):
        everything = [cut for cuts in frame.held for cut in cuts]
        assert len(everything) == len(set(everything))
        for leaf, cuts in enumerate(frame.held):
            assert set(cuts) <= set(frame.cuts[:leaf])


def test_leaves() -> None:
    """An op is in the leaf that begins at the last cut up to it."""
    frame = Frame((3, 5), ((), (), (3, 5)))
    assert [frame.leaf(op) for op in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [Frame().leaf(op) for op in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("most", [1, 110, 250, 600, 10**6])
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_leaves_are_bounded(most: int, slope: float) -> None:
    """A chain of pairs, a large value and a small one: cut at small ones only, into leaves with no more bytes than
    asked for, and what is gone from later leaves by then, as far as there are places to cut at."""
    sizes = [100 if number % 2 == 0 else 10 for number in range(40)]
    sites = sites_of(chain_step(40, sizes))
    cuts = sites._cut(most, slope)
    assert all(sites.crossing[cut] == {cut - 1} and sizes[cut - 1] == 10 for cut in cuts)
    for low, high in pairwise((0, *cuts, 40)):
        assert sum(sizes[low:high]) <= max(110, most + slope * sum(sizes[high:]))
    if not slope:
        assert len(cuts) == max(0, -(-20 // max(1, most // 110)) - 1)


def test_finest_frame() -> None:
    """Among the frames is the one that cuts wherever it is narrow, and one that does not cut."""
    frames = all_frames(sites_of(chain_step(40, [100 if number % 2 == 0 else 10 for number in range(40)])))
    assert frames[0] == Frame()
    assert max((frame.cuts for frame in frames), key=len) == tuple(range(2, 40, 2))


def test_no_narrow_place() -> None:
    """Where everything crosses everywhere, as in a step whose ops all read all, there is one frame without cuts."""
    graph = build(*((tuple(range(number)), (number,)) for number in range(6)))
    frames = all_frames(Sites(graph, range(6)))
    assert frames[0] == Frame()
    assert Sites(build(), ()).crossing == []
    assert all_frames(Sites(build(), ())) == [Frame()]


def held_at_a_time(frame: Frame) -> tuple[int, list[int]]:
    """The most cuts held at once while the leaves are reached from the last to the first, and how many leaves each pass
    goes through: from the next cut that is held, or from the beginning."""
    held: set[int] = set()
    most, passes = 0, []
    for leaf in range(len(frame.cuts), -1, -1):
        begins = 0 if leaf == 0 else frame.cuts[leaf - 1]
        starts = [frame.cuts.index(cut) + 1 for cut in held if cut <= begins]
        passes.append(leaf - max(starts, default=0) + 1)
        held |= set(frame.held[leaf])
        most = max(most, len(held))
        held.discard(begins)  # nothing before this leaf is replayed from its own beginning
    return most, passes


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("leaves", [2, 3, 5, 6, 10, 17, 40, 100])
def test_binomial(leaves: int, slots: int) -> None:
    """A schedule holds at most its slots at a time, reaches each leaf, and repeats less with every slot more."""
    cuts = tuple(range(10, 10 * leaves, 10))
    most, passes = held_at_a_time(Frame(cuts, _binomial(cuts, slots)))
    assert most <= slots
    assert len(passes) == leaves
    assert all(1 <= each <= leaf + 1 for leaf, each in zip(reversed(range(leaves)), passes, strict=True))
    if slots < leaves - 2:
        assert sum(held_at_a_time(Frame(cuts, _binomial(cuts, slots + 1)))[1]) < sum(passes)


def test_binomial_repeats_no_more_than_it_must() -> None:
    """Of all ways to hold so many cuts at a time, the one that goes through the fewest leaves."""
    for leaves in range(2, 60):
        cuts = tuple(range(10, 10 * leaves, 10))
        for slots in range(1, min(8, leaves - 1) + 1):
            passes = held_at_a_time(Frame(cuts, _binomial(cuts, slots)))[1]
            assert sum(passes) == fewest_leaves(leaves, slots), (leaves, slots)


@cache
def fewest_leaves(leaves: int, slots: int) -> int:
    """By trying every first cut: on to it, the leaves behind it with a slot less, and then those before it."""
    if not slots or leaves == 1:
        return leaves * (leaves + 1) // 2
    return min(n + fewest_leaves(leaves - n, slots - 1) + fewest_leaves(n, slots) for n in range(1, leaves))


@unhurried
@given(steps(max_ops=8))
def test_deterministic(graph: Graph) -> None:
    """The same frames in the same order each time."""
    assert all_frames(sites_of(graph)) == all_frames(sites_of(graph))
