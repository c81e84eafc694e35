"""Architectures of `transformers` trained for two steps within a budget midway between floor and full: the budget holds
by the allocator's own events, and no bit differs from plain training.

`make test` takes a few of each kind; `make test-full` (REKINDLE_TESTS=full) takes all and writes docs/model-zoo.md.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import helpers
import rekindle
from architectures import ARCHITECTURES, Architecture, loss_of
from peak import peak_bytes
from rekindle.graph import Graph
from rekindle.policy import Planner
from rekindle.runtime.room import kept_back

FULL = os.environ.get("REKINDLE_TESTS") == "full"
STATE_NBYTES = torch.get_rng_state().nbytes
STEPS = 2


@dataclass
class Training:
    """What training left behind, step by step, and the most bytes that each step had for itself."""

    left: list[dict[str, Tensor]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def train(architecture: Architecture, managed: Any, measure: Callable[[Callable[[], object]], int] = peak_bytes) -> Training:
    """Train a fresh model, its gradients there already, on another batch in each step."""
    seed(0)
    model, training = architecture.make().train(), Training()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        batch = architecture.batch(number)
        losses: list[Tensor] = []
        seed(1 + number)
        training.peaks.append(measure(lambda b=batch, to=losses: to.append(step(model, b, managed))))
        state = random_state()
        gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        left = {f"weight {name}": p.detach().clone() for name, p in model.named_parameters()}
        left |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
        training.left.append({"loss": losses[0], **state, **gradients, **left})
    return training


def step(model: nn.Module, batch: dict[str, Any], managed: Any) -> Tensor:
    """One forward and backward."""
    with managed:
        loss = loss_of(model, batch)
        loss.backward()
    return loss.detach()


def seed(number: int) -> None:
    """Seed all that models draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def random_state() -> dict[str, Tensor]:
    """Where the generators are."""
    return {"random": torch.get_rng_state(), "random of numpy": torch.tensor(np.random.get_state()[1].astype(np.int64))}


def recorded(architecture: Architecture) -> Graph:
    """The first step, recorded twice in a session with room for all."""
    session = rekindle.Session(memory_budget="8GiB")
    seed(0)
    model = architecture.make().train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for _ in range(2):
        seed(1)
        step(model, architecture.batch(0), session)
    assert session.graph is not None
    return session.graph


@dataclass
class Row:
    architecture: Architecture
    model: str
    parameters: int
    ops: int
    plain: int
    floor: int
    budget: int
    peak: int
    replayed: int


def judge(architecture):
    import time
    t0 = time.time()
    graph = recorded(architecture)
    t1 = time.time()
    planner = Planner(graph)
    midway = (planner.floor() + planner.full) // 2
    plan = planner.plan(midway)
    budget = midway + kept_back(midway)
    standing = graph.standing - sum(op.random for op in graph.forward) * STATE_NBYTES
    t2 = time.time()
    plain = train(architecture, nullcontext())
    session = rekindle.Session(plan=plan)
    err = ""
    try:
        managed = train(architecture, session)
    except rekindle.PlanMismatch as e:
        err = "MISMATCH " + str(e)[:300]
        session = rekindle.Session(memory_budget=budget)
        session._learner.plans.add(graph, plan)
        session._learner.records = False
        managed = train(architecture, session)
    t3 = time.time()
    wrong = [(i, key) for i, (l, r) in enumerate(zip(plain.left, managed.left)) for key in l if l.keys() != r.keys() or not helpers.same_bits(l[key], r[key])]
    peak = standing + max(managed.peaks)
    print(f"{architecture.name:22s} ops {len(graph.ops):5d} floor {planner.floor()>>10} full {planner.full>>10} standing {standing>>10} plain {(standing+max(plain.peaks))>>10} budget {budget>>10} peak {peak>>10} replayed {session.stats.ops_replayed} dep {session.stats.departures} rnd {sum(op.random for op in graph.forward)} | {t1-t0:.1f} {t2-t1:.1f} {t3-t2:.1f} s",
      "OVER!" if peak > budget else "", "BITS! " + str(wrong[:5]) if wrong else "", "" if session.stats.ops_replayed else "NOTHING!", "NOLOSS" if not torch.isfinite(plain.left[1]["loss"]) or plain.left[0]["loss"].numel()!=1 else "", err, flush=True)
