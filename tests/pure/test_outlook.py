"""What an outlook says of a plan is what playing it says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paper import chain_step, steps, transformer_step, unhurried
from rekindle.graph import Graph, Simulator
from rekindle.policy.outlook import Outlook, Outlooks
from rekindle.policy.schedule import FORWARD, Since, hold


def played(simulator: Simulator, since: Since) -> Outlook:
    """What playing the plan says."""
    timeline = simulator.run(hold(simulator, since)[0])
    assert timeline is not None
    return Outlook(timeline.peak, timeline.seconds, timeline.replays)


def any_since(graph: Graph, chance: random.Random) -> Since:
    """Some values, each held from the forward pass or from some demand on; what is written over never is."""
    starts = range(FORWARD, len(graph.demands))
    free = [value.number for value in graph.values if value.evictable and value.overwritten is None]
    return {value: chance.choice(starts) for value in free if chance.random() < 0.6}


@settings(unhurried, max_examples=300)
@given(steps(max_ops=8), st.randoms(use_true_random=False))
def test_as_played(graph: Graph, chance: random.Random) -> None:
    """Peak, seconds and replays are those of the simulator, whatever the step does and whatever is held, also from what
    was remembered of others."""
    simulator = Simulator(graph)
    outlooks = Outlooks(simulator)
    for _ in range(8):
        since = any_since(graph, chance)
        assert outlooks.of(since) == played(simulator, since)


@pytest.mark.parametrize("graph", [chain_step(20), transformer_step(3)], ids=["chain", "transformer"])
def test_as_played_from_one_to_the_next(graph: Graph) -> None:
    """The same along a search, where each plan differs from the one before in one value, and replays are forgotten."""
    simulator, chance = Simulator(graph), random.Random(0)
    outlooks = Outlooks(simulator)
    since = dict(any_since(graph, chance))
    for _ in range(300):
        value = chance.randrange(len(graph.forward))
        since[value] = chance.randrange(FORWARD, len(graph.demands))
        if chance.random() < 0.4:
            del since[value]
        assert outlooks.of(since) == played(simulator, since)
