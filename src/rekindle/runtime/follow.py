"""Obeys plans: matches the running stream of activations to that of a planned step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.graph import Graph, Plan

_MOST_PLANS = 16


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """A plan laid out along the stream it was made for.

    Attributes:
        plan: the plan.
        names: the op that made each evictable activation, in the order made.
        keeps: whether the plan keeps it.
        prefixes: hash of the stream before each position, and of all of it.
    """

    plan: Plan
    names: tuple[str, ...]
    keeps: tuple[bool, ...]
    prefixes: tuple[int, ...]

    @classmethod
    def of(cls, graph: Graph, plan: Plan) -> PlannedStep:
        """Lay a plan out along the stream of its graph."""
        stream = [(op.name, value) for op in graph.ops for value in op.outputs if graph.values[value].evictable]
        names = tuple(name for name, _ in stream)
        prefixes = [0]
        for name in names:
            prefixes.append(hash((prefixes[-1], name)))
        return cls(plan, names, tuple(plan.keeps(value) for _, value in stream), tuple(prefixes))


class Follower:
    """Says for each activation of a step whether the plan keeps it.

    A stream that departs from its plan is looked up among the other plans that began alike. If there is none, what
    autograd saves from there on is held as plain PyTorch would: more memory, never wrong.
    """

    def __init__(self, planned: Sequence[PlannedStep]) -> None:
        self.departed = not planned
        self._planned = planned
        self._step = planned[0] if planned else None
        self._position = 0

    def made(self, name: str) -> bool:
        """Whether the next activation of the stream is kept; `name` is the op that made it."""
        step = self._step
        if step is None:
            return False
        position = self._position
        if position >= len(step.names) or step.names[position] != name:
            step = self._step = self._other(position, name)
            if step is None:
                self.departed = True
                return False
        self._position = position + 1
        return step.keeps[position]

    def _other(self, position: int, name: str) -> PlannedStep | None:
        assert self._step is not None
        prefix = self._step.prefixes[position]
        for step in self._planned:
            if position < len(step.names) and step.prefixes[position] == prefix and step.names[position] == name:
                return step
        return None


class PlanCache:
    """The plans of a session, the newest first."""

    def __init__(self) -> None:
        self.planned: list[PlannedStep] = []

    def add(self, graph: Graph, plan: Plan) -> None:
        """Remember the plan of a stream; it replaces an older one of the same stream."""
        step = PlannedStep.of(graph, plan)
        others = [other for other in self.planned if other.names != step.names]
        self.planned = [step, *others][:_MOST_PLANS]

    def follow(self) -> Follower:
        """A follower for the step that begins now."""
        return Follower(tuple(self.planned))
