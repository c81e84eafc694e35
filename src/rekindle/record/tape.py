"""Writes a running step down as a `Graph`: what was computed, on paper, holding no tensor."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rekindle.graph import Call, Demand, Graph, Op, Value
from rekindle.record.activation import Activation
from rekindle.record.aliasing import Ledger, Tracked
from rekindle.record.modules import ModuleCall
from rekindle.record.torch_private import use_count
from rekindle.record.writes import Write

OLDER = "made by an op of an earlier step"
_ROUNDED = 256  # of what is live on an accelerator, its allocator may round up this share more in another step
_OURS = 2  # the alias that Rekindle holds, and the Python object that asks
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
    dropped: int | None = None
    overwrites: int | None = None
    overwritten: int | None = None


@dataclass(slots=True)
class _Asked:
    """A demand of a node that may still be running."""

    value: int
    before: int
    until: int = 0


@dataclass(slots=True)
class _Copy:
    """A snapshot that is there."""

    value: int
    source: weakref.ref[Activation]


class Tape:
    """Collects ops and values as ids; `graph()` makes them a frozen `Graph`.

    When user code lets go of a value is the moment its storage dies or, if Rekindle itself holds that and can make it
    again, when the last other tensor that was seen to look at it dies.

    Attributes:
        adopts: whether what is read and nobody saw come stands for the whole step.
        adopted_nbytes: the most that was there of it at a time.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.adopts = False
        self.adopted_nbytes = self._adopting = 0
        self._adopted: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ledger = ledger
        self._demands: list[_Asked] = []
        self._running: list[_Asked] = []
        self._node = -1
        self._watched: dict[int, list[int]] = {}
        self._snapshots: dict[int, _Copy] = {}
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}
        self._left: set[int] = set()
        self._states = self._standing = 0
        self._before = ledger.live_nbytes  # of earlier steps: gradients, mostly
        self._values: list[_Draft] = []
        self._base = next(_bases) << 32
        self._ops: list[Op] = []
        self._calls: list[Call] = [Call(0, None, "", ())]
        self._call_ids: dict[int, int] = {0: 0}
        self._leaf_keys: dict[int, int] = {}
        self._saved: dict[int, weakref.ref[Activation]] = {}
        self._numbers: dict[int, int] = {}
        self._repeats: dict[int, list[float]] = {}

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
            self._watched.setdefault(tracked.key, []).append(tracked.value_id - self._base)
        return tracked.value_id - self._base

    def copied(self, write: Write) -> list[int]:
        """The id of the snapshot that was taken before a write, as made by the op written down next; none if none was.
        It stays as long as what it is a copy of."""
        old = write.old
        tracked = self._ledger.find(old.held) if old.snapshot and old.held is not None else None
        if tracked is None or tracked.key in self._snapshots:
            return []
        shape, dtype = tuple(old.window[0]), str(old.window[3]).removeprefix("torch.")
        draft = _Draft(tracked.nbytes, None, shape, dtype, "", False, why_kept="a snapshot")
        number = self._add(draft) - self._base
        self._snapshots[tracked.key] = _Copy(number, weakref.ref(old))
        return [number]

    def values_read(self, ledger: Ledger, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int]:
        """The ids of the known values among the arguments, each once."""
        found: list[int] = []
        for tensor in _tensors((args, tuple(kwargs.values()))):
            try:
                tracked = ledger.find(tensor)
            except (NotImplementedError, RuntimeError):
                continue
            if tracked is None:
                if self.adopts:
                    self._adopt(tensor.untyped_storage())
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
        tensor = activation.watched()
        if tensor is not None:
            self._watched.setdefault(activation.home, []).append(number)
            self.seen(tensor)
        return number

    def seen(self, tensor: torch.Tensor) -> None:
        """Watch for the end of a tensor that looks at a value."""
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return
        if key in self._watched and id(tensor) not in self._tensors:
            me = id(tensor)
            self._tensors[me] = weakref.ref(tensor, lambda _: self._let_go(key, me))

    def overwrites(self, new: Activation | None, old: Activation) -> None:
        """Note that the op written down next wrote over `old`, and that its storage holds `new` then."""
        draft = self._values[self.value_of(old)]
        draft.overwritten = len(self._ops)
        if new is not None:
            self._values[self.value_of(new)].overwrites = self.value_of(old)

    def rewritten(self, tracked: Tracked, old: Activation, why_kept: str) -> list[int]:
        """The id of what a storage of this step holds since the op written down next wrote over part of `old`, and that
        cannot be recomputed; none if it was there before, for then it stands."""
        draft = self._values[self.value_of(old)]
        if draft.made_by is None or not tracked.nbytes:
            return []
        number = self.plain_value(tracked)
        self._values[number].why_kept = draft.why_kept or why_kept
        self._values[number].overwrites = self.value_of(old)
        return [number]

    def _adopt(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._adopted:
            self._adopted[key] = weakref.ref(storage, functools.partial(self._leaves, key, nbytes))
            self._adopting += nbytes
            self.adopted_nbytes = max(self.adopted_nbytes, self._adopting)

    def _leaves(self, key: int, nbytes: int, _: object) -> None:
        del self._adopted[key]
        self._adopting -= nbytes

    def state(self, nbytes: int) -> None:
        """Count the state of a generator, which stays as long as its op may be repeated."""
        self._states += nbytes

    def died(self, tracked: Tracked) -> None:
        """Note the end of a storage."""
        snapshot = self._snapshots.pop(tracked.key, None)
        if snapshot is not None and snapshot.source() is None:  # else it made room, which a plan does not ask of it
            self._values[snapshot.value].dropped = len(self._ops)
        if tracked.recomputed:
            return
        holder = tracked.lent() if tracked.lent is not None else None
        evicted = holder.value_id - self._base if holder is not None and holder.is_marked else -1
        for number in self._watched.pop(tracked.key, ()):
            draft = self._values[number]
            if draft.dropped is None and number != evicted:
                draft.dropped = len(self._ops)

    def runs(self, node: int) -> None:
        """Note which node of the backward pass is running; -1 if none is."""
        if node == self._node:
            return
        self._node = node
        for asked in self._running:
            asked.until = len(self._ops)
        self._running.clear()

    def asked(self, value_id: int, node: int) -> None:
        """Note that a node of the backward pass wants a value back that autograd saved."""
        self._settle()
        self.runs(node)
        if not self._knows(value_id):
            return
        asked = _Asked(value_id - self._base, len(self._ops))
        self._running.append(asked)
        self._demands.append(asked)

    def _let_go(self, key: int, tensor: int) -> None:
        """A tensor died, or is about to: its bytes are looked at when it surely is gone."""
        del self._tensors[tensor]
        self._left.add(key)

    def _settle(self) -> None:
        """Where the last tensor died that was not ours, user code has let go of what it looked at."""
        left, self._left = self._left, set()
        for key in left:
            tracked = self._ledger.storages.get(key)
            storage = tracked() if tracked is not None else None
            holder = tracked.lent() if tracked is not None and tracked.lent is not None else None
            if holder is None or holder.held is None or storage is None or use_count(storage) > _OURS:
                continue
            for number in self._watched.get(key, ()):
                draft = self._values[number]
                stays = holder.op is None or holder.is_marked or not draft.evictable  # whatever a plan says
                if draft.dropped is None and not (stays and draft.overwritten is None):
                    draft.dropped = len(self._ops)

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        call: ModuleCall,
        seconds: float,
        backward: bool,
        random: bool,
        temporaries: int,
    ) -> None:
        """Write one op down. `seconds` is what it took, on the clock of the host, and `temporaries` the bytes that its
        kernel allocated for itself."""
        self._settle()
        self._standing = max(self._standing, self._before + self._ledger.standing_nbytes)
        number = len(self._ops)
        for value in outputs:
            self._values[value].made_by = number
        self._ops.append(
            Op(
                number,
                name,
                tuple(inputs),
                tuple(outputs),
                self._call(call),
                seconds,
                backward,
                random,
                temporaries,
            )
        )

    def repeatable(self, number: int) -> None:
        """Note the number, in the stream of ops, of the one written down next."""
        self._numbers[number] = len(self._ops)

    def repeated(self, number: int, seconds: float) -> None:
        """Note what it took to repeat an op, by its number in the stream."""
        written = self._numbers.get(number)
        if written is not None:  # else it belongs to an older step
            self._repeats.setdefault(written, []).append(seconds)

    def repeats(self) -> dict[int, float]:
        """For the ops of the graph that were repeated: the seconds that took, the least if it was done often."""
        return {written: min(seconds) for written, seconds in self._repeats.items()}

    def saved(self, activation: Activation, call: ModuleCall) -> None:
        """Note that autograd saved an activation while `call` was running."""
        number, value = self._call(call), self.value_of(activation)
        self._saved[value] = weakref.ref(activation)
        saved_in = self._values[value].saved_in
        if number not in saved_in:
            saved_in.append(number)

    def held(self) -> frozenset[int]:
        """The numbers of the values that autograd saved and has not let go of, and may still ask for."""
        saved = ((value, reference()) for value, reference in self._saved.items())
        return frozenset(value for value, made in saved if made is not None and any(made.live_handles()))

    def graph(self, names: dict[int, str]) -> Graph:
        """The step so far. `names` gives the names of parameters and buffers by the address of their storage."""
        self._settle()
        self.runs(-1)
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
                draft.dropped,
                draft.overwrites,
                draft.overwritten,
            )
            for number, draft in enumerate(self._values)
        )
        demands = tuple(Demand(asked.value, asked.before, asked.until) for asked in self._demands)
        rounded = self._ledger.peak_nbytes // _ROUNDED if self._ledger.place is not None else 0
        standing = self._standing + self._states + self.adopted_nbytes + rounded
        return Graph(tuple(self._ops), values, tuple(self._calls), demands, standing)

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
