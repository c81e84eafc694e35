"""Text that every machine has: the sources of Python's own standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def library_text() -> Tensor:
    """The top-level modules of the standard library, one after the other in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    if not text:
        raise FileNotFoundError(f"this Python keeps no library sources in {folder}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, *, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of `text` and the same pieces one byte on, without end; the same ones for the same `seed`."""
    random = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context, (batch, 1), generator=random)
        pieces = text[starts + torch.arange(context + 1)].long()
        yield pieces[:, :-1], pieces[:, 1:]
