"""What happened: counters over one step, and over a session's life."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rekindle._bytes import format_bytes

_PEAKS = frozenset({"peak_nbytes"})


@dataclass(slots=True)
class Stats:
    """Counters of a session or of one step.

    Attributes:
        steps: how many times the session was entered.
        checkpoints: activations that were marked to be kept.
        evicted: activations that autograd had saved and that were let go before a backward pass asked for them.
        evicted_nbytes: their bytes.
        recompute_calls: how often the backward pass asked for one that was gone.
        ops_replayed: recorded ops that were run again to bring them back.
        failed_recomputes: recomputations that raised.
        replay_seconds: time spent in recomputation, on the clock of the host.
        snapshots: values copied before an in-place write destroyed them.
        snapshot_nbytes: their bytes.
        sweeps: rounds of evictions.
        escalations: how often the pressure rose to medium or to high.
        rescues: second tries of ops that ran out of memory.
        departures: steps that went otherwise than their plan, and went on without one.
        rested: steps that ran as plain PyTorch, from the first call of a module on at the latest, since all is kept in
            them. What they did is not counted.
        rehearsals: steps that were planned before they ran, on fake tensors.
        peak_nbytes: most bytes that the ops of one step had allocated and not yet freed, above what was there when the
            session was entered; of a step that rested, only those from before it did; of one whose backward pass was
            not watched, those that one like it had.
    """

    steps: int = 0
    checkpoints: int = 0
    evicted: int = 0
    evicted_nbytes: int = 0
    recompute_calls: int = 0
    ops_replayed: int = 0
    failed_recomputes: int = 0
    replay_seconds: float = 0.0
    snapshots: int = 0
    snapshot_nbytes: int = 0
    sweeps: int = 0
    escalations: int = 0
    rescues: int = 0
    departures: int = 0
    rested: int = 0
    rehearsals: int = 0
    peak_nbytes: int = 0

    def add(self, other: Stats) -> None:
        """Count another step in: counters add up, peaks are the larger."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(ours, theirs) if field.name in _PEAKS else ours + theirs)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps: peak {format_bytes(self.peak_nbytes)}, {self.checkpoints} checkpoints, "
            f"{self.evicted} evicted ({format_bytes(self.evicted_nbytes)}), {self.ops_replayed} ops replayed in "
            f"{self.recompute_calls} recomputations ({self.replay_seconds:.3f} s)"
        )
