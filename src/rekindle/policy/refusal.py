"""What is said when a step does not fit: what it needs at least, what holds that, and what to try."""

from __future__ import annotations

from rekindle._bytes import format_bytes
from rekindle.graph import Graph, Moment, Share, Value, module_at, module_of, op_name

_LARGEST = 5
_MUCH = 0.5  # of the floor: when parameters, gradients, buffers and inputs hold that, a smaller batch is not the cure
_NAMES = {
    Share.STANDING: "of parameters, gradients, buffers and inputs",
    Share.KEPT: "kept",
    Share.RECOMPUTED: "recomputed",
    Share.IN_USE: "in use",
    Share.BACKWARD: "made by the backward pass",
    Share.TEMPORARY: "that kernels allocate for themselves",
}


def refusal(budget: int, floor: int, moment: Moment) -> str:
    """The message for a budget below the floor; `moment` is the fullest of the plan that needs only the floor."""
    split = sorted(((share, nbytes) for share, nbytes in moment.split.items() if nbytes), key=lambda item: -item[1])
    holders = ", ".join(f"{format_bytes(nbytes)} {_NAMES[share]}" for share, nbytes in split)
    largest = "".join(f"\n  {_entry(moment.graph, *entry)}" for entry in moment.largest(_LARGEST))
    return (
        f"memory_budget is {format_bytes(budget)}, but the step needs {format_bytes(floor)} at least, whatever is "
        f"recomputed. It needs them at {where(moment)}: {holders}."
        f"{' The largest that are live then:' if largest else ''}{largest}\n{_cure(floor, moment)}"
    )


def where(moment: Moment) -> str:
    """The place of the fullest moment, such as "aten.mm.default of 'layers.3.mlp', replayed"."""
    if not moment.graph.ops:
        return "its beginning"
    op = moment.graph.ops[moment.op]
    path = module_at(moment.graph, op.number)
    when = "in the backward pass" if op.backward else "replayed" if moment.replayed else "in the forward pass"
    return f"{op.name}{f' of {path!r}' if path else ''}, {when}"


def _entry(graph: Graph, value: Value, count: int) -> str:
    size = format_bytes(value.nbytes) if count == 1 else f"{count} x {format_bytes(value.nbytes)}"
    shape = f" {value.dtype}{list(value.shape)}" if value.dtype else ""
    path = module_of(graph, value)
    return f"{size}{shape} of {op_name(graph, value)}{f' in {path!r}' if path else ''}"


def _cure(floor: int, moment: Moment) -> str:
    unit, name = (1 << 20, "MiB") if floor >= 64 << 20 else (1 << 10, "KiB")
    first = f'Try memory_budget="{-(-floor // unit)}{name}"'
    if moment.graph.standing > _MUCH * floor:
        return (
            f"{first}, a smaller model, or parameters in fewer bytes (dtype=torch.bfloat16): most of it is there "
            "before the step begins."
        )
    return f"{first}, a smaller batch or shorter inputs, or torch.autocast."
