"""What a plan could do otherwise: hold values earlier, and repeat less, or later, and have fewer bytes live.

Problem: which small changes of a plan are worth a try, without playing each of them.
Source: an op is repeated for nothing but what it dominates in the replay of a demand: held, its results save the
seconds of its subtree in the dominator tree (Cooper, Harvey and Kennedy, 2001). What it takes to make a value once more
is what is not there at that demand.
Regime: estimates, each as if it were the only change. Linear in what is replayed, but for the depth of the trees.
Known gaps: bytes are counted from one demand to the next; what happens within a replay only its simulation shows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from rekindle.graph import Plan, Timeline
from rekindle.graph.timeline import Simulator
from rekindle.policy.schedule import FORWARD, NEVER, Since


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan, what holds in it from when on, which demands use each value, and how the step goes under it."""

    since: Since
    uses: dict[int, list[int]]
    plan: Plan
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Move:
    """A change of when values are held.

    Attributes:
        changes: values, and from when on they are held instead.
        seconds: what it saves if they are held earlier, or costs if later.
        spans: from which op to which, without it, how many bytes more, or fewer, are live.
    """

    changes: tuple[tuple[int, int], ...]
    seconds: float
    spans: tuple[tuple[int, int, int], ...]


class Moves:
    """The moves from one draft."""

    def __init__(self, simulator: Simulator, draft: Draft, must: Collection[int], barred: Collection[int]) -> None:
        """`must` be kept; `barred` must not."""
        self._simulator = simulator
        self._graph = simulator.graph
        self._draft = draft
        self._must = must
        self._barred = barred

    def earlier(self) -> Iterator[Move]:
        """Holding the results of an op that is repeated from an earlier demand on, or from the forward pass."""
        needed: dict[int, set[int]] = {}
        saved: dict[int, list[tuple[int, float]]] = {}
        for position, ops in enumerate(self._draft.timeline.replays):
            for number, seconds in self._subtrees(position, ops, needed).items():
                saved.setdefault(number, []).append((position, seconds))
        for number, replays in saved.items():
            values = needed.get(number, ())
            if not values or any(self._graph.values[value].overwritten is not None for value in values):
                continue
            left = sum(seconds for _, seconds in replays)
            for index, start in enumerate((FORWARD, *(position for position, _ in replays[:-1]))):
                left -= replays[index - 1][1] if index else 0.0
                if left > 0 and not (start == FORWARD and any(value in self._barred for value in values)):
                    yield self._earlier(values, start, replays[index][0], replays[-1][0], left)

    def _earlier(self, values: Collection[int], start: int, first: int, last: int, seconds: float) -> Move:
        since = self._draft.since
        late = [value for value in sorted(values) if since.get(value, NEVER) > start]
        spans = [self._span(value, start, first if since.get(value, NEVER) <= first else last) for value in late]
        return Move(tuple((value, start) for value in late), seconds, tuple(span for span in spans if span[2]))

    def later(self) -> Iterator[Move]:
        """Holding a value not before the demand that uses it next, which then makes it once more."""
        for value, start in self._draft.since.items():
            uses = self._draft.uses.get(value, ())
            index = bisect_right(uses, start)
            if index == len(uses) or (start == FORWARD and value in self._must):
                continue
            if start != FORWARD and self._graph.demands[start].value == value:
                continue  # it is made anyway, and usually asked for again soon
            span = self._span(value, start, uses[index])
            if span[2]:
                then = uses[index] if index + 1 < len(uses) else NEVER
                yield Move(((value, then),), self._once_more(value, uses[index]), (span,))

    def _subtrees(self, position: int, ops: Collection[int], needed: dict[int, set[int]]) -> dict[int, float]:
        """For each op of a replay, the seconds of what is repeated for it alone, with its own. Adds to `needed` which
        values of each op are."""
        if not ops:
            return {}
        made_by, sources = self._simulator.made_by, self._simulator.sources
        target = self._graph.demands[position].value
        root = max(ops)
        parents = {root: root}
        needed.setdefault(root, set()).add(target)
        seconds = {number: self._graph.ops[number].seconds for number in ops}
        for number in sorted(ops, reverse=True):
            parents.setdefault(number, root)  # read by none of them, as far as can be told
            for source in sources[number]:
                maker = made_by[source]
                if maker in seconds and not self._is_there(source, position):
                    needed.setdefault(maker, set()).add(source)
                    parents[maker] = _common(parents[maker], number, parents) if maker in parents else number
        for number in sorted(parents)[:-1]:
            seconds[parents[number]] += seconds[number]
        return {number: seconds[number] for number in parents}

    def _once_more(self, value: int, position: int) -> float:
        """Seconds to make a value for a demand, beside what is replayed for it anyway."""
        made_by, sources = self._simulator.made_by, self._simulator.sources
        done = set(self._draft.timeline.replays[position])
        seconds, stack = 0.0, [value]
        while stack:
            maker = made_by[stack.pop()]
            if maker is None or maker in done:
                continue
            done.add(maker)
            seconds += self._graph.ops[maker].seconds
            stack += [v for v in sources[maker] if v != value and not self._is_there(v, position)]
        return seconds

    def _is_there(self, value: int, position: int) -> bool:
        """Whether a value is held when a demand is about to be met."""
        if self._draft.since.get(value, NEVER) < position and self._draft.uses.get(value, (-1,))[-1] >= position:
            return True
        before, gone = self._graph.demands[position].before, self._graph.values[value].overwritten
        end = self._simulator.ends[value]
        return (end is None or end > before) and (gone is None or gone >= before)

    def _span(self, value: int, start: int, stop: int) -> tuple[int, int, int]:
        """What holding a value from one demand, or the forward pass, to another takes. User code may hold it anyway."""
        demands, maker, end = self._graph.demands, self._simulator.made_by[value], self._simulator.ends[value]
        assert maker is not None
        first = maker if start == FORWARD else demands[start].before
        if end is not None:
            first = max(first, end)
        last = demands[stop].before + 1
        return first, last, 0 if end is None or first >= last else self._simulator.nbytes[value]


def _common(one: int, other: int, parents: dict[int, int]) -> int:
    """The nearest op that dominates both. What dominates an op has a larger number."""
    while one != other:
        if one < other:
            one = parents[one]
        else:
            other = parents[other]
    return one
