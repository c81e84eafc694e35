"""The CUDA stream that a step runs on, and what is used on others.

Problem: memory that was allocated on a stream is given out again as soon as it is freed, for kernels of that stream run
in order. A kernel of another stream may still be reading it. In plain PyTorch that goes well wherever autograd keeps
what such a kernel reads until the backward pass; a session lets go of it earlier, and recomputes it elsewhere.
Source: `Tensor.record_stream` and the notes on CUDA streams in PyTorch's documentation.
Regime: a step on one stream, which costs one look an op. What runs on others is kept, never recomputed; what it reads
is told to the allocator; and in the backward pass it waits for the stream on which values are recomputed.
Known gaps: streams of devices other than CUDA, of a second device, and kernels that no dispatcher sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from rekindle.record.torch_private import stream_number

ELSEWHERE = "made on another stream than the one that the step began on"


class Home:
    """The stream that a step began on, where its values are recomputed."""

    __slots__ = ("_device", "_number", "stream")

    def __init__(self) -> None:
        self.stream = torch.cuda.current_stream()
        self._device = self.stream.device
        self._number = stream_number(self._device.index)

    def is_left(self) -> bool:
        """Whether another stream is current now."""
        return stream_number(self._device.index) != self._number

    def lend(self, tensors: Iterable[torch.Tensor], wait: bool) -> None:
        """Have the bytes of tensors last until the stream that is current has read them, and with `wait` have it begin
        when what is running here is done."""
        current = torch.cuda.current_stream(self._device)
        if wait:
            current.wait_stream(self.stream)
        for tensor in tensors:
            if tensor.device == self._device:
                tensor.record_stream(current)

    def entered(self) -> AbstractContextManager[Any]:
        """Runs a block on it."""
        return torch.cuda.stream(self.stream) if self.is_left() else nullcontext()


def has_streams() -> bool:
    """Whether there is a device with streams."""
    return torch.cuda.is_available()


def find_home() -> Home | None:
    """The stream that is current; None where there are no streams, or nothing on them yet."""
    return Home() if torch.cuda.is_initialized() else None
