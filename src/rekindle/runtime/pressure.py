"""How near the limit the session is: readers of memory, and levels that rise at once and fall with hysteresis."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rekindle._bytes import Amount, format_bytes, parse_budget, parse_bytes
from rekindle._errors import BytesError, PressureError

_MEMINFO = "/proc/meminfo"
_AUTO = 20  # "auto" leaves this fraction of what is free for what nobody can see
_CGROUP_USAGES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
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

    def peak(self) -> int:
        """The most bytes that this process ever had allocated on the device, or since somebody set that back."""
        return int(torch.accelerator.max_memory_allocated(self.device))

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
        limit = _read(name).strip()
        if limit.isdigit():
            return min(int(limit), physical)
    return physical


def free_memory() -> int:
    """Bytes that this process could allocate now: of the accelerator, if there is one, else of the machine, within the
    limit of its control group."""
    device = _accelerator()
    if device is not None:
        reader = AcceleratorReader(device)
        return reader.limit() - reader.used()
    free = machine_memory()
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(_MEMINFO), re.MULTILINE)
    if found is not None:
        free = int(found[1]) << 10
    for limit, usage in zip(_CGROUP_LIMITS, _CGROUP_USAGES, strict=True):
        most, used = _read(limit).strip(), _read(usage).strip()
        if most.isdigit() and used.isdigit():
            free = min(free, max(0, int(most) - int(used)))
    return free


@dataclass(frozen=True, slots=True)
class Budget:
    """A memory budget as it was understood.

    Attributes:
        nbytes: the most bytes that may be live.
        stated: what the user wrote.
        meaning: what that was taken to mean.
    """

    nbytes: int
    stated: Amount
    meaning: str

    def __str__(self) -> str:
        return f"{self.stated!r}: {self.meaning}"


def read_budget(stated: Amount, headroom: int | str | None = None, *, total: int | None = None) -> Budget:
    """The budget that a user stated, in bytes.

    Args:
        stated: bytes, a string such as "6GiB", a float in (0, 1] for a share of the device's memory, or "auto" for what
            is free now, besides what this process has allocated on the accelerator already.
        headroom: kept back from it. Without it, "auto" keeps a twentieth back and the others nothing.
        total: the device's memory, if it is not the one that is here.

    Raises:
        BytesError: `stated` or `headroom` is no amount of memory, or nothing is left.
    """
    amount = parse_budget(stated)
    back = parse_bytes(headroom) if headroom else 0
    if amount == "auto":
        free, taken = (free_memory(), _allocated()) if total is None else (total, 0)
        back = free // _AUTO if headroom is None else back
        nbytes, meaning = free + taken, f"{format_bytes(free)} free now"
        if taken:
            meaning += f" and {format_bytes(taken)} allocated already"
    elif isinstance(amount, float):
        whole = device_memory() if total is None else total
        nbytes, meaning = int(amount * whole), f"{amount:.0%} of {format_bytes(whole)}"
    else:
        assert isinstance(amount, int)
        nbytes, meaning = amount, format_bytes(amount)
    if back >= nbytes:
        raise BytesError(
            f"headroom {format_bytes(back)} leaves nothing of memory_budget {stated!r} ({meaning}). Write a larger "
            f"budget, or a smaller headroom such as headroom={nbytes // _AUTO}."
        )
    if back:
        meaning += f", less {format_bytes(back)} headroom: {format_bytes(nbytes - back)}"
    elif meaning != format_bytes(nbytes):
        meaning += f": {format_bytes(nbytes)}"
    return Budget(nbytes - back, stated, meaning)


def device_memory() -> int:
    """Bytes of the accelerator, if there is one, else of the machine."""
    device = _accelerator()
    return machine_memory() if device is None else int(torch.accelerator.get_memory_info(device)[1])


def _allocated() -> int:
    device = _accelerator()
    return 0 if device is None else AcceleratorReader(device).used()


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _read(name: str) -> str:
    try:
        return Path(name).read_text()
    except OSError:
        return ""


def default_reader(live: Callable[[], int], budget: int | None) -> MemoryReader:
    """The reader for this machine: of the accelerator if there is one and no budget, else of the live bytes `live()`,
    with the budget as the limit, or what the machine has."""
    device = _accelerator()
    if budget is None and device is not None:
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
