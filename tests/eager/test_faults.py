"""Faults: out of memory, an exception or an interrupt at every single op of a small step, forward, backward, replayed.

Two twins, plain and managed, go through the same steps and the same faults. After each fault everything the user can
see is the same on both sides: parameters, gradients as far as they got, buffers, the random state; and nothing of the
session is left: no mode, no hook, no record. The step after each fault is exact.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
from helpers import same_bits, small_batch
from rekindle import KeepAll, KeepNone, MemoryOptimal, Session
from rekindle.record.schema import traits_of
from rekindle.runtime import replay
from watch import living, modes

pytestmark = pytest.mark.usefixtures("counting", "leaving_nothing")
PACKAGE = str(Path(rekindle.__file__).parent)


class Stop(Exception):
    """An error of the user's own."""


FAULTS: dict[str, Callable[[], BaseException]] = {
    "memory": lambda: torch.OutOfMemoryError("no memory left"),
    "error": lambda: Stop("mine"),
    "interrupt": KeyboardInterrupt,
}
SESSIONS: dict[str, Callable[[], Session]] = {
    "keep-all": lambda: Session(KeepAll(), memory_budget="1GiB"),
    "keep-none": lambda: Session(KeepNone(), min_nbytes=0),
    "memory-optimal": lambda: Session(MemoryOptimal(0.3), min_nbytes=0),
    "snapshots": lambda: Session(KeepNone(), min_nbytes=0, inplace="snapshot"),
    "budget": lambda: Session(KeepNone(), min_nbytes=0, memory_budget="1GiB"),
}


CAUGHT = (Stop, KeyboardInterrupt, torch.OutOfMemoryError, rekindle.RecomputeError)


class Net(nn.Module):
    """What a fault could leave half done: batch statistics, dropout, writes in place, a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        """Some thirty ops."""
        with torch.no_grad():
            self.seen.add_(x.mean(0))
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = F.dropout(F.gelu(self.second(x)), 0.2).mul_(2)
        y.add_(x.sin())
        return self.last(torch.sigmoid(y) * x).square().mean()


class Fault(TorchDispatchMode):
    """Fails at the k-th op that computes something, and at every one after it, until it is left.

    Put around a session it stands beneath it: what it does is done by the kernel, as the session sees it.

    Attributes:
        hit: the name of the op that failed first; empty if none did.
    """

    def __init__(self, number: int, make: Callable[[], BaseException], late: bool) -> None:
        """`late` lets the kernel do its work before it fails."""
        super().__init__()
        self.left, self.make, self.late, self.hit = number, make, late, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if traits_of(func).view or func is torch.ops.aten.equal.default:  # Rekindle itself compares random states
            return func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left >= 0:
            return func(*args, **(kwargs or {}))
        if self.late and not self.hit:
            func(*args, **(kwargs or {}))
        self.hit = self.hit or str(func)
        raise self.make()


class Twin:
    """A model in training, plain or managed, and the random state that it goes on with."""

    def __init__(self, session: Session | None) -> None:
        torch.manual_seed(0)
        self.model, self.session = Net(), session
        self.state = torch.get_rng_state()

    def step(self, number: int, around: Any = None, goes_on: bool = False) -> str:
        """One step, gradients fresh; the name of the exception that ended it, empty if none did. With `goes_on` it is
        caught inside the session, which goes on with another batch."""
        self.model.zero_grad()
        torch.set_rng_state(self.state)
        x, ended = small_batch(number, 8, 16), ""
        try:
            with around or nullcontext(), self.session or nullcontext():
                try:
                    self.model(x).backward()
                except CAUGHT as error:
                    ended = type(error).__name__
                    if not goes_on:
                        raise
                if ended:
                    around.left = 10**9
                    self.model(x + 1).backward()
        except CAUGHT:
            assert ended
        self.state = torch.get_rng_state()
        return ended

    def look(self) -> dict[str, Tensor | None]:
        """All that the user can see."""
        gradients = {f"gradient of {name}": p.grad for name, p in self.model.named_parameters()}
        return {**self.model.state_dict(), **gradients, "random state": self.state}


def assert_alike(plain: Twin, managed: Twin, where: str) -> None:
    """The twins do not differ in one bit."""
    expected, actual = plain.look(), managed.look()
    for name, tensor in expected.items():
        other = actual[name]
        alike = tensor is other if tensor is None or other is None else same_bits(tensor, other)
        assert alike, f"{name} differs after {where}"


def assert_clean(managed: Twin, where: str) -> None:
    """The process is as without Rekindle."""
    session = managed.session
    assert session is not None
    assert modes() == 0, where
    assert not torch_module._global_forward_hooks, where
    assert not torch_module._global_forward_pre_hooks, where
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, where
    assert torch.is_grad_enabled(), where
    assert session._thread is None, where
    assert session._recorder.tape is None, where


def assert_nothing_lives(where: str) -> None:
    """The records are gone. A failed backward pass leaves its graph alive until the next one in plain PyTorch, too."""
    gc.collect()
    assert not living(), where


def fault_everywhere(
    make: Callable[[], Session], fault: str, late: bool, warm: bool = True, goes_on: bool = False
) -> int:
    """Let each op of a step fail in turn, and run a good step after it. Returns how many there were."""
    plain, managed = Twin(None), Twin(make())
    if warm:
        for twin in (plain, managed):
            twin.step(0)
    number = 0
    while True:
        hits, endings = [], []
        for twin in (plain, managed):
            mode = Fault(number, FAULTS[fault], late)
            endings.append(twin.step(number, mode, goes_on))
            hits.append(mode.hit)
        where = f"op {number}, {hits[0]}"
        assert hits[0] == hits[1], number
        assert endings[0] == endings[1], where
        assert_clean(managed, where)
        assert_alike(plain, managed, where)
        if not hits[0]:
            return number
        for twin in (plain, managed):
            assert twin.step(number + 1000) == ""
        assert_alike(plain, managed, f"the step after {where}")
        assert_clean(managed, f"the step after {where}")
        assert_nothing_lives(f"the step after {where}")
        number += 1


def each_fault(*, everywhere: str) -> list[Any]:
    """(session, fault, whether the kernel has done its work): all there is of one session, some of the others."""
    return [
        pytest.param(name, fault, late, id=f"{name}-{fault}-{'after' if late else 'before'}")
        for name in SESSIONS
        for fault in FAULTS
        for late in (False, True)
        if name == everywhere or (fault, late) in (("memory", False), ("error", True))
    ]


@pytest.mark.parametrize(("name", "fault", "late"), each_fault(everywhere="keep-none"))
def test_every_op(name: str, fault: str, late: bool) -> None:
    """Each op of forward and backward in turn raises, before or after its kernel has done its work."""
    assert fault_everywhere(SESSIONS[name], fault, late) > 40


@pytest.mark.parametrize(("name", "fault", "late"), each_fault(everywhere="snapshots"))
def test_caught_inside(name: str, fault: str, late: bool) -> None:
    """The same, caught inside the session, which goes on with another batch in the same block."""
    assert fault_everywhere(SESSIONS[name], fault, late, goes_on=True) > 40


@pytest.mark.parametrize("name", ["keep-none", "memory-optimal"])
def test_every_op_of_the_first_step(name: str) -> None:
    """The same in a session that has not yet seen a whole step, and always has to record the next."""
    assert fault_everywhere(SESSIONS[name], "error", False, warm=False) > 40


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "relu_": lambda x, y: x.relu_(),
    "mul_": lambda x, y: x.mul_(2),
    "copy_": lambda x, y: x.copy_(y),
    "slice": lambda x, y: x[:, 2:5].add_(1),
    "out": lambda x, y: torch.sin(y, out=x),
    "list": lambda x, y: torch._foreach_mul_([x], 2.0),
    "uniform_": lambda x, y: x.uniform_(),
    "batch_norm": lambda x, y: F.batch_norm(y, x[0], x[1].exp(), training=True),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", ["keep-none", "snapshots"])
@pytest.mark.parametrize("write", WRITES)
def test_failed_write(write: str, name: str, late: bool) -> None:
    """An op that writes in place fails before or after it wrote, and the same graph goes on. What is computed next
    reads what is there. What autograd saved before is what it was, as if it had been a copy: plain PyTorch, which
    counts no failed write, takes what is there for it."""

    def run(session: Session | None) -> list[Tensor]:
        torch.manual_seed(0)
        source = small_batch(0, 32, 32).requires_grad_()
        fault = Fault(10**9, FAULTS["error"], late)
        with fault, session or nullcontext():
            hidden = (source * 2).sin()
            with torch.no_grad():
                state = (source * 3).cos()
            early = state.clone() if session is None else state
            before = F.gelu(hidden * early) * early.sigmoid()
            fault.left = 0
            with pytest.raises(Stop), torch.no_grad():
                WRITES[write](state, hidden.detach())
            fault.left = 10**9
            after = F.gelu(hidden + state) * state
            (before + after).square().sum().backward()
        assert source.grad is not None
        return [before.detach(), after.detach(), source.grad, torch.get_rng_state()]

    assert all(map(same_bits, run(None), run(SESSIONS[name]())))


def whole_gradients(twin: Twin, number: int) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of a step without a fault, and the random state after it."""
    assert twin.step(number) == ""
    return [p.grad for p in twin.model.parameters()], twin.state


@contextmanager
def failing_replays(number: int, make: Callable[[], BaseException], late: bool) -> Iterator[list[str]]:
    """The k-th op that is replayed fails, and each one after it; yields the names of those that failed."""
    hits: list[str] = []
    call, left = replay._call, [number]

    def spy(op: Any, args: Any, kwargs: Any, run: Any) -> Any:
        def fail(*arguments: Any, **options: Any) -> Any:
            if late:
                run(*arguments, **options)
            hits.append(str(op.func))
            raise make()

        left[0] -= 1
        return call(op, args, kwargs, run if left[0] >= 0 else fail)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_call", spy)
        yield hits


@contextmanager
def failing_copies(number: int, make: Callable[[], BaseException], late: bool) -> Iterator[list[str]]:
    """The same for the copies and scratch tensors that replays write into, and for snapshots."""
    from rekindle.runtime import snapshots

    hits: list[str] = []
    left = [number]

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return function(*arguments, **options)
            made = function(*arguments, **options) if late else None
            hits.append(function.__name__)
            del made
            raise make()

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "clone_storage", failing(replay.clone_storage))
        patch.setattr(snapshots, "clone_storage", failing(snapshots.clone_storage))
        patch.setattr(torch, "empty_strided", failing(torch.empty_strided))
        yield hits


@pytest.mark.parametrize(("fault", "late"), [("memory", False), ("error", True), ("interrupt", True)])
@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("keep-none", failing_replays),
        ("snapshots", failing_replays),
        ("budget", failing_replays),
        ("keep-none", failing_copies),
        ("snapshots", failing_copies),
    ],
)
def test_every_replay(name: str, failing: Any, fault: str, late: bool) -> None:
    """Each op, or each allocation, of a recomputation in turn fails. Parameters, statistics and random state are those
    of the whole step; each gradient is there whole, or not at all; the step after it is exact."""
    plain, managed = Twin(None), Twin(SESSIONS[name]())
    whole_gradients(plain, 0), whole_gradients(managed, 0)
    number, hits = 0, ["first"]
    while hits:
        with failing(number, FAULTS[fault], late) as hits:
            ended = managed.step(number)
        where = f"replay {number}, {hits[:1]}"
        gradients, _ = whole_gradients(plain, number)
        assert bool(ended) == bool(hits), where
        for mine, whole in zip(managed.model.parameters(), gradients, strict=True):
            assert mine.grad is None or (whole is not None and same_bits(mine.grad, whole)), where
            mine.grad = whole
        assert_alike(plain, managed, where)
        assert_clean(managed, where)
        for twin in (plain, managed):
            whole_gradients(twin, number + 1000)
        assert_alike(plain, managed, f"the step after {where}")
        assert_clean(managed, f"the step after {where}")
        assert_nothing_lives(f"the step after {where}")
        number += 1
    assert number > 3


class Interrupt:
    """Raises a KeyboardInterrupt at the k-th line of Rekindle's own code that runs, as Ctrl-C would.

    Not in callbacks of weak references and of the engine or in `__del__`, after which Python prints an exception and
    goes on, and not while a session is entered or left: there a plain `with` statement can be cut in two as well.
    """

    SPARED = frozenset({"_died", "__del__", "on_death", "_count_eviction", "__enter__", "__exit__", "_forget"})

    def __init__(self, number: int) -> None:
        self.left, self.where = number, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """A trace function, as `sys.settrace` takes it."""
        if event == "call":
            code = frame.f_code
            inside = code.co_filename.startswith(PACKAGE) and not self._spared(frame)
            return self if inside else None
        if event == "line":
            self.left -= 1
            if self.left < 0 and not self.where:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def _spared(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name in self.SPARED:
                return True
            frame = frame.f_back
        return False


@contextmanager
def interrupted(number: int) -> Iterator[Interrupt]:
    """Ctrl-C at the k-th line of Rekindle's."""
    interrupt, before = Interrupt(number), sys.gettrace()
    sys.settrace(interrupt)
    try:
        yield interrupt
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("name", SESSIONS)
def test_interrupted_anywhere(name: str) -> None:
    """A KeyboardInterrupt at a random line of Rekindle's own code ends the step; the next one, with the same session,
    is exact."""
    plain, managed = Twin(None), Twin(SESSIONS[name]())
    managed.step(0)  # imports what it needs
    with interrupted(10**9) as counter:
        assert managed.step(0) == ""
    lines = 10**9 - counter.left
    for _ in range(2):
        plain.step(0)
    for number, line in enumerate(random.Random(0).sample(range(lines), 25)):
        with interrupted(line) as interrupt:
            managed.step(number)
        where = f"line {line} of {lines}, {interrupt.where}"
        managed.state = plain.state
        managed.model.load_state_dict(plain.model.state_dict())
        for twin in (plain, managed):
            assert twin.step(number + 1000) == "", where
        assert_alike(plain, managed, f"the step after {where}")
        assert_clean(managed, f"the step after {where}")
        assert_nothing_lives(f"the step after {where}")
