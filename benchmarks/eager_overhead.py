"""What does recording cost per op, against plain eager and against a dispatch mode that does nothing?

    python benchmarks/eager_overhead.py [--rounds 61] [--write]

Chains of small ops (64 x 64 floats: 16 KiB a tensor), forward only and with backward. CPU time, medians over rounds in
which the ways take turns, each after a plain step; ops are counted at the dispatcher, below autograd. `no-op ratio` is
the overhead over plain divided by that of a `TorchDispatchMode` that only calls the op. `the recorder` is Rekindle's
dispatch mode alone, what that ratio is a fair measure of; a session adds hooks on saved tensors and module calls, and
a policy that evicts adds the ops that it replays.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
import report

HEADER = ("chain", "way", "ops", "us per op", "over plain, us per op", "no-op ratio")
LAYERS = 20


class NoOp(TorchDispatchMode):
    """The least that any recorder below autograd costs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Counting(TorchDispatchMode):
    """Counts ops."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Mixed(nn.Module):
    """Norm, linear, GELU and residual add, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(LAYERS))
        self.linears = nn.ModuleList(nn.Linear(64, 64) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + F.gelu(linear(norm(x)))
        return x


class Pointwise(nn.Module):
    """Products and sums without any module call: nothing but ops."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        for _ in range(2 * LAYERS):
            x = x * 0.5 + 1.0
        return x


def policies() -> dict[str, rekindle.Session]:
    """Sessions to measure, fresh."""
    return {
        "session that evicts nothing": rekindle.Session(),
        "session, EveryN(2)": rekindle.Session(policy=rekindle.EveryN(2)),
        "session, PerModule(Linear)": rekindle.Session(policy=rekindle.PerModule(nn.Linear)),
        "session, following a plan": rekindle.Session(policy=rekindle.Balanced(0.5)),
        "session, a budget for all": rekindle.Session(memory_budget="1GiB"),
        "session, KeepAll()": rekindle.Session(policy=rekindle.KeepAll()),
    }


def recording() -> rekindle.Session:
    """A session whose every step is its first: it also writes the graph down."""
    return rekindle.Session(policy=rekindle.Balanced(0.5))


class Alone:
    """The dispatch mode of a session alone, step after step: no hooks on saved tensors and module calls."""

    def __init__(self) -> None:
        self._session = rekindle.Session()

    def __enter__(self) -> None:
        self._session._recorder.__enter__()

    def __exit__(self, *error: object) -> None:
        self._session._recorder.__exit__(*error)
        self._session._recorder.cut()


def forward(model: nn.Module, x: Tensor) -> None:
    """Forward only; autograd saves what it would."""
    model(x)


def forward_backward(model: nn.Module, x: Tensor) -> None:
    """Forward and backward, so that what was evicted is recomputed."""
    model(x).sum().backward()


def main() -> None:
    """Measure, print, and write on demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=61, help="how many steps of each way are timed")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/eager_overhead.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model in (Mixed(), Pointwise()):
        for run in (forward, forward_backward):
            rows += _measure(model, run, arguments.rounds)
    text = report.table(HEADER, rows)
    print(text)
    if arguments.write:
        question = report.question(__doc__)
        report.write("eager_overhead", report.page("Overhead per op", question, text))


def _measure(model: nn.Module, run: Callable[[nn.Module, Tensor], None], rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)
    with Counting() as counting:
        run(model, x)
    alone = Alone()
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain": nullcontext,
        "no-op mode": NoOp,
        "the recorder": lambda: alone,
        "session, first step": recording,
    }
    for name, session in policies().items():
        ways[name] = lambda session=session: session
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(6):  # after these, steps that keep everything within a budget rest
            _time(way(), run, model, x)
    gc.disable()
    order = list(ways)
    for _ in range(rounds):
        order = [*order[1:], order[0]]
        for name in order:
            _time(nullcontext(), run, model, x)
            seconds[name].append(_time(ways[name](), run, model, x))
        gc.collect()
    gc.enable()
    per_op = {name: statistics.median(times) / counting.count * 1e6 for name, times in seconds.items()}
    over = {name: each - per_op["plain"] for name, each in per_op.items()}
    what = f"{type(model).__name__.lower()}, {run.__name__.replace('_', ' and ')}"
    return [
        [
            what,
            name,
            str(counting.count),
            f"{per_op[name]:.1f}",
            f"{over[name]:.1f}",
            f"{over[name] / over['no-op mode']:.2f}",
        ]
        for name in ways
    ]


def _time(
    way: AbstractContextManager[Any], run: Callable[[nn.Module, Tensor], None], model: nn.Module, x: Tensor
) -> float:
    start = time.process_time_ns()
    with way:
        run(model, x)
    return (time.process_time_ns() - start) / 1e9


if __name__ == "__main__":
    main()
