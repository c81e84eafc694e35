"""Plans made before the first step of a new shape, from a rehearsal on fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from rekindle._errors import RehearsalError, RehearsalWarning
from rekindle.graph import Graph
from rekindle.policy import Planner
from rekindle.record.torch_private import no_modes
from rekindle.report import planning, telling
from rekindle.runtime.arrival import Arrival
from rekindle.runtime.follow import PlannedStep
from rekindle.runtime.rehearse import rehearse
from rekindle.runtime.room import kept_back

_MOST_SIGNATURES = 64


class Ahead:
    """The rehearsed plans of a session: one for each full signature, until a recorded step gives one."""

    def __init__(self, budget: int, min_nbytes: int) -> None:
        self._budget = budget
        self._min_nbytes = min_nbytes
        self._steps: dict[Hashable, PlannedStep | None] = {}
        self._recorded: set[Hashable] = set()

    def knows(self, signature: Hashable) -> bool:
        """Whether a step of this signature was rehearsed, or cannot be, or need not be."""
        return signature in self._steps

    def step(self, signature: Hashable) -> PlannedStep | None:
        """Its plan, if that is the one to follow."""
        return self._steps.get(signature)

    def recorded(self, signature: Hashable, planned: bool) -> None:
        """Note that such a step was recorded. If it gave a plan, that is better: it has what comes after the model."""
        self._recorded.add(signature)
        if planned:
            self._put(signature, None)

    def wants_record(self, signature: Hashable) -> bool:
        """Whether a step that was not recorded followed a rehearsed plan, and none was recorded before."""
        return self.step(signature) is not None and signature not in self._recorded

    def rehearse(self, arrival: Arrival, excess: int) -> bool:
        """Plan a step that is about to run. `excess` are bytes that are there beside parameters, buffers and inputs.
        Returns whether that could be done.

        Raises:
            BudgetInfeasible: no plan fits.
        """
        with telling("rehearsing the step") as tell:
            return self._plan(arrival, excess, tell)

    def _plan(self, arrival: Arrival, excess: int, tell: Callable[[str], None]) -> bool:
        self._put(arrival.full_signature, None)
        try:
            graph = _rehearse(arrival, self._min_nbytes)
        except Exception as error:  # whatever the model does to fake tensors
            why = str(error) if isinstance(error, RehearsalError) else f"{type(error).__name__}: {error}"
            warnings.warn(
                f"plan_ahead: {type(arrival.module).__name__} cannot be rehearsed, so this step makes room op by op "
                f"and is recorded; later ones are planned from it. {why}",
                RehearsalWarning,
                stacklevel=3,
            )
            return False
        graph = replace(graph, standing=graph.standing + excess + kept_back(self._budget))
        del self._steps[arrival.full_signature]  # to be refused again, should no plan fit
        tell(planning(graph, self._budget))
        plan = Planner(graph).plan(self._budget)
        self._put(arrival.full_signature, PlannedStep.of(graph, plan, whole=False))
        return True

    def _put(self, signature: Hashable, step: PlannedStep | None) -> None:
        if len(self._steps) >= _MOST_SIGNATURES and signature not in self._steps:
            oldest = next(iter(self._steps))
            self._recorded.discard(oldest)
            del self._steps[oldest]
        self._steps[signature] = step


def _rehearse(arrival: Arrival, min_nbytes: int) -> Graph:
    try:
        with no_modes():
            return rehearse(arrival.module, arrival.args, arrival.kwargs, min_nbytes=min_nbytes)
    finally:
        torch.clear_autocast_cache()  # or casts of fake parameters would stay until the user's autocast ends
