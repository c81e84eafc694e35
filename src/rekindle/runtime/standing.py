"""What stands while a step runs: parameters, gradients, buffers, inputs, and what an accelerator's allocator tells."""

from __future__ import annotations

import sys

import torch

from rekindle.record.aliasing import Ledger
from rekindle.record.modules import ModuleStack, gradient_of
from rekindle.record.torch_private import members_of
from rekindle.runtime.arrival import Arrival
from rekindle.runtime.pressure import AcceleratorReader


class Standing:
    """Sees to it that the ledger knows what was there before an op reads it, and says how full a step was with that."""

    def __init__(self, ledger: Ledger, modules: ModuleStack) -> None:
        self._ledger = ledger
        self._modules = modules
        self._told_before, self._uncounted_nbytes = sys.maxsize, 0

    def begin(self) -> None:
        """A step begins."""
        self._ledger.most_standing_nbytes = 0
        self._told_before = self._peak_told() or sys.maxsize

    def see(self, module: torch.nn.Module) -> int:
        """Know the bytes of parameters, gradients and buffers before an op reads them. Returns those that are new."""
        before = self._ledger.leaf_nbytes
        _, parameters, buffers = members_of(module)
        self._ledger.track_members(parameters)
        self._ledger.track_members(buffers)
        self._ledger.track_members(list(map(gradient_of, (*parameters, *buffers))))
        return self._ledger.leaf_nbytes - before

    def see_all(self) -> None:
        """The same for all modules that were called."""
        for root in list(self._modules.roots):
            self.see(root)

    def gradients(self) -> int:
        """How many elements the gradients have of the modules that were called."""
        parameters = [parameter for root in list(self._modules.roots) for parameter in members_of(root)[1]]
        return sum(gradient.numel() for gradient in map(gradient_of, parameters) if gradient is not None)

    def beside(self, arrival: Arrival) -> int:
        """Bytes that are there before a call, beside the parameters, gradients, buffers and arguments of its module."""
        parameters = list(arrival.module.parameters())
        gradients = [gradient for gradient in map(gradient_of, parameters) if gradient is not None]
        known = (*parameters, *gradients, *arrival.module.buffers(), *arrival.tensors)
        tracked = {found.key: found for tensor in known if (found := self._ledger.track_leaf(tensor)) is not None}
        return self._ledger.total_nbytes - sum(found.nbytes + found.leaf_nbytes for found in tracked.values())

    def surely_fits(self, nbytes: int) -> bool:
        """Whether a step that needs so many bytes will not run out of memory: an eighth more are there. On the CPU
        nothing could be done about it."""
        place = self._ledger.place
        if place is None:
            return True
        try:
            return nbytes + nbytes // 8 <= AcceleratorReader(place).limit()
        except (NotImplementedError, RuntimeError):  # a device that does not tell
            return False

    def highest(self, known: int) -> int:
        """The most bytes that were live in the step, what stood before it included. An accelerator's allocator tells
        them where they are more than ever before; in other steps what was not counted then is taken to be there too.
        Where not all was seen, it is what one like it needed, which is `known` then, and 0 else."""
        ledger, told = self._ledger, self._peak_told()
        ledger.look()
        counted = max(ledger.most_standing_nbytes, ledger.standing_nbytes) + ledger.peak_nbytes
        if told <= self._told_before:
            return known or counted + self._uncounted_nbytes
        if known:
            return told
        self._uncounted_nbytes = max(0, told - counted)
        return told

    def _peak_told(self) -> int:
        """The most bytes that were ever allocated on the accelerator; nobody sets that back, for the user may look at
        it too."""
        place = self._ledger.place
        return 0 if place is None else AcceleratorReader(place).peak()
