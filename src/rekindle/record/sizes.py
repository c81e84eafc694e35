"""How many bytes an op is going to allocate, told before it runs.

Problem: room for an op's results, and for the temporaries of its kernel, has to be made before it runs.
Source: shapes come from running the op on meta tensors, which hold no bytes (PyTorch's own shape functions), and what
kernels of the CPU take beside from `kernels`. Once an op has run, the allocator has reported what it really took.
Regime: exact from the second op of a signature on. For the first one results are exact where the op has a shape
function and a bound where their number depends on data; temporaries are a bound where the kernel is known, and else a
guess: as much as goes in and out. While another profiler is on nothing is measured, and an op that no session has
measured before is a first one.
Known gaps: what was measured on so many threads is taken to hold until the process ends. On accelerators the
temporaries of the first op of a signature are a guess, and on those other than CUDA of all that follow.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rekindle.record.kernels import LOOSE, NOTHING, nbytes_of, rnn_workspace, temporaries, tensors_of
from rekindle.record.schema import traits_of
from rekindle.record.torch_private import AllocatorWatch

_MOST_SIGNATURES = 16384
_MEASURED_DEVICES = ("cpu", "cuda", "meta")
_LOSSES = ("aten::mse_loss", "aten::smooth_l1_loss")
_WORKSPACES = ("aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward")
_SMALL = 512


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that an op allocates.

    Attributes:
        results: what stays when it returns.
        temporaries: what is gone by then.
        sure: it takes no more; if not, `temporaries` are a guess.
        loose: it may take much less.
    """

    results: int
    temporaries: int
    sure: bool = True
    loose: bool = False

    @property
    def nbytes(self) -> int:
        """The most it takes while it runs."""
        return self.results + self.temporaries

    @property
    def least(self) -> int:
        """What has to be there before it is tried."""
        return self.nbytes if self.sure and not self.loose else self.results


_SEEN: dict[int, dict[Any, Need]] = {}  # by the number of threads


class Sizes:
    """What ops need, by their signature: the op and the geometry of its arguments."""

    def __init__(self, shared: bool = False) -> None:
        """With `shared`, what is measured is known to all that share, for kernels take the same in each of them."""
        self._measured: dict[Any, Need] = _SEEN.setdefault(torch.get_num_threads(), {}) if shared else {}
        self._guessed: dict[Any, Need] = {}

    @staticmethod
    def signature(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What decides how much an op needs: the op, for which its traits stand since overloads hash in Python, and
        the geometry of its arguments."""
        traits = traits_of(func)
        return (traits, *map(_key, args), *map(_key, kwargs.values())) if kwargs else (traits, *map(_key, args))

    def measured(self, signature: Any) -> Need | None:
        """What an op of this signature needed when it ran; None if that is not known."""
        return self._measured.get(signature)

    def guess(self, signature: Any, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Need:
        """What an op is going to need."""
        guess = self._guessed.get(signature)
        if guess is None:
            guess = _guess(func, args, kwargs)
            _put(self._guessed, signature, guess)
        return guess

    def measure(
        self,
        signature: Any,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        run: Callable[[Any, Any, Any], Any] = lambda func, args, kwargs: func(*args, **kwargs),
    ) -> tuple[Any, Need]:
        """Run the op, by `run(func, args, kwargs)`, and remember what it needed. Returns its result and that, which is
        a guess if it could not be measured."""
        if not _can_measure(args, kwargs):
            return run(func, args, kwargs), Need(0, 0)
        with AllocatorWatch() as watch:
            result = run(func, args, kwargs)
        if not watch.worked:  # another profiler is on
            return result, self.guess(signature, func, args, kwargs)
        stays = max(0, watch.nbytes)
        results = min(stays, _stays(result)) if _on_accelerator(result) else stays
        need = Need(results, watch.peak_nbytes - stays)
        if not _by_data(func, args):
            _put(self._measured, signature, need)
            self._guessed.pop(signature, None)
        return result, need


def _on_accelerator(result: Any) -> bool:
    return any(tensor.device.type != "cpu" for tensor in tensors_of([result]))


def _stays(result: Any) -> int:
    """At most the bytes of results, by their storages, if they have any. Libraries allocate workspaces on an
    accelerator in the first op that needs one, and keep them: that is no more than once."""
    try:
        storages = [tensor.untyped_storage() for tensor in tensors_of([result])]
    except (NotImplementedError, RuntimeError):  # sparse, opaque layouts
        return sys.maxsize
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _put(table: dict[Any, Need], signature: Any, need: Need) -> None:
    if len(table) >= _MOST_SIGNATURES:
        table.clear()
    table[signature] = need


def _key(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.shape, arg.stride() if arg.layout is torch.strided else arg.layout, arg.dtype, arg.device
    if isinstance(arg, (list, tuple)):
        return tuple(map(_key, arg))
    if isinstance(arg, float):
        return None  # a learning rate, a scale: sizes hardly depend on it, and it changes with every step
    return arg if isinstance(arg, (int, str, bool, torch.dtype, torch.device)) else type(arg)


def _by_data(func: Any, args: Sequence[Any]) -> bool:
    """Whether how much comes out depends on what the arguments hold, so that no run tells of the next."""
    traits = traits_of(func)
    if torch.Tag.dynamic_output_shape not in getattr(func, "tags", ()):
        return False
    if not traits.check:
        return True
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_of(args[1:]))


def _can_measure(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    devices = {tensor.device.type for tensor in (*tensors_of(args), *tensors_of(kwargs.values()))}
    if device is not None:
        devices.add(torch.device(device).type)
    return devices.issubset(_MEASURED_DEVICES)


def _guess(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Need:
    tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
    read = sum(map(nbytes_of, tensors))
    results = _results(func, args, kwargs)
    if results is None:
        results = _upper_bound(func, args, read)
    if all(tensor.device.type == "cpu" for tensor in tensors):
        known = temporaries(func, args, kwargs, results)
        if known is not None:
            return Need(results, known, loose=_name(func) in LOOSE)
    elif _name(func) in NOTHING or torch.Tag.pointwise in getattr(func, "tags", ()):
        return Need(results, 0, False)
    return Need(results, read + results, False)


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return "" if schema is None else str(schema.name)


def _results(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Bytes of new storages the op returns, from its shape function; None if it has none."""
    if _by_data(func, args) or _name(func) in _WORKSPACES:
        return None
    storages: dict[int, torch.UntypedStorage] = {}
    try:
        metas = [_meta(arg, storages) for arg in args]
        known = {name: _meta(arg, storages) for name, arg in kwargs.items()}
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        if "device" in known or (takes_device and not storages):
            known["device"] = torch.device("meta")
        results = tensors_of([func(*metas, **known)])
        made = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in results}
    except Exception:  # no shape function, or one that wants data
        return None
    nbytes = sum(storage.nbytes() for key, storage in made.items() if key not in storages)
    if func._schema.name in _LOSSES:
        return max(nbytes, nbytes_of(args[0]))  # the kernel reduces in the storage of what it reduces
    return nbytes


def made_nbytes(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of the new storages that an op of the CPU returned on fake tensors. Where its kernel would return larger
    ones than the shape function says, they are made as large."""
    read = {tensor.untyped_storage()._cdata for tensor in (*tensors_of(args), *tensors_of(kwargs.values()))}
    made = [tensor for tensor in tensors_of([result]) if tensor.untyped_storage()._cdata not in read]
    if made and _name(func) in _LOSSES:
        made[0].untyped_storage().resize_(max(nbytes_of(made[0]), nbytes_of(args[0])))
    elif made and _name(func) == "aten::mkldnn_rnn_layer":
        made[-1].untyped_storage().resize_(rnn_workspace(args))
    return sum({(storage := tensor.untyped_storage())._cdata: storage.nbytes() for tensor in made}.values())


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
    """Bytes of results, for ops that have no shape function or whose results depend on data."""
    name, tensors = _name(func), tensors_of(args)
    if name == "aten::_local_scalar_dense":
        return 0
    if name == "aten::nonzero":
        return tensors[0].numel() * max(1, tensors[0].dim()) * 8 + _SMALL
    if name in ("aten::masked_select", "aten::index"):
        return _indexed(tensors)
    if name == "aten::_grouped_mm" and tensors[0].dim() == 2 and tensors[1].dim() == 3:
        return tensors[0].shape[0] * tensors[1].shape[-1] * tensors[0].itemsize + _SMALL
    if name == "aten::_grouped_mm" and len(tensors) > 2 and tensors[0].dim() == tensors[1].dim() == 2:
        return tensors[2].numel() * tensors[0].shape[0] * tensors[1].shape[-1] * tensors[0].itemsize + _SMALL
    if name == "aten::mkldnn_rnn_layer":
        x, states = tensors[0], tensors[2].shape[1]
        return x.shape[0] * x.shape[1] * states * 4 + 2 * x.shape[1] * states * 4 + rnn_workspace(args)
    if name == "aten::mkldnn_rnn_layer_backward":
        return 2 * sum(map(nbytes_of, tensors[:7]))
    return 2 * read


def _indexed(tensors: Sequence[torch.Tensor]) -> int:
    """At most as much as if every mask were true all over."""
    source, *indices = tensors
    masked = sum(index.dim() if index.dtype in (torch.bool, torch.uint8) else 1 for index in indices)
    rest = math.prod(source.shape[masked:]) if masked <= source.dim() else 1
    return max((index.numel() for index in indices), default=0) * max(1, rest) * source.itemsize + _SMALL
