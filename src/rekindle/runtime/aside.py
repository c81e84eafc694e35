"""Backward passes that need not be watched node by node, since one like them was.

Problem: in a backward pass the recorder does little but count bytes, and costs as much an op as in the forward pass.
Source: a step needs the bytes that an earlier one needed whose forward pass was as long, left as much, and found as
many gradients. Where the recorder steps aside, nodes run as in plain PyTorch, as they do after the `with` block.
Regime: nodes that ask for what they saved, and whose formulas are PyTorch's own: more than half of the ops of a
backward pass. Hooks, custom functions and the accumulation of gradients are always watched, for they may run anybody's
code. So is each step that might run out of memory, for the recorder tries ops again that did.
Known gaps: what a hook does that runs after such a node. One step in 61 is watched all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from rekindle.record.aliasing import Ledger

_EVERY = 61  # steps of a kind, of which one is watched; prime, to meet whatever is done every so many steps
_MOST_KNOWN = 64


@dataclass(slots=True)
class _Watched:
    """What is known of a kind of step.

    Attributes:
        peak: the most bytes that its ops had allocated, above what there was when it began.
        highest: the most bytes that were live, what stood before it included.
        since: how many such steps were not watched since.
    """

    peak: int
    highest: int
    since: int = 0


class Aside:
    """Whether the recorder steps aside in the backward pass of the running step.

    Attributes:
        active: whether it does, from the first node on that asks for something.
        highest: the most bytes that are live in such a step; 0 if it is watched.
    """

    def __init__(
        self, ledger: Ledger, now: Callable[[], int], gradients: Callable[[], int], fits: Callable[[int], bool]
    ) -> None:
        """`now()` is the number of the last recorded op, `gradients()` of elements that the gradients have, and
        `fits(nbytes)` whether a step that needs so many surely does not run out of memory."""
        self.active = False
        self.highest = 0
        self._ledger = ledger
        self._now = now
        self._gradients = gradients
        self._fits = fits
        self._known: dict[Hashable, _Watched] = {}
        self._kind: Hashable = None
        self._graph_task = -1
        self._allowed = self._regular = False
        self._first = self._entry = 0

    def begin(self, allowed: bool) -> None:
        """A step begins, which has to be watched if it is not `allowed`."""
        self.active, self.highest = False, 0
        self._kind, self._graph_task = None, -1
        self._allowed = self._regular = allowed
        self._first, self._entry = self._now(), self._ledger.live_nbytes

    def backward_begins(self, graph_task: int) -> bool:
        """Decide, when a backward pass first asks for something, whether the recorder steps aside in it."""
        if not self._allowed or graph_task == self._graph_task:
            return self.active
        self.active = False
        if self._kind is not None:  # a second one, of which the first step like this one may have had none
            self._regular = False
            return False
        ledger, self._graph_task = self._ledger, graph_task
        before = ledger.live_nbytes - self._entry, ledger.peak_nbytes - self._entry
        self._kind = (self._now() - self._first, *before, self._gradients())
        known = self._known.get(self._kind)
        if known is None or not self._fits(known.highest):
            return False
        known.since += 1
        if known.since % _EVERY == 0:
            return False
        ledger.peak_nbytes = max(ledger.peak_nbytes, self._entry + known.peak)
        self.active, self.highest = True, known.highest
        return True

    def stop(self) -> None:
        """Watch what is left of the step: it is another than those before."""
        self.active = self._allowed = self._regular = False

    def ended(self, highest: Callable[[], int]) -> None:
        """Note what a step needed that went as it was meant to, if its one backward pass was watched; `highest()` is
        the most bytes that were live."""
        if self._kind is None or self.active or not self._regular:
            return
        if len(self._known) >= _MOST_KNOWN and self._kind not in self._known:
            del self._known[next(iter(self._known))]
        self._known[self._kind] = _Watched(self._ledger.peak_nbytes - self._entry, highest())
