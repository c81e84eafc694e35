"""Planned steps of real models at ten budgets each: the budget holds by the allocator's own events, and no bit differs.

The plan is made from a recorded step of the session's own, with room for all, so that each budget down to the floor is
tried, also those that the first step could not be run with on line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import helpers
import nets
import peers
import rekindle
import zoo
from peak import peak_bytes
from rekindle.graph import Graph, simulate
from rekindle.policy import Planner
from rekindle.policy.exact import exact
from rekindle.runtime.rehearse import rehearse
from rekindle.runtime.room import kept_back

FULL = os.environ.get("REKINDLE_TESTS") == "full"
STATE_NBYTES = torch.get_rng_state().nbytes + 64  # of a generator: kept by each random op, and below what is recorded


def _unrolled(seed: int) -> zoo.Batch:
    return {"tokens": zoo.tokens(seed, 8, 24, 64), "targets": zoo.tokens(seed + 1, 8, 24, 64)}


ENTRIES = {entry.name: entry for entry in zoo.ZOO}
ENTRIES["densenet"] = zoo.Entry("densenet", lambda: nets.DenseNet(6, 4), zoo._classified, ())
ENTRIES["unrolled-lstm"] = zoo.Entry("unrolled-lstm", nets.UnrolledLSTM, _unrolled, ())
IN_SHORT = ("gpt", "bert", "t5", "resnet", "unet", "densenet", "lstm")  # the others in full runs


def fresh(entry: zoo.Entry) -> nn.Module:
    """The model, its gradients there already, as in all steps but the first."""
    torch.manual_seed(0)
    model = entry.make()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def outcome(model: nn.Module, batch: zoo.Batch, managed: Any) -> dict[str, Tensor]:
    """All that a step leaves behind."""
    torch.manual_seed(1)
    with managed:
        loss = zoo.loss_of(model, batch)
        loss.backward()
    left = {"loss": loss.detach(), "random": torch.get_rng_state()}
    left |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return left | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


@cache
def recorded(name: str) -> tuple[Planner, dict[str, Tensor]]:
    """A planner for a step of a model, recorded in a session with room for all, and what a plain step leaves."""
    entry = ENTRIES[name]
    session = rekindle.Session(memory_budget="8GiB")
    for _ in range(2):
        outcome(fresh(entry), entry.batch(0), session)
    assert session.graph is not None
    return Planner(session.graph), outcome(fresh(entry), entry.batch(0), nullcontext())


def planned(graph: Graph, plan: rekindle.Plan, budget: int) -> rekindle.Session:
    """A session that has a plan from the beginning."""
    session = rekindle.Session(memory_budget=budget)
    session._learner.plans.add(graph, plan)
    session._learner.records = False
    return session


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in IN_SHORT else pytest.mark.skipif(not FULL, reason="REKINDLE_TESTS=full"))
        for name in ENTRIES
    ],
)
def test_ten_budgets(name: str) -> None:
    """From the floor to the full need: measured at or below the budget, predicted within 2%, no bit differs, just the
    predicted ops are replayed, no step departs, and no larger budget takes more seconds.

    Convolutions of ResNet and U-Net switch dispatch modes on again while they run: what is replayed after them must not
    be taken for new ops, or the step departs."""
    entry, (planner, expected) = ENTRIES[name], recorded(name)
    graph = planner.graph
    random = sum(op.random for op in graph.forward) * STATE_NBYTES
    seconds = []
    for place in range(10):
        plans_for = planner.floor() + (planner.full - planner.floor()) * place // 9
        plan = planner.plan(plans_for)
        assert plan.forecast is not None
        budget = plans_for + max(kept_back(plans_for), random)
        session = planned(graph, plan, budget)
        model, batch = fresh(entry), entry.batch(0)
        left: dict[str, Tensor] = {}
        peak = graph.standing + peak_bytes(lambda m=model, b=batch, s=session, to=left: to.update(outcome(m, b, s)))
        assert left.keys() == expected.keys()
        assert [key for key in left if not helpers.same_bits(left[key], expected[key])] == []
        assert session.last_step.departures == 0
        assert session.last_step.ops_replayed == sum(map(len, simulate(graph, plan).replays))
        assert session.last_step.failed_recomputes == 0
        assert peak <= budget
        assert plan.forecast.peak * 0.98 <= peak <= plan.forecast.peak * 1.02 + random
        seconds.append(plan.forecast.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


# -- blocks, against the proven best -----------------------------------------------------------------------------------


def _alone(name: str) -> Callable[[], Tensor]:
    """The first block of a model of the zoo, run on what came into it there."""
    entry = ENTRIES[name]
    model = fresh(entry)
    block = next(module for module in model.modules() if isinstance(module, entry.blocks))
    came: dict[str, Any] = {}
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: came.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    zoo.loss_of(model, entry.batch(0))
    hook.remove()
    x, *rest = (arg.detach() if isinstance(arg, Tensor) else arg for arg in came["args"])

    def loss() -> Tensor:
        result = block(x.clone().requires_grad_(), *rest, **came["kwargs"])
        return torch.as_tensor(result[0] if isinstance(result, tuple) else result).square().sum()

    return loss


def _of(block: nn.Module, *shape: int) -> Callable[[], Tensor]:
    x = torch.randn(shape)
    return lambda: block(x.clone().requires_grad_()).square().sum()


BLOCKS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "mlp": lambda: _of(nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.GELU()))), 32, 64),
    "bottlenecks": lambda: _of(nn.Sequential(nets.Bottleneck(64, 16), nets.Bottleneck(64, 16)), 4, 64, 16, 16),
    "encoder": lambda: _of(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 4, 32, 64),
    **{name: (lambda name=name: _alone(name)) for name in ("gpt2", "bert", "llama")},
}


def test_blocks_are_planned_near_the_best() -> None:
    """Recorded blocks recompute at most 1.05 times what integer programming proves to be the least in nine of ten
    cases, and never above 1.15 times. Seconds are those of a roofline, equal in all runs."""
    ratios = []
    for name, make in BLOCKS.items():
        torch.manual_seed(0)
        loss = make()
        session = rekindle.Session(memory_budget="8GiB", cost="roofline")
        with session:
            loss().backward()
        assert session.graph is not None
        planner = Planner(session.graph)
        for place in range(1, 5):
            budget = planner.floor() + (planner.full - planner.floor()) * place // 5
            best, forecast = exact(session.graph, budget), planner.plan(budget).forecast
            assert best.proven
            assert forecast is not None
            assert best.seconds > 0
            ratios.append((forecast.seconds / best.seconds, name, place))
    ratios.sort()
    assert ratios[-1][0] <= 1.15
    assert ratios[math.ceil(len(ratios) * 0.9) - 1][0] <= 1.05


def test_crests_together_prove_more() -> None:
    """Moments that are fuller than those around them, early in the backward pass, prove what neither of them does: at a
    third of its need a small GPT is planned to the best, which without them is 6% above what is proven."""
    entry = ENTRIES["gpt"]
    graph = rehearse(fresh(entry), kwargs=entry.batch(0))
    planner = Planner(graph)
    for percent in (33, 35):
        plan = planner.find(graph.standing + (planner.full - graph.standing) * percent // 100)
        assert plan is not None
        assert plan.forecast is not None
        assert plan.forecast.gap <= 0.01


# -- full models -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="REKINDLE_TESTS=full runs everything")
@pytest.mark.parametrize(
    ("make", "least"),
    [(peers.gpt2, 0.35), (peers.llama, 0.3), (peers.resnet, 0.3)],
    ids=["gpt2", "llama", "resnet50"],
)
def test_full_model(make: Callable[[], peers.Workload], least: float) -> None:
    """At 30, 50 and 75% of what plain PyTorch needs beside what is there anyway, by a session that plans for itself.
    GPT-2 adds up two gradients of its tied embedding, which with their sum are 34%."""
    workload = make()
    expected = workload.outcome(nullcontext())
    plain = workload.peak(nullcontext())
    for share in (least, 0.5, 0.75):
        budget = workload.standing() + int(share * plain)
        session = rekindle.Session(memory_budget=budget)
        workload = make()
        assert [key for key, digest in workload.outcome(session).items() if digest != expected[key]] == []
        workload.peak(session)
        peak = workload.peak(session) + workload.standing()
        assert session.plan is not None
        assert session.plan.forecast is not None
        assert peak <= budget
        assert peak == pytest.approx(session.plan.forecast.peak, rel=0.02)
        assert session.last_step.departures == 0
