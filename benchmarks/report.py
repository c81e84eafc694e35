"""Where and when a benchmark ran, and its tables as markdown."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def question(doc: str | None) -> str:
    """What a script asks, from its docstring: the first line, and all below the command."""
    first, _, rest = (doc or "").partition("\n\n")
    return f"{first}\n\n{rest.partition('--write]')[2].strip()}"


def page(title: str, question: str, body: str, packages: Sequence[str] = ()) -> str:
    """A page of results that says what was asked, what was run, when and on what."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments, "--write"])
    return (
        f"# {title}\n\n{question}\n\n"
        f"- Date: {datetime.date.today().isoformat()}\n"
        f"- Hardware: {_hardware()}\n"
        f"- Versions: Python {platform.python_version()}, {versions}, {platform.system()}\n"
        f"- Command: `{command}`\n\n{body}\n"
    )


def write(name: str, text: str) -> None:
    """Put a page beside the others."""
    (FOLDER / f"{name}.md").write_text(text)
    print(f"wrote benchmarks/results/{name}.md")


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    return f"{_processor()}, {torch.get_num_threads()} threads, {_memory()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"
