"""Seven checks of the whole system, on the user's own machine and device: what `rekindle selfcheck` runs.

They are the tests 1 to 7 of cgadimpl's checkpointing system, asked of real PyTorch tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rekindle._bytes import format_bytes
from rekindle.policy import Balanced, MemoryOptimal, SpeedOptimal, make_plan
from rekindle.record.activation import Activation
from rekindle.runtime.eviction import EvictionPolicy
from rekindle.runtime.pressure import FakeReader, Level, Pressure
from rekindle.runtime.session import Session

_ROWS, _WIDTH, _LAYERS = 32, 64, 4
_NBYTES = _ROWS * _WIDTH * 4


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that a check looked at: what, what was expected, what was seen."""

    what: str
    expected: object
    seen: object

    @property
    def passed(self) -> bool:
        """Whether they are the same."""
        return self.expected == self.seen

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, saw {self.seen}"


@dataclass(slots=True)
class Result:
    """What one check found.

    Attributes:
        number, name: of the check.
        figures: what it looked at, up to the first that was wrong or the error that ended it.
        error: what it raised, if it did.
    """

    number: int
    name: str
    figures: list[Figure] = field(default_factory=list)
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether everything was as expected."""
        return not self.error and all(figure.passed for figure in self.figures)

    def __str__(self) -> str:
        if self.passed:
            return f"[PASS] Test {self.number}: {self.name}"
        wrong = self.error or "; ".join(str(figure) for figure in self.figures if not figure.passed)
        return f"[FAIL] Test {self.number}: {self.name}: {wrong}"


def run_checks(device: str | torch.device = "cpu") -> Iterator[Result]:
    """Run the checks on `device`, one after the other. The global random state is left as it was."""
    device = torch.device(device)
    for number, (name, check) in enumerate(CHECKS.items(), start=1):
        result = Result(number, name)
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
                for figure in check(device):
                    result.figures.append(figure)
                    if not figure.passed:
                        break
        except Exception as error:  # a check that breaks has failed, and the next ones still run
            result.error = f"{type(error).__name__}: {error}"
        yield result


def _marking(device: torch.device) -> Iterator[Figure]:
    model, x, expected = _plain(device)
    session = Session()
    with session:
        hidden = model[0](x)
        mark = session.mark(hidden)
        yield Figure("is_checkpoint", True, mark.is_checkpoint)
        yield Figure("saved inputs", True, mark.op is not None and mark.saved_inputs == tuple(mark.op.inputs))
        yield Figure("number of saved inputs (input, weight, bias)", 3, len(mark.saved_inputs))
        loss = _rest(model, hidden)
        del hidden
        yield Figure("something else was evicted", True, session.sweep().evicted > 0)
        yield Figure("the checkpoint is live", True, mark.is_live)
        loss.backward()
    yield Figure("gradients are exact", True, _same(model, expected))


def _selection(device: torch.device) -> Iterator[Figure]:
    model, x, _ = _plain(device)
    watching = Session()
    with watching:
        _rest(model, x).backward()
    graph = watching.graph
    assert graph is not None
    count = math.ceil(0.2 * len(graph.evictable))
    chosen = []
    for policy in (MemoryOptimal(0.2), SpeedOptimal(0.2), Balanced(0.2)):
        plan = make_plan(policy, graph)
        chosen.append(plan.kept)
        yield Figure(f"{policy} keeps", count, len(plan.kept))
        session = Session(policy)
        for _ in range(2):
            with session:
                _rest(model, x).backward()
        yield Figure(f"{policy} marks in a step", count, session.last_step.checkpoints)
    yield Figure("all three keep the same", False, chosen[0] == chosen[1] == chosen[2])


def _snapshots(device: torch.device) -> Iterator[Figure]:
    weight = torch.randn(_ROWS, _WIDTH, device=device, requires_grad=True)
    session = Session(inplace="snapshot")
    with session:
        hidden = (weight * 2).exp()
        before = hidden.detach().clone()
        mark = session.mark(hidden)
        loss = (hidden.detach() * weight).sum()
        hidden.add_(1)
        yield Figure("bytes in snapshots after the write", _NBYTES, session.snapshots.nbytes)
        loss.backward()
        yield Figure("the value before the write is restored", True, torch.equal(_gradient(weight), before))
        del loss, hidden
        yield Figure("bytes that the clean-up frees", _NBYTES, session.snapshots.cleanup_stale())
        yield Figure("bytes in snapshots after it", 0, session.snapshots.nbytes)
        yield Figure("the copy is gone", False, mark.is_live)
    yield Figure("snapshots taken", 1, session.stats.snapshots)


def _deletion(device: torch.device) -> Iterator[Figure]:
    for policy, survives in ((EvictionPolicy.ALWAYS_SAFE, True), (EvictionPolicy.AGGRESSIVE, False)):
        model, x, expected = _plain(device)
        session = Session()
        with session:
            loss, mark = _marked(session, model, x)
            refusal = session.try_evict(mark)
            yield Figure("a safe eviction of the checkpoint is refused", True, "checkpoint" in refusal.why_not)
            sweep = session.sweep(policy)
            yield Figure(f"{policy.value}: others were evicted", True, sweep.evicted > sweep.checkpoints)
            yield Figure(f"{policy.value}: the checkpoint is live", survives, mark.is_live)
            loss.backward()
        yield Figure(f"{policy.value}: gradients are exact", True, _same(model, expected))


def _statistics(device: torch.device) -> Iterator[Figure]:
    x = torch.randn(_ROWS, _WIDTH, device=device, requires_grad=True)
    session = Session()
    with session:
        first = x.exp()
        session.mark(first)
        loss = first.sin().cos().sin().sum()
        del first
        session.sweep()
        loss.backward()
    stats = session.stats
    yield Figure("steps", 1, stats.steps)
    yield Figure("checkpoints", 1, stats.checkpoints)
    yield Figure("evicted (sin and cos)", 2, stats.evicted)
    yield Figure("bytes evicted", 2 * _NBYTES, stats.evicted_nbytes)
    yield Figure("sweeps", 1, stats.sweeps)
    yield Figure("recomputations", 1, stats.recompute_calls)
    yield Figure("ops replayed", 2, stats.ops_replayed)
    yield Figure("failed recomputations", 0, stats.failed_recomputes)


def _pressure(device: torch.device) -> Iterator[Figure]:
    many = 16
    reader = FakeReader(0, many * _NBYTES)
    weight = torch.randn(_ROWS, _WIDTH, device=device, requires_grad=True)
    session = Session(inplace="snapshot", pressure=Pressure(reader))
    kept = []
    with session:
        for _ in range(many):
            hidden = weight.exp()
            session.mark(hidden)
            kept.append((hidden * weight).sum())
            hidden.add_(1)
        yield Figure("bytes in snapshots", many * _NBYTES, session.snapshots.nbytes)
        for share, level in ((0.5, 0), (0.6, 1), (0.75, 2), (0.9, 3), (0.86, 3), (0.84, 2), (0.69, 1), (0.5, 0)):
            reader.used_nbytes = math.ceil(share * reader.limit_nbytes)
            yield Figure(f"level at {share:.0%}", Level(level).name, session.pressure.name)
        del kept, hidden
        yield Figure("bytes in snapshots once nothing needs them", 0, session.snapshots.nbytes)


def _priority(device: torch.device) -> Iterator[Figure]:
    model, x, expected = _plain(device)
    session = Session()
    with session:
        loss, mark = _marked(session, model, x)
        target = session.live_nbytes - _NBYTES
        sweep = session.sweep_to_target(target, EvictionPolicy.AGGRESSIVE)
        yield Figure(f"target {format_bytes(target)} reached", True, sweep.reached and session.live_nbytes <= target)
        yield Figure("checkpoints touched", 0, sweep.checkpoints)
        sweep = session.sweep_to_target(0)
        yield Figure("nothing at all left is reached by a safe sweep", False, sweep.reached)
        yield Figure("and it says why", True, bool(sweep.why_not))
        yield Figure("the checkpoint is live", True, mark.is_live)
        target = session.live_nbytes - mark.nbytes
        sweep = session.sweep_to_target(target, EvictionPolicy.AGGRESSIVE)
        yield Figure(f"target {format_bytes(target)} reached", True, sweep.reached and session.live_nbytes <= target)
        yield Figure("checkpoints touched, now that they had to be", 1, sweep.checkpoints)
        loss.backward()
    yield Figure("gradients are exact", True, _same(model, expected))


CHECKS: dict[str, Callable[[torch.device], Iterator[Figure]]] = {
    "basic checkpoint marking": _marking,
    "smart selection": _selection,
    "in-place snapshots": _snapshots,
    "deletion respects checkpoints": _deletion,
    "statistics": _statistics,
    "memory pressure": _pressure,
    "priority sweep": _priority,
}
"""The checks, by name, in their order."""


def _plain(device: torch.device) -> tuple[nn.Sequential, Tensor, list[Tensor]]:
    """A small model, an input, and the gradients that plain PyTorch computes."""
    layers = (nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(_LAYERS))
    model = nn.Sequential(*(module for layer in layers for module in layer)).to(device)
    x = torch.randn(_ROWS, _WIDTH, device=device)
    torch.manual_seed(0)
    _rest(model, x).backward()
    expected = [_gradient(parameter) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    return model, x, expected


def _rest(model: nn.Sequential, hidden: Tensor) -> Tensor:
    """The loss, from the input or from what the first module made of it."""
    for module in list(model)[hidden.requires_grad :]:
        hidden = module(hidden)
    return hidden.square().mean()


def _marked(session: Session, model: nn.Sequential, x: Tensor) -> tuple[Tensor, Activation]:
    hidden = model[0](x)
    mark = session.mark(hidden)
    return _rest(model, hidden), mark


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _same(model: nn.Module, expected: list[Tensor]) -> bool:
    return all(torch.equal(_gradient(p), e) for p, e in zip(model.parameters(), expected, strict=True))
