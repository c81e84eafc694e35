"""Careful deletion: let go of what can be recomputed, one activation or as many as a target asks for.

Problem: free bytes now, at any moment of a step, at the least cost of recomputing later.
Source: the score is h of Dynamic Tensor Rematerialization (Kirisame et al., ICLR 2021): seconds to recompute, counting
neighbours that are evicted already, for each byte and each op since the last use. The two policies and the order of a
sweep (first what is no checkpoint) are those of cgadimpl's careful deletion.
Regime: called when memory is short. Each sweep walks all candidates once: thousands take milliseconds.
Known gaps: neighbours are counted up to a bound, and scores are not updated within one sweep, so one that evicts a
long chain underestimates what its end will cost.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rekindle._bytes import format_bytes
from rekindle.record.activation import Activation
from rekindle.record.aliasing import Ledger
from rekindle.record.torch_private import use_count
from rekindle.runtime.replay import missing_ops
from rekindle.runtime.stats import Stats

_MOST_NEIGHBOURS = 64
_IN_USE = "your code, or an op that runs now, looks at it too"
_OWN_REFERENCES = 3  # the activation's, ours, and that of the call which counts them; a replay has one more


class EvictionPolicy(enum.Enum):
    """What may go: all that is recomputable and no checkpoint, or recomputable checkpoints too."""

    ALWAYS_SAFE = "always safe"
    AGGRESSIVE = "aggressive"


@dataclass(frozen=True, slots=True)
class Eviction:
    """Whether an activation was evicted; true if it was.

    Attributes:
        evicted: whether it was.
        nbytes: bytes freed.
        why_not: why it was not; empty if it was.
    """

    evicted: bool
    nbytes: int = 0
    why_not: str = ""

    def __bool__(self) -> bool:
        return self.evicted


@dataclass(frozen=True, slots=True)
class Sweep:
    """What one round of evictions did.

    Attributes:
        freed_nbytes: bytes freed.
        evicted: how many activations went.
        checkpoints: how many of them were checkpoints.
        live_nbytes: what is live afterwards of all that the session's ops made.
        reached: whether that is at most the target.
        why_not: what is in the way; empty if the target was reached.
    """

    freed_nbytes: int
    evicted: int
    checkpoints: int
    live_nbytes: int
    reached: bool = True
    why_not: str = ""


class Evictor:
    """Evicts activations that Rekindle itself holds. What user code or a running op still looks at stays alive."""

    def __init__(
        self, ledger: Ledger, stats: Callable[[], Stats], now: Callable[[], int], clean: Callable[[], int]
    ) -> None:
        """`stats()` is where to count, `now()` the number of the last recorded op, `clean()` drops stale snapshots."""
        self._ledger = ledger
        self._stats = stats
        self._now = now
        self._clean = clean

    def try_evict(self, activation: Activation, policy: EvictionPolicy = EvictionPolicy.ALWAYS_SAFE) -> Eviction:
        """Evict one activation, if `policy` allows it and it can be recomputed."""
        why_not = self._why_not(activation, policy)
        if why_not:
            return Eviction(False, why_not=why_not)
        before = self._ledger.live_nbytes
        activation.release()
        return Eviction(True, before - self._ledger.live_nbytes)

    def sweep(self, policy: EvictionPolicy = EvictionPolicy.ALWAYS_SAFE) -> Sweep:
        """Evict everything that `policy` allows to go."""
        return self._sweep(0, policy, self._order(policy))

    def sweep_to_target(self, target: int, policy: EvictionPolicy = EvictionPolicy.ALWAYS_SAFE) -> Sweep:
        """Evict until at most `target` bytes are live of all that the session's ops made.

        What is no checkpoint goes first; checkpoints, and last of all snapshots, only if `policy` allows it and the
        target is not reached without. Within each group the lowest score goes first.
        """
        sweep = self._sweep(target, policy, self._order(policy))
        if sweep.live_nbytes <= target:
            return sweep
        excess = format_bytes(sweep.live_nbytes - target)
        why_not = f"{excess} more than the target are still live: {self.what_is_left(policy)}"
        return Sweep(sweep.freed_nbytes, sweep.evicted, sweep.checkpoints, sweep.live_nbytes, False, why_not)

    def free(self, target: int, wish: int) -> None:
        """Evict until at most `target` bytes are live, and while at it, of what is no checkpoint, until at most `wish`
        are: the next round is the later for it."""
        self._stats().sweeps += 1
        self._clean()
        for group, enough in zip(self._groups(), (wish, target, target), strict=True):
            for activation in self._by_score(group):
                if self._ledger.live_nbytes <= enough:
                    break
                self.try_evict(activation, EvictionPolicy.AGGRESSIVE)

    def what_is_left(self, policy: EvictionPolicy, most: int = 5) -> str:
        """The largest of what cannot go, and why, in words."""
        left: list[tuple[int, str]] = []
        unmanaged = 0
        for tracked in list(self._ledger.storages.values()):
            activation = tracked.activation
            if activation is None:
                unmanaged += tracked.nbytes
            elif tracked.nbytes:
                why_not = self._why_not(activation, policy) if activation.is_live else _IN_USE
                left.append((tracked.nbytes, f"{activation.describe()}: {why_not or 'free'}"))
        if unmanaged:
            left.append(
                (unmanaged, "results of ops that are not recorded (backward, no_grad) or are held by your code")
            )
        left.sort(key=lambda row: -row[0])
        return "; ".join(f"{format_bytes(nbytes)} {what}" for nbytes, what in left[:most]) or "nothing"

    def _sweep(self, target: int, policy: EvictionPolicy, order: Iterator[Activation]) -> Sweep:
        self._stats().sweeps += 1
        before = self._ledger.live_nbytes
        self._clean()
        evicted = checkpoints = 0
        for activation in order:
            if self._ledger.live_nbytes <= target:
                break
            if self.try_evict(activation, policy):
                evicted += 1
                checkpoints += activation.is_checkpoint
        live = self._ledger.live_nbytes
        return Sweep(before - live, evicted, checkpoints, live)

    def _order(self, policy: EvictionPolicy) -> Iterator[Activation]:
        """What may go: no checkpoints, checkpoints, snapshots, each from the lowest score up."""
        for group in self._groups()[: 1 if policy is EvictionPolicy.ALWAYS_SAFE else 3]:
            yield from self._by_score(group)

    def _groups(self) -> tuple[list[Activation], ...]:
        groups: tuple[list[Activation], ...] = ([], [], [])
        for tracked in list(self._ledger.storages.values()):
            activation = tracked.activation
            if activation is not None and activation.held is not None and activation.op is not None:
                groups[2 if activation.snapshot else 1 if activation.is_checkpoint else 0].append(activation)
        return groups

    def _by_score(self, group: list[Activation]) -> list[Activation]:
        now = self._now()
        return sorted(group, key=lambda activation: score(activation, now))

    def _why_not(self, activation: Activation, policy: EvictionPolicy) -> str:
        if activation.op is None:
            return f"it can never be recomputed: {activation.why_kept or 'it is a leaf'}"
        if not activation.is_live:
            return "it is evicted already"
        held = activation.held
        if held is None:
            return "your code holds it; Rekindle does not, and it goes when your code lets go of it"
        if policy is EvictionPolicy.ALWAYS_SAFE and activation.is_checkpoint:
            return "it is a checkpoint; only EvictionPolicy.AGGRESSIVE evicts those"
        if policy is EvictionPolicy.ALWAYS_SAFE and activation.snapshot:
            return "it is a snapshot; only EvictionPolicy.AGGRESSIVE evicts those"
        if sys.getrefcount(held) > _OWN_REFERENCES or use_count(held.untyped_storage()) > 2:
            return _IN_USE
        missing = missing_ops(activation)
        if missing.lost is not None:
            leaf, op = missing.lost
            return f"what it would be recomputed from is gone: {leaf.describe()}, read by {op!r}"
        return ""


def score(activation: Activation, now: int) -> float:
    """DTR's h: seconds to recompute, for each byte and each op since the last use. Low scores go first."""
    seconds = sum(op.seconds for op in missing_ops(activation, _MOST_NEIGHBOURS).ops)
    seconds += sum(_evicted_after(activation))
    return seconds / (max(1, activation.nbytes) * max(1, now - activation.last_use))


def _evicted_after(activation: Activation) -> Iterator[float]:
    """The seconds of the ops whose evicted results would have to be recomputed from it."""
    seen: set[int] = set()
    stack = [activation]
    while stack and len(seen) < _MOST_NEIGHBOURS:
        for reference in stack.pop().readers:
            op = reference()
            if op is None or op.number in seen:
                continue
            evicted = [result for result in op.results() if not result.is_live]
            if evicted:
                seen.add(op.number)
                yield op.seconds
                stack += evicted
