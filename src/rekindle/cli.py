"""The command line: `rekindle selfcheck`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

from rekindle.selfcheck import run_checks

app = typer.Typer(help="Train PyTorch models inside the memory you have.", no_args_is_help=True, add_completion=False)


@app.callback()
def _main() -> None:
    """Train PyTorch models inside the memory you have."""


@app.command()
def selfcheck(
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")] = "cpu",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the figures of each check.")] = False,
) -> None:
    """Check on this machine that marking, selection, snapshots, deletion, statistics, pressure and sweeps work."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"no tensor can be made on {device!r}: {error}", param_hint="--device") from error
    failed = 0
    for result in run_checks(device):
        console.print(str(result))
        failed += not result.passed
        if verbose:
            for figure in result.figures:
                console.print(f"    {figure}")
    if failed:
        console.print(f"{failed} of the tests FAILED")
        raise typer.Exit(1)
    console.print("ALL TESTS PASSED!")
