"""Nodes of the backward pass that run without the recorder, since their formulas do otherwise under a dispatch mode.

Problem: what they allocate and return would be in no count, and on no paper.
Source: bounds on what their formulas allocate (`kernels.NODES`), read from PyTorch's own.
Regime: a node is known when it asks for what it saved, before it allocates anything, and its gradients when it ends.
Known gaps: a bound is the most that may be, not what is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rekindle.record.kernels import node_nbytes
from rekindle.record.schema import BRANCHING_NODES
from rekindle.record.torch_private import current_node, step_aside

if TYPE_CHECKING:
    from torch import Tensor

    from rekindle.record.recorder import Recorder


class UnseenNodes:
    """Counts what such nodes take, one after the other."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._running: tuple[int, str] | None = None  # its number and its name
        self._nbytes = 0

    def step_aside(self) -> str:
        """Have the running node do without the recorder if it is one of these. Returns its name if it does."""
        if node := step_aside(self._recorder, BRANCHING_NODES, self._ended):
            self._running, self._nbytes = (current_node(), node), 0
        running = self._running
        return running[1] if running is not None and running[0] == current_node() else ""

    def asks(self, node: str, saved: Tensor) -> None:
        """Make room for what the running node allocates, and count it. `saved` is what it asks for.

        Raises:
            BudgetInfeasible: it does not fit.
        """
        nbytes = node_nbytes(node, saved)
        self._recorder.make_room(nbytes, node)
        self._nbytes = max(self._nbytes, nbytes)

    def _ended(self, node: str, gradients: Any) -> None:
        """Know what the node returned, and write it down as one op."""
        self._running = None
        tape, call = self._recorder.tape, self._recorder.modules.current
        new = self._recorder.count_new(gradients)
        if tape is not None:
            temporaries = max(0, self._nbytes - sum(tracked.nbytes for tracked in new))
            tape.op(node, [], [tape.plain_value(tracked) for tracked in new], call, 0.0, True, False, temporaries)
