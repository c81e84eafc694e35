"""The user's verbs for models in training loops they do not control."""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from rekindle._errors import RekindleError, SessionError
from rekindle.policy import PolicyLike
from rekindle.record.torch_private import calls_running, never_compile
from rekindle.runtime.session import Session

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(slots=True)
class _Applied:
    """A session, how many calls of its module are running (a module may call itself), and on which thread."""

    session: Session
    depth: int = 0
    thread: int = 0
    forget: weakref.finalize[[Session], torch.nn.Module] | None = None

    def end(self, error: BaseException | None = None) -> None:
        """End the step that the outermost call began."""
        self.depth = 0
        self.session.__exit__(type(error) if error is not None else None, error, None)


# The module itself gets no hook and no attribute, so that its pickles, copies and state_dict stay what they were.
_applied: weakref.WeakKeyDictionary[torch.nn.Module, _Applied] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


def apply(model: Model, policy: PolicyLike | None = None, **options: Any) -> Model:
    """Run every forward of `model` in a session of its own. Returns the same object.

    Each forward is a step; what it evicts is recomputed when the backward pass asks, wherever that is called. The
    model's type, parameters, hooks, `state_dict` and pickles are as before. `session_of(model)` is the session;
    `options` are those of `Session`.

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
    if applied.depth:
        applied.end()
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


def _forget(session: Session) -> None:
    """Take back the hooks of a model that was removed, or is gone."""
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
            applied.end(error)
        except RekindleError as better:
            if error is None:
                raise
            error.add_note(f"{type(better).__name__}: {better}")  # PyTorch raises the error of forward, not of hooks


never_compile(_enter)
never_compile(_leave)
