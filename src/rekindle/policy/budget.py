"""The least recomputation that fits a byte budget.

Problem: choose what to keep, what to recompute and when, so that no moment of the step has more bytes live than the
budget, and the ops that are repeated take the fewest seconds.
Source: prices per byte (`policy.cuts`) within frames that break long recomputations (`policy.frames`), each tried on
the simulator (`graph.timeline`); between two neighbouring prices layers go from one to the other, the last ones first.
The lower bound: whatever the schedule, what is live at one moment and what is repeated after it are a cut.
Regime: thousands of ops take seconds. Candidates are made without looking at the budget and tried from the one that
recomputes least on, so that a larger budget never recomputes more.
Known gaps: one schedule has one price for all layers, or two. The bound looks at one moment at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from rekindle._errors import BudgetInfeasible
from rekindle.graph import Forecast, Graph, Plan, Simulator, Timeline, fullest, simulate
from rekindle.policy.cuts import Corner, Cuts
from rekindle.policy.frames import Frame, Sites
from rekindle.policy.refusal import refusal
from rekindle.policy.schedule import schedule

_CORNERS = 32  # prices tried in each frame
_HALVINGS = 8  # of the way from one price to the next
_MOMENTS = 4  # for which the lower bound is computed


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
        self._corners: dict[tuple[int, ...], list[Corner]] = {}
        keep_all = Plan(frozenset(self._wanted) - self._barred)
        self._everything = _Candidate(keep_all, simulate(graph, keep_all))
        self._bare = self.simulator.bare()

    @property
    def full(self) -> int:
        """The budget from which nothing is recomputed."""
        return self._everything.timeline.peak

    def plan(self, budget: int) -> Plan:
        """The plan with the least recomputation that fits.

        Raises:
            BudgetInfeasible: none fits.
        """
        found = self._find(budget)
        if found is None:
            raise self._infeasible(budget)
        timeline = found.timeline
        forecast = Forecast(budget, timeline.peak, timeline.seconds, self.bound(budget))
        return replace(found.plan, forecast=forecast, graph=self.graph)

    def floor(self) -> int:
        """The smallest budget for which there is a plan."""
        return min(self._least(frame) for frame in self._frames)

    def bound(self, budget: int) -> float:
        """Seconds of recomputation that no plan within the budget does without."""
        live = self._everything.timeline.live
        moments = sorted(range(len(live)), key=lambda number: -live[number])
        bound = 0.0
        for number in moments[:: max(1, len(moments) // 256)][:_MOMENTS]:
            bound = max(bound, self._bound_at(number, budget))
        return bound

    # -- search ------------------------------------------------------------------------------------------------------

    def _infeasible(self, budget: int) -> BudgetInfeasible:
        floor = self.floor()
        found = self._find(floor)
        plan = found.plan if found is not None else Plan(self._must)
        return BudgetInfeasible(refusal(budget, floor, fullest(self.graph, plan)))

    def _find(self, budget: int) -> _Candidate | None:
        if self.full <= budget:
            return self._everything
        best: _Candidate | None = None
        for whole in (True, False):  # frames that hold all their cuts recompute less
            for frame in self._frames:
                if (frame.held[-1] == frame.cuts) is whole:
                    best = self._search(frame, budget, best)
            if best is not None:
                return best
        return best

    def _search(self, frame: Frame, budget: int, best: _Candidate | None) -> _Candidate | None:
        """The best plan in a frame, if it is better than `best`."""
        corners = self._corners_of(frame)
        for index in range(len(corners) - 1, -1, -1):
            corner = corners[index]
            if best is not None and corner.seconds >= best.timeline.seconds:
                break
            found = self._try(frame, corner.kept, budget)
            if found is None:
                continue
            best = _better(found, best)
            if index + 1 < len(corners) and (best is None or corners[index + 1].seconds < best.timeline.seconds):
                best = _better(self._between(frame, corner, corners[index + 1], budget), best)
            break
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
        for reuse in (True, False):
            plan = schedule(self.simulator, self._sites, frame, kept | self._held(frame), reuse)
            timeline = self.simulator.run(plan, budget)
            if timeline is not None:
                return _Candidate(plan, timeline)
        return None

    def _least(self, frame: Frame) -> int:
        plan = schedule(self.simulator, self._sites, frame, self._held(frame), False)
        return simulate(self.graph, plan).peak

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

    def _bound_at(self, number: int, budget: int) -> float:
        """Seconds that must be repeated after op `number`, because not more than `budget` can be live at it."""
        wanted = sorted({d.value for d in self.graph.demands if d.before > number} & set(self._wanted))
        running = {d.value for d in self.graph.demands if d.before <= number < d.until}
        values = self.graph.values
        made = {v.number for v in values if v.made_by is not None and v.made_by <= number}
        free = frozenset(v.number for v in values if v.number in made and (v.dropped is None or v.dropped > number))
        network = Cuts(self.graph, [v for v in wanted if v in made], free | running, self._barred & made - free)
        room = budget - self._bare[number] - sum(values[v].nbytes for v in running - free if values[v].evictable)
        corners = network.corners(_CORNERS)
        if room < corners[0].nbytes:
            return corners[0].seconds
        for low, high in pairwise(corners):
            if low.nbytes <= room < high.nbytes:
                slope = (high.seconds - low.seconds) / (high.nbytes - low.nbytes)
                return low.seconds + slope * (room - low.nbytes)
        return 0.0


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
