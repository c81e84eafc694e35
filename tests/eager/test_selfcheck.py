"""`rekindle selfcheck`: the seven checks pass here, and each fails when the mechanism it is about is broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import rekindle
from rekindle import selfcheck
from rekindle.cli import app
from rekindle.record.activation import Activation
from rekindle.runtime.eviction import Evictor
from rekindle.runtime.pressure import Level, Pressure
from rekindle.runtime.snapshots import Snapshots

NAMES = (
    "basic checkpoint marking",
    "smart selection",
    "in-place snapshots",
    "deletion respects checkpoints",
    "statistics",
    "memory pressure",
    "priority sweep",
)


@pytest.mark.parametrize("number", range(1, 8))
def test_check(number: int) -> None:
    """Each of the seven passes, in its order and under its name."""
    result = list(selfcheck.run_checks())[number - 1]
    assert str(result) == f"[PASS] Test {number}: {NAMES[number - 1]}"
    assert result.figures


def test_leaves_the_random_state_alone() -> None:
    """Whoever asks for a check does not train otherwise afterwards."""
    before = torch.get_rng_state()
    list(selfcheck.run_checks())
    assert torch.equal(torch.get_rng_state(), before)


def invoke(*args: str) -> tuple[int, list[str], str]:
    """Exit status, lines and errors of the command."""
    result = CliRunner().invoke(app, ["selfcheck", *args])
    return result.exit_code, result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize("args", [(), ("--device", "cpu")])
def test_output(args: tuple[str, ...]) -> None:
    """A line for each, then ALL TESTS PASSED! and status 0."""
    status, lines, _ = invoke(*args)
    assert status == 0
    expected = [f"[PASS] Test {number}: {name}" for number, name in enumerate(NAMES, start=1)]
    assert lines == [*expected, "ALL TESTS PASSED!"]


@pytest.mark.parametrize("flag", ["--verbose", "-v"])
def test_verbose(flag: str) -> None:
    """Shows for each check what was expected and what was seen."""
    status, lines, _ = invoke(flag)
    assert status == 0
    figures = [line for line in lines if line.startswith("    ")]
    assert len(figures) > 40
    assert all(re.fullmatch(r"    .+: expected .+, saw .+", line) for line in figures)
    assert "    bytes in snapshots after the write: expected 8192, saw 8192" in lines
    assert "    level at 90%: expected HIGH, saw HIGH" in lines
    assert lines[-1] == "ALL TESTS PASSED!"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "xpu"])
def test_bad_device(device: str) -> None:
    """A device that is not there is a mistake of usage, said in a sentence, not a trace."""
    status, lines, errors = invoke("--device", device)
    assert status == 2
    assert lines == []
    assert "Traceback" not in errors
    assert device in errors


BROKEN: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None], str]] = {}


def breaks(number: int, seen: str) -> Callable[[Any], Any]:
    """The mechanism that is broken must show in check `number`, as this line says."""

    def register(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        BROKEN[function.__name__] = (number, function, seen)
        return function

    return register


@breaks(1, "saved inputs: expected True, saw False")
def no_saved_inputs(patch: pytest.MonkeyPatch) -> None:
    """Marks forget their inputs."""
    patch.setattr(Activation, "saved_inputs", ())


@breaks(1, "something else was evicted: expected True, saw False")
def nothing_goes(patch: pytest.MonkeyPatch) -> None:
    """Nothing is ever evicted."""
    patch.setattr(Evictor, "try_evict", lambda self, activation, policy=None: rekindle.Eviction(False))


@breaks(2, "all three keep the same: expected False, saw True")
def one_score(patch: pytest.MonkeyPatch) -> None:
    """All policies choose alike."""
    make_plan = selfcheck.make_plan
    patch.setattr(selfcheck, "make_plan", lambda policy, graph: make_plan(rekindle.Balanced(0.2), graph))


@breaks(3, "bytes in snapshots after the write: expected 8192, saw 0")
def no_snapshots(patch: pytest.MonkeyPatch) -> None:
    """Nothing is copied before a write."""
    patch.setattr(Snapshots, "_must_copy", lambda self, activation, by, saved, planned: False)


@breaks(4, "always safe: the checkpoint is live: expected True, saw False")
def checkpoints_go(patch: pytest.MonkeyPatch) -> None:
    """A safe sweep is an aggressive one."""
    sweep = Evictor.sweep
    patch.setattr(Evictor, "sweep", lambda self, policy=None: sweep(self, rekindle.EvictionPolicy.AGGRESSIVE))


@breaks(5, "evicted (sin and cos): expected 2, saw 0")
def no_counting(patch: pytest.MonkeyPatch) -> None:
    """Evictions are not counted."""
    patch.setattr(rekindle.Session, "_count_eviction", lambda self, activation, nbytes: None)


@breaks(6, "level at 60%: expected LOW, saw NONE")
def no_levels(patch: pytest.MonkeyPatch) -> None:
    """The pressure never rises."""
    patch.setattr(Pressure, "look", lambda self, more=0: (Level.NONE, Level.NONE))


@breaks(7, "checkpoints touched: expected 0, saw 1")
def checkpoints_first(patch: pytest.MonkeyPatch) -> None:
    """A sweep begins with the checkpoints."""
    groups = Evictor._groups
    patch.setattr(Evictor, "_groups", lambda self: tuple(reversed(groups(self))))


@pytest.mark.parametrize("name", BROKEN)
def test_broken(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A broken mechanism is found: [FAIL] with what was expected and seen, the number failed, and status 1. The other
    checks still run."""
    number, patch, seen = BROKEN[name]
    patch(monkeypatch)
    status, lines, _ = invoke()
    assert status == 1
    assert f"[FAIL] Test {number}: {NAMES[number - 1]}: {seen}" in lines
    assert [line[1:5] for line in lines[:7]] == ["FAIL" if "FAIL" in line else "PASS" for line in lines[:7]]
    failed = sum(line.startswith("[FAIL]") for line in lines)
    assert lines[7:] == [f"{failed} of the tests FAILED"]


def test_a_check_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is a failure that names it, and the checks after it run."""

    def raises(self: Any, policy: Any = None) -> None:
        raise rekindle.RekindleError("broken on purpose")

    monkeypatch.setattr(Evictor, "sweep", raises)
    status, lines, _ = invoke()
    assert status == 1
    assert lines[0] == "[FAIL] Test 1: basic checkpoint marking: RekindleError: broken on purpose"
    assert lines[1] == "[PASS] Test 2: smart selection"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    """The same seven on a GPU."""
    status, lines, _ = invoke("--device", "cuda")
    assert lines[-1] == "ALL TESTS PASSED!"
    assert status == 0
