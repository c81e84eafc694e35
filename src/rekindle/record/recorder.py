"""Watches a step from below autograd and autocast: every ATen call becomes an op, every storage it makes a value."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rekindle.record.activation import Activation, Op, Ref, Scratch
from rekindle.record.aliasing import Ledger, Tracked, window_of
from rekindle.record.modules import ModuleCall, ModuleStack
from rekindle.record.schema import _CACHE as _TRAITS
from rekindle.record.schema import Traits, trains, traits_of, why_opaque
from rekindle.record.tape import Tape
from rekindle.record.torch_private import alias, current_graph_task, never_compile, when_backward_ends

LEAF = "a leaf"
SMALL = "too small to be worth a decision"
UNINITIALISED = "from an empty tensor that no recorded op has filled"
OVERWRITTEN_LEAF = "from an op that writes over what it reads, which nothing could bring back"
_OPS_BETWEEN_CUTS = 4096

Tensor = torch.Tensor


class Keeper(Protocol):
    """Who decides what is kept, asked as the step runs."""

    reads: bool

    def made(self, name: str, call: ModuleCall) -> bool:
        """Whether a new evictable activation becomes a checkpoint."""

    def read(self, made_in: ModuleCall, read_in: ModuleCall) -> bool:
        """Whether an activation becomes a checkpoint because this call reads it. Asked only if `reads`."""

    def before_write(self, activation: Activation, by: Op | None) -> None:
        """Called before an op writes over an activation, so that what is still needed of it can be saved."""


class Recorder(TorchDispatchMode):
    """Records ops and values while it is active, and counts live bytes.

    Attributes:
        ledger: the storages seen.
        modules: the stack of module calls.
        tape: where the step is written down as a graph, None if it need not be.
        saves: how many tensors autograd saved since the last cut.
    """

    def __init__(self, ledger: Ledger, modules: ModuleStack, keeper: Keeper, min_nbytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.modules = modules
        self.keeper = keeper
        self.tape: Tape | None = None
        self.saves = 0
        self._min_nbytes = min_nbytes
        self._storages = ledger.storages
        self._number = 0
        self._next_cut = _OPS_BETWEEN_CUTS
        self._graph_task = -1

    def cut(self) -> None:
        """Make every value there is a leaf for the ops to come: a forward never reaches back into an older one."""
        self.ledger.forget_activations()
        self.saves = 0
        self._next_cut = self._number + _OPS_BETWEEN_CUTS

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # `never_compile` below does it at no cost per op

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiling a region is not part of the step; running it is."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        traits = _TRAITS.get(func) or traits_of(func)
        if traits.view:
            return func(*args, **kwargs) if kwargs else func(*args)
        if types:
            return NotImplemented  # a subclass: let it desugar, and record the plain ops beneath
        if kwargs is None:
            kwargs = {}
        graph_task = current_graph_task()
        if graph_task != -1 and graph_task != self._graph_task:
            self._graph_task = graph_task
            when_backward_ends(self._backward_ended)
        if traits.reshapes:
            return self._reshape(func, args, kwargs)
        grad_mode = torch.is_grad_enabled()
        if not grad_mode and (graph_task != -1 or torch.is_inference_mode_enabled()):
            return self._pass(func, traits, args, kwargs, graph_task != -1)
        return self._record(func, traits, args, kwargs, grad_mode, graph_task != -1)

    # -- one op that may be repeated ---------------------------------------------------------------------------------

    def _record(
        self,
        func: Any,
        traits: Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grad_mode: bool,
        backward: bool,
    ) -> Any:
        self._number = number = self._number + 1
        if number > self._next_cut and not self.saves:
            self.cut()
        op = Op()
        op.func, op.number, op.grad_mode, op.random = func, number, grad_mode, None
        op.call = call = self.modules.current
        op.inputs, op.writes, op.outputs = [], [], []
        opaque = traits.opaque or (why_opaque(func, args, kwargs) if traits.check else "")
        written: list[tuple[Activation, Tensor, bool]] = []
        me = weakref.ref(op)
        try:
            if traits.plain:
                op.args = [self._ref(arg, op, me) if isinstance(arg, Tensor) else arg for arg in args]
                op.kwargs = kwargs
            else:
                op.args, op.kwargs = self._template(op, me, traits, args, kwargs, written)
        except (NotImplementedError, RuntimeError):  # sparse, quantised, opaque layouts: no plain storage
            return self._pass(func, traits, args, kwargs, backward)
        if traits.random:
            op.random = _generator_state(args, kwargs)
        watches: list[Tensor | None] = []
        if written:
            watches = [_watch(activation) for activation, _, _ in written]
            for activation, _, whole in written:
                if not opaque and (activation in op.inputs if whole else activation.op is None):
                    opaque = OVERWRITTEN_LEAF
                self.keeper.before_write(activation, op)

        tape = self.tape
        start = time.perf_counter() if tape is not None else 0.0
        result = func(*args, **kwargs) if kwargs else func(*args)
        seconds = time.perf_counter() - start if tape is not None else 0.0

        made: list[Activation | None] = []
        for (old, tensor, whole), watch in zip(written, watches, strict=True):
            made.append(self._rewrite(op, opaque, old, tensor, whole, watch))
        if isinstance(result, Tensor):
            op.outputs.append(self._output(op, traits, opaque, result, call, made))
        elif result is not None:
            for tensor in _tensors(result):
                op.outputs.append(self._output(op, traits, opaque, tensor, call, made))
        if tape is not None:
            inputs = [self._value(tape, a) for a in op.inputs]
            outputs = [tape.value_of(a) for a in made if a is not None]
            tape.op(traits.name, inputs, outputs, call, seconds, backward, traits.random)
        return result

    def _template(
        self,
        op: Op,
        me: weakref.ref[Op],
        traits: Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: list[tuple[Activation, Tensor, bool]],
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with every tensor replaced, for the ops that write, take lists or have keyword arguments."""
        positions = {position for position, _ in traits.writes}
        names = {name for _, name in traits.writes}
        scratch = traits.stats[0] if traits.stats is not None and trains(traits.stats, args) else ()
        new_args: list[Any] = list(args)
        for position, arg in enumerate(args):
            if position in scratch:
                new_args[position] = self._scratch(arg) if arg is not None else None
            else:
                new_args[position] = self._argument(arg, position in positions, op, me, traits, written)
        new_kwargs = {name: self._argument(arg, name in names, op, me, traits, written) for name, arg in kwargs.items()}
        return new_args, new_kwargs

    def _argument(
        self,
        arg: Any,
        target: bool,
        op: Op,
        me: weakref.ref[Op],
        traits: Traits,
        written: list[tuple[Activation, Tensor, bool]],
    ) -> Any:
        if isinstance(arg, Tensor):
            return self._target(arg, op, me, traits, written) if target else self._ref(arg, op, me)
        if isinstance(arg, (list, tuple)):
            return [self._argument(item, target, op, me, traits, written) for item in arg]
        return arg

    def _ref(self, tensor: Tensor, op: Op, me: weakref.ref[Op]) -> Ref:
        """The argument as a window onto the value it reads."""
        tracked = self._storages.get(tensor.untyped_storage()._cdata)
        if tracked is None:
            activation = self._leaf(tensor, None)
        else:
            found = tracked.owned or tracked.activation
            activation = self._leaf(tensor, tracked) if found is None else found
            if activation.version is None and activation.op is not None:
                self.first_read(activation, tensor)
        if activation.held is None:
            if activation.why_kept or activation.is_checkpoint:
                self.hold(activation, tensor)
            elif self.keeper.reads and self.keeper.read(activation.call, op.call):
                activation.is_checkpoint = True
                self.hold(activation, tensor)
        self._reads(activation, op, me)
        weak = activation.weak
        return Ref(activation, activation.window if weak is not None and weak() is tensor else window_of(tensor))

    @staticmethod
    def _reads(activation: Activation, op: Op, me: weakref.ref[Op]) -> None:
        if activation in op.inputs:
            return
        op.inputs.append(activation)
        if activation.readers:
            activation.readers.append(me)  # type: ignore[attr-defined]
        else:
            activation.readers = [me]

    def _target(
        self,
        tensor: Tensor,
        op: Op,
        me: weakref.ref[Op],
        traits: Traits,
        written: list[tuple[Activation, Tensor, bool]],
    ) -> Ref | Scratch:
        """The argument that is written: the op reads the old version, unless it overwrites all of it."""
        storage = tensor.untyped_storage()
        tracked = self._storages.get(storage._cdata)
        if tracked is None or (activation := tracked.activation) is None:
            activation = self._leaf(tensor, tracked)
            tracked = self._storages[storage._cdata]
        whole = traits.overwrites and tracked.nbytes > 0 and tensor.numel() * tensor.itemsize == storage.nbytes()
        whole = whole and activation not in op.inputs
        if any(activation is a for a, _, _ in written):
            if whole:
                raise NotImplementedError("one storage written through two arguments")
        else:
            written.append((activation, tensor, whole))
        if whole:
            return Scratch(tensor, len(written) - 1)
        self._reads(activation, op, me)
        return Ref(activation, window_of(tensor))

    def _scratch(self, tensor: Tensor) -> Scratch:
        """A running statistic: written, and never read by anything that will be repeated."""
        tracked = self.ledger.find(tensor)
        if tracked is not None and tracked.activation is not None:
            self.keeper.before_write(tracked.activation, None)
            tracked.own(None)
        return Scratch(tensor)

    def _leaf(self, tensor: Tensor, tracked: Tracked | None) -> Activation:
        """A value that no op of this forward made. It is held: nothing could bring it back."""
        storage = tensor.untyped_storage()
        if tensor.is_quantized:
            raise NotImplementedError("quantised tensors are left alone")
        activation = Activation(None, window_of(tensor), storage.nbytes(), self.modules.current, LEAF)
        activation.key = storage._cdata
        if tensor.is_inference():
            activation.held = tensor
        else:
            activation.held = alias(tensor)
            activation.version = tensor._version
        if tracked is None:
            tracked = self.ledger.track(storage, None, 0)
        tracked.lend(activation)
        activation.value_id = tracked.value_id
        return activation

    def hold(self, activation: Activation, tensor: Tensor) -> None:
        """Keep the bytes of an activation that `tensor` looks at. From inside a dispatch only."""
        source = activation.weak() if activation.weak is not None else None
        activation.held = alias(tensor if source is None else source)
        self.lend(activation)

    def leaf(self, tensor: Tensor) -> Activation:
        """The value of a tensor that no recorded op made."""
        return self._leaf(tensor, self.ledger.find(tensor))

    def lend(self, activation: Activation) -> None:
        """Note that an activation holds its bytes itself now."""
        assert activation.held is not None
        tracked = self._storages[activation.held.untyped_storage()._cdata]
        tracked.lend(activation)
        tracked.value_id = activation.value_id

    def first_read(self, activation: Activation, tensor: Tensor) -> None:
        """The version of what an in-place op wrote is known only after autograd has counted the write."""
        weak = activation.weak
        source = weak() if weak is not None else None
        if source is None:
            source = tensor
            activation.weak, activation.window = weakref.ref(tensor), window_of(tensor)
        activation.version = source._version

    def _output(
        self, op: Op, traits: Traits, opaque: str, tensor: Tensor, call: ModuleCall, made: list[Activation | None]
    ) -> weakref.ref[Activation] | None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return None
        nbytes = storage.nbytes()
        why = opaque or (SMALL if nbytes < self._min_nbytes else UNINITIALISED if traits.uninitialised else "")
        activation = Activation(None if why else op, window_of(tensor), nbytes, call, why)
        activation.weak = weakref.ref(tensor)
        activation.version = tensor._version
        self.ledger.track(storage, activation, nbytes)
        if not why and self.keeper.made(traits.name, call):
            activation.is_checkpoint = True
        made.append(activation)
        return weakref.ref(activation)

    def _rewrite(
        self, op: Op, opaque: str, old: Activation, tensor: Tensor, whole: bool, watch: Tensor | None
    ) -> Activation | None:
        """The storage of `old` holds a new value now. None if that value is a leaf, to be seen when it is read.

        `watch` is the tensor through which `old` was known before the write.
        """
        storage = tensor.untyped_storage()
        tracked = self._storages.get(storage._cdata)
        if tracked is None:  # set_() moved the tensor to a storage nobody has seen
            op.writes.append((old, None))
            return None
        handles = list(old.live_handles())
        shared = not handles or _share_version(watch, tensor)
        resized = storage.nbytes() != old.nbytes
        if resized:
            self.ledger.resized(tracked, storage.nbytes())
        new: Activation | None = None
        if not (opaque or resized) and (whole or old.op is not None):
            source = tensor if watch is None else watch
            new = Activation(op, window_of(source), old.nbytes, op.call)
            new.weak = weakref.ref(source)
            new.is_checkpoint = self.keeper.made(str(op.func), op.call)
        op.writes.append((None if whole else old, weakref.ref(new) if new is not None else None))
        tracked.own(new)
        tracked.value_id = -1
        if handles and shared:
            old.overwritten = f"{op.func} in {op.call.describe()}"
        elif handles:  # a write behind autograd's back, through .data: what it saved is the new content
            _move_handles(handles, new or self._leaf(tensor, tracked))
        return new

    def _value(self, tape: Tape, activation: Activation) -> int:
        """The id of a value that an op read. Its storage remembers it: the activation may go before the bytes do."""
        number = tape.value_of(activation)
        if activation.held is not None:
            tracked = self.ledger.find(activation.held)
            if tracked is not None:
                tracked.value_id = activation.value_id
        return number

    # -- one op that is only counted ---------------------------------------------------------------------------------

    def _pass(self, func: Any, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> Any:
        """Run an op that nothing will be recomputed from: in the backward pass, or on tensors without a storage."""
        targets = list(_written(traits, args, kwargs))
        olds = [(old, t, _watch(old)) for t in targets if (old := self._current(t)) is not None]
        for old, _, _ in olds:
            self.keeper.before_write(old, None)
        tape = self.tape
        inputs = tape.values_read(self.ledger, args, kwargs) if tape is not None else []
        start = time.perf_counter() if tape is not None else 0.0
        result = func(*args, **kwargs)
        seconds = time.perf_counter() - start if tape is not None else 0.0
        if olds:
            op = Op()
            op.func, op.call, op.writes = func, self.modules.current, []
            for old, tensor, watch in olds:
                self._rewrite(op, "not recorded", old, tensor, False, watch)
        new = [tracked for tensor in _tensors(result) if (tracked := self._count(tensor)) is not None]
        if tape is not None:
            outputs = [tape.plain_value(tracked) for tracked in new]
            tape.op(traits.name, inputs, outputs, self.modules.current, seconds, backward, traits.random)
        return result

    def _count(self, tensor: Tensor) -> Tracked | None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None
        if storage._cdata in self._storages:
            return None
        return self.ledger.track(storage, None, storage.nbytes())

    def _current(self, tensor: Tensor) -> Activation | None:
        try:
            tracked = self.ledger.find(tensor)
        except (NotImplementedError, RuntimeError):
            return None
        return tracked.activation if tracked is not None else None

    def _reshape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op such as `t_()` that turns the tensor itself: its bytes are the same, its window is another."""
        result = func(*args, **kwargs)
        tensor: Tensor = args[0]
        activation = self._current(tensor)
        if activation is not None and activation.weak is not None and activation.weak() is tensor:
            activation.window = window_of(tensor)
        return result

    def _backward_ended(self) -> None:
        self._graph_task = -1
        self.cut()


def _move_handles(handles: list[Any], new: Activation) -> None:
    for handle in handles:
        handle.activation = new
        new.add_handle(handle)


def _watch(activation: Activation) -> Tensor | None:
    """A tensor that shares the version counter of an activation about to be overwritten."""
    tensor = activation.weak() if activation.weak is not None else None
    return activation.held if tensor is None else tensor


def _share_version(watch: Tensor | None, tensor: Tensor) -> bool:
    """Whether autograd will see a write through `tensor` as one to what it saved of `watch`. In doubt it will."""
    if watch is None or tensor.is_inference():
        return True
    before = watch._version
    torch.autograd.graph.increment_version(tensor)
    return bool(watch._version != before)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from _tensors(item)


def _written(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, name in traits.writes:
        yield from _tensors(args[position] if position < len(args) else kwargs.get(name))
    if traits.stats is not None and trains(traits.stats, args):
        for position in traits.stats[0]:
            yield from _tensors(args[position])


def _generator_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Generator, Tensor]:
    generator = kwargs.get("generator")
    for arg in args:
        if isinstance(arg, torch.Generator):
            generator = arg
    if generator is None:
        generator = _default_generator(args, kwargs)
    return generator, generator.get_state()


def _default_generator(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Generator:
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    device = torch.device((kwargs.get("device") or "cpu") if tensor is None else tensor.device)
    if device.type in ("cpu", "meta"):
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index  # type: ignore[redundant-expr]
    generator: torch.Generator = module.default_generators[index]
    return generator


never_compile(Recorder.__torch_dispatch__)
