"""When the page of the full run is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import full_page


class Config(SimpleNamespace):
    """What is asked of pytest's configuration."""

    def getini(self, name: str) -> list[str]:
        """Where tests are by default."""
        return ["tests"]

    def getoption(self, name: str) -> str:
        """The device."""
        return str(self.device)


@pytest.mark.parametrize(
    ("other", "full"),
    [
        ({}, True),
        ({"args": ["tests/pure"]}, False),
        ({"option": SimpleNamespace(keyword="budget", markexpr="")}, False),
        ({"option": SimpleNamespace(keyword="", markexpr="not slow")}, False),
        ({"device": "cuda"}, False),
        ({"workerinput": {"workerid": "gw0"}}, False),
    ],
    ids=str,
)
def test_only_a_full_run(other: dict[str, Any], full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is of all tests, in full, on the CPU: no selection of them, nor the share of one of several processes,
    which does not know how the others went."""
    config: Any = Config(
        **{"args": ["tests"], "option": SimpleNamespace(keyword="", markexpr=""), "device": "cpu", **other}
    )
    monkeypatch.setenv("REKINDLE_TESTS", "full")
    assert full_page.is_full(config) is full
    monkeypatch.delenv("REKINDLE_TESTS")
    assert not full_page.is_full(config)
