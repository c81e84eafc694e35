"""What an op writes: which values it destroys, which it does not touch, and what autograd sees of it.

PyTorch counts writes in version counters, and a saved tensor is refused if its counter moved. Which tensors share a
counter can only be found out by moving one. Under a dispatch mode the writes to lists of tensors are not counted at
all, so they are counted here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rekindle.record.activation import Activation, Op, Ref
from rekindle.record.aliasing import Window, disjoint, window_of
from rekindle.record.schema import Traits, trains
from rekindle.record.torch_private import set_versions

_UNCOUNTED = ("aten._fused_", "aten._amp_")  # ops that write to lists and never count it


class Write:
    """One storage that an op writes.

    Attributes:
        old: what it holds before.
        tensors: through which it is written.
        key: its address.
        whole: the op overwrites all of it, without reading it.
        watch: the tensor through which `old` is known.
        handles: what autograd saved of `old`.
        doomed: those of them that the write destroys in the sight of autograd, if it asks.
        spared: the ops that read of `old` only what the write does not touch, if `old` is a leaf.
        counted: autograd is still to count the write, if it sees the tensors.
    """

    __slots__ = ("counted", "doomed", "handles", "key", "old", "spared", "tensors", "watch", "whole")

    def __init__(self, old: Activation, tensor: Tensor, whole: bool) -> None:
        self.old, self.tensors, self.whole = old, [tensor], whole
        self.key = tensor.untyped_storage()._cdata
        self.watch = watch_of(old)
        self.handles = list(old.live_handles())
        self.doomed: list[Any] = []
        self.spared: list[Op] = []
        self.counted = True

    def touches(self, window: Window) -> bool:
        """Whether it may write bytes that `window` looks at."""
        return not all(disjoint(window, window_of(tensor)) for tensor in self.tensors)


def version_after(write: Write, watch: Tensor | None) -> int | None:
    """The version of `watch` once autograd has counted a write that has just been done, if it is going to.

    To read it later would count, as part of the write, what a kernel that no dispatcher sees has written meanwhile.
    """
    target = write.tensors[0]
    if watch is None:
        watch = target
    if target.is_inference() or watch.is_inference():
        return None
    waits = write.counted and (watch is target or _counted_in([target], [watch]) == [True])
    return watch._version + waits


def count_no_write(activation: Activation, tensor: Tensor) -> None:
    """Autograd is about to count a write through `tensor`, though the bytes stay as they are."""
    watch = watch_of(activation)
    if watch is None or tensor.is_inference() or activation.version is None or watch._version != activation.version:
        return
    if _counted_in([tensor], [watch]) == [True]:
        activation.version += 1


def spare(write: Write, by: Op | None) -> None:
    """Set apart the ops that read of a leaf only what a write does not touch: they can as well read what comes next."""
    old, readers = write.old, []
    for reference in old.readers:
        op = reference()
        if op is None:
            continue
        if op is by or any(write.touches(ref.window) for ref in _refs((op.args, *op.kwargs.values()), old)):
            readers.append(reference)
        else:
            write.spared.append(op)
    old.readers = readers


def read_instead(op: Op, write: Write, new: Activation) -> None:
    """Have an op read what a leaf has become by a write that spared what it read."""
    old = write.old
    for ref in _refs((op.args, *op.kwargs.values()), old):
        ref.activation = new
    op.inputs = [new if source is old else source for source in op.inputs]
    for guard in op.guards:
        if guard.leaf is old:
            guard.leaf, guard.version = new, version_after(write, guard.tensor)
    new.readers = [*new.readers, weakref.ref(op)]


def _refs(tree: Any, activation: Activation) -> Iterator[Ref]:
    if isinstance(tree, Ref):
        if tree.activation is activation:
            yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _refs(item, activation)


def watch_of(activation: Activation) -> Tensor | None:
    """A tensor that shares the version counter of an activation about to be overwritten."""
    tensor = activation.watched()
    return activation.held if tensor is None else tensor


def seen_handles(write: Write) -> list[Any]:
    """The handles of tensors that count a write in the same place as one of those written. In doubt they do.

    What autograd does not see it never misses: `tensor.data` counts apart.
    """
    watches = [watch if (watch := handle.watched()) is not None else write.watch for handle in write.handles]
    if any(tensor.is_inference() for tensor in write.tensors):
        return write.handles
    counted = _counted_in(write.tensors, watches)
    return [handle for handle, seen in zip(write.handles, counted, strict=True) if seen]


def _counted_in(tensors: Sequence[Tensor], watches: Sequence[Tensor | None]) -> list[bool]:
    """Whether each of `watches` counts the writes to `tensors`; what is not there is taken to."""
    versions = [tensor._version for tensor in tensors]
    before = [watch._version if watch is not None else -1 for watch in watches]
    torch.autograd.graph.increment_version(tensors)
    counted = [watch is None or watch._version != old for watch, old in zip(watches, before, strict=True)]
    set_versions(tensors, versions)  # an op counts its write itself, unless it fails
    return counted


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors of a result or an argument, lists unpacked."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from tensors_in(item)


def written_tensors(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an op writes."""
    for position, name in traits.writes:
        yield from tensors_in(args[position] if position < len(args) else kwargs.get(name))
    if traits.stats is not None and trains(traits.stats, args):
        for position in traits.stats[0]:
            yield from tensors_in(args[position])


def uncounted_target(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that an op fills after autograd has saved it: no write in the sight of autograd."""
    if not traits.uncounted:
        return None
    position = next(position for position, name in traits.writes if name == traits.uncounted)
    found: Tensor | None = args[position] if position < len(args) else kwargs.get(traits.uncounted)
    return found


def listed_targets(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[tuple[Tensor, int]]:
    """The tensors that an op writes as members of lists, each with its version, -1 where nobody counts the write."""
    counts = not traits.name.startswith(_UNCOUNTED)
    found = []
    for position, name in traits.writes:
        target = args[position] if position < len(args) else kwargs.get(name)
        if isinstance(target, (list, tuple)):
            found += [(tensor, tensor._version if counts else -1) for tensor in target if not tensor.is_inference()]
    return found


def count_listed(writes: Sequence[Write], lists: Sequence[tuple[Tensor, int]]) -> None:
    """Count the writes to lists of tensors: PyTorch's kernels do so above a dispatch mode, and not under one."""
    for tensor, version in lists:
        if tensor._version == version:
            torch.autograd.graph.increment_version(tensor)
    for write in writes if lists else ():
        if any(tensor is write.tensors[0] for tensor, _ in lists):
            write.counted = False
