"""Snapshots: taken only if needed and not cheaper to recompute, counted to the byte, gone when nothing needs them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import rekindle
from helpers import live_activations, same_bits, small_batch
from rekindle import EvictionPolicy, FakeReader, KeepNone, Pressure, Session
from rekindle.record.torch_private import AllocatorWatch
from rekindle.runtime import snapshots

NBYTES = 32 * 64 * 4
X = [small_batch(seed) for seed in range(48)]  # made outside of all sessions, and never written
SLOW, FAST = 1e-9, 1e18  # bytes that are copied in a second: recomputing is never, always worth less


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Copies are cheaper than any op."""
    monkeypatch.setattr(snapshots, "_COPIED_PER_SECOND", FAST)
    return monkeypatch


def weight() -> Tensor:
    """A parameter of as many bytes as the activations here."""
    return torch.ones(32, 64, requires_grad=True)


def taken(session: Session) -> tuple[int, int, int]:
    """(snapshots taken, their bytes, bytes in snapshots now)."""
    return session.stats.snapshots, session.stats.snapshot_nbytes, session.snapshots.nbytes


@pytest.mark.parametrize(
    ("rate", "seconds", "count"),
    [
        (1e9, NBYTES / 1e9, 0),  # as cheap to recompute as to copy: recomputed
        (1e9, NBYTES / 1e9 * 1.001, 1),
        (SLOW, 1e-6, 0),
        (FAST, 1e-6, 1),
    ],
)
def test_only_if_recomputing_costs_more(rate: float, seconds: float, count: int, monkeypatch) -> None:
    """The seconds of the ops that would run again are weighed against the bytes to copy."""
    monkeypatch.setattr(snapshots, "_COPIED_PER_SECOND", rate)
    w, session = weight(), Session(KeepNone(), inplace="snapshot")
    with session:
        y = X[0].exp()
        activation = session._ledger.find(y).activation
        activation.op.seconds = seconds
        loss = (y * w).sum()
        y.add_(1)
        assert taken(session) == (count, count * NBYTES, count * NBYTES)
        assert activation.is_live is bool(count)
        loss.backward()
    del activation
    assert same_bits(w.grad, X[0].exp())
    assert session.stats.ops_replayed == 1 - count
    assert session.snapshots.nbytes == 0


def test_not_by_the_clock_in_a_planned_step(copying) -> None:
    """A plan counts on what can be recomputed, and knows nothing of copies that would be made instead."""
    w, session, told = weight(), Session(memory_budget="1GiB", inplace="snapshot"), []
    (expected,) = torch.autograd.grad((X[0].exp() * w).sum() + (w * 2).sin().sum(), w)
    for _ in range(4):
        w.grad = None
        with session:
            y = X[0].exp()
            loss = (y * w).sum() + (w * 2).sin().sum()
            y.add_(1)
            loss.backward()
        assert same_bits(w.grad, expected)
        told.append((session.last_step.snapshots, session.last_step.ops_replayed))
    assert told[0] == (1, 0)
    assert told[-1] == (0, 1)


@pytest.mark.parametrize("inplace", ["strict", "snapshot"])
@pytest.mark.parametrize("needed", ["no", "by a live value", "by what is gone", "by what autograd freed"])
def test_only_if_still_needed(needed: str, inplace: str, copying) -> None:
    """A value that nothing will ask for is not copied, however cheap; the source of something evicted is."""
    w, session = weight(), Session(KeepNone(), inplace=inplace)
    with session:
        y = X[0] * 2
        z = y.sin() if needed != "no" else None
        loss = (z * w).sum() if z is not None else w.sum()
        if needed == "by what is gone":
            del z
        if needed == "by what autograd freed":
            del z, loss
        y.add_(1)
        count = int(needed == "by what is gone")
        assert taken(session) == (count, count * NBYTES, count * NBYTES)
        if needed != "by what autograd freed":
            loss.backward()
    if needed.startswith(("by a", "by what is")):
        assert same_bits(w.grad, (X[0] * 2).sin())
    assert session.snapshots.nbytes == 0
    assert session.stats.failed_recomputes == 0


@pytest.mark.parametrize("read", [True, False])
def test_of_an_input(read: bool) -> None:
    """What nothing can recompute is copied if something was computed from it and may be again; else it is not."""
    x, w, session = small_batch(0), weight(), Session(KeepNone())
    with session:
        loss = (x.sin() * w).sum() if read else w.sum() + x.sum()
        x.add_(1)
        assert taken(session) == (int(read), read * NBYTES, read * NBYTES)
        loss.backward()
    assert session.snapshots.nbytes == 0


def test_bytes_are_live_bytes(copying) -> None:
    """A snapshot counts in `session.live_nbytes` for as long as it exists, and in the peak; its storage is there."""
    w, session = weight(), Session(KeepNone(), inplace="snapshot")
    losses = []
    with session:
        for number in range(1, 5):
            y = X[number].exp()
            losses.append((y * w).sum())
            before = session.live_nbytes
            y.add_(1)
            assert session.live_nbytes == before + NBYTES
            assert session.snapshots.nbytes == number * NBYTES
            held = [reference().held for reference in session.snapshots._taken]
            assert len({tensor.data_ptr() for tensor in held} | {y.data_ptr()}) == number + 1
            assert sum(tensor.untyped_storage().nbytes() for tensor in held) == session.snapshots.nbytes
            del held, y
        for number in range(4):
            before = session.live_nbytes
            losses.pop().backward()
            w.grad = None
            assert session.snapshots.nbytes == (3 - number) * NBYTES
            assert session.live_nbytes <= before - NBYTES
    assert taken(session) == (4, 4 * NBYTES, 0)
    assert session.last_step.peak_nbytes >= 4 * NBYTES


def test_the_allocator_counts_the_same(copying) -> None:
    """By the allocator's own events, a write that takes a snapshot allocates its bytes, one that takes none nothing."""
    w, session = weight(), Session(KeepNone(), inplace="snapshot")
    with session:
        y = X[0].exp()
        loss = (y * w).sum()
        for expected in (NBYTES, 0):
            with AllocatorWatch() as watch:
                y.add_(1)
            assert watch.nbytes == expected
        del loss, y
        assert session.snapshots.nbytes == 0


@pytest.mark.parametrize("end", ["backward", "deleted", "failed"])
def test_zero_after_the_step(end: str, copying, counting) -> None:
    """However the step ends, snapshots go with the graph, by reference counting alone."""
    w, session = weight(), Session(KeepNone(), inplace="snapshot")
    with session:
        y = X[0].exp()
        loss = (y * w).sum()
        y.add_(1).mul_(2)
        assert session.snapshots.nbytes == NBYTES
        if end == "backward":
            loss.backward()
        elif end == "failed":
            loss.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
        del loss
    assert session.snapshots.nbytes == 0
    del y
    w.grad = None
    assert session.live_nbytes == 0
    assert live_activations() == 0


def test_retained_graph_keeps_its_snapshots(copying) -> None:
    """They stay for a second backward pass, and go after it."""
    w, session = weight(), Session(KeepNone(), inplace="snapshot")
    with session:
        y = X[0].exp()
        loss = (y * w).sum()
        y.add_(1)
        loss.backward(retain_graph=True)
        assert session.snapshots.nbytes == NBYTES
        loss.backward()
        assert session.snapshots.nbytes == 0
    assert same_bits(w.grad, X[0].exp() * 2)


def marked(session: Session, w: Tensor, seed: int) -> rekindle.Activation:
    """An activation that was marked, saved, written and is not needed any more: its snapshot is stale."""
    y = X[seed].exp()
    mark = session.mark(y)
    loss = (y * w).sum()
    y.add_(1)
    loss.backward()
    return mark


def test_cleanup_returns_the_bytes() -> None:
    """`cleanup_stale()` frees what nothing needs, exactly, and leaves what something does."""
    w, session = weight(), Session(inplace="snapshot")
    with session:
        y = X[0].exp()
        needed = session.mark(y)
        loss = (y * w).sum()
        y.add_(1)
        stale = marked(session, w, 1)
        before = session.live_nbytes
        assert session.snapshots.nbytes == 2 * NBYTES
        assert session.snapshots.cleanup_stale() == NBYTES
        assert session.snapshots.nbytes == NBYTES
        assert session.live_nbytes == before - NBYTES
        assert session.snapshots.cleanup_stale() == 0
        assert (needed.is_live, stale.is_live) == (True, False)
        w.grad = None
        loss.backward()
    assert same_bits(w.grad, X[0].exp())


def test_cleanup_runs_by_itself() -> None:
    """Stale snapshots go before the next is taken, so that nothing is evicted for room that they take."""
    w, session = weight(), Session(inplace="snapshot")
    with session:
        marks = []
        for seed in range(4):
            marks.append(marked(session, w, seed))
            assert session.snapshots.nbytes == NBYTES
        assert [mark.is_live for mark in marks] == [False, False, False, True]


def test_last_to_go_under_pressure(copying) -> None:
    """A sweep takes what is no checkpoint, then checkpoints, then snapshots, and those only if AGGRESSIVE."""
    w, session = weight(), Session(inplace="snapshot")
    with session:
        y = X[0].exp()
        old = session._ledger.find(y).activation
        loss = (y * w).sum()
        y.add_(1)
        del y
        kept = X[1].exp()
        mark = session.mark(kept)
        loss = loss + (kept * w).sum()
        plain = X[2].exp()
        other = session._ledger.find(plain).activation
        loss = loss + (plain * w).sum()
        del kept, plain
        order = [other, mark, old]
        assert session.sweep(EvictionPolicy.ALWAYS_SAFE).freed_nbytes == NBYTES
        assert [activation.is_live for activation in order] == [False, True, True]
        assert not session.try_evict(old)
        target = session.live_nbytes - NBYTES
        assert session.sweep_to_target(target, EvictionPolicy.AGGRESSIVE).checkpoints == 1
        assert [activation.is_live for activation in order] == [False, False, True]
        assert session.snapshots.nbytes == NBYTES
        assert session.sweep(EvictionPolicy.AGGRESSIVE).evicted == 1
        assert session.snapshots.nbytes == 0
        loss.backward()
    assert same_bits(w.grad, X[2].exp() + X[1].exp() + X[0].exp())


def test_never_goes_if_it_protects_a_leaf() -> None:
    """The snapshot of an input cannot be recomputed: no sweep takes it, and the gradient is exact."""
    x, w = small_batch(0), weight()
    session = Session(inplace="snapshot", pressure=Pressure(FakeReader(10, 10)))
    with session:
        loss = (x * w).sum()
        x.add_(1)
        assert session.snapshots.nbytes == NBYTES
        session.sweep(EvictionPolicy.AGGRESSIVE)
        assert session.sweep_to_target(0, EvictionPolicy.AGGRESSIVE).reached is False
        assert session.snapshots.nbytes == NBYTES
        loss.backward()
    assert same_bits(w.grad, small_batch(0))


def test_never_goes_if_its_sources_are_gone(copying) -> None:
    """Nor is a snapshot evicted whose recomputation sources were changed outside of the session."""
    x, w, session = small_batch(0), weight(), Session(inplace="snapshot")
    with session:
        y = x.exp()
        loss = (y * w).sum()
        y.add_(1)
    x.add_(1)
    assert session.sweep(EvictionPolicy.AGGRESSIVE).evicted == 0
    assert session.snapshots.nbytes == NBYTES
    loss.backward()
    assert same_bits(w.grad, small_batch(0).exp())


def test_a_long_chain_is_not_looked_at_to_its_end(copying) -> None:
    """A source that may be lost beyond what the estimate looks at is not relied on."""
    copying.setattr(snapshots, "_COPIED_PER_SECOND", SLOW)
    x, w, session = small_batch(0), weight(), Session(KeepNone(), inplace="snapshot", min_nbytes=0)
    with session:
        y = x * 1
        for _ in range(100):
            y = y + 0
        loss = (y * w).sum()
        y.add_(1)
        assert session.stats.snapshots == 1
        loss.backward()
    assert same_bits(w.grad, small_batch(0))


@pytest.mark.timeout(60)
def test_many_threads(copying) -> None:
    """Sessions on several threads take snapshots by real writes and run backward, while others read `nbytes` and clean
    up: every gradient is exact, nothing raises, nothing is left."""
    sessions = [Session(KeepNone(), inplace="snapshot") for _ in range(3)]
    errors: list[BaseException] = []
    done = threading.Event()
    exact: list[bool] = []

    def train(session: Session, seed: int) -> None:
        try:
            for number in range(40):
                w = weight()
                with session:
                    total = w.sum() * 0
                    for link in range(4):
                        y = X[seed + link].exp()
                        total = total + (y * w).sum()
                        y.add_(1)
                        y[:3].mul_(2)
                    total.backward()
                expected = sum(X[seed + link].exp() for link in (3, 2, 1, 0))
                exact.append(torch.allclose(w.grad, expected) and same_bits(w.grad, _reference(seed)))
                seed += number % 2
        except BaseException as error:
            errors.append(error)

    def meddle() -> None:
        try:
            while not done.is_set():
                for session in sessions:
                    assert session.snapshots.nbytes % NBYTES == 0
                    assert session.snapshots.cleanup_stale() % NBYTES == 0
                time.sleep(0)
        except BaseException as error:
            errors.append(error)

    trainers = [threading.Thread(target=train, args=(session, 10 * k)) for k, session in enumerate(sessions)]
    meddlers = [threading.Thread(target=meddle) for _ in range(2)]
    for thread in (*trainers, *meddlers):
        thread.start()
    for thread in trainers:
        thread.join()
    done.set()
    for thread in meddlers:
        thread.join()
    assert not errors, errors
    assert len(exact) == 120
    assert all(exact)
    for session in sessions:
        assert session.stats.snapshots == 160
        assert session.stats.snapshot_nbytes == 160 * NBYTES
        assert session.snapshots.nbytes == 0
        assert session.live_nbytes == 0


def _reference(seed: int) -> Tensor:
    w = weight()
    total = w.sum() * 0
    for link in range(4):
        total = total + (X[seed + link].exp() * w).sum()
    total.backward()
    return w.grad


@pytest.mark.timeout(60)
def test_one_store_many_threads(copying) -> None:
    """One session's store is read, written and cleaned by several threads at once: its bytes are right at each moment,
    and a value that is needed is never cleaned away."""
    session, w = Session(inplace="snapshot"), weight()
    with session:
        needed = []
        for seed in range(6):
            y = X[seed].exp()
            needed.append((session._ledger.find(y).activation, (y * w).sum()))
            y.add_(1)
        errors: list[BaseException] = []
        barrier = threading.Barrier(4)

        def write_again(activation: rekindle.Activation) -> None:
            session.snapshots.before_write(activation, None, True)

        def work(number: int) -> None:
            try:
                barrier.wait()
                for turn in range(200):
                    if number < 2:
                        write_again(needed[(turn + number) % 6][0])
                    elif number == 2:
                        assert session.snapshots.cleanup_stale() == 0
                    else:
                        assert session.snapshots.nbytes == 6 * NBYTES
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert session.snapshots.nbytes == 6 * NBYTES
        for seed, (activation, loss) in enumerate(needed):
            w.grad = None
            loss.backward()
            assert same_bits(w.grad, X[seed].exp())
            assert activation is not None
        needed.clear()
        del activation, loss, y
    assert session.snapshots.nbytes == 0
