"""Checksums of activations, to find the op that does not repeat itself and the writer that nobody sees."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch

from rekindle._errors import RecomputeMismatch
from rekindle.record.activation import Activation
from rekindle.record.torch_private import at_recorded_level

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class _Sums:
    """One CRC-32 for each block of bytes of a storage."""

    blocks: tuple[int, ...]

    def first_difference(self, other: _Sums) -> int:
        """The number of the first block that differs."""
        pairs = enumerate(zip(self.blocks, other.blocks, strict=False))
        return next((number for number, (a, b) in pairs if a != b), min(len(self.blocks), len(other.blocks)))


class Checksums:
    """The checksum of each activation that may be recomputed, taken when it is made and compared when autograd saves
    it, when it is recomputed, and when autograd asks for it."""

    def take(self, activation: Activation, tensor: torch.Tensor) -> None:
        """Remember what the bytes are now, of what may be recomputed.

        Others may well be written by kernels that nobody sees: whoever makes an empty tensor has it filled.
        """
        if activation.op is not None:
            activation.sums = _sums_of(tensor)

    def compare(self, activation: Activation, tensor: torch.Tensor, *, saved: bool = False) -> None:
        """See that the bytes are what they were.

        Raises:
            RecomputeMismatch: they are not.
        """
        expected = activation.sums
        if not isinstance(expected, _Sums):
            return
        actual = _sums_of(tensor)
        if actual == expected:
            return
        op = activation.op
        what = f"{op.func} in {op.call.describe()}" if op is not None else activation.describe()
        item = torch.empty(0, dtype=activation.window[3]).itemsize
        first = expected.first_difference(actual) * _BLOCK // item
        last = min(first + max(1, _BLOCK // item), activation.nbytes // item) - 1
        cause = (
            "were changed since, by something that PyTorch's dispatcher does not show"
            if saved
            else "came out differently when it was repeated, so it is not deterministic, or something that PyTorch's "
            "dispatcher does not show wrote to them"
        )
        raise RecomputeMismatch(
            f"the bytes that {what} made ({activation.describe()}) {cause}. The first difference is among elements "
            f"{first} to {last} of {math.ceil(activation.nbytes / item)}. Mark its result with session.mark(tensor) to "
            "keep it."
        )


def _sums_of(tensor: torch.Tensor) -> _Sums:
    with at_recorded_level(), torch.no_grad():
        storage = tensor.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        data = flat.cpu().numpy().tobytes()
    return _Sums(tuple(zlib.crc32(data[start : start + _BLOCK]) for start in range(0, len(data), _BLOCK)))
