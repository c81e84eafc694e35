"""Room for an op before it runs, and a second try when there was none."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from rekindle._bytes import format_bytes
from rekindle._errors import BudgetInfeasible
from rekindle.record.aliasing import Ledger
from rekindle.record.cost import Cost
from rekindle.record.modules import ModuleCall
from rekindle.record.schema import traits_of
from rekindle.record.sizes import Need, Sizes
from rekindle.runtime.eviction import EvictionPolicy, Evictor
from rekindle.runtime.pressure import Level, Pressure
from rekindle.runtime.stats import Stats

_RESCUES = 2
_SMALL = 1 << 12  # bytes; an op whose kernel never takes more for itself is not worth measuring in each step
_UNSEEN = 1 << 16  # bytes kept back for what is too small to be recorded: scalars, states of random generators
_STATES = 2  # copies of a generator's state around an op that draws: what it was, and what it is
_SLACK = 64  # each round of evictions frees this fraction of the budget more than it must, so that rounds are few


class Room:
    """Runs ops so that what they allocate fits.

    Attributes:
        watches: whether memory is looked at before each op.
        measures: whether what every op needs is measured, in the steps that are recorded as a graph.
        hungry: names of the ops whose kernels were seen to take much more than what they return.
        seconds: what the last op took, by the clock or as it was told, while every op is measured.
        temporaries: bytes that its kernel allocated for itself.
        unseen: bytes that are there and that nobody counts. Room is made for them too, as far as that can be done.
    """

    def __init__(
        self,
        ledger: Ledger,
        evictor: Evictor,
        pressure: Pressure,
        budget: int | None,
        watches: bool,
        stats: Callable[[], Stats],
        cost: Cost | None = None,
    ) -> None:
        """`budget` is the most bytes that may be live, None if only the levels of pressure count; `cost` says what the
        ops that are measured took, None for what the clock says."""
        self.watches = watches
        self.measures = False
        self.hungry: set[str] = set()
        self.seconds = 0.0
        self.temporaries = 0
        self.unseen = 0
        self._ledger = ledger
        self._evictor = evictor
        self._pressure = pressure
        self._stated = budget
        self._budget = None if budget is None else budget - kept_back(budget)
        self._stats = stats
        self._cost = cost
        self._sizes = Sizes(shared=True)

    def run(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        call: ModuleCall,
        random: tuple[torch.Generator, torch.Tensor] | None = None,
    ) -> Any:
        """Run an op, after making room for what it allocates.

        Args:
            func, args, kwargs: the op.
            call: the module call it runs in, for error messages.
            random: the generator it draws from and its state before the op, to draw the same in a second try.

        Raises:
            BudgetInfeasible: even without everything that can go, the op does not fit, or did not where only a loose
                bound was known.
        """
        traits = traits_of(func)
        if self.watches or self.measures or traits.name in self.hungry:
            signature = self._sizes.signature(func, args, kwargs)
            need = self._sizes.measured(signature)
            if self.watches or self.measures or need is None:
                return self._run(signature, need, func, args, kwargs, call, random)
            self._ledger.note(need.nbytes)
            self.temporaries = need.temporaries
        try:
            return traits.call(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            return self.rescue(error, func, args, kwargs, random)

    def _run(
        self,
        signature: Any,
        need: Need | None,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        call: ModuleCall,
        random: tuple[torch.Generator, torch.Tensor] | None,
    ) -> Any:
        """The same for an op that memory is looked at for, or that has to be measured; `need` is what it needed before,
        None if that is not known."""
        tried = False
        if self.watches or self.measures:
            self._ledger.look()
        if self.watches:
            expected = need or self._sizes.guess(signature, func, args, kwargs)
            states = _STATES * random[1].nbytes if random is not None else 0
            self.make(expected.least + states, func, call, expected.nbytes - expected.least)
            tried = expected.loose
        try:
            if need is None:
                result, need = self._sizes.measure(signature, func, args, kwargs, self._time)
            else:
                result = self._time(func, args, kwargs)
        except torch.OutOfMemoryError as error:
            return self.rescue(error, func, args, kwargs, random)
        if tried:
            self._check(need.nbytes, func, call)
        self._tell(func, args, kwargs, result)
        self._ledger.note(need.nbytes)
        self.temporaries = need.temporaries
        if need.temporaries > _SMALL:
            self.hungry.add(traits_of(func).name)
        return result

    def _time(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an op by the clock, which on an accelerator says nothing until its kernels have run."""
        device = self._ledger.place if self.measures and self._cost is None else None
        if device is not None:
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        result = func(*args, **kwargs)
        if device is not None:
            torch.accelerator.synchronize(device)
        self.seconds = time.perf_counter() - start
        return result

    def _tell(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Have the seconds of an op told, if they are not to be measured."""
        if self._cost is not None and self.measures:
            self.seconds = self._cost(func, args, kwargs, result)

    def make(self, nbytes: int, func: Any, call: ModuleCall, guessed: int = 0) -> None:
        """Make room for `nbytes`, and if it can be had for `guessed` more that may be wanted.

        Raises:
            BudgetInfeasible: even without everything that can go, `nbytes` do not fit.
        """
        if not self.watches:
            return
        wanted = nbytes + guessed
        level = self.level(wanted)
        if self._budget is not None:
            if self._ledger.total_nbytes + self.unseen + wanted > self._budget:
                self._fit(nbytes, wanted, func, call)
        elif level >= Level.MEDIUM:
            self._relieve(level, wanted)

    def level(self, more: int = 0) -> Level:
        """The pressure now, with `more` bytes that are about to be used."""
        before, level = self._pressure.look(more)
        if level > before and level >= Level.MEDIUM:
            self._stats().escalations += 1
        return level

    def _fit(self, nbytes: int, wanted: int, func: Any, call: ModuleCall) -> None:
        assert self._budget is not None
        target = self._budget - wanted - self._ledger.standing_nbytes - self.unseen
        self._evictor.free(target, target - self._budget // _SLACK)
        self._check(nbytes, func, call)

    def _check(self, nbytes: int, func: Any, call: ModuleCall) -> None:
        """Refuse an op that allocates `nbytes` if they are not there beside what is live."""
        ledger = self._ledger
        needed = ledger.total_nbytes + nbytes
        if self._budget is None or self._stated is None or needed <= self._budget:
            return
        others = f", and what else is allocated on {ledger.place}" if ledger.place is not None else ""
        raise BudgetInfeasible(
            f"memory_budget is {format_bytes(self._stated)}, but {func} in {call.describe()} needs "
            f"{format_bytes(nbytes)} and {format_bytes(ledger.total_nbytes)} cannot go: "
            f"{format_bytes(ledger.standing_nbytes)} parameters, gradients, buffers and inputs{others}; "
            f"{self._evictor.what_is_left(EvictionPolicy.AGGRESSIVE)}. This op fits from "
            f'memory_budget="{_budget_for(needed)}"; ops after it may need more. Or use a smaller batch.'
        )

    def _relieve(self, level: Level, wanted: int) -> None:
        """Bring use back below the threshold of the level, as far as what this level may evict allows."""
        reader = self._pressure.reader
        threshold = self._pressure.thresholds[Level.MEDIUM - 1 if level is Level.MEDIUM else Level.HIGH - 1]
        excess = reader.used() + wanted - int(threshold * reader.limit())
        if excess <= 0:
            return
        policy = EvictionPolicy.ALWAYS_SAFE if level is Level.MEDIUM else EvictionPolicy.AGGRESSIVE
        self._evictor.sweep_to_target(max(0, self._ledger.live_nbytes - excess), policy)

    def rescue(
        self,
        error: torch.OutOfMemoryError,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        random: tuple[torch.Generator, torch.Tensor] | None,
    ) -> Any:
        """Try an op again that ran out of memory, after an aggressive sweep; not if it may have done half of its work.

        Raises:
            torch.OutOfMemoryError: `error` itself, if it does not help.
        """
        traits = traits_of(func)
        if traits.writes or traits.stats is not None or (traits.random and random is None):
            raise error
        for _ in range(_RESCUES):
            self._stats().rescues += 1
            self._evictor.sweep(EvictionPolicy.AGGRESSIVE)
            if random is not None:
                random[0].set_state(random[1])
            try:
                return func(*args, **kwargs)
            except torch.OutOfMemoryError:
                continue
        raise error


def kept_back(budget: int) -> int:
    """Bytes of a budget that are left to what is too small to be recorded."""
    return min(_UNSEEN, budget // _SLACK)


def _budget_for(nbytes: int) -> str:
    """The smallest budget, in round figures, of which `nbytes` are left after what is kept back."""
    budget = nbytes + min(_UNSEEN, nbytes // (_SLACK - 1) + 1)
    unit, name = (1 << 20, "MiB") if budget >= 64 << 20 else (1 << 10, "KiB")
    return f"{-(-budget // unit)}{name}"
