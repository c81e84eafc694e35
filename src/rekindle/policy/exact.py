"""The plan with the least recomputation under a byte budget, proven: the judge of other planners on small graphs.

Problem: of all plans whose simulated peak is within the budget, the one with the fewest recomputed seconds.
Source: the integer program of Checkmate (Jain et al., MLSys 2020), solved by HiGHS. Its R[t, i] (op i is recomputed in
stage t) and S[t, v] (value v is held then) are here; its FREE is not: a value is there at an op of a replay if it is
held before or after, or if a replayed op reads it from there on, which is a maximum and needs no integers of its own.
A stage is one demand, the forward pass runs once, and what the record fixes is no variable: gradients, temporaries,
what user code or a node of the backward pass holds. What is replayed is no choice either, as in the runtime: what is
missing of the value asked for, all of that and nothing else.
Regime: about 30 forward ops. A chain of 30 with all its values asked for is proven in about a second at 70% of the
memory, in ten at 40%, not in a minute at 25%; recorded transformer blocks, whose floor is higher, take less than a
second at any budget. The plan is simulated, and must take the bytes and seconds that the program said.
Known gaps: a value that a node of the backward pass still holds is never held a second time. A value that an op writes
over while such a node holds it is not foreseen; autograd refuses that. Where sizes have no common unit, a plan that is
over the budget by less than a millionth may have to be shut out together with others that are just within it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rekindle._bytes import format_bytes
from rekindle._errors import BudgetInfeasible
from rekindle.graph import Demand, Graph, Plan
from rekindle.graph.plan import Turn
from rekindle.graph.timeline import Timeline, ends, simulate
from rekindle.policy.program import COST, INFEASIBLE, ONE, OPTIMAL, ZERO, Program

_NEVER = 1 << 62
_RELATIVE_GAP = 1e-7
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Exact:
    """What is known of the least recomputation within a budget.

    Attributes:
        plan: the best plan that was found; None if time ran out before there was any.
        seconds: what it recomputes; infinite without a plan.
        bound: no plan within the budget recomputes fewer seconds than this.
        proven: `plan` is the best there is. If not, time ran out, and the truth is between `bound` and `seconds`.
    """

    plan: Plan | None
    seconds: float
    bound: float
    proven: bool


def exact(graph: Graph, budget: int, *, time_limit: float = 60.0) -> Exact:
    """The plan for `graph` with the fewest recomputed seconds whose simulated peak is at most `budget` bytes.

    `time_limit`, in seconds, is for the solver; when it is over, the best plan so far is returned, and `proven` is
    false.

    Raises:
        BudgetInfeasible: no plan fits.
    """
    model = _Model(graph, budget)
    bound, slack, end = 0.0, 0, time.monotonic() + time_limit
    for _ in range(_TRIES):
        found = model.solve(max(0.0, end - time.monotonic()), slack)
        bound = max(bound, found.bound)
        if found.plan is None:
            return Exact(None, math.inf, bound, False)
        timeline = simulate(graph, found.plan)
        if timeline.peak <= budget:
            return _checked(found, timeline, bound)
        slack += 2 * (timeline.peak - budget)  # the solver's tolerances let it through
    raise AssertionError(f"the program counts fewer bytes than the timeline: {timeline.peak} instead of {budget}")


def _checked(found: Exact, timeline: Timeline, bound: float) -> Exact:
    if not math.isclose(timeline.seconds, found.seconds, rel_tol=1e-4, abs_tol=1e-9):
        raise AssertionError(f"the program counts {found.seconds} s, the timeline {timeline.seconds} s")
    near = math.isclose(timeline.seconds, bound, rel_tol=1e-4, abs_tol=1e-9)
    proven = found.proven and near
    return Exact(found.plan, timeline.seconds, timeline.seconds if proven else min(bound, timeline.seconds), proven)


class _Record:
    """What the record fixes: who holds which value at which moment, whatever is planned."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sources = [[v for v in op.inputs if graph.values[v].evictable] for op in graph.ops]
        self.demands = [
            (position, demand) for position, demand in enumerate(graph.demands) if graph.values[demand.value].evictable
        ]
        self.made = [value.number for value in graph.values if value.made_by is not None]
        self.maker = [_NEVER if value.made_by is None else value.made_by for value in graph.values]
        self.overwritten = [_NEVER] * len(graph.values)
        for value in graph.values:
            if value.overwrites is not None:
                self.overwritten[value.overwrites] = self.maker[value.number]
        self.ends = [
            _NEVER if end is None or end <= self.maker[value] else end for value, end in enumerate(ends(graph))
        ]

    def stage(self, op: int) -> int:
        """How many demands have been made when an op runs."""
        return sum(demand.before <= op for _, demand in self.demands)

    def held_at(self, op: int) -> set[int]:
        """The values that are held by others than us while an op runs."""
        user = {v for v in self.made if self.maker[v] <= op < min(self.ends[v], self.overwritten[v])}
        return user | {demand.value for _, demand in self.demands if demand.before <= op < demand.until}

    def user_has(self, value: int, op: int) -> bool:
        """Whether user code holds a value when something is asked for before an op."""
        return self.maker[value] < op < self.ends[value] and op <= self.overwritten[value]

    def node_has(self, value: int, stage: int) -> bool:
        """Whether a node of the backward pass holds a value when the demand of a stage is made."""
        before = self.demands[stage - 1][1].before
        return any(d.value == value and d.until > before for _, d in self.demands[: stage - 1])

    def reach(self, demand: Demand) -> set[int]:
        """The values that may have to be made for a demand: those that lie between it and what user code holds."""
        reached: set[int] = set()
        stack = [demand.value]
        while stack:
            value = stack.pop()
            if value not in reached and not self.user_has(value, demand.before):
                reached.add(value)
                stack += self.sources[self.maker[value]]
        return reached


class _Model:
    """The integer program of a graph and a budget.

    `kept[t][v]` is whether we hold value v after the demand of stage t; in the stage in which it was first made,
    whether it is a checkpoint. `replayed[t][i]` is whether op i is replayed for that demand. All are columns of the
    program; what is not in them is no.
    """

    def __init__(self, graph: Graph, budget: int) -> None:
        self.graph, self.budget = graph, budget
        self.program, self.record = Program(), _Record(graph)
        self.nbytes = [value.nbytes for value in graph.values]
        total = sum(op.seconds for op in graph.ops)
        self.scale = COST / total if total > 0 else 1.0
        self.reach = [set[int](), *(self.record.reach(demand) for _, demand in self.record.demands)]
        self.kept: list[dict[int, int]] = [{} for _ in self.reach]
        self.replayed: list[dict[int, int]] = [{} for _ in self.reach]
        self.memory: list[tuple[float, dict[int, float]]] = []
        self._useful = self._last_uses()
        self._stage_of_op = [self.record.stage(op.number) for op in graph.ops]
        self._keep(0)
        for stage in range(1, len(self.reach)):
            self._replay(stage)
            self._keep(stage)
            self._count_replay(stage)
        for op in graph.ops:
            self._count_op(op.number)
        floor = max((constant for constant, _ in self.memory), default=0)
        if floor > budget:
            raise self._infeasible(f"{format_bytes(floor)} ({floor} bytes) are there whatever is recomputed")

    # -- what is held and what is replayed

    def _last_uses(self) -> dict[int, int]:
        """For each value, the last stage in which it may be asked for or recomputed from."""
        return {value: stage for stage, values in enumerate(self.reach) for value in values}

    def _keep(self, stage: int) -> None:
        """The columns for what is held after the demand of a stage, and when it may change there."""
        for value in self.record.made:
            if self._useful.get(value, 0) <= stage or self._overwritten_in(value, stage):
                continue
            born = self._born(value)
            if born == stage:
                self.kept[stage][value] = self.program.column(integral=True)
            elif born < stage:
                self.kept[stage][value] = self._carried(value, stage)

    def _overwritten_in(self, value: int, stage: int) -> bool:
        """Whether a value is written over before the next demand, so that it is of no use to hold it until then."""
        op = self.record.overwritten[value]
        return op != _NEVER and self._stage_of_op[op] == stage

    def _carried(self, value: int, stage: int) -> int:
        """The column for what is held after a demand, of what was made before."""
        before, used = self.held(value, stage), self._uses(value, stage)
        gained = self._gained(value, stage)
        if gained == ZERO and not used:
            return before
        after = self.program.column(integral=True)
        self.program.at_most([after], [before, gained])
        self.program.at_most([before], [after, *used])  # if not used here, it could have gone before
        return after

    def _gained(self, value: int, stage: int) -> int:
        """The column of the op whose replay allows us to hold a value from now on."""
        demand = self.record.demands[stage - 1][1]
        if self.record.user_has(value, demand.before) or self.record.node_has(value, stage):
            return ZERO
        return self.replayed[stage].get(self.record.maker[value], ZERO)

    def _uses(self, value: int, stage: int) -> list[int]:
        """The columns of the replayed ops that read a value; constantly one if it is asked for."""
        if self.record.demands[stage - 1][1].value == value:
            return [ONE]
        return [column for op, column in self.replayed[stage].items() if value in self.record.sources[op]]

    def held(self, value: int, stage: int) -> int:
        """The column for whether we hold a value as the demand of a stage is made."""
        return self.kept[stage - 1].get(value, ZERO)

    def _replay(self, stage: int) -> None:
        """The columns for what is replayed: the ops that make what is missing, and no others."""
        program, record, target = self.program, self.record, self.record.demands[stage - 1][1].value
        makes: dict[int, list[int]] = {}
        for value in self.reach[stage]:
            makes.setdefault(record.maker[value], []).append(value)
        for op in sorted(makes, reverse=True):
            column = program.column(self.graph.ops[op].seconds * self.scale, integral=True)
            needed = [column] if len(makes[op]) == 1 else [program.column() for _ in makes[op]]
            for value, need in zip(makes[op], needed, strict=True):
                self._need(need, self.held(value, stage), [ONE] if value == target else self._uses(value, stage))
                if need != column:
                    program.at_most([need], [column])
            if needed != [column]:
                program.at_most([column], needed)
            self.replayed[stage][op] = column
        if target in self.reach[stage] and record.node_has(target, stage):
            program.at_most([ONE], [self.held(target, stage)])

    def _need(self, need: int, held: int, uses: Sequence[int]) -> None:
        """`need` is whether a value has a use and is not held."""
        self.program.at_most([need, held], [ONE])
        self.program.at_most([need], uses)
        for use in uses:
            self.program.at_most([use], [need, held])

    # -- bytes

    def _count_op(self, op: int) -> None:
        """The bytes while an op of the step runs."""
        record, stage = self.record, self._stage_of_op[op]
        fixed = record.held_at(op)
        there = {
            value: column
            for value, column in self.kept[stage].items()
            if value not in fixed and record.maker[value] <= op
        }
        self._limit(fixed, there, self.graph.ops[op].temporaries, ())

    def _count_replay(self, stage: int) -> None:
        """The bytes while each op of a replay runs."""
        record, demand = self.record, self.record.demands[stage - 1][1]
        fixed = {v for v in record.made if record.user_has(v, demand.before) or record.node_has(v, stage)}
        for op, column in self.replayed[stage].items():
            there = {v: self._presence(v, stage, op) for v in record.made if v not in fixed}
            copies = [(self._copy(v, stage, op), self.nbytes[v]) for v in fixed & self.reach[stage]]
            made = sum(self.nbytes[v] for v in self.graph.ops[op].outputs) + self.graph.ops[op].temporaries
            self._limit(fixed, there, 0, [*copies, (column, made)])

    def _presence(self, value: int, stage: int, op: int) -> int:
        """The column for whether a value is there while an op is replayed, beside what that makes."""
        before = self.held(value, stage)
        maker = self.record.maker[value]
        if maker >= op or maker not in self.replayed[stage]:
            return before
        return self.program.largest([before, self.kept[stage].get(value, ZERO), *self._later(value, stage, op)])

    def _copy(self, value: int, stage: int, op: int) -> int:
        """The column for a second copy of what a node of the backward pass holds, made since it is missing to us."""
        if self.record.maker[value] >= op:
            return ZERO
        readers = self._later(value, stage, op)
        copy = self.program.column()
        for reader in readers:
            self.program.at_most([reader], [copy, self.held(value, stage)])
        return copy

    def _later(self, value: int, stage: int, op: int) -> list[int]:
        """The columns of the replayed ops that read a value as or after an op runs. One that writes over it takes the
        original, if nothing reads that afterwards."""
        return [
            column
            for reader, column in self.replayed[stage].items()
            if value in self.record.sources[reader]
            and (reader > op or (reader == op and self.record.overwritten[value] != op))
        ]

    def _limit(
        self, fixed: Iterable[int], there: Mapping[int, int], temporaries: int, more: Iterable[tuple[int, int]]
    ) -> None:
        row: dict[int, float] = {}
        for column, nbytes in (*((column, self.nbytes[value]) for value, column in there.items()), *more):
            row[column] = row.get(column, 0) + nbytes
        constant = self.graph.standing + temporaries + sum(self.nbytes[value] for value in fixed) + row.pop(ONE, 0)
        row.pop(ZERO, None)
        self.memory.append((constant, row))

    # -- the answer

    def solve(self, time_limit: float, slack: int) -> Exact:
        """The best plan for `slack` bytes less than the budget. What the program says of it is still to be checked.

        Raises:
            BudgetInfeasible: there is none.
        """
        for constant, row in self.memory:
            unit = math.gcd(*(int(nbytes) for nbytes in row.values())) or 1
            terms = [(column, nbytes // unit) for column, nbytes in row.items()]
            self.program.row(terms, (self.budget - slack - constant) // unit)
        result = self.program.solve(time_limit=time_limit, mip_rel_gap=_RELATIVE_GAP)
        if result.status == INFEASIBLE:
            raise self._infeasible("no plan needs less, whatever it recomputes")
        bound = max(0.0, (result.mip_dual_bound or 0.0)) / self.scale
        if result.x is None:
            return Exact(None, math.inf, bound, False)
        return Exact(self._plan(result.x), result.fun / self.scale, bound, result.status == OPTIMAL)

    def _infeasible(self, why: str) -> BudgetInfeasible:
        return BudgetInfeasible(f"the step does not fit into {format_bytes(self.budget)} ({self.budget} bytes): {why}")

    def _plan(self, solution: Sequence[float]) -> Plan:
        """The plan that the columns tell of."""
        yes = [chance > 0.5 for chance in solution]
        kept = {
            v for stage, columns in enumerate(self.kept) for v in columns if self._born(v) == stage and yes[columns[v]]
        }
        turns = [Turn() for _ in self.graph.demands]
        for stage, (position, demand) in enumerate(self.record.demands, start=1):
            after = {value for value, column in self.kept[stage].items() if yes[column]}
            before = {value for value in self.record.made if yes[self.held(value, stage)]}
            turns[position] = Turn(frozenset(after - before), tuple(sorted((before | {demand.value}) - after)))
        return Plan(frozenset(kept), tuple(turns))

    def _born(self, value: int) -> int:
        return self._stage_of_op[self.record.maker[value]]
