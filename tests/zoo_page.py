"""Writes docs/model-zoo.md from the rows of a full run."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import rekindle
from architectures import DEPART, LEFT_OUT, Architecture
from rekindle.graph import Graph
from rekindle.policy import Planner
from report import table

PAGE = Path(__file__).parents[1] / "docs" / "model-zoo.md"
COLUMNS = ("architecture", "kind", "class", "parameters", "ops", "plain", "floor", "budget", "peak", "replayed")


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        architecture: which one.
        model: the name of its class.
        parameters: how many numbers it has.
        ops: of the recorded step.
        plain, peak: most bytes of the plain steps, and of Rekindle's.
        floor, budget: bytes.
        replayed: ops replayed in both steps together.
        departures: steps that went otherwise than planned.
    """

    architecture: Architecture
    model: str
    parameters: int
    ops: int
    plain: int
    floor: int
    budget: int
    peak: int
    replayed: int
    departures: int

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        graph: Graph,
        planner: Planner,
        budget: int,
        plain: Sequence[int],
        peaks: Sequence[int],
        stats: rekindle.Stats,
    ) -> Row:
        """From a recorded step, what it was planned with, and the peaks of plain and managed steps."""
        model = architecture.make()
        return cls(
            architecture,
            type(model).__name__,
            sum(parameter.numel() for parameter in model.parameters()),
            len(graph.ops),
            max(plain),
            planner.floor(),
            budget,
            max(peaks),
            stats.ops_replayed,
            stats.departures,
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        sizes = (f"{nbytes / 1024:.0f}" for nbytes in (self.plain, self.floor, self.budget, self.peak))
        name, kind = f"`{self.architecture.name}`", self.architecture.kind
        return (name, kind, f"`{self.model}`", f"{self.parameters:,}", str(self.ops), *sizes, str(self.replayed))


def write(rows: Sequence[Row]) -> None:
    """Write the page."""
    exceptions = "\n".join(f"- `{name}`: {reason}." for name, reason in DEPART.items())
    left_out = "\n".join(f"- `{name}`: {reason}." for name, reason in LEFT_OUT.items())
    parts = (
        _head(rows),
        table(COLUMNS, (row.cells for row in rows)),
        "## Where steps differ\n\nSteps of these differ in their ops or sizes, so they are run in a session that plans "
        f"for itself and makes room op by op:\n\n{exceptions}",
        f"## Left out\n\n{left_out}",
    )
    PAGE.write_text("\n\n".join(parts) + "\n")


def _head(rows: Sequence[Row]) -> str:
    kinds = Counter(row.architecture.kind for row in rows)
    replayed = sum(row.replayed for row in rows)
    return f"""# Model zoo

`make test-full` trains architectures of `transformers`, built small from random configurations, for two steps of SGD on
two batches: plain, and with Rekindle at a budget midway between the floor and what plain training needs. Loss, every
gradient, every weight, every buffer and the random states are equal bit for bit after each step, and the peak told by
the allocator's events stays within the budget. `make test` runs a sample of this. Written by `tests/zoo_page.py`.

- Date: {datetime.date.today().isoformat()}
- Versions: Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, \
{platform.system()} {platform.machine()}
- {len(rows)} architectures: {", ".join(f"{count} {kind}" for kind, count in kinds.items())}
- {sum(row.ops for row in rows)} ops recorded, {replayed} replayed, {sum(row.departures for row in rows)} steps \
otherwise than planned

Sizes are in KiB: the peak of plain training, the floor of the planner, the budget, and the measured peak, each with
parameters, gradients, buffers and the batch. Ops replayed are those of both steps."""
