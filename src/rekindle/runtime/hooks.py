"""What autograd holds instead of a saved tensor, and how it gets the tensor back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from rekindle._errors import SavedTensorModified
from rekindle.record.activation import Activation
from rekindle.record.aliasing import Window, look, window_of
from rekindle.record.modules import ModuleCall
from rekindle.record.torch_private import (
    at_recorded_level,
    current_graph_task,
    current_node,
    hooked,
    never_compile,
    step_aside,
    when_backward_ends,
    without_dispatch_modes,
)
from rekindle.record.unseen import UnseenNodes

if TYPE_CHECKING:
    from rekindle.record.recorder import Recorder
    from rekindle.record.seams import Checksums
    from rekindle.runtime.aside import Aside
    from rekindle.runtime.follow import Follower
    from rekindle.runtime.replay import Replayer


class Handle:
    """A saved tensor that may be evicted: a window onto an activation, which it owns."""

    __slots__ = ("__weakref__", "_watch", "activation", "graph_task", "window")

    def __init__(self, activation: Activation, window: Window, watch: torch.Tensor | None) -> None:
        """`watch` is the saved tensor, if the activation is known by another one, which may count writes apart."""
        self.activation = activation
        self.window = window
        self.graph_task = -2  # the last backward pass that asked for it
        self._watch = weakref.ref(watch) if watch is not None else None

    def watched(self) -> torch.Tensor | None:
        """The saved tensor, if it is another than the one the activation is known by, and there still."""
        return self._watch() if self._watch is not None else None


class Saved:
    """A saved tensor that is held as plain autograd would: a leaf, or something never evicted."""

    __slots__ = ("call", "key", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, key: int, call: ModuleCall) -> None:
        self.tensor = tensor
        self.version = None if tensor.is_inference() else tensor._version
        self.key = key
        self.call = call


class SavedTensors:
    """The pack and unpack hooks of a session."""

    def __init__(
        self,
        recorder: Recorder,
        replayer: Replayer,
        saved: Callable[[Activation, ModuleCall], bool],
        snapshot: bool,
    ) -> None:
        """`saved(activation, call)` decides whether one that autograd saves now is held from now on; `snapshot` says
        that what is saved survives an in-place write."""
        self.checksums: Checksums | None = None
        self.follower: Follower | None = None  # of the step, if a plan says what to hold and let go of
        self.aside: Aside | None = None  # says which backward passes run unseen; None if none do
        self._snapshot = snapshot
        self._recorder = recorder
        self._storages = recorder.ledger.storages
        self._replayer = replayer
        self._saved = saved
        self._graph_task = -1
        self._unseen = UnseenNodes(recorder)

    def pack(self, tensor: torch.Tensor) -> Handle | Saved:
        """Called by autograd when it saves a tensor."""
        recorder = self._recorder
        call = recorder.modules.current
        if hooked(tensor):
            recorder.unattended = False
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse, mkldnn: no storage
            return self._as_it_is(tensor, 0, call)
        tracked = self._storages.get(key)
        activation = None
        if tracked is not None:
            activation = tracked.owned
            if activation is None and tracked.lent is not None:
                activation = tracked.lent()
            if activation is not None and activation.stale(tensor):
                activation = None
        if self._snapshot and not tensor.is_inference():
            return self._handle(tensor, recorder.leaf(tensor) if activation is None else activation, call)
        if activation is None or activation.op is None:
            if activation is not None and recorder.tape is not None:
                recorder.tape.saved(activation, call)
            return self._as_it_is(tensor, key, call)
        return self._handle(tensor, activation, call)

    def unpack(self, packed: Handle | Saved) -> torch.Tensor:
        """Called by autograd when it wants the tensor back.

        Raises:
            SavedTensorModified: an in-place operation changed it, which plain autograd refuses too.
            LeafModified, RecomputeError: it cannot be recomputed.
        """
        graph_task = current_graph_task()
        running = graph_task != -1  # else user code looks, at `grad_fn._saved_self` say, and no plan knows of that
        unseen = ""
        if running:
            if graph_task != self._graph_task:
                self._backward_begins(graph_task)
            unseen = self._step_aside()
        self._replayer.asked()
        tape = self._recorder.tape if running else None
        if isinstance(packed, Saved):
            if tape is not None and (tracked := self._storages.get(packed.key)) is not None:
                tape.asked(tracked.value_id, current_node())
            tensor = self._check(packed)
            if unseen:
                self._unseen.asks(unseen, tensor)
            return tensor
        activation = packed.activation
        if tape is not None:
            tape.asked(activation.value_id, current_node())
        untouched = activation.untouched()
        if not untouched:
            self._refuse_changed(activation)
        packed.graph_task = graph_task
        follower = self.follower if running else None
        turn = follower.asked(activation) if follower is not None else None
        base = activation.held if untouched else activation.base()
        if base is None:
            base = self._replayer.bring_back(activation, graph_task, turn)
        if self.checksums is not None:
            self.checksums.compare(activation, base, saved=True)
        tensor = self._look(base, packed.window)
        if turn is not None and follower is not None:
            follower.drop(turn)
        elif activation.retained and not activation.pending(graph_task):
            self._replayer.leave(activation)
        if unseen:
            self._unseen.asks(unseen, tensor)
        return tensor

    def _backward_begins(self, graph_task: int) -> None:
        self._graph_task = graph_task
        when_backward_ends(self._replayer.release_retained)
        if self.aside is None:
            return
        if torch.is_grad_enabled():  # what this pass makes may be recomputed in another
            self.aside.stop()
        elif self.aside.active:
            self._recorder.backward_begins(graph_task)

    def _step_aside(self) -> str:
        """Have the running node do without the recorder, if it would do otherwise with it or nobody has to watch.
        Returns its name if somebody had to."""
        if self.aside is not None and self.aside.active and self._recorder.is_at_home:
            return step_aside(self._recorder, None)
        return self._unseen.step_aside()

    def _refuse_changed(self, activation: Activation) -> None:
        """Refuse what plain autograd refuses."""
        if activation.overwritten or activation.changed():
            by = activation.overwritten or "a write outside of the session"
            raise SavedTensorModified(
                f"one of the variables needed for gradient computation, {activation.describe()}, has been modified by "
                f"an inplace operation: {by}. Use the out-of-place form of that operation."
            )
        if activation.moved():
            raise SavedTensorModified(
                f"one of the variables needed for gradient computation, {activation.describe()}, was given other data: "
                "`tensor.data = other`. Assign to a new variable instead."
            )

    def _handle(self, tensor: torch.Tensor, activation: Activation, call: ModuleCall) -> Handle:
        recorder = self._recorder
        recorder.saves += 1
        source = activation.watched()
        if source is None and activation.held is None:
            source = recorder.first_read(activation, tensor)
        if source is tensor:
            handle = Handle(activation, activation.window, None)
        else:
            handle = Handle(activation, window_of(tensor), tensor)
        activation.add_handle(handle)
        if recorder.tape is not None:
            recorder.tape.saved(activation, call)
            recorder.tape.seen(tensor)
        if self.checksums is not None:
            self.checksums.compare(activation, tensor, saved=True)
        wanted = activation.op is None or activation.is_checkpoint
        if activation.held is None and (wanted or self._saved(activation, call)):
            self._hold(activation, tensor, source)
        return handle

    def hold(self, activation: Activation, tensor: torch.Tensor) -> None:
        """Keep the bytes of an activation that `tensor` looks at. From outside of a dispatch only."""
        if activation.held is None:
            self._hold(activation, tensor, activation.watched())

    def _hold(self, activation: Activation, tensor: torch.Tensor, source: torch.Tensor | None) -> None:
        activation.held = self._alias(tensor if source is None else source)
        if source is None and not tensor.is_inference():
            activation.version = tensor._version  # another tensor on the same bytes may count its writes apart
        self._recorder.lend(activation)

    def _as_it_is(self, tensor: torch.Tensor, key: int, call: ModuleCall) -> Saved:
        if tensor.requires_grad and tensor.is_leaf:
            return Saved(tensor, key, call)  # not an alias: like autograd, follow what `parameter.data = other` does
        return Saved(self._alias(tensor), key, call)

    def _alias(self, tensor: torch.Tensor) -> torch.Tensor:
        with without_dispatch_modes():
            return tensor.detach()

    def _look(self, base: torch.Tensor, window: Window) -> torch.Tensor:
        return _look(base, window)

    def _check(self, packed: Saved) -> torch.Tensor:
        if packed.version is not None and packed.tensor._version != packed.version:
            what = self._recorder.modules.name_of(packed.key) or f"a tensor of shape {list(packed.tensor.shape)}"
            raise SavedTensorModified(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{what}, saved in {packed.call.describe()}, is at version {packed.tensor._version}; expected version "
                f"{packed.version}. Write to it (or step the optimizer) after backward() instead."
            )
        return packed.tensor


def _look(base: torch.Tensor, window: Window) -> torch.Tensor:
    """As `look`, but a write through the result counts as one to `base`: a custom backward may write what it saved."""
    size, stride, offset, dtype = window[:4]
    if base.dtype is not dtype or len(window) > 4 or base.is_conj() or base.is_neg():
        with at_recorded_level():
            return look(base, window)
    if (size, stride, offset) == (base.size(), base.stride(), base.storage_offset()):
        return base
    with without_dispatch_modes():
        tensor = base.detach()
    with at_recorded_level():
        return tensor.as_strided_(size, stride, offset)


never_compile(SavedTensors.pack)  # called while compiled code runs, too, which Dynamo would have part of
never_compile(SavedTensors.unpack)
