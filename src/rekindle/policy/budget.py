"""The least recomputation that fits a byte budget.

Problem: choose what to keep, what to recompute and when, so that no moment of the step has more bytes live than the
budget, and the ops that are repeated take the fewest seconds.
Source: the lower bound comes first: whatever the schedule, what is live at one moment and what is repeated after it
are a cut (`policy.cuts`), and integer programming tells what is best held there (`policy.moments`). Where that is too
much at another moment, that one is taken in: a cutting-plane method, in which each answer is also a plan to begin with.
Moments that are fuller than their neighbours (crests) are looked at together too: early in the backward pass they prove
much that neither does alone.
If none comes near the bound, prices per byte within frames that break long recomputations (`policy.frames`), each tried
on the simulator (`graph.timeline`); between two neighbouring prices layers go from one to the other, the last ones
first. What is found is polished (`policy.polish`).
Regime: thousands of ops take seconds. For tiny steps all budgets are planned for at once, so that a larger one never
recomputes more; for others that is so as far as measured.
Known gaps: local optima. The bound looks at three moments at most, and not at what is live while ops are replayed: it
is loose near the floor. At the very floor plans are far from the bound, and only as good as one polish makes them.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property

from rekindle._errors import BudgetInfeasible
from rekindle.graph import Forecast, Graph, Plan, Simulator, Timeline, fullest
from rekindle.policy.cuts import Corner, Cuts
from rekindle.policy.frames import Frame, Sites
from rekindle.policy.moments import need_at
from rekindle.policy.polish import Polisher
from rekindle.policy.refusal import refusal
from rekindle.policy.schedule import FORWARD, Since, held_once_asked_for, hold, schedule

_CORNERS = 32  # prices tried in each frame
_LOWERINGS = 16  # times that less is held in the lowest plan known, to have one below it
_FEW = 100  # ops of the forward pass; for a step with no more of them, all budgets are planned for at once
_FRONT = 1_200_000  # ops of the plans that are looked at for that
_STARTS = 8  # budgets from whose plans on the others are looked for
_POLISH = 100_000  # ops of the plans that are tried to polish one
_TRIES = 20, 300  # at least and at most, whatever the size of the step
_ONCE = 0.7  # of the forward pass; who repeats less needs no frames in which some ops are repeated twice
_TIGHT = 1.2  # times the bound; who is so far from it needs a frame that fits even if it keeps no more than its cuts
_DEEP = 6  # frames of which the lowest peak is looked for
_HALVINGS = 8  # of the way from one price to the next
_NEAR, _DONE = 1.005, 1.02  # times the bound: near enough, and near enough if nothing better is at hand
_PROMISING = 1  # plans that keep what is best kept at one moment, and are polished
_MORE = ((600, 1.005), (350, 1.11))  # at most so many forward ops, and so far from the bound, for another moment
_MOMENTS = 4  # of the fullest for which the lower bound is computed
_CRESTS = 8  # moments fuller than their neighbours for which it is
_TOGETHER = 3, 350, 1.03  # crests that are looked at together, for at most so many forward ops, so far from the bound


@dataclass(frozen=True, slots=True)
class Constraints:
    """What every plan has to obey.

    Attributes:
        must_keep: numbers of values that are kept in any case.
        must_recompute: numbers of values that are never kept.
        boundaries: numbers of ops before which recomputation ends: what crosses there is kept.
    """

    must_keep: frozenset[int] = frozenset()
    must_recompute: frozenset[int] = frozenset()
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Candidate:
    plan: Plan
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class _Limit:
    """What every plan within a budget has to obey.

    Attributes:
        bound: seconds that are repeated at least.
        moments: numbers of the ops during which that is so.
        since: from when on the best holds values that obeys at these moments; None if none was found.
        crests: numbers of the ops, fuller than those around them, that need most repeated each by itself.
    """

    bound: float
    moments: tuple[int, ...]
    since: Since | None
    crests: tuple[int, ...] = ()


class Planner:
    """All plans of one graph. Keeps what does not depend on the budget, for the next one."""

    def __init__(self, graph: Graph, constraints: Constraints | None = None) -> None:
        self.graph = graph
        self.simulator = Simulator(graph)
        constraints = constraints or Constraints()
        overwritten = frozenset(value.number for value in graph.values if value.overwritten is not None)
        self._wanted = sorted({d.value for d in graph.demands if graph.values[d.value].evictable})
        self._barred = overwritten | constraints.must_recompute
        self._sites = Sites(graph, self._wanted)
        crossing = frozenset[int]().union(*(self._sites.crossing[op] for op in constraints.boundaries))
        self._must = (constraints.must_keep | crossing) - self._barred
        self._frames = list(self._sites.frames())
        self._deep_frames = list(self._sites.deep_frames())
        self._all_frames = [*self._frames, *self._deep_frames]
        self._corners: dict[tuple[int, ...], list[Corner]] = {}
        keep_all = Plan(frozenset(self._wanted) - self._barred)
        self._everything = self._played(keep_all)
        self._all = frozenset(v.number for v in graph.values if v.evictable)
        self._polisher = Polisher(self.simulator, self._must, self._barred)
        self._small = len(graph.forward) <= _FEW
        self._bare = self.simulator.bare()
        self._high = self._everything.timeline.peak_at
        self._weights = self._bytes_at(self._high)
        self._first_asked = min((demand.before for demand in graph.demands), default=0)
        self._limits: dict[int, _Limit] = {}

    @property
    def full(self) -> int:
        """The budget from which nothing is recomputed."""
        return self._everything.timeline.peak

    def plan(self, budget: int) -> Plan:
        """The plan with the least recomputation that fits.

        Raises:
            BudgetInfeasible: none fits.
        """
        plan = self.find(budget)
        if plan is None and self.floor() <= budget:
            plan = self._promise(self._lowest, budget)
        if plan is None:
            raise self._infeasible(budget)
        return plan

    def find(self, budget: int) -> Plan | None:
        """The same, None if no plan is found; without a look for the floor, which takes several times as long."""
        if self.full <= budget:
            return self._promise(self._everything, budget)
        found = self._on_front(budget) if self._small else self._find(budget)
        return None if found is None else self._promise(found, budget)

    def _promise(self, found: _Candidate, budget: int) -> Plan:
        forecast = Forecast(budget, found.timeline.peak, found.timeline.seconds, self.bound(budget))
        return replace(found.plan, forecast=forecast, graph=self.graph)

    def _infeasible(self, budget: int) -> BudgetInfeasible:
        return BudgetInfeasible(refusal(budget, self.floor(), fullest(self.graph, self._lowest.plan)))

    def floor(self) -> int:
        """The smallest budget for which there is a plan."""
        return self._lowest.timeline.peak

    def _on_front(self, budget: int) -> _Candidate | None:
        fitting = [candidate for candidate in self._front if candidate.timeline.peak <= budget]
        return min(fitting, key=lambda candidate: candidate.timeline.seconds, default=None)

    @cached_property
    def _front(self) -> list[_Candidate]:
        """The best plans for all budgets."""
        tries = _FRONT // max(1, len(self.graph.ops))
        low, high = self._low.timeline.peak, self.full
        budgets = (low + (high - low) * place // _STARTS for place in range(1, _STARTS))
        between = (self._from_moments(budget) or self._find(budget) for budget in budgets)
        frames = (self._least(frame, holds) for frame in self._all_frames for holds in (self._all, None))
        starts = [self._everything, *(found for found in between if found is not None), self._low, *frames]
        drafts = self._polisher.front((start.plan for start in starts), tries)
        return [*(_Candidate(draft.plan, draft.timeline) for draft in drafts), *starts]

    @property
    def _lowest(self) -> _Candidate:
        """The plan with the lowest peak."""
        return min(self._front, key=lambda candidate: candidate.timeline.peak) if self._small else self._low

    @cached_property
    def _low(self) -> _Candidate:
        """A plan with a low peak: what frames need at least, and then what is found below that."""
        frames = sorted(self._all_frames, key=lambda frame: self._needs[frame])
        tried = [self._least(frame, holds) for frame in frames[:_DEEP] for holds in (self._all, None)]
        lowest = min((self._everything, *tried), key=lambda candidate: candidate.timeline.peak)
        for _ in range(_LOWERINGS):
            found = self._below(lowest.plan, lowest.timeline.peak - 1)
            if found is None:
                break
            lowest = found
        return self._polished(lowest, lowest.timeline.peak) or lowest

    def _below(self, lowest: Plan, budget: int) -> _Candidate | None:
        """A plan within a budget, by holding less in the lowest one known, or in what holds all or what is best held at
        the fullest moment."""
        draft = self._polisher.polish(lowest, budget, 0) or self._polisher.polish(self._everything.plan, budget, 0)
        since = None if draft is not None else self._limit(budget).since
        if since is not None:
            draft = self._polisher.polish(hold(self.simulator, since)[0], budget, 0)
        return None if draft is None else _Candidate(draft.plan, draft.timeline)

    @cached_property
    def _needs(self) -> dict[Frame, int]:
        """For each frame, the peak of the plan that keeps what crosses its cuts only."""
        return {frame: self._least(frame, None).timeline.peak for frame in self._all_frames}

    def bound(self, budget: int) -> float:
        """Seconds of recomputation that no plan within the budget does without."""
        return self._limit(budget).bound

    def _limit(self, budget: int) -> _Limit:
        """The bound, and where it is from: one moment, until `_from_moments` takes more of them into account."""
        if budget not in self._limits:
            self._limits[budget] = self._at_the_fullest(budget)
        return self._limits[budget]

    def _at_the_fullest(self, budget: int) -> _Limit:
        live = self._everything.timeline.live
        crests, moments = self._fullest
        found = {number: self._at_moment(number, budget) for number in moments if live[number] > budget}
        needy = sorted((number for number in crests if found.get(number)), key=lambda number: -found[number])
        limit = _Limit(max(found.values(), default=0.0), (), None, tuple(needy[: _TOGETHER[0]]))
        if not limit.bound:
            return limit
        return self._at((max(found, key=found.__getitem__),), limit, budget)

    @cached_property
    def _fullest(self) -> tuple[list[int], list[int]]:
        """The moments with most live when all is kept: those fuller than their neighbours, and all that are looked
        at, in their order."""
        live = self._everything.timeline.live
        highest = sorted(range(len(live)), key=lambda number: -live[number])
        around = [0, *live, 0]
        crests = [number for number in highest if around[number] < live[number] >= around[number + 2]][:_CRESTS]
        return crests, sorted({*highest[:1], *highest[1 : 4 * _MOMENTS : 4], *crests})

    def _at(self, moments: tuple[int, ...], limit: _Limit, budget: int) -> _Limit:
        """The limit with what the step needs at some moments together."""
        need = need_at(self.simulator, moments, budget, self._bare, self._barred)
        bound = max(limit.bound, need.bound)
        if need.since is None:
            return replace(limit, bound=bound, moments=moments, since=None)
        since = {**need.since, **dict.fromkeys(self._there_anyway(min(moments)) | self._must, FORWARD)}
        since = held_once_asked_for(self.graph, since)
        since = {value: start for value, start in since.items() if value not in self._barred}
        return replace(limit, bound=bound, moments=moments, since=since)

    def _there_anyway(self, number: int) -> set[int]:
        """What is asked for by when an op runs, or is held then by others, so that keeping it takes no bytes there."""
        later = {d.value for d in self.graph.demands if d.before > number}
        running = {d.value for d in self.graph.demands if d.before <= number < d.until}
        return {v for v in self._wanted if v not in later or v in running or self._is_held(v, number)}

    # -- search ------------------------------------------------------------------------------------------------------

    def _find(self, budget: int) -> _Candidate | None:
        if budget < self.graph.standing:
            return None
        known = self._from_moments(budget)
        if known is not None and known.timeline.seconds <= _DONE * self._limit(budget).bound:
            return known
        if known is None and budget < self._low.timeline.peak:
            return None
        tight = known is None or known.timeline.seconds > _TIGHT * self._limit(budget).bound
        best: _Candidate | None = None
        for frame in self._frames:
            if not tight or self._needs[frame] <= budget:
                best = self._search(frame, budget, best)
        deep: _Candidate | None = None
        if best is None or best.timeline.seconds > _ONCE * sum(op.seconds for op in self.graph.forward):
            for frame in self._deep_frames:
                if not tight or self._needs[frame] <= budget:
                    deep = _better(self._try(frame, frozenset(), budget), deep)
        low = self._low if known is None else None
        for start in (best, deep, self._everything, low):
            known = _better(start and self._polished(start, budget), known)
        return known

    def _from_moments(self, budget: int) -> _Candidate | None:
        """The best plan from what is best held at the fullest moment, and if that is too much at others, there too."""
        best = self._in_frames(budget)
        for most, gap in _MORE[:1] if self._small else _MORE:
            limit = self._limit(budget)
            if limit.since is None or len(self.graph.forward) > most:
                break
            if best is not None and best.timeline.seconds <= gap * limit.bound:
                break
            timeline = self._played(hold(self.simulator, limit.since)[0]).timeline
            if timeline.peak <= budget or timeline.peak_at in limit.moments:
                break
            best = self._look_at((*limit.moments, timeline.peak_at), budget, best)
        limit, (_, most, gap) = self._limit(budget), _TOGETHER
        if len(limit.crests) < 2 or len(self.graph.forward) > most or self._small:
            return best
        if best is not None and best.timeline.seconds <= gap * limit.bound:
            return best
        return self._look_at(limit.crests, budget, best)

    def _look_at(self, moments: tuple[int, ...], budget: int, best: _Candidate | None) -> _Candidate | None:
        """The best plan, also of what is best held at some moments together, which then are what limits the budget."""
        self._limits[budget] = limit = self._at(moments, self._limit(budget), budget)
        if limit.since is None:
            return best
        plan, _ = hold(self.simulator, limit.since)
        return _better(self._polished(self._played(plan), budget), best)

    def _in_frames(self, budget: int) -> _Candidate | None:
        """The best plan that keeps what is best kept at the fullest moment."""
        limit = self._limit(budget)
        if limit.since is None:
            return None
        kept = frozenset(value for value, start in limit.since.items() if start == FORWARD)
        tried: list[_Candidate] = []
        for frame in self._frames:
            for holds in (self._all, None):
                plan = schedule(self.simulator, self._sites, frame, kept | self._held(frame), holds)
                found = self._played(plan)
                if found.timeline.peak <= budget and found.timeline.seconds <= _NEAR * limit.bound:
                    return found
                tried.append(found)
        tried.sort(key=lambda found: (max(budget, found.timeline.peak), found.timeline.seconds))
        best: _Candidate | None = None
        for start in tried[:_PROMISING]:
            best = _better(self._polished(start, budget), best)
        return best

    def _played(self, plan: Plan) -> _Candidate:
        timeline = self.simulator.run(plan)
        assert timeline is not None  # there is no limit
        return _Candidate(plan, timeline)

    def _polished(self, start: _Candidate, budget: int) -> _Candidate | None:
        least, most = _TRIES
        tries = max(least, min(most, _POLISH // max(1, len(self.graph.ops))))
        draft = self._polisher.polish(start.plan, budget, tries)
        return None if draft is None else _Candidate(draft.plan, draft.timeline)

    def _search(self, frame: Frame, budget: int, best: _Candidate | None) -> _Candidate | None:
        """The best plan in a frame, if it is better than `best`."""
        if best is not None and self._bound_in(frame, budget) >= best.timeline.seconds:
            return best
        corners = self._corners_of(frame)
        above: Corner | None = None
        for corner in reversed(corners):
            if best is not None and corner.seconds >= best.timeline.seconds:
                return best
            found = self._try(frame, corner.kept, budget)
            if found is None:
                above = corner
                continue
            best = _better(found, best)
            if above is not None and above.seconds < found.timeline.seconds:
                best = _better(self._between(frame, corner, above, budget), best)
            return best
        return best

    def _between(self, frame: Frame, low: Corner, high: Corner, budget: int) -> _Candidate | None:
        """The best plan with the cheaper treatment `high` for what the last ops make, and `low` for the rest."""
        made_by = self.simulator.made_by
        places = sorted({made_by[value] or 0 for value in low.kept ^ high.kept}, reverse=True)
        best: _Candidate | None = None
        fits, fails = 0, len(places)
        for _ in range(_HALVINGS):
            middle = (fits + fails) // 2
            if middle in (fits, fails):
                break
            place = places[middle - 1]
            kept = {v for v in low.kept if (made_by[v] or 0) < place} | {
                v for v in high.kept if (made_by[v] or 0) >= place
            }
            found = self._try(frame, frozenset(kept), budget)
            if found is None:
                fails = middle
            else:
                fits, best = middle, _better(found, best)
        return best

    def _try(self, frame: Frame, kept: frozenset[int], budget: int) -> _Candidate | None:
        """The plan that keeps `kept` and holds all that a replay makes, or if that does not fit what is asked for."""
        kept = kept | self._held(frame)
        if self._bare[self._high] + sum(self._weights[value] for value in kept) > budget:
            return None
        for holds in (self._all, None):
            plan = schedule(self.simulator, self._sites, frame, kept, holds)
            timeline = self.simulator.run(plan, budget)
            if timeline is not None:
                return _Candidate(plan, timeline)
        return None

    def _least(self, frame: Frame, holds: Container[int] | None) -> _Candidate:
        plan = schedule(self.simulator, self._sites, frame, self._held(frame), holds)
        return self._played(plan)

    def _held(self, frame: Frame) -> frozenset[int]:
        crossing = frozenset[int]().union(*(self._sites.crossing[cut] for cut in frame.held[-1]))
        return (crossing - self._barred) | self._must

    def _corners_of(self, frame: Frame) -> list[Corner]:
        cuts = frame.held[-1]
        if cuts not in self._corners:
            network = Cuts(self.graph, self._wanted, self._held(frame), self._barred)
            self._corners[cuts] = network.corners(_CORNERS)
        return self._corners[cuts]

    # -- what cannot be helped ---------------------------------------------------------------------------------------

    def _at_moment(self, number: int, budget: int) -> float:
        """Seconds that are repeated at least after op `number`, as far as the curve of what is kept there tells."""
        demands, values = self.graph.demands, self.graph.values
        later = {d.value for d in demands if d.before > number} & set(self._wanted)
        running = {d.value for d in demands if d.before <= number < d.until} & set(self._wanted)
        made = {v.number for v in values if v.made_by is not None and v.made_by <= number}
        free = {v for v in made if self._is_held(v, number)} | running
        room = budget - self._bare[number]
        room -= sum(values[v].nbytes for v in running if not self._is_held(v, number) and values[v].overwritten is None)
        barred = {v for v in self._barred & made if (op := values[v].overwritten) is None or op <= number}
        if number >= self._first_asked:
            barred.clear()  # what was replayed may be held
        return Cuts(self.graph, sorted(later & made), free, barred).bound(room)

    def _bound_in(self, frame: Frame, budget: int) -> float:
        """Seconds that every plan repeats that keeps what crosses the cuts of a frame."""
        held = self._held(frame)
        room = budget - self._bare[self._high] - sum(self._weights[value] for value in held)
        if room < 0:
            return math.inf
        free = held | {value for value in self._wanted if not self._weights[value]}
        return Cuts(self.graph, self._wanted, free, self._barred - free).bound(room)

    def _is_held(self, value: int, number: int) -> bool:
        """Whether user code holds a value while an op runs."""
        end = self.simulator.ends[value]
        return end is None or end > number

    def _bytes_at(self, number: int) -> list[int]:
        """For each value, the bytes that keeping it adds while op `number` runs."""
        last = {demand.value: demand.before for demand in self.graph.demands}
        return [
            value.nbytes
            if value.made_by is not None
            and value.made_by < number
            and last.get(value.number, -1) > number
            and not self._is_held(value.number, number)
            else 0
            for value in self.graph.values
        ]


def least_recompute(graph: Graph, budget: int, constraints: Constraints | None = None) -> Plan:
    """The plan for a step that has at most `budget` bytes live at any moment, and recomputes least.

    Raises:
        BudgetInfeasible: there is none.
    """
    return Planner(graph, constraints).plan(budget)


def _better(one: _Candidate | None, other: _Candidate | None) -> _Candidate | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda candidate: candidate.timeline.seconds)
