"""Plans for people: what the table counts, what it folds, and what `print` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given

from paper import OUTSIDE, chain_step, steps, unhurried
from rekindle.graph import Call, Forecast, Graph, Plan, fullest, simulate
from rekindle.policy import Planner
from rekindle.report import Row, describe_plan, rows_of


def layered(paths: Sequence[str], sizes: Sequence[int], seconds: Sequence[float]) -> Graph:
    """A chain of forward ops, each in the module of a path, and its backward."""
    graph = chain_step(len(paths), list(sizes), list(seconds))
    calls = [OUTSIDE, *(Call(1 + i, OUTSIDE, path, ("app.Layer",)) for i, path in enumerate(paths))]
    ops = tuple(op if op.backward else replace(op, call=1 + op.number) for op in graph.ops)
    return replace(graph, ops=ops, calls=tuple(calls))


def deep(layers: int) -> Graph:
    """Layers of two modules each, with times that differ a little as measured ones do."""
    paths = [f"model.layers.{i}.{part}" for i in range(layers) for part in ("attention", "mlp")]
    return layered(paths, [8, 100] * layers, [1 + i / 100 for i in range(2 * layers)])


def found(rows: Sequence[Row], name: str) -> Row:
    """The row of that name, of which there is one."""
    (row,) = (row for row in rows if row.name == name)
    return row


@unhurried
@given(steps())
def test_nothing_is_lost(graph: Graph) -> None:
    """The first row has all bytes that are kept, all that are recomputed, and all seconds."""
    plan = Plan(frozenset(value.number for value in graph.evictable[::2]))
    timeline = simulate(graph, plan)
    first = rows_of(graph, plan, timeline)[0]
    asked = {demand.value for demand in graph.demands}
    assert first.kept == sum(graph.values[value].nbytes for value in plan.kept)
    assert first.recomputed == sum(v.nbytes for v in graph.evictable if v.number in asked - plan.kept)
    assert abs(first.seconds - timeline.seconds) < 1e-9


def test_identical_layers_are_folded() -> None:
    """Layers that are treated alike are one row with their numbers and their count, whatever they took."""
    graph = deep(12)
    plan = Plan(frozenset(range(0, 24, 2)))
    rows = rows_of(graph, plan, simulate(graph, plan))
    layers = found(rows, "layers.0-11")
    assert layers == Row("layers.0-11", 1, 12, 12 * 8, 12 * 100, layers.seconds)
    assert abs(layers.seconds - rows[0].seconds) < 1e-9
    assert [(row.name, row.count, row.kept, row.recomputed) for row in rows[2:]] == [
        ("attention", 1, 96, 0),
        ("mlp", 1, 0, 1200),
    ]


def test_layers_with_other_treatments_stay_apart() -> None:
    """A layer that is kept where others are recomputed has a row of its own, and the rows add up."""
    graph = deep(6)
    plan = Plan(frozenset({*range(0, 12, 2), 5}))
    rows = rows_of(graph, plan, simulate(graph, plan))
    others = found(rows, "layers.0-1, 3-5")
    alone = found(rows, "layers.2")
    assert (others.count, alone.count) == (5, 1)
    assert others.kept + alone.kept == rows[0].kept
    assert abs(others.seconds + alone.seconds - rows[0].seconds) < 1e-9


def test_the_page() -> None:
    """The text has the folded layer, the split, the peak with its place, the cost, the budget and the gap."""
    graph = replace(deep(12), standing=1000)
    planner = Planner(graph)
    plan = planner.plan((planner.floor() + planner.full) // 2)
    assert plan.forecast is not None
    text = describe_plan(plan)
    for part in ("layers.", " x", "kept for the backward pass", "results of the backward pass", "Recomputed: ", "gap"):
        assert part in text
    moment = fullest(graph, plan)
    assert f"at op {moment.op}, {graph.ops[moment.op].name} of 'model.layers." in text
    assert f"{plan.forecast.peak} B" in text or "KiB" in text
    assert max(map(len, text.splitlines())) <= 160


def test_print_shows_the_page() -> None:
    """`str` of a plan that tells its graph is the page; of another, its repr."""
    graph = deep(2)
    plan = Plan(frozenset({0}), forecast=Forecast(10_000, 500, 1.0, 0.0), graph=graph)
    assert str(plan) == describe_plan(plan)
    assert "no bound above zero is known" in str(plan)
    bare = Plan(frozenset({0}))
    assert str(bare) == repr(bare) == describe_plan(bare)


def test_an_empty_step_has_a_page() -> None:
    """A plan of nothing is no crash."""
    assert "No op was recorded" in str(Plan(frozenset(), graph=Graph((), ())))
