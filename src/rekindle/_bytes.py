"""Amounts of memory: "8GiB" to a number of bytes, and back."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Literal, TypeAlias

from rekindle._errors import BytesError

Amount: TypeAlias = "int | float | str"
"""Memory as users state it: bytes, a string such as "6GiB", a share in (0, 1], or "auto"."""

_UNITS: dict[str, int] = {
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    "B": 1,
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*")


def parse_bytes(amount: int | str) -> int:
    """A number of bytes, from an int or from a string such as "6GiB" (powers of two) or "500 MB" (powers of ten).

    Raises:
        BytesError: it is no positive amount, or a bare unit such as "8G" does not say which power is meant.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | str):
        raise BytesError(f'{amount!r} is not an amount of memory. Write a number of bytes or a string such as "6GiB".')
    nbytes = amount if isinstance(amount, int) else _parse(amount)
    if nbytes <= 0:
        raise BytesError(f'{amount!r} is no memory at all. Write a positive amount such as "6GiB".')
    return nbytes


def parse_budget(amount: Amount) -> int | float | Literal["auto"]:
    """A budget: a number of bytes as `parse_bytes` knows it, a share of a device's memory in (0, 1] as a float, or
    "auto".

    Raises:
        BytesError: it is neither; the message says what to write instead.
    """
    if isinstance(amount, str) and amount.strip().lower() == "auto":
        return "auto"
    if not isinstance(amount, float):
        return parse_bytes(amount)
    if 0 < amount <= 1:
        return amount
    if not math.isfinite(amount) or amount <= 0:
        raise BytesError(
            f'{amount!r} is no memory at all. Write an amount such as "6GiB", or a share such as 0.9 of the memory of '
            "the device."
        )
    meant = f'"{amount:g}GiB"' if amount < 1 << 20 else f"{int(amount)} (a whole number of bytes)"
    raise BytesError(
        f"{amount!r} is no share of the device's memory: shares are in (0, 1]. Write an amount such as {meant}, or a "
        "share such as 0.9."
    )


def format_bytes(nbytes: float) -> str:
    """The same, readable: `format_bytes(6 << 30)` is "6.0 GiB"."""
    if not math.isfinite(nbytes):
        return str(nbytes)
    size, unit = abs(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if round(size, 1) < 1024:
            break
        size, unit = size / 1024, larger
    sign = "-" if nbytes < 0 else ""
    return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"


def _parse(text: str) -> int:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise BytesError(f'{text!r} is not an amount of memory. Write it like "6GiB" or "500 MB".')
    number, unit = match.groups()
    known = {name.lower(): name for name in _UNITS}.get(unit.lower())
    if known is None or (known == "B" and unit != "B"):
        prefix = unit[0].upper() if unit[0].upper() in "KMGT" else "M"
        raise BytesError(
            f'{text!r} does not say which unit is meant. Write "{number}{prefix}iB" (powers of two) or '
            f'"{number}{prefix}B" (powers of ten).'
        )
    return math.floor(Fraction(number) * _UNITS[known])  # a float would lose a byte of 1.001 KB
