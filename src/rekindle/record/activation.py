"""A value at run time, and the recorded op that can make it again.

Ownership is the design: handles (what autograd holds instead of a saved tensor) own activations, activations own their
op, ops own their input activations. Nothing else owns any of them for longer than a forward, so when autograd frees its
nodes everything goes by reference counting.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rekindle.record.aliasing import Tracked, Window
from rekindle.record.modules import ModuleCall
from rekindle.record.streams import Home
from rekindle.record.torch_private import without_dispatch_modes


class Ref:
    """A tensor argument of a recorded op: a window onto an activation."""

    __slots__ = ("activation", "window")

    def __init__(self, activation: Activation, window: Window) -> None:
        self.activation = activation
        self.window = window


class Scratch:
    """A tensor argument whose content the op does not read: replays get a fresh one.

    `slot` is the position in `Op.writes` of the value that the op writes there, -1 if nobody wants it.
    """

    __slots__ = ("device", "dtype", "size", "slot", "stride")

    def __init__(self, tensor: torch.Tensor, slot: int = -1) -> None:
        self.size, self.stride = tensor.size(), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.slot = slot


class Guard:
    """A leaf that an op read through a tensor which may count its writes apart from the one that the leaf is known by.

    `version` is what it was when it was read, or after the last recorded write beside what was read.
    """

    __slots__ = ("leaf", "tensor", "version")

    def __init__(self, leaf: Activation, tensor: torch.Tensor, version: int | None) -> None:
        self.leaf, self.tensor, self.version = leaf, tensor, version

    def broken(self) -> bool:
        """Whether the bytes are no longer what was read, so that only a snapshot has them."""
        return self.version is not None and self.tensor._version != self.version and not self.leaf.snapshot


class Op:
    """One recorded ATen call.

    Attributes:
        func: the overload that was called.
        args, kwargs: its arguments, tensors replaced by `Ref` (or `Scratch`).
        inputs: the activations it read, in order, each once.
        writes: (old, new) for each value it wrote into: the activation before (None if the op overwrote all of it
            unread), and weakly the one after (None if that is a leaf).
        outputs: weakly, the activation of each tensor it returned; None for one that was there before.
        random: (generator, its state before the call), if the op draws from one.
        call: the module call it ran in.
        grad_mode: whether gradients were enabled; some kernels choose by it.
        number: position in the session's stream of ops; inputs have smaller numbers.
        seconds: what it took, on the clock of the host.
        guards: of the leaves that it read, where they need one.
        home: the stream that its step began on, if there are streams.
    """

    __slots__ = (
        "__weakref__",
        "args",
        "call",
        "func",
        "grad_mode",
        "guards",
        "home",
        "inputs",
        "kwargs",
        "number",
        "outputs",
        "random",
        "seconds",
        "writes",
    )

    args: list[Any]
    kwargs: dict[str, Any]
    seconds: float

    def __init__(self, func: Any, call: ModuleCall, number: int, grad_mode: bool, home: Home | None) -> None:
        self.func = func
        self.call = call
        self.number = number
        self.grad_mode = grad_mode
        self.home = home
        self.inputs: list[Activation] = []
        self.outputs: Sequence[weakref.ref[Activation] | None] = ()
        self.writes: tuple[tuple[Activation | None, weakref.ref[Activation] | None], ...] = ()
        self.random: tuple[torch.Generator, torch.Tensor] | None = None
        self.guards: tuple[Guard, ...] = ()

    def results(self) -> Iterator[Activation]:
        """The activations it made that somebody still knows: what it returned, and what it wrote."""
        for reference in (*self.outputs, *(new for _, new in self.writes)):
            result = reference() if reference is not None else None
            if result is not None:
                yield result

    def __repr__(self) -> str:
        return f"{self.func} in {self.call.describe()}"


class Activation:
    """The bytes of one value: live, evicted, or being recomputed.

    Attributes:
        op: what made it; None for a leaf (parameter, input, constant, or anything older than the current forward).
        nbytes: size of its storage.
        is_checkpoint: marked to be kept.
        is_marked: the user marked it, not a policy.
        storage: of a parameter, which it keeps alive without an alias.
        why_kept: why it can never be evicted; empty if it can.
        window: of the tensor that was recorded as the value; onto the whole storage, usually.
        held: a detached alias that keeps the bytes alive, None when Rekindle does not hold them.
        weak: the recorded tensor, as long as somebody else holds it.
        version: of the recorded tensor, None until somebody reads it. The only sign of writes nobody saw.
        readers: weakly, the ops that read it.
        handles: weakly, what autograd saved of it.
        overwritten: the op that wrote over it in the sight of autograd; empty if none did.
        retained: `held` is a recomputed copy, which goes when the running backward pass no longer wants it.
        snapshot: `held` is a copy made before an in-place write.
        key: address of its storage when it was recorded, to find the parameter's name for an error message.
        last_use: number of the last op that read it, or of the one before which it was recomputed.
        position: among the evictable activations of a step that follows a plan, -1 if none does.
        home: address of the storage of `weak`, which the user can move to another one (`tensor.data = other`).
        lender: the record of its storage if a twin is left there when it dies, None if not.
        sums: checksums of its bytes, None if nobody compares them.
    """

    # Slots: with defaults on the class, most instances came to have a dictionary, which the collector walks as well.
    __slots__ = (
        "__weakref__",
        "call",
        "handles",
        "held",
        "home",
        "is_checkpoint",
        "is_marked",
        "key",
        "last_use",
        "lender",
        "nbytes",
        "op",
        "overwritten",
        "position",
        "readers",
        "retained",
        "snapshot",
        "storage",
        "sums",
        "value_id",
        "version",
        "weak",
        "why_kept",
        "window",
    )

    def __init__(self, op: Op | None, window: Window, nbytes: int, call: ModuleCall, why_kept: str = "") -> None:
        self.op = op
        self.window = window
        self.nbytes = nbytes
        self.call = call
        self.why_kept = why_kept
        self.is_checkpoint = self.is_marked = self.retained = self.snapshot = False
        self.storage: torch.UntypedStorage | None = None
        self.held: torch.Tensor | None = None
        self.weak: weakref.ref[torch.Tensor] | None = None
        self.version: int | None = None
        self.readers: Sequence[weakref.ref[Op]] = ()
        self.handles: Sequence[weakref.ref[Any]] = ()
        self.overwritten = ""
        self.lender: Tracked | None = None
        self.sums: object = None
        self.key = self.home = self.last_use = 0
        self.value_id = self.position = -1

    def __del__(self) -> None:
        lender = getattr(self, "lender", None)  # not there if making it was interrupted
        if lender is not None:
            lender.take_back(self)

    def twin(self) -> Activation:
        """The same value again, held by nobody, for its op to know instead. A twin and not itself, which Python would
        not tell of its end again."""
        twin = copy.copy(self)
        twin.held = twin.lender = None
        twin.readers = twin.handles = ()
        op = self.op
        assert op is not None
        op.outputs = [_instead(known, self, twin) for known in op.outputs]
        op.writes = tuple((old, _instead(new, self, twin)) for old, new in op.writes)
        return twin

    def add_handle(self, handle: Any) -> None:
        """Note that autograd saved it."""
        if self.handles:
            self.handles.append(weakref.ref(handle))  # type: ignore[attr-defined]
        else:
            self.handles = [weakref.ref(handle)]

    @property
    def saved_inputs(self) -> tuple[Activation, ...]:
        """The activations its op read: what it would be recomputed from. Empty for a leaf."""
        return tuple(self.op.inputs) if self.op is not None else ()

    @property
    def is_leaf(self) -> bool:
        """Whether no recorded op made it."""
        return self.op is None

    @property
    def is_live(self) -> bool:
        """Whether its bytes are there now, held by Rekindle or by anybody else."""
        return self.base() is not None

    def base(self) -> torch.Tensor | None:
        """A tensor on its live storage; None if the bytes are gone or were changed behind the recorder's back."""
        base, version = self.held, self.version
        if base is None:
            base = self.watched()
        if base is None:
            return self._rebuilt()
        if version is not None and base._version != version:
            return None
        return base if base.untyped_storage().nbytes() == self.nbytes else None

    def untouched(self) -> bool:
        """Whether `held` is what it was, seen at a glance. False says nothing."""
        held, version = self.held, self.version
        if held is None or version is None or self.overwritten or held._version != version:
            return False
        return (self.weak is None or self.weak() is None) and held.untyped_storage().nbytes() == self.nbytes

    def _rebuilt(self) -> torch.Tensor | None:
        """A tensor on the storage of a parameter that the user gave another one: `parameter.data = other`."""
        storage = self.storage
        if storage is None or storage.nbytes() != self.nbytes:
            return None
        size, stride, offset, dtype = self.window[:4]
        with without_dispatch_modes(), torch.no_grad():
            return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)

    def watched(self) -> torch.Tensor | None:
        """The recorded tensor, if somebody else holds it and it is still on its storage."""
        weak = self.weak
        tensor = weak() if weak is not None else None
        if tensor is None or tensor.untyped_storage()._cdata != self.home:
            return None
        return tensor

    def moved(self) -> bool:
        """Whether the user gave the recorded tensor another storage: `tensor.data = other`."""
        tensor = self.weak() if self.weak is not None else None
        return tensor is not None and tensor.untyped_storage()._cdata != self.home

    def watch(self, tensor: torch.Tensor) -> None:
        """Know the bytes through `tensor` from now on, without holding it."""
        self.weak = weakref.ref(tensor)
        self.home = tensor.untyped_storage()._cdata

    def changed(self) -> bool:
        """Whether somebody wrote to it where the recorder could not see, such as outside of the session."""
        base = self.held if self.held is not None else self.watched()
        return base is not None and self.version is not None and base._version != self.version

    def stale(self, tensor: torch.Tensor) -> bool:
        """The same, for each read, which is through `tensor`: a kernel that no dispatcher sees may have written, as
        `ctx.mark_dirty` then says."""
        version = self.version
        if version is None:
            return False
        base = self.held
        if base is None and self.weak is not None:
            base = self.weak()
        return (tensor if base is None else base)._version != version

    def is_source(self, but: Op | None = None) -> bool:
        """Whether something else may have to be recomputed from it, other than by `but`."""
        readers = (reference() for reference in self.readers)
        return any(op is not None and op is not but for op in readers)

    def is_needed(self) -> bool:
        """Whether something else may have to be recomputed from it, or autograd may ask for it."""
        return self.is_source() or any(self.live_handles())

    def pending(self, graph_task: int) -> bool:
        """Whether autograd still has it saved, and has not asked for it in this backward pass."""
        for reference in self.handles:  # a loop, not a generator: asked for each op that is repeated
            handle = reference()
            if handle is not None and handle.graph_task != graph_task:
                return True
        return False

    def live_handles(self) -> Iterator[Any]:
        """The handles that autograd has not freed."""
        for reference in self.handles:
            handle = reference()
            if handle is not None:
                yield handle

    def release(self) -> None:
        """Let go of the bytes that Rekindle holds of it."""
        self.held = None  # before `retained`: the storage may die here, and a recomputed copy is no eviction
        self.retained = self.snapshot = False

    def lose(self) -> None:
        """Note that its storage holds something else now."""
        self.weak = self.storage = None
        self.release()

    def describe(self) -> str:
        """A name for error messages."""
        size, dtype = tuple(self.window[0]), str(self.window[3]).removeprefix("torch.")
        made = f"made by {self.op!r}" if self.op is not None else "a leaf"
        return f"{dtype}{list(size)}, {made}"

    def __repr__(self) -> str:
        state = "live" if self.is_live else "evicted"
        mark = ", checkpoint" if self.is_checkpoint else ""
        return f"Activation({self.describe()}, {self.nbytes} bytes, {state}{mark})"


def _instead(
    known: weakref.ref[Activation] | None, one: Activation, twin: Activation
) -> weakref.ref[Activation] | None:
    return weakref.ref(twin) if known is not None and known() is one else known
