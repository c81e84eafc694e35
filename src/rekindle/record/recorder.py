"""Watches a step from below autograd and autocast: every ATen call becomes an op, every storage it makes a value."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rekindle.record.activation import Activation, Guard, Op, Ref, Scratch
from rekindle.record.aliasing import Ledger, Tracked, covers, window_of
from rekindle.record.leaves import Leaves
from rekindle.record.modules import ModuleCall, ModuleStack
from rekindle.record.overwriting import Overwriting
from rekindle.record.schema import KNOWN, Traits, trains, traits_of, why_opaque
from rekindle.record.seams import Checksums, Keeper, Room
from rekindle.record.streams import ELSEWHERE, Home, find_home, has_streams
from rekindle.record.tape import Tape
from rekindle.record.torch_private import (
    alias,
    called_by_engine,
    conjugating,
    current_graph_task,
    current_node,
    in_compiled_code,
    never_compile,
    when_backward_ends,
)
from rekindle.record.writes import (
    Write,
    count_listed,
    listed_targets,
    tensors_in,
    uncounted_target,
    written_tensors,
)

SMALL = "too small to be worth a decision"
ASIDE = "small beside what its op made with it, and an op repeated for it alone costs more"
UNINITIALISED = "from an empty tensor that no recorded op has filled"
OVERWRITTEN_LEAF = "from an op that writes over what it reads, which nothing could bring back"
DEFAULT_MIN_NBYTES = 1024
_OPS_BETWEEN_CUTS = 4096
_grad_mode, _inference_mode, _clock = torch.is_grad_enabled, torch.is_inference_mode_enabled, time.perf_counter
_SHARE_ASIDE = 1024  # of what an op returns, such as the statistics of a normalisation: a thousandth is kept

Tensor = torch.Tensor


class Recorder(TorchDispatchMode):
    """Records ops and values while it is active, and counts live bytes.

    Attributes:
        ledger: the storages seen.
        leaves: where values come from that no op made.
        modules: the stack of module calls.
        tape: where the step is written down as a graph, None if it need not be.
        saves: how many tensors autograd saved since the last cut.
        number: of the last op that may be repeated.
        checksums: where to remember the bytes of activations, None if nobody will compare them.
        home: the stream that the step began on; None if there is none, or it has not begun.
        unattended: whether no op of a step has to be seen in its backward pass: since this was set, nobody else's code
            was seen to run there or to be about to, no op wrote there over what may be wanted back, and none ran on
            another stream.
    """

    def __init__(
        self, ledger: Ledger, modules: ModuleStack, keeper: Keeper, room: Room, min_nbytes: int, snapshot: bool
    ) -> None:
        """`snapshot` says that what autograd saved survives an in-place write that autograd sees."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.modules = modules
        self._keeper = keeper
        self.tape: Tape | None = None
        self.saves = 0
        self.number = 0
        self.checksums: Checksums | None = None
        self.home: Home | None = None
        self.unattended = True
        self._away = ""
        self._has_streams = has_streams()
        self._room = room
        self._hungry = room.hungry
        self._min_nbytes = min_nbytes
        self.leaves = Leaves(ledger, modules)
        self._overwriting = Overwriting(ledger, self.leaves, keeper, snapshot)
        self._storages = ledger.storages
        self._next_cut = _OPS_BETWEEN_CUTS
        self._graph_task = -1
        self._loose = False  # a backward pass is running from which nothing will be recomputed
        self._ask_reads = False
        self._to_hold: list[tuple[Activation, Tensor]] = []

    def ask(self, keeper: Keeper) -> None:
        """Ask another one from now on what is kept."""
        self._keeper = self._overwriting.keeper = keeper

    def cut(self) -> None:
        """Make every value there is a leaf for the ops to come: a forward never reaches back into an older one."""
        self._to_hold.clear()  # of an op that failed
        self._loose = False
        self.ledger.forget_activations()
        self.saves = 0
        self._next_cut = self.number + _OPS_BETWEEN_CUTS

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
        traits = KNOWN.get(id(func)) or traits_of(func)
        if traits.view:
            return traits.call(*args, **kwargs) if kwargs else traits.call(*args)
        if types:
            return NotImplemented  # a subclass: let it desugar, and record the plain ops beneath
        if kwargs is None:
            kwargs = {}
        graph_task = current_graph_task()
        backward = graph_task != -1
        if backward:
            if graph_task != self._graph_task:
                self.backward_begins(graph_task)
            if self.unattended:
                self.unattended = called_by_engine()
        if traits.reshapes:
            return self._reshape(func, args, kwargs)
        if self._has_streams:
            self._away = self._leave_home(args, kwargs, backward)
        grad_mode = _grad_mode()
        if (not grad_mode and backward) or _inference_mode():
            destroys = traits.mutates and self._overwriting.may_destroy(traits, args, kwargs)
            if destroys:
                self.unattended = False
            if destroys or self.tape is not None:
                return self._pass(func, traits, args, kwargs, backward)
            return self._count(self._run(func, traits, args, kwargs, self.modules.current, None))
        if in_compiled_code():
            return self._pass(func, traits, args, kwargs, backward)  # kernels nobody sees write over what it makes
        return self._record(func, traits, args, kwargs, grad_mode, backward)

    @property
    def is_at_home(self) -> bool:
        """Whether the stream is current on which values are recomputed, if there are streams."""
        return self.home is None or not self.home.is_left()

    def _leave_home(self, args: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> str:
        """Why an op is never repeated that runs on another stream than the others; empty if it runs on theirs."""
        home = self.home
        if home is None:
            self.home = find_home()
            return ""
        if not home.is_left():
            return ""
        self.unattended = False
        home.lend(tensors_in((args, tuple(kwargs.values()))), backward)
        return ELSEWHERE

    def _run(
        self,
        func: Any,
        traits: Traits,
        args: Any,
        kwargs: dict[str, Any],
        call: ModuleCall,
        random: tuple[torch.Generator, Tensor] | None,
    ) -> Any:
        if traits.conjugates:
            with conjugating():
                return self._room.run(func, args, kwargs, call, random)
        room = self._room
        if room.watches or room.measures or traits.name in self._hungry:
            return room.run(func, args, kwargs, call, random)
        try:
            return traits.call(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            return room.rescue(error, func, args, kwargs, random)

    def _count(self, result: Any) -> Any:
        """Count the bytes of what an op returned from which nothing will be recomputed. Returns it."""
        if isinstance(result, Tensor):
            try:
                storage = result.untyped_storage()
                if storage._cdata not in self._storages:
                    self.ledger.track(storage, None, storage.nbytes())
            except (NotImplementedError, RuntimeError):  # sparse, opaque layouts
                pass
        elif isinstance(result, (list, tuple)):
            for item in result:
                self._count(item)
        return result

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
        self.number = number = self.number + 1
        if number > self._next_cut and not self.saves:
            self.cut()
        call = self.modules.current
        op = Op(func, call, number, grad_mode, self.home)
        if self._to_hold:
            self._to_hold.clear()
        self._ask_reads = self._keeper.reads and not backward  # backward ops run outside of all modules
        opaque = traits.opaque or self._away or (why_opaque(func, args, kwargs) if traits.check else "")
        written: list[Write] = []
        past: list[Write] = []
        lists: Sequence[tuple[Tensor, int]] = ()
        me = weakref.ref(op)
        try:
            if traits.plain:
                ref = self._ref
                op.args = [ref(arg, op, me) if isinstance(arg, Tensor) else arg for arg in args]
                op.kwargs = kwargs
            else:
                op.args, op.kwargs = self._template(op, me, traits, args, kwargs, written)
        except (NotImplementedError, RuntimeError):  # sparse, quantised, opaque layouts: no plain storage
            return self._pass(func, traits, args, kwargs, backward)
        if traits.random:
            op.random = self._state(args, kwargs)
        if written:
            uncounted = uncounted_target(traits, args, kwargs)
            past = [former for write in written for former in self._overwriting.past(write.tensors)]
            for write in written:
                write.counted = write.tensors[0] is not uncounted
                if not opaque and (write.old in op.inputs if write.whole else write.old.op is None):
                    opaque = OVERWRITTEN_LEAF
            for write in (*written, *past):
                self._overwriting.before(write, op)
            lists = listed_targets(traits, args, kwargs)

        start = _clock()
        try:
            result = self._run(func, traits, args, kwargs, call, op.random)
        except BaseException:
            self._to_hold.clear()
            self._overwriting.failed([*written, *past], lists)
            raise
        op.seconds = self._room.seconds if self._room.measures else _clock() - start
        if op.random is not None:
            self._keep_random(op, *op.random)

        made: list[Activation | None] = []
        if written:
            count_listed((*written, *past), lists)
            made += [self._overwriting.rewrite(op, opaque, write) for write in written]
            for write in past:
                self._overwriting.displace(op, write)
        if isinstance(result, Tensor):
            op.outputs = (self._output(op, traits, opaque, result, call, made),)
        elif result is not None:
            results = list(tensors_in(result))
            aside = results[0].numel() * results[0].itemsize // _SHARE_ASIDE if results else 0
            op.outputs = [self._output(op, traits, opaque, tensor, call, made, aside) for tensor in results]
        if self._to_hold:
            self._hold_sources(made, written)
        if self.checksums is not None:
            for activation in made:
                if activation is not None and (base := activation.base()) is not None:
                    self.checksums.take(activation, base)
        tape = self.tape
        if tape is not None:
            inputs = [self._value(tape, a) for a in op.inputs]
            outputs = [tape.made(a) for a in made if a is not None]
            outputs += self._rewritten(tape, written, made, opaque)
            outputs += [copy for write in (*written, *past) for copy in tape.copied(write)]
            for tensor in tensors_in((args, tuple(kwargs.values()), result)):
                tape.seen(tensor)
            for write, new in zip(written, made, strict=False):  # what was written comes first
                tape.overwrites(new, write.old)
            if op.random is not None:
                tape.state(op.random[1].nbytes)
            if backward:
                tape.runs(current_node())
            tape.repeatable(number)
            tape.op(traits.name, inputs, outputs, call, op.seconds, backward, traits.random, self._room.temporaries)
        return result

    def _hold_sources(self, made: list[Activation | None], written: list[Write]) -> None:
        """Hold the checkpoints that an op read if it made anything, or they would go with the op, which nobody owns.

        What it wrote over is gone already.
        """
        to_hold, self._to_hold = self._to_hold, []
        gone = [write.old for write in written]
        for activation, tensor in to_hold if any(made) else ():
            if activation.held is None and activation not in gone:
                self.hold(activation, tensor)

    def _keep_random(self, op: Op, generator: torch.Generator, state: Tensor) -> None:
        """Count the bytes of the generator's state, or drop it if the op drew nothing, as attention without dropout."""
        if self._drew(op, generator, state):
            self.ledger.track(state.untyped_storage(), None, state.nbytes)
        else:
            op.random = None

    def _state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Generator, Tensor]:
        """The generator that an op draws from, and its state."""
        return _generator_state(args, kwargs)

    def _drew(self, op: Op, generator: torch.Generator, state: Tensor) -> bool:
        """Whether the op drew from the generator, whose state before it is given."""
        return not torch.equal(state, generator.get_state())

    def _template(
        self,
        op: Op,
        me: weakref.ref[Op],
        traits: Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: list[Write],
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with every tensor replaced, for the ops that write, take lists or have keyword arguments."""
        positions = {position for position, _ in traits.writes}
        names = {name for _, name in traits.writes}
        stats = traits.stats[0] if traits.stats is not None else ()
        training = traits.stats is not None and trains(traits.stats, args)
        new_args: list[Any] = list(args)
        for position, arg in enumerate(args):
            if position in stats and arg is not None:
                new_args[position] = self._statistic(arg, op, training)
            else:
                new_args[position] = self._argument(arg, position in positions, op, me, traits, written)
        new_kwargs = {name: self._argument(arg, name in names, op, me, traits, written) for name, arg in kwargs.items()}
        return new_args, new_kwargs

    def _statistic(self, tensor: Tensor, op: Op, training: bool) -> Ref | Scratch:
        """A running statistic: written, and read by nothing that will be repeated; or read, and not written."""
        if training:
            self._overwriting.update(tensor)
            return Scratch(tensor)
        activation = self.leaves.copy_of(tensor)
        op.inputs.append(activation)
        return Ref(activation, activation.window)

    def _argument(
        self,
        arg: Any,
        target: bool,
        op: Op,
        me: weakref.ref[Op],
        traits: Traits,
        written: list[Write],
    ) -> Any:
        if isinstance(arg, Tensor):
            return self._target(arg, op, me, traits, written) if target else self._ref(arg, op, me)
        if isinstance(arg, (list, tuple)):
            return [self._argument(item, target, op, me, traits, written) for item in arg]
        return arg

    def _ref(self, tensor: Tensor, op: Op, me: weakref.ref[Op]) -> Ref:
        """The argument as a window onto the value it reads."""
        tracked = self._storages.get(tensor.untyped_storage()._cdata)
        activation = known = None
        if tracked is not None:
            activation = tracked.owned
            if activation is None and tracked.lent is not None:
                activation = tracked.lent()
        if activation is not None:  # what follows is `stale` and `watched`, which cost a call each
            weak, version, held = activation.weak, activation.version, activation.held
            if weak is not None:
                known = weak()
            base = known if held is None else held
            if version is not None and (tensor if base is None else base)._version != version:
                activation = None
        if activation is None:
            activation = self.leaves.of(tensor, tracked)
            known = activation.weak() if activation.weak is not None else None
        if activation.op is None:
            self._guard(activation, tensor, known, op)
        else:
            if activation.held is None:
                if not activation.is_checkpoint and self._ask_reads and self._keeper.read(activation.call, op.call):
                    activation.is_checkpoint = True
                if activation.is_checkpoint:
                    self._to_hold.append((activation, tensor))
        if activation not in op.inputs:
            op.inputs.append(activation)
            activation.last_use = op.number
            if activation.readers:
                activation.readers.append(me)  # type: ignore[attr-defined]
            else:
                activation.readers = [me]
        return Ref(activation, activation.window if known is tensor else window_of(tensor))

    def _guard(self, activation: Activation, tensor: Tensor, known: Tensor | None, op: Op) -> None:
        """See that what cannot be recomputed is there, and unchanged, when `op` is repeated. `known` is the tensor that
        it is known by."""
        if activation.held is None and activation.storage is None:
            self.hold(activation, tensor)
            return
        if known is not tensor and (known is None or tensor._base is not known) and not tensor.is_inference():
            op.guards = (*op.guards, Guard(activation, alias(tensor), tensor._version))  # it may count its writes apart

    def _target(
        self,
        tensor: Tensor,
        op: Op,
        me: weakref.ref[Op],
        traits: Traits,
        written: list[Write],
    ) -> Ref | Scratch:
        """The argument that is written: the op reads the old version, unless it overwrites all of it."""
        storage = tensor.untyped_storage()
        tracked = self._storages.get(storage._cdata)
        if tracked is None or (activation := tracked.activation) is None or activation.stale(tensor):
            activation = self.leaves.of(tensor, tracked)
            tracked = self._storages[storage._cdata]
        whole = traits.overwrites and tracked.nbytes > 0 and covers(tensor, storage.nbytes())
        whole = whole and activation not in op.inputs
        again = next((write for write in written if write.old is activation), None)
        if again is not None:
            if whole:
                raise NotImplementedError("one storage written through two arguments")
            again.tensors.append(tensor)
        else:
            written.append(Write(activation, tensor, whole))
        if whole:
            return Scratch(tensor, len(written) - 1)
        return self._ref(tensor, op, me)

    def hold(self, activation: Activation, tensor: Tensor) -> None:
        """Keep the bytes of an activation that `tensor` looks at. From inside a dispatch only."""
        source = activation.watched()
        activation.held = alias(tensor if source is None else source)
        if source is None and not tensor.is_inference():
            activation.version = tensor._version  # another tensor on the same bytes may count its writes apart
        self.lend(activation)

    def leaf(self, tensor: Tensor) -> Activation:
        """The value of a tensor that no recorded op made."""
        return self.leaves.of(tensor, self.ledger.find(tensor))

    def lend(self, activation: Activation) -> None:
        """Note that an activation holds its bytes itself now."""
        assert activation.held is not None
        tracked = self._storages[activation.held.untyped_storage()._cdata]
        tracked.owned, tracked.lent = None, weakref.ref(activation)
        tracked.value_id = activation.value_id
        if activation.op is not None and not self._loose:
            activation.lender = tracked

    def first_read(self, activation: Activation, tensor: Tensor) -> Tensor:
        """Know a value through `tensor`, and its version through that: nobody holds the recorded one any more. Returns
        `tensor`."""
        activation.watch(tensor)
        activation.window = window_of(tensor)
        activation.version = tensor._version
        return tensor

    def _output(
        self,
        op: Op,
        traits: Traits,
        opaque: str,
        tensor: Tensor,
        call: ModuleCall,
        made: list[Activation | None],
        aside: int = 0,
    ) -> weakref.ref[Activation] | None:
        """Know what an op returned. What has fewer than `aside` bytes is never evicted."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, opaque layouts: left alone
            return None
        if storage._cdata in self._storages:
            return None
        nbytes = storage.nbytes()
        if (nbytes < self._min_nbytes and self.tape is None) or tensor.is_quantized:
            self.ledger.track(storage, None, nbytes)  # becomes a leaf, if anything reads it
            return None
        why = opaque or (SMALL if nbytes < self._min_nbytes else UNINITIALISED if traits.uninitialised else "")
        if nbytes < aside and not why:
            why = ASIDE
        activation = Activation(None if why else op, window_of(tensor), nbytes, call, why)
        activation.weak, activation.version = weakref.ref(tensor), tensor._version
        activation.home = self.ledger.track(storage, activation, nbytes).key
        if not why and self._keeper.makes and self._keeper.made(traits.name, activation):
            activation.is_checkpoint = True
        made.append(activation)
        return weakref.ref(activation)

    def _rewritten(self, tape: Tape, written: list[Write], made: Sequence[Activation | None], why: str) -> list[int]:
        """The ids of what storages hold since an op wrote to them, where that is a leaf."""
        found: list[int] = []
        for write, new in zip(written, made, strict=False):
            tracked = self._storages.get(write.key)
            if new is None and tracked is not None and write.tensors[0].untyped_storage()._cdata == write.key:
                found += tape.rewritten(tracked, write.old, why)
        return found

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
        targets: dict[int, list[Tensor]] = {}
        for tensor in written_tensors(traits, args, kwargs):
            if _has_storage(tensor):
                targets.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        written, past = [], []
        for tensors in targets.values():
            past += self._overwriting.past(tensors)
            if (old := self.ledger.current(tensors[0])) is not None:
                written.append(Write(old, tensors[0], False))
                written[-1].tensors = tensors
        for write in (*written, *past):
            self._overwriting.before(write, None)
        tape = self.tape
        inputs = tape.values_read(self.ledger, args, kwargs) if tape is not None else []
        start = time.perf_counter()
        lists = listed_targets(traits, args, kwargs) if targets else ()
        try:
            result = self._run(func, traits, args, kwargs, self.modules.current, None)
        except BaseException:
            self._overwriting.failed([*written, *past], lists)
            raise
        seconds = self._room.seconds if self._room.measures else time.perf_counter() - start
        count_listed((*written, *past), lists)
        if written or past:
            op = Op(func, self.modules.current, self.number, False, None)
            for write in written:
                self._overwriting.rewrite(op, "not recorded", write)
            for write in past:
                self._overwriting.displace(op, write)
        if tape is None:
            return self._count(result)
        outputs = [tape.plain_value(tracked) for tracked in self.count_new(result)]
        outputs += [copy for write in (*written, *past) for copy in tape.copied(write)]
        if backward:
            tape.runs(current_node())
        call, temporaries = self.modules.current, self._room.temporaries
        tape.op(traits.name, inputs, outputs, call, seconds, backward, traits.random, temporaries)
        return result

    def count_new(self, result: Any) -> list[Tracked]:
        """Count what nothing will be recomputed from; returns the storages that are new."""
        keys = [tensor.untyped_storage()._cdata for tensor in tensors_in(result) if _has_storage(tensor)]
        new = [key for key in dict.fromkeys(keys) if key not in self._storages]
        self._count(result)
        return [self._storages[key] for key in new]

    def _reshape(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op such as `t_()` that turns the tensor itself: its bytes are the same, its window is another."""
        result = func(*args, **kwargs)
        tensor: Tensor = args[0]
        if not _has_storage(tensor):
            return result
        activation = self.ledger.current(tensor)
        if activation is not None and activation.weak is not None and activation.weak() is tensor:
            activation.window = window_of(tensor)
        self._overwriting.turned(tensor, f"{func} in {self.modules.current.describe()}")
        return result

    def make_room(self, nbytes: int, node: str) -> None:
        """Make room for what a node of the backward pass allocates out of sight, and count it.

        Raises:
            BudgetInfeasible: it does not fit.
        """
        self._room.make(nbytes, node, self.modules.current)
        self.ledger.note(nbytes)

    def backward_begins(self, graph_task: int) -> None:
        """Note that a backward pass is running, unless it is known."""
        if graph_task == self._graph_task:
            return
        self._graph_task = graph_task
        when_backward_ends(self._backward_ended)
        if not torch.is_grad_enabled():  # else what is computed now may be recomputed from what is there
            self._loose = True
            self.ledger.loosen()

    def _backward_ended(self) -> None:
        self._graph_task = -1
        self.cut()


def _has_storage(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return False
    return True


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
never_compile(Recorder._backward_ended)
