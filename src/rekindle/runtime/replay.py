"""Recompute: repeat just the recorded ops that are needed, in their order, and keep no more than is wanted soon."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rekindle._errors import LeafModified, RecomputeError, RecomputeMismatch, RekindleError
from rekindle.graph import Turn
from rekindle.record.activation import Activation, Op, Ref, Scratch
from rekindle.record.aliasing import Ledger, look
from rekindle.record.schema import traits_of
from rekindle.record.seams import Checksums, Room
from rekindle.record.tape import Tape
from rekindle.record.torch_private import (
    at_recorded_level,
    conjugating,
    current_node,
    never_compile,
    without_dispatch_modes,
)
from rekindle.runtime.stats import Stats

Tensor = torch.Tensor


class Replayer:
    """Brings evicted activations back.

    Whatever a replay makes on its way that autograd still waits for in the same backward pass is retained until it is
    asked for, so that the values of one segment are recomputed once; everything else goes at once. The value asked for
    last stays as long as the same node asks: it may want both what an op read and what it made of that.
    """

    def __init__(self, ledger: Ledger, room: Room, stats: Callable[[], Stats], name_of: Callable[[int], str]) -> None:
        """`stats()` is where to count, `name_of(address)` the name of a parameter for error messages."""
        self.room = room
        self.checksums: Checksums | None = None
        self.tape: Tape | None = None
        self._ledger = ledger
        self._stats = stats
        self._name_of = name_of
        self._lock = threading.RLock()
        self._retained: list[weakref.ref[Activation]] = []
        self._leaving: weakref.ref[Activation] | None = None
        self._leaving_node = -1

    def bring_back(self, activation: Activation, graph_task: int, turn: Turn | None = None) -> Tensor:
        """The bytes of an activation: a tensor on its storage, alive or recomputed. `turn` is what a plan says of it.

        Raises:
            LeafModified: what it would be recomputed from was changed since the forward pass.
            RecomputeError: an op failed when it was repeated.
        """
        with self._lock:
            base = activation.base()
            if base is not None:
                return base
            stats, start = self._stats(), time.perf_counter()
            stats.recompute_calls += 1
            try:
                return self._recompute(activation, graph_task, turn, stats)
            except Exception:
                stats.failed_recomputes += 1
                raise
            finally:
                stats.replay_seconds += time.perf_counter() - start

    def leave(self, activation: Activation) -> None:
        """Let go of a recomputed copy, for which autograd has asked the last time, when its node wants no more."""
        with self._lock:
            self._let_go()
            self._leaving, self._leaving_node = weakref.ref(activation), current_node()

    def asked(self) -> None:
        """Note that autograd asks for something: what the node before had asked for can go."""
        if self._leaving is not None:
            with self._lock:
                if current_node() != self._leaving_node:
                    self._let_go()

    def _let_go(self) -> None:
        leaving, self._leaving = self._leaving, None
        activation = leaving() if leaving is not None else None
        if activation is not None:
            activation.release()

    def release_retained(self) -> None:
        """Let go of the recomputed copies that the backward pass, now over, did not ask for."""
        with self._lock:
            self._let_go()
            retained, self._retained = self._retained, []
            for reference in retained:
                activation = reference()
                if activation is not None and activation.retained:
                    activation.release()

    def _recompute(self, target: Activation, graph_task: int, turn: Turn | None, stats: Stats) -> Tensor:
        replay = _Replay(self, graph_task, turn)
        ops = replay.missing(target)
        self._let_go()
        with at_recorded_level(), without_dispatch_modes(), _at_home(ops):  # some convolutions put the modes back
            before = mode = torch.is_grad_enabled()
            try:
                for op in ops:
                    if op.grad_mode is not mode:
                        mode = op.grad_mode
                        torch.set_grad_enabled(mode)
                    replay.repeat(op, target)
                    stats.ops_replayed += 1
            finally:
                torch.set_grad_enabled(before)
        if replay.result is None:
            raise RecomputeError(f"{target.describe()} was not made when its op was repeated")
        return replay.result

    def lost(self, source: Activation, op: Op) -> LeafModified:
        """The error for a leaf that changed before `op` could be repeated."""
        what = self._name_of(source.key) or source.describe()
        return LeafModified(
            f"{op.func} in {op.call.describe()} must be recomputed, but {what}, which it read in the forward pass, was "
            "modified since by an in-place operation. Write to it (or step the optimizer) after backward() instead."
        )

    def retain(self, activation: Activation, base: Tensor, now: int) -> None:
        """Hold a recomputed copy until the running backward pass no longer wants it."""
        activation.weak = None  # what it knew is gone, or holds something else now
        activation.held, activation.version, activation.retained = base, base._version, True
        activation.last_use = now
        self._retained.append(weakref.ref(activation))

    def track(self, tensor: Tensor, activation: Activation | None) -> None:
        """Count the bytes of a recomputed copy."""
        storage = tensor.untyped_storage()
        tracked = self._ledger.storages.get(storage._cdata)
        if tracked is None:
            tracked = self._ledger.track(storage, None, storage.nbytes())
            tracked.recomputed = True
        if activation is not None:
            tracked.lend(activation)
            tracked.value_id = activation.value_id


class _Replay:
    """One recomputation on its way.

    Attributes:
        result: the bytes of what was asked for, once they are made.
        bases: bytes that ops to come will read: alive from the start, or made on the way. Held, so that nothing can
            evict them meanwhile.
        made: which of them were made on the way.
        uses: how many ops to come read each activation that has to be made.
    """

    __slots__ = ("bases", "graph_task", "made", "replayer", "result", "turn", "uses")

    def __init__(self, replayer: Replayer, graph_task: int, turn: Turn | None) -> None:
        self.replayer = replayer
        self.graph_task = graph_task
        self.turn = turn
        self.result: Tensor | None = None
        self.bases: dict[int, Tensor] = {}
        self.made: set[int] = set()
        self.uses: dict[int, int] = {}

    def missing(self, target: Activation) -> list[Op]:
        """The ops to repeat, in order."""
        missing = missing_ops(target)
        if missing.lost is not None:
            raise self.replayer.lost(*missing.lost)
        bases, uses = missing.bases, self.uses
        for op in missing.ops:
            for source in op.inputs:
                key = id(source)
                if key not in bases:
                    uses[key] = uses.get(key, 0) + 1
        self.bases = bases
        return missing.ops

    def repeat(self, op: Op, target: Activation) -> None:
        """Run one op again, keep what is wanted of what it makes, let go of what was read for the last time."""
        uses, made, turn = self.uses, self.made, self.turn
        for activation, base in self._run(op):
            key = id(activation)
            if uses.get(key):
                self.bases[key] = base
                made.add(key)
            if activation is target:
                self.result = base
            elif turn is not None:
                if activation.position not in turn.retained:
                    continue
            elif not activation.pending(self.graph_task):
                continue
            if self.graph_task != -1 and activation.base() is None:
                self.replayer.retain(activation, base, op.number)
        for source in op.inputs:
            key = id(source)
            if key in made:
                uses[key] -= 1
                if not uses[key]:
                    self.bases.pop(key, None)

    def _run(self, op: Op) -> list[tuple[Activation, Tensor]]:
        targets: dict[int, Tensor] = {}
        scratch: dict[int, Tensor] = {}
        sources = self.bases
        if op.writes:
            targets = {id(old): self._own_copy(old, op) for old, _ in op.writes if old is not None}
            sources = {**sources, **targets}
            if any(old is None for old, _ in op.writes):
                self.replayer.room.make(_scratch_nbytes([*op.args, *op.kwargs.values()]), op.func, op.call)
        args = [_resolve(arg, sources, scratch) for arg in op.args]
        kwargs = op.kwargs
        if kwargs:
            kwargs = {name: _resolve(arg, sources, scratch) for name, arg in kwargs.items()}
        for tensor in scratch.values():
            self.replayer.track(tensor, None)
        results = _flatten(_call(op, args, kwargs, self.replayer.room.run))
        if self.replayer.tape is not None:
            self.replayer.tape.repeated(op.number, self.replayer.room.seconds)
        found: list[tuple[Activation, Tensor]] = []
        for reference, tensor in zip(op.outputs, results, strict=True):
            if reference is None:
                continue
            activation = reference()
            self.replayer.track(tensor, activation)
            if activation is not None:
                _check(op, activation, tensor)
                found.append((activation, tensor))
        del results
        for slot, (old, new) in enumerate(op.writes):
            activation = new() if new is not None else None
            if activation is not None:
                tensor = targets[id(old)] if old is not None else scratch[slot]
                self.replayer.track(tensor, activation)
                found.append((activation, tensor))
        if self.replayer.checksums is not None:
            for activation, tensor in found:
                self.replayer.checksums.compare(activation, tensor)
        return found

    def _own_copy(self, old: Activation, op: Op) -> Tensor:
        """The bytes that an op will write over: a copy, unless this replay made them and nobody else wants them."""
        base = self.bases[id(old)]
        if id(old) in self.made and self.uses[id(old)] == 1 and old.held is not base:
            return base
        self.replayer.room.make(old.nbytes, op.func, op.call)
        copy = clone_storage(base)
        self.replayer.track(copy, None)
        return copy


@dataclass(slots=True)
class Missing:
    """What has to run again to bring an activation back.

    Attributes:
        ops: in their order, the op that made it included.
        bases: the live activations that they start from, by id.
        lost: a leaf that was changed since, and the op that read it: nothing can bring the activation back.
    """

    ops: list[Op]
    bases: dict[int, Tensor]
    lost: tuple[Activation, Op] | None = None


def missing_ops(target: Activation, most: int | None = None) -> Missing:
    """What has to run again if the bytes of `target` are not there; at most `most` ops of it, for an estimate."""
    ops: dict[int, Op] = {}
    missing = Missing([], {})
    stack = [target]
    while stack and (most is None or len(ops) < most):
        activation = stack.pop()
        op = activation.op
        assert op is not None
        if op.number in ops:
            continue
        ops[op.number] = op
        for guard in op.guards:
            if missing.lost is None and guard.broken():
                missing.lost = guard.leaf, op
        for source in op.inputs:
            if id(source) in missing.bases:
                continue
            base = source.base()
            if base is not None:
                missing.bases[id(source)] = base
            elif source.op is not None:
                stack.append(source)
            elif missing.lost is None:
                missing.lost = source, op
    missing.ops = [ops[number] for number in sorted(ops)]
    return missing


def _at_home(ops: list[Op]) -> AbstractContextManager[Any]:
    """Run a block on the stream that ops ran on. Those of another step are no part of the same replay."""
    home = ops[0].home
    return nullcontext() if home is None else home.entered()


def _call(op: Op, args: list[Any], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
    """Repeat an op through `run`, with the numbers that it drew."""
    try:
        if traits_of(op.func).conjugates:
            with conjugating():
                return run(op.func, args, kwargs, op.call)
        if op.random is None:
            return run(op.func, args, kwargs, op.call)
        generator, state = op.random
        before = generator.get_state()
        try:
            generator.set_state(state)
            return run(op.func, args, kwargs, op.call, op.random)
        finally:
            generator.set_state(before)
    except (RekindleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RecomputeError(
            f"{op.func} in {op.call.describe()} ran in the forward pass but failed when it was repeated: {error}"
        ) from error


def clone_storage(base: Tensor) -> Tensor:
    """A copy of the whole storage of `base`, through the same window. Call it at the recorded dispatch level."""
    storage = base.untyped_storage().clone()
    copy = torch.empty(0, dtype=base.dtype, device=base.device)
    return copy.set_(storage, base.storage_offset(), base.size(), base.stride())


def _resolve(arg: Any, sources: Mapping[int, Tensor], scratch: dict[int, Tensor]) -> Any:
    """A recorded argument as the op wants it. Not a closure that calls itself: such a cycle would hold the tensors."""
    if isinstance(arg, Ref):
        return look(sources[id(arg.activation)], arg.window)
    if isinstance(arg, list):
        return [_resolve(item, sources, scratch) for item in arg]
    if isinstance(arg, Scratch):
        tensor = torch.empty_strided(arg.size, arg.stride, dtype=arg.dtype, device=arg.device)
        if arg.slot >= 0:
            scratch[arg.slot] = tensor
        return tensor
    return arg


def _scratch_nbytes(args: list[Any]) -> int:
    """The bytes of the fresh tensors that an op will write all of."""
    nested = sum(_scratch_nbytes(arg) for arg in args if isinstance(arg, list))
    return nested + sum(math.prod(arg.size) * arg.dtype.itemsize for arg in args if isinstance(arg, Scratch))


def _flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in _flatten(item)]
    return []


def _check(op: Op, activation: Activation, tensor: Tensor) -> None:
    nbytes = tensor.untyped_storage().nbytes()
    if nbytes != activation.nbytes:
        raise RecomputeMismatch(
            f"{op.func} in {op.call.describe()} made {activation.nbytes} bytes in the forward pass and {nbytes} when "
            "it was repeated. Mark its result with session.mark(tensor) to keep it."
        )


never_compile(Replayer.release_retained)
