"""Graphs made by hand and by chance: steps that never ran, for tests that need no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rekindle.graph import Call, Demand, Graph, Op, Value

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For tests by chance: a busy machine is no reason to fail."""

NAMES = st.text('ab.*é"\\\n\ud800', max_size=5)
OUTSIDE = Call(0, None, "", ())


def build(
    *ops: tuple[Sequence[int], Sequence[int]],
    nbytes: Mapping[int, int] | None = None,
    seconds: Sequence[float] = (),
    call_of: Sequence[int] = (),
    calls: Sequence[Call] = (OUTSIDE,),
    saved_in: Mapping[int, Sequence[int]] | None = None,
    kept: Collection[int] = (),
    backward: Collection[int] = (),
) -> Graph:
    """A graph of ops, each (values read, values made). What no op makes is a leaf; what is `kept` is not evictable."""
    made_by = {value: number for number, (_, outputs) in enumerate(ops) for value in outputs}
    count = 1 + max((value for reads, makes in ops for value in (*reads, *makes)), default=-1)
    values = tuple(
        Value(
            number,
            (nbytes or {}).get(number, 8),
            made_by.get(number),
            saved_in=tuple((saved_in or {}).get(number, ())),
            evictable=number in made_by and number not in kept,
        )
        for number in range(count)
    )
    drawn = tuple(
        Op(
            number,
            "aten.op",
            tuple(reads),
            tuple(makes),
            call=call_of[number] if call_of else 0,
            seconds=seconds[number] if seconds else 1.0,
            backward=number in backward,
        )
        for number, (reads, makes) in enumerate(ops)
    )
    return Graph(drawn, values, tuple(calls))


def chain(length: int) -> Graph:
    """A leaf, value 0, and `length` ops, each reading what the one before made."""
    return build(*(((number,), (number + 1,)) for number in range(length)))


def chain_step(length: int, nbytes: int | Sequence[int] = 8, seconds: float | Sequence[float] = 1.0) -> Graph:
    """A step through `length` layers, forward and backward; op k makes value k.

    Layer i is op i of the forward pass; user code lets go of its value as soon as the next layer has read it, and
    autograd has saved it. Its backward, op `2 * length - 1 - i`, asks for that value, and turns the gradient of the
    layer after it, which goes then, into its own. Bytes and seconds are one for all or one for each layer; a gradient
    is as large as the value, and what a backward op takes is not ours to decide.
    """
    sizes = [nbytes] * length if isinstance(nbytes, int) else list(nbytes)
    times = [float(seconds)] * length if isinstance(seconds, int | float) else list(seconds)
    end = 2 * length
    forward = [Op(i, "aten.layer", (i - 1,) if i else (), (i,), seconds=times[i]) for i in range(length)]
    values = [Value(i, sizes[i], i, saved_in=(0,), dropped=i + 2 if i + 1 < length else length) for i in range(length)]
    backward, demands = [], []
    for k in range(length, end):
        layer = end - 1 - k
        reads = (layer,) if k == length else (layer, k - 1)
        backward.append(Op(k, "aten.layer_backward", reads, (k,), seconds=times[layer], backward=True))
        values.append(Value(k, sizes[layer], k, evictable=False, dropped=k + 2 if k + 1 < end else None))
        demands.append(Demand(layer, k, k + 1))
    return Graph((*forward, *backward), tuple(values), demands=tuple(demands))


def backwarded(*forward: tuple[Sequence[int], int, float, Sequence[int]], standing: int = 0) -> Graph:
    """A step whose forward ops each read values, make one of some bytes in some seconds, and save values for the
    backward pass; op k makes value k. User code lets go of a value when the last op has read it; one gradient, as
    large as the value, goes back through the ops."""
    count = len(forward)
    end = 2 * count
    last = [
        max((n for n, (reads, *_) in enumerate(forward) if value in reads), default=value) for value in range(count)
    ]
    ops = [Op(n, "aten.op", tuple(reads), (n,), seconds=seconds) for n, (reads, _, seconds, _) in enumerate(forward)]
    values = [Value(n, forward[n][1], n, saved_in=(0,), dropped=min(count, last[n] + 1)) for n in range(count)]
    demands = []
    for k in range(count, end):
        _, nbytes, seconds, saved = forward[end - 1 - k]
        reads = (*saved, *((k - 1,) if k > count else ()))
        ops.append(Op(k, "aten.op_backward", reads, (k,), seconds=2 * seconds, backward=True))
        values.append(Value(k, nbytes, k, evictable=False, dropped=k + 2 if k + 1 < end else None))
        demands += [Demand(value, k, k + 1) for value in saved]
    return Graph(tuple(ops), tuple(values), demands=tuple(demands), standing=standing)


def transformer_step(layers: int, width: int = 8) -> Graph:
    """A step through blocks of ten ops, like those of a transformer: attention, and a wide MLP."""
    forward: list[tuple[Sequence[int], int, float, Sequence[int]]] = [((), width, 1.0, ())]
    for _ in range(layers):
        x = len(forward) - 1
        n = x + 1
        forward += [
            ((x,), width, 1.0, (x,)),  # norm
            ((n,), 3 * width, 12.0, (n,)),  # projections
            ((n + 1,), width, 6.0, (n + 1, n + 2)),  # attention saves its result too
            ((n + 2,), width, 4.0, (n + 2,)),
            ((x, n + 3), width, 1.0, ()),  # sum
            ((n + 4,), width, 1.0, (n + 4,)),  # norm
            ((n + 5,), 4 * width, 16.0, (n + 5,)),
            ((n + 6,), 4 * width, 2.0, (n + 6,)),  # activation
            ((n + 7,), width, 16.0, (n + 7,)),
            ((n + 4, n + 8), width, 1.0, ()),  # sum
        ]
    return backwarded(*forward)


def diamond() -> Graph:
    """Value 1 is read twice; both results meet in value 4. Value 0 is a leaf."""
    return build(((0,), (1,)), ((1,), (2,)), ((1,), (3,)), ((2, 3), (4,)))


@st.composite
def graphs(draw: st.DrawFn, max_ops: int = 8) -> Graph:
    """Any legal graph: ops without results, values never read, odd names, nested module calls."""
    calls = [OUTSIDE]
    for number in range(1, draw(st.integers(1, 4))):
        types = tuple(draw(st.lists(NAMES, max_size=2)))
        calls.append(Call(number, draw(st.sampled_from([None, *calls])), draw(NAMES), types))
    call_numbers = st.integers(0, len(calls) - 1)
    values: list[Value] = []
    ops: list[Op] = []

    def value(made_by: int | None) -> int:
        evictable = made_by is not None and draw(st.booleans())
        values.append(
            Value(
                len(values),
                draw(st.integers(0, 2**40)),
                made_by,
                tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
                draw(st.sampled_from(["", "float32", "bfloat16"])),
                draw(st.sampled_from(["", "cpu", "cuda:0"])),
                tuple(draw(st.lists(call_numbers, unique=True, max_size=2))),
                evictable,
                draw(NAMES),
                "" if evictable else draw(NAMES),
            )
        )
        return len(values) - 1

    for _ in range(draw(st.integers(0, 3))):
        value(None)
    forward_ops = draw(st.integers(0, max_ops))
    for number in range(draw(st.integers(0, max_ops))):
        inputs = draw(st.lists(st.integers(0, len(values) - 1), unique=True, max_size=3)) if values else []
        outputs = tuple(value(number) for _ in range(draw(st.integers(0, 2))))
        seconds = draw(st.floats(0, 1e9, allow_nan=False) | st.just(math.pi))
        name, call = draw(NAMES), draw(call_numbers)
        ops.append(Op(number, name, tuple(inputs), outputs, call, seconds, number >= forward_ops, draw(st.booleans())))
    return Graph(tuple(ops), tuple(values), tuple(calls))


@dataclass
class _Draft:
    """A step that is being drawn."""

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)

    def op(self, reads: Sequence[int], sizes: Sequence[int], evictable: Sequence[bool], **more: object) -> list[int]:
        number, first = len(self.ops), len(self.values)
        for size, may_go in zip(sizes, evictable, strict=True):
            self.values.append(Value(len(self.values), size, number, evictable=may_go))
        made = list(range(first, len(self.values)))
        self.ops.append(Op(number, "aten.op", tuple(reads), tuple(made), **more))  # type: ignore[arg-type]
        return made

    def change(self, value: int, **fields: object) -> None:
        self.values[value] = replace(self.values[value], **fields)  # type: ignore[arg-type]


_BYTES = st.sampled_from([0, 1, 2, 3, 5, 8, 12])
_GRADIENT_BYTES = st.sampled_from([0, 1, 1, 2, 4])  # larger ones would hide what happens to activations
_SECONDS = st.integers(0, 9).map(float)
_TEMPORARIES = st.sampled_from([0, 0, 0, 1, 5])


@st.composite
def steps(draw: st.DrawFn, max_ops: int = 6) -> Graph:
    """A training step as the recorder would write it, of at most `max_ops` forward ops, with bytes and seconds that are
    small whole numbers.

    User code holds a value at least until the last forward op has read it, and may hold it into the backward pass or
    for good. In-place ops take the storage over from what they read, unless autograd saved that. Nodes of the backward
    pass ask for what they saved, mostly in reverse order, some twice, some again in another node; what their ops make
    is not recorded to be repeated. Some ops make two values, some values are not evictable.
    """
    draft = _Draft()
    for size in draw(st.lists(_BYTES, max_size=2)):
        draft.values.append(Value(len(draft.values), size, None, evictable=False))
    for _ in range(draw(st.integers(1, max_ops) | st.just(max_ops))):
        _forward_op(draw, draft)
    saved = [v.number for v in draft.values if v.overwritten is None and draw(st.integers(0, 3))]
    for value in saved:
        draft.change(value, saved_in=(0,))
    if saved and draw(st.booleans()):
        saved.insert(0, draw(st.sampled_from(saved)))  # asked for by two nodes
    if draw(st.integers(0, 3)) == 0:
        saved = draw(st.permutations(saved))
    gradients: list[int] = []
    while saved:
        _node(draw, draft, [saved.pop() for _ in range(min(len(saved), draw(st.integers(1, 2))))], gradients)
    _let_go(draw, draft)
    return Graph(tuple(draft.ops), tuple(draft.values), (OUTSIDE,), tuple(draft.demands), draw(st.integers(0, 20)))


def _forward_op(draw: st.DrawFn, draft: _Draft) -> None:
    there = [value.number for value in draft.values if value.overwritten is None]
    recent = there[-2:] if draw(st.integers(0, 3)) else there
    reads = draw(st.lists(st.sampled_from(recent), unique=True, min_size=1, max_size=2)) if recent else []
    in_place = [v for v in reads if draft.values[v].evictable]
    more: dict[str, object] = {"seconds": draw(_SECONDS), "temporaries": draw(_TEMPORARIES)}
    if in_place and draw(st.integers(0, 3)) == 0:
        old = draw(st.sampled_from(in_place))
        (new,) = draft.op(reads, [draft.values[old].nbytes], [True], **more)
        draft.change(new, overwrites=old)
        draft.change(old, overwritten=len(draft.ops) - 1)
        return
    sizes = draw(st.lists(_BYTES, min_size=1, max_size=2))
    draft.op(reads, sizes, [draw(st.integers(0, 9)) > 0 for _ in sizes], **more)


def _node(draw: st.DrawFn, draft: _Draft, wanted: Sequence[int], gradients: list[int]) -> None:
    """A node of the backward pass: asks for what it saved, before its ops or between them."""
    asked: list[tuple[int, int]] = []
    for place, value in enumerate(wanted, start=1):
        asked.append((value, len(draft.ops)))
        for _ in range(draw(st.integers(1 if place == len(wanted) else 0, 2))):
            reads = [number for number, _ in asked] + gradients[-1:]
            sizes = [draw(_GRADIENT_BYTES)]
            more: dict[str, object] = {"seconds": draw(_SECONDS), "temporaries": draw(_TEMPORARIES), "backward": True}
            gradients += draft.op(list(dict.fromkeys(reads)), sizes, [False], **more)
    draft.demands += [Demand(value, before, len(draft.ops)) for value, before in asked]


def _let_go(draw: st.DrawFn, draft: _Draft) -> None:
    """When user code lets go of values: soon after the last that reads them on its behalf, later, or not at all."""
    end = len(draft.ops)
    last = [0 if value.made_by is None else value.made_by for value in draft.values]
    for op in draft.ops:
        for value in op.inputs:
            if not op.backward or draft.ops[last[value]].backward:
                last[value] = max(last[value], op.number)
    for value in draft.values:
        if value.made_by is None:
            continue
        soonest = min(end, last[value.number] + 1)
        later = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, 3, None]))
        if value.overwritten is not None:
            soonest = max(soonest, value.overwritten + 1)
        draft.change(value.number, dropped=None if later is None else min(end, soonest + later))
