"""What the recorder asks of those who decide, make room and check: the runtime provides them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rekindle.record.activation import Activation, Op
from rekindle.record.modules import ModuleCall


class Keeper(Protocol):
    """Who decides what is kept, asked as the step runs."""

    makes: bool
    reads: bool

    def made(self, name: str, activation: Activation) -> bool:
        """Whether a new evictable activation becomes a checkpoint. Asked only if `makes`."""

    def read(self, made_in: ModuleCall, read_in: ModuleCall) -> bool:
        """Whether an activation becomes a checkpoint because this call reads it. Asked only if `reads`."""

    def before_write(self, activation: Activation, by: Op | None, saved: bool) -> None:
        """Called before an op writes over an activation, so that what is still needed of it can be saved. `saved` says
        that autograd will ask for what is there now."""


class Room(Protocol):
    """Who runs ops so that what they allocate fits."""

    watches: bool
    measures: bool
    hungry: set[str]
    seconds: float
    temporaries: int

    def rescue(
        self,
        error: torch.OutOfMemoryError,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        random: tuple[torch.Generator, Tensor] | None,
    ) -> Any:
        """Try an op again that ran out of memory, after making what room there is."""

    def run(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        call: ModuleCall,
        random: tuple[torch.Generator, Tensor] | None = None,
    ) -> Any:
        """Run an op, after making room for what it allocates."""

    def make(self, nbytes: int, func: Any, call: ModuleCall) -> None:
        """Make room for bytes that are allocated on behalf of an op."""


class Checksums(Protocol):
    """Who remembers what the bytes of activations were."""

    def take(self, activation: Activation, tensor: Tensor) -> None:
        """Remember what the bytes are now."""

    def compare(self, activation: Activation, tensor: Tensor, *, saved: bool = False) -> None:
        """See that the bytes are what they were."""
