"""What the kernels of the CPU allocate for themselves while they run, beside their results.

Problem: room for a kernel's temporaries has to be made before it has run even once.
Source: the allocator's reports on torch 2.13 with oneDNN; where they depend on how a library cuts its work, a bound a
little above what was seen. `tests/eager/test_sizes.py` runs each op below and holds the bound to the allocator.
Regime: upper bounds, exact for ops that take nothing and for copies that a kernel makes of its arguments.
Known gaps: an op that is not below is unknown, and `temporaries` says so with None. A bound for convolutions holds for
whatever oneDNN chooses, and so is up to twice what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch

from rekindle.record.schema import traits_of

Tensor = torch.Tensor

_TAGS = (torch.Tag.pointwise, torch.Tag.view_copy, torch.Tag.inplace_view)
_LOW = (torch.bfloat16, torch.float16)
_TILE = 60 * 60  # elements; copies that transpose go through a tile of this size
_CHANNELS = 16  # which oneDNN keeps together
_SCRATCHPAD = 1 << 16  # bytes; what oneDNN takes for a matrix product whatever its size

NOTHING = frozenset(
    f"aten::{name}"
    for name in (
        *("all", "amax", "aminmax", "amin", "any", "arange", "argmax", "argmin", "eye", "flip", "full", "full_like"),
        *("bernoulli_", "constant_pad_nd", "gather", "index_add_", "index_select"),
        *("linspace", "max", "min", "masked_fill_", "masked_fill", "max_pool2d_with_indices", "new_full", "new_ones"),
        *("new_zeros", "nll_loss2d_backward", "nll_loss2d_forward", "nll_loss_backward", "nll_loss_forward"),
        *("normal_", "ones", "ones_like", "rand", "randint", "randn", "roll", "select_backward", "slice_backward"),
        *("scatter_", "scatter_add", "slice_scatter", "stack", "topk", "tril", "triu", "uniform_", "zeros"),
        *("zeros_like", "_local_scalar_dense", "_log_softmax", "_log_softmax_backward_data", "_softmax"),
        *("_unsafe_view", "_grouped_mm", "fill_", "zero_", "avg_pool2d", "avg_pool2d_backward"),
    )
)
"""Ops that allocate nothing but their results, when their arguments are contiguous."""


def temporaries(func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: int) -> int | None:
    """At most how many bytes the CPU kernel allocates and frees again, None if nobody knows.

    `results` are the bytes that it returns.
    """
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    tensors = [*tensors_of(args), *tensors_of(kwargs.values())]
    name = schema.name
    bound = _BOUNDS.get(name)
    if bound is not None:
        return bound(tensors, (*args, *kwargs.values()), results)
    if name in NOTHING or traits_of(func).uninitialised:
        return _copies(tensors)
    if any(tag in _TAGS for tag in func.tags):
        return _casts(tensors, results)
    return None


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among arguments, in order."""
    found: list[Tensor] = []
    for item in tree:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found += tensors_of(item)
    return found


def nbytes_of(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor, each counted once for each place that shows it."""
    return math.prod(tensor.shape) * tensor.itemsize


def _copies(tensors: Sequence[Tensor]) -> int:
    """Kernels that want contiguous arguments make them so."""
    return sum(nbytes_of(tensor) for tensor in tensors if not tensor.is_contiguous())


def _casts(tensors: Sequence[Tensor], results: int) -> int:
    """Arguments of other types than the one that is computed in are converted first."""
    types = {tensor.dtype for tensor in tensors}
    common = reduce(torch.promote_types, types) if types else torch.float32
    if not common.is_floating_point and not common.is_complex:
        if results == max(map(nbytes_of, tensors)):
            return 0  # integers remain integers
        common = torch.promote_types(common, torch.get_default_dtype())  # as division does, and `exp` of an integer
    wider = sum(tensor.numel() for tensor in tensors if tensor.dtype is not common and tensor.dim()) * common.itemsize
    return wider + (common.itemsize if wider else 0)


def _transposes(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    if not any(not tensor.is_contiguous() for tensor in tensors):
        return 0
    return max((min(tensor.numel(), _TILE) * 8 for tensor in tensors), default=0)


def _cat(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return _casts(tensors, results)


def _where(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return _casts(tensors[1:], results)


def _index(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """A mask becomes the positions where it is true."""
    masks = [tensor for tensor in tensors[1:] if tensor.dtype in (torch.bool, torch.uint8)]
    return sum(tensor.numel() * max(1, tensor.dim()) * 8 for tensor in masks) + _copies(tensors[1:])


def _embedding(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return _copies(tensors)


def _reduction(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """Sums and means of other types than the result's are converted first; means of short floats are taken in long."""
    first = tensors[0]
    return (0 if first.dtype is torch.float32 else first.numel() * 8) + 2 * results


def _sum(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    first = tensors[0]
    dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), None)
    exact = first.dtype.is_floating_point and dtype in (None, first.dtype)
    return 0 if exact else first.numel() * 8


def _cumulative(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return results + _copies(tensors)


def _product(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """Products of short floats are reordered by oneDNN and added up in long ones; those of others read strides."""
    first = tensors[0]
    odd = sum(nbytes_of(tensor) for tensor in tensors if not _by_blas(tensor))
    if first.dtype not in _LOW:
        return odd
    return sum(map(nbytes_of, tensors)) + 2 * results + _SCRATCHPAD


def _by_blas(tensor: Tensor) -> bool:
    """Whether BLAS reads a matrix as it lies: one of its last two strides is 1 and the other no shorter than a row."""
    if tensor.dim() < 2:
        return True
    (rows, columns), (row, column) = tensor.shape[-2:], tensor.stride()[-2:]
    return (column == 1 and row >= columns) or (row == 1 and column >= rows) or 1 in (rows, columns)


def _softmax_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return results + _copies(tensors)


def _safe_softmax(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """A mask of what is minus infinity, and one of the rows that are nothing else."""
    return tensors[0].numel() + 2 * tensors[0].numel() // max(1, tensors[0].shape[-1]) + 64


def _layer_norm(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return _copies(tensors)


def _layer_norm_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    row: int = math.prod(args[2])
    return _copies(tensors) + 2 * torch.get_num_threads() * row * 8


def _group_norm_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return _copies(tensors) + 16 * tensors[0].shape[0] * tensors[0].shape[1]


def _batch_norm(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return 32 * tensors[0].shape[1]


def _batch_norm_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return nbytes_of(tensors[0]) + 32 * tensors[0].shape[1]


def _dropout(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """The mask is converted to the type of what it multiplies."""
    return nbytes_of(tensors[0]) + 16


def _elementwise_loss(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return 3 * nbytes_of(tensors[0]) + 64


def _attention(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """Each thread works on one block of the scores."""
    query, key = tensors[:2]
    rows, block = _blocks(query, key)
    floats = rows * block + 2 * rows + rows * query.shape[-1]
    return torch.get_num_threads() * (floats * 4 + (rows * block * 2 if query.dtype in _LOW else 0))


def _attention_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    grad, query, key = tensors[:3]
    rows, block = _blocks(query, key)
    scores = torch.get_num_threads() * rows * block * (12 if query.dtype in _LOW else 8)
    return scores + 3 * max(nbytes_of(grad), nbytes_of(query)) + 4 * math.prod(query.shape[:-1])


def _blocks(query: Tensor, key: Tensor) -> tuple[int, int]:
    length = query.shape[-2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return rows, min(512, key.shape[-2])


def _convolution(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    x, weight = tensors[:2]
    out = results // x.itemsize
    if not args[6] and _unfolds(x, weight):
        return _blocked(x) + results + _blocked_weight(weight) + _unfolded(x, weight, out // weight.shape[0])
    channels = weight.shape[1] * args[8] if args[6] else weight.shape[0]
    made = _round(channels) * (out // max(1, channels)) * _width(x)
    read = _blocked(x) if x.shape[1] >= _CHANNELS else x.numel() * _width(x)
    return read + (2 if args[6] else 1) * made + _blocked_weight(weight) + _SCRATCHPAD // 8


def _convolution_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    grad, x, weight = tensors[:3]
    read = _blocked(x) if x.shape[1] >= _CHANNELS or args[10][0] else x.numel() * _width(x)
    reordered = read + 2 * _blocked(grad) + _blocked_weight(weight)
    unfolded = _unfolded(x, weight, grad.numel() // grad.shape[1]) if _unfolds(x, weight) else 0
    return reordered + reordered // 8 + unfolded + _SCRATCHPAD // 8


def _round(channels: int) -> int:
    return -(-channels // _CHANNELS) * _CHANNELS


def _width(tensor: Tensor) -> int:
    return max(4, tensor.itemsize)  # sums of short floats are long


def _blocked(tensor: Tensor) -> int:
    """Bytes in oneDNN's layout, which wants channels in sixteens."""
    return tensor.numel() // max(1, tensor.shape[1]) * _round(tensor.shape[1]) * _width(tensor)


def _blocked_weight(tensor: Tensor) -> int:
    first, second = tensor.shape[:2]
    return math.prod(tensor.shape[2:]) * _round(first) * _round(second) * _width(tensor)


def _unfolds(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch does without oneDNN, and multiplies by a matrix that repeats each pixel for each tap."""
    small = x.shape[0] == 1 and x.numel() <= 20480 and max(weight.shape[2:], default=0) <= 3
    return small or x.dtype not in (torch.float32, *_LOW)


def _unfolded(x: Tensor, weight: Tensor, positions: int) -> int:
    return math.prod(weight.shape[1:]) * positions * x.itemsize


def _rnn(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return _gates(tensors) * 9 // 8 + _weights(tensors) * 9 // 8 + _SCRATCHPAD // 2


def _rnn_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    return 2 * _gates(tensors) + _weights(tensors) * 9 // 8 + _SCRATCHPAD // 2


def _gates(tensors: Sequence[Tensor]) -> int:
    x, width = tensors[0], tensors[2].shape[1]
    return x.shape[0] * x.shape[1] * 4 * _round(width) * 4


def _weights(tensors: Sequence[Tensor]) -> int:
    return sum(map(nbytes_of, tensors[1:5]))


def rnn_workspace(args: Sequence[Any]) -> int:
    """Bytes that a recurrent layer of oneDNN returns for its backward pass, beside its outputs."""
    tensors = tensors_of(args)
    steps, batch, width = tensors[0].shape
    states = 12 * (steps + 1) * batch * max(width, tensors[2].shape[1]) * 4
    return _gates(tensors) + states + _SCRATCHPAD // 4


_BOUNDS: dict[str, Callable[[Sequence[Tensor], Sequence[Any], int], int]] = {
    "aten::clone": _transposes,
    "aten::copy_": _transposes,
    "aten::_to_copy": _transposes,
    "aten::cat": _cat,
    "aten::where": _where,
    **dict.fromkeys(("aten::index", "aten::index_put", "aten::index_put_"), _index),
    "aten::embedding": _embedding,
    "aten::embedding_dense_backward": _embedding,
    "aten::sum": _sum,
    "aten::mean": _reduction,
    "aten::cumsum": _cumulative,
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"), _product),
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::_safe_softmax": _safe_softmax,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "aten::native_group_norm": _layer_norm,
    "aten::native_group_norm_backward": _group_norm_backward,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_batch_norm_backward": _batch_norm_backward,
    "aten::max_pool2d_with_indices_backward": _embedding,
    "aten::native_dropout": _dropout,
    "aten::native_dropout_backward": _dropout,
    **dict.fromkeys(
        (
            *("aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss"),
            "aten::binary_cross_entropy_with_logits",
        ),
        _elementwise_loss,
    ),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::mkldnn_rnn_layer": _rnn,
    "aten::mkldnn_rnn_layer_backward": _rnn_backward,
}
