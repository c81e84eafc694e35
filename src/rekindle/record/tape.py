"""Writes a running step down as a `Graph`: what was computed, on paper, holding no tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rekindle.graph import Call, Graph, Op, Value
from rekindle.record.activation import Activation
from rekindle.record.aliasing import Ledger, Tracked
from rekindle.record.modules import ModuleCall

OLDER = "made by an op of an earlier step"
_bases = itertools.count()  # ids of one tape mean nothing on another


@dataclass(slots=True)
class _Draft:
    """A value while its step is still running."""

    nbytes: int
    made_by: int | None
    shape: tuple[int, ...]
    dtype: str
    device: str
    evictable: bool
    name: str = ""
    why_kept: str = ""
    saved_in: list[int] = field(default_factory=list)


class Tape:
    """Collects ops and values as ids; `graph()` makes them a frozen `Graph`."""

    def __init__(self) -> None:
        self._values: list[_Draft] = []
        self._base = next(_bases) << 32
        self._ops: list[Op] = []
        self._calls: list[Call] = [Call(0, None, "", ())]
        self._call_ids: dict[int, int] = {0: 0}
        self._leaf_keys: dict[int, int] = {}

    def value_of(self, activation: Activation) -> int:
        """The id of an activation's value, given now if this is the first time it is seen."""
        if not self._knows(activation.value_id):
            shape, dtype = tuple(activation.window[0]), str(activation.window[3]).removeprefix("torch.")
            base = activation.base()
            device = str(base.device) if base is not None else ""
            activation.value_id = self._add(
                _Draft(activation.nbytes, None, shape, dtype, device, False, why_kept=activation.why_kept or OLDER)
            )
            if activation.key:
                self._leaf_keys[activation.value_id - self._base] = activation.key
        return activation.value_id - self._base

    def plain_value(self, tracked: Tracked) -> int:
        """The id of what a storage holds that will never be recomputed, as in the backward pass."""
        if not self._knows(tracked.value_id):
            storage = tracked()
            device = str(storage.device) if storage is not None else ""
            tracked.value_id = self._add(
                _Draft(tracked.nbytes, None, (), "", device, False, why_kept="not recorded for recomputation")
            )
        return tracked.value_id - self._base

    def values_read(self, ledger: Ledger, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
        """The ids of the known values among the arguments, each once."""
        found: list[int] = []
        for tensor in _tensors((args, tuple(kwargs.values()))):
            try:
                tracked = ledger.find(tensor)
            except (NotImplementedError, RuntimeError):
                continue
            if tracked is None:
                continue
            activation = tracked.activation
            if activation is None and not self._knows(tracked.value_id):
                continue
            value = self.value_of(activation) if activation is not None else tracked.value_id - self._base
            if value not in found:
                found.append(value)
        return found

    def made(self, activation: Activation) -> int:
        """The id of a value that the op written down next made."""
        number = self.value_of(activation)
        draft = self._values[number]
        draft.evictable, draft.why_kept = not activation.why_kept, activation.why_kept
        return number

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        call: ModuleCall,
        seconds: float,
        backward: bool,
        random: bool,
    ) -> None:
        """Write one op down. `seconds` is what it took, on the clock of the host."""
        number = len(self._ops)
        for value in outputs:
            self._values[value].made_by = number
        self._ops.append(
            Op(number, name, tuple(inputs), tuple(outputs), self._call(call), seconds, backward=backward, random=random)
        )

    def saved(self, activation: Activation, call: ModuleCall) -> None:
        """Note that autograd saved an activation while `call` was running."""
        number = self._call(call)
        saved_in = self._values[self.value_of(activation)].saved_in
        if number not in saved_in:
            saved_in.append(number)

    def graph(self, names: dict[int, str]) -> Graph:
        """The step so far. `names` gives the names of parameters and buffers by the address of their storage."""
        for value, key in self._leaf_keys.items():
            self._values[value].name = names.get(key, "")
        values = tuple(
            Value(
                number,
                draft.nbytes,
                draft.made_by,
                draft.shape,
                draft.dtype,
                draft.device,
                tuple(draft.saved_in),
                draft.evictable,
                draft.name,
                draft.why_kept,
            )
            for number, draft in enumerate(self._values)
        )
        return Graph(tuple(self._ops), values, tuple(self._calls))

    def _add(self, draft: _Draft) -> int:
        self._values.append(draft)
        return self._base + len(self._values) - 1

    def _knows(self, value_id: int) -> bool:
        return 0 <= value_id - self._base < len(self._values)

    def _call(self, call: ModuleCall) -> int:
        number = self._call_ids.get(call.number)
        if number is None:
            parent = self._calls[self._call(call.parent)] if call.parent is not None else None
            number = self._call_ids[call.number] = len(self._calls)
            self._calls.append(Call(number, parent, call.path, call.types))
        return number


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [tensor for item in tree for tensor in _tensors(item)]
    return []
