"""How much does each way recompute at its own peak, and Rekindle's plan at that budget? Do planned steps fit?

    python benchmarks/planner.py [--model gpt2] [--write]

Steps are recorded with gradients allocated before, and all ways are played on the recorded graph by one simulator.
`seconds` is what the ops take that are repeated; `ours` is Rekindle's plan with the other way's peak as its budget.
The second table has ten budgets from the floor to all that the step needs. Its peaks are predicted, and measured by
the allocator's events of a step that obeys the plan. The bound is certified: no plan within the budget recomputes less.
"""

from __future__ import annotations

import os

os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler is chatty; it reads this when torch is loaded

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import baselines
import peers  # puts tests/ and examples/ on the path
import rekindle
import report
from rekindle.graph import Graph
from rekindle.policy import Planner

import nets  # isort: skip
import zoo  # isort: skip
from peak import peak_bytes  # isort: skip

Run = Callable[[], Any]
_SEED = 1  # dropout decides which tokens go to which expert, and so the sizes of a step


@dataclass(frozen=True)
class Subject:
    """A step to plan: what makes its loss, and the classes or names of the modules that people checkpoint."""

    name: str
    loss: Run
    block: type[nn.Module] | str


def small(name: str) -> Subject:
    """One of the models that exactness is tested on."""
    entry = next(entry for entry in zoo.ZOO if entry.name == name)
    torch.manual_seed(0)
    model, batch = entry.make(), entry.batch(0)
    return Subject(f"{name}, small", lambda: zoo.loss_of(model, batch), entry.blocks[0])


def full(make: Callable[[], peers.Workload]) -> Subject:
    """One of the models that memory is measured on."""
    workload = make()
    return Subject(workload.name, lambda: zoo.loss_of(workload.model, workload.batch), workload.block)


def own(name: str) -> Subject:
    """A network of our own: one that is hard to plan."""
    torch.manual_seed(0)
    if name == "densenet":
        model, batch = nets.DenseNet(), {"images": torch.randn(8, 3, 16, 16), "labels": zoo.tokens(0, 8, 1, 10)[:, 0]}
        return Subject("DenseNet-like, 12 layers", lambda: model(**batch), nets.DenseLayer)
    if name == "lstm":
        cells, text = nets.UnrolledLSTM(), zoo.tokens(0, 16, 100, 64)
        return Subject("LSTM by hand, 100 steps", lambda: cells(text, text), nn.LSTMCell)
    chain, x = nets.Chain(), torch.randn(64, 32)
    return Subject("chain of 500 layers", lambda: chain(x), nets.Link)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{name: (lambda name=name: small(name)) for name in ("gpt", "bert", "vit", "t5", "mixtral", "unet")},
    "gpt2": lambda: full(peers.gpt2),
    "llama": lambda: full(peers.llama),
    "resnet50": lambda: full(peers.resnet),
    **{name: (lambda name=name: own(name)) for name in ("densenet", "lstm", "chain")},
}


def record(subject: Subject) -> Graph:
    """The graph of a step that was run before, with gradients in place."""
    subject.loss().backward()
    session = rekindle.Session(memory_budget="40GiB")
    for _ in range(2):
        torch.manual_seed(_SEED)
        with session:
            subject.loss().backward()
    assert session.plan is not None
    assert session.plan.graph is not None
    return session.plan.graph  # with the seconds of whichever step ran an op faster


def blocks_of(graph: Graph, block: type[nn.Module] | str) -> list[frozenset[int]]:
    """The forward ops of each call of a block, in their order."""
    policy, known = rekindle.PerModule(block), {}
    for op in graph.forward:
        call = graph.calls[op.call]
        while call.parent is not None and not policy.matches(call):
            call = call.parent
        if call.parent is not None:
            known.setdefault(call.number, []).append(op.number)
    return [frozenset(ops) for ops in known.values()]


def compare(graph: Graph, planner: Planner, block: type[nn.Module] | str) -> Iterator[list[str]]:
    """Each way at its own peak, and ours at that budget."""
    lowest = planner.floor()
    for point in baselines.points(graph, blocks_of(graph, block)):
        try:
            plan = planner.plan(point.peak)
            ours = plan.forecast.seconds if plan.forecast is not None else 0.0
            verdict = (
                "yes"
                if ours <= point.seconds * (1 + 1e-9) + 1e-9
                else f"no: {ours / point.seconds - 1:+.1%}"
                if point.seconds
                else "no: nothing is repeated"
            )
            cells = [f"{ours * 1e3:.2f}", verdict]
        except rekindle.BudgetInfeasible:
            cells = ["-", "no: below our floor"]
        yield [
            point.name,
            _mib(point.peak),
            f"{point.peak / planner.full:.0%}",
            f"{point.seconds * 1e3:.2f}",
            *cells,
            "yes" if lowest <= point.peak else "no",
        ]


def budgets(subject: Subject, graph: Graph, planner: Planner) -> Iterator[list[str]]:
    """Ten budgets from the floor to all that the step needs."""
    low, high = planner.floor(), planner.full
    whole = sum(op.seconds for op in graph.ops)
    for step in range(10):
        budget = low + step * (high - low) // 9
        start = time.perf_counter()
        plan = Planner(graph).plan(budget)
        took = time.perf_counter() - start
        forecast = plan.forecast
        assert forecast is not None
        measured = measure(subject, graph, plan)
        gap = "-" if forecast.gap == float("inf") else f"{forecast.gap:.0%}"
        yield [
            _mib(budget),
            _mib(forecast.peak),
            _mib(measured) if measured <= budget else f"{_mib(measured)}, over",
            f"{forecast.seconds * 1e3:.2f}",
            f"{forecast.seconds / whole:.1%}",
            f"{forecast.bound * 1e3:.2f}",
            gap,
            f"{took:.2f}",
        ]


def measure(subject: Subject, graph: Graph, plan: rekindle.Plan) -> int:
    """The peak of a step that obeys a plan, in bytes, what stood before it included."""
    states = sum(op.random for op in graph.forward) * torch.get_rng_state().nbytes  # made in the step, and standing
    session = rekindle.Session(plan=plan)

    def step() -> None:
        torch.manual_seed(_SEED)
        with session:
            subject.loss().backward()

    peak = peak_bytes(step)
    assert session.last_step.departures == 0
    return graph.standing - states + peak


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f}"


def main() -> None:
    """Plan, print, and write on demand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/planner.md")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    sections = []
    for name in arguments.model or SUBJECTS:
        subject = SUBJECTS[name]()
        graph = record(subject)
        planner = Planner(graph)
        header = ("way", "peak MiB", "of full", "ms repeated", "ours, ms", "ours no more", "our floor no higher")
        ways = report.table(header, compare(graph, planner, subject.block))
        header = (
            "budget MiB",
            "predicted peak",
            "measured peak",
            "ms repeated",
            "of the step",
            "bound, ms",
            "gap",
            "seconds to plan",
        )
        grid = report.table(header, budgets(subject, graph, planner))
        sizes = f"{len(graph.ops)} ops, floor {_mib(planner.floor())} MiB, full {_mib(planner.full)} MiB"
        sections.append(f"## {subject.name}\n\n{sizes}\n\n{ways}\n\n{grid}")
        print(f"{sections[-1]}\n", flush=True)
    if arguments.write:
        question = report.question(__doc__)
        report.write("planner", report.page("Plans for a budget", question, "\n\n".join(sections), ["transformers"]))


if __name__ == "__main__":
    main()
