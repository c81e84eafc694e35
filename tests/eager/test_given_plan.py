"""Plans that a session is given: obeyed from the first step on, and refused by a step that they were not made for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rekindle
from helpers import assert_same, live_activations, small_batch, small_model, train
from rekindle import Plan, PlanMismatch, SessionError
from rekindle.policy import Planner

pytestmark = pytest.mark.usefixtures("counting")  # what an earlier test left behind is not ours


def run(model: nn.Module, x: Tensor, way: rekindle.Session) -> None:
    """One forward and backward."""
    with way:
        model(x).square().mean().backward()


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for the small model at half of what there is to save, from a file."""
    torch.manual_seed(0)
    model, session = small_model(), rekindle.Session(memory_budget="1GiB")
    model(small_batch(0)).square().mean().backward()  # the gradients are there, as in every step but the first
    for _ in range(2):
        run(model, small_batch(0), session)
    assert session.graph is not None
    planner = Planner(session.graph)
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    planner.plan((planner.floor() + planner.full) // 2).save(path)
    return Plan.load(path)


def test_obeyed_from_the_first_step_on(plan: Plan) -> None:
    """The first step of a session with a plan recomputes what the plan says, holds its promise, and records nothing."""
    assert plan.graph is not None
    assert plan.forecast is not None
    model, session = small_model(), rekindle.Session(plan=plan)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    replays = sum(map(len, rekindle.graph.simulate(plan.graph, plan).replays))
    for _ in range(2):
        run(model, small_batch(0), session)
        assert session.last_step.ops_replayed == replays > 0
        assert session._ledger.peak_nbytes + session._ledger.leaf_nbytes <= plan.forecast.budget
    assert session.stats.departures == 0
    assert session.graph is plan.graph
    assert session.plan == plan


def test_the_same_bits(plan: Plan) -> None:
    """Training with a plan from a file equals plain training, in its first step too."""

    def step(model: nn.Module, number: int, way: object) -> Tensor:
        x = small_batch(number)
        with way:  # type: ignore[attr-defined]
            loss = model(x).square().mean()
            loss.backward()
        return loss

    assert_same(train(small_model, step), train(small_model, step, rekindle.Session(plan=plan)))


@pytest.mark.parametrize(
    ("layers", "rows", "loss", "message"),
    [
        (4, 16, torch.square, r"at activation 0 .* to make 8\.0 KiB in module '0.*made 4\.0 KiB in module '0"),
        (4, 32, torch.exp, r"the plan expects aten\.pow\S+ to make 8\.0 KiB .* but aten\.exp\.default made 8\.0 KiB"),
        (5, 32, torch.square, r"but aten\.\S+ made 8\.0 KiB in module '4"),
        (4, 32, lambda y: y, r"the plan expects aten\.pow.* but the backward pass began"),
    ],
    ids=["other sizes", "another op", "more layers", "too short"],
)
def test_another_step_is_refused(
    plan: Plan, layers: int, rows: int, loss: Callable[[Tensor], Tensor], message: str
) -> None:
    """A forward pass with other ops, other sizes, more or less of them raises and says where, what was expected and
    what came; nothing of it stays alive."""
    model, x = small_model(layers), small_batch(0, rows=rows)
    with pytest.raises(PlanMismatch, match=message) as caught, rekindle.Session(plan=plan):
        loss(model(x)).mean().backward()
    assert "refusing a plan for another graph" in str(caught.value)
    assert "memory_budget=" in str(caught.value)
    del caught
    gc.collect()  # the error holds frames, and frames activations
    assert live_activations() == 0


def test_nothing_follows_from_a_refusal(plan: Plan) -> None:
    """After a refusal the same session takes the step that it has a plan for."""
    session = rekindle.Session(plan=plan)
    with pytest.raises(PlanMismatch):
        run(small_model(), small_batch(0, rows=16), session)
    run(small_model(), small_batch(0), session)
    assert session.last_step.ops_replayed > 0


def test_a_plan_is_given_alone(plan: Plan) -> None:
    """A plan with a budget or a policy beside it, without a graph, or something that is no plan is refused at once."""
    with pytest.raises(SessionError, match="plan and memory_budget are both given"):
        rekindle.Session(plan=plan, memory_budget="1GiB")
    with pytest.raises(SessionError, match="plan and policy are both given"):
        rekindle.Session(rekindle.KeepNone(), plan=plan)
    with pytest.raises(SessionError, match="no graph to compare"):
        rekindle.Session(plan=Plan(frozenset()))
    with pytest.raises(SessionError, match=r"Write plan=rekindle\.Plan\.load"):
        rekindle.Session(plan=Path("plan.json"))  # type: ignore[arg-type]
