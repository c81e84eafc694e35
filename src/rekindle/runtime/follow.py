"""Obeys plans: matches the running stream of activations, and of what autograd asks for, to that of a planned step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rekindle._bytes import format_bytes
from rekindle._errors import PlanMismatch
from rekindle.graph import Graph, Plan, Turn
from rekindle.graph.timeline import default_turns
from rekindle.record.activation import Activation, Op
from rekindle.record.schema import go_by_data
from rekindle.runtime.replay import missing_ops

Stream: TypeAlias = tuple[tuple[str, int], ...]
"""The evictable activations of a step in the order made: the op that made each, and its bytes."""

_MOST_PLANS = 16
_SMALL = 1 << 15  # bytes; what is kept back of a budget has room for them
_MOST_SKIPPED = 64  # demands in a row that may be missing


@dataclass(frozen=True, slots=True, eq=False)
class PlannedStep:
    """A plan laid out along the stream it was made for: activations are known by their position in it.

    Attributes:
        graph: the step that it was made for.
        plan: the plan.
        names: the op that made each evictable activation, in the order made, and its bytes if the plan tells its graph.
        keeps: whether the plan keeps it.
        prefixes: hash of the stream before each position, and of all of it.
        asked: which activation autograd asks for, demand by demand.
        turns: what is retained and let go of then; empty if the plan leaves that to the runtime.
        forward: how many activations are made before the first is asked for.
        restful: whether nobody has to look at it: it is what plain PyTorch does, and its sizes do not depend on data.
        whole: whether it is laid out to the end of the step. If not, what runs after the modules is not known, such as
            the user's loss: what autograd saves there is held, and goes when there is no room.
    """

    graph: Graph
    plan: Plan
    names: Stream
    keeps: tuple[bool, ...]
    prefixes: tuple[int, ...]
    asked: tuple[int, ...]
    turns: tuple[Turn, ...]
    forward: int
    restful: bool
    whole: bool = True

    @classmethod
    def of(cls, graph: Graph, plan: Plan, whole: bool = True) -> PlannedStep:
        """Lay a plan out along the stream of its graph; not beyond what its modules make, if it is not the `whole`."""
        stream = _evictable(graph)
        names = stream_of(graph)
        if plan.graph is None:
            names = tuple((name, 0) for name, _ in names)
        if not whole:
            names = names[: sum(graph.ops[graph.values[value].made_by or 0].call != 0 for value in stream)]
        prefixes = [0]
        for name in names:
            prefixes.append(hash((prefixes[-1], name)))
        position = {value: index for index, value in enumerate(stream)}
        asked: list[int] = []
        turns: list[Turn] = []
        for demand, turn in zip(graph.demands, _turns_of(graph, plan), strict=False):
            if demand.value in position:
                asked.append(position[demand.value])
                retained = frozenset(position[value] for value in turn.retained)
                turns.append(Turn(retained, tuple(position[value] for value in turn.dropped)))
        keeps = tuple(plan.keeps(value) for value in stream)
        first = next((demand.before for demand in graph.demands if demand.value in position), 0)
        forward = sum((graph.values[value].made_by or 0) < first for value in stream)
        restful = whole and _keeps_everything(graph, plan) and not go_by_data(graph)
        return cls(graph, plan, names, keeps, tuple(prefixes), tuple(asked), tuple(turns), forward, restful, whole)

    @property
    def kind(self) -> int:
        """What tells its step from others when it is over."""
        return kind_of(self.graph)


class Follower:
    """Says for each activation of a step whether the plan keeps it, and for each demand what is retained.

    A stream that departs from its plan is looked up among the other plans that began alike. If there is none, what
    autograd saves from there on is held as plain PyTorch would, and goes when there is no room: slower, never wrong.
    With `refuses`, it raises instead if that happens in the forward pass.
    """

    def __init__(self, planned: Sequence[PlannedStep], refuses: bool = False) -> None:
        self.departed = not planned
        self._refuses = refuses
        self.on_departure: Callable[[], None] | None = None
        self._planned = planned
        self._standing: int | None = None
        self.step = planned[0] if planned else None
        self._position = 0
        self._demand = 0
        self._makers: dict[int, weakref.ref[Op]] = {}

    def made(self, name: str, activation: Activation) -> bool:
        """Whether the next activation of the stream is kept; `name` is the op that made it."""
        step = self.step
        if step is None:
            return False
        position = self._position
        if position == len(step.names) and not step.whole:
            return False
        before = step
        if position >= len(step.names) or not _same(step, position, name, activation.nbytes):
            step = self.step = self._other(position, name, activation.nbytes)
            if step is None:
                if self._refuses and not self._demand:
                    raise _refusal(
                        before,
                        position,
                        f"{name} made {format_bytes(activation.nbytes)} in {activation.call.describe()}",
                    )
                self._depart()
                return False
            self._change(before, step)
        self._position = position + 1
        activation.position = position
        if activation.op is not None:
            self._makers[position] = weakref.ref(activation.op)
        return step.keeps[position]

    def holds(self, activation: Activation) -> bool:
        """Whether what autograd saves is held though no plan says so."""
        if self.departed or activation.position < 0:
            return True
        step = self.step
        return step is not None and not step.whole and self._position == len(step.names)

    @property
    def made_so_far(self) -> int:
        """How many activations of the stream are made."""
        return self._position

    def may_become(self, step: PlannedStep) -> bool:
        """Whether what is made so far is how `step` begins, and nothing was asked for yet."""
        if self.departed or self.step is None or self._demand or step not in self._planned:
            return False
        position = self._position
        return position < len(step.prefixes) and step.prefixes[position] == self.step.prefixes[position]

    def completed(self) -> PlannedStep | None:
        """The planned step that the whole stream was; None if it was none."""
        step = self.step
        return step if step is not None and not self.departed and self._position == len(step.names) else None

    def check(self, standing: int) -> None:
        """Choose among the plans by the bytes that stand, if nothing is made yet. Depart if none has room for them."""
        if self._position or self.step is None or self.departed:
            return
        self._standing = standing
        self.step = self._nearest(self._planned)
        if self.step is None:
            self._depart()

    def asked(self, activation: Activation) -> Turn | None:
        """What the plan says now that autograd asks for an activation; None if it says nothing."""
        step = self.step
        if step is None or not step.turns or self.departed:
            return None
        maker = self._makers.get(activation.position)
        if maker is None or maker() is not activation.op:
            return None  # it belongs to another step
        if self._refuses and not self._demand and self._position < step.forward:
            raise _refusal(step, self._position, "the backward pass began")
        try:
            demand = step.asked.index(activation.position, self._demand, self._demand + _MOST_SKIPPED)
        except ValueError:
            if step.whole or activation.position in step.asked:
                self._depart()
            return None  # else what comes after the modules asks for what they made
        for skipped in step.turns[self._demand : demand]:  # of what autograd holds itself
            self.drop(skipped)
        self._demand = demand + 1
        return step.turns[demand]

    def drop(self, turn: Turn) -> None:
        """Let go of what the plan wants no longer."""
        for position in turn.dropped:
            activation = self._at(position)
            if activation is None or activation.is_marked:
                continue
            activation.is_checkpoint = False  # else the node that asked would have it held again under `create_graph`
            if not activation.snapshot:  # that may be the only way back
                activation.release()

    def _at(self, position: int) -> Activation | None:
        maker = self._makers.get(position)
        op = maker() if maker is not None else None
        return next((made for made in op.results() if made.position == position), None) if op is not None else None

    def _depart(self) -> None:
        self.departed = True
        if self.on_departure is not None:
            self.on_departure()

    def _change(self, before: PlannedStep, step: PlannedStep) -> None:
        """Let go of what only the plan that was followed so far keeps. What only the other one keeps is held when it is
        read or saved again."""
        for position in range(self._position):
            keeps = step.keeps[position]
            activation = self._at(position) if keeps is not before.keeps[position] else None
            if activation is None or activation.is_marked:
                continue
            activation.is_checkpoint = keeps
            if not keeps and not activation.snapshot and missing_ops(activation).lost is None:
                activation.release()

    def _other(self, position: int, name: str, nbytes: int) -> PlannedStep | None:
        assert self.step is not None
        prefix = self.step.prefixes[position]
        alike = (step for step in self._planned if position < len(step.names) and step.prefixes[position] == prefix)
        return self._nearest(step for step in alike if _same(step, position, name, nbytes))

    def _nearest(self, steps: Iterable[PlannedStep]) -> PlannedStep | None:
        """The plan that was made for the bytes that stand, or nearly so; the newest of equals; None if none has room.

        Forward passes do not tell whether gradients are there, and a plan is made for one or the other.
        """
        standing = self._standing
        if standing is None:
            return next(iter(steps), None)
        fitting = (step for step in steps if _has_room(step, standing))
        return min(fitting, key=lambda step: abs(step.graph.standing - standing), default=None)


def _turns_of(graph: Graph, plan: Plan) -> tuple[Turn, ...]:
    """The turns of a plan. One for a budget that says nothing of them counts on each value to go when it was asked for
    last, which the ops that read it might outlast."""
    if plan.turns or plan.forecast is None:
        return plan.turns
    return tuple(Turn(dropped=turn.dropped) for turn in default_turns(graph))


def _keeps_everything(graph: Graph, plan: Plan) -> bool:
    """Whether a plan for a budget keeps all that plain PyTorch would, what is never asked for too."""
    if plan.forecast is None or plan.forecast.seconds or any(turn.retained for turn in plan.turns):
        return False
    return all(plan.keeps(value.number) for value in graph.evictable if value.saved_in)


def _has_room(step: PlannedStep, standing: int) -> bool:
    forecast = step.plan.forecast
    if forecast is None:
        return True
    more = standing - step.graph.standing
    return more <= _SMALL or forecast.peak + more <= forecast.budget


def _refusal(step: PlannedStep, position: int, came: str) -> PlanMismatch:
    """What is said of a step that is not the one that a plan was made for."""
    expected = "no more of them"
    if position < len(step.names):
        op = step.graph.ops[step.graph.values[_evictable(step.graph)[position]].made_by or 0]
        name, nbytes = step.names[position]
        where = step.graph.calls[op.call].path
        expected = (
            f"{name} to make {format_bytes(nbytes)} in {f'module {where!r}' if where else 'the outermost module'}"
        )
    return PlanMismatch(
        f"refusing a plan for another graph: at activation {position} the plan expects {expected}, but {came}. A plan "
        "holds for one model, one shape of inputs and one mode (train or eval, autocast, dtype). Plan this "
        "step with rekindle.Session(memory_budget=...) and save its session.plan."
    )


def _same(step: PlannedStep, position: int, name: str, nbytes: int) -> bool:
    known, size = step.names[position]
    return known == name and (size == nbytes or not size)


def stream_of(graph: Graph) -> Stream:
    """The stream of a recorded step."""
    values, ops = graph.values, graph.ops
    return tuple((ops[values[value].made_by or 0].name, values[value].nbytes) for value in _evictable(graph))


def kind_of(graph: Graph) -> int:
    """What tells a recorded step from others: its stream, and how often its backward pass writes to what was there.

    A step that adds to gradients has the stream of one that makes them, and needs other bytes.
    """
    return hash((stream_of(graph), sum(op.backward and not op.outputs for op in graph.ops)))


def _evictable(graph: Graph) -> list[int]:
    """What it consists of, by the numbers of the values."""
    return [value for op in graph.ops for value in op.outputs if graph.values[value].evictable]


class PlanCache:
    """The plans of a session, the newest first."""

    def __init__(self) -> None:
        self.planned: list[PlannedStep] = []

    def add(self, graph: Graph, plan: Plan) -> None:
        """Remember the plan of a step; it replaces an older one of the same kind."""
        step = PlannedStep.of(graph, plan)
        others = [other for other in self.planned if other.kind != step.kind]
        self.planned = [step, *others][:_MOST_PLANS]

    def forget(self, kind: int) -> None:
        """Forget the plan of a kind of step."""
        self.planned = [step for step in self.planned if step.kind != kind]

    def find(self, kind: int) -> PlannedStep | None:
        """The plan of a kind of step, if there is one."""
        return next((step for step in self.planned if step.kind == kind), None)

    def follow(self, refuses: bool = False) -> Follower:
        """A follower for the step that begins now; with `refuses`, one that takes no other forward pass."""
        return Follower(tuple(self.planned), refuses)
