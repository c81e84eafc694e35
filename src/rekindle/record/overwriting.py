"""What becomes of the values that an op writes over, and of what was saved, or read, of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rekindle.record.activation import Activation, Op
from rekindle.record.aliasing import Ledger, window_of
from rekindle.record.leaves import Leaves
from rekindle.record.schema import Traits
from rekindle.record.seams import Keeper
from rekindle.record.writes import (
    Write,
    count_listed,
    count_no_write,
    read_instead,
    seen_handles,
    spare,
    version_after,
    watch_of,
)


class Overwriting:
    """Follows each write through: `before` it, and then either what it made (`rewrite`, `displace`) or that it
    `failed`.

    Attributes:
        keeper: who is told before a value is overwritten, and asked whether one that was written in place is kept.
    """

    def __init__(self, ledger: Ledger, leaves: Leaves, keeper: Keeper, snapshot: bool) -> None:
        """`snapshot` says that what autograd saved survives a write that autograd sees."""
        self._ledger = ledger
        self._storages = ledger.storages
        self._leaves = leaves
        self.keeper = keeper
        self._snapshot = snapshot

    def may_destroy(self, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an op writes over what anybody may want back. Most that write in the backward pass add to a gradient,
        which nobody does."""
        if traits.stats is not None:
            return True
        for position, name in traits.writes:
            target = args[position] if position < len(args) else kwargs.get(name)
            if not isinstance(target, Tensor):
                return True
            try:
                tracked = self._storages.get(target.untyped_storage()._cdata)
            except (NotImplementedError, RuntimeError):
                return True
            if tracked is not None and (tracked.owned is not None or tracked.lent is not None or tracked.past):
                return True
        return False

    def past(self, tensors: list[Tensor]) -> list[Write]:
        """The values of older forwards that are about to be overwritten through `tensors`, which are of one storage."""
        tracked = self._storages.get(tensors[0].untyped_storage()._cdata)
        if tracked is None or not tracked.past:
            return []
        writes = [Write(old, tensors[0], False) for old in tracked.end_past()]
        for write in writes:
            write.tensors = tensors
        return writes

    def before(self, write: Write, op: Op | None) -> None:
        """Save what is still needed of the old version."""
        old = write.old
        if write.handles and write.counted:
            write.doomed = seen_handles(write)
            if self._snapshot:
                write.doomed = [handle for handle in write.doomed if write.touches(handle.window)]
        if old.op is None and old.is_source(but=op):
            spare(write, op)
        self.keeper.before_write(old, op, self._snapshot and bool(write.doomed))

    def rewrite(self, op: Op, opaque: str, write: Write) -> Activation | None:
        """The storage holds a new value now. None if that value is a leaf, to be seen when it is read."""
        old, tensor, whole = write.old, write.tensors[0], write.whole
        storage = tensor.untyped_storage()
        tracked = self._storages.get(write.key)
        if tracked is None or storage._cdata != write.key:  # set_() moved the tensor to another storage
            op.writes = (*op.writes, (old, None))
            self._lose(write)
            if write.doomed and not self._snapshot:
                old.overwritten = f"{op.func} in {op.call.describe()}"
            return None
        resized = storage.nbytes() != old.nbytes
        if resized:
            self._ledger.resized(tracked, storage.nbytes())
        new: Activation | None = None
        if not (opaque or resized) and (whole or old.op is not None):
            source = tensor if write.watch is None else write.watch
            new = Activation(op, window_of(source), old.nbytes, op.call)
            new.watch(source)
            new.version = version_after(write, source)
            new.is_checkpoint = self.keeper.makes and self.keeper.made(str(op.func), new)
        op.writes = (*op.writes, (None if whole else old, weakref.ref(new) if new is not None else None))
        tracked.own(new)
        tracked.value_id = -1
        self.displace(op, write)
        return new

    def displace(self, op: Op, write: Write) -> None:
        """See to what is still wanted of a value that has been overwritten."""
        old, doomed = write.old, write.doomed
        if doomed and not self._snapshot:
            old.overwritten = f"{op.func} in {op.call.describe()}"
        # Written behind autograd's back, through .data, or not touched: what it saved is there still.
        self._move([handle for handle in write.handles if handle not in doomed], write)

    def failed(self, writes: list[Write], lists: Sequence[tuple[Tensor, int]]) -> None:
        """An op raised, which may have written some of what it would have written."""
        count_listed(writes, lists)
        for write in writes:
            write.counted = False
            self._lose(write)

    def update(self, statistic: Tensor) -> None:
        """A running statistic is about to be written, which nobody counts: what autograd saved of it is there still."""
        writes = self.past([statistic])
        current = self._ledger.current(statistic)
        if current is not None:
            writes.append(Write(current, statistic, False))
        for write in writes:
            self.keeper.before_write(write.old, None, False)
        if current is not None:
            self._storages[writes[-1].key].own(None)
        for write in writes:
            write.counted = False
            self._move(write.handles, write)

    def turned(self, tensor: Tensor, by: str) -> None:
        """Autograd is about to count a write through `tensor`, though its bytes stay as they are."""
        tracked = self._ledger.find(tensor)
        if tracked is None:
            return
        for value in (tracked.activation, *(reference() for reference in tracked.past)):
            if value is None:
                continue
            if not self._snapshot and any(value.live_handles()) and seen_handles(Write(value, tensor, False)):
                value.overwritten = by
            else:
                count_no_write(value, tensor)

    def _lose(self, write: Write) -> None:
        """What a storage holds since an op raised, or wrote to another than it was given, nobody knows. What was wanted
        of it is there as after a write."""
        tracked = self._storages.get(write.key)
        if tracked is None:
            return
        if tracked.activation is write.old:
            tracked.own(None)
            tracked.value_id = -1
        lost = write.old.op is None and not write.old.is_live
        if write.tensors[0].untyped_storage()._cdata == write.key:
            self._move(write.handles if lost else [], write)

    def _move(self, handles: list[Any], write: Write) -> None:
        """What autograd saved, and what was read, of an overwritten value is to be found in the new one."""
        if not handles and not write.spared:
            return
        tracked = self._storages[write.key]
        new = tracked.activation
        if new is None:
            new = self._leaves.of(write.tensors[0], tracked)
            new.version = version_after(write, watch_of(new))
        write.old.handles = [weakref.ref(handle) for handle in write.handles if handle not in handles]
        for handle in handles:
            handle.activation = new
            new.add_handle(handle)
        for op in write.spared:
            read_instead(op, write, new)
