"""Steps that keep everything within a budget rest: plain PyTorch, with nothing recorded, until one is another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peers
import rekindle
from helpers import Layer, Managed, assert_same, live_activations, small_batch, small_model, train
from peak import peak_bytes
from rekindle import Session
from rekindle.record.torch_private import modes_and_hooks
from rekindle.runtime import rest
from rekindle.runtime.room import kept_back
from watch import modes

pytestmark = pytest.mark.usefixtures("counting")

ROWS = 256
PLENTY = "64MiB"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No activation outlives a test, and no mode or hook stays active."""
    yield
    assert modes_and_hooks() == ((), None)
    gc.collect()  # errors that a test caught hold frames, and frames activations
    assert live_activations() == 0


class Watching(nn.Module):
    """The small model, noting in each forward how many modes are active, and whether saved-tensor hooks are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()
        self.tail = nn.Linear(64, 64)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        """A chain."""
        x = self.model(x)
        modes, hooks = modes_and_hooks()
        self.seen.append((len(modes), hooks is not None))
        return self.tail(x)


AWAKE, ASLEEP = (1, True), (0, False)


def step(model: nn.Module, number: int, managed: Managed) -> Tensor:
    """A step of training."""
    x = small_batch(number, rows=ROWS)
    with managed:
        loss = model(x).square().mean()
        loss.backward()
    return loss


def check(
    step: Callable[[nn.Module, int, Managed], Tensor],
    session: Session | None = None,
    make: Callable[[], nn.Module] = Watching,
    steps: int = 7,
) -> tuple[list[bool], Session]:
    """Train with and without a session: no bit differs. Returns which steps rested."""
    session = Session(memory_budget=PLENTY) if session is None else session
    rested: list[bool] = []

    def counted(model: nn.Module, number: int, managed: Managed) -> Tensor:
        loss = step(model, number, managed)
        if managed is session:
            rested.append(bool(session.last_step.rested))
        return loss

    assert_same(train(make, step, steps=steps), train(make, counted, session, steps=steps))
    assert session.stats.rested >= sum(rested)
    assert session.stats.failed_recomputes == 0
    return rested, session


# -- what rests --------------------------------------------------------------------------------------------------------


def test_nothing_is_active() -> None:
    """Two steps are recorded, one is looked at, and the later ones run with no dispatch mode and no hook, exactly."""
    models: list[Any] = []

    def make() -> nn.Module:
        models.append(Watching())
        return models[-1]

    rested, session = check(step, make=make)
    assert rested == [False] * 3 + [True] * 4
    assert models[-1].seen == [AWAKE] * 3 + [ASLEEP] * 4
    assert session.stats.departures == session.stats.evicted == 0


def test_what_is_known_of_a_resting_step() -> None:
    """Graph and plan are those from before it rested. It is counted as a step, and nothing of it is measured."""
    torch.manual_seed(0)
    model, session = small_model(), Session(memory_budget=PLENTY)
    for number in range(6):
        step(model, number, session)
        model.zero_grad()
    graph, plan, peak = session.graph, session.plan, session.stats.peak_nbytes
    step(model, 6, session)
    last = session.last_step
    assert (last.steps, last.rested, last.checkpoints, last.peak_nbytes) == (1, 1, 0, 0)
    assert session.stats.peak_nbytes == peak > 0
    assert session.graph is graph
    assert session.plan is plan


def test_one_in_some_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many resting steps one is looked at; if it went as planned the next ones rest again."""
    monkeypatch.setattr(rest, "_EVERY", 3)
    rested, _ = check(step, steps=10)
    assert rested == [False] * 3 + [True, True, False] * 2 + [True]


def test_a_change_that_nothing_shows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes outside of all modules is found by the step that is looked at, and then planned."""
    monkeypatch.setattr(rest, "_EVERY", 3)

    def changing(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        with managed:
            loss = model(x).square().mean() if number < 4 else model(x).exp().cos().mean()
            loss.backward()
        return loss

    rested, session = check(changing, steps=10)
    assert rested[3:6] == [True, True, False]
    assert rested[-1]
    assert session.stats.departures == 2  # when it was found, and in the step after it, which is recorded


def test_ops_before_the_model() -> None:
    """What runs before the first call of a module is recorded as ever, and is asked for while the step rests."""

    def early(model: nn.Module, number: int, managed: Managed) -> Tensor:
        weight = model.tail.weight
        with managed:
            x = small_batch(number, rows=ROWS).mul(2).sin() @ weight.exp().sin()
            loss = model(x).square().mean()
            loss.backward()
        return loss

    rested, session = check(early)
    assert rested == [False] * 3 + [True] * 4
    assert session.stats.departures == 0


def test_several_modules() -> None:
    """A step of several outermost modules rests, also with an evaluation in it, and with several backward passes."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.loss = small_model(4), small_model(1), nn.MSELoss()

    def several(model: Any, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        with managed:
            with torch.no_grad():
                goal = model.one(x)
            model.loss(model.other(model.one(x)), goal).backward()
            loss = model.loss(model.other(x), goal)
            loss.backward()
        return loss

    rested, session = check(several, make=Pair)
    assert rested == [False] * 3 + [True] * 4
    assert session.stats.departures == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_pytorch(reentrant: bool) -> None:
    """Modules that PyTorch's own checkpoints call again in the backward pass are part of a resting step."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = small_model(), Layer()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, self.first(x), use_reentrant=reentrant)

    rested, session = check(step, make=Checkpointed)
    assert all(rested[4:])
    assert session.stats.departures == 0


def test_planned_ahead() -> None:
    """A session that plans ahead rests too, once steps were recorded."""
    rested, session = check(step, Session(memory_budget=PLENTY, plan_ahead=True))
    assert rested[-1]
    assert session.stats.rehearsals == 1


# -- what wakes it up --------------------------------------------------------------------------------------------------


def standing(model: nn.Module, x: Tensor) -> int:
    """Bytes that are there before a step, gradients left out."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), x))


def test_another_shape_keeps_the_budget() -> None:
    """A shape that the budget has no room for is managed in the very step that it comes in, below the budget by the
    allocator's events, and exact; after it the known shape rests again."""

    def changing(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=2 * ROWS if number == 4 else ROWS)
        with managed:
            loss = model(x).square().mean()
            loss.backward()
        return loss

    torch.manual_seed(0)
    model = small_model()
    plain = peak_bytes(lambda: step(model, 0, Session()))
    budget = standing(model, small_batch(0, rows=2 * ROWS)) + int(1.3 * plain)
    rested, session = check(changing, Session(memory_budget=budget), make=small_model, steps=9)
    assert rested == [False] * 3 + [True, False, False, False, True, True]
    assert session.stats.evicted > 0

    model.zero_grad()
    for number in range(5):
        step(model, number, session)
        model.zero_grad()
    assert session.last_step.rested
    for x in (small_batch(0, rows=2 * ROWS), small_batch(1, rows=2 * ROWS)):

        def run(x: Tensor = x) -> None:
            with session:
                model(x).square().mean().backward()

        assert standing(model, x) + peak_bytes(run) <= budget
        assert session.last_step.ops_replayed > 0
        model.zero_grad()


def freeze(model: nn.Module) -> None:
    """Train one layer less."""
    model.model[1].requires_grad_(False)


@pytest.mark.parametrize("change", [lambda model: model.model[1].eval(), freeze], ids=["eval", "freeze"])
def test_another_mode(change: Callable[[nn.Module], object]) -> None:
    """A module of another mode, or parameters that are trained no more, make it another step, which is looked at; in
    time that rests as well."""

    def changing(model: nn.Module, number: int, managed: Managed) -> Tensor:
        if number == 4:
            change(model)
        return step(model, number, managed)

    rested, _ = check(changing, steps=11)
    assert rested[:5] == [False] * 3 + [True, False]
    assert rested[-1]


def test_autocast() -> None:
    """So does autocast."""

    def changing(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=number == 4):
            return step(model, number, managed)

    rested, _ = check(changing, steps=5)
    assert rested == [False] * 3 + [True, False]


ORDER = [0, 1, 2, 3, 4]


def just_enough(model: nn.Module) -> int:
    """The budget with which all is just kept in a step from no gradients."""
    session = Session(memory_budget=PLENTY)
    for number in range(2):
        step(model, number, session)
        model.zero_grad()
    assert session.plan is not None
    assert session.plan.forecast is not None
    budget = session.plan.forecast.peak + 4096
    return budget + kept_back(2 * budget)


class Skipping(nn.Module):
    """Leaves layers out, or calls them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.order = ORDER
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        """A chain in the order of the day."""
        for number in self.order:
            modes, hooks = modes_and_hooks()
            self.seen.append((len(modes), hooks is not None))
            x = self.layers[number](x)
        return x


def test_another_order_of_modules() -> None:
    """A step that calls other modules than the resting one is looked at from there on, counted and exact; the order
    that the user comes back to rests again, but not for ever."""
    models: list[Any] = []

    def make() -> nn.Module:
        models.append(Skipping())
        return models[-1]

    def skipping(model: Any, number: int, managed: Managed) -> Tensor:
        model.order = [0, 1, 0, 1, 2, 3, 4] if number in (4, 9, 14, 19) else ORDER
        return step(model, number, managed)

    rested, session = check(skipping, make=make, steps=22)
    assert rested[:9] == [False] * 3 + [True, True, False, False, True, True]
    assert session.stats.departures >= 3
    assert not any(rested[15:])
    seen = models[-1].seen
    assert seen[20:27] == [ASLEEP] * 3 + [AWAKE] * 4


def test_fewer_modules() -> None:
    """A resting step that ends early is another step as well."""

    def ending(model: Any, number: int, managed: Managed) -> Tensor:
        model.order = ORDER[:3] if number == 4 else ORDER
        return step(model, number, managed)

    rested, session = check(ending, make=Skipping)
    assert rested == [False] * 3 + [True, True, False, False]
    assert session.stats.departures == 1


def test_another_second_module() -> None:
    """A second outermost module that is not the known one wakes the session up, and room is made from there on."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = small_model(4), small_model(4)

    found: list[tuple[int, bool]] = []

    def several(model: Any, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        with managed:
            loss = model.one(x).square().mean()
            if number >= 4:
                loss = loss + model.other(x).square().mean()
            modes, hooks = modes_and_hooks()
            found.append((len(modes), hooks is not None))
            loss.backward()
        return loss

    rested, session = check(several, make=Pair, steps=9)
    assert rested[:5] == [False] * 3 + [True, True]
    assert found[-9:-4] == [AWAKE] * 3 + [ASLEEP, AWAKE]
    assert session.stats.departures == 2  # when it came, and in the step after it, which is recorded
    assert rested[-1]


def test_evaluation_in_between() -> None:
    """An evaluation inside the block now and then is exact, and wakes the session up."""

    def evaluating(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        with managed:
            loss = model(x).square().mean()
            loss.backward()
            if number == 4:
                with torch.no_grad():
                    loss = loss + model(x * 2).mean()
        return loss

    rested, session = check(evaluating, make=small_model)
    assert rested[3:6] == [True, True, False]
    assert session.stats.departures == 1


def test_waking_makes_room() -> None:
    """What a step that woke up makes from there on goes as the budget needs, with what it made before counted."""
    torch.manual_seed(0)
    model, x = Skipping(), small_batch(0, rows=ROWS)
    session = Session(memory_budget=just_enough(model))

    def run() -> None:
        with session:
            model(x).square().mean().backward()
        model.zero_grad()

    for _ in range(4):
        run()
    assert session.last_step.rested
    model.order = ORDER + ORDER
    plain = peak_bytes(lambda: model(x).square().mean().backward())
    model.zero_grad()
    small = peak_bytes(run)
    assert session.last_step.rested == session.last_step.departures == 1
    assert session.last_step.ops_replayed > 0
    assert small < plain


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda y: y.add_(1),
    "part": lambda y: y[:4].zero_(),
    "detached": lambda y: y.detach().mul_(2),
    "list": lambda y: torch._foreach_add_([y], 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_over_what_was_saved_at_rest(name: str) -> None:
    """What autograd saved while the step rested and is written over once it woke up is refused, as in plain PyTorch."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tanh, self.other, self.writes = small_model(), nn.Tanh(), nn.Identity(), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.tanh(self.model(x))
            if self.writes:
                y = self.other(y)
                WRITES[name](y)
            return y

    torch.manual_seed(0)
    model, session = Writing(), Session(memory_budget=PLENTY)
    for number in range(6):
        step(model, number, session)
        model.zero_grad()
    assert session.last_step.rested
    model.writes = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model, 6, session)
    assert session.last_step.rested == session.last_step.departures == 1


@pytest.mark.parametrize("room", [False, True])
def test_gradients_that_stay(room: bool) -> None:
    """Gradients that were not there when the step was looked at count: if there is no room for them it does not
    rest."""
    torch.manual_seed(0)
    model = small_model()
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    session = Session(memory_budget=just_enough(model) + 2 * room * gradients)
    for number in range(5):
        model.zero_grad()
        step(model, number, session)
    assert session.last_step.rested
    step(model, 5, session)  # the gradients of the last step are there
    assert session.last_step.rested == room
    assert session.stats.departures == 0 or not room


def test_modules_made_anew() -> None:
    """A model that calls other module objects in each step, though all of one kind, wakes its session up some times,
    and then never rests."""

    class Slicing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.model[2:](self.model[:2](x))

    rested, session = check(step, make=Slicing, steps=16)
    assert sum(rested) == session.stats.departures == 3
    assert not any(rested[-4:])


# -- what never rests --------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """How much comes out of it depends on data."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.model, self.how = small_model(), how

    def forward(self, x: Tensor) -> Tensor:
        """Some of the rows."""
        x = self.model(x)
        if self.how == "mask":
            return x[x.sum(1) > 0]
        if self.how == "nonzero":
            return x[(x.sum(1) > 0).nonzero()[:, 0]]
        if self.how == "item":
            return x * 2 if x.sum().item() > 0 else x
        x = x * 1
        x[x > 0] = 0
        return x


@pytest.mark.parametrize("how", ["mask", "nonzero", "item", "write"])
def test_sizes_by_data(how: str) -> None:
    """Steps whose sizes, or ops, depend on data are always looked at."""
    rested, _ = check(step, make=lambda: Masked(how))
    assert not any(rested)


def test_constants() -> None:
    """What is looked at but computed from nothing but sizes, as Transformers does with positions, is in no way."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.data = small_model(), False

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[0])
            packed = (positions.diff() - 1).ne(0).cumsum(-1)
            if self.data:
                packed = packed + x[1:, 0].isnan()
            return self.model(x) if (packed == 0).all() else x

    rested, _ = check(step, make=Looking, steps=5)
    assert rested == [False] * 3 + [True] * 2

    def with_data(model: Any, number: int, managed: Managed) -> Tensor:
        model.data = True
        return step(model, number, managed)

    rested, _ = check(with_data, make=Looking, steps=5)
    assert not any(rested)


@pytest.mark.parametrize("make", [peers.gpt2, peers.llama], ids=["gpt2", "llama"])
def test_transformers(make: Callable[..., peers.Workload]) -> None:
    """Language models of Transformers rest."""
    workload = make(layers=4, width=64, heads=4, length=32, vocabulary=128)
    expected = workload.outcome(nullcontext())
    session = Session(memory_budget="1GiB")
    for _ in range(6):
        assert workload.outcome(session) == expected
    assert session.last_step.rested


def test_tight_budgets() -> None:
    """Steps that recompute anything are always looked at."""
    session = Session(memory_budget="1200KiB")
    rested, _ = check(step, session, make=small_model)
    assert not any(rested)
    assert session.stats.ops_replayed > 0


OPTIONS: dict[str, Callable[[], Session]] = {
    "verify": lambda: Session(memory_budget=PLENTY, verify=True),
    "snapshot": lambda: Session(memory_budget=PLENTY, inplace="snapshot"),
    "pressure": lambda: Session(memory_budget=PLENTY, pressure=rekindle.Pressure(rekindle.FakeReader(0, 1 << 30))),
    "policy": lambda: Session(rekindle.SpeedOptimal(0.5), memory_budget=PLENTY),
    "on the go": lambda: Session(rekindle.EveryN(2), memory_budget=PLENTY),
    "no budget": Session,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_asked_for_more(name: str) -> None:
    """Who asks to verify, to write in place, for sweeps or for a policy has every step looked at."""
    rested, _ = check(step, OPTIONS[name](), steps=5)
    assert not any(rested)


def test_given_plan() -> None:
    """A plan that the user gives refuses other steps, so each is looked at."""
    torch.manual_seed(0)
    model, session = small_model(), Session(memory_budget=PLENTY)
    for number in range(3):
        step(model, number, session)
    rested, _ = check(step, Session(plan=session.plan), make=small_model, steps=5)
    assert not any(rested)


ASKS: dict[str, Callable[[Session, Tensor], object]] = {
    "mark": lambda session, x: session.mark(x),
    "sweep": lambda session, x: session.sweep(),
    "target": lambda session, x: session.sweep_to_target("1MiB"),
}


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("name", ASKS)
def test_by_hand(name: str, first: int) -> None:
    """Marks and sweeps work in any step; from the first one on, no step of the session rests."""

    def asking(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        with managed:
            hidden = model[0](x)
            if isinstance(managed, Session) and number >= first:
                ASKS[name](managed, hidden)
            loss = model[1](model[2](model[3](hidden))).square().mean()
            loss.backward()
        return loss

    rested, _ = check(asking, make=small_model, steps=7)
    assert not any(rested[first + 1 :])


def test_what_is_never_asked_for() -> None:
    """Where autograd saves what the backward pass never asks for, plain PyTorch would keep it: no rest."""

    def idle(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        with managed:
            loss = model(x).square().mean()
            other = model(x + 1).exp().cos().sum()
            loss.backward()
        return loss + other.detach()

    rested, _ = check(idle, make=small_model)
    assert not any(rested)


def test_no_module() -> None:
    """Steps that call no module are always looked at."""
    w, session = small_batch(0, 64).requires_grad_(), Session(memory_budget=PLENTY)
    for number in range(5):
        with session:
            (small_batch(number) @ w).tanh().sin().sum().backward()
        w.grad = None
    assert session.stats.rested == 0


@pytest.mark.parametrize("own_loss", [False, True])
def test_applied(own_loss: bool) -> None:
    """Steps of an applied model rest as those of a session do, and all are exact. One that calls something else wakes
    up and is managed."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_model()
            self.twice = False

        def forward(self, x: Tensor) -> Tensor:
            """Its loss, or what one is made of."""
            x = self.body(x)
            x = self.body[0](x) if self.twice else x
            return x.square().mean() if own_loss else x

    def step(model: nn.Module, number: int, _: object) -> Tensor:
        model.twice = number == 4
        result = model(small_batch(number, rows=ROWS))
        loss = result if own_loss else result.square().mean()
        loss.backward()
        if session:
            rested.append(session[0].last_step.rested)
        return loss.detach()

    def make() -> nn.Module:
        model = rekindle.apply(Model(), memory_budget=PLENTY)
        session.append(rekindle.session_of(model))
        return model

    session: list[Session] = []
    rested: list[int] = []
    plain = train(Model, step, steps=7)
    assert_same(plain, train(make, step, steps=7))
    assert rested[:4] == [0, 0, 0, 1]
    assert session[0].stats.departures == 1  # of the step that woke up
    assert modes() == 0


def test_applied_is_looked_at_after_rest() -> None:
    """The step after one that rested, if it is another, is seen from its outermost module on."""
    model = rekindle.apply(small_model(), memory_budget=PLENTY)
    session = rekindle.session_of(model)
    for number in range(4):
        model(small_batch(number, rows=ROWS)).square().mean().backward()
        model.zero_grad()
    assert session.last_step.rested
    model(small_batch(4, rows=2 * ROWS)).square().mean().backward()
    assert not session.last_step.rested
    assert list(session.modules.roots) == [model]
    rekindle.remove(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_applied_fails_at_rest(error: type[BaseException]) -> None:
    """A step of an applied model that fails while it rests, in forward or backward, leaves nothing open: the user sees
    the error and no other, and later steps are exact."""
    broken: list[str] = []

    def fail(where: str) -> None:
        if where in broken:
            raise error("mine")

    def fragile(model: nn.Module) -> nn.Module:
        model[2].register_forward_pre_hook(lambda *_: fail("forward"))
        model[1].register_full_backward_hook(lambda *_: fail("backward"))
        return model

    def step(model: nn.Module, number: int, _: object) -> Tensor:
        broken[:] = {4: ["forward"], 5: ["backward"]}.get(number, [])
        with pytest.raises(error, match="mine") if broken else nullcontext() as caught:
            model(small_batch(number, rows=ROWS)).square().mean().backward()
        assert caught is None or not getattr(caught.value, "__notes__", [])
        return torch.zeros(())

    sessions: list[Session] = []

    def make() -> nn.Module:
        model = rekindle.apply(fragile(small_model()), memory_budget=PLENTY)
        sessions.append(rekindle.session_of(model))
        return model

    assert_same(train(lambda: fragile(small_model()), step, steps=9), train(make, step, steps=9))
    assert sessions[0].stats.rested > 0
    assert modes() == 0


# -- modes and hooks of others -----------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts ops."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", ["mode", "hooks"])
def test_others_are_active(kind: str, outside: bool) -> None:
    """While somebody else's modes or hooks are active the session does not leave its own, nor touch those."""

    def other() -> Any:
        return Counter() if kind == "mode" else saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)

    def crowded(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x = small_batch(number, rows=ROWS)
        one, two = (other(), managed) if outside else (managed, other())
        with one, two:
            loss = model(x).square().mean()
            loss.backward()
        return loss

    rested, _ = check(crowded, make=small_model, steps=6)
    assert not any(rested)


@pytest.mark.parametrize("kind", ["mode", "hooks"])
def test_waking_inside_of_others(kind: str) -> None:
    """A step that is found to be another while somebody else's modes or hooks are active wakes up after these, and all
    are left in their order."""
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor

    class Crowded(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            with Counter() if kind == "mode" else saved_tensors_hooks(pack, lambda tensor: tensor):
                x = super().forward(x)
            modes, hooks = modes_and_hooks()
            assert hooks is None or hooks[0] is not pack
            assert not any(isinstance(mode, Counter) for mode in modes)
            return self.layers[0](x)

    def skipping(model: Any, number: int, managed: Managed) -> Tensor:
        model.order = [1, 0, 2, 3, 4] if number == 4 else ORDER
        return step(model, number, managed)

    rested, session = check(skipping, make=Crowded)
    assert rested[3:6] == [True, True, False]
    assert session.stats.departures == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_errors(where: str) -> None:
    """A resting step that fails leaves nothing behind, and the next one is exact."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tail, self.fails = small_model(), nn.Linear(64, 64), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.model(x)
            if self.fails and where == "forward":
                raise KeyboardInterrupt
            if self.fails:
                x.register_hook(lambda grad: 1 / 0)
            return self.tail(x)

    def failing(model: Any, number: int, managed: Managed) -> Tensor:
        if number == 4 and isinstance(managed, Session):
            state = torch.get_rng_state()
            model.fails = True
            with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
                step(model, number, managed)
            assert modes_and_hooks() == ((), None)
            model.fails = False
            model.zero_grad()
            torch.set_rng_state(state)
        return step(model, number, managed)

    _, session = check(failing, make=Failing, steps=6)
    assert session.stats.rested >= 2


def test_compiled_once_more() -> None:
    """Dynamo looks at the global hooks, which are fewer while a step rests: it compiles once for that, not each time
    that the session rests or wakes up."""
    counts: list[int] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        counts.append(1)
        return graph.forward

    inner = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    inner.compile(backend=backend)
    model = nn.Sequential(small_model(), inner, nn.GELU())
    session = Session(memory_budget=PLENTY)
    for number in range(10):
        with session:
            loss = model(small_batch(number)).sum()
            if number == 5:
                loss = loss + nn.Tanh()(loss)
            loss.backward()
        model.zero_grad()
    assert session.stats.rested > 2
    assert session.stats.departures
    assert len(counts) <= 3
