"""Plans and batches told before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import rekindle
from helpers import small_batch, small_model
from rekindle.graph import verify_plan
from rekindle.graph.timeline import simulate
from rekindle.policy import Planner
from rekindle.runtime import ahead, learn
from rekindle.runtime.rehearse import rehearse

ROWS = 256


def full_and_floor(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """The bytes with which nothing is recomputed, and those below which there is no plan."""
    planner = Planner(rehearse(model, (x,)))
    return planner.full, planner.floor()


def test_a_plan_for_a_budget() -> None:
    """The plan fits by its own forecast and on paper; with room for all nothing is recomputed, with less room more."""
    model, x = small_model(3), torch.empty(ROWS, 64, device="meta")
    full, floor = full_and_floor(model, x)
    graph = rehearse(model, (x,))
    last = -1.0
    for budget in (full, (full + floor) // 2, floor):
        plan = rekindle.plan(model, x, memory_budget=budget)
        assert plan.forecast is not None
        assert simulate(graph, verify_plan(graph, plan)).peak == plan.forecast.peak <= budget
        assert plan.forecast.seconds > last
        last = plan.forecast.seconds
    assert rekindle.plan(model, x, memory_budget=full).forecast.seconds == 0.0


def test_the_plan_is_that_of_a_recorded_step() -> None:
    """On the CPU the rehearsed step needs as much as the session's own step, before and with a plan."""
    model, x = small_model(3), small_batch(0, ROWS)
    full, floor = full_and_floor(model, x)
    budget = (full + floor) // 2
    plan = rekindle.plan(model, x, memory_budget=budget)
    session = rekindle.Session(memory_budget=budget)
    for _ in range(4):
        model.zero_grad()
        with session:
            model(x).sum().backward()
    assert session.plan is not None
    assert session.plan.forecast.peak <= budget
    assert plan.forecast.peak == pytest.approx(session.plan.forecast.peak, rel=0.1)
    assert session.last_step.ops_replayed > 0


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_inputs(wrap: Any) -> None:
    """Inputs are a tensor, the arguments, or the keyword arguments."""
    model, x = small_model(2), small_batch(0)
    assert rekindle.plan(model, wrap(x), memory_budget="1GiB") == rekindle.plan(model, x, memory_budget="1GiB")


def test_what_the_loss_is() -> None:
    """A function from the outputs to the loss is used, and may name what comes before it in the error."""
    seen: list[torch.Size] = []

    def loss(y: torch.Tensor) -> torch.Tensor:
        seen.append(y.shape)
        return y.square().mean()

    rekindle.plan(small_model(2), small_batch(0), memory_budget="1GiB", loss=loss)
    assert seen == [torch.Size([32, 64])]


def test_a_budget_that_cannot_be_met() -> None:
    """It is said before the step."""
    with pytest.raises(rekindle.BudgetInfeasible):
        rekindle.plan(small_model(3), small_batch(0, ROWS), memory_budget="100KiB")


def test_a_share_of_a_device_that_is_not_there() -> None:
    """A share and "auto" are of the device that is planned for, headroom comes off, and both are checked."""
    model, x = small_model(1), small_batch(0)
    plan = rekindle.plan(model, x, memory_budget=0.5, headroom=10**9, device="H100")
    assert plan.forecast.budget == 39 * 10**9
    assert rekindle.plan(model, x, memory_budget="auto", headroom=0, device="a100").forecast.budget == 80 * 10**9
    with pytest.raises(rekindle.BytesError, match="8GiB"):
        rekindle.plan(model, x, memory_budget="8G")


def test_a_faster_device_recomputes_faster() -> None:
    """Seconds are those of the device."""
    model, x = small_model(3, 512), torch.empty(4096, 512, device="meta")
    full, floor = full_and_floor(model, x)
    slow, fast = (rekindle.plan(model, x, memory_budget=(full + floor) // 2, device=name) for name in ("cpu", "h100"))
    assert 0 < fast.forecast.seconds < slow.forecast.seconds / 10


# -- the largest batch -------------------------------------------------------------------------------------------------


def runs(model: nn.Module, rows: int, budget: int) -> bool:
    """Whether some steps that obey the plan for a budget really run within it."""
    x = small_batch(0, rows)
    session = rekindle.Session(plan=rekindle.plan(model, x, memory_budget=budget))
    standing = sum(tensor.nbytes for tensor in (*model.parameters(), x))
    for _ in range(3):
        model.zero_grad()
        with session:
            model(x).sum().backward()
        if session.last_step.peak_nbytes > budget - standing:
            return False
    return session.stats.departures == 0


def recorded(model: nn.Module, rows: int) -> rekindle.Graph:
    """The graph of a real step."""
    session, x = rekindle.Session(memory_budget="1GiB"), small_batch(0, rows)
    model.zero_grad()
    with session:
        model(x).sum().backward()
    assert session.graph is not None
    return session.graph


def test_the_largest_batch() -> None:
    """The batch that is named fits on paper and the next does not; it runs for real, and for one a tenth larger there
    is no plan from a recorded step either."""
    model = small_model(3)
    full, _ = full_and_floor(model, small_batch(0, ROWS))
    budget = int(0.7 * full)
    batch = rekindle.max_batch(lambda n: torch.empty(n, 64, device="meta"), model, memory_budget=budget)
    assert full_and_floor(model, small_batch(0, batch))[1] <= budget
    assert full_and_floor(model, small_batch(0, batch + 1))[1] > budget
    assert runs(model, batch, budget)
    assert Planner(recorded(model, batch + batch // 10 + 1)).floor() > budget


def test_the_limit() -> None:
    """No batch above the limit is tried, nor any twice."""
    tried: list[int] = []

    def make(batch: int) -> torch.Tensor:
        tried.append(batch)
        return torch.empty(batch, 64, device="meta")

    assert rekindle.max_batch(make, small_model(1), memory_budget="1TiB", limit=100) == 100
    assert max(tried) == 100
    assert sorted(set(tried)) == sorted(tried)
    assert len(tried) <= 8


def test_not_even_one() -> None:
    """If a batch of one does not fit, the message says what it needs."""
    model = small_model(3)
    _, floor = full_and_floor(model, small_batch(0, 1))
    with pytest.raises(rekindle.BudgetInfeasible, match=r"a batch of one needs [\d.]+ .iB"):
        rekindle.max_batch(lambda n: torch.empty(n, 64, device="meta"), model, memory_budget=floor - 1)
    assert rekindle.max_batch(lambda n: torch.empty(n, 64, device="meta"), model, memory_budget=floor) >= 1


def test_what_takes_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning ahead, in a session and for the largest batch is told as it goes: what is planned, and for how much."""
    told: list[str] = []

    @contextmanager
    def telling(what: str) -> Iterator[Callable[[str], None]]:
        told.append(what)
        yield told.append

    for module in (rekindle._api, ahead, learn):
        monkeypatch.setattr(module, "telling", telling)
    model, x = small_model(), small_batch(0)
    plan = rekindle.plan(model, x, memory_budget="64MiB")
    assert plan.graph is not None
    assert told == ["rehearsing the step", f"planning {len(plan.graph.ops)} ops for 64.0 MiB"]

    told.clear()
    rekindle.max_batch(lambda batch: x[:batch], model, memory_budget="64MiB", limit=2)
    assert told[1:] == [f"planning a batch of {batch} for 64.0 MiB" for batch in (1, 2)]

    told.clear()
    session = rekindle.Session(memory_budget="64MiB", plan_ahead=True)
    with session:
        model(x).sum().backward()
    assert session.graph is not None
    assert told[::2] == ["rehearsing the step", f"planning {len(session.graph.ops)} ops for 64.0 MiB"]
