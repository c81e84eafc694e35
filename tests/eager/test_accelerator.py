"""What a session does where memory and time are those of an accelerator: here one is made believe, in tests/cuda it is
there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rekindle
from helpers import assert_same, small_batch, small_model, train
from rekindle.record import recorder, sizes, streams
from rekindle.record.aliasing import Ledger
from rekindle.runtime import session as module
from rekindle.runtime import standing

CPU = torch.device("cpu")
MIB = 1 << 20


def ledger_with(allocated: list[int]) -> Ledger:
    """A ledger that takes the CPU for an accelerator on which `allocated[0]` bytes are allocated."""
    ledger = Ledger(lambda activation, nbytes: None, lambda device: allocated[0])
    ledger.place = CPU
    return ledger


def test_what_others_have_counts() -> None:
    """All that is allocated on the device counts, whoever has it: what the ledger does not know is standing."""
    allocated, made, leaf = [5000], torch.ones(100), torch.ones(200)
    ledger = ledger_with(allocated)
    ledger.look()
    assert (ledger.total_nbytes, ledger.standing_nbytes) == (5000, 5000)
    ledger.track(made.untyped_storage(), None, made.nbytes)
    assert (ledger.total_nbytes, ledger.live_nbytes, ledger.standing_nbytes) == (5400, 400, 5000)
    allocated[0] = 5512  # its allocator rounds up
    ledger.look()
    assert (ledger.total_nbytes, ledger.live_nbytes, ledger.standing_nbytes) == (5512, 400, 5112)
    ledger.track_leaf(leaf)  # was among the others
    assert (ledger.total_nbytes, ledger.leaf_nbytes, ledger.standing_nbytes) == (5512, 800, 5112)
    allocated[0] = 100
    ledger.look()
    assert (ledger.total_nbytes, ledger.most_standing_nbytes) == (1200, 5112)  # never less than what is known


def test_nobody_asks_about_the_cpu() -> None:
    """As long as nothing is on an accelerator, only what the session sees counts."""
    leaf = torch.ones(100)
    ledger = Ledger(lambda activation, nbytes: None, lambda device: pytest.fail("asked"))
    ledger.track_leaf(leaf)
    ledger.look()
    assert ledger.place is None
    assert ledger.total_nbytes == leaf.nbytes


def test_allocators_that_tell_nothing() -> None:
    """On a device that has no such figures, what the session sees counts."""

    def allocated(device: torch.device) -> int:
        raise RuntimeError("no allocator")

    ledger = Ledger(lambda activation, nbytes: None, allocated)
    ledger._find_place(torch.device("xpu"))
    leaf = torch.ones(100)
    ledger.track_leaf(leaf)
    assert ledger.place is None
    assert ledger.total_nbytes == leaf.nbytes


class Accelerator:
    """Has sessions take the CPU for an accelerator, on which others have `others` bytes.

    Attributes:
        told: the most bytes that its allocator says there were.
        waits: how often somebody waited for the device.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.others = self.waits = 0
        self.told = 0
        self.ledger: Ledger | None = None
        patch.setattr(torch.accelerator, "synchronize", self._wait)
        for place in (module, standing):
            patch.setattr(place, "AcceleratorReader", lambda device: self)

    def _wait(self, device: torch.device) -> None:
        assert device == CPU
        self.waits += 1

    def used(self) -> int:
        """Bytes that are allocated."""
        assert self.ledger is not None
        return self.ledger.live_nbytes + self.ledger.leaf_nbytes + self.others

    def peak(self) -> int:
        """The most there ever were."""
        return self.told

    def limit(self) -> int:
        """The most that could be."""
        return 1 << 40

    def session(self, **options: Any) -> rekindle.Session:
        """A session that does."""
        session = rekindle.Session(**options)
        self.ledger = session._ledger
        self.ledger.place = CPU
        return session


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """One that is made believe."""
    return Accelerator(monkeypatch)


def step(model: nn.Module, number: int, managed: Any) -> Tensor:
    """A training step on a batch of its own."""
    with managed:
        loss = model(small_batch(number, 512)).square().mean()
        loss.backward()
    return loss


def need() -> int:
    """Bytes that the steps need if all is kept."""
    session = rekindle.Session(memory_budget="1GiB")
    train(small_model, step, session, steps=2)
    return session._highest()


def test_budget_beside_others(accelerator: Accelerator) -> None:
    """What others have on the device is part of the budget, in the first step and in planned ones."""
    budget = need() + 8 * MIB
    kept = accelerator.session(memory_budget=budget)
    assert_same(train(small_model, step), train(small_model, step, kept))
    assert kept.stats.evicted == 0
    accelerator.others = 9 * MIB
    session = accelerator.session(memory_budget=budget)
    assert_same(train(small_model, step, steps=4), train(small_model, step, session, steps=4))
    assert session.stats.ops_replayed > 0
    assert session._highest() <= budget
    assert session.plan is not None
    assert session.plan.graph is not None
    assert session.plan.graph.standing > accelerator.others
    assert session.stats.departures == 0


def test_others_take_more(accelerator: Accelerator) -> None:
    """Where others have more than when a step was planned, its plan is not followed beyond the budget, but made anew:
    from the next step, which is recorded."""
    budget = need() + MIB
    session = accelerator.session(memory_budget=budget)

    def growing(model: nn.Module, number: int, managed: Any) -> Tensor:
        if managed is session:
            accelerator.others = 2 * MIB if number >= 3 else 0
        return step(model, number, managed)

    assert_same(train(small_model, growing, steps=7), train(small_model, growing, session, steps=7))
    assert session.stats.departures == 2
    assert session.stats.evicted > 0
    assert session._highest() <= budget


def test_peaks_that_only_the_device_sees(accelerator: Accelerator) -> None:
    """Where the allocator tells of more than was planned, the step is planned again with so much less room."""
    budget = need() + MIB
    session = accelerator.session(memory_budget=budget)

    def step_of(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed:
            loss = model(small_batch(number, 512)).square().mean()
            loss.backward()
            if managed is session and number in (1, 2):
                accelerator.told = budget + number * (MIB >> 5)
        return loss

    accelerator.told = MIB
    assert_same(train(small_model, step_of, steps=5), train(small_model, step_of, session, steps=5))
    assert session.plan is not None
    assert session.plan.forecast is not None
    assert session.plan.forecast.seconds > 0
    assert session.stats.ops_replayed > 0


def test_no_room_beside_others(accelerator: Accelerator) -> None:
    """A budget that others have used up is refused, and the device is named."""
    accelerator.others = 64 * MIB
    session = accelerator.session(memory_budget="64MiB")
    with pytest.raises(rekindle.BudgetInfeasible, match=r"and what else is allocated on cpu"):
        train(small_model, step, session, steps=1)


@pytest.mark.parametrize("cost", ["measured", "roofline"])
def test_seconds_are_those_of_the_device(accelerator: Accelerator, cost: Any) -> None:
    """Kernels are timed to their end, which the device alone knows; nobody waits where seconds are told, nor in a step
    that follows its plan."""
    session = accelerator.session(memory_budget="1GiB", cost=cost)
    train(small_model, step, session, steps=1)
    assert session.graph is not None
    assert accelerator.waits == (2 * len(session.graph.ops) if cost == "measured" else 0)
    train(small_model, step, session, steps=2)
    waited = accelerator.waits
    train(small_model, step, session, steps=2)
    assert accelerator.waits == waited


def test_workspaces_are_no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a library allocates in its first op and keeps for ever is not taken for what that op needs each time."""

    class Watch:
        worked, nbytes, peak_nbytes = True, 40 * MIB, 42 * MIB

        def __enter__(self) -> Watch:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(sizes, "AllocatorWatch", Watch)
    table, func, args = sizes.Sizes(), torch.ops.aten.add.Tensor, (torch.ones(256, 1024), torch.ones(256, 1024))
    assert table.measure("on the CPU", func, args, {})[1] == sizes.Need(40 * MIB, 2 * MIB)
    monkeypatch.setattr(sizes, "_on_accelerator", lambda result: True)
    assert table.measure("elsewhere", func, args, {})[1] == sizes.Need(MIB, 2 * MIB)
    made, need = table.measure("sparse", torch.ops.aten._to_sparse.default, args[:1], {})
    assert made.is_sparse
    assert need == sizes.Need(40 * MIB, 2 * MIB)  # nothing else tells what it holds


# -- streams -----------------------------------------------------------------------------------------------------------


class Home:
    """A stream that is made believe.

    Attributes:
        left: whether another one is current.
        lent: the tensors that were lent to another one, and whether that waited.
        entered_from_elsewhere: how many replays were brought home.
    """

    def __init__(self) -> None:
        self.left = False
        self.lent: list[tuple[int, bool]] = []
        self.entered_from_elsewhere = 0

    def is_left(self) -> bool:
        """Whether it is."""
        return self.left

    def lend(self, tensors: Iterable[Tensor], wait: bool) -> None:
        """Note them."""
        self.lent += [(tensor.untyped_storage()._cdata, wait) for tensor in tensors]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Come home."""
        was, self.left = self.left, False
        self.entered_from_elsewhere += was
        yield
        self.left = was


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Home:
    """The stream on which steps begin."""
    made = Home()
    monkeypatch.setattr(recorder, "has_streams", lambda: True)
    monkeypatch.setattr(recorder, "find_home", lambda: made)
    return made


def elsewhere(home: Home, run: Callable[[], Tensor]) -> Tensor:
    """Run something on another stream."""
    home.left = True
    result = run()
    home.left = False
    return result


def test_other_streams_keep(home: Home) -> None:
    """What runs on another stream is kept, and what it reads lasts until it has read it: its bytes may go to the next
    kernel at home as soon as a session has let go of them."""
    session, x = rekindle.Session(rekindle.KeepNone(), min_nbytes=0), small_batch(0).requires_grad_()
    with session:
        y = x.exp()
        key = y.untyped_storage()._cdata
        z = elsewhere(home, y.sin)
        del y
        loss = (z.cos() * 2).sum()
        assert [lent for lent in home.lent if lent[0] == key] == [(key, False)]
        kept = [tracked.activation for tracked in session._ledger.storages.values() if tracked.activation is not None]
        assert streams.ELSEWHERE in {activation.why_kept for activation in kept}
        loss.backward()
    plain = small_batch(0).requires_grad_()
    (plain.exp().sin().cos() * 2).sum().backward()
    assert torch.equal(x.grad, plain.grad)
    assert session.stats.ops_replayed == 1  # exp; sin is kept, and autograd asks for what cos and the product read


def test_replays_come_home(home: Home) -> None:
    """A backward pass on another stream has its values recomputed at home, and waits for them."""
    session, x = rekindle.Session(rekindle.KeepNone(), min_nbytes=0), small_batch(0).requires_grad_()
    with session:
        loss = x.exp().sin().sum()
        home.left = True
        loss.backward()
        home.left = False
    plain = small_batch(0).requires_grad_()
    plain.exp().sin().sum().backward()
    assert torch.equal(x.grad, plain.grad)
    assert home.entered_from_elsewhere == session.stats.recompute_calls > 0
    assert len(home.lent) > 3
    assert all(waited for _, waited in home.lent[1:])  # the first is what `backward` begins with


@pytest.mark.parametrize("left", [False, True])
def test_side_streams_are_watched(left: bool, home: Home) -> None:
    """Where an op ran on another stream, its node will too, and the backward pass is watched in each step: what is used
    there has to be lent to it."""
    session, x = rekindle.Session(rekindle.KeepNone(), min_nbytes=0), small_batch(0).requires_grad_()
    for _ in range(5):
        x.grad = None
        with session:
            y = x.exp()
            y = elsewhere(home, y.sin) if left else y.sin()
            loss = y.cos().sum()
            session._aside.stop = lambda: None  # what was decided is to be seen after the step
            loss.backward()
        del session._aside.stop
    assert session._aside.whole is not left


def test_each_step_has_its_own_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is at home where it begins, whatever the one before did."""
    homes: list[Home] = []

    def find() -> Home:
        homes.append(Home())
        return homes[-1]

    monkeypatch.setattr(recorder, "has_streams", lambda: True)
    monkeypatch.setattr(recorder, "find_home", find)
    session = rekindle.Session(rekindle.KeepNone())
    train(small_model, step, session, steps=3)
    assert len(homes) == 3


def test_no_streams_no_looks() -> None:
    """Without a device that has streams nobody asks for them."""
    manager: AbstractContextManager[Any] = rekindle.Session(rekindle.KeepNone())
    with manager as session:
        small_batch(0).requires_grad_().exp().sum().backward()
        assert session._recorder.home is None
