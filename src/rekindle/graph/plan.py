"""What a policy decided for each value of a graph, and the file that it is kept in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from rekindle._errors import GraphError
from rekindle.graph.ir import Graph
from rekindle.graph.serialize import (
    document,
    graph_from_json,
    graph_to_json,
    make,
    parse,
    plain,
    read_text,
    rows_of,
    write_text,
)
from rekindle.graph.verify import verify_plan

FORMAT = "rekindle.plan"
VERSION = 1
_CURE = "Write plans with plan.save(path)."
_printers: list[Callable[[Any], str]] = []


@dataclass(frozen=True, slots=True)
class Turn:
    """What Rekindle holds and lets go of when autograd asks for one value.

    Attributes:
        retained: numbers of the values that are held from here on, of those made on the way to the one asked for.
        dropped: numbers of the values that are let go of once it has been handed over.
    """

    retained: frozenset[int] = frozenset()
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan was made for, and what it promises.

    Attributes:
        budget: bytes that may be live.
        peak: most bytes live at any moment.
        seconds: what the replays take.
        bound: seconds of replays that no plan within the budget does without.
    """

    budget: int
    peak: int
    seconds: float
    bound: float

    @property
    def gap(self) -> float:
        """How much more is recomputed than what is certainly needed, as a share of the latter."""
        if self.seconds <= self.bound:
            return 0.0
        return self.seconds / self.bound - 1 if self.bound else float("inf")


@dataclass(frozen=True, slots=True)
class Plan:
    """The checkpoints of a step: what is kept. Everything else that is evictable is recomputed when asked for.

    Print one that was made for a budget to see by module what it does.

    Attributes:
        kept: numbers of the values that are kept as they are made.
        turns: one for each demand of the graph. Without any, a recomputed value that is asked for later on is held
            until the backward pass has asked for it the last time, and so is what is kept.
        forecast: what it promises, if it was made for a budget.
        graph: the step that it was made for, if it was made for a budget.
    """

    kept: frozenset[int]
    turns: tuple[Turn, ...] = ()
    forecast: Forecast | None = None
    graph: Graph | None = field(default=None, compare=False, repr=False)

    def keeps(self, value: int) -> bool:
        """Whether the value of that number is kept."""
        return value in self.kept

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan and its graph to a file. If that fails, a file that was there before stays whole.

        Raises:
            GraphError: the plan has no graph.
        """
        write_text(path, _to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan from a file that `save` wrote.

        Raises:
            GraphError: it holds no plan, one of another version, or was changed since.
            OSError: it cannot be read.
        """
        return _from_json(read_text(path))

    def __str__(self) -> str:
        return _printers[-1](self) if _printers and self.graph is not None else repr(self)


def print_plans_with(printer: Callable[[Plan], str]) -> None:
    """Have `print(plan)` show what `printer` makes of it. What draws stands behind what is drawn in the house."""
    _printers.append(printer)


def _to_json(plan: Plan) -> str:
    if plan.graph is None:
        raise GraphError(
            "this plan has no graph to be saved with. Save one that was made for a budget, such as session.plan of a "
            "rekindle.Session(memory_budget=...)."
        )
    verify_plan(plan.graph, plan)
    graph = graph_to_json(plan.graph)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "forecast": None if plan.forecast is None else plain(plan.forecast),
        "kept": sorted(plan.kept),
    }
    turns = [{"retained": sorted(turn.retained), "dropped": turn.dropped} for turn in plan.turns]
    digest = _digest({**head, "turns": turns, "graph": json.loads(graph)})
    return document({**head, "digest": digest}, {"turns": turns}, {"graph": graph})


def _from_json(text: str) -> Plan:
    data = parse(text, _CURE)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise GraphError(f"this JSON holds no plan: its format is not {FORMAT!r}. {_CURE}")
    if data.get("version") != VERSION:
        raise GraphError(
            f"the plan has version {short(data.get('version'))}, but this Rekindle reads {VERSION}. Plan the step "
            "again."
        )
    if data.pop("digest", None) != _digest(data):
        raise GraphError("the plan is damaged: the file was changed since it was written. Plan the step again.")
    graph = graph_from_json(json.dumps(data.pop("graph", None)))
    turns = tuple(make(Turn, row, "plan") for row in rows_of(data, "turns", "plan"))
    row = data.get("forecast")
    if row is not None and not isinstance(row, dict):
        raise GraphError(f"the plan is damaged: its forecast is {short(row)}")
    forecast = None if row is None else make(Forecast, row, "plan")
    kept = make(Turn, {"retained": data.get("kept")}, "plan").retained
    return verify_plan(graph, Plan(kept, turns, forecast, graph))


def _digest(data: dict[str, Any]) -> str:
    """Of all that a plan's file says, so that a bit that flipped in it is not obeyed."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
