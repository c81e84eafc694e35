"""Makes plans from recorded steps, and again when a step goes otherwise than its plan said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low
from types import MappingProxyType

from rekindle.graph import Graph, Op, Plan
from rekindle.policy import Planner, PolicyLike, decider_of, make_plan
from rekindle.report import planning, telling
from rekindle.runtime.follow import Follower, PlanCache, PlannedStep, kind_of
from rekindle.runtime.room import kept_back

_OFF = 0.02  # of the predicted peak; when the measured one is further away, the step is planned again
_MOST_RECORDED = 4  # steps of one kind that are recorded


class Learner:
    """The plans of a session, and whether the next step is to be recorded for one.

    A plan that the user gives is obeyed as it is: nothing is recorded, and a step that is not the planned one refused.
    With a budget, a kind of step is recorded twice at least: the first step warms up caches and libraries, and ops look
    slower than they are. Identical layers repeat the same ops, which are taken to need the same time: on a busy machine
    some of them look several times slower than others. What it takes to repeat an op is learned from the repeats in
    recorded steps. What a planned step had live beyond its plan is counted as standing when it is planned again.
    """

    def __init__(self, policy: PolicyLike | None, budget: int | None, plan: Plan | None = None) -> None:
        self.records = plan is None
        self.plans = PlanCache()
        self._policy = policy
        self._budget = budget
        self._given = plan
        if plan is not None and plan.graph is not None:
            self.plans.add(plan.graph, plan)
        self._on_the_go = policy is not None and decider_of(policy) is not None
        self._kinds: dict[int, _Kind] = {}

    def follow(self) -> Follower | None:
        """A follower for the step that begins now; None if nothing is planned."""
        if self._on_the_go or (self._policy is None and self._budget is None and self._given is None):
            return None
        if self._policy is None and not self.plans.planned:
            return None
        return self.plans.follow(refuses=self._given is not None)

    def learn(
        self,
        graph: Graph,
        peak: int,
        followed: PlannedStep | None,
        held: frozenset[int] = frozenset(),
        repeats: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        """Plan for the step that has just been recorded. `peak` is the most bytes that were live in it, `followed` the
        plan that was followed to its end, `held` the values that autograd still has saved, and `repeats` the seconds
        that ops took which were repeated."""
        again = False
        if self._policy is not None and not self._on_the_go:
            graph = _evened(graph)
            self.plans.add(graph, make_plan(self._policy, graph))
        elif self._budget is not None and self._policy is None and _is_whole(graph, held):
            again = self._fit(graph, peak, followed, self._budget, repeats)
        self.records = again

    def ended(self, follower: Follower | None, peak: int) -> None:
        """Note how a step went that followed plans, and the most bytes that were live in it."""
        if follower is None or self._given is not None:
            return
        if follower.departed:
            self.records = True
        elif self._budget is not None and peak > self._budget and follower.step is not None:
            kind = self._kinds.get(follower.step.kind)
            self.records = kind is not None and kind.recorded < _MOST_RECORDED

    def _fit(
        self, graph: Graph, peak: int, followed: PlannedStep | None, budget: int, repeats: Mapping[int, float]
    ) -> bool:
        """Plan for a budget. Returns whether the next step is to be recorded too."""
        number = kind_of(graph)
        kind = self._kinds.setdefault(number, _Kind())
        kind.recorded += 1
        for op, seconds in repeats.items():
            kind.repeats[_look_of(graph.ops[op], graph)].append(seconds)
        before, off = self.plans.find(number), False
        if before is not None:
            graph = _quicker(before.graph, graph)
        graph = _evened(graph)
        forecast = before.plan.forecast if before is not None and followed is before else None
        if forecast is not None:
            off = abs(peak - forecast.peak) > _OFF * forecast.peak or peak > budget
            kind.excess = max(0, kind.excess + peak - forecast.peak) if off else kind.excess
        repeated = _as_repeated(graph, kind.repeats)
        with telling(planning(graph, budget)):
            plan = Planner(replace(repeated, standing=graph.standing + kind.excess)).find(budget - kept_back(budget))
        if plan is None:
            self.plans.forget(number)  # a plan that was too full, too: it goes on line, or not at all
            return False
        self.plans.add(graph, plan)
        known = {step.kind for step in self.plans.planned}
        self._kinds = {number: kind for number, kind in self._kinds.items() if number in known}
        return kind.recorded < 2 or (off and kind.recorded < _MOST_RECORDED)


@dataclass(slots=True)
class _Kind:
    """What is known of a kind of step beside its plan.

    Attributes:
        recorded: how often it was recorded.
        excess: bytes that plans overlooked.
        repeats: the seconds of ops that were repeated, by what they look like.
    """

    recorded: int = 0
    excess: int = 0
    repeats: defaultdict[Hashable, list[float]] = field(default_factory=lambda: defaultdict(list))


def _is_whole(graph: Graph, held: frozenset[int]) -> bool:
    """Whether the backward pass was recorded too: it asked for more than what autograd still has saved beside that.
    What is neither asked for nor `held` never will be: its nodes are gone."""
    asked = {demand.value for demand in graph.demands}
    saved = [value for value in graph.values if value.saved_in and value.evictable and value.overwritten is None]
    awaited = sum(value.nbytes for value in saved if value.number in held and value.number not in asked)
    return sum(value.nbytes for value in saved if value.number in asked) > awaited


def _quicker(one: Graph, other: Graph) -> Graph:
    """`other` with the seconds of whichever ran an op faster: what disturbs makes it slower, never faster."""
    if [op.name for op in one.ops] != [op.name for op in other.ops]:
        return other
    ops = (replace(op, seconds=min(op.seconds, old.seconds)) for old, op in zip(one.ops, other.ops, strict=True))
    return replace(other, ops=tuple(ops))


def _evened(graph: Graph) -> Graph:
    """`graph` with the seconds that are usual among ops that look alike, of which few were disturbed."""
    alike: dict[Hashable, list[float]] = defaultdict(list)
    looks = [_look_of(op, graph) for op in graph.ops]
    for op, look in zip(graph.ops, looks, strict=True):
        alike[look].append(op.seconds)
    usual = {look: median_low(seconds) for look, seconds in alike.items()}
    return replace(
        graph, ops=tuple(replace(op, seconds=usual[look]) for op, look in zip(graph.ops, looks, strict=True))
    )


def _as_repeated(graph: Graph, repeats: Mapping[Hashable, Sequence[float]]) -> Graph:
    """`graph` with the seconds that it takes to repeat its ops. What they read has left the caches by then: those that
    move bytes take up to twice as long. Others than were repeated are taken to be as much slower as those were."""
    looks = [None if op.backward else _look_of(op, graph) for op in graph.ops]
    usual = {look: median_low(seconds) for look, seconds in repeats.items()}
    known = [(op.seconds, usual[look]) for op, look in zip(graph.ops, looks, strict=True) if look in usual]
    first = sum(seconds for seconds, _ in known)
    slower = sum(seconds for _, seconds in known) / first if first else 1.0
    ops = (
        op if look is None else replace(op, seconds=usual.get(look, slower * op.seconds))
        for op, look in zip(graph.ops, looks, strict=True)
    )
    return replace(graph, ops=tuple(ops))


def _look_of(op: Op, graph: Graph) -> Hashable:
    """What an op has in common with those that take as long: its name, and the geometry of what it reads and makes."""
    values = [graph.values[value] for value in (*op.inputs, *op.outputs)]
    geometry = tuple((value.shape, value.nbytes, value.dtype, value.device) for value in values)
    return op.name, op.backward, len(op.inputs), geometry
