"""How near the limit the session is: readers of memory, and levels that rise at once and fall with hysteresis."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rekindle._errors import PressureError

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Level(enum.IntEnum):
    """How near the limit the session is."""

    NONE = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3


class MemoryReader(Protocol):
    """Where the figures come from."""

    def used(self) -> int:
        """Bytes in use now."""

    def limit(self) -> int:
        """Bytes that may be in use."""


@dataclass(slots=True)
class FakeReader:
    """Says what it is told to: for tests, and to try out what a session does under pressure."""

    used_nbytes: int = 0
    limit_nbytes: int = 1 << 30

    def used(self) -> int:
        """What it was told."""
        return self.used_nbytes

    def limit(self) -> int:
        """What it was told."""
        return self.limit_nbytes


@dataclass(frozen=True, slots=True)
class LiveReader:
    """Reads Rekindle's own count of live bytes: on the CPU nobody else can tell whose memory is whose."""

    live: Callable[[], int]
    limit_nbytes: int

    def used(self) -> int:
        """Bytes of the tensors that the session has seen and that are alive."""
        return self.live()

    def limit(self) -> int:
        """The limit it was made with."""
        return self.limit_nbytes


@dataclass(frozen=True, slots=True)
class AcceleratorReader:
    """Reads the caching allocator of an accelerator.

    What it has reserved and not allocated can be allocated still, so it counts in the limit, not in what is used.
    """

    device: torch.device

    def used(self) -> int:
        """Bytes allocated on the device by this process."""
        return int(torch.accelerator.memory_allocated(self.device))

    def reserved(self) -> int:
        """Bytes that the allocator holds, allocated or ready to be."""
        return int(torch.accelerator.memory_reserved(self.device))

    def limit(self) -> int:
        """Bytes this process could have allocated: what it has reserved, and what is free on the device."""
        return self.reserved() + int(torch.accelerator.get_memory_info(self.device)[0])


def machine_memory() -> int:
    """Bytes that this process may have: the limit of its control group, or else the physical memory."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _CGROUP_LIMITS:
        try:
            limit = Path(name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(int(limit), physical)
    return physical


def default_reader(live: Callable[[], int], budget: int | None) -> MemoryReader:
    """The reader for this machine: of the accelerator if there is one and no budget, else of the live bytes `live()`,
    with the budget as the limit, or what the machine has."""
    if budget is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        return AcceleratorReader(device)
    return LiveReader(live, machine_memory() if budget is None else budget)


class Pressure:
    """Follows a reader through the levels.

    A level is entered as soon as its threshold is reached, and left only when use has fallen by the hysteresis below
    that threshold, so that it does not flap.

    Attributes:
        reader: where the figures come from.
        level: the level at the last look.
        thresholds: shares of the limit at which low, medium and high begin.
    """

    def __init__(
        self,
        reader: MemoryReader,
        thresholds: tuple[float, float, float] = (0.6, 0.75, 0.9),
        hysteresis: float = 0.05,
        on_change: Callable[[Level, Level], None] | None = None,
    ) -> None:
        """`on_change(before, now)` is called whenever the level changes.

        Raises:
            PressureError: the thresholds do not rise from above 0 to at most 1, or the hysteresis is not in [0, 0.5).
        """
        low, medium, high = thresholds
        if not 0 < low <= medium <= high <= 1:
            raise PressureError(
                f"thresholds are {thresholds!r}, but must rise and be in (0, 1]. Write (0.6, 0.75, 0.9)."
            )
        if not 0 <= hysteresis < 0.5:
            raise PressureError(f"hysteresis is {hysteresis!r}, but must be in [0, 0.5). Write 0.05.")
        self.reader = reader
        self.thresholds = thresholds
        self.level = Level.NONE
        self._hysteresis = hysteresis
        self._on_change = on_change

    def look(self, more: int = 0) -> tuple[Level, Level]:
        """Read the memory, with `more` bytes that are about to be used. Returns the level before and now."""
        before = self.level
        used, limit = self.reader.used() + more, self.reader.limit()
        share = used / limit if limit > 0 else 1.0
        level = Level(sum(share >= threshold for threshold in self.thresholds))
        for held in range(level + 1, before + 1):
            if share >= self.thresholds[held - 1] - self._hysteresis:
                level = Level(held)
        if level is not before:
            self.level = level
            if self._on_change is not None:
                self._on_change(before, level)
        return before, level
