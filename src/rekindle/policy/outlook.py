"""What holding values from when on comes to, without playing the whole step again.

Problem: a search looks at thousands of plans that differ in little, and most of their replays are the same.
Source: what is replayed for a demand follows from what is there of that which its value is made of; it is remembered
by that, in sets that are the bits of numbers. Live bytes are sums of spans over the moments of the step.
Regime: microseconds a demand. Says what the simulator says.
Known gaps: what is written over later is never held.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from operator import add

import numpy as np

from rekindle.graph.timeline import Simulator
from rekindle.policy.schedule import FORWARD, NEVER, Since

_REMEMBERED = 64  # replays of each demand


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a step goes if values are held from when on.

    Attributes:
        peak: most bytes live at any moment.
        seconds: what the replays take.
        replays: for each demand, the numbers of the ops that are replayed.
    """

    peak: int
    seconds: float
    replays: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class _Replay:
    """What is replayed for a demand, as long as the same is there of what was `looked_at`.

    Attributes:
        looked_at, there, makes: sets of values.
        reads: values that are there.
        rises: for each set of values that is held of it, and of those that it makes once more but were let go of, the
            most bytes that it has live beyond what is there.
    """

    looked_at: int
    there: int
    ops: tuple[int, ...] = ()
    seconds: float = 0.0
    makes: int = 0
    reads: tuple[int, ...] = ()
    rises: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)


class Outlooks:
    """The outlooks of one graph."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._nbytes = simulator.nbytes
        self._target = [demand.value for demand in simulator.graph.demands]
        self._bit = [1 << value for value in range(len(self._nbytes))]
        self._lay_out()
        self._remembered: dict[int, list[_Replay]] = {position: [] for position in self._user_has}
        met = [*self._user_has, NEVER]
        self._turns = [met[bisect_left(met, position)] for position in range(len(self._target))]

    def of(self, since: Since) -> Outlook:
        """What comes of holding values from when `since` says until they are used for the last time."""
        kept, starts = 0, dict[int, int]()
        for value, start in since.items():
            if start == FORWARD:
                kept |= self._bit[value]
            elif start < len(self._turns):
                turn = self._turns[start]
                starts[turn] = starts.get(turn, 0) | self._bit[value]
        last: dict[int, int] = {}
        taken: list[tuple[int, _Replay, int]] = []
        wanted, ours = 0, kept
        for position, user_has in self._user_has.items():
            wanted |= starts.get(position, 0)
            there, target = ours | user_has, self._target[position]
            replay = self._replay(position, there)
            last[target] = position
            for value in replay.reads:
                last[value] = position
            if replay.ops:
                made = replay.makes & wanted & ~there
                ours |= made
                taken.append((position, replay, made))
        return self._weigh(kept, last, taken)

    def _weigh(self, kept: int, last: dict[int, int], taken: list[tuple[int, _Replay, int]]) -> Outlook:
        changes, extra = self._changes.copy(), self._extra.copy()
        nbytes, slots = self._nbytes, self._slots
        for value in _members(kept):
            if value in last:
                start, stop = self._user_stops[value], self._stop(value, last[value], FORWARD)
                if start < stop:
                    changes[start] += nbytes[value]
                    changes[stop] -= nbytes[value]
        replays: list[tuple[int, ...]] = [()] * len(self._target)
        seconds = 0.0
        for position, replay, made in taken:
            replays[position] = replay.ops
            seconds += replay.seconds
            target, slot = self._target[position], slots[position]
            held = tuple(
                value
                for value in _members(made | self._bit[target])
                if value == target or last.get(value, -1) > position
            )
            beside = replay.there & replay.makes & ~self._user_has[position]
            gone = tuple(value for value in _members(beside) if last.get(value, -1) < position)
            if (held, gone) not in replay.rises:
                there = self._spread(replay.there - sum(self._bit[value] for value in gone))
                replay.rises[held, gone] = self._simulator.rise(target, replay.ops, there, frozenset(held))
            extra[slot] = replay.rises[held, gone]
            for value in held:
                changes[slot + 1] += nbytes[value]
                passes = not made & self._bit[value]
                stop = self._passed_on(position) if passes else self._stop(value, last[value], position)
                changes[stop] -= nbytes[value]
        return Outlook(max(map(add, accumulate(changes), extra), default=0), seconds, tuple(replays))

    def _stop(self, value: int, last: int, start: int) -> int:
        """The slot in which a storage is gone that we hold from one demand to another."""
        stop = self._slots[last] + 1
        for position, until in self._in_hand.get(value, ()):
            if position >= start:
                stop = max(stop, until)
        return stop

    def _passed_on(self, position: int) -> int:
        """The slot in which the storage is gone that is made for a demand alone."""
        in_hand = dict(self._in_hand.get(self._target[position], ()))
        return max(self._slots[position] + 1, in_hand.get(position, 0))

    def _replay(self, position: int, there: int) -> _Replay:
        """What is replayed for a demand if that is there."""
        remembered = self._remembered[position]
        for replay in remembered:
            if there & replay.looked_at == replay.there:
                return replay
        replay = self._new_replay(position, there)
        remembered.insert(0, replay)
        del remembered[_REMEMBERED:]
        return replay

    def _new_replay(self, position: int, there: int) -> _Replay:
        simulator, target = self._simulator, self._target[position]
        if there & self._bit[target]:
            return _Replay(self._bit[target], self._bit[target])
        ops = simulator.missing(target, self._spread(there))
        makes = looked_at = 0
        for number in ops:
            for value in simulator.outputs[number]:
                makes |= self._bit[value]
            for value in simulator.sources[number]:
                looked_at |= self._bit[value]
        looked_at |= makes
        return _Replay(
            looked_at,
            there & looked_at,
            tuple(ops),
            sum(simulator.graph.ops[number].seconds for number in ops),
            makes,
            tuple(_members(looked_at & ~makes)),
        )

    def _spread(self, members: int) -> bytes:
        """A set of values as a byte each."""
        packed = np.frombuffer(members.to_bytes(len(self._nbytes) // 8 + 1, "little"), np.uint8)
        return np.unpackbits(packed, bitorder="little").tobytes()

    def _lay_out(self) -> None:
        """Number the moments of the step as slots: each op begins, the demands before it are met, then it runs.

        Sets `_slots` of demands, `_changes` from slot to slot of the bytes that are live whatever we hold, `_extra`
        bytes in each, `_user_has` at each demand, `_user_stops`, where what user code had of each value is gone, and
        `_in_hand`, until when nodes that asked for a value have it in hand."""
        simulator = self._simulator
        graph, demands = simulator.graph, simulator.graph.demands
        self._slots: dict[int, int] = {}
        begins, runs, slot = list[int](), list[int](), 0
        for asked in simulator.asked:
            begins.append(slot)
            for position in asked:
                if simulator.evictable[demands[position].value]:
                    slot += 1
                    self._slots[position] = slot
            runs.append(slot := slot + 1)
            slot += 1
        end = slot
        self._extra = [0] * end
        for number, nbytes in enumerate(simulator.temporaries):
            self._extra[runs[number]] = nbytes
        self._in_hand: dict[int, list[tuple[int, int]]] = {}
        for position in self._slots:
            demand = demands[position]
            if demand.until > demand.before:
                self._in_hand.setdefault(demand.value, []).append((position, begins[demand.until]))
        self._changes = [0] * (end + 1)
        self._changes[0] = graph.standing
        self._user_stops = [0] * len(graph.values)
        toggles = [0] * (end + 1)
        for value in graph.values:
            if value.made_by is None:
                continue
            start, gone = runs[value.made_by], simulator.ends[value.number]
            drops = begins[gone] if gone is not None and gone > value.made_by else end
            stop = min(drops, runs[value.overwritten] if value.overwritten is not None else end)
            toggles[start] ^= self._bit[value.number]
            toggles[stop] ^= self._bit[value.number]
            if stop == drops:
                in_hand = self._in_hand.get(value.number, ())
                stop = max([stop, *(until for position, until in in_hand if start < self._slots[position] < drops)])
            self._user_stops[value.number] = stop
            self._changes[start] += value.nbytes
            self._changes[stop] -= value.nbytes
        has, done = 0, 0
        self._user_has: dict[int, int] = {}
        for position, slot in self._slots.items():
            while done <= slot:
                has ^= toggles[done]
                done += 1
            self._user_has[position] = has


def _members(numbers: int) -> Iterator[int]:
    """The members of a set."""
    while numbers:
        lowest = numbers & -numbers
        yield lowest.bit_length() - 1
        numbers ^= lowest
