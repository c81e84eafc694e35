"""What a legal graph and a legal plan are, and what the errors show."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given

from paper import OUTSIDE, build, chain, diamond, graphs, unhurried
from rekindle import GraphError
from rekindle.graph import Call, Graph, Op, Plan, Value, verify_graph, verify_plan


def with_op(position: int, /, **changes: object) -> Graph:
    """The diamond with one op changed."""
    graph = diamond()
    ops = tuple(replace(op, **changes) if op.number == position else op for op in graph.ops)  # type: ignore[arg-type]
    return replace(graph, ops=ops)


def with_value(position: int, /, **changes: object) -> Graph:
    """The diamond with one value changed."""
    graph = diamond()
    values = tuple(replace(v, **changes) if v.number == position else v for v in graph.values)  # type: ignore[arg-type]
    return replace(graph, values=values)


def with_calls(*calls: Call) -> Graph:
    """The diamond with these module calls."""
    return replace(diamond(), calls=calls)


@unhurried
@given(graphs())
def test_legal_graphs_pass(graph: Graph) -> None:
    """A legal graph is returned as it is."""
    assert verify_graph(graph) is graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (with_op(1, number=7), "op 7 stands at position 1"),
        (with_value(2, number=0), "value 0 stands at position 2"),
        (with_calls(Call(1, None, "", ())), "call 1 stands at position 0"),
        (with_calls(), "call 0 stands for what runs outside of all modules"),
        (with_calls(Call(0, None, "layers", ("Block",))), "call 0 stands for what runs outside of all modules"),
        (with_calls(OUTSIDE, Call(1, Call(2, None, "b", ()), "a", ())), "call 1 ('a') does not come after its parent"),
        (with_calls(OUTSIDE, Call(1, Call(1, None, "a", ()), "a", ())), "call 1 ('a') does not come after its parent"),
        (with_calls(OUTSIDE, Call(1, Call(-1, None, "", ()), "a", ())), "call 1 ('a') does not come after its parent"),
        (with_calls(OUTSIDE, Call(1, Call(0, None, "b", ()), "a", ())), "call 1 ('a') does not come after its parent"),
        (with_value(1, nbytes=-1), "value 1 has -1 bytes"),
        (with_value(0, evictable=True), "value 0 is a leaf and evictable"),
        (with_value(1, saved_in=(1,)), "value 1 was saved in call 1, which does not exist"),
        (with_value(1, saved_in=(-1,)), "value 1 was saved in call -1, which does not exist"),
        (with_op(2, call=1), "op 2 runs in call 1, which does not exist"),
        (with_op(2, call=-1), "op 2 runs in call -1, which does not exist"),
        (with_op(2, seconds=-1.0), "op 2 takes -1.0 seconds"),
        (with_op(2, seconds=float("inf")), "op 2 takes inf seconds"),
        (with_op(2, seconds=float("nan")), "op 2 takes nan seconds"),
        (with_op(1, inputs=(4,)), "op 1 reads value 4, which is not made yet"),
        (with_op(1, inputs=(2,)), "op 1 reads value 2, which is not made yet"),
        (with_op(1, inputs=(-1,)), "op 1 reads value -1, which is not made yet"),
        (with_op(1, inputs=(99,)), "op 1 reads value 99, which is not made yet"),
        (with_op(1, inputs=(1, 1)), "op 1 names value 1 twice among what it reads"),
        (with_op(3, outputs=(5,)), "op 3 makes value 5, which does not exist"),
        (with_op(3, outputs=(-1,)), "op 3 makes value -1, which does not exist"),
        (with_op(3, outputs=(0,)), "op 3 makes value 0, which is a leaf"),
        (with_op(3, outputs=(2,)), "op 3 makes value 2, which op 1 makes"),
        (with_op(3, outputs=(4, 4)), "op 3 makes value 4 twice"),
        (with_op(3, outputs=()), "no op makes value 4, though it says op 3"),
        (with_value(4, made_by=9), "op 3 makes value 4, which op 9 makes"),
    ],
)
def test_illegal_graphs_are_named(graph: Graph, message: str) -> None:
    """Each way to be illegal raises, and the message names the culprit."""
    with pytest.raises(GraphError, match=re.escape(message)):
        verify_graph(graph)


def test_errors_show_the_neighbourhood() -> None:
    """What is wrong with an op is shown with the ops around it and an arrow at it."""
    graph = chain(9)
    ops = (*graph.ops[:4], replace(graph.ops[4], inputs=(7,)), *graph.ops[5:])
    with pytest.raises(GraphError) as caught:
        verify_graph(replace(graph, ops=ops))
    assert str(caught.value).splitlines() == [
        "op 4 reads value 7, which is not made yet:",
        "  2: [3] = aten.op([2])",
        "  3: [4] = aten.op([3])",
        "> 4: [5] = aten.op([7])",
        "  5: [6] = aten.op([5])",
        "  6: [7] = aten.op([6])",
    ]


@pytest.mark.parametrize("kept", [(), (1,), (1, 2, 3, 4)])
def test_legal_plans_pass(kept: tuple[int, ...]) -> None:
    """A plan of evictable values, some, none or all, is returned as it is."""
    plan = Plan(frozenset(kept))
    assert verify_plan(diamond(), plan) is plan


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({1, 5}, "the plan keeps value 5, but the graph has 5 values"),
        ({-1}, "the plan keeps value -1, but the graph has 5 values"),
        ({0}, "the plan keeps value 0, which is not its to decide: a leaf"),
        ({4}, "the plan keeps value 4, which is not its to decide: too small"),
    ],
)
def test_illegal_plans_are_named(kept: set[int], message: str) -> None:
    """A plan cannot keep what does not exist or is not evictable; the message says why it is not."""
    graph = with_value(4, evictable=False, why_kept="too small")
    with pytest.raises(GraphError, match=re.escape(message)):
        verify_plan(graph, Plan(frozenset(kept)))


def test_many_calls_are_verified_quickly() -> None:
    """Verification looks at each module call once: a long loop over a small module is no reason to wait."""
    calls = [OUTSIDE]
    for number in range(1, 20_001):
        calls.append(Call(number, calls[number // 2], f"cell.{number}", ("Cell",)))
    graph = Graph((Op(0, "aten.op", (), (0,)),), (Value(0, 8, 0),), tuple(calls))
    assert verify_graph(graph) is graph


def test_build_makes_what_it_says() -> None:
    """The graphs that other tests are made of are legal themselves."""
    graph = build(((0,), (1, 2)), ((1,), (3,)), kept=(2,), backward=(1,))
    assert verify_graph(graph) is graph
    assert [value.made_by for value in graph.values] == [None, 0, 0, 1]
    assert [value.evictable for value in graph.values] == [False, True, False, True]
    assert [op.backward for op in graph.ops] == [False, True]
