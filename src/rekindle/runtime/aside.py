"""Backward passes that need not be watched, since one like them was.

Problem: in a backward pass the recorder does little but count bytes, and costs as much an op as in the forward pass.
Source: a step needs the bytes that an earlier one needed whose forward pass was as long, left as much, and found as
many gradients. Where the recorder steps aside, nodes run as in plain PyTorch, as they do after the `with` block.
Regime: where nothing but PyTorch's own formulas ran in the pass that was watched, at home and without a write over what
is wanted back, and no hooks are known, the whole pass runs without the recorder. Where anybody else's code may run
(hooks, custom functions), it steps aside node by node: for those that ask for what they saved and whose formulas are
PyTorch's own. Each step that might run out of memory is watched, for the recorder tries ops again that did.
Known gaps: what a hook does that runs after such a node, or that nobody knows of (on a tensor that is not saved, or on
a node) and that ran no op in the pass that was watched. One step in 61 is watched all the same.
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
        unattended: whether nothing was seen in its backward pass that always has to be.
        since: how many such steps were not watched since.
    """

    peak: int
    highest: int
    unattended: bool
    since: int = 0


class Aside:
    """Whether the recorder steps aside in the backward pass of the running step.

    Attributes:
        active: whether it does, node by node or as a whole.
        whole: whether the running backward pass is one that nobody has to watch at all.
        highest: the most bytes that are live in such a step; 0 if it is watched.
    """

    def __init__(
        self,
        ledger: Ledger,
        now: Callable[[], int],
        gradients: Callable[[], int],
        fits: Callable[[int], bool],
        unattended: Callable[[], bool],
    ) -> None:
        """`now()` is the number of the last recorded op, `gradients()` of elements that the gradients have,
        `fits(nbytes)` whether a step that needs so many surely does not run out of memory, and `unattended()` whether
        nothing is known that has to be seen in the backward pass."""
        self.active = self.whole = False
        self.highest = 0
        self._ledger = ledger
        self._now = now
        self._gradients = gradients
        self._fits = fits
        self._unattended = unattended
        self._known: dict[Hashable, _Watched] = {}
        self._kind: Hashable = None
        self._allowed = self._regular = False
        self._first = self._entry = 0

    def begin(self, allowed: bool) -> None:
        """A step begins, which has to be watched if it is not `allowed`."""
        self.active, self.whole, self.highest = False, False, 0
        self._kind = None
        self._allowed = self._regular = allowed
        self._first, self._entry = self._now(), self._ledger.live_nbytes

    def backward_begins(self) -> None:
        """Decide, when a backward pass is about to begin, whether the recorder steps aside in it."""
        self.active = self.whole = False
        if not self._allowed:
            return
        if self._kind is not None:  # a second one, of which the first step like this one may have had none
            self._regular = False
            return
        ledger = self._ledger
        before = ledger.live_nbytes - self._entry, ledger.peak_nbytes - self._entry
        self._kind = (self._now() - self._first, *before, self._gradients())
        known = self._known.get(self._kind)
        if known is None or not self._fits(known.highest):
            return
        known.since += 1
        if known.since % _EVERY == 0:
            return
        ledger.peak_nbytes = max(ledger.peak_nbytes, self._entry + known.peak)
        self.active, self.highest = True, known.highest
        self.whole = known.unattended and self._unattended()

    def stop(self) -> None:
        """Watch what is left of the step: it is another than those before."""
        self.active = self.whole = self._allowed = self._regular = False

    def ended(self, highest: Callable[[], int]) -> None:
        """Note what a step needed that went as it was meant to, if its one backward pass was watched; `highest()` is
        the most bytes that were live."""
        if self._kind is None or self.active or not self._regular:
            return
        if len(self._known) >= _MOST_KNOWN and self._kind not in self._known:
            del self._known[next(iter(self._known))]
        self._known[self._kind] = _Watched(self._ledger.peak_nbytes - self._entry, highest(), self._unattended())
