"""Small changes that make a plan better, each confirmed by playing the step.

Problem: a plan that treats all layers alike leaves bytes unused: between two prices, and after the fullest moment.
Source: a greedy knapsack over many moments at once. Moves that save recomputation are taken by what they save per byte
as long as there is room for them; where there is not, those that cost least per byte make it. All that were taken are
tried together, then the best half of them, and so on. For small steps instead Pareto local search (Paquete, Chiarandini
and Stützle, 2004): every single change of every plan that is not dominated, which finds all budgets' plans at once.
Regime: each try is an outlook (`policy.outlook`); what is better is played. A few dozen tries bring large
steps within some percent of the bound; small steps are mostly solved.
Known gaps: a local optimum. What is estimated for moves that depend on each other is wrong, and those fail together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count

import numpy as np
from numpy.typing import NDArray

from rekindle.graph import Plan
from rekindle.graph.timeline import Simulator
from rekindle.policy.moves import Draft, Move, Moves
from rekindle.policy.outlook import Outlook, Outlooks
from rekindle.policy.schedule import FORWARD, NEVER, Since, hold, since_of

_LITTLE = 1e-4  # of the seconds; a move that saves less is not worth a try
_WORTH = 0.98  # of what is saved may be spent on making room for it
_BETTER = 1 - 1e-9
_PATIENCE = 32  # times the ops of the forward pass: plans whose neighbours bring nothing, one after the other
_MISSES = 200  # moves one after the other for which no room is found; the others save even less per byte
_RELIEFS = 16  # rounds in which room is made for what is over the budget


class Polisher:
    """Makes plans of one graph better."""

    def __init__(self, simulator: Simulator, must: Collection[int], barred: Collection[int]) -> None:
        """`must` be kept; `barred` must not."""
        self._simulator = simulator
        self._outlooks = Outlooks(simulator)
        self._must = must
        self._barred = barred
        values = simulator.graph.values
        self._free = [v.number for v in values if v.evictable and v.overwritten is None]

    def polish(self, plan: Plan, budget: int, tries: int) -> Draft | None:
        """A plan that fits the budget and recomputes no more than `plan`, if that fits; None if none is found."""
        best = self._relieved(self._draft(since_of(self._simulator.graph, plan)), budget)
        if best is None:
            return None
        failed: set[tuple[tuple[int, int], ...]] = set()
        while tries > 0:
            moves = Moves(self._simulator, best, self._must, self._barred)
            trades = _Packing(best, moves, budget).trades(failed)
            while trades and tries > 0:
                tries -= 1
                better = self._better(best, trades, budget)
                if better is not None:
                    best = better
                    failed.clear()
                    break
                if len(trades) == 1:
                    failed.add(trades[0][0].changes)
                    break
                trades = trades[: len(trades) // 2]
            if not trades:
                break
        return best

    def front(self, plans: Iterable[Plan], tries: int) -> list[Draft]:
        """Plans of which none has both a higher peak and more seconds than another, from `plans` on by single
        changes. First those of the front are changed, then those that are behind it, by how far."""
        front: list[tuple[Since, Outlook]] = []
        waiting: list[tuple[float, int, Since, Outlook]] = []
        order = count()
        patience = most = _PATIENCE * len(self._simulator.graph.forward)
        seen: set[frozenset[tuple[int, int]] | Outlook] = set()

        def add(since: Since) -> None:
            nonlocal tries, patience
            key = frozenset(since.items())
            if key in seen:
                return
            tries -= 1
            outlook = self._outlooks.of(since)
            seen.add(key)
            if outlook in seen:
                return  # what it holds otherwise makes no difference
            seen.add(outlook)
            peak, seconds = outlook.peak, outlook.seconds
            ahead = min((other.seconds for _, other in front if other.peak <= peak), default=math.inf)
            heappush(waiting, (max(0.0, seconds - ahead), next(order), since, outlook))
            if seconds < ahead:
                front[:] = [each for each in front if each[1].peak < peak or each[1].seconds < seconds]
                front.append((since, outlook))
                patience = most

        for plan in plans:
            add(since_of(self._simulator.graph, plan))
        while waiting and patience and tries > 0:
            patience -= 1
            _, _, since, outlook = heappop(waiting)
            for other in self._neighbours(since, outlook):
                add(other)
        return [self._draft(since) for since, _ in front]

    def _draft(self, since: Since) -> Draft:
        plan, uses = hold(self._simulator, since)
        timeline = self._simulator.run(plan)
        assert timeline is not None  # there is no limit
        return Draft(since, uses, plan, timeline)

    def _better(self, best: Draft, trades: list[list[Move]], budget: int) -> Draft | None:
        """The draft with some moves made, if it fits and repeats less."""
        since = _moved(best.since, (move for trade in trades for move in reversed(trade)))
        outlook = self._outlooks.of(since)
        if outlook.peak > budget or outlook.seconds >= best.timeline.seconds * _BETTER:
            return None
        return self._draft(since)

    def _relieved(self, draft: Draft, budget: int) -> Draft | None:
        """The draft, with less held where more is live than the budget; None if that is not enough."""
        for _ in range(_RELIEFS):
            if draft.timeline.peak <= budget:
                return draft
            moves = Moves(self._simulator, draft, self._must, self._barred)
            relief = _Packing(draft, moves, budget).relief()
            if not relief:
                return None
            draft = self._draft(_moved(draft.since, relief))
        return draft if draft.timeline.peak <= budget else None

    def _neighbours(self, since: Since, outlook: Outlook) -> Iterator[Since]:
        """All that differ in when one value is held."""
        makes: dict[int, list[int]] = {}
        for position, ops in enumerate(outlook.replays):
            for number in ops:
                for value in self._simulator.outputs[number]:
                    makes.setdefault(value, []).append(position)
        for value in self._free:
            start = since.get(value, NEVER)
            for other in (FORWARD, *makes.get(value, ()), NEVER):
                if other == start or (start == FORWARD and value in self._must):
                    continue
                if not (other == FORWARD and value in self._barred):
                    yield _moved(since, [Move(((value, other),), 0.0, ())])


def _moved(since: Since, moves: Iterable[Move]) -> dict[int, int]:
    moved = dict(since)
    for move in moves:
        for value, start in move.changes:
            if start == NEVER:
                moved.pop(value, None)
            else:
                moved[value] = start
    return moved


class _Packing:
    """Room in a step, and the moves that take and make it."""

    def __init__(self, draft: Draft, moves: Moves, budget: int) -> None:
        self._least = _LITTLE * draft.timeline.seconds
        self._room: NDArray[np.int64] = budget - np.array([*draft.timeline.live, 0], np.int64)
        self._moves = moves
        self._later = list(moves.later())
        spans = np.array([move.spans[0] for move in self._later], np.int64).reshape(-1, 3)
        self._starts, self._stops, self._nbytes = spans[:, 0], spans[:, 1], spans[:, 2]
        self._costs = np.array([move.seconds for move in self._later])
        self._at: dict[int, list[int]] = {}  # for each value, the moves that hold it later
        for index, move in enumerate(self._later):
            self._at.setdefault(move.changes[0][0], []).append(index)
        self._untouched = np.ones(len(self._later), bool)

    def trades(self, failed: Collection[tuple[tuple[int, int], ...]]) -> list[list[Move]]:
        """Moves that save seconds, each with those that make the room it needs, those that save most first."""
        earlier = [m for m in self._moves.earlier() if m.seconds > self._least and m.changes not in failed]
        earlier.sort(key=lambda move: -move.seconds / (1 + sum(nbytes for _, _, nbytes in move.spans)))
        trades: list[tuple[float, list[Move]]] = []
        touched: set[int] = set()
        misses = 0
        for move in earlier:
            values = {value for value, _ in move.changes}
            if touched & values:
                continue
            made = self._make_room(move)
            misses = 0 if made is not None else misses + 1
            if misses > _MISSES:
                break
            if made is None:
                continue
            touched |= values | {value for other in made for value, _ in other.changes}
            self._untouched[self._of(values)] = False
            trades.append((sum(other.seconds for other in made) - move.seconds, [move, *made]))
        return [trade for _, trade in sorted(trades, key=lambda each: each[0])]

    def relief(self) -> list[Move]:
        """Moves that make room wherever more is live than may be; none if they cannot."""
        return self._cover(self._room, math.inf) or []

    def _make_room(self, move: Move) -> list[Move] | None:
        """Take the room that a move needs; returns the moves that make it. None if they would cost too much."""
        room = self._room.copy()
        for start, stop, nbytes in move.spans:
            room[start:stop] -= nbytes
        own = [index for index in self._of(value for value, _ in move.changes) if self._untouched[index]]
        self._untouched[own] = False
        made = self._cover(room, _WORTH * move.seconds)
        self._untouched[own] = True
        if made is not None:
            self._room = room
        return made

    def _of(self, values: Iterable[int]) -> list[int]:
        """The moves that hold some values later."""
        return [index for value in values for index in self._at.get(value, ())]

    def _cover(self, room: NDArray[np.int64], seconds: float) -> list[Move] | None:
        """The moves that cost least per byte where too much is live, until nothing is; None if they cost more."""
        made: list[int] = []
        while (lacking := -int(room[moment := int(room.argmin())])) > 0:
            fit = np.flatnonzero(self._untouched & (self._starts <= moment) & (moment < self._stops))
            if len(fit):
                chosen = int(fit[np.argmin(self._costs[fit] / np.minimum(self._nbytes[fit], lacking))])
                seconds -= float(self._costs[chosen])
            if not len(fit) or seconds < 0:
                self._untouched[made] = True
                return None
            made.append(chosen)
            self._untouched[chosen] = False
            room[self._starts[chosen] : self._stops[chosen]] += self._nbytes[chosen]
        return [self._later[index] for index in made]
