"""Pressure: readers of memory, levels with hysteresis, and what a session does as they rise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rekindle
from helpers import assert_same, same_bits, small_batch, small_model, train
from rekindle import FakeReader, Level, MemoryReader, Pressure
from rekindle.runtime import pressure as module

NONE, LOW, MEDIUM, HIGH = Level
NBYTES = 32 * 64 * 4


def levels(shares: list[float], **options: Any) -> list[Level]:
    """The level after each look."""
    reader = FakeReader(0, 1000)
    pressure = Pressure(reader, **options)
    found = []
    for share in shares:
        reader.used_nbytes = round(share * 1000)
        found.append(pressure.look()[1])
    return found


def test_levels_are_ordered() -> None:
    """None, low, medium, high compare as they rise."""
    assert NONE < LOW < MEDIUM < HIGH
    assert [level.name for level in Level] == ["NONE", "LOW", "MEDIUM", "HIGH"]


@pytest.mark.parametrize(
    ("share", "level"),
    [
        (0.0, NONE),
        (0.599, NONE),
        (0.6, LOW),
        (0.749, LOW),
        (0.75, MEDIUM),
        (0.899, MEDIUM),
        (0.9, HIGH),
        (1.0, HIGH),
        (1.5, HIGH),
    ],
)
def test_default_thresholds(share: float, level: Level) -> None:
    """Low, medium and high begin at 0.6, 0.75 and 0.9 of the limit, and are entered at once."""
    assert levels([share]) == [level]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.9, 0.89, 0.85, 0.849], [HIGH, HIGH, HIGH, MEDIUM]),
        ([0.75, 0.74, 0.70, 0.699], [MEDIUM, MEDIUM, MEDIUM, LOW]),
        ([0.6, 0.59, 0.55, 0.549], [LOW, LOW, LOW, NONE]),
        ([0.9, 0.89, 0.9, 0.88, 0.91, 0.86], [HIGH] * 6),  # no flapping about a threshold
        ([0.89, 0.9, 0.84, 0.9], [MEDIUM, HIGH, MEDIUM, HIGH]),
        ([0.95, 0.72], [HIGH, MEDIUM]),  # a fall from high still counts as having been in medium
        ([0.95, 0.57], [HIGH, LOW]),
        ([0.95, 0.1], [HIGH, NONE]),
        ([0.1, 0.95], [NONE, HIGH]),
    ],
)
def test_hysteresis(shares: list[float], expected: list[Level]) -> None:
    """A level is left only when use has fallen by 0.05 below its threshold, however it falls."""
    assert levels(shares) == expected


@pytest.mark.parametrize(
    ("options", "shares", "expected"),
    [
        ({"thresholds": (0.2, 0.4, 0.8)}, [0.2, 0.4, 0.8], [LOW, MEDIUM, HIGH]),
        ({"thresholds": (0.5, 0.5, 0.5)}, [0.49, 0.5, 0.46, 0.44], [NONE, HIGH, HIGH, NONE]),
        ({"thresholds": (0.5, 0.75, 1.0), "hysteresis": 0}, [1.0, 0.999, 0.749, 0.5], [HIGH, MEDIUM, LOW, LOW]),
        ({"hysteresis": 0.2}, [0.9, 0.71, 0.69], [HIGH, HIGH, MEDIUM]),
    ],
)
def test_options(options: dict[str, Any], shares: list[float], expected: list[Level]) -> None:
    """Thresholds and hysteresis are the user's to choose."""
    assert levels(shares, **options) == expected


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"thresholds": (0.0, 0.5, 0.9)}, "Write (0.6, 0.75, 0.9)"),
        ({"thresholds": (0.7, 0.6, 0.9)}, "Write (0.6, 0.75, 0.9)"),
        ({"thresholds": (0.6, 0.75, 1.1)}, "Write (0.6, 0.75, 0.9)"),
        ({"thresholds": (60, 75, 90)}, "Write (0.6, 0.75, 0.9)"),
        ({"hysteresis": -0.1}, "Write 0.05"),
        ({"hysteresis": 0.5}, "Write 0.05"),
    ],
)
def test_refused(options: dict[str, Any], cure: str) -> None:
    """Thresholds that make no sense are an error that says what to write."""
    with pytest.raises(rekindle.PressureError) as caught:
        Pressure(FakeReader(), **options)
    assert cure in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, rekindle.RekindleError)


def test_callback() -> None:
    """Each change is told, with the level before and after, and nothing else is."""
    told: list[tuple[Level, Level]] = []
    shares = [0.1, 0.6, 0.65, 0.95, 0.9, 0.72, 0.1]
    levels(shares, on_change=lambda before, now: told.append((before, now)))
    assert told == [(NONE, LOW), (LOW, HIGH), (HIGH, MEDIUM), (MEDIUM, NONE)]


def test_bytes_to_come() -> None:
    """What is about to be used counts."""
    pressure = Pressure(FakeReader(500, 1000))
    assert pressure.look() == (NONE, NONE)
    assert pressure.look(more=400) == (NONE, HIGH)
    assert pressure.level is HIGH


@pytest.mark.parametrize("limit", [0, -1])
def test_no_limit_at_all(limit: int) -> None:
    """Nothing allowed is the highest pressure, not a division by zero."""
    assert Pressure(FakeReader(0, limit)).look()[1] is HIGH


# -- readers -----------------------------------------------------------------------------------------------------------


def test_fake_reader() -> None:
    """Says what it is told, and is a reader as the protocol has it."""
    reader: MemoryReader = FakeReader(3, 5)
    assert (reader.used(), reader.limit()) == (3, 5)
    reader.used_nbytes = 4  # type: ignore[attr-defined]
    assert reader.used() == 4


def test_live_reader() -> None:
    """On the CPU the session's own live bytes count, against the budget or what the machine has."""
    session, x = rekindle.Session(memory_budget="1MiB"), small_batch(0).requires_grad_()
    reader = session._pressure.reader
    assert isinstance(reader, rekindle.LiveReader)
    assert reader.limit() == 1 << 20
    with session:
        before = reader.used()
        kept = x.exp()
        assert reader.used() - before == 2 * NBYTES  # the input, seen now, and the result
        del kept


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """An accelerator whose counters say what the test writes here."""
    counters = {"allocated": 100, "reserved": 300, "free": 700, "total": 2000}
    asked: list[Any] = []

    def counter(name: str) -> Any:
        def read(device: Any = None) -> int:
            asked.append(torch.device(device))
            return counters[name]

        return read

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cuda:0"))
    monkeypatch.setattr(torch.accelerator, "memory_allocated", counter("allocated"), raising=False)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", counter("reserved"), raising=False)
    monkeypatch.setattr(
        torch.accelerator, "get_memory_info", lambda device=None: (counters["free"], counters["total"]), raising=False
    )
    return counters


def test_accelerator_reader(accelerator: dict[str, int]) -> None:
    """Used is what is allocated. What is reserved and not allocated can be allocated still: it is part of the limit."""
    reader = rekindle.AcceleratorReader(torch.device("cuda:0"))
    assert (reader.used(), reader.reserved(), reader.limit()) == (100, 300, 1000)
    accelerator.update(allocated=950, reserved=960, free=40)
    assert (reader.used(), reader.reserved(), reader.limit()) == (950, 960, 1000)
    assert Pressure(reader).look()[1] is HIGH


def test_default_reader(accelerator: dict[str, int]) -> None:
    """With an accelerator and no budget its allocator is asked; with a budget the session's own count."""
    assert isinstance(module.default_reader(lambda: 0, None), rekindle.AcceleratorReader)
    assert isinstance(module.default_reader(lambda: 0, 10), rekindle.LiveReader)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096 * 1000),
        ({"v2": "1048576\n"}, 1 << 20),
        ({"v2": "max\n"}, 4096 * 1000),
        ({"v1": "2097152\n"}, 2 << 20),
        ({"v1": "9223372036854771712\n"}, 4096 * 1000),  # what version 1 says for no limit
        ({"v2": "1048576\n", "v1": "2097152\n"}, 1 << 20),
        ({"v2": "nonsense"}, 4096 * 1000),
        ({"v2": ""}, 4096 * 1000),
    ],
)
def test_machine_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """The limit of the control group, of either version, or else the physical memory; the smaller of the two."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_CGROUP_LIMITS", (str(tmp_path / "v2"), str(tmp_path / "v1")))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert module.machine_memory() == expected


# -- a session under pressure ------------------------------------------------------------------------------------------


def saved(x: Tensor, session: rekindle.Session | None = None) -> Tensor:
    """Four activations are saved, the second marked."""
    a = x.exp()
    b = a.sin()
    c = b.cos()
    d = c.sin()
    if session is not None:
        session.mark(b)
    return (d * d).sum()


@pytest.mark.parametrize(
    ("share", "evicted", "mark_lives", "escalations"),
    [(0.5, 0, True, 0), (0.7, 0, True, 0), (0.8, 3, True, 1), (0.99, 4, False, 1)],
)
def test_rising(share: float, evicted: int, mark_lives: bool, escalations: int) -> None:
    """Medium starts safe sweeps, high makes them aggressive; low does nothing. The gradient is exact at all of them."""
    reader = FakeReader(0, 1 << 30)
    told: list[tuple[Level, Level]] = []
    session = rekindle.Session(pressure=Pressure(reader, on_change=lambda *change: told.append(change)))
    x = small_batch(0).requires_grad_()
    with session:
        loss = saved(x, session)
        live = [t.activation for t in session._ledger.storages.values() if t.activation and t.activation.is_checkpoint]
        (mark,) = live
        reader.used_nbytes = int(share * reader.limit_nbytes)
        x.detach().sum()  # any op: room is made before it
        assert session.last_step.evicted == evicted
        assert mark.is_live == mark_lives
        assert session.last_step.escalations == escalations
        assert len(told) == (share >= 0.6)
        reader.used_nbytes = 0
        loss.backward()
    y = small_batch(0).requires_grad_()
    saved(y).backward()
    assert same_bits(x.grad, y.grad)


def test_no_more_than_needed() -> None:
    """A sweep brings use back below the threshold of its level, and stops there."""
    reader = FakeReader(0, 1000 * NBYTES)
    session = rekindle.Session(pressure=Pressure(reader))
    x = small_batch(0).requires_grad_()
    with session:
        loss = saved(x)
        reader.used_nbytes = 751 * NBYTES
        torch.zeros(1)
        assert session.last_step.evicted == 2  # 750 and a little for what comes
        reader.used_nbytes = 0
        loss.backward()


def test_escalations() -> None:
    """Each rise to medium or to high counts once, whoever looks; falls and rises to low do not."""
    reader = FakeReader(0, 1000)
    session = rekindle.Session(pressure=Pressure(reader))
    with session:
        for share, level, count in (
            (0.7, LOW, 0),
            (0.8, MEDIUM, 1),
            (0.89, MEDIUM, 1),
            (0.95, HIGH, 2),
            (0.86, HIGH, 2),
            (0.8, MEDIUM, 2),
            (0.95, HIGH, 3),
            (0.1, NONE, 3),
            (0.99, HIGH, 4),
        ):
            reader.used_nbytes = int(share * 1000)
            assert session.pressure is level
            assert session.last_step.escalations == count
    assert session.stats.escalations == 4


def test_without_budget_nothing_is_evicted() -> None:
    """A session that was given neither a budget nor a pressure tells the level and evicts nothing by itself."""
    session, x = rekindle.Session(), small_batch(0).requires_grad_()
    session._pressure.reader = FakeReader(999, 1000)
    with session:
        loss = saved(x)
        assert session.pressure is HIGH
        loss.backward()
    assert session.stats.evicted == 0
    assert session.stats.sweeps == 0


@pytest.mark.parametrize("share", [0.8, 0.95])
@pytest.mark.parametrize("policy", [None, rekindle.KeepNone(), rekindle.EveryN(2), rekindle.Balanced(0.3)], ids=repr)
def test_training_under_pressure(share: float, policy: Any) -> None:
    """Whole steps under a pressure that never falls, whatever the policy: bit for bit those of plain PyTorch."""
    reader = FakeReader(int(share * (1 << 20)), 1 << 20)
    session = rekindle.Session(policy, pressure=Pressure(reader))

    def step(model: torch.nn.Module, number: int, managed: Any) -> Tensor:
        with managed:
            loss = model(small_batch(number)).square().mean()
            loss.backward()
        return loss

    assert_same(train(small_model, step), train(small_model, step, session))
    assert session.stats.evicted > 0
    assert session.stats.sweeps > 0


# -- budgets -----------------------------------------------------------------------------------------------------------


def files(monkeypatch: pytest.MonkeyPatch, **contents: str) -> None:
    """Have the machine say other things: `meminfo`, `limit` and `usage`; what is not given cannot be read."""
    names = {
        module._MEMINFO: contents.get("meminfo"),
        module._CGROUP_LIMITS[0]: contents.get("limit"),
        module._CGROUP_USAGES[0]: contents.get("usage"),
    }
    monkeypatch.setattr(module, "_read", lambda name: names.get(name) or "")


@pytest.mark.parametrize(
    ("contents", "free"),
    [
        ({"meminfo": "MemTotal: 100 kB\nMemAvailable:   64 kB\nX: 1 kB\n"}, 64 << 10),
        ({"meminfo": "MemAvailable: 64 kB\n", "limit": "40960\n", "usage": "8192\n"}, 32 << 10),
        ({"meminfo": "MemAvailable: 64 kB\n", "limit": "max\n", "usage": "8192\n"}, 64 << 10),
        ({"meminfo": "MemAvailable: 64 kB\n", "limit": "4096\n", "usage": "8192\n"}, 0),
        ({"limit": "40960\n", "usage": "8192\n"}, 32 << 10),
    ],
)
def test_free_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch, contents: dict[str, str], free: int) -> None:
    """What is free on a CPU is what the system says, within what the control group leaves."""
    monkeypatch.setattr(module, "_accelerator", lambda: None)
    files(monkeypatch, **contents)
    assert module.free_memory() == free


def test_free_memory_is_some_of_it() -> None:
    """On this very machine, something is free and no more than there is."""
    assert 0 < module.free_memory() <= module.device_memory()


@pytest.mark.parametrize(
    ("stated", "headroom", "nbytes", "meaning"),
    [
        (1 << 20, None, 1 << 20, "1.0 MiB"),
        ("1MiB", None, 1 << 20, "1.0 MiB"),
        ("2MiB", "1MiB", 1 << 20, "2.0 MiB, less 1.0 MiB headroom: 1.0 MiB"),
        (0.5, None, 2 << 30, "50% of 4.0 GiB: 2.0 GiB"),
        (1.0, 1 << 30, 3 << 30, "100% of 4.0 GiB, less 1.0 GiB headroom: 3.0 GiB"),
        ("auto", None, 19 << 26, "1.2 GiB free now, less 64.0 MiB headroom: 1.2 GiB"),
        ("auto", "256MiB", 1 << 30, "1.2 GiB free now, less 256.0 MiB headroom: 1.0 GiB"),
        ("auto", 0, 5 << 28, "1.2 GiB free now: 1.2 GiB"),
    ],
)
def test_budgets_are_read(
    monkeypatch: pytest.MonkeyPatch, stated: Any, headroom: Any, nbytes: int, meaning: str
) -> None:
    """A share is one of the device's memory, "auto" what is free now; headroom is kept back, and all is spelled out."""
    monkeypatch.setattr(module, "device_memory", lambda: 4 << 30)
    monkeypatch.setattr(module, "free_memory", lambda: 5 << 28)
    monkeypatch.setattr(module, "_allocated", lambda: 0)
    budget = module.read_budget(stated, headroom)
    assert (budget.nbytes, budget.stated, budget.meaning) == (nbytes, stated, meaning)


def test_auto_counts_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the budget covers what is there already, so "auto" is that and what is free."""
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 30)
    monkeypatch.setattr(module, "_allocated", lambda: 2 << 30)
    budget = module.read_budget("auto", 0)
    assert budget.nbytes == 3 << 30
    assert "2.0 GiB allocated already" in str(budget)


def test_a_budget_for_another_device() -> None:
    """A share can be one of a device that is not here."""
    assert module.read_budget(0.5, total=80 * 10**9).nbytes == 40 * 10**9
    assert module.read_budget("auto", 0, total=80 * 10**9).nbytes == 80 * 10**9


@pytest.mark.parametrize(("stated", "headroom"), [("1MiB", "1MiB"), (1000, "1KiB"), (0.5, 1 << 60)])
def test_headroom_that_leaves_nothing(stated: Any, headroom: Any) -> None:
    """A headroom as large as the budget is refused, and the message says which would do."""
    with pytest.raises(rekindle.BytesError, match=r"leaves nothing of memory_budget .*\. Write") as caught:
        module.read_budget(stated, headroom)
    smaller = int(str(caught.value).rpartition("headroom=")[2].rstrip("."))
    assert module.read_budget(stated, smaller).nbytes > 0


@pytest.mark.parametrize("headroom", ["8G", -1, "0B", 1.5, True])
def test_headroom_that_is_no_amount(headroom: Any) -> None:
    """Headroom is an amount of memory like any other."""
    with pytest.raises(rekindle.BytesError):
        module.read_budget("1GiB", headroom)


def test_a_session_says_what_it_understood() -> None:
    """What the user wrote, what that is, and what is kept back stand in the summary, and the budget obeys it."""
    session = rekindle.Session(memory_budget="64MiB", headroom="16MiB")
    assert session.memory_budget == 48 << 20
    assert "budget '64MiB': 64.0 MiB, less 16.0 MiB headroom: 48.0 MiB" in str(session)
    share = rekindle.Session(memory_budget=0.25)
    assert share.memory_budget == module.device_memory() // 4
    assert "budget 0.25: 25% of " in str(share)
