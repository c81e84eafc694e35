"""What the kernels of the CPU allocate for themselves while they run, beside their results.

Problem: room for a kernel's temporaries has to be made before it has run even once.
Source: the allocator's reports on torch 2.13 with oneDNN; where they depend on how a library cuts its work, a bound a
little above what was seen. `tests/eager/test_sizes.py` runs each op below and holds the bound to the allocator.
Regime: upper bounds, exact for ops that take nothing and for copies that a kernel makes of its arguments.
Known gaps: an op that is not below is unknown, and `temporaries` says so with None. A bound for convolutions holds for
whatever oneDNN chooses: up to twice what it takes for images and many channels, and many times that for those that are
transposed, in groups, of three dimensions, or of few channels. It was fitted to random shapes on one kind of CPU, and
does not hold while oneDNN is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import ge
from typing import Any

import torch

from rekindle.record.schema import traits_of
from rekindle.record.torch_private import SHORT_FLOATS_BY_ONEDNN

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
LOOSE = frozenset(("aten::convolution", "aten::convolution_backward"))
"""Ops that may take many times less than their bound."""

NODES = {
    **dict.fromkeys(("MaxBackward1", "MinBackward1", "MedianBackward0", "NanmedianBackward0"), (1, 9)),
    "MaskedFillBackward1": (0, 17),
    "ProdBackward0": (3, 9),
    **dict.fromkeys(("ProdBackward1", "CumprodBackward0", "OrmqrBackward0"), (7, 9)),
    **dict.fromkeys(("LinalgDetBackward0", "LinalgEigBackward0", "LinalgEighBackward0"), (7, 9)),
}
"""What autograd nodes allocate at most that the recorder does not see: so many bytes for each byte, and for each
element, of the largest tensor that they saved."""
_NUMBERS = 256  # bytes; a few numbers


def node_nbytes(node: str, saved: Tensor) -> int:
    """At most how many bytes an autograd node among `NODES` allocates for a tensor that it saved."""
    per_byte, per_element = NODES[node]
    return per_byte * saved.nbytes + per_element * saved.numel() + _NUMBERS


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


def _gelu_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    """oneDNN wants the gradient in the layout of what it is for, and takes that through a copy."""
    gradient, x = tensors[:2]  # and what it writes to, in one of its overloads
    apart = x.is_contiguous() and not gradient.is_contiguous()
    return _casts(tensors, results) + (2 * nbytes_of(gradient) if apart else 0)


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
    conv = _Conv(x, weight, results // x.itemsize, *args[3:9])
    if not conv.by_onednn():
        return conv.unfolded() + conv.copied(x, weight) + (results if conv.groups > 1 else 0)
    made = _round(conv.made) * (results // x.itemsize // max(1, conv.made)) * _width(x)
    whole = x.shape[1] >= _CHANNELS or not conv.plain()
    read = _blocked(x) if whole else x.numel() * _width(x)
    moved = read + (2 if conv.transposed else 1) * made + conv.blocked_weight()
    return conv.by_library(moved, x, weight)


def _convolution_backward(tensors: Sequence[Tensor], args: Sequence[Any], results: int) -> int:
    grad, x, weight = tensors[:3]
    conv = _Conv(x, weight, grad.numel(), *args[4:10])
    if not conv.by_onednn():
        return conv.unfolded() + conv.copied(grad, x, weight) + (results if conv.groups > 1 else 0)
    wants_x, wants_weight, _ = args[10]
    whole = x.shape[1] >= _CHANNELS or wants_x or not conv.plain()
    read = _blocked(x) if whole else x.numel() * _width(x)
    reordered = read + 2 * _blocked(grad) + conv.blocked_weight()
    reordered += reordered // 8 + (read + _SCRATCHPAD if wants_x and max(conv.stride) > 1 else 0)
    reordered += 0 if weight.is_contiguous() else conv.blocked_weight()
    unasked = 0 if wants_weight else nbytes_of(weight)  # comes with the gradient of the bias
    return unasked + conv.by_library(reordered, grad, x, weight)


@dataclass(frozen=True, slots=True)
class _Conv:
    """A convolution of `out` elements, those of one dimension as ones of two."""

    x: Tensor
    weight: Tensor
    out: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @property
    def made(self) -> int:
        """Channels that come out."""
        return int(self.weight.shape[1]) * self.groups if self.transposed else int(self.weight.shape[0])

    def by_onednn(self) -> bool:
        """Whether PyTorch hands it to oneDNN, by its own rules."""
        x, threads = self.x, torch.get_num_threads()
        kernel = (*(1,) * (4 - x.dim()), *self.weight.shape[2:])
        if self.transposed and any(map(ge, self.output_padding, self.stride)):
            return False
        if x.dtype is not torch.float32:
            return x.dtype in SHORT_FLOATS_BY_ONEDNN
        moves = any(step != 1 for step in (*self.stride, *self.dilation))
        if not moves and x.shape[0] < 16 and kernel[-2:] == (1, 1) and threads == 1:
            return False
        large = math.prod(x.shape[:4]) > 20480 or x.shape[0] > 1 or min(kernel[-2:]) > 3
        return self.groups > 1 or large

    def by_library(self, moved: int, *tensors: Tensor) -> int:
        """Bytes that oneDNN takes if it reorders `moved` bytes of these arguments and of results."""
        if self.plain():
            large = self.x.dtype in _LOW or self.x.dim() < 4
            return moved + (_SCRATCHPAD if large else _SCRATCHPAD // 8)
        widened = moved if self.x.dtype in _LOW else 0
        return moved + widened + self.multiplied() + self.copied(*tensors) + _SCRATCHPAD

    def plain(self) -> bool:
        """Whether oneDNN has a kernel of its own for it, and need not multiply by a matrix that repeats each pixel for
        each tap."""
        if self.transposed or self.groups > 1 or self.x.dim() > 4 or not _same_layout((self.x, self.weight)):
            return False
        channels, taps = (self.weight.shape[1], self.made), math.prod(self.weight.shape[2:])
        few = 1 in channels or (max(channels) < _CHANNELS and (self.x.dtype in _LOW or self.positions() < taps))
        spread = max(self.dilation) > 1 and max(self.stride) > 1
        extents = [step * (taps - 1) + 1 for step, taps in zip(self.dilation, self.weight.shape[2:], strict=False)]
        inside = all(map(ge, self.x.shape[2:], extents)) or max(self.dilation) == 1
        return not (few or spread) and inside and all(map(ge, extents, (2 * pad for pad in self.padding)))

    def positions(self) -> int:
        """Pixels of an image that comes out."""
        return self.out // max(1, self.x.shape[0] * self.made)

    def columns(self) -> int:
        """Bytes of the matrix that repeats each pixel of an image for each tap, for the channels of one group."""
        positions = math.prod(self.x.shape[2:]) if self.transposed else self.positions()
        return math.prod(self.weight.shape[1:]) * positions * self.x.itemsize

    def unfolded(self) -> int:
        """Bytes of those matrices where PyTorch multiplies by them: most of its kernels make them for a whole batch."""
        solid = self.x.dim() == 5
        if solid and self.transposed:  # one image at a time, of a copy, with a one for each pixel that comes out
            ones = self.positions() * self.x.itemsize
            return self._product() * self.groups + nbytes_of(self.x) * min(2, self.groups) + ones
        return self._product() * self.x.shape[0] * (self.groups if solid else 1)

    def _product(self) -> int:
        columns = self.columns()
        return columns + (4 * columns + 2 * _SCRATCHPAD if self.x.dtype in _LOW else 0)

    def multiplied(self) -> int:
        """Bytes that oneDNN takes for the same, and for gradients of weights that threads add up."""
        width = _width(self.x) // self.x.itemsize
        return torch.get_num_threads() * (self.columns() * width + 3 * self.blocked_weight())

    def copied(self, *tensors: Tensor) -> int:
        """Bytes of copies of groups, and of what is strided or transposed."""
        return sum(map(nbytes_of, tensors)) + self.x.itemsize * self.x.numel() // max(1, self.x.shape[1])

    def blocked_weight(self) -> int:
        """Bytes of the weight in oneDNN's layout, group by group."""
        first, second = self.weight.shape[:2]
        taps = math.prod(self.weight.shape[2:])
        return taps * self.groups * _round(first // self.groups) * _round(second) * _width(self.weight)


def _same_layout(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors) or all(
        tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors
    )


def _round(channels: int) -> int:
    return -(-channels // _CHANNELS) * _CHANNELS


def _width(tensor: Tensor) -> int:
    return max(4, tensor.itemsize)  # sums of short floats are long


def _blocked(tensor: Tensor) -> int:
    """Bytes in oneDNN's layout, which wants channels in sixteens."""
    return tensor.numel() // max(1, tensor.shape[1]) * _round(tensor.shape[1]) * _width(tensor)


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
    "aten::gelu_backward": _gelu_backward,
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
