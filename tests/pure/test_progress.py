"""The line that is shown while planning takes long: when it is, when it is not, and that it leaves nothing behind."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest
from rich.console import Console
from rich.live import Live

from rekindle.report import telling
from rekindle.report.progress import _Line

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
TEXT = "planning 1234 ops for 6.0 GiB"


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


class Broken(Terminal):
    """Cannot be written to."""

    def write(self, text: str) -> int:
        """Fail."""
        raise OSError("gone")


def console() -> tuple[Terminal, Console]:
    """A terminal of the usual kind, and what it was sent."""
    sent = Terminal()
    return sent, Console(file=sent, force_terminal=True, width=80, color_system=None, _environ={"TERM": "xterm"})


def wait_for(text: str, sent: Terminal) -> None:
    """Wait until it was sent, at most ten seconds."""
    end = time.monotonic() + 10
    while text not in sent.getvalue() and time.monotonic() < end:
        time.sleep(0.005)
    assert text in sent.getvalue()


def assert_ended(sent: Terminal, before: int) -> None:
    """The line is gone, the cursor is back, and so are the threads there were."""
    assert sent.getvalue().rindex(SHOW) > sent.getvalue().rindex(HIDE)
    assert "\x1b[2K" in sent.getvalue()
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.005)
    assert threading.active_count() == before


def test_shown_when_slow() -> None:
    """What takes longer than the delay is told, another text too, and the line goes at the end."""
    before, (sent, shown) = threading.active_count(), console()
    with telling(TEXT, delay=0.01, console=shown) as tell:
        wait_for(TEXT, sent)
        assert "0:00:0" in sent.getvalue()
        tell("batch of [64]")
        wait_for("batch of [64]", sent)
    assert_ended(sent, before)


def test_nothing_when_fast() -> None:
    """What ends before the delay sends nothing, then or later."""
    before, (sent, shown) = threading.active_count(), console()
    with telling(TEXT, delay=0.2, console=shown) as tell:
        tell("other")
    time.sleep(0.3)
    assert sent.getvalue() == ""
    assert threading.active_count() == before


def test_too_late() -> None:
    """A timer that fires when the work is done shows nothing."""
    sent, shown = console()
    line = _Line(shown, TEXT)
    line.hide()
    line.show()
    assert sent.getvalue() == ""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_pass(error: type[BaseException]) -> None:
    """What the block raises goes on as it is, and the line goes all the same."""
    before, (sent, shown) = threading.active_count(), console()
    mine = error("mine")

    def fail() -> None:
        with telling(TEXT, delay=0.01, console=shown):
            wait_for(TEXT, sent)
            raise mine

    with pytest.raises(error) as caught:
        fail()
    assert caught.value is mine
    assert_ended(sent, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda sent: Console(file=sent),
        lambda sent: Console(file=sent, force_terminal=True, _environ={"TERM": "dumb"}),
    ],
    ids=["file", "dumb"],
)
def test_no_terminal(make) -> None:
    """Nothing is sent to a file, or to a terminal that cannot move its cursor."""
    sent = io.StringIO()
    with telling(TEXT, delay=0, console=make(sent)):
        time.sleep(0.05)
    assert sent.getvalue() == ""


def test_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown on stderr, if that is a terminal, whatever the environment says of colours."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for stream, told in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with telling(TEXT, delay=0):
            if told:
                wait_for(TEXT, stream)
            time.sleep(0.05)
        assert (TEXT in stream.getvalue()) is told


@pytest.mark.parametrize("stream", [None, object()], ids=["none", "object"])
def test_no_stderr(stream: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stderr, or with one that is no file, the block runs."""
    monkeypatch.setattr(sys, "stderr", stream)
    with telling(TEXT, delay=0):
        time.sleep(0.02)


def test_another_display_on_the_console() -> None:
    """While a live display of somebody else runs on the same console the block runs, and that display goes on."""
    sent, shown = console()
    with Live("theirs", console=shown, refresh_per_second=20, transient=True) as live:
        with telling(TEXT, delay=0, console=shown):
            time.sleep(0.05)
        live.update("still theirs", refresh=True)
    assert "still theirs" in sent.getvalue()


def test_another_display_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one runs on another console of the same terminal, nothing is shown."""
    monkeypatch.setenv("TERM", "xterm")
    sent, shown = console()
    monkeypatch.setattr(sys, "stderr", sent)
    with Live("theirs", console=shown, transient=True), telling(TEXT, delay=0):
        time.sleep(0.1)
    assert TEXT not in sent.getvalue()


def test_broken_terminal() -> None:
    """A terminal that is gone ends no planning."""
    shown = Console(file=Broken(), force_terminal=True, _environ={"TERM": "xterm"})
    done = False
    with telling(TEXT, delay=0, console=shown) as tell:
        time.sleep(0.1)
        tell("other")
        done = True
    assert done
