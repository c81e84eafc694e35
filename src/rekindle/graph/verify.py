"""What a legal graph and a legal plan are. Errors show the neighbourhood of what is wrong."""

from __future__ import annotations

from rekindle._errors import GraphError
from rekindle.graph.ir import Graph
from rekindle.graph.plan import Plan

_NEIGHBOURS = 2


def verify_graph(graph: Graph) -> Graph:
    """Return `graph`, if it is legal.

    Raises:
        GraphError: a number is not that of its position, an op reads what is not made yet, a value is made twice or by
            another op than it says, or a module call does not follow its parent.
    """
    for kind, numbers in (
        ("call", [call.number for call in graph.calls]),
        ("value", [value.number for value in graph.values]),
        ("op", [op.number for op in graph.ops]),
    ):
        for position, number in enumerate(numbers):
            if number != position:
                raise GraphError(f"{kind} {number} stands at position {position}")
    for call in graph.calls:
        if call.parent is not None and graph.calls[: call.number].count(call.parent) != 1:
            raise GraphError(f"call {call.number} ({call.path!r}) does not come after its parent")
    _verify_ops(graph)
    for value in graph.values:
        if value.nbytes < 0:
            raise GraphError(f"value {value.number} has {value.nbytes} bytes")
        if value.made_by is None and value.evictable:
            raise GraphError(f"value {value.number} is a leaf and evictable: nothing could bring it back")
        for number in value.saved_in:
            if not 0 <= number < len(graph.calls):
                raise GraphError(f"value {value.number} was saved in call {number}, which does not exist")
    return graph


def verify_plan(graph: Graph, plan: Plan) -> Plan:
    """Return `plan`, if it is a legal plan for `graph`.

    Raises:
        GraphError: it keeps something that the graph does not have, or that is not evictable.
    """
    for number in sorted(plan.kept):
        if not 0 <= number < len(graph.values):
            raise GraphError(f"the plan keeps value {number}, but the graph has {len(graph.values)} values")
        value = graph.values[number]
        if not value.evictable:
            raise GraphError(f"the plan keeps value {number}, which is not its to decide: {value.why_kept or 'a leaf'}")
    return plan


def _verify_ops(graph: Graph) -> None:
    made: set[int] = {value.number for value in graph.values if value.made_by is None}
    for op in graph.ops:
        if not 0 <= op.call < len(graph.calls):
            raise _wrong(graph, op.number, f"runs in call {op.call}, which does not exist")
        for number in op.inputs:
            if number not in made:
                raise _wrong(graph, op.number, f"reads value {number}, which is not made yet")
        for number in op.outputs:
            if not 0 <= number < len(graph.values):
                raise _wrong(graph, op.number, f"makes value {number}, which does not exist")
            if number in made or graph.values[number].made_by != op.number:
                raise _wrong(graph, op.number, f"makes value {number}, which op {graph.values[number].made_by} makes")
            made.add(number)
    missing = [value.number for value in graph.values if value.number not in made]
    if missing:
        raise GraphError(f"no op makes value {missing[0]}, though it says op {graph.values[missing[0]].made_by}")


def _wrong(graph: Graph, number: int, what: str) -> GraphError:
    first = max(0, number - _NEIGHBOURS)
    lines = [
        f"{'>' if op.number == number else ' '} {op.number}: {list(op.outputs)} = {op.name}({list(op.inputs)})"
        for op in graph.ops[first : number + _NEIGHBOURS + 1]
    ]
    return GraphError("\n".join([f"op {number} {what}:", *lines]))
