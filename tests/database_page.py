"""Writes docs/op-database.md from the counts of a full run."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from database import LEFT_OUT, NOTHING_TO_REPLAY
from report import table

PAGE = Path(__file__).parents[1] / "docs" / "op-database.md"
KINDS = {
    "clone": "each input is a copy that a recorded op made",
    "window": "each input is a window onto a wider recorded value",
    "leaf": "inputs that need no gradient are leaves",
    "twice": "backward through the gradients too",
    "snapshot": 'in a session with `inplace="snapshot"`',
    "over saved": "in place over what autograd has saved, against the plain run on a copy",
}


def write(tally: Any) -> None:
    """Write the page."""
    PAGE.write_text("\n\n".join((_head(tally), _counts(tally), _exceptions(tally), _refused(tally))) + "\n")


def _head(tally: Any) -> str:
    stats = tally.stats
    return f"""# Every op

`make test-full` runs PyTorch's own databases of operators and modules (`op_db` and `module_db`), plain and in a session
that evicts every value and replays it: each function, method, in-place variant and module, with every sample input.
Results, gradients, mutated inputs, buffers and the random state are equal bit for bit; one NaN equals another. The
inputs of an op are made by a recorded op, and its results go through an op that saves them, so that both are evicted
and replayed. `make test` runs a sample of this. Written by `tests/database_page.py`.

- Date: {datetime.date.today().isoformat()}
- Versions: Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}
- {len(tally.names)} operators and modules, {tally.entries.total()} entries (variants and dtypes), {tally.samples} \
samples, {tally.runs.total()} runs
- {stats.evicted} activations evicted, {stats.ops_replayed} ops replayed by {len(tally.kernels)} kernels, \
{stats.snapshots} snapshots
- {len(tally.excepted)} entries ({len(tally.excepted) / tally.entries.total():.1%}) compared in another way: \
[exceptions](#exceptions)
- {tally.refused.total()} runs that plain PyTorch refuses, and a session too: [refused](#refused)"""


def _counts(tally: Any) -> str:
    kinds = table(("run", "how", "runs"), ((kind, how, str(tally.runs[kind])) for kind, how in KINDS.items()))
    dtypes = table(("dtype", "entries"), ((dtype, str(count)) for dtype, count in sorted(tally.entries.items())))
    return f"## What was run\n\n{kinds}\n\n{dtypes}"


def _exceptions(tally: Any) -> str:
    lines = _by_reason((reason, entry) for entry, reason in tally.excepted.items())
    left_out = "\n".join(f"- `{name}*`: {reason}" for name, reason in LEFT_OUT.items())
    nothing = _by_reason((reason, name) for name, reason in NOTHING_TO_REPLAY.items())
    return f"""## Exceptions

Not equal to the plain run bit for bit in at least one run:

{lines}

Not run:

{left_out}

Run, though they leave nothing to replay:

{nothing}"""


def _by_reason(pairs: Iterable[tuple[str, str]]) -> str:
    reasons: dict[str, list[str]] = {}
    for reason, name in pairs:
        reasons.setdefault(reason, []).append(f"`{name}`")
    return "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in reasons.items())


def _refused(tally: Any) -> str:
    counts: Counter[tuple[str, str, str]] = Counter()
    for (name, variant, message), count in tally.refused.items():
        counts[name, variant, message.partition(" INTERNAL ASSERT")[0][:120].replace("|", "\\|")] += count
    rows = ((f"`{name}`", variant, message, str(count)) for (name, variant, message), count in sorted(counts.items()))
    return f"""## Refused

These runs raise in plain PyTorch, for want of a derivative or of an in-place form, and in a session as well.

{table(("name", "variant", "PyTorch says", "runs"), rows)}"""
