"""The user's verbs: for models in training loops they do not control, and for questions before anything is run."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from rekindle._bytes import Amount, format_bytes
from rekindle._errors import BudgetInfeasible, RekindleError, SessionError
from rekindle.graph import Graph, Plan
from rekindle.policy import Planner, PolicyLike, least_recompute
from rekindle.record.cost import DEVICES, Cost
from rekindle.record.torch_private import calls_running, never_compile
from rekindle.report import planning, telling
from rekindle.runtime.pressure import Budget, read_budget
from rekindle.runtime.rehearse import Loss, rehearse
from rekindle.runtime.session import Session

Model = TypeVar("Model", bound=torch.nn.Module)
_REHEARSING = "rehearsing the step"


@dataclass(slots=True)
class _Applied:
    """A session, how many calls of its module are running (a module may call itself), and on which thread."""

    session: Session
    depth: int = 0
    thread: int = 0
    forget: weakref.finalize[[Session], torch.nn.Module] | None = None

    def end(self) -> None:
        """End the step that the outermost call began."""
        self.depth = 0
        self.session.end()


# The module itself gets no hook and no attribute, so that its pickles, copies and state_dict stay what they were.
_applied: weakref.WeakKeyDictionary[torch.nn.Module, _Applied] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def apply(model: Model, policy: PolicyLike | None = None, **options: Any) -> Model:
    """Run every forward of `model` in a session of its own. Returns the same object.

    Each forward begins a step, which ends with its backward pass if the same thread calls that before the next forward
    with gradients. What runs between the two is not seen: let the model compute its loss, if it can. What was evicted
    is recomputed when a backward pass asks, wherever that is called. The model's type, parameters, hooks, `state_dict`
    and pickles are as before. `session_of(model)` is the session; `options` are those of `Session`.

    Raises:
        SessionError: `model` is applied already.
        PolicyError: `policy` is not a policy.
    """
    if model in _applied:
        raise SessionError(
            f"{type(model).__name__} is applied already, with {_applied[model].session!r}. Call rekindle.remove(model) "
            "first to apply it with another policy."
        )
    applied = _Applied(Session(policy, **options))
    if not _hooks:
        _hooks.append(register_module_forward_pre_hook(_enter))
        _hooks.append(register_module_forward_hook(_leave, always_call=True))
    applied.session.modules.attach()  # after our own hooks, so that it sees the call of the model itself
    applied.forget = weakref.finalize(model, _forget, applied.session)
    applied.forget.atexit = False
    _applied[model] = applied  # after the finalizer, which runs after this is gone then
    return model


def remove(model: Model) -> Model:
    """Undo `apply`. Returns the same object; what it already evicted is still recomputed when asked for.

    Raises:
        SessionError: `model` is not applied.
    """
    if model not in _applied:
        raise SessionError(f"{type(model).__name__} is not applied. Call rekindle.apply(model, policy=...) first.")
    applied = _applied.pop(model)
    assert applied.forget is not None
    applied.forget()
    return model


def session_of(model: torch.nn.Module) -> Session:
    """The session that `apply` made for `model`, for its statistics.

    Raises:
        SessionError: `model` is not applied.
    """
    if model not in _applied:
        raise SessionError(f"{type(model).__name__} is not applied. Call rekindle.apply(model, policy=...) first.")
    return _applied[model].session


def plan(
    model: torch.nn.Module,
    inputs: Any,
    *,
    memory_budget: Amount,
    headroom: int | str | None = None,
    device: str | torch.device | None = None,
    loss: Loss | None = None,
    cost: Literal["roofline"] | Cost = "roofline",
) -> Plan:
    """The plan with the least recomputation for one training step within a budget. Nothing is run for real.

    Neither weights nor inputs need memory: both may be on the meta device. The model is not touched. Gradients that it
    has are there in the planned step too, which adds to them; without, the step makes them. Call `zero_grad()` before,
    or allocate them, for the plan of the steps that you are going to run. `plan.forecast` tells the peak in bytes and
    what is recomputed in seconds; both are of the step that `rehearse` tells of.

    Args:
        model: in the mode that it is trained in.
        inputs: what it is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        memory_budget, headroom: as for `Session`. Shares and "auto" are of `device`.
        device: where the step is to run: "cpu", "cuda", or "a100", "h100", "h200", "rtx4090", which need not be there.
            None for where the model is.
        loss: from what the model returns to what the backward pass begins from; without it the loss among the outputs,
            or the sum of all.
        cost: "roofline" for seconds by the device's published rates, or a function of an op, its arguments, its keyword
            arguments and its result.

    Raises:
        BytesError: `memory_budget` or `headroom` is no amount of memory.
        RehearsalError: the step depends on the content of tensors, so it has to be recorded in a session.
        BudgetInfeasible: no plan fits.
    """
    budget = _budget(memory_budget, headroom, device)
    with telling(_REHEARSING) as tell:
        graph = _rehearse(model, inputs, device, loss, cost)
        tell(planning(graph, budget.nbytes))
        return least_recompute(graph, budget.nbytes)


def max_batch(
    make_inputs: Callable[[int], Any],
    model: torch.nn.Module,
    *,
    memory_budget: Amount,
    headroom: int | str | None = None,
    device: str | torch.device | None = None,
    loss: Loss | None = None,
    limit: int = 1 << 20,
) -> int:
    """The largest batch with which a training step of `model` fits into a budget, recomputing what it must.

    Nothing is run for real: steps of doubling, then of bisected sizes are rehearsed, which takes a few times as many
    seconds as one rehearsal. Kernels' temporaries are bounds on the CPU, so that a slightly larger batch may fit too.
    It fits with the plan for that budget (`Session(plan=...)`); the first step of a session without one decides as it
    goes, and may need more.

    Args:
        make_inputs: makes the inputs of a batch of that size, as for `plan`; on the meta device they cost nothing.
        model, memory_budget, headroom, device, loss: as for `plan`, gradients of the model included.
        limit: the largest batch to try.

    Raises:
        BudgetInfeasible: not even a batch of one fits.
        BytesError, RehearsalError: as for `plan`.
    """
    budget = _budget(memory_budget, headroom, device).nbytes

    with telling(_REHEARSING) as tell:

        def planner(batch: int) -> Planner:
            tell(f"planning a batch of {batch} for {format_bytes(budget)}")
            return Planner(_rehearse(model, make_inputs(batch), device, loss, "roofline"))

        return _largest(planner, budget, limit)


def _largest(planner: Callable[[int], Planner], budget: int, limit: int) -> int:
    first = planner(1)
    if not _fits(first, budget):
        raise BudgetInfeasible(
            f"memory_budget is {format_bytes(budget)}, but a batch of one needs {format_bytes(first.floor())} with all "
            "that can be recomputed. Make the budget larger, or the model or its inputs smaller."
        )
    fits, fails = 1, limit + 1
    while fits + 1 < fails:
        batch = min(2 * fits, limit) if fails > limit else (fits + fails) // 2
        if _fits(planner(batch), budget):
            fits = batch
        else:
            fails = batch
    return fits


def _fits(planner: Planner, budget: int) -> bool:
    return planner.full <= budget or planner.floor() <= budget


def _budget(memory_budget: Amount, headroom: int | str | None, device: str | torch.device | None) -> Budget:
    known = DEVICES.get(str(device).lower())
    return read_budget(memory_budget, headroom, total=known.nbytes if known is not None else None)


def _rehearse(
    model: torch.nn.Module,
    inputs: Any,
    device: str | torch.device | None,
    loss: Loss | None,
    cost: Literal["roofline"] | Cost,
) -> Graph:
    args, kwargs = (), {}  # type: tuple[Any, ...], dict[str, Any]
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    else:
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return rehearse(model, args, kwargs, device=device, cost=cost, loss=loss)


def _forget(session: Session) -> None:
    """End the step of a model that was removed, or is gone, and take back its hooks."""
    if not session.in_backward:  # its end ends the step, and a hook of it may have called `remove`
        session.end()
    session.modules.detach()
    if not _applied:
        while _hooks:
            _hooks.pop().remove()


def _enter(module: torch.nn.Module, args: Any) -> None:
    applied = None if torch.compiler.is_compiling() else _applied.get(module)
    if applied is None:
        return
    thread = threading.get_ident()
    if applied.depth and applied.thread == thread:
        applied.depth = min(applied.depth, calls_running(module) - 1)
        if not applied.depth:
            applied.end()  # a KeyboardInterrupt ended the last call, and PyTorch did not tell us
    if not applied.depth or applied.thread != thread:
        if applied.session.goes_on():
            return
        applied.session.__enter__()
        applied.thread = thread
    applied.depth += 1


def _leave(module: torch.nn.Module, args: Any, output: Any) -> None:
    applied = None if torch.compiler.is_compiling() else _applied.get(module)
    if applied is None or not applied.depth or applied.thread != threading.get_ident():
        return
    applied.depth -= 1
    if not applied.depth:
        error = sys.exc_info()[1] if output is None else None
        try:
            if error is None:
                applied.session.await_backward()
            else:
                applied.session.end(error)
        except RekindleError as better:
            if error is None:
                raise
            error.add_note(f"{type(better).__name__}: {better}")  # PyTorch raises the error of forward, not of hooks


never_compile(_enter)
never_compile(_leave)
