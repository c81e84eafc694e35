"""A step on fake tensors: the graph that a recorded step gives, without memory for weights or activations, and
without the device.

Problem: a plan is wanted before anything is run for real: for a device that is not there, for a batch that may not fit.
Source: PyTorch's fake tensors run the same Python and the same dispatch as plain ones, down to the choice of kernels.
Regime: the same ops, values and demands as recorded for real on the CPU; `tests/models/test_rehearse.py` says for
which models, and what differs. Seconds are told by a roofline, temporaries by the bounds in `record.kernels`, which are
those of one thread.
Known gaps: steps that depend on data, such as routing tokens to experts, cannot be rehearsed, unless it is on integers
among the inputs. For an accelerator that is not there ops are those of the CPU but for attention and dropout,
temporaries of kernels are not known, and autocast is to be that of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from rekindle._errors import RehearsalError
from rekindle.graph import Graph
from rekindle.record.aliasing import Ledger, Window
from rekindle.record.cost import Cost, Device, find_device, seconds
from rekindle.record.fakes import AsOnCuda, FakeRecorder, FakeRoom, Fakes
from rekindle.record.modules import ModuleStack, gradient_of
from rekindle.record.recorder import DEFAULT_MIN_NBYTES
from rekindle.record.tape import Tape
from rekindle.record.torch_private import faking, no_modes
from rekindle.runtime.decide import Decisions
from rekindle.runtime.hooks import SavedTensors
from rekindle.runtime.replay import Replayer
from rekindle.runtime.snapshots import Snapshots
from rekindle.runtime.stats import Stats

Tensor = torch.Tensor
Loss = Callable[[Any], Tensor]


def rehearse(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: str | torch.device | None = None,
    cost: Literal["roofline"] | Cost = "roofline",
    loss: Loss | None = None,
    min_nbytes: int = DEFAULT_MIN_NBYTES,
) -> Graph:
    """The graph of one training step, forward and backward, without running it for real. It adds to the gradients that
    the model has, and makes those that it has not.

    The model is not touched: a copy of it runs, with fake tensors for its parameters and buffers. It may have been made
    on the meta device, and so may the inputs; if the model looks at what integers among these hold (an attention mask,
    say), they must be real. The random state stays as it is. What the model returned is let go of once the loss is
    computed. Call it outside of a session.

    Args:
        model: in the mode that it is trained in.
        args, kwargs: of its forward.
        device: where the step is to run: "cpu", "cuda", or a device that need not be there, such as "h100" (see
            `record.cost`). None for where the model is; for one on the meta device, the CPU.
        cost: where the seconds of ops come from: the device's roofline, or a function of the overload, its arguments,
            its keyword arguments and what it returned.
        loss: what the backward pass begins from, given what the model returned. Without it that is the loss among the
            outputs (the output itself, if it has one element), or else the sum of all floating outputs.
        min_nbytes: activations with fewer bytes are always kept.

    Raises:
        RehearsalError: the step depends on the content of tensors, or the model cannot be copied, or nothing is known
            about the device.
    """
    place = device if device is not None else _device_of(model)
    if cost == "roofline":
        known = find_device(place)
        kind = known.type
        cost = partial(_seconds, known)
    elif callable(cost):
        kind = "cpu" if str(place) == "cpu" else "cuda"
    else:
        raise RehearsalError(
            f'cost is {cost!r}, but in a rehearsal nothing runs that could be measured. Write cost="roofline", or a '
            "function of an op, its arguments, its keyword arguments and its result."
        )
    here = kind in ("cpu", str(torch.accelerator.current_accelerator(check_available=True)).partition(":")[0])
    fakes = Fakes(torch.device(kind if here else "cpu"), kind)
    try:
        copied, args, kwargs = fakes.copy((model, tuple(args), dict(kwargs or {})))
        fakes.copy_gradients(model, copied)
        with nullcontext() if here else AsOnCuda():
            graph = _Stage(fakes, cost, min_nbytes).play(copied, args, kwargs, loss or _loss_of)
    finally:
        fakes.forget()
    return replace(graph, values=tuple(replace(value, device=value.device and kind) for value in graph.values))


def _seconds(device: Device, func: Any, args: Any, kwargs: Any, result: Any) -> float:
    return seconds(func, args, kwargs, result, device)


def _device_of(model: torch.nn.Module) -> torch.device:
    tensor = next((tensor for tensor in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None or tensor.device.type == "meta" else tensor.device


class _Stage:
    """What a session is made of, for one step on fake tensors."""

    def __init__(self, fakes: Fakes, cost: Cost, min_nbytes: int) -> None:
        self._fakes = fakes
        stats = Stats()
        ledger = self._ledger = Ledger(lambda activation, nbytes: None)
        self._modules = ModuleStack(self._meet)
        room = FakeRoom(fakes, cost)
        snapshots = Snapshots(ledger, room, lambda: stats)
        decisions = Decisions(None, None, snapshots, stats)
        self._recorder = FakeRecorder(fakes, ledger, self._modules, decisions, room, min_nbytes, False)
        replayer = Replayer(ledger, room, lambda: stats, self._modules.name_of)
        self._saved_tensors = _FakeSavedTensors(fakes, self._recorder, replayer, decisions.saved, False)

    def play(self, model: torch.nn.Module, args: Any, kwargs: Any, loss: Loss) -> Graph:
        """Run a step. Returns its graph."""
        tape = self._recorder.tape = Tape(self._ledger)
        self._ledger.on_end = tape.died
        hooks = self._saved_tensors
        self._modules.open()
        try:
            with (
                no_modes(),
                faking(self._fakes.mode),
                torch.enable_grad(),
                torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack),
                self._recorder,
            ):
                loss(model(*args, **kwargs)).backward()
        finally:
            self._modules.close()
            self._ledger.on_end = None
        return tape.graph(self._modules.names())

    def _meet(self, module: torch.nn.Module) -> None:
        parameters = list(module.parameters())
        self._ledger.track_members((*parameters, *module.buffers(), *map(gradient_of, parameters)))


class _FakeSavedTensors(SavedTensors):
    """The hooks of a session, with the aliases and windows that fake tensors want."""

    def __init__(self, fakes: Fakes, *rest: Any) -> None:
        super().__init__(*rest)
        self._fakes = fakes

    def _alias(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def _look(self, base: Tensor, window: Window) -> Tensor:
        return self._fakes.look(base.untyped_storage(), window, base.device)


def _loss_of(outputs: Any) -> Tensor:
    """What the backward pass begins from, if nobody says: the loss among the outputs, or else the sum of all."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", outputs)
    if isinstance(found, Tensor) and found.numel() == 1 and found.requires_grad:
        return found
    sums = [tensor.sum() for tensor in _floating(outputs)]
    if not sums:
        raise RehearsalError(
            f"the model returned {type(outputs).__name__}, in which no floating tensor requires a gradient. Say what "
            "the loss is: loss=lambda outputs: ..."
        )
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def _floating(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() and tree.requires_grad else []
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in _floating(item)]
