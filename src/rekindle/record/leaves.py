"""Leaves: values that no op of this forward made, and which nothing could bring back."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from rekindle.record.activation import Activation
from rekindle.record.aliasing import Ledger, Tracked, window_of
from rekindle.record.modules import ModuleStack
from rekindle.record.torch_private import alias

_LEAF = "a leaf"


def is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter and no subclass of one, which may be anything."""
    return type(tensor) is torch.nn.Parameter


class Leaves:
    """Makes the values of tensors that were there before an op read them.

    Attributes:
        stranger: whether a tensor was read, since this was set, that takes a gradient and is not known to belong to a
            module.
    """

    def __init__(self, ledger: Ledger, modules: ModuleStack) -> None:
        self.stranger = False
        self.is_parameter = is_parameter
        self._ledger = ledger
        self._modules = modules

    def of(self, tensor: Tensor, tracked: Tracked | None) -> Activation:
        """The value of a tensor, whose storage is known as `tracked`. It is held: by an alias, or if it is a parameter
        by its storage, which costs less.

        Raises:
            NotImplementedError, RuntimeError: it is quantised, or has no storage.
        """
        storage = tensor.untyped_storage()
        if tensor.is_quantized:
            raise NotImplementedError("quantised tensors are left alone")
        if tracked is None:
            tracked = self._ledger.track_leaf(tensor)
            assert tracked is not None
        if not (tracked.stays or self.stranger):
            source = tensor if tensor._base is None else tensor._base
            self.stranger = source.requires_grad and source.is_leaf
        is_parameter = self.is_parameter
        owner = tensor if is_parameter(tensor) else tensor._base
        if owner is not None and (owner is tensor or is_parameter(owner)) and not owner.is_inference():
            leaf = Activation(None, window_of(owner), storage.nbytes(), self._modules.outside, _LEAF)
            leaf.storage, leaf.version = storage, owner._version
            leaf.weak, leaf.home = weakref.ref(owner), owner.untyped_storage()._cdata
        else:
            leaf = Activation(None, window_of(tensor), storage.nbytes(), self._modules.current, _LEAF)
            if tensor.is_inference():
                leaf.held = tensor
            else:
                leaf.held = alias(tensor)
                leaf.version = tensor._version
                leaf.watch(tensor)
        tracked.owned, tracked.lent = None, weakref.ref(leaf)
        leaf.key, leaf.value_id = tracked.key, tracked.value_id
        return leaf

    def copy_of(self, tensor: Tensor) -> Activation:
        """The value of a running statistic: a copy, since training overwrites it without counting a version."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        leaf = Activation(None, window_of(copy), storage.nbytes(), self._modules.current, _LEAF)
        leaf.key = tensor.untyped_storage()._cdata
        leaf.held, leaf.version = copy, copy._version
        tracked = self._ledger.track(storage, None, leaf.nbytes)
        tracked.recomputed = True
        tracked.lend(leaf)
        return leaf
