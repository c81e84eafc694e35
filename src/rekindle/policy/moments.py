"""What a step needs at some of its moments together: seconds that every plan repeats, and what to hold from when on.

Problem: at one moment a plan may hold little and repeat little, and yet need too many bytes at another, when what it
repeated is there as well.
Source: the integer program of `policy.exact`, with only those moments as its stages: what is held at each, and which
ops are repeated between two of them, once each at least. What is repeated half in one stage and half in the next needs
only half of its sources in each, so that the program without integers says little; hence rows for each stretch from
one of the moments to any later one, which is what the program of those two alone would say.
Regime: up to three moments of steps with hundreds of ops take tenths of a second to a second; one moment takes
hundredths with thousands.
Known gaps: what is live while ops are replayed is not counted, only what is live while ops of the step run. Where a
value is let go of and made again, it is held from the last time only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rekindle.graph.timeline import Simulator
from rekindle.policy.program import COST, ONE, ZERO, Program
from rekindle.policy.schedule import FORWARD, NEVER, Since

_TINY = 1e-6  # of the bound, and a tenth of it of all seconds: what the solver's tolerances may hide
_NODES, _GAP = 20, 0.005  # when one moment is done: nodes of the solver's tree, or so near the best
_NODES_OF_SEVERAL, _GAP_OF_SEVERAL = 1, 0.01


@dataclass(frozen=True, slots=True)
class Need:
    """What a step needs at some moments.

    Attributes:
        bound: seconds that every plan within the budget repeats.
        since: from when on the best that was found holds values; None if nothing was found.
    """

    bound: float
    since: Since | None


def need_at(
    simulator: Simulator, numbers: Iterable[int], budget: int, bare: Sequence[int], barred: Collection[int]
) -> Need:
    """What a step needs while some of its ops run, within a budget.

    `bare` is what is live at each op without what we hold, and `barred` are values that are not kept in the forward
    pass.
    """
    return _Model(simulator, numbers, bare, barred).solve(budget)


class _Model:
    """The program of some moments."""

    def __init__(
        self, simulator: Simulator, numbers: Iterable[int], bare: Sequence[int], barred: Collection[int]
    ) -> None:
        self._simulator = simulator
        self._values = simulator.graph.values
        self._numbers = sorted(numbers)
        self._ends = [*self._numbers, len(simulator.graph.ops) + 1]
        self._demands = [d for d in simulator.graph.demands if self._values[d.value].evictable]
        self._free = [self._free_at(number) for number in self._numbers]
        self._bare = [bare[number] + self._in_hand(number) for number in self._numbers]
        self._barred = [self._gone(barred, number) for number in self._numbers]
        count = len(self._numbers)
        self._stretches = [(a, b) for a in range(count) for b in range(a + 1, count + 1)]
        self._reach = self._reaches()
        self._program = Program()
        self._held: list[dict[int, int]] = [{} for _ in self._numbers]
        self._repeated: dict[tuple[int, int], dict[int, int]] = {}
        self._lay_out()

    # -- what the record fixes

    def _free_at(self, number: int) -> set[int]:
        """What others hold while an op runs."""
        held = {v.number for v in self._values if v.evictable and v.made_by is not None and v.made_by <= number}
        held = {value for value in held if self._user_has(value, number)}
        return held | {d.value for d in self._demands if d.before <= number < d.until}

    def _in_hand(self, number: int) -> int:
        """Bytes that only nodes of the backward pass hold while an op runs."""
        there = {d.value for d in self._demands if d.before <= number < d.until and not self._user_has(d.value, number)}
        return sum(self._values[v].nbytes for v in there if self._values[v].overwritten is None)

    def _user_has(self, value: int, number: int) -> bool:
        end = self._simulator.ends[value]
        return end is None or end > number

    def _gone(self, barred: Collection[int], number: int) -> set[int]:
        """What cannot be held while an op runs: it was written over, or is never kept, and was not replayed since."""
        over = {v for v in barred if (op := self._values[v].overwritten) is None or op <= number}
        return over - self._replayed_before(number)

    def _replayed_before(self, number: int) -> set[int]:
        """What may have been made once more before an op, and held since."""
        made_by, sources, outputs = self._simulator.made_by, self._simulator.sources, self._simulator.outputs
        stack = [d.value for d in self._demands if d.before <= number]
        ops: set[int] = set()
        while stack:
            maker = made_by[stack.pop()]
            assert maker is not None
            if maker not in ops:
                ops.add(maker)
                stack += sources[maker]
        return {value for op in ops for value in outputs[op]}

    def _wanted(self, stretch: tuple[int, int]) -> set[int]:
        """What is asked for in a stretch."""
        start, end = self._ends[stretch[0]], self._ends[stretch[1]]
        return {d.value for d in self._demands if start < d.before <= end}

    def _reaches(self) -> dict[tuple[int, int], set[int]]:
        """For each stretch, the values made before it that may have to be repeated in it."""
        made_by, sources = self._simulator.made_by, self._simulator.sources
        reach: dict[tuple[int, int], set[int]] = {}
        useful: list[set[int]] = [set() for _ in self._ends]
        for start, end in reversed(self._stretches):  # what is of use at the end comes before
            stack = [*(self._wanted((start, end)) | useful[end])]
            found: set[int] = set()
            while stack:
                value = stack.pop()
                maker = made_by[value]
                assert maker is not None
                if value not in found and maker <= self._numbers[start] and value not in self._free[start]:
                    found.add(value)
                    stack += sources[maker]
            reach[start, end] = found
            useful[start] |= found
        return reach

    # -- the program

    def _lay_out(self) -> None:
        program, ops, made_by = self._program, self._simulator.graph.ops, self._simulator.made_by
        makers = {
            stretch: {op for value in found if (op := made_by[value]) is not None}
            for stretch, found in self._reach.items()
        }
        self._scale = COST / (sum(ops[op].seconds for op in set[int]().union(*makers.values())) or 1.0)
        for (start, _), found in self._reach.items():
            for value in sorted(found - self._held[start].keys()):
                self._held[start][value] = ZERO if value in self._barred[start] else program.column(integral=True)
        for start, end in self._stretches:
            single = end == start + 1
            around = [s for s in self._stretches if s[0] <= start and end <= s[1]] if single else [(start, end)]
            self._repeated[start, end] = {
                op: program.column(ops[op].seconds * self._scale, integral=True) if single else program.column()
                for op in sorted(set[int]().union(*(makers[s] for s in around)))
            }
        for stretch in self._stretches:
            self._relate(stretch)

    def _relate(self, stretch: tuple[int, int]) -> None:
        """What is asked for, read, or held after a stretch was held before it, or is repeated in it."""
        program, made_by, sources = self._program, self._simulator.made_by, self._simulator.sources
        (start, end), reach, repeated = stretch, self._reach[stretch], self._repeated[stretch]

        def has(value: int) -> list[int]:
            maker = made_by[value]
            assert maker is not None
            return [self._held[start][value], repeated[maker]]

        for value in sorted(self._wanted(stretch) & reach):
            program.at_most([ONE], has(value))
        for op, column in repeated.items():
            for source in sources[op]:
                if source in reach:
                    program.at_most([column], has(source))
            if end > start + 1:
                program.at_most([column], [self._repeated[each, each + 1][op] for each in range(start, end)])
        if end < len(self._held):
            for value in sorted(reach & self._held[end].keys()):
                program.at_most([self._held[end][value]], has(value))

    # -- the answer

    def solve(self, budget: int) -> Need:
        """What there is to repeat within a budget. Asked once."""
        program, total = self._program, sum(self._program.cost)
        if not total:
            return Need(0.0, {})
        for held, bare in zip(self._held, self._bare, strict=True):
            if bare > budget:
                return Need(0.0, None)
            most = max((self._values[v].nbytes for v in held), default=0) or 1  # no tolerance is too tight then
            program.row(((column, self._values[v].nbytes / most) for v, column in held.items()), (budget - bare) / most)
        nodes, gap = (_NODES, _GAP) if len(self._held) == 1 else (_NODES_OF_SEVERAL, _GAP_OF_SEVERAL)
        # With presolve, HiGHS 1.12 prints a line of its own where undoing it leaves a row violated.
        result = program.solve(node_limit=nodes, mip_rel_gap=gap, presolve=False)
        proven = result.mip_dual_bound if any(program.integral) else result.fun  # a linear program has no dual bound
        bound = max(0.0, (proven or 0.0) * (1 - _TINY) - total * _TINY / 10) / self._scale
        return Need(bound, None if result.x is None else self._since(result.x))

    def _since(self, solution: Sequence[float]) -> dict[int, int]:
        """From when on the solution holds values: what it repeats from the last stretch on in which it does."""
        first = [
            min((place for place, d in enumerate(self._simulator.graph.demands) if d.before > number), default=NEVER)
            for number in self._numbers
        ]
        since: dict[int, int] = {}
        for (start, end), repeated in self._repeated.items():
            if end == start + 1:
                made = [v for op, c in repeated.items() if solution[c] > 0.5 for v in self._simulator.outputs[op]]
                since |= {v: first[start] for v in made if self._values[v].evictable}
        for place, held in enumerate(self._held):
            for value, column in held.items():
                if solution[column] > 0.5:
                    since[value] = min(since.get(value, NEVER), self._origin(value, place, solution, first))
        return {value: start for value, start in since.items() if start != NEVER}

    def _origin(self, value: int, place: int, solution: Sequence[float], first: Sequence[int]) -> int:
        """From when on a value is held that is held at a moment: since it was not at one before, or the beginning."""
        maker = self._simulator.made_by[value]
        assert maker is not None
        for before in reversed(range(place)):
            column = self._held[before].get(value)
            if maker <= self._numbers[before] and column is not None and solution[column] < 0.5:
                return first[before]
        return FORWARD
