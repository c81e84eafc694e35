"""`plan_ahead=True`: the first step of a shape follows a plan that was made before it ran."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
import zoo
from helpers import Managed, Step, assert_same, live_activations, small_batch, small_model, train
from peak import peak_bytes
from rekindle import BudgetInfeasible, RehearsalWarning, Session, SessionError
from rekindle.graph import simulate
from rekindle.policy import Planner
from rekindle.runtime.rehearse import rehearse
from rekindle.runtime.room import kept_back
from watch import modes

pytestmark = pytest.mark.usefixtures("counting")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No activation outlives a test."""
    yield
    gc.collect()  # errors that a test caught hold frames, and frames activations
    assert live_activations() == 0


ROWS = 256


def summed(model: nn.Module, number: int, managed: Managed) -> Tensor:
    """A step whose loss is the one that a rehearsal takes."""
    with managed:
        loss = model(small_batch(number, rows=ROWS)).sum()
        loss.backward()
    return loss


def squared(model: nn.Module, number: int, managed: Managed) -> Tensor:
    """A step with a loss that no rehearsal can know."""
    with managed:
        loss = model(small_batch(number, rows=ROWS)).square().mean()
        loss.backward()
    return loss


def budget_for(share: float, rows: int = ROWS) -> int:
    """A budget that lies a share of the way from the floor of the small model's step to what it needs with all kept."""
    planner = Planner(rehearse(small_model(), (small_batch(0, rows=rows),)))
    budget = planner.floor() + int(share * (planner.full - planner.floor()))
    return budget + kept_back(budget + kept_back(budget)) + (1 << 13)  # the batch is drawn in the session: a state


def planned_replays(plan: rekindle.Plan | None) -> int:
    """Ops that a plan says are replayed."""
    assert plan is not None
    assert plan.graph is not None
    return sum(map(len, simulate(plan.graph, plan).replays))


def first_steps(step: Step, session: Session) -> list[tuple[int, int]]:
    """For each of four exact steps, the ops that were replayed and those that the plan it began with said."""
    seen: list[tuple[int, int]] = []

    def watched(model: nn.Module, number: int, managed: Managed) -> Tensor | Any:
        planned: list[int] = []

        def look(module: nn.Module, args: Any) -> None:
            if module is model[1]:  # not its copy, on which hooks run in the rehearsal
                planned.append(planned_replays(session.plan))

        hook = model[1].register_forward_pre_hook(look)
        loss = step(model, number, managed)
        hook.remove()
        seen.append((session.last_step.ops_replayed, planned[-1]))
        return loss

    assert_same(train(small_model, step, steps=4), train(small_model, watched, session, steps=4))
    assert session.stats.failed_recomputes == 0
    return seen


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_the_first_step_obeys(share: float) -> None:
    """The very first step replays just the ops that the rehearsed plan says, departs from nothing, and is exact; later
    ones follow plans of what was recorded."""
    session = Session(memory_budget=budget_for(share), plan_ahead=True)
    seen = first_steps(summed, session)
    assert all(replayed == planned > 0 for replayed, planned in (seen[0], seen[-1]))
    assert session.stats.departures == 0
    assert session.stats.rehearsals == 1


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_loss_of_ones_own(share: float) -> None:
    """What comes after the model's forward is not in the plan; the plan is obeyed in the model all the same, in its
    backward pass too, and the budget holds by the session's own count."""
    session = Session(memory_budget=budget_for(share), plan_ahead=True)
    model = small_model()
    with session:
        model(small_batch(0, rows=ROWS)).square().mean().backward()
    assert session.stats.departures == 0
    assert session.last_step.ops_replayed > 0
    assert session._highest() <= session.memory_budget


@pytest.mark.parametrize("share", [0.3])
def test_a_loss_of_ones_own_is_exact(share: float) -> None:
    """Steps with such a loss equal plain ones, and none departs."""
    session = Session(memory_budget=budget_for(share), plan_ahead=True)
    first_steps(squared, session)
    assert session.stats.departures == 0


def test_nothing_is_made_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsed plan has room for the step: no sweep is needed on the way. Without it, several are."""
    for ahead in (True, False):
        torch.manual_seed(0)
        session = Session(memory_budget=budget_for(0.3), plan_ahead=ahead)
        summed(small_model(), 0, session)
        assert (session.stats.sweeps == 0) is ahead


def test_shapes_are_planned_once_each() -> None:
    """Each new shape is rehearsed in its first step only, and the plans of recorded steps are followed after that."""
    session = Session(memory_budget=budget_for(0.5, rows=320), plan_ahead=True)
    counts: list[tuple[int, int]] = []

    def step(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with managed:
            loss = model(small_batch(number, rows=(256, 320)[number % 2])).sum()
            loss.backward()
        if isinstance(managed, Session):
            counts.append((managed.last_step.rehearsals, managed.last_step.departures))
        return loss

    assert_same(train(small_model, step, steps=4), train(small_model, step, session, steps=4))
    assert counts[:2] == [(1, 0), (1, 0)]
    assert [rehearsals for rehearsals, _ in counts[2:]] == [0, 0]


class Counting(nn.Module):
    """Counts the ops that run for real."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = small_model(), torch.zeros(1)

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        """The small model, called by keyword."""
        self.calls += 1
        return self.model(x) * scale


def test_infeasible_before_the_step() -> None:
    """A budget below the floor is refused before an op has run, with the floor and the budget as stated, each time."""
    model = Counting()
    session = Session(memory_budget="700KiB", plan_ahead=True)
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(BudgetInfeasible, match=r"memory_budget is 700\.0 KiB, but the step needs .* at"), session:
            model(x=small_batch(0, rows=ROWS))
    assert model.calls.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert modes() == 0
    assert session.stats.rehearsals == 0


def test_keyword_arguments() -> None:
    """A model that is called by keyword is rehearsed with what it was called with."""
    model, session = Counting(), Session(memory_budget=budget_for(0.5) + (1 << 17), plan_ahead=True)
    with session:
        model(x=small_batch(0, rows=ROWS), scale=2.0).sum().backward()
    assert (session.stats.rehearsals, session.stats.departures) == (1, 0)
    assert session.stats.ops_replayed > 0
    assert model.calls.item() == 1


def test_applied() -> None:
    """Under `apply` the forward that begins a step is the one that is rehearsed, and the backward pass obeys."""
    model = rekindle.apply(small_model(), memory_budget=budget_for(0.3), plan_ahead=True)
    session = rekindle.session_of(model)
    plain = small_model()
    plain.load_state_dict(model.state_dict())
    plans = []
    for each in (plain, model):
        torch.manual_seed(1)
        loss = each(small_batch(0, rows=ROWS)).sum()
        plans.append(session.plan)  # before it is planned again, as it was recorded
        loss.backward()
    rekindle.remove(model)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    assert (session.stats.rehearsals, session.stats.departures) == (1, 0)
    assert session.stats.ops_replayed == planned_replays(plans[-1]) > 0


def test_hugging_face_style_loss() -> None:
    """A model that returns its loss is planned to the end of the step: measured by the allocator, the first step holds
    the budget and needs no sweep."""
    entry = next(entry for entry in zoo.ZOO if entry.name == "gpt2")
    torch.manual_seed(0)
    model, batch = entry.make(), entry.batch(0)
    planner = Planner(rehearse(model, (), batch))
    budget = (planner.floor() + planner.full) // 2
    session = Session(memory_budget=budget, plan_ahead=True)

    def run() -> None:
        with session:
            zoo.loss_of(model, batch).backward()

    tensors = [*model.parameters(), *(value for value in batch.values() if isinstance(value, Tensor))]
    standing = sum(tensor.nbytes for tensor in tensors)
    assert peak_bytes(run) + standing <= budget
    assert session.stats.rehearsals == 1
    assert session.stats.departures == session.stats.sweeps == 0
    assert session.stats.ops_replayed > 0


def with_gradients() -> nn.Module:
    """The small model, its gradients allocated."""
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def standing_of(model: nn.Module, x: Tensor) -> int:
    """Bytes of parameters, gradients and the batch."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *gradients, x))


def budget_with_gradients(share: float) -> int:
    """A budget that lies a share of the way from floor to full of the step that adds to gradients."""
    planner = Planner(rehearse(with_gradients(), (small_batch(0, rows=ROWS),)))
    budget = planner.floor() + int(share * (planner.full - planner.floor()))
    return budget + kept_back(budget + kept_back(budget))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_gradients_are_there(share: float) -> None:
    """Gradients that a step adds to count once: from the floor of such a step on, budgets are accepted, the plan is
    followed, the allocator's peak is within 2% of the predicted one and within the budget, and no bit differs."""
    torch.manual_seed(0)
    model, x = with_gradients(), small_batch(0, rows=ROWS)
    plain = with_gradients()
    plain.load_state_dict(model.state_dict())
    session = Session(memory_budget=budget_with_gradients(share), plan_ahead=True)
    standing, plans = standing_of(model, x), []
    model[0].register_forward_pre_hook(lambda module, args: plans.append(session.plan))

    def run() -> None:
        with session:
            model(x).sum().backward()

    state = torch.get_rng_state()
    peak = standing + peak_bytes(run)
    torch.set_rng_state(state)
    plain(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    assert peak <= session.memory_budget
    predicted = plans[-1].forecast.peak - kept_back(session.memory_budget)  # what is kept back stands in the rehearsal
    assert peak == pytest.approx(predicted, rel=0.02)
    assert (session.stats.rehearsals, session.stats.departures, session.stats.sweeps) == (1, 0, 0)
    assert session.stats.ops_replayed > 0


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_gradients_come_and_go(share: float) -> None:
    """Steps that add to gradients take turns with steps that make them: each is rehearsed once and has its own plan,
    none departs, the budget holds in each by the allocator's events, and all are exact."""
    session = Session(memory_budget=budget_with_gradients(share), plan_ahead=True)
    peaks, departures = [], []

    def step(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x, losses = small_batch(number, rows=ROWS), []

        def run() -> None:
            with managed:
                losses.append(model(x).sum())
                losses[-1].backward()

        for _ in range(2):
            standing, peak = standing_of(model, x), peak_bytes(run)
            if isinstance(managed, Session):
                peaks.append(standing + peak)
                departures.append(managed.last_step.departures)
        return torch.stack([loss.detach() for loss in losses])

    assert_same(train(small_model, step), train(small_model, step, session))
    assert max(peaks) <= session.memory_budget
    assert departures == [0] * 6
    assert session.stats.rehearsals == 2
    assert session.stats.ops_replayed > 0


class ByData(nn.Module):
    """Looks at its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def forward(self, x: Tensor) -> Tensor:
        """The small model, and its negative if that is larger."""
        x = self.model(x)
        return x if x.sum() > 0 else -x


def test_what_cannot_be_rehearsed() -> None:
    """It warns once and says why, goes on line, is exact and recorded; later steps are planned."""
    session = Session(memory_budget=budget_for(0.7) + (1 << 18), plan_ahead=True)

    def step(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = squared(model, number, managed)
        told = [str(warning.message) for warning in caught if issubclass(warning.category, RehearsalWarning)]
        if isinstance(managed, Session):
            assert len(told) == (number == 0)
            assert all("ByData cannot be rehearsed" in text and "depends on the content" in text for text in told)
        return loss

    assert_same(train(ByData, step), train(ByData, step, session))
    assert session.stats.rehearsals == 0
    assert session.plan is not None


def test_another_forward_than_rehearsed() -> None:
    """A forward that differs from its rehearsal goes on line where it departs, is counted, and exact."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()

        def forward(self, x: Tensor) -> Tensor:
            x = self.model[0](x)
            return self.model[1:](x.tanh() if type(x) is Tensor else x)

    session = Session(memory_budget=budget_for(0.7) + (1 << 18), plan_ahead=True)
    assert_same(train(Fickle, squared), train(Fickle, squared, session))
    assert session.stats.rehearsals == session.stats.departures == 1


def test_what_is_not_rehearsed() -> None:
    """Neither evaluation, nor modules that train nothing, nor a second module of the step."""
    model, session = small_model(), Session(memory_budget="64MiB", plan_ahead=True)
    with session, torch.no_grad():
        model(small_batch(0))
    assert session.stats.rehearsals == 0
    with session:
        model(nn.Dropout(0.5)(small_batch(0))).sum().backward()
    model.zero_grad()
    with session:
        nn.MSELoss()(model(small_batch(0)), small_batch(1)).backward()
    assert session.stats.rehearsals == 1  # the model is called with the same sizes both times


def test_modes_of_others() -> None:
    """What the user has switched on around the model sees no op of the rehearsal, and is on as before after it."""

    class Counter(TorchDispatchMode):
        ops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops += 1
            return func(*args, **(kwargs or {}))

    def count(ahead: bool) -> int:
        torch.manual_seed(0)
        model, session = small_model(), Session(memory_budget="64MiB", plan_ahead=ahead)
        x = small_batch(0)
        with session, Counter() as counter, torch.autocast("cpu", torch.bfloat16):
            model(x).float().sum().backward()
        assert session.stats.rehearsals == ahead
        assert session.stats.departures == 0
        return counter.ops

    assert count(True) == count(False)


def test_is_for_budgets() -> None:
    """Without a budget, or with a policy or a plan, there is nothing to plan ahead for, and the message says what to
    write."""
    for options in ({}, {"policy": rekindle.KeepNone(), "memory_budget": "1GiB"}, {"policy": rekindle.KeepNone()}):
        with pytest.raises(SessionError, match=r'rekindle\.Session\(memory_budget="6GiB", plan_ahead=True\)'):
            Session(plan_ahead=True, **options)
