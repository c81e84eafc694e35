"""How many bytes an op is going to allocate, told before it runs.

Problem: room for an op's results, and for the temporaries of its kernel, has to be made before it runs.
Source: shapes come from running the op on meta tensors, which hold no bytes (PyTorch's own shape functions).
Temporaries come from the allocator's reports while the op runs for the first time with arguments of these shapes.
Regime: exact from the second op of a signature on. For the first one results are exact where the op has a shape
function, and temporaries are guessed: none for ops that work element by element, else as much as goes in and out.
Known gaps: temporaries are measured on the CPU only; on an accelerator its allocator's own peak would be needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rekindle.record.schema import traits_of
from rekindle.record.torch_private import AllocatorWatch

_MOST_SIGNATURES = 16384
_NO_TEMPORARIES = (torch.Tag.pointwise, torch.Tag.view_copy, torch.Tag.inplace_view)
_NO_TEMPORARY_OPS = frozenset(
    f"aten::{name}"
    for name in (
        *("mm", "bmm", "addmm", "cat", "sum", "mean", "amax", "clone", "_to_copy", "index_select", "gather", "scatter"),
        *("_softmax", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"),
        *(
            "embedding",
            "native_layer_norm",
            "_local_scalar_dense",
            "native_dropout",
            "copy_",
            "max_pool2d_with_indices",
        ),
        *("_scaled_dot_product_flash_attention_for_cpu", "zeros_like", "ones_like", "zeros", "ones", "full", "arange"),
    )
)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that an op allocates: `results` stay when it returns, `temporaries` are gone by then."""

    results: int
    temporaries: int

    @property
    def nbytes(self) -> int:
        """The most it takes while it runs."""
        return self.results + self.temporaries


class Sizes:
    """What ops need, by their signature: the op and the geometry of its arguments."""

    def __init__(self) -> None:
        self._measured: dict[Any, Need] = {}

    @staticmethod
    def signature(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What decides how much an op needs: the op and the geometry of its arguments."""
        return (func, *_key(args), *_key(kwargs.values()))

    def measured(self, signature: Any) -> Need | None:
        """What an op of this signature needed when it ran; None if that is not known."""
        return self._measured.get(signature)

    @staticmethod
    def guess(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Need:
        """What an op is going to need."""
        return _guess(func, args, kwargs)

    def measure(self, signature: Any, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Need]:
        """Run the op and remember what it needed. Returns its result and that; nothing if it could not be measured."""
        with AllocatorWatch() as watch:
            result = func(*args, **kwargs)
        need = Need(max(0, watch.nbytes), watch.peak_nbytes - max(0, watch.nbytes))
        if watch.worked:
            if len(self._measured) >= _MOST_SIGNATURES:
                self._measured.clear()
            self._measured[signature] = need
        return result, need


def _key(args: Any) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield (arg.shape, arg.stride() if arg.layout is torch.strided else arg.layout, arg.dtype, arg.device)
        elif isinstance(arg, (list, tuple)):
            yield tuple(_key(arg))
        elif isinstance(arg, float):
            yield None  # a learning rate, a scale: sizes hardly depend on it, and it changes with every step
        else:
            yield arg if isinstance(arg, (int, str, bool, torch.dtype, torch.device)) else type(arg)


def _guess(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Need:
    read = sum(_nbytes(tensor) for tensor in _tensors([*args, *kwargs.values()]))
    results = _results(func, args, kwargs)
    if results is None:
        return Need(_upper_bound(func, args, read), read)
    schema = getattr(func, "_schema", None)
    quiet = any(tag in _NO_TEMPORARIES for tag in getattr(func, "tags", ()))
    if schema is None or not (quiet or schema.name in _NO_TEMPORARY_OPS or traits_of(func).uninitialised):
        return Need(results, read + results)
    return Need(results, 0)


def _results(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Bytes of new storages the op returns, from its shape function; None if it has none."""
    storages: dict[int, torch.UntypedStorage] = {}
    try:
        metas = [_meta(arg, storages) for arg in args]
        known = {name: _meta(arg, storages) for name, arg in kwargs.items()}
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        if "device" in known or (takes_device and not storages):
            known["device"] = torch.device("meta")
        made = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in _tensors([func(*metas, **known)])
        }
    except Exception:  # no shape function, or one that wants data
        return None
    return sum(storage.nbytes() for key, storage in made.items() if key not in storages)


def _meta(arg: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(arg, torch.Tensor):
        meta = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
        storages[meta.untyped_storage()._cdata] = meta.untyped_storage()
        return meta
    if isinstance(arg, (list, tuple)):
        return [_meta(item, storages) for item in arg]
    if isinstance(arg, torch.Generator):
        return None  # shape functions draw nothing
    return torch.device("meta") if isinstance(arg, torch.device) else arg


def _upper_bound(func: Any, args: Sequence[Any], read: int) -> int:
    name = getattr(getattr(func, "_schema", None), "name", "")
    if name == "aten::_local_scalar_dense":
        return 0
    if name == "aten::nonzero":
        tensor: torch.Tensor = args[0]
        return tensor.numel() * tensor.dim() * 8
    return 2 * read


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    for item in tree:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)


def _nbytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.itemsize
