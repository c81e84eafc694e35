"""What one training step computed, on paper: values, the ops that made them, the module calls they ran in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        number: position among the calls of the step; 0 is what runs outside of all modules.
        parent: the call it was made in.
        path: qualified name relative to the outermost module; empty for that module and outside of all.
        types: qualified names of its class and their bases, nearest first.
    """

    number: int
    parent: Call | None
    path: str
    types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """What one op wrote: one storage at one version.

    Attributes:
        number: position in `Graph.values`.
        nbytes: size of the storage.
        made_by: number of the op that made it; None for a leaf.
        shape, dtype, device: of the tensor that was recorded as the value.
        saved_in: numbers of the module calls in which autograd saved it for the backward pass.
        evictable: it can be recomputed, so a policy may decide about it.
        name: of the parameter or buffer that it is, if it is one.
        why_kept: why it is not evictable.
        dropped: number of the op before which user code, and all that is not ours, had let go of it; None if nothing
            did in this step.
        overwrites: number of the value whose storage it took over, if an in-place op made it.
        overwritten: number of the op that wrote over it, after which its storage holds something else.
    """

    number: int
    nbytes: int
    made_by: int | None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    saved_in: tuple[int, ...] = ()
    evictable: bool = True
    name: str = ""
    why_kept: str = ""
    dropped: int | None = None
    overwrites: int | None = None
    overwritten: int | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """One recorded ATen call.

    Attributes:
        number: position in `Graph.ops`.
        name: full name of the overload, such as `aten.mm.default`.
        inputs: numbers of the values it read, each once.
        outputs: numbers of the values it made, by returning or by writing them.
        call: number of the module call it ran in.
        seconds: what it took.
        backward: it ran in the backward pass.
        random: it draws from a generator.
        temporaries: bytes that its kernel had allocated at its peak, beside what it made.
    """

    number: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    call: int = 0
    seconds: float = 0.0
    backward: bool = False
    random: bool = False
    temporaries: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """Autograd asking for a value that it saved.

    Attributes:
        value: number of the value.
        before: number of the op before which it asked.
        until: number of the op before which the node that asked was done with it.
    """

    value: int
    before: int
    until: int


@dataclass(frozen=True)
class Graph:
    """The ops of a step in the order they ran, forward then backward, with their values and module calls.

    Attributes:
        demands: what autograd asked for, in its order.
        standing: bytes that are there all the time: parameters, gradients, buffers, inputs.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    calls: tuple[Call, ...] = (Call(0, None, "", ()),)
    demands: tuple[Demand, ...] = ()
    standing: int = 0

    @cached_property
    def forward(self) -> tuple[Op, ...]:
        """The ops of the forward pass."""
        return tuple(op for op in self.ops if not op.backward)

    @cached_property
    def evictable(self) -> tuple[Value, ...]:
        """The values that a policy decides about."""
        return tuple(value for value in self.values if value.evictable)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each value, the numbers of the forward ops that read it."""
        readers: list[list[int]] = [[] for _ in self.values]
        for op in self.forward:
            for value in op.inputs:
                readers[value].append(op.number)
        return tuple(map(tuple, readers))

    @cached_property
    def descendants(self) -> tuple[int, ...]:
        """For each value, how many other values of the forward pass depend on it, directly or not."""
        reached = [0] * len(self.values)  # sets of values, as the bits of an int
        for op in reversed(self.forward):
            below = 0
            for value in op.outputs:
                below |= reached[value] | 1 << value
            for value in op.inputs:
                reached[value] |= below
        return tuple(bits.bit_count() for bits in reached)

    @cached_property
    def distances(self) -> tuple[int | None, ...]:
        """For each value, the fewest forward ops from it to an end of the forward pass: to what an op made that nothing
        else is computed from (the loss, say). None for what the forward pass neither made nor read.

        A side output that nothing reads (the statistics of a normalisation, the mask of a dropout) is no end: it is as
        far away as what was made with it.
        """
        distances: list[int | None] = [None] * len(self.values)
        for op in reversed(self.forward):
            nearest = min((d for value in op.outputs if (d := distances[value]) is not None), default=0)
            for value in op.outputs:
                if distances[value] is None:
                    distances[value] = nearest
            for value in op.inputs if op.outputs else ():
                before = distances[value]
                distances[value] = nearest + 1 if before is None else min(before, nearest + 1)
        return tuple(distances)
