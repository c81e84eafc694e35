"""Graphs made by hand and by chance: steps that never ran, for tests that need no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rekindle.graph import Call, Graph, Op, Value

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
