"""Writes docs/full-run.md when a full run has passed."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch

from report import table

PAGE = Path(__file__).parents[1] / "docs" / "full-run.md"


def is_full(config: pytest.Config) -> bool:
    """Whether all tests run here, in full, on the CPU, and none in processes beside: each of these reports too, of its
    own share."""
    whole = config.args == config.getini("testpaths") and not (config.option.keyword or config.option.markexpr)
    worker = hasattr(config, "workerinput")
    return whole and not worker and config.getoption("--device") == "cpu" and os.environ.get("REKINDLE_TESTS") == "full"


def write(outcomes: Mapping[str, int], rooms: Mapping[str, int], seconds: float, commit: str) -> None:
    """Write the page: how many tests had each outcome, how many are in each folder, how long they ran, on what."""
    PAGE.write_text(page(outcomes, rooms, seconds, commit), encoding="utf-8")


def page(outcomes: Mapping[str, int], rooms: Mapping[str, int], seconds: float, commit: str) -> str:
    """The page as text."""
    said = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    rows = ((f"`{room}`", str(count)) for room, count in sorted(rooms.items()))
    return f"""# The full run

`make test-full` runs what `make test` takes samples of: [every op](op-database.md) of PyTorch's databases,
[every architecture](model-zoo.md) of the model zoo, a hundred times as many programs by chance, others each time, and
ten thousand steps with changing shapes. Written by `tests/full_page.py` when nothing failed.

- Date: {datetime.date.today().isoformat()}
- Commit: {commit}
- Versions: Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}
- {said}, in {datetime.timedelta(seconds=round(seconds))} h

{table(("folder", "tests"), rows)}
"""


def head() -> str:
    """The commit that is checked out; empty where git does not tell."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PAGE.parent, capture_output=True, text=True, check=False
    )
    return told.stdout.strip()


def rooms_of(tests: Iterable[str]) -> Counter[str]:
    """How many tests are in each folder, by their ids."""
    return Counter(str(Path(test.partition("::")[0]).parent) for test in tests)
