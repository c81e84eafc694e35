"""An op that runs out of memory gets room and a second try, and a third; then its own error is raised."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rekindle
from helpers import same_bits, small_batch
from rekindle.record.schema import KNOWN
from rekindle.runtime.room import Room
from rekindle.runtime.snapshots import Snapshots

aten = torch.ops.aten


class Failing:
    """Stands before an op and fails with one and the same error a number of times, when it is armed.

    Attributes:
        error: what it raises.
        calls: how often the op was tried since it was armed.
    """

    def __init__(self, func: Any, times: int, draws: bool = False) -> None:
        self.func, self.times, self.draws = func, times, draws
        self.error = torch.OutOfMemoryError("no memory left")
        self.calls = 0
        self.armed = True
        self.seen: list[int] = []
        self.live: Callable[[], int] = lambda: 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.armed and not any(arg.is_meta for arg in args if isinstance(arg, Tensor)):
            self.calls += 1
            self.seen.append(self.live())
            if self.calls <= self.times:
                if self.draws:
                    torch.rand(7)  # half of its work was done when it failed
                raise self.error
        return self.func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Failing]]:
    """`fail(func, times)` makes an op run out of memory."""
    made: list[Failing] = []

    def make(func: Any, times: int, draws: bool = False) -> Failing:
        failing = Failing(func, times, draws)
        run = Room.run

        def spy(self, called, args, kwargs, call, random=None):
            return run(self, failing if called is func else called, args, kwargs, call, random)

        monkeypatch.setattr(Room, "run", spy)
        made.append(failing)
        return failing

    yield make
    for failing in made:
        KNOWN.pop(failing, None)
        failing.error.__traceback__ = None  # it holds the frames of the step
    gc.collect()


@pytest.fixture(autouse=True)
def _traits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has the traits of the op it stands before."""
    from rekindle.runtime import room

    traits_of = room.traits_of
    monkeypatch.setattr(room, "traits_of", lambda func: traits_of(getattr(func, "func", func)))


def run(x: Tensor) -> Tensor:
    """Saves three activations, one after an op that draws."""
    return torch.bernoulli((x.exp().sin() * x).sigmoid()).mul(x).tanh().sum()


def plain(function: Callable[[Tensor], Tensor] = run) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and random state of the plain run."""
    torch.manual_seed(0)
    x = small_batch(0).requires_grad_()
    loss = function(x)
    loss.backward()
    return loss.detach(), x.grad, torch.get_rng_state()


def check(loss: Tensor, x: Tensor, function: Callable[[Tensor], Tensor] = run) -> None:
    """Nothing shows of the failure."""
    state = torch.get_rng_state()
    expected, gradient, after = plain(function)
    assert same_bits(loss.detach(), expected)
    assert same_bits(x.grad, gradient)
    assert same_bits(state, after)


@pytest.mark.parametrize("budget", [None, "1GiB"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("func", [aten.sin.default, aten.bernoulli.default, aten.tanh.default])
def test_in_forward(fail: Any, func: Any, times: int, budget: str | None) -> None:
    """Twice at most an aggressive sweep and another try; the op then succeeds, drawing the same numbers."""
    failing = fail(func, times, draws=func is aten.bernoulli.default)
    session = rekindle.Session(memory_budget=budget)
    failing.live = lambda: session.live_nbytes
    torch.manual_seed(0)
    x = small_batch(0).requires_grad_()
    with session:
        loss = run(x)
        failing.armed = False
        loss.backward()
    assert failing.calls == times + 1
    assert session.stats.rescues == times
    assert session.stats.sweeps >= times
    check(loss, x)


def test_sweeps_aggressively(fail: Any) -> None:
    """Before the second try everything recomputable has gone, checkpoints too."""
    failing = fail(aten.tanh.default, 1)
    torch.manual_seed(0)
    session = rekindle.Session()
    failing.live = lambda: session.live_nbytes
    x = small_batch(0).requires_grad_()
    with session:
        hidden = x.exp()
        mark = session.mark(hidden)
        hidden = hidden.sin()
        loss = (hidden * x).tanh().sum()
        assert not mark.is_live
        failing.armed = False
        del hidden
        loss.backward()
    first, second = failing.seen
    assert first - second == x.nbytes  # exp's result; sin's is held by the variable
    check(loss, x, lambda x: (x.exp().sin() * x).tanh().sum())


@pytest.mark.parametrize("times", [1, 2])
def test_in_backward(fail: Any, times: int) -> None:
    """The same for an op of the backward pass, which is not recorded for replay."""
    failing = fail(aten.tanh_backward.default, times)
    session = rekindle.Session()
    torch.manual_seed(0)
    x = small_batch(0).requires_grad_()
    with session:
        loss = run(x)
        loss.backward()
    assert failing.calls == times + 1
    assert session.stats.rescues == times
    check(loss, x)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("func", [aten.sin.default, aten.bernoulli.default])
def test_in_a_replay(fail: Any, func: Any, times: int) -> None:
    """The same for an op that is repeated: what the replay reads stays under it, and its numbers are those it drew."""
    failing = fail(func, times, draws=func is aten.bernoulli.default)
    session = rekindle.Session(rekindle.KeepNone())
    torch.manual_seed(0)
    x = small_batch(0).requires_grad_()
    with session:
        failing.armed = False
        loss = run(x)
        failing.armed = True
        loss.backward()
    assert failing.calls >= times + 1
    assert session.stats.rescues == times
    assert session.stats.failed_recomputes == 0
    check(loss, x)


@pytest.mark.parametrize("budget", [None, "1GiB"])
@pytest.mark.parametrize(
    ("func", "policy", "armed_in_forward"),
    [
        pytest.param(aten.sin.default, None, True, id="forward"),
        pytest.param(aten.bernoulli.default, None, True, id="random"),
        pytest.param(aten.tanh_backward.default, None, False, id="backward"),
        pytest.param(aten.sin.default, rekindle.KeepNone(), False, id="replay"),
    ],
)
def test_original_error(fail: Any, func: Any, policy: Any, armed_in_forward: bool, budget: str | None) -> None:
    """After the third failure the very error that the op raised first is raised, unchanged."""
    failing = fail(func, 99)
    session = rekindle.Session(policy, memory_budget=budget)
    x = small_batch(0).requires_grad_()
    failing.armed = armed_in_forward

    def step() -> None:
        with session:
            loss = run(x)
            failing.armed = True
            loss.backward()

    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    assert str(caught.value) == "no memory left"
    assert caught.value.__cause__ is None
    assert failing.calls == 3
    assert session.stats.rescues == 2
    if armed_in_forward:
        assert caught.value is failing.error


def test_works_afterwards(fail: Any) -> None:
    """A step that was not rescued leaves nothing behind: the next one is exact."""
    failing = fail(aten.sin.default, 3)
    session = rekindle.Session()
    x = small_batch(0).requires_grad_()
    with pytest.raises(torch.OutOfMemoryError), session:
        run(x)
    torch.manual_seed(0)
    with session:
        loss = run(x)
        loss.backward()
    assert failing.calls >= 4
    check(loss, x)


def test_in_place_is_not_retried(fail: Any) -> None:
    """An op that writes may have done half of its work: it is tried once, and its error raised."""
    failing = fail(aten.add_.Tensor, 1)
    session = rekindle.Session()
    x = small_batch(0).requires_grad_()
    with pytest.raises(torch.OutOfMemoryError) as caught, session:
        (x * 2).add_(1)
    assert caught.value is failing.error
    assert failing.calls == 1
    assert session.stats.rescues == 0


def test_batch_norm_is_not_retried(fail: Any) -> None:
    """Nor is one that moves running statistics, which its schema does not say."""
    failing = fail(aten.native_batch_norm.default, 1)
    session = rekindle.Session()
    norm = torch.nn.BatchNorm1d(64)
    with pytest.raises(torch.OutOfMemoryError) as caught, session:
        norm(small_batch(0).requires_grad_())
    assert caught.value is failing.error
    assert session.stats.rescues == 0


def test_other_errors_are_not_rescued(fail: Any) -> None:
    """Only running out of memory is."""
    failing = fail(aten.sin.default, 1)
    failing.error = RuntimeError("something else")  # type: ignore[assignment]
    session = rekindle.Session()
    with pytest.raises(RuntimeError, match="something else") as caught, session:
        run(small_batch(0).requires_grad_())
    assert caught.value is failing.error
    assert (failing.calls, session.stats.rescues) == (1, 0)


def test_snapshots_go_too(fail: Any) -> None:
    """An aggressive sweep takes snapshots last of all, and the gradient is exact still."""
    failing = fail(aten.tanh.default, 1)
    torch.manual_seed(0)
    session = rekindle.Session(inplace="snapshot")
    x = small_batch(0).requires_grad_()
    assert isinstance(session.snapshots, Snapshots)
    with session:
        hidden = x.exp()
        session.mark(hidden)
        loss = (hidden * x).sum()
        hidden.add_(1)
        assert session.snapshots.nbytes == x.nbytes
        loss = loss + x.tanh().sum()
        assert session.snapshots.nbytes == 0
        failing.armed = False
        loss.backward()
    check(loss, x, lambda x: (x.exp() * x).sum() + x.tanh().sum())
