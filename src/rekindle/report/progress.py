"""A line that tells what takes so long, for as long as it does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.errors import LiveError
from rich.file_proxy import FileProxy
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from rekindle._bytes import format_bytes
from rekindle.graph import Graph

_DELAY = 1.0


@contextmanager
def telling(what: str, *, delay: float = _DELAY, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows `what`, and the time that has passed, while a block runs; what it yields takes another text.

    Nothing is shown in the first `delay` seconds, nor anything at all if stderr is no terminal or a live display of
    somebody else is on it. The line goes when the block ends.

    Args:
        what: plain text.
        delay: in seconds.
        console: where to show it, None for stderr.
    """
    console = _terminal() if console is None else console
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        yield lambda text: None
        return
    line = _Line(console, what)
    timer = threading.Timer(delay, line.show)
    timer.daemon = True
    timer.start()
    try:
        yield line.tell
    finally:
        timer.cancel()
        line.hide()


def planning(graph: Graph, budget: int) -> str:
    """What is told while a step is planned for a budget in bytes."""
    return f"planning {len(graph.ops)} ops for {format_bytes(budget)}"


class _Line:
    """Shown from the timer's thread, and not at all if that comes too late."""

    def __init__(self, console: Console, what: str) -> None:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
        self._progress = Progress(
            *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._task = self._progress.add_task(what, total=None)
        self._lock = threading.Lock()
        self._over = self._shown = False

    def show(self) -> None:
        with self._lock:
            if self._over:
                return
            with suppress(LiveError, OSError, ValueError):  # another display on this console, or a closed file
                self._progress.start()
                self._shown = True

    def tell(self, what: str) -> None:
        with suppress(OSError, ValueError):
            self._progress.update(self._task, description=what)

    def hide(self) -> None:
        with self._lock:
            self._over = True
            if self._shown:
                with suppress(OSError, ValueError):
                    self._progress.stop()


def _terminal() -> Console | None:
    """A console on stderr, if that is a terminal which is free."""
    stream = sys.stderr
    if stream is None or isinstance(stream, FileProxy):  # a live display of rich puts a proxy there
        return None
    try:
        return Console(file=stream, highlight=False) if stream.isatty() else None
    except (AttributeError, OSError, ValueError):
        return None
