"""The fullest moment of a step under a plan: what is live then, and what it is there for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

from rekindle.graph.ir import Graph, Value
from rekindle.graph.plan import Plan
from rekindle.graph.timeline import Holders, Simulator


class Share(Enum):
    """What bytes are live for."""

    STANDING = "standing"
    """Parameters, gradients, buffers and inputs, which are there all the time."""
    KEPT = "kept"
    """Kept for the backward pass."""
    RECOMPUTED = "recomputed"
    """Made by replays, and held until it is not wanted any longer."""
    IN_USE = "in use"
    """Held by user code, by autograd, or because it cannot be recomputed."""
    BACKWARD = "backward"
    """What the backward pass made: gradients."""
    TEMPORARY = "temporary"
    """What a kernel allocates for itself."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The fullest moment of a step.

    Attributes:
        graph: the step.
        op: number of the op that runs then.
        replayed: it runs again, for the backward pass.
        live: numbers of the values that are live, with what each is there for. One that is made again while somebody
            still has it is there twice.
    """

    graph: Graph
    op: int
    replayed: bool
    live: tuple[tuple[int, Share], ...]

    @property
    def nbytes(self) -> int:
        """All bytes that are live."""
        return sum(self.split.values())

    @property
    def split(self) -> dict[Share, int]:
        """How they split."""
        split = dict.fromkeys(Share, 0)
        split[Share.STANDING] = self.graph.standing
        split[Share.TEMPORARY] = self.graph.ops[self.op].temporaries if self.graph.ops else 0
        for value, share in self.live:
            split[share] += self.graph.values[value].nbytes
        return split

    def largest(self, count: int) -> list[tuple[Value, int]]:
        """The values that take most, those alike taken together: the first of each kind, and how many there are."""
        alike: Counter[tuple[object, ...]] = Counter()
        first: dict[tuple[object, ...], Value] = {}
        for number, _ in self.live:
            value = self.graph.values[number]
            key = (value.nbytes, value.shape, value.dtype, module_of(self.graph, value), op_name(self.graph, value))
            alike[key] += 1
            first.setdefault(key, value)
        order = sorted(first, key=lambda key: -first[key].nbytes * alike[key])
        return [(first[key], alike[key]) for key in order[:count]]


def fullest(graph: Graph, plan: Plan) -> Moment:
    """The fullest moment of a step under a plan."""
    found = Moment(graph, 0, False, ())
    most = graph.standing

    def look(op: int, nbytes: int, holders: Holders, passing: Collection[int] | None) -> None:
        nonlocal found, most
        if nbytes > most:
            most = nbytes
            found = Moment(graph, op, passing is not None, tuple(_live(graph, plan, holders, passing or ())))

    Simulator(graph).run(plan, look=look)
    return found


def module_of(graph: Graph, value: Value) -> str:
    """The path of the module that made a value."""
    return "" if value.made_by is None else graph.calls[graph.ops[value.made_by].call].path


def module_at(graph: Graph, number: int) -> str:
    """The path of the module that an op runs in; for one of the backward pass, of what it asked for last."""
    op = graph.ops[number]
    if not op.backward:
        return graph.calls[op.call].path
    asked = [demand for demand in graph.demands if demand.before <= number]
    return module_of(graph, graph.values[asked[-1].value]) if asked else ""


def op_name(graph: Graph, value: Value) -> str:
    """The name of the op that made a value."""
    return "" if value.made_by is None else graph.ops[value.made_by].name


def _live(graph: Graph, plan: Plan, holders: Holders, passing: Collection[int]) -> Iterator[tuple[int, Share]]:
    for value in (v for v in range(len(graph.values)) if holders.holds(v)):
        yield value, _share(graph, plan, value, holders)
    yield from ((value, Share.RECOMPUTED) for value in passing)
    yield from ((value, Share.IN_USE) for value in holders.orphans())


def _share(graph: Graph, plan: Plan, number: int, holders: Holders) -> Share:
    maker = graph.values[number].made_by
    if maker is not None and graph.ops[maker].backward:
        return Share.BACKWARD
    if plan.keeps(number):
        return Share.KEPT
    evictable = graph.values[number].evictable
    return Share.RECOMPUTED if evictable and not holders.used(number) else Share.IN_USE
