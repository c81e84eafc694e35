"""Backward passes like one that was watched run without the recorder, or most of their nodes do if anybody else's code
may run in them: the numbers are the same, the statistics too, and what has to be seen is seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
from helpers import (
    Doubled,
    Managed,
    assert_same,
    live_activations,
    others_nbytes,
    same_bits,
    small_batch,
    small_model,
    train,
)
from peak import peak_bytes
from rekindle.record import recorder
from rekindle.record.torch_private import current_graph_task, modes_and_hooks
from rekindle.runtime import aside
from rekindle.runtime.aside import Aside
from rekindle.runtime.pressure import FakeReader, Pressure

Seen = list[int]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Grows by one for each op of a backward pass that a recorder is shown, views not counted."""
    numbers: Seen = []

    def spy() -> int:
        if (graph_task := current_graph_task()) != -1:
            numbers.append(1)
        return graph_task

    monkeypatch.setattr(recorder, "current_graph_task", spy)
    return numbers


def step(model: nn.Module, number: int, managed: Managed) -> Tensor:
    """A step of training."""
    return step_on(batch(number), model, managed)


def step_on(x: Tensor, model: nn.Module, managed: Managed) -> Tensor:
    """The same, on a batch that is there."""
    with managed:
        loss = model(x).square().mean()
        loss.backward()
    return loss


def batch(number: int) -> Tensor:
    """What a step is made on."""
    return small_batch(number, rows=256)


def watched(
    seen: Seen,
    session: rekindle.Session,
    step: Callable[[nn.Module, int, Managed], Tensor] = step,
    make: Callable[[], nn.Module] = small_model,
    steps: int = 6,
) -> list[int]:
    """Train with and without a session: no bit differs. Returns how many ops of each backward pass were watched."""
    counts: list[int] = []

    def counted(model: nn.Module, number: int, managed: Managed) -> Tensor:
        seen.clear()
        loss = step(model, number, managed)
        if managed is session:
            counts.append(len(seen))
        return loss

    assert_same(train(make, step, steps=steps), train(make, counted, session, steps=steps))
    assert session.stats.failed_recomputes == 0
    return counts


def half() -> rekindle.Session:
    """A session whose plan recomputes something."""
    return rekindle.Session(memory_budget=others_nbytes() + (1800 << 10))


MAKERS = {
    "KeepNone": lambda: rekindle.Session(rekindle.KeepNone()),
    "EveryN": lambda: rekindle.Session(rekindle.EveryN(3)),
    "SpeedOptimal": lambda: rekindle.Session(rekindle.SpeedOptimal(0.3)),
    "budget": half,
}


@pytest.mark.parametrize("name", MAKERS)
def test_later_steps_are_watched_less(name: str, seen: Seen) -> None:
    """Once a step was watched that was not recorded, nobody watches the backward pass of those like it."""
    session = MAKERS[name]()
    counts = watched(seen, session, steps=8)
    assert session.last_step.ops_replayed > 0
    assert counts[1] > 0
    assert counts[-3:] == [0, 0, 0]


@pytest.mark.parametrize("name", MAKERS)
def test_statistics_are_those_of_a_watched_step(name: str, seen: Seen) -> None:
    """What a step evicts, replays and needs at its peak is told as if it had been watched, and the allocator agrees."""
    torch.manual_seed(0)
    model, session = small_model(), MAKERS[name]()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x, told = batch(0), list[tuple[int, ...]]()
    measured: list[int] = []
    counts: list[int] = []
    for _ in range(7):
        seen.clear()
        measured.append(peak_bytes(lambda: step_on(x, model, session)))
        last = session.last_step
        told.append((last.evicted, last.evicted_nbytes, last.recompute_calls, last.ops_replayed, last.peak_nbytes))
        counts.append(len(seen))
    assert 2 * counts[-1] < counts[1]
    assert set(told[3:]) == {told[3]}
    assert measured[-1] == measured[-2]
    assert abs(measured[-1] - session.last_step.peak_nbytes) <= 0.02 * measured[-1]


def test_one_in_some_is_watched(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many steps one is watched, and the next ones are not again."""
    monkeypatch.setattr(aside, "_EVERY", 3)
    counts = watched(seen, rekindle.Session(rekindle.KeepNone()), steps=10)
    few = min(counts)
    assert [count == few for count in counts] == [False] * 2 + [True, True, False] * 2 + [True, True]


def test_what_user_code_holds_owns_nothing(seen: Seen) -> None:
    """A result that user code holds does not keep alive what it was made from, in a backward pass watched or not."""
    torch.manual_seed(0)
    model, session, x = small_model(8), rekindle.Session(rekindle.EveryN(2)), batch(0)
    alive: list[int] = []
    model[0].norm.weight.register_post_accumulate_grad_hook(lambda _: alive.append(live_activations()))
    counts = []
    for _ in range(6):
        model.zero_grad()
        seen.clear()
        with session:
            y = model(x)
            y.square().sum().backward()
        counts.append(len(seen))
    assert alive[1] == alive[-1]
    assert 2 * counts[-1] < counts[1]


def test_gradients_that_are_there_are_another_kind(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that makes gradients needs more than one that adds to them, and neither is told the other's peak."""
    torch.manual_seed(0)
    model, session, x = small_model(), rekindle.Session(rekindle.KeepNone()), small_batch(0)

    def told() -> list[int]:
        peaks: list[int] = []
        for number in range(12):
            if number % 2 == 0:
                model.zero_grad()
            step_on(x, model, session)
            peaks.append(session.last_step.peak_nbytes)
        return peaks[2:]

    told()
    seen.clear()
    unwatched = told()
    few = len(seen)
    monkeypatch.setattr(aside, "_EVERY", 1)
    seen.clear()
    assert told() == unwatched
    assert unwatched[0] > unwatched[1]
    assert 2 * few < len(seen)


@pytest.mark.parametrize(
    "options",
    [
        {"verify": True},
        {"inplace": "snapshot"},
        {"pressure": Pressure(FakeReader(limit_nbytes=1 << 40))},
    ],
    ids=["verify", "snapshot", "pressure"],
)
def test_who_asks_for_more_watches_all(options: dict[str, Any], seen: Seen) -> None:
    """Where more is to be done at each op than to count, all of them are watched."""
    counts = watched(seen, rekindle.Session(rekindle.KeepNone(), **options))
    assert counts[-1] == counts[1]


def test_recorded_steps_are_watched(seen: Seen) -> None:
    """A step that is recorded is recorded as a whole."""
    torch.manual_seed(0)
    model, session = small_model(), rekindle.Session(rekindle.KeepNone())
    for number in range(4):
        model.zero_grad()
        step(model, number, session)
    ops = [op.name for op in session.graph.ops]
    session._learner.records = True
    model.zero_grad()
    step(model, 4, session)
    assert [op.name for op in session.graph.ops] == ops


# -- what has to be seen is seen ---------------------------------------------------------------------------------------


def nothing(*_: object) -> None:
    """A hook that does nothing, or not yet."""


def on_saved(x: Tensor) -> Tensor:
    """A hook on what autograd saves."""
    y = x.sin()
    y.register_hook(nothing)
    return y.cos()


def globally(register: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    """A hook on all modules there are."""
    return lambda model: register(nothing)


OTHERS: dict[str, Callable[[nn.Module], Any]] = {
    "hook of a parameter": lambda model: model[0].norm.weight.register_hook(nothing),
    "hook after a gradient is complete": lambda model: model[0].norm.weight.register_post_accumulate_grad_hook(nothing),
    "hook of a module": lambda model: model[1].register_full_backward_hook(nothing),
    "hook before a module": lambda model: model[1].register_full_backward_pre_hook(nothing),
    "hook of all modules": globally(torch.nn.modules.module.register_module_full_backward_hook),
    "hook before all modules": globally(torch.nn.modules.module.register_module_full_backward_pre_hook),
    "hook of what is saved": lambda model: model[1].register_forward_hook(lambda module, args, y: on_saved(y)),
    "custom function": lambda model: model[1].register_forward_hook(lambda module, args, y: Doubled.apply(y)),
    "hook that computes": lambda model: model[1].register_forward_hook(lambda module, args, y: computing(y)),
}


def computing(x: Tensor) -> Tensor:
    """A hook on what nobody saves, which runs an op."""
    y = x + 1
    y.register_hook(lambda grad: grad * 2)
    return y + 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("since", [0, 4])
def test_others_are_watched(other: str, since: int, seen: Seen) -> None:
    """Where hooks or custom functions may run, from the first step on or since some steps that nobody watched, the
    recorder steps aside only while PyTorch's own nodes run."""
    session, handles = rekindle.Session(rekindle.KeepNone()), list[Any]()

    def run(model: nn.Module, number: int, managed: Managed) -> Tensor:
        while number == 0 and handles:  # of the plain training
            handles.pop().remove()
        if number == since:
            handles.append(OTHERS[other](model))
        return step(model, number, managed)

    try:
        counts = watched(seen, session, run, steps=since + 4)
    finally:
        handles.pop().remove()
    assert since == 0 or 0 in counts[:since]
    assert 0 < counts[-1] < counts[1]


def test_modes_of_others_see_all(seen: Seen) -> None:
    """Another dispatch mode that is active sees each op, and leaves the recorder where it is."""

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    def logged(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with managed:
            loss = model(batch(number)).square().mean()
            names.clear()
            with Log():
                loss.backward()
            counts.append(len(names))
        return loss

    names, counts = list[str](), list[int]()
    watched(seen, rekindle.Session(rekindle.KeepNone()), logged)
    assert len(set(counts[2:6])) == len(set(counts[8:])) == 1


def test_gradients_asked_for_are_not_watched(seen: Seen) -> None:
    """`autograd.grad` and `autograd.backward` are as `Tensor.backward`."""

    def asked(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with managed:
            loss = model(batch(number)).square().mean()
            if number % 2:
                torch.autograd.backward([loss])
            else:
                parameters = list(model.parameters())
                for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = grad
        return loss

    assert watched(seen, rekindle.Session(rekindle.KeepNone()), asked, steps=8)[-2:] == [0, 0]


def test_the_recorder_is_back_after_an_error(seen: Seen) -> None:
    """A backward pass that nobody watched, and that fails, leaves the session as it was."""
    torch.manual_seed(0)
    model, session = small_model(), rekindle.Session(rekindle.KeepNone())
    for number in range(4):
        step(model, number, session)
    seen.clear()
    with session:
        loss = model(batch(4)).square().mean()
        with pytest.raises(RuntimeError, match="shape"):
            loss.backward(torch.ones(3))
        assert modes_and_hooks()[0] == (session._recorder,)
        loss.backward()
    assert seen  # a second pass
    step(model, 5, session)
    seen.clear()
    step(model, 6, session)
    assert not seen


def stepping(model: nn.Module, every: int) -> Callable[[nn.Module, int, Managed], Tensor]:
    """A step in whose backward pass each weight is written as soon as its gradient is complete, now and then."""
    now = [0]

    def write(parameter: Tensor) -> None:
        if now[0] % every == every - 1:
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.01)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(write)

    def run(model: nn.Module, number: int, managed: Managed) -> Tensor:
        now[0] = number
        return step(model, number, managed)

    return run


@pytest.mark.parametrize("every", [1, 4])
def test_optimizer_in_the_backward_pass(every: int, seen: Seen) -> None:
    """Weights that hooks write in the backward pass, in all steps or only after some that were not watched, are copied
    before, if something is recomputed from them yet."""

    def history(managed: rekindle.Session | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = small_model()
        run = stepping(model, every)
        losses = [run(model, number, managed or Nothing()).detach() for number in range(9)]
        return [*losses, *(parameter.detach().clone() for parameter in model.parameters())]

    session = rekindle.Session(rekindle.KeepNone())
    assert all(map(same_bits, history(None), history(session)))
    assert session.stats.failed_recomputes == 0


@pytest.mark.parametrize("begins", [1, 5])
def test_hooks_that_nobody_knows_of(begins: int, seen: Seen) -> None:
    """A hook on a tensor that nothing saves writes to what something is yet recomputed from. In a pass that is watched
    that is copied before; if the hook did nothing while anybody watched, the session refuses: it never recomputes from
    what was written."""

    def history(managed: Managed) -> list[Tensor]:
        torch.manual_seed(0)
        model, number = small_model(2), 0

        def write(grad: Tensor) -> None:
            if number == begins:
                with torch.no_grad():
                    model[0].up.bias.add_(1)

        def unsaved(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            y = y + 1
            y.register_hook(write)
            return y + 1

        model[0].register_forward_hook(unsaved)
        for number in range(begins + 1):
            model.zero_grad()
            seen.clear()
            step(model, number, managed)
        return [*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())]

    session = rekindle.Session(rekindle.PerModule("0", "1"))
    expected = history(Nothing())
    if begins == 1:
        assert all(map(same_bits, history(session), expected))
        assert seen
        return
    with pytest.raises(rekindle.LeafModified, match=r"0\.up\.bias"):
        history(session)
    assert not seen


class Nothing:
    """A context that does nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class Scribble(torch.autograd.Function):
    """Multiplies, and in its backward pass writes over its factor, when told to."""

    told = False

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        result = grad * ctx.scale + 0 * x
        if Scribble.told:
            ctx.scale.data.fill_(3)
        return result, None


def test_custom_functions_are_watched(seen: Seen) -> None:
    """A custom function begins, after some steps that were not watched, to write over what is read again by a replay
    after it, where autograd does not see it."""

    def run(managed: Managed) -> list[Tensor]:
        torch.manual_seed(0)
        model, left = small_model(2), []
        for number in range(6):
            Scribble.told = number == 5
            scale, x = torch.full((256, 64), 0.5), batch(number)
            with managed:
                early = (model(x) * scale).sin()
                late = Scribble.apply(model(x).sin(), scale)
                (early.sum() + late.sum()).backward()
            left += [parameter.grad.clone() for parameter in model.parameters()]
        return left

    session = rekindle.Session(rekindle.KeepNone())
    assert all(map(same_bits, run(Nothing()), run(session)))
    assert session.last_step.recompute_calls > 1
    assert session.stats.failed_recomputes == 0


def test_double_backward_is_recorded(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass from which another is to follow is watched, after any number that were not, as if all had been:
    what it makes can be recomputed too."""

    def twice(model: nn.Module, number: int, managed: Managed) -> Tensor:
        x, one = batch(number).requires_grad_(), torch.ones(())
        with managed:
            loss = model(x).square().sum()
            if number < 6:
                loss.backward(one)
            else:
                (first,) = torch.autograd.grad(loss, x, one, create_graph=True)  # it begins as the others do
                (loss + first.square().sum()).backward()
        return loss

    counts = watched(seen, rekindle.Session(rekindle.KeepNone()), twice, lambda: small_model(2), 8)
    assert 2 * counts[5] < counts[1]
    monkeypatch.setattr(aside, "_EVERY", 1)
    assert watched(seen, rekindle.Session(rekindle.KeepNone()), twice, lambda: small_model(2), 8)[6:] == counts[6:]


def test_a_second_backward_pass_is_watched(seen: Seen) -> None:
    """Steps with two backward passes are watched in full, and so is a second one after any number of single ones."""

    def two(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with managed:
            loss = model(batch(number)).square().mean()
            loss.backward(retain_graph=number % 5 == 4)
            if number % 5 == 4:
                loss.backward()
        return loss

    counts = watched(seen, rekindle.Session(rekindle.KeepNone()), two, steps=10)
    assert counts[3] < counts[1] <= counts[4] == counts[9]


def test_a_departure_is_watched(seen: Seen) -> None:
    """A step that turns out to be none that was planned makes room op by op, and is watched."""
    session = half()

    def other(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with managed:
            y = model(batch(number))
            loss = (y.sin() if number == 6 else y.square()).mean()  # as many ops and bytes
            loss.backward()
        return loss

    counts = watched(seen, session, other, steps=9)
    assert session.stats.departures == 1
    assert 2 * counts[5] < counts[6]


def test_after_the_block(seen: Seen) -> None:
    """A backward pass after the `with` block is nobody's to watch, and leaves the steps after it as they were."""

    def outside(model: nn.Module, number: int, managed: Managed) -> Tensor:
        with managed:
            loss = model(batch(number)).square().mean()
            if number % 2:
                loss.backward()
        if not number % 2:
            loss.backward()
        return loss

    def told(model: nn.Module, number: int, managed: Managed) -> Tensor:
        loss = outside(model, number, managed)
        if managed is session:
            peaks.append(session.last_step.peak_nbytes)
        return loss

    session, peaks = rekindle.Session(rekindle.KeepNone()), list[int]()
    counts = watched(seen, session, told, steps=8)
    assert counts[::2] == [0] * 4
    assert counts[7] < counts[1]
    assert peaks[2] == peaks[6] < peaks[7]


class ReadsGradient(nn.Module):
    """Adds the gradient that a parameter of another layer has from the steps before."""

    def __init__(self, other: nn.Parameter) -> None:
        super().__init__()
        self.other, self.linear = other, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """Move `x`."""
        return (self.linear(x) + (0 if self.other.grad is None else self.other.grad)).sin()


def test_gradients_that_are_read_are_watched(seen: Seen) -> None:
    """A gradient that the forward pass has read is added to before what was made of it is recomputed: it is copied in
    each step, however many there were."""

    def make() -> nn.Module:
        last = nn.Linear(64, 64)
        return nn.Sequential(ReadsGradient(last.bias), last)

    def history(managed: Managed) -> list[Tensor]:
        torch.manual_seed(0)
        model = make()
        losses = [step(model, number, managed).detach() for number in range(7)]
        return [*losses, *(parameter.grad for parameter in model.parameters())]

    session = rekindle.Session(rekindle.PerModule("0"))
    assert all(map(same_bits, history(session), history(Nothing())))
    assert session.last_step.ops_replayed > 0


@pytest.mark.parametrize("owned", [False, True])
def test_gradients_made_unseen_count(owned: bool, seen: Seen) -> None:
    """What is left of gradients after a step is counted in the next one, whoever the tensors belong to: no step needs
    more than the budget."""
    torch.manual_seed(0)
    model, x = small_model(), batch(0)
    prompt = nn.Parameter(torch.zeros(512, 512))
    if owned:
        model.register_parameter("prompt", prompt)
    trained = list(dict.fromkeys([*model.parameters(), prompt]))

    def once(managed: Managed) -> None:
        with managed:
            ((model(x) * prompt[:256, :64].exp()).square().mean() + prompt.square().mean()).backward()

    def standing() -> int:
        gradients = [tensor.grad for tensor in trained if tensor.grad is not None]
        return sum(tensor.nbytes for tensor in (x, *trained, *gradients))

    once(Nothing())
    model.zero_grad()
    prompt.grad = None
    budget = standing() + int(0.9 * peak_bytes(lambda: once(Nothing())))
    session, counts = rekindle.Session(memory_budget=budget + others_nbytes()), list[int]()
    for number in range(12):
        if number < 6 or number == 9:
            for tensor in trained:
                tensor.grad = None
        before = standing()
        seen.clear()
        with suppress(rekindle.BudgetInfeasible):
            assert before + peak_bytes(lambda: once(session)) <= budget
        counts.append(len(seen))
    assert (counts[5] == 0) is owned
    assert session.stats.recompute_calls > 0


# -- the decision ------------------------------------------------------------------------------------------------------


class Paper:
    """A ledger on paper."""

    live_nbytes = 0
    peak_nbytes = 0


def decides(
    ledger: Paper,
    gradients: Callable[[], int] = lambda: 0,
    fits: Callable[[int], bool] = lambda nbytes: True,
    unattended: Callable[[], bool] = lambda: True,
) -> Aside:
    """A decision on paper."""
    return Aside(ledger, lambda: 0, gradients, fits, unattended)


def played(decision: Aside, ledger: Paper, peak: int, passes: int = 1) -> list[bool]:
    """Play a step. Returns what was decided at each backward pass."""
    ledger.live_nbytes = ledger.peak_nbytes = 100
    decision.begin(True)
    ledger.live_nbytes = ledger.peak_nbytes = 300
    decided = [begun(decision) for _ in range(passes)]
    if not any(decided):
        ledger.peak_nbytes = peak
    ledger.live_nbytes = 0
    return decided


def begun(decision: Aside) -> bool:
    """Begin a backward pass. Returns whether the recorder steps aside in it."""
    decision.backward_begins()
    return decision.active


@pytest.mark.parametrize("fits", [True, False])
def test_not_where_memory_might_run_out(fits: bool) -> None:
    """Where there is little room beside what such a step needs, all is watched: the recorder can try ops again."""
    ledger, asked = Paper(), []

    def ask(nbytes: int) -> bool:
        asked.append(nbytes)
        return fits

    decision = decides(ledger, fits=ask)
    assert played(decision, ledger, 900) == [False]
    decision.ended(lambda: 4900)
    assert played(decision, ledger, 900) == [fits]
    assert decision.whole is fits
    assert asked == [4900]
    assert (ledger.peak_nbytes, decision.highest) == ((900, 4900) if fits else (900, 0))


def test_passes_inside_of_passes() -> None:
    """A backward pass that runs another ends what is decided for it, and the step is no example for others."""
    ledger = Paper()
    decision = decides(ledger)
    assert played(decision, ledger, 900, 3) == [False] * 3
    decision.ended(lambda: 900)
    assert played(decision, ledger, 900) == [False]
    decision.ended(lambda: 900)
    assert played(decision, ledger, 900, 3) == [True, False, False]
    assert not decision.whole


@pytest.mark.parametrize("then", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_nobody_watches_where_nobody_else_runs(then: bool, now: bool) -> None:
    """A backward pass is left alone as a whole if nobody else's code was seen in the one that was watched, and none is
    known now; else the recorder steps aside node by node."""
    ledger, answers = Paper(), [then, now]
    decision = decides(ledger, unattended=lambda: answers.pop(0))
    played(decision, ledger, 900)
    assert not decision.whole
    decision.ended(lambda: 900)
    assert played(decision, ledger, 900) == [True]
    assert decision.whole is (then and now)
    decision.begin(True)
    assert not decision.whole


def test_nothing_more_is_decided_once_it_stops() -> None:
    """A step that goes otherwise than those before is watched from there on, and is no example for others."""
    ledger = Paper()
    decision = decides(ledger)
    played(decision, ledger, 900)
    decision.stop()
    decision.ended(lambda: 900)
    assert played(decision, ledger, 900) == [False]
    decision.ended(lambda: 900)
    assert played(decision, ledger, 900) == [True]
    decision.stop()
    assert not decision.active
    assert not decision.whole
    assert not begun(decision)
    decision.begin(True)
    decision.stop()
    assert not begun(decision)


def test_few_kinds_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of kinds of steps is bounded: the oldest is forgotten."""
    monkeypatch.setattr(aside, "_MOST_KNOWN", 2)
    ledger, elements = Paper(), [0]
    decision = decides(ledger, gradients=lambda: elements[0])
    for elements[0] in (1, 2, 3):
        assert played(decision, ledger, 900) == [False]
        decision.ended(lambda: 900)
    found = {}
    for elements[0] in (3, 2, 1):
        found[elements[0]] = played(decision, ledger, 900) == [True]
    assert found == {3: True, 2: True, 1: False}
