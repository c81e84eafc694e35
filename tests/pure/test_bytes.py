"""Amounts of memory as people write them."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paper import unhurried
from rekindle import BytesError
from rekindle._bytes import format_bytes, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("amount", "nbytes"),
    [
        (1, 1),
        (6 << 30, 6 << 30),
        ("8GiB", 8 << 30),
        ("8GB", 8 * 10**9),
        ("500 MB", 500_000_000),
        ("64MiB", 64 << 20),
        ("1 KiB", 1024),
        ("1 KB", 1000),
        ("2TiB", 2 << 40),
        ("2TB", 2 * 10**12),
        ("17B", 17),
        ("6gib", 6 << 30),
        ("6gb", 6 * 10**9),
        (" 1.5 GiB ", 3 << 29),
        (".5KiB", 512),
        ("1.001 KB", 1001),
        ("0.3 KiB", 307),
        ("9007199254740993B", 9007199254740993),
        ("9" * 400 + "B", 10**400 - 1),
    ],
)
def test_what_is_meant(amount: int | str, nbytes: int) -> None:
    """GiB is a power of two, GB a power of ten, fractions of a byte are dropped, and no digit is lost."""
    assert parse_bytes(amount) == nbytes


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ("8G", '"8GiB" .powers of two. or "8GB" .powers of ten.'),
        ("8 g", '"8GiB" .powers of two. or "8GB" .powers of ten.'),
        ("1.5k", '"1.5KiB" .powers of two. or "1.5KB" .powers of ten.'),
        ("12M", '"12MiB" .powers of two. or "12MB" .powers of ten.'),
        ("12b", '"12MiB" .powers of two. or "12MB" .powers of ten.'),
        ("12 bytes", '"12MiB" .powers of two. or "12MB" .powers of ten.'),
        ("12", 'Write it like "6GiB" or "500 MB"'),
        ("GiB", 'Write it like "6GiB" or "500 MB"'),
        ("", 'Write it like "6GiB" or "500 MB"'),
        ("-1GiB", 'Write it like "6GiB" or "500 MB"'),
        ("1,5 GiB", 'Write it like "6GiB" or "500 MB"'),
        ("1e3 MB", 'Write it like "6GiB" or "500 MB"'),
        (0, 'Write a positive amount such as "6GiB"'),
        (-5, 'Write a positive amount such as "6GiB"'),
        ("0GiB", 'Write a positive amount such as "6GiB"'),
        ("0.5B", 'Write a positive amount such as "6GiB"'),
        (True, 'Write a number of bytes or a string such as "6GiB"'),
        (None, 'Write a number of bytes or a string such as "6GiB"'),
        (6.0, 'Write a number of bytes or a string such as "6GiB"'),
        (b"6GiB", 'Write a number of bytes or a string such as "6GiB"'),
    ],
)
def test_what_is_refused(amount: object, message: str) -> None:
    """What could mean two things, or nothing, is refused with what to write instead, and the message quotes it."""
    with pytest.raises(BytesError, match=message) as caught:
        parse_bytes(amount)  # type: ignore[arg-type]
    assert repr(amount) in str(caught.value)


@pytest.mark.parametrize(
    ("amount", "meaning"),
    [
        (1, 1),
        ("6GiB", 6 << 30),
        ("500 MB", 500_000_000),
        (1.0, 1.0),
        (0.5, 0.5),
        (1e-9, 1e-9),
        ("auto", "auto"),
        (" Auto ", "auto"),
    ],
)
def test_budgets(amount: int | float | str, meaning: int | float | str) -> None:
    """A budget is an amount, a share of the device's memory (1.0 is all of it, 1 is a byte), or "auto"."""
    found = parse_budget(amount)
    assert (found, type(found)) == (meaning, type(meaning))


@pytest.mark.parametrize(
    ("amount", "first", "second"),
    [
        ("8G", '"8GiB"', '"8GB"'),
        ("64b", '"64MiB"', '"64MB"'),
        (1.5, '"1.5GiB"', "0.9"),
        (6e9, "6000000000", "0.9"),
        (0.0, '"6GiB"', "0.9"),
        (-0.5, '"6GiB"', "0.9"),
        (float("nan"), '"6GiB"', "0.9"),
        (float("inf"), '"6GiB"', "0.9"),
        (float("-inf"), '"6GiB"', "0.9"),
    ],
)
def test_budgets_that_are_refused(amount: float | str, first: str, second: str) -> None:
    """The message quotes what was written and names two spellings, and both of them work."""
    with pytest.raises(BytesError) as caught:
        parse_budget(amount)
    message = str(caught.value)
    assert message.startswith(repr(amount))
    for spelling in (first, second):
        assert spelling in message.partition("Write ")[2]
        assert parse_budget(ast.literal_eval(spelling))


@pytest.mark.parametrize("amount", [0, -5, True, None, "0GiB", "-1GiB", "half", "0.5", b"auto"])
def test_what_is_no_amount_is_no_budget(amount: object) -> None:
    """What is refused as an amount of memory is refused as a budget."""
    with pytest.raises(BytesError):
        parse_budget(amount)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 20, "1.0 MiB"),
        (6 << 30, "6.0 GiB"),
        (3 << 39, "1.5 TiB"),
        (5000 << 40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_what_is_shown(nbytes: float, text: str) -> None:
    """Amounts are shown in the largest unit that they fill, never as 1024 of a smaller one."""
    assert format_bytes(nbytes) == text


@unhurried
@given(st.integers(1, 2**50))
def test_what_is_shown_can_be_read(nbytes: int) -> None:
    """What is shown is read back as the amount it shows: at most half of its last digit away."""
    text = format_bytes(nbytes)
    unit = parse_bytes(f"1{text.split()[1]}")
    assert abs(parse_bytes(text) - nbytes) <= unit // 20 + 1


@unhurried
@given(st.text() | st.from_regex(r"\d{1,5}\.?\d{0,5} ?[KMGTkmgt]?i?[Bb]?", fullmatch=True))
def test_any_text(text: str) -> None:
    """Any text is a positive number of bytes or a BytesError, never another error."""
    try:
        nbytes = parse_bytes(text)
    except BytesError:
        return
    assert type(nbytes) is int
    assert nbytes > 0
