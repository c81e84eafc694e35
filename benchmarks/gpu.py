"""How much memory does a step take on a GPU, and how long, in each way to run it?

    python benchmarks/gpu.py [--model gpt2] [--rounds 7] [--write]

Peaks are those of the device's own allocator, all that was there before the step included, with gradients allocated
before. A budget is what was there before, and a share of what the plain step allocates beside, or what checkpoints per
block do. Times are medians over rounds in which the ways take turns, by the clock of the host with the device at rest
before and after; `planned` are the milliseconds of recomputation that a plan predicts. PyTorch is told to take
deterministic kernels; `same` says whether loss, gradients, buffers and random states equal the plain step bit for bit.
"""

from __future__ import annotations

import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor

import peers
import rekindle
import report
from helpers import random_states

WORKLOADS: dict[str, Callable[[], peers.Workload]] = {
    "gpt2": functools.partial(peers.gpt2, length=1024, batch=32),
    "llama": functools.partial(peers.llama, layers=16, width=2048, heads=16, length=2048, vocabulary=32000, batch=4),
    "resnet50": functools.partial(peers.resnet, batch=128),
}
SHARES = (0.7, 0.5, 0.35)
WARM = 4  # steps: recorded twice, planned, and one to rest
HEADER = ("way", "peak MiB", "of plain", "budget MiB", "ms a step", "of plain", "planned", "ops replayed", "same")


@dataclass
class Measured:
    """A way to run the step, and what it took."""

    name: str
    way: AbstractContextManager[Any]
    budget: int = 0
    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    same: bool = False

    def row(self, plain: Measured) -> list[str]:
        """Its line of the table."""
        own, others = (1e3 * statistics.median(each.seconds) for each in (self, plain))
        replayed = planned = ""
        if isinstance(self.way, rekindle.Session):
            replayed, plan = str(self.way.last_step.ops_replayed), self.way.plan
            planned = f"+{1e3 * plan.forecast.seconds:.1f}" if plan is not None and plan.forecast is not None else ""
        return [
            self.name,
            f"{self.peak / 2**20:.0f}",
            f"{self.peak / plain.peak:.1%}",
            f"{self.budget / 2**20:.0f}" if self.budget else "",
            f"{own:.1f}",
            f"{own / others:.2f}",
            planned,
            replayed,
            "yes" if self.same else "NO",
        ]


def ways(workload: peers.Workload) -> Iterator[Measured]:
    """All ways to run a step of `workload`, the plain one first."""
    yield Measured("plain", nullcontext())
    peer = peers.Checkpointed(workload.blocks())
    yield Measured("torch.utils.checkpoint per block", peer)
    policy = rekindle.PerModule(workload.block)
    yield Measured(f"PerModule({workload.block.__name__})", rekindle.Session(policy))
    there = torch.cuda.memory_allocated()
    plain, blocks = workload.peak(nullcontext()), workload.peak(peer)
    shares = {f"budget {share:.0%}": share * plain for share in (1.1, *SHARES)}
    for name, allocates in {**shares, "budget as per block": blocks}.items():
        budget = there + int(allocates)
        yield Measured(name, rekindle.Session(memory_budget=budget), budget)


def left(workload: peers.Workload, way: AbstractContextManager[Any]) -> list[Tensor]:
    """All that a step leaves behind, begun from one random state: on the host, to take no room on the device."""
    torch.manual_seed(0)
    buffers = [buffer.cpu() for buffer in workload.model.buffers()]
    things = [workload.step(way), *(p.grad for p in workload.model.parameters() if p.grad is not None)]
    things = [thing.cpu() for thing in (*things, *workload.model.buffers(), *random_states().values())]
    with torch.no_grad():
        for buffer, before in zip(workload.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return things


def measure(workload: peers.Workload, rounds: int) -> list[Measured]:
    """What each way takes; those whose budget cannot be met are left out."""
    measured: list[Measured] = []
    for each in ways(workload):
        with suppress(rekindle.BudgetInfeasible):
            for _ in range(WARM):
                workload.step(each.way)
            torch.cuda.reset_peak_memory_stats()
            workload.step(each.way)
            torch.cuda.synchronize()
            each.peak = torch.cuda.max_memory_allocated()
            measured.append(each)
    for _ in range(rounds):
        for each in measured:
            torch.cuda.synchronize()
            start = time.perf_counter()
            workload.step(each.way)
            torch.cuda.synchronize()
            each.seconds.append(time.perf_counter() - start)
    expected = left(workload, nullcontext())
    for each in measured:
        each.same = all(map(torch.equal, left(workload, each.way), expected))
    return measured


def main() -> None:
    """Measure, print, and write on demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, action="append", help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=7, help="how many steps of each way are timed")
    parser.add_argument("--write", action="store_true", help="write the page")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    sections = []
    for name in arguments.model or WORKLOADS:
        with torch.device("cuda"):
            workload = replace(WORKLOADS[name](), autocast=torch.bfloat16)
        measured = measure(workload, arguments.rounds)
        rows = [each.row(measured[0]) for each in measured]
        sections.append(f"## {workload.name}, autocast to bfloat16\n\n{report.table(HEADER, rows)}")
        print(f"{sections[-1]}\n", flush=True)
        del workload, measured
        torch.cuda.empty_cache()
        if arguments.write:
            question = report.question(__doc__)
            page = report.page("Memory and time on a GPU", question, "\n\n".join(sections), ["transformers"])
            report.write("gpu", page)


if __name__ == "__main__":
    main()
