"""In-place safety: a copy of a value that an in-place write is about to destroy and something still needs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch

from rekindle.record.activation import Activation, Op
from rekindle.record.aliasing import Ledger
from rekindle.record.seams import Room
from rekindle.record.torch_private import at_recorded_level
from rekindle.runtime.replay import clone_storage, missing_ops
from rekindle.runtime.stats import Stats

_COPIED_PER_SECOND = 4e9  # bytes; what one core copies, rounded down
_MOST_OPS = 64


class Snapshots:
    """The copies, each owned by the activation it is a copy of: when that goes, so does its snapshot.

    A value is copied if it is still needed (autograd saved it, or something that is gone would be recomputed from it)
    and cannot be recomputed for less than the copy costs. Safe to use from several threads.
    """

    def __init__(self, ledger: Ledger, room: Room, stats: Callable[[], Stats]) -> None:
        """`stats()` is where to count."""
        self._ledger = ledger
        self._room = room
        self._stats = stats
        self._lock = threading.RLock()
        self._taken: list[weakref.ref[Activation]] = []

    @property
    def nbytes(self) -> int:
        """Bytes in snapshots now."""
        with self._lock:
            return sum(activation.nbytes for activation in self._alive())

    def before_write(self, activation: Activation, by: Op | None, saved: bool, planned: bool = False) -> None:
        """Copy an activation if the op `by` is about to destroy what only a copy can preserve, or what is cheaper to
        copy than to recompute, unless the step is `planned`: plans count on what can be recomputed.

        `saved` says that autograd will ask for what is there now.
        """
        with self._lock:
            base = activation.base()
            if base is None or not self._must_copy(activation, by, saved, planned):
                activation.lose()
                return
            self.cleanup_stale()  # before anything is evicted for the room that the copy takes
            self._take(activation, base, by)
        stats = self._stats()
        stats.snapshots += 1
        stats.snapshot_nbytes += activation.nbytes

    def cleanup_stale(self) -> int:
        """Drop the snapshots that nothing needs any more. Returns the bytes freed."""
        freed = 0
        with self._lock:
            for activation in self._alive():
                if not activation.is_needed():
                    freed += activation.nbytes
                    activation.lose()
            self._taken = [weakref.ref(activation) for activation in self._alive()]
        return freed

    def _must_copy(self, activation: Activation, by: Op | None, saved: bool, planned: bool) -> bool:
        if activation.is_marked:
            return True
        if activation.op is None:
            return saved or activation.is_source(but=by)
        if not saved and not _has_evicted_readers(activation, by):
            return False
        missing = missing_ops(activation, _MOST_OPS)
        if missing.lost is not None or len(missing.ops) == _MOST_OPS:  # what was not looked at may be lost too
            return True
        return not planned and sum(op.seconds for op in missing.ops) > activation.nbytes / _COPIED_PER_SECOND

    def _take(self, activation: Activation, base: torch.Tensor, by: Op | None) -> None:
        if by is not None:
            self._room.make(activation.nbytes, by.func, by.call)
        with at_recorded_level():
            copy = clone_storage(base)
        tracked = self._ledger.track(copy.untyped_storage(), None, activation.nbytes)
        tracked.lend(activation)
        tracked.recomputed = True
        activation.lose()
        activation.held, activation.version, activation.snapshot = copy, copy._version, True
        others = [reference for reference in self._taken if reference() not in (None, activation)]
        self._taken = [*others, weakref.ref(activation)]

    def _alive(self) -> list[Activation]:
        activations = (reference() for reference in self._taken)
        return [a for a in activations if a is not None and a.snapshot and a.held is not None]


def _has_evicted_readers(activation: Activation, by: Op | None) -> bool:
    """Whether something that is gone already would be recomputed from it."""
    for reference in activation.readers:
        op = reference()
        if op is None or op is by:
            continue
        if any(not result.is_live for result in op.results()):
            return True
    return False
