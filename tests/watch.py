"""What the tests see of Rekindle's inside: the ops it repeats, and which of its objects are alive."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import rekindle
from rekindle.record.activation import Op
from rekindle.runtime import replay
from rekindle.runtime.hooks import Handle, Saved


def log_replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each op that is replayed from now on, such as "mm" or "add_"."""
    log: list[str] = []
    call = replay._call

    def spy(op, args, kwargs, run):
        log.append(op.func.overloadpacket.__name__)
        return call(op, args, kwargs, run)

    monkeypatch.setattr(replay, "_call", spy)
    return log


def living() -> Counter[str]:
    """How many objects of Rekindle's records exist now, without collecting cycles first: there must be none."""
    kinds = (rekindle.Activation, Op, Handle, Saved)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds)


def living_tensors() -> int:
    """How many tensors exist in the process now, without collecting cycles first."""
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def modes() -> int:
    """How many dispatch modes are active on this thread."""
    return len(_get_current_dispatch_mode_stack())
