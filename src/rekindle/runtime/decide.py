"""Asks the policy, as the step runs, what to keep."""

from __future__ import annotations

from rekindle.policy import Decider
from rekindle.record.activation import Activation, Op
from rekindle.record.modules import ModuleCall
from rekindle.runtime.follow import Follower
from rekindle.runtime.snapshots import Snapshots
from rekindle.runtime.stats import Stats


class Decisions:
    """The decisions of one step, from a policy that decides as it goes, or from a plan that is followed.

    With neither, what autograd saves is held as plain PyTorch would, and nothing is a checkpoint.
    """

    def __init__(self, decider: Decider | None, follower: Follower | None, snapshots: Snapshots, stats: Stats) -> None:
        self.makes = follower is not None if decider is None else decider.makes
        self.reads = decider is not None and decider.reads
        self.follower = follower
        self._decider = decider
        self._snapshots = snapshots
        self._stats = stats

    def made(self, name: str, activation: Activation) -> bool:
        """Whether a new evictable activation becomes a checkpoint; `name` is the op that made it."""
        if self._decider is not None:
            keep = self._decider.made(activation.call)
        else:
            keep = self.follower is not None and self.follower.made(name, activation)
        if keep:
            self._stats.checkpoints += 1
        return keep

    def read(self, made_in: ModuleCall, read_in: ModuleCall) -> bool:
        """Whether an activation becomes a checkpoint because another call reads it."""
        assert self._decider is not None
        keep = self._decider.read(made_in, read_in)
        if keep:
            self._stats.checkpoints += 1
        return keep

    def saved(self, activation: Activation, call: ModuleCall) -> bool:
        """Whether an activation that autograd saves is held from now on."""
        if self._decider is None:
            return self.follower is None or self.follower.holds(activation)
        if not self._decider.saved(activation.call, call):
            return False
        activation.is_checkpoint = True
        self._stats.checkpoints += 1
        return True

    def before_write(self, activation: Activation, by: Op | None, saved: bool) -> None:
        """Save what is still needed of a value that is about to be overwritten."""
        planned = self.follower is not None and not self.follower.departed
        self._snapshots.before_write(activation, by, saved, planned)
