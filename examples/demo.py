"""Trains the same steps of a small GPT twice, plain and with Rekindle, and compares them to the last digit.

Exit status 1 if a loss or a final weight differs, or if the peak of memory did not fall.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import rekindle
from gpt import GPT, Block, GPTConfig
from peak import peak_bytes
from text import batches, library_text


@dataclass(frozen=True)
class Task:
    """What both runs do."""

    config: GPTConfig
    steps: int
    batch: int
    seed: int
    device: str


@dataclass
class Run:
    """What one of them gave."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    random_state: Tensor = field(default_factory=torch.get_rng_state)
    peak: int = 0
    evicted: int = 0
    ops_replayed: int = 0


def train(task: Task, text: Tensor, session: rekindle.Session | None, after_step: Callable[[], None]) -> Run:
    """Train from the seed, then measure the peak of one more step."""
    torch.manual_seed(task.seed)
    model = GPT(task.config).to(task.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    managed: AbstractContextManager[object] = nullcontext() if session is None else session
    data = batches(text, batch=task.batch, context=task.config.context, seed=task.seed)
    run = Run()

    def forward_and_backward(x: Tensor, y: Tensor) -> float:
        with managed:
            loss: Tensor = model(x, y)
            loss.backward()
        return loss.item()

    for tokens, targets in islice(data, task.steps):
        x, y = tokens.to(task.device), targets.to(task.device)
        begin = time.perf_counter()
        run.losses.append(forward_and_backward(x, y))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait_for(task.device)
        run.seconds.append(time.perf_counter() - begin)
        after_step()

    run.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run.random_state = _random_state(task.device)
    if session is not None:
        run.evicted, run.ops_replayed = session.stats.evicted, session.stats.ops_replayed
    run.peak = _peak_of_step(model, lambda: forward_and_backward(x, y), task.device)
    return run


def _peak_of_step(model: GPT, step: Callable[[], object], device: str) -> int:
    """The peak of a step that finds its gradients allocated, so that they don't count."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step()  # The first that adds to gradients instead of making them: Rekindle meets it here and plans the next.
    model.zero_grad(set_to_none=False)
    return peak_bytes(step, device)


def _wait_for(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _random_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.startswith("cuda") else torch.get_rng_state()


def differences(plain: Run, rekindled: Run) -> list[str]:
    """What went wrong, in words; nothing if the promise was kept."""
    found = [
        f"the loss of step {step} differs"
        for step, (a, b) in enumerate(zip(plain.losses, rekindled.losses, strict=True), start=1)
        if a != b
    ]
    found += [f"{name} differs" for name, weight in plain.weights.items() if not weight.equal(rekindled.weights[name])]
    if not torch.equal(plain.random_state, rekindled.random_state):
        found.append("the state of the random generator differs")
    if rekindled.peak >= plain.peak:
        found.append("the peak did not fall")
    return found


def table(plain: Run, rekindled: Run) -> Table:
    """Both runs side by side."""
    table = Table("", "plain", "Rekindle", title="The same training, twice")
    for column in table.columns[1:]:
        column.justify = "right"
    for step, (a, b) in enumerate(zip(plain.losses, rekindled.losses, strict=True), start=1):
        table.add_row(f"loss of step {step}", repr(a), repr(b), style=None if a == b else "red")
    table.add_section()
    table.add_row("peak bytes of a step", f"{plain.peak:,}", f"{rekindled.peak:,}")
    table.add_row("", f"{plain.peak / 2**20:.1f} MiB", f"{rekindled.peak / 2**20:.1f} MiB")
    table.add_row("seconds per step (median)", *(f"{statistics.median(run.seconds):.3f}" for run in (plain, rekindled)))
    table.add_row("activations evicted", f"{plain.evicted:,}", f"{rekindled.evicted:,}")
    table.add_row("ops replayed", f"{plain.ops_replayed:,}", f"{rekindled.ops_replayed:,}")
    return table


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="Pieces of text in a step.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Bytes in a piece of text.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Blocks of the model.")] = 6,
    seed: Annotated[int, typer.Option(help="Of weights, text and dropout.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
) -> None:
    """Train a small GPT on the sources of Python's standard library, plain and with Rekindle, and compare."""
    console = Console()
    text = library_text()
    task = Task(GPTConfig(context=context, layers=layers), steps, batch, seed, device)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in GPT(task.config).parameters())
    console.print(f"A GPT of {parameters:,} parameters; {steps} steps of {batch} x {context} bytes from {len(text):,}.")

    session = rekindle.Session(policy=rekindle.PerModule(Block))
    columns = TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:

        def bar(name: str) -> Callable[[], None]:
            row = progress.add_task(name, total=steps)
            return lambda: progress.advance(row)

        plain = train(task, text, None, bar("plain"))
        rekindled = train(task, text, session, bar("Rekindle"))

    console.print(table(plain, rekindled))
    if found := differences(plain, rekindled):
        console.print(f"[red]Not as promised:[/] {'; '.join(found)}.")
        raise typer.Exit(1)
    share = rekindled.peak / plain.peak
    console.print(f"Losses, weights and random state are equal; the peak is {share:.0%} of plain.")


if __name__ == "__main__":
    typer.run(main)
