"""Every model of the zoo under every policy: the same bits as plain training, in loss, gradients, buffers and RNG."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor, nn

import helpers
import zoo
from rekindle import Balanced, ByDepth, EveryN, KeepNone, MemoryOptimal, PerModule, SpeedOptimal

POLICIES = {
    "every-1": lambda entry: EveryN(1),
    "every-4": lambda entry: EveryN(4),
    "per-module": lambda entry: PerModule(*entry.blocks),
    "memory-optimal": lambda entry: MemoryOptimal(0.2),
    "speed-optimal": lambda entry: SpeedOptimal(0.2),
    "balanced": lambda entry: Balanced(0.2),
    "keep-none": lambda entry: KeepNone(),
    "by-depth": lambda entry: ByDepth(8),
}
ENTRIES = {entry.name: entry for entry in zoo.ZOO}


def step_of(entry: zoo.Entry) -> helpers.Step:
    """One training step on a batch of its own."""

    def step(model: nn.Module, number: int, managed: helpers.Managed) -> Tensor:
        batch = entry.batch(number)
        with managed:
            loss = zoo.loss_of(model, batch)
            loss.backward()
        return loss

    return step


@cache
def plain_training(name: str) -> list[helpers.Snapshot]:
    """What plain training of a model leaves behind, computed once for all its policies."""
    return helpers.train(ENTRIES[name].make, step_of(ENTRIES[name]))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ENTRIES)
def test_trains_to_the_last_bit(name: str, policy: str) -> None:
    """Under no policy does one bit of training differ, and each but the one that keeps all evicts and replays."""
    entry = ENTRIES[name]
    session = helpers.assert_same_training(
        entry.make, step_of(entry), POLICIES[policy](entry), plain=plain_training(name)
    )
    if policy == "every-1":
        assert session.stats.checkpoints > 0
        assert session.stats.evicted == session.stats.recompute_calls == session.stats.ops_replayed == 0
    else:
        helpers.assert_worked(session)


@pytest.mark.parametrize("name", ENTRIES)
def test_trains_to_the_last_bit_when_nothing_is_too_small(name: str) -> None:
    """Even if the smallest activations are evicted too, which by default are kept, not one bit of training differs."""
    entry = ENTRIES[name]
    session = helpers.assert_same_training(
        entry.make, step_of(entry), KeepNone(), plain=plain_training(name), min_nbytes=0
    )
    helpers.assert_worked(session)
