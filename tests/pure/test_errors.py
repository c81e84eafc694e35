"""One tree of errors, and the drawing of it."""

from __future__ import annotations

import re

import pytest

import rekindle
from rekindle import RekindleError, _errors

ERRORS = {name: item for name, item in vars(_errors).items() if isinstance(item, type)}


def drawn() -> dict[str, str | None]:
    """The tree as the module draws it: each name, and the name that it hangs from."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (_errors.__doc__ or "").splitlines():
        found = re.match(r"(?P<branch>(?:[|` ](?:   |-- ))*)(?P<name>[A-Z]\w+)(?:  |$)", line)
        if found:
            depth = len(found["branch"]) // 4
            assert depth <= len(above), f"{line!r} hangs from nothing"
            above[depth:] = [found["name"]]
            parents[found["name"]] = above[depth - 1] if depth else None
    return parents


def test_the_drawing_is_the_tree() -> None:
    """The drawing at the top of the module names every class, each hanging from the one that it derives from."""
    bases = {name: error.__base__.__name__ for name, error in ERRORS.items() if error is not RekindleError}
    assert drawn() == {"RekindleError": None, **bases}


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_is_a_rekindle_error(name: str) -> None:
    """Whoever catches RekindleError catches all of them, and each can be named from the front door."""
    assert issubclass(ERRORS[name], RekindleError)
    assert getattr(rekindle, name) is ERRORS[name]


@pytest.mark.parametrize("name", sorted(ERRORS.keys() - {"RekindleError", "RehearsalWarning"}))
def test_every_error_is_also_one_that_python_knows(name: str) -> None:
    """Code that never heard of Rekindle can handle its errors: wrong arguments are ValueError, others RuntimeError."""
    about_arguments = {"BytesError", "PolicyError", "PressureError", "GraphError", "UnknownTensor"}
    assert issubclass(ERRORS[name], ValueError) == (name in about_arguments)
    assert issubclass(ERRORS[name], RuntimeError) == (name not in about_arguments)


def test_a_warning_is_one_that_python_knows() -> None:
    """What a session warns of can be filtered as a user's warning, and caught with the others once it is an error."""
    assert issubclass(ERRORS["RehearsalWarning"], UserWarning)


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_every_error_says_what_it_is(name: str) -> None:
    """Each class has a sentence of its own, and keeps the message it is given."""
    assert re.fullmatch(r"[A-Z].*\.", ERRORS[name].__doc__ or "", flags=re.DOTALL)
    assert str(ERRORS[name]("what to write instead")) == "what to write instead"
