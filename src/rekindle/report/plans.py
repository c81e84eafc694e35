"""A plan as a page of text: by module, how the budget splits, where the peak is, and what it promises."""

from __future__ import annotations

import io
import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rekindle._bytes import format_bytes
from rekindle.graph import Forecast, Graph, Moment, Plan, Share, Timeline, fullest, simulate
from rekindle.policy.refusal import where
from rekindle.report.fold import rows_of

_WIDTH = 100
_SHARES = {
    Share.KEPT: "kept for the backward pass",
    Share.RECOMPUTED: "recomputed, while it is wanted",
    Share.BACKWARD: "results of the backward pass",
    Share.IN_USE: "in use, or not to be recomputed",
    Share.TEMPORARY: "temporaries of the kernel",
}


def describe_plan(plan: Plan) -> str:
    """What a plan does, as text; its repr, if it does not tell its graph."""
    if plan.graph is None:
        return repr(plan)
    timeline, moment = simulate(plan.graph, plan), fullest(plan.graph, plan)
    parts = [_modules(plan.graph, plan, timeline), _split(moment)]
    lines = [_peak(moment), _cost(plan.graph, timeline), *_promise(plan.forecast)]
    return "\n".join([*map(_drawn, parts), *lines])


def _modules(graph: Graph, plan: Plan, timeline: Timeline) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("module", no_wrap=True)
    for name in ("kept", "recomputed", "seconds", "share"):
        table.add_column(name, justify="right")
    for row in rows_of(graph, plan, timeline):
        name = f"{'  ' * row.depth}{row.name}{f' x{row.count}' if row.count > 1 else ''}"
        share = f"{row.seconds / timeline.seconds:.0%}" if timeline.seconds else "-"
        kept, recomputed = (format_bytes(nbytes) if nbytes else "-" for nbytes in (row.kept, row.recomputed))
        table.add_row(Text(name), kept, recomputed, format_seconds(row.seconds) if row.seconds else "-", share)
    return table


def _split(moment: Moment) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column("live at the peak", no_wrap=True)
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    split, whole = moment.split, moment.nbytes
    rows = [*_standing(moment.graph), *((name, split[share]) for share, name in _SHARES.items()), ("together", whole)]
    for name, nbytes in rows:
        table.add_row(name, format_bytes(nbytes), f"{nbytes / whole:.0%}" if whole else "-")
    return table


def _standing(graph: Graph) -> list[tuple[str, int]]:
    """What is there all the time: what has a name, what has none, and the rest, which no op of the step read."""
    leaves = [value for value in graph.values if value.made_by is None]
    named = sum(value.nbytes for value in leaves if value.name)
    named = min(named, graph.standing)
    inputs = min(sum(value.nbytes for value in leaves if not value.name), graph.standing - named)
    return [
        ("parameters and buffers", named),
        ("inputs, and gradients that were read", inputs),
        ("gradients and the rest of what stands", graph.standing - named - inputs),
    ]


def _peak(moment: Moment) -> str:
    if not moment.graph.ops:
        return "No op was recorded."
    return f"Peak: {format_bytes(moment.nbytes)} at op {moment.op}, {where(moment)}."


def _cost(graph: Graph, timeline: Timeline) -> str:
    ops, step = sum(map(len, timeline.replays)), sum(op.seconds for op in graph.ops)
    share = f", {timeline.seconds / step:.1%} of the step's {format_seconds(step)}" if step else ""
    return f"Recomputed: {ops} ops in {format_seconds(timeline.seconds)}{share}."


def _promise(forecast: Forecast | None) -> list[str]:
    if forecast is None:
        return []
    gap = "no bound above zero is known" if math.isinf(forecast.gap) else f"a gap of {forecast.gap:.1%}"
    return [
        f"Budget: {format_bytes(forecast.budget)}, of which {format_bytes(forecast.budget - forecast.peak)} stay free. "
        f"No plan within it recomputes less than {format_seconds(forecast.bound)}: {gap}."
    ]


def format_seconds(seconds: float) -> str:
    """Readable: "1.20 s", "35.0 ms", "4.1 us"."""
    if seconds >= 1 or not seconds:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _drawn(table: Table) -> str:
    page = io.StringIO()
    width = max(_WIDTH, Console(width=10_000).measure(table).maximum)
    Console(file=page, width=width, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()) + "\n"
