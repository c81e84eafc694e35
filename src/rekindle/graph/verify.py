"""What a legal graph and a legal plan are. Errors show the neighbourhood of what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rekindle._errors import GraphError
from rekindle.graph.ir import Call, Graph, Op

if TYPE_CHECKING:
    from rekindle.graph.plan import Plan

_NEIGHBOURS = 2
_OUTSIDE = Call(0, None, "", ())


def verify_graph(graph: Graph) -> Graph:
    """Return `graph`, if it is legal.

    Raises:
        GraphError: a number is not that of its position, an op reads what is not made yet or reads a value twice, a
            value is made twice or by another op than it says, a leaf is evictable, a module call does not follow its
            parent, call 0 is that of a module, a demand is for what is not there, or a size or time is impossible.
    """
    _verify_numbers(graph)
    _verify_calls(graph)
    _verify_values(graph)
    _verify_ops(graph)
    _verify_demands(graph)
    return graph


def verify_plan(graph: Graph, plan: Plan) -> Plan:
    """Return `plan`, if it is a legal plan for `graph`.

    Raises:
        GraphError: it keeps, retains or drops something that the graph does not have or that is not evictable, has
            turns but not one for each demand, or promises what cannot be.
    """
    _verify_decided(graph, plan.kept, "the plan keeps")
    if plan.turns and len(plan.turns) != len(graph.demands):
        raise GraphError(f"the plan has {len(plan.turns)} turns, but the graph has {len(graph.demands)} demands")
    for position, turn in enumerate(plan.turns):
        _verify_decided(graph, turn.retained, f"turn {position} of the plan retains")
        _verify_decided(graph, turn.dropped, f"turn {position} of the plan drops")
    forecast = plan.forecast
    if forecast is None:
        return plan
    for nbytes in (forecast.budget, forecast.peak):
        if nbytes < 0:
            raise GraphError(f"the plan speaks of {nbytes} bytes")
    for seconds in (forecast.seconds, forecast.bound):
        if not 0 <= seconds <= sys.float_info.max:
            raise GraphError(f"the plan speaks of {seconds} seconds")
    return plan


def _verify_decided(graph: Graph, numbers: Iterable[int], who: str) -> None:
    for number in sorted(numbers):
        if not 0 <= number < len(graph.values):
            raise GraphError(f"{who} value {number}, but the graph has {len(graph.values)} values")
        value = graph.values[number]
        if not value.evictable:
            raise GraphError(f"{who} value {number}, which is not its to decide: {value.why_kept or 'a leaf'}")


def _verify_numbers(graph: Graph) -> None:
    for kind, numbers in (
        ("call", [call.number for call in graph.calls]),
        ("value", [value.number for value in graph.values]),
        ("op", [op.number for op in graph.ops]),
    ):
        for position, number in enumerate(numbers):
            if number != position:
                raise GraphError(f"{kind} {number} stands at position {position}")


def _verify_calls(graph: Graph) -> None:
    if not graph.calls or graph.calls[0] != _OUTSIDE:
        raise GraphError(f"call 0 stands for what runs outside of all modules: it must be {_OUTSIDE}")
    for call in graph.calls:
        parent = call.parent
        if parent is None:
            continue
        if not 0 <= parent.number < call.number or graph.calls[parent.number] != parent:
            raise GraphError(f"call {call.number} ({call.path!r}) does not come after its parent")


def _verify_values(graph: Graph) -> None:
    for value in graph.values:
        if value.nbytes < 0:
            raise GraphError(f"value {value.number} has {value.nbytes} bytes")
        if value.made_by is None and value.evictable:
            raise GraphError(f"value {value.number} is a leaf and evictable: nothing could bring it back")
        if value.overwrites is not None and not 0 <= value.overwrites < value.number:
            raise GraphError(f"value {value.number} overwrites value {value.overwrites}, which is not before it")
        for number in value.saved_in:
            if not 0 <= number < len(graph.calls):
                raise GraphError(f"value {value.number} was saved in call {number}, which does not exist")


def _verify_ops(graph: Graph) -> None:
    made = {value.number for value in graph.values if value.made_by is None}
    for op in graph.ops:
        if not 0 <= op.call < len(graph.calls):
            raise _wrong(graph, op, f"runs in call {op.call}, which does not exist")
        if not 0 <= op.seconds <= sys.float_info.max:
            raise _wrong(graph, op, f"takes {op.seconds} seconds")
        if op.temporaries < 0:
            raise _wrong(graph, op, f"takes {op.temporaries} bytes for itself")
        for number in op.inputs:
            if number not in made:
                raise _wrong(graph, op, f"reads value {number}, which is not made yet")
            if op.inputs.count(number) > 1:
                raise _wrong(graph, op, f"names value {number} twice among what it reads")
        for number in op.outputs:
            if not 0 <= number < len(graph.values):
                raise _wrong(graph, op, f"makes value {number}, which does not exist")
            maker = graph.values[number].made_by
            if maker != op.number:
                raise _wrong(
                    graph, op, f"makes value {number}, which {'is a leaf' if maker is None else f'op {maker} makes'}"
                )
            if number in made:
                raise _wrong(graph, op, f"makes value {number} twice")
            made.add(number)
    for value in graph.values:
        if value.number not in made:
            raise GraphError(f"no op makes value {value.number}, though it says op {value.made_by}")


def _verify_demands(graph: Graph) -> None:
    last = 0
    for position, demand in enumerate(graph.demands):
        if not 0 <= demand.value < len(graph.values):
            raise GraphError(f"demand {position} is for value {demand.value}, which does not exist")
        if not last <= demand.before <= demand.until <= len(graph.ops):
            raise GraphError(
                f"demand {position} lasts from op {demand.before} to op {demand.until}, of {len(graph.ops)}; the one "
                f"before it began at op {last}"
            )
        last = demand.before
        made_by = graph.values[demand.value].made_by
        if made_by is not None and made_by >= demand.before:
            raise GraphError(f"demand {position} is for value {demand.value}, which op {made_by} makes only later")


def _wrong(graph: Graph, wrong: Op, what: str) -> GraphError:
    first = max(0, wrong.number - _NEIGHBOURS)
    lines = [
        f"{'>' if op is wrong else ' '} {op.number}: {list(op.outputs)} = {op.name}({list(op.inputs)})"
        for op in graph.ops[first : wrong.number + _NEIGHBOURS + 1]
    ]
    return GraphError("\n".join([f"op {wrong.number} {what}:", *lines]))
