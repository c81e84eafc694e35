"""In-place safety: a copy of a value that an in-place write is about to destroy and something still needs."""

from __future__ import annotations

import threading
import weakref

import torch

from rekindle.record.activation import Activation, Op
from rekindle.record.aliasing import Ledger
from rekindle.runtime.stats import Stats


class Snapshots:
    """The copies, each owned by the activation it is a copy of: when that goes, so does its snapshot.

    A value that a recorded op can make again needs no copy. A leaf does, if something may be recomputed from it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._taken: list[weakref.ref[Activation]] = []

    @property
    def nbytes(self) -> int:
        """Bytes in snapshots now."""
        with self._lock:
            return sum(activation.nbytes for activation in self._alive())

    def before_write(self, activation: Activation, by: Op | None, stats: Stats) -> None:
        """Copy an activation if `by` is about to destroy what only a copy can preserve."""
        if activation.op is not None and not activation.is_marked:
            activation.lose()
            return
        base = activation.base()
        if base is None or (not activation.is_source(but=by) and not activation.is_marked):
            activation.lose()
            return
        with self._lock:
            self._take(activation, base)
        stats.snapshots += 1
        stats.snapshot_nbytes += activation.nbytes

    def cleanup_stale(self) -> int:
        """Drop the snapshots that nothing can be recomputed from any more. Returns the bytes freed."""
        freed = 0
        with self._lock:
            for activation in self._alive():
                if not activation.is_source() and not any(activation.live_handles()):
                    freed += activation.nbytes
                    activation.lose()
            self._taken = [weakref.ref(activation) for activation in self._alive()]
        return freed

    def _alive(self) -> list[Activation]:
        activations = (reference() for reference in self._taken)
        return [a for a in activations if a is not None and a.held is not None]

    def _take(self, activation: Activation, base: torch.Tensor) -> None:
        storage = base.untyped_storage().clone()
        window = (base.storage_offset(), base.size(), base.stride())
        copy = torch.empty(0, dtype=base.dtype, device=base.device).set_(storage, *window)
        tracked = self._ledger.track(storage, None, activation.nbytes)
        tracked.lend(activation)
        tracked.recomputed = True
        activation.lose()
        activation.held, activation.version = copy, copy._version
        self._taken.append(weakref.ref(activation))
