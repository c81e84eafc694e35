"""What comes in: a call of an outermost module, and what decides how the step that it begins will go."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rekindle.record.kernels import tensors_of
from rekindle.record.modules import gradient_of
from rekindle.record.torch_private import arguments_of, members_of

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call of an outermost module.

    Attributes:
        module: which one.
        args, kwargs: what it was called with.
        signature: the module, its mode and the geometry of what it was called with: equal for steps whose forward
            passes run the same ops on the same sizes, unless these depend on the content of tensors.
        sure: whether nothing among the arguments is of a kind that says nothing of its sizes.
    """

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: Hashable
    sure: bool

    @classmethod
    def of(cls, module: torch.nn.Module) -> Arrival:
        """The call of a module that is about to run, from one of its global forward pre-hooks."""
        args, kwargs = arguments_of(module)
        unknown: list[type] = []
        geometry = _geometry((args, kwargs), unknown)
        return cls(module, args, kwargs, (weakref.ref(module), _mode_of(module), geometry), not unknown)

    @property
    def full_signature(self) -> Hashable:
        """The signature, and which parameters have gradients: the backward pass adds to those, and makes others."""
        return self.signature, tuple(gradient_of(parameter) is not None for parameter in self.module.parameters())

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the module was called with."""
        return tensors_of((*self.args, *self.kwargs.values()))


def _mode_of(module: torch.nn.Module) -> Hashable:
    """What of a module and of PyTorch changes which ops run, beside the arguments."""
    kinds = ("cpu", *([str(torch.accelerator.current_accelerator())] if torch.accelerator.is_available() else ()))
    casts = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in map(_type_of, kinds)]
    modules, parameters, _ = members_of(module)
    trained = tuple(parameter.requires_grad for parameter in parameters)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(casts),
        tuple(part.training for part in modules),
        trained if not all(trained) else len(trained),
    )


def _type_of(device: str) -> str:
    return device.partition(":")[0]


def _geometry(tree: Any, unknown: list[type]) -> Hashable:
    """What the sizes of a step follow from; `unknown` gets the types of what tells nothing."""
    if isinstance(tree, torch.Tensor):
        strides = tree.stride() if tree.layout is torch.strided else ()
        return type(tree), tuple(tree.shape), strides, tree.dtype, tree.device, tree.layout, tree.requires_grad
    if isinstance(tree, (list, tuple)):
        return type(tree), tuple(_geometry(item, unknown) for item in tree)
    if isinstance(tree, Mapping):
        return type(tree), tuple((str(name), _geometry(item, unknown)) for name, item in tree.items())
    if tree is None or isinstance(tree, _PLAIN):
        return type(tree), tree
    unknown.append(type(tree))
    return (type(tree),)
