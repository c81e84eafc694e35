"""Storages, and the windows that tensors are onto them.

A value is the content of one storage at one version; a tensor is a window (size, stride, offset, dtype) onto it. The
recorder finds a tensor's value by the identity of its storage, so views need no records of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rekindle.record.torch_private import never_compile

if TYPE_CHECKING:
    from rekindle.record.activation import Activation

Window = tuple[Any, ...]
"""(size, stride, storage offset, dtype) and, for lazily conjugated or negated tensors only, (..., conj, neg)."""

_MOST_WINDOWS = 1 << 14
_windows: dict[Window, Window] = {}


def window_of(tensor: torch.Tensor) -> Window:
    """The window that `tensor` is onto its storage. Equal ones are one object, as long as there are not too many.

    Python's garbage collector walks all of its objects after so many new ones, and a model has few windows that differ.
    """
    dtype = tensor.dtype
    window: Window = (tensor.shape, tensor.stride(), tensor.storage_offset(), dtype)
    if tensor.is_neg() or (dtype.is_complex and tensor.is_conj()):
        window = (*window, tensor.is_conj(), tensor.is_neg())
    if len(_windows) >= _MOST_WINDOWS:
        _windows.clear()
    return _windows.setdefault(window, window)


def disjoint(one: Window, other: Window) -> bool:
    """Whether two windows surely share no byte of their storage. Columns of a matrix interleave and share none.

    In doubt they do share: the answer is exact where strides nest and those of both agree, as they do for slices.
    """
    return _disjoint(*_steps(one), *_steps(other))


def _steps(window: Window) -> tuple[int, list[tuple[int, int]]]:
    """Where a window begins, and (stride, length) of its dimensions from the widest stride in; all in bytes."""
    size, stride, offset, dtype = window[:4]
    item = dtype.itemsize
    steps = [(step * item, length) for step, length in zip(stride, size, strict=True) if length != 1 and step]
    return offset * item, [*sorted(steps, reverse=True), (1, item if 0 not in size else 0)]


def _disjoint(start: int, steps: list[tuple[int, int]], begin: int, others: list[tuple[int, int]]) -> bool:
    span, width = _span(steps), _span(others)
    if start + span <= begin or begin + width <= start or not (span and width):
        return True
    row = max(steps[0][0], others[0][0])  # look at the storage as rows of the widest stride
    if row == 1:
        return False
    (count, steps), (number, others) = _rows(steps, row), _rows(others, row)
    first, left = divmod(start, row)
    second, right = divmod(begin, row)
    if left + _span(steps) > row or right + _span(others) > row:
        return False  # one runs over the end of a row
    if first + count <= second or second + number <= first:
        return True
    return _disjoint(left, steps, right, others)


def _rows(steps: list[tuple[int, int]], row: int) -> tuple[int, list[tuple[int, int]]]:
    return (steps[0][1], steps[1:]) if steps[0][0] == row else (1, steps)


def _span(steps: list[tuple[int, int]]) -> int:
    return 0 if any(not length for _, length in steps) else 1 + sum(step * (length - 1) for step, length in steps)


def look(base: torch.Tensor, window: Window) -> torch.Tensor:
    """The tensor that is `window` onto the storage of `base`. Call it at the recorded dispatch level."""
    lazy = base.is_conj() or base.is_neg()
    if not lazy and window == (base.size(), base.stride(), base.storage_offset(), base.dtype):
        return base
    size, stride, offset, dtype = window[:4]
    if base.dtype is dtype and not lazy:
        tensor = base.as_strided(size, stride, offset)
    else:
        empty = torch.empty(0, dtype=dtype, device=base.device)
        tensor = empty.set_(base.untyped_storage(), offset, size, stride)
    if len(window) > 4:
        tensor = tensor.conj() if window[4] else tensor
        tensor = tensor._neg_view() if window[5] else tensor
    return tensor


def covers(tensor: torch.Tensor, nbytes: int) -> bool:
    """Whether writing all of `tensor` writes every byte of its storage of `nbytes`, each once and as it is given."""
    if tensor.numel() * tensor.itemsize != nbytes or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.is_contiguous() or _is_dense(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether no two elements share an address and none between them is left out."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class Tracked(weakref.ref[torch.UntypedStorage]):
    """A storage the ledger knows, without holding it.

    Attributes:
        key: the storage's address.
        nbytes: its size as counted in the live bytes; 0 for one that was there before (a parameter, an input).
        leaf_nbytes: the size of one that was there before; else 0.
        owned: the value it holds now, while somebody else keeps the bytes alive.
        lent: the same, weakly, while the activation itself holds the bytes: owning it here would keep both for ever; or
            while a backward pass runs: owning it would keep all that it was made from.
        past: weakly, the values from before a cut that it holds still: ops to come must not read them, but a write
            destroys them too.
        recomputed: it holds a replayed copy, whose end is not an eviction.
        stays: it belongs to a module: a parameter, a buffer, a gradient.
        value_id: the value it holds now on the tape, -1 if the step is not being taped.
    """

    __slots__ = ("key", "leaf_nbytes", "lent", "nbytes", "owned", "past", "recomputed", "stays", "value_id")

    key: int
    nbytes: int
    owned: Activation | None
    leaf_nbytes: int
    lent: weakref.ref[Activation] | None
    past: Sequence[weakref.ref[Activation]]
    recomputed: bool
    stays: bool
    value_id: int

    @property
    def activation(self) -> Activation | None:
        """The value the storage holds now; None if nobody has asked since the last forward."""
        if self.owned is not None:
            return self.owned
        return self.lent() if self.lent is not None else None

    @property
    def is_wanted(self) -> bool:
        """Whether anything may yet be recomputed from what the storage holds."""
        return self.activation is not None or any(reference() is not None for reference in self.past)

    def own(self, activation: Activation | None) -> None:
        """The storage holds this value now, and somebody else keeps its bytes alive."""
        self.owned, self.lent = activation, None

    def lend(self, activation: Activation) -> None:
        """The storage holds this value now, and the activation itself keeps its bytes alive."""
        self.owned, self.lent = None, weakref.ref(activation)

    def take_back(self, activation: Activation) -> None:
        """Own a twin of an activation that dies, if somebody else keeps the bytes alive: they may be read again."""
        if self.lent is None or self.lent() is not activation or activation.base() is None:
            return
        self.lent = None
        activation.held = None  # the storage may die here
        if self() is not None:
            self.owned = activation.twin()

    def forget(self) -> None:
        """Make what the storage holds a leaf for the ops to come."""
        activation = self.activation
        self.owned = self.lent = None
        if activation is not None:
            activation.lender = None
        if activation is not None or self.past:
            past = [activation, *(reference() for reference in self.past)]
            self.past = [weakref.ref(a) for a in past if a is not None]

    def end_past(self) -> list[Activation]:
        """The values from before a cut, which a write is about to destroy."""
        past, self.past = self.past, ()
        return [activation for reference in past if (activation := reference()) is not None]


class Ledger:
    """All storages the session has seen that still exist, and how many bytes they have.

    Bytes go up when an op returns and down at the moment the storage dies, so the counts are exact for everything that
    reaches the recorder. Temporaries inside a kernel do not, nor does what others have on an accelerator and what its
    allocator rounds up; that shows when somebody looks.

    Attributes:
        live_nbytes: of the storages that the session's ops made.
        leaf_nbytes: of those that were there before: parameters, gradients, buffers, inputs.
        standing_nbytes: of these, and on an accelerator of all else that was allocated at the last look.
        most_standing_nbytes: the most of it when one of its storages died, or somebody looked at an accelerator, since
            this was set back.
        place: the accelerator that the storages are on, None while none was seen on any.
        on_end: called with the record of each storage that dies, None if nobody wants to know.
    """

    def __init__(
        self,
        on_death: Callable[[Activation, int], None],
        allocated: Callable[[torch.device], int] | None = None,
    ) -> None:
        """`on_death(activation, nbytes)` is called when the storage of an activation that autograd saved dies;
        `allocated(device)` tells the bytes of an accelerator that are allocated, by whomever."""
        self.storages: dict[int, Tracked] = {}
        self.live_nbytes = 0
        self.leaf_nbytes = 0
        self.peak_nbytes = 0
        self.most_standing_nbytes = 0
        self.place: torch.device | None = None
        self.on_end: Callable[[Tracked], None] | None = None
        self._on_death = on_death
        self._on_storage_death = self._died
        self._allocated = allocated
        self._others_nbytes = 0

    @property
    def standing_nbytes(self) -> int:
        """Bytes of what the session's ops did not make."""
        return self.leaf_nbytes + self._others_nbytes

    @property
    def total_nbytes(self) -> int:
        """Bytes of all that the session knows to be there."""
        return self.live_nbytes + self.standing_nbytes

    def look(self) -> None:
        """See what there is on the accelerator beside the storages that are known. Costs a hundred microseconds there,
        nothing on the CPU, where nobody can tell whose memory is whose."""
        if self.place is not None and self._allocated is not None:
            self._others_nbytes = max(0, self._allocated(self.place) - self.live_nbytes - self.leaf_nbytes)
            self.most_standing_nbytes = max(self.most_standing_nbytes, self.standing_nbytes)

    def find(self, tensor: torch.Tensor) -> Tracked | None:
        """The record of the tensor's storage, if the session has seen it. Raises for tensors without a storage."""
        return self.storages.get(tensor.untyped_storage()._cdata)

    def current(self, tensor: torch.Tensor) -> Activation | None:
        """The value that the tensor's storage holds, if somebody has asked since the last forward."""
        try:
            tracked = self.find(tensor)
        except (NotImplementedError, RuntimeError):
            return None
        return tracked.activation if tracked is not None else None

    def note(self, nbytes: int) -> None:
        """Note that a kernel has `nbytes` more for a moment than those that are live."""
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes + nbytes)

    def track_leaf(self, tensor: torch.Tensor) -> Tracked | None:
        """Begin to follow what was there before. None for tensors without a storage."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None
        tracked = self.storages.get(storage._cdata)
        if tracked is None:
            tracked = self.track(storage, None, 0)
            tracked.leaf_nbytes = storage.nbytes()
            self.leaf_nbytes += tracked.leaf_nbytes
            if self.place is None:
                self._find_place(storage.device)
            elif storage.device.type == self.place.type:  # it was among the others
                self._others_nbytes = max(0, self._others_nbytes - tracked.leaf_nbytes)
        return tracked

    def _find_place(self, device: torch.device) -> None:
        if device.type in ("cpu", "meta") or self._allocated is None:
            return
        self.place = device
        try:
            self.look()
        except (NotImplementedError, RuntimeError):  # a device whose allocator tells nothing
            self.place = self._allocated = None

    def track_members(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """The same for many that belong to a module, most of which are known."""
        storages = self.storages
        for tensor in tensors:
            if tensor is None:
                continue
            try:
                tracked = storages.get(tensor.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):
                continue
            if tracked is None:
                tracked = self.track_leaf(tensor)
            if tracked is not None:
                tracked.stays = True

    def forget_visitors(self) -> int:
        """Forget what was there before and belongs to no module, such as the inputs of a step that is over: another one
        may never touch them. Returns their bytes."""
        visitors = [t for t in self.storages.values() if t.leaf_nbytes and not t.stays and not t.is_wanted]
        nbytes = 0
        for tracked in visitors:
            del self.storages[tracked.key]
            nbytes += tracked.leaf_nbytes
            tracked.leaf_nbytes = 0
        self.leaf_nbytes -= nbytes
        return nbytes

    def track(self, storage: torch.UntypedStorage, activation: Activation | None, nbytes: int) -> Tracked:
        """Begin to follow a storage; `nbytes` of it count as live."""
        tracked = Tracked(storage, self._on_storage_death)
        tracked.key = key = storage._cdata
        tracked.nbytes = nbytes
        tracked.owned = activation
        tracked.lent = None
        tracked.past = ()
        tracked.leaf_nbytes = 0
        tracked.recomputed = tracked.stays = False
        tracked.value_id = -1
        self.storages[key] = tracked
        self.live_nbytes = live = self.live_nbytes + nbytes
        if live > self.peak_nbytes:
            self.peak_nbytes = live
        return tracked

    def resized(self, tracked: Tracked, nbytes: int) -> None:
        """Note that a kernel changed the size of a storage."""
        if tracked.nbytes:
            self.live_nbytes += nbytes - tracked.nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)
            tracked.nbytes = nbytes
        else:
            self.leaf_nbytes += nbytes - tracked.leaf_nbytes
            tracked.leaf_nbytes = nbytes

    def loosen(self) -> None:
        """Know the values without owning them: one that user code holds would keep, through its op, all that it was
        made from, though nothing is going to be computed from it."""
        for tracked in list(self.storages.values()):
            owned, activation = tracked.owned, tracked.activation
            if activation is not None:
                activation.lender = None
            if owned is not None:
                tracked.value_id = owned.value_id
                tracked.lend(owned)

    def forget_activations(self) -> None:
        """Let go of the values, and so of the ops behind them: what a storage held before the cut is a leaf now."""
        for tracked in list(self.storages.values()):
            if tracked.owned is not None or tracked.lent is not None or tracked.past:
                tracked.forget()
            tracked.value_id = -1

    def _died(self, tracked: Any) -> None:
        key, nbytes = tracked.key, tracked.nbytes
        if self.storages.get(key) is tracked:
            del self.storages[key]
        if nbytes:
            self.live_nbytes -= nbytes
        else:
            self.most_standing_nbytes = max(self.most_standing_nbytes, self.standing_nbytes)
            self.leaf_nbytes -= tracked.leaf_nbytes
        if self.on_end is not None:
            self.on_end(tracked)
        activation = tracked.owned
        if activation is None and tracked.lent is not None:
            activation = tracked.lent()
        if activation is None:
            return
        tracked.own(None)
        if activation.handles and not tracked.recomputed:
            self._on_death(activation, tracked.nbytes)


never_compile(Ledger._died)
