"""Integer programs, put together column by column and row by row, for HiGHS (through SciPy)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

ZERO, ONE = 0, 1  # the first columns of every program are these constants
COST = 1000.0  # what all of a program should cost together: HiGHS stops at an absolute gap of 1e-6
OPTIMAL, INFEASIBLE = 0, 2  # what SciPy says of an answer


class Program:
    """Columns between 0 and 1, rows that limit sums of them, and what they cost."""

    def __init__(self) -> None:
        self.lower, self.cost, self.integral = [0.0, 1.0], [0.0, 0.0], [0, 0]
        self.upper = [0.0, 1.0]
        self._rows: list[dict[int, float]] = []
        self._limits: list[float] = []
        self._largest: dict[frozenset[int], int] = {}

    def column(self, cost: float = 0.0, *, integral: bool = False) -> int:
        """A new variable."""
        self.lower.append(0.0)
        self.upper.append(1.0)
        self.cost.append(cost)
        self.integral.append(int(integral))
        return len(self.cost) - 1

    def at_most(self, small: Iterable[int], large: Iterable[int]) -> None:
        """The sum of some columns is at most that of others."""
        self.row([*((column, 1.0) for column in small), *((column, -1.0) for column in large)], 0.0)

    def row(self, terms: Iterable[tuple[int, float]], limit: float) -> None:
        """A weighted sum of columns is at most `limit`."""
        row: dict[int, float] = {}
        for column, weight in terms:
            if column == ONE:
                limit -= weight
            elif column != ZERO:
                row[column] = row.get(column, 0.0) + weight
        if sum(weight for weight in row.values() if weight > 0) > limit:
            self._rows.append(row)
            self._limits.append(limit)

    def largest(self, columns: Iterable[int]) -> int:
        """A column that is nowhere less than these."""
        different = frozenset(columns) - {ZERO}
        if ONE in different or not different:
            return ONE if different else ZERO
        if len(different) == 1:
            return next(iter(different))
        if different not in self._largest:
            self._largest[different] = top = self.column()
            for column in different:
                self.at_most([column], [top])
        return self._largest[different]

    def solve(self, **options: float) -> OptimizeResult:
        """What HiGHS says, given the options of `scipy.optimize.milp`."""
        numbers = [(r, c, w) for r, row in enumerate(self._rows) for c, w in row.items()]
        rows, columns, weights = np.array(numbers).T if numbers else np.zeros((3, 0))
        shape = (len(self._rows), len(self.cost))
        table = csr_array((weights, (rows.astype(int), columns.astype(int))), shape=shape)
        return milp(
            np.array(self.cost),
            integrality=np.array(self.integral),
            bounds=Bounds(np.array(self.lower), np.array(self.upper)),
            constraints=LinearConstraint(table, ub=np.array(self._limits)) if self._rows else (),
            options=options,
        )
