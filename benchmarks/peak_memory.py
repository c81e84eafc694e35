"""How much memory does a step take at its peak, and how much CPU time, in each way to run it?

    python benchmarks/peak_memory.py [--model gpt2] [--way per-module] [--rounds 5] [--page NAME] [--write]

Peaks come from the allocator's events, with gradients allocated before. A budget is what stands (parameters, gradients,
buffers, the batch) and a share of what the plain step allocates beside, or what checkpoints per block do. CPU time is
the median over rounds in which the ways take turns; `may take` is plain's, and for a plan 1.15 times the seconds of
recomputation that it predicts and 20 microseconds for each recorded op. `same` says whether loss, gradients, buffers
and random state equal the plain step bit for bit, or that the budget was refused.
"""

from __future__ import annotations

import os

os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler is chatty; it reads this when torch is loaded

import argparse
import fnmatch
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import transformers

import peers
import rekindle
import report
from rekindle.policy import least_recompute

WORKLOADS = {
    "gpt2": peers.gpt2,
    "llama": peers.llama,
    "t5": peers.t5,
    "bert": peers.bert,
    "resnet50": peers.resnet,
}
SHARES = (0.7, 0.5, 0.35)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
SCORED = {"MemoryOptimal": rekindle.MemoryOptimal, "SpeedOptimal": rekindle.SpeedOptimal, "Balanced": rekindle.Balanced}
HEADER = (
    "way",
    "peak MiB",
    "of plain",
    "CPU seconds",
    "of plain",
    "may take",
    "ops replayed",
    "own peak off by",
    "same",
)


@dataclass
class Measured:
    """A way to run the step, and what it took."""

    name: str
    way: AbstractContextManager[Any]
    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    replayed: str = ""
    own_peak: str = ""
    planned: float | None = None
    refused: str = ""

    @property
    def median(self) -> float:
        """CPU seconds of a step."""
        return statistics.median(self.seconds)

    def row(self, plain: Measured) -> list[str]:
        """Its line of the table."""
        if self.refused:
            return [self.name, "", "", "", "", "", "", "", self.refused]
        return [
            self.name,
            f"{self.peak / 2**20:.1f}",
            f"{self.peak / plain.peak:.1%}",
            f"{self.median:.2f}",
            f"{self.median / plain.median:.2f}",
            f"{plain.median + self.planned:.2f}" if self.planned is not None else "",
            self.replayed,
            self.own_peak,
            _same(self.differs),
        ]


def ways(workload: peers.Workload, ratios: Iterable[float]) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
    """All ways to run a step of `workload`, the plain one first."""
    yield "plain", nullcontext()
    yield "torch.utils.checkpoint per block", peers.Checkpointed(workload.blocks())
    policies = {f"PerModule({workload.block.__name__})": rekindle.PerModule(workload.block)}
    policies |= {"EveryN(4)": rekindle.EveryN(4), "KeepNone()": rekindle.KeepNone()}
    for name, policy in SCORED.items():
        policies |= {f"{name}({ratio})": policy(ratio) for ratio in ratios}
    for name, policy in policies.items():
        yield name, rekindle.Session(policy=policy)
    plain, standing = workload.peak(nullcontext()), workload.standing()
    for share in SHARES:
        yield f"budget {share:.0%}", rekindle.Session(memory_budget=standing + int(share * plain))
    peer = workload.peak(peers.Checkpointed(workload.blocks()))
    with suppress(rekindle.BudgetInfeasible):  # of a model whose peak is that of its own backward pass
        yield "budget as per block", rekindle.Session(plan=planned(workload, standing + peer))


def planned(workload: peers.Workload, budget: int) -> rekindle.Plan:
    """A plan of a step that was recorded with room for all."""
    session = rekindle.Session(memory_budget="64GiB")
    for _ in range(2):
        workload.step(session)
    assert session.plan is not None
    assert session.plan.graph is not None
    return least_recompute(session.plan.graph, budget)


def measure(workload: peers.Workload, chosen: list[Measured], rounds: int) -> None:
    """Fill in what each way takes."""
    expected = workload.outcome(chosen[0].way)
    for each in chosen:
        try:
            actual = workload.outcome(each.way)  # for a session, the step in which it records
        except rekindle.BudgetInfeasible:
            each.refused = "refused: the budget is below the floor"
            continue
        again = workload.outcome(each.way)  # and the first in which every policy acts
        each.differs = sorted(key for key in expected if expected[key] != actual[key] or expected[key] != again[key])
        each.peak = workload.peak(each.way)
        if isinstance(each.way, rekindle.Session):
            stats = each.way.last_step
            plan = each.way.plan
            if plan is not None and plan.forecast is not None and plan.graph is not None:
                each.planned = 1.15 * plan.forecast.seconds + 20e-6 * len(plan.graph.ops)
            each.replayed, each.own_peak = str(stats.ops_replayed), f"{stats.peak_nbytes / each.peak - 1:+.1%}"
    running = [each for each in chosen if not each.refused]
    for _ in range(rounds):
        for each in running:
            start = time.process_time()
            workload.step(each.way)
            each.seconds.append(time.process_time() - start)


def _same(differs: list[str]) -> str:
    if not differs:
        return "yes"
    kinds = sorted({key.split()[0] for key in differs})
    return f"no: {len(differs)} differ ({', '.join(kinds)})"


def main() -> None:
    """Measure, print, and write on demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, action="append", help="only this one; may be repeated")
    parser.add_argument("--way", default="*", help="only ways whose name matches this wildcard, and plain")
    parser.add_argument("--ratio", type=float, action="append", help="only this ratio; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="how many steps of each way are timed")
    parser.add_argument("--page", default="peak_memory", help="which page of benchmarks/results to write")
    parser.add_argument("--write", action="store_true", help="write the page")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    sections = []
    for name in arguments.model or WORKLOADS:
        workload = WORKLOADS[name]()
        everything = [Measured(*way) for way in ways(workload, arguments.ratio or RATIOS)]
        chosen = [each for each in everything if each.name == "plain" or fnmatch.fnmatch(each.name, arguments.way)]
        measure(workload, chosen, arguments.rounds)
        sections.append(f"## {workload.name}\n\n{report.table(HEADER, [each.row(chosen[0]) for each in chosen])}")
        print(f"{sections[-1]}\n")
    if arguments.write:
        question = report.question(__doc__)
        report.write(arguments.page, report.page("Peak memory", question, "\n\n".join(sections), ["transformers"]))


if __name__ == "__main__":
    main()
