"""Soak: many small steps with shapes that change all the time. Memory is flat, plans are few, a step costs the same.

`make test` runs a few hundred steps; `REKINDLE_TESTS=full` in the environment runs ten thousand.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import small_batch
from rekindle import EveryN, KeepNone, MemoryOptimal, Session
from watch import living, living_tensors, modes

pytestmark = pytest.mark.usefixtures("counting")
FULL = os.environ.get("REKINDLE_TESTS") == "full"
LENGTHS = [
    pytest.param(320, id="320"),
    pytest.param(
        10_000,
        id="10000",
        marks=[pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(not FULL, reason="REKINDLE_TESTS=full")],
    ),
]
SESSIONS: dict[str, Callable[[], Session]] = {
    "keep-none": lambda: Session(KeepNone(), min_nbytes=0),
    "every-3": lambda: Session(EveryN(3), inplace="snapshot"),
    "memory-optimal": lambda: Session(MemoryOptimal(0.3), min_nbytes=0),
    "budget": lambda: Session(memory_budget="64MiB"),
}


class Net(nn.Module):
    """Its depth, width of batch and branches change from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(6))
        self.norm = nn.BatchNorm1d(24)

    def forward(self, x: Tensor, depth: int, branch: int) -> Tensor:
        """One of many streams of ops."""
        for number, layer in enumerate(self.layers[:depth]):
            y = F.gelu(layer(x))
            x = F.dropout(self.norm(y) if number == branch else y.sin().mul_(2), 0.1) + x
        return x[x.sum(1) > 0].square().sum() + x.square().mean()


@dataclass
class Watched:
    """What there is at some moments of a soak, and what each step took."""

    storages: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def look(self, session: Session) -> None:
        """Count, between steps."""
        gc.collect()
        self.storages.append(len(session._ledger.storages))
        self.nbytes.append(session._ledger.live_nbytes)
        self.tensors.append(living_tensors())
        self.objects.append(len(gc.get_objects()))
        assert not living()
        assert modes() == 0
        assert len(session._learner.plans.planned) <= 16
        assert len(session._replayer._retained) <= 64
        assert len(session.snapshots._taken) <= 64


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", SESSIONS)
def test_soak(name: str, steps: int) -> None:
    """After many steps of changing shapes the session holds what it held early on, to the byte; its plans and tables
    are bounded; and in the full run, where there are steps enough to tell, the median step of the last quarter takes
    what that of the second quarter took."""
    torch.manual_seed(0)
    model, session, watched = Net(), SESSIONS[name](), Watched()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    draw = random.Random(0)
    for number in range(steps):
        rows, depth, branch = draw.randrange(2, 40), draw.randrange(1, 7), draw.randrange(7)
        start = time.process_time()
        optimizer.zero_grad()
        with session:
            model(small_batch(number, rows, 24), depth, branch).backward()
        optimizer.step()
        watched.seconds.append(time.process_time() - start)
        if number in (steps // 4, steps // 2, steps - 1):
            optimizer.zero_grad()
            watched.look(session)
    assert session.stats.steps == steps
    assert len(set(watched.storages)) == len(set(watched.nbytes)) == len(set(watched.tensors)) == 1, watched
    assert watched.objects[-1] - watched.objects[1] < 4000  # plans and tables of sizes that are not yet full
    if steps < 10_000:
        return  # what else the machine does for half a second decides over a quarter of a few hundred steps
    quarter = steps // 4
    early = statistics.median(watched.seconds[quarter : 2 * quarter])
    late = statistics.median(watched.seconds[-quarter:])
    assert late < 1.5 * early
