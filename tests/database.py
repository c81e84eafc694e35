"""PyTorch's own databases of operators and modules as entries, and each sample of one run plain and with a session.

The inputs of a sample are fed as values that a recorded op made, so that they are evicted like any activation, and what
comes out goes through an op that saves it, so that the op itself has to be replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import rekindle
from helpers import same_bits, seeded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of PyTorch's test modules when they are loaded
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

MAIN_DTYPES = (torch.float32, torch.float64)
ROTATING_DTYPES = (torch.bfloat16, torch.complex64)
OTHER_DTYPES = (torch.int64, torch.bool)  # of operators that have no gradient
FEEDS = ("clone", "window", "leaf")


@dataclass(frozen=True)
class Entry:
    """One operator or module of the databases, in one variant and dtype.

    Attributes:
        name: such as "linalg.svd", or "nn.Linear" for a module.
        variant: function, method, in-place, module in training or module in evaluation.
        dtype: of the samples.
        samples: makes its samples.
        gradient: whether the database says that there is one.
        twice: whether the database says that there is a second one.
    """

    name: str
    variant: str
    dtype: torch.dtype
    samples: Callable[[], Iterator[Sample]] = field(repr=False)
    gradient: bool
    twice: bool

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Sample:
    """One call with its arguments.

    Attributes:
        call: takes `args` and `kwargs`.
        module: makes the module that is called instead, a new one for each run.
        inplace: it writes over its first argument.
        finish: makes of the results what has a well-defined gradient, as the database says.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: Callable[[], nn.Module] | None = None
    inplace: bool = False
    finish: Callable[[Any], Any] = lambda result: result


@dataclass
class Outcome:
    """All that one run left behind: results, gradients, what became of the inputs, buffers, the random state."""

    parts: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, things: Any) -> None:
        """Note things of one kind, in order."""
        for number, thing in enumerate(things):
            self.parts[f"{kind} {number}"] = thing


# -- what is not compared bit for bit with plain PyTorch ---------------------------------------------------------------

LEFT_OUT = {
    "jiterator": "compiled for CUDA while it runs: there is no such operator on the CPU",
}
"""Prefixes of operators that are not run at all."""

NO_CONTENT = dict.fromkeys(
    ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    "the result has no defined content: only its shape and type are compared",
)
NOT_DETERMINISTIC = dict.fromkeys(
    ("linalg.lstsq", "linalg.lstsq.grad_oriented"),
    "the usual driver starts from uninitialised pivots, so two plain runs differ: compared within 0.1%",
)
_WEIGHTED = (
    "with class weights and label smoothing PyTorch adds the weights up in another order while any dispatch mode is "
    "active: equal to the plain run, or else to one under a mode that does nothing"
)
UNDER_A_MODE = {
    **dict.fromkeys(
        ("nn.functional.cross_entropy", "nn.functional.linear_cross_entropy", "nn.CrossEntropyLoss"), _WEIGHTED
    ),
    "nn.LinearCrossEntropyLoss": _WEIGHTED,
    "cumprod": "in place on a view its gradient has another formula while any dispatch mode is active: equal to the "
    "plain run, or else to one under a mode that does nothing",
}
EXCEPTIONS = {**NO_CONTENT, **NOT_DETERMINISTIC, **UNDER_A_MODE}

NOTHING_TO_REPLAY = {
    **dict.fromkeys(NO_CONTENT, "what has no content is kept"),
    **dict.fromkeys(("allclose", "equal", "item", "broadcast_shapes"), "returns no tensor"),
    **dict.fromkeys(("resize_", "resize_as_"), "changes the storage itself, so what it leaves is kept"),
    **dict.fromkeys(
        ("argwhere", "bincount", "nonzero", "unique", "unique_consecutive"), "its shape depends on data, so it is kept"
    ),
    "argsort": "recomputed ties may flip, so it is kept",
}
"""Operators without a gradient that keep nothing which could be evicted."""


# -- the entries -------------------------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    """All of both databases."""
    return [*_operators(), *_modules()]


def _operators() -> Iterator[Entry]:
    for op in op_db:
        if op.name.startswith(tuple(LEFT_OUT)):
            continue
        name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
        for dtype in _dtypes(op):
            gradient = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
            twice = gradient and op.supports_gradgrad
            for variant, call in _variants(op).items():
                samples = _samples(op, call, variant, dtype, gradient)
                yield Entry(name, variant, dtype, samples, gradient, twice)


def _dtypes(op: Any) -> tuple[torch.dtype, ...]:
    if op.supports_autograd:
        return tuple(
            dtype for dtype in (*MAIN_DTYPES, *ROTATING_DTYPES) if dtype in op.supported_backward_dtypes("cpu")
        )
    floats = tuple(dtype for dtype in MAIN_DTYPES if dtype in op.supported_dtypes("cpu"))
    return floats or tuple(dtype for dtype in OTHER_DTYPES if dtype in op.supported_dtypes("cpu"))


def _variants(op: Any) -> dict[str, Callable[..., Any]]:
    calls = {"function": op.op, "method": op.method_variant, "in-place": op.inplace_variant}
    return {name: call for name, call in calls.items() if call is not None}


def _samples(
    op: Any, call: Callable[..., Any], variant: str, dtype: torch.dtype, gradient: bool
) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        torch.manual_seed(0)
        for sample in op.sample_inputs("cpu", dtype, requires_grad=gradient):
            if variant != "in-place":
                yield Sample(call, (sample.input, *sample.args), sample.kwargs, finish=sample.output_process_fn_grad)
            elif not sample.broadcasts_input:
                yield Sample(call, (sample.input, *sample.args), sample.kwargs, inplace=True)

    return samples


def _modules() -> Iterator[Entry]:
    for info in module_db:
        name = info.formatted_name.replace("_", ".", 1)
        for dtype in (*MAIN_DTYPES, *ROTATING_DTYPES):
            if dtype not in info.dtypes:
                continue
            for training in (True, False) if info.train_and_eval_differ else (True,):
                variant = "training" if training else "evaluation"
                samples = _module_samples(info, dtype, training)
                yield Entry(name, variant, dtype, samples, True, info.supports_gradgrad)


def _module_samples(info: Any, dtype: torch.dtype, training: bool) -> Callable[[], Iterator[Sample]]:
    def samples() -> Iterator[Sample]:
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
        for sample in inputs:

            def make(given: Any = sample.constructor_input) -> nn.Module:
                return info.module_cls(*given.args, **given.kwargs).to("cpu", dtype).train(training)

            forward = sample.forward_input
            yield Sample(nn.Module.__call__, forward.args, forward.kwargs, make)

    return samples


# -- one run -----------------------------------------------------------------------------------------------------------


def run(sample: Sample, session: rekindle.Session | None, feed: str = "clone", twice: bool = False) -> Outcome:
    """Run a sample forward and backward, and backward through that if `twice`."""
    torch.manual_seed(1)
    outcome = Outcome()
    module = sample.module() if sample.module is not None else None
    args, kwargs = copied((sample.args, sample.kwargs), {})
    anchor = torch.ones((), requires_grad=True)
    managed: AbstractContextManager[Any] = nullcontext() if session is None else session
    with managed:
        results = _forward(sample, module, args, kwargs, feed, anchor, outcome)
        sources = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
        sources += [anchor, *(module.parameters() if module is not None else ())]
        _backward(results, sources, twice, outcome)
    outcome.add("input", tensors((args, kwargs)))
    outcome.add("buffer", module.buffers() if module is not None else ())
    outcome.add("random state", [torch.get_rng_state()])
    return outcome


def run_over_saved(sample: Sample, session: rekindle.Session | None) -> Outcome:
    """As `run`, with an in-place call over what autograd has saved. The plain run writes over a copy instead."""
    torch.manual_seed(1)
    outcome = Outcome()
    args, kwargs = copied((sample.args, sample.kwargs), {})
    anchor = torch.ones((), requires_grad=True)
    managed: AbstractContextManager[Any] = nullcontext() if session is None else session
    with managed:
        fed, options = fed_by((args, kwargs), "clone", {})
        results = [fed[0].sin(), fed[0].cos()]
        fed = fed if session is not None else (fed[0].clone(), *fed[1:])
        result = sample.call(*fed, **options)
        outcome.add("result", _kept(tensors(result)))
        results += _saved(result, anchor)
        del fed, options, result
        sources = [tensor for tensor in tensors((args, kwargs)) if tensor.requires_grad]
        _backward(results, [*sources, anchor], False, outcome)
    outcome.add("random state", [torch.get_rng_state()])
    return outcome


def _forward(
    sample: Sample,
    module: nn.Module | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    feed: str,
    anchor: Tensor,
    outcome: Outcome,
) -> list[Tensor]:
    """What is to be differentiated. Everything else that was made on the way is let go of."""
    fed, options = fed_by((args, kwargs), feed, {})
    called = (module, *fed) if module is not None else fed
    result = sample.call(*called, **options)
    outcome.add("result", _kept(tensors(result)))
    outcome.add("number", [repr(result)] if isinstance(result, int | float | complex) else ())
    outcome.add("fed", _kept(tensors((fed, options))))
    return _saved(sample.finish(result), anchor)


def _kept(found: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in found]


def _saved(result: Any, anchor: Tensor) -> list[Tensor]:
    """Pass each result through an op that saves it."""
    found = (_dense(tensor) for tensor in tensors(result))
    return [tensor.sin() if tensor.requires_grad else anchor * tensor for tensor in found]


def _dense(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.complex32:  # which has no sine
        tensor = tensor.to(torch.complex64)
    return tensor.to_dense() if tensor.layout is not torch.strided or tensor.is_mkldnn else tensor


def _backward(results: list[Tensor], sources: list[Tensor], twice: bool, outcome: Outcome) -> None:
    generator = seeded(2)
    gradients = _gradients(results, sources, generator, twice)
    outcome.add("gradient", [None if g is None else g.detach().clone() for g in gradients])
    if not twice:
        return
    results = [_dense(g).sin() for g in gradients if g is not None and g.requires_grad]
    del gradients
    if results:
        outcome.add("second gradient", _gradients(results, sources, generator, False))


def _gradients(
    results: list[Tensor], sources: list[Tensor], generator: torch.Generator, twice: bool
) -> list[Tensor | None]:
    results = [result for result in results if result.requires_grad]
    if not results:
        return []
    ups = [torch.randn(result.shape, dtype=result.dtype, generator=generator) for result in results]
    return list(torch.autograd.grad(results, sources, ups, allow_unused=True, create_graph=twice))


# -- inputs ------------------------------------------------------------------------------------------------------------


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [tensor for item in tree for tensor in tensors(item)] if isinstance(tree, list | tuple) else []


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(item, change) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(mapped(item, change) for item in tree)
    return tree


def copied(tree: Any, known: dict[int, Any]) -> Any:
    """Leaves of the same bytes, strides and offsets; tensors on one storage stay on one."""

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = _copy(tensor.detach(), known).requires_grad_(tensor.requires_grad)
        return known[id(tensor)]

    return mapped(tree, copy)


def _copy(tensor: Tensor, known: dict[int, Any]) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    storage = tensor.untyped_storage()
    if storage._cdata not in known:
        known[storage._cdata] = storage.clone()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(known[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())


def fed_by(tree: Any, how: str, known: dict[int, Tensor]) -> Any:
    """What an op is given instead of leaves: a recorded copy of each, a window onto a wider one, or, of those that need
    no gradient, the leaf itself."""

    def feed(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = _feed(tensor, how)
        return known[id(tensor)]

    return mapped(tree, feed)


def _feed(tensor: Tensor, how: str) -> Tensor:
    if how == "leaf" and not tensor.requires_grad:
        return tensor
    if how == "window" and tensor.layout is torch.strided:
        return torch.stack([tensor, tensor], -1)[..., 1]
    return tensor.clone()


# -- comparison --------------------------------------------------------------------------------------------------------


def differences(expected: Outcome, actual: Outcome, same: Callable[[Tensor, Tensor], bool] | None = None) -> list[str]:
    """Which parts of two outcomes are not the same, bit for bit unless `same` is another comparison."""
    if expected.parts.keys() != actual.parts.keys():
        return [f"{sorted(expected.parts.keys() ^ actual.parts.keys())} on one side only"]
    pairs = ((name, left, actual.parts[name]) for name, left in expected.parts.items())
    return [name for name, left, right in pairs if not _same(left, right, same or equal)]


def _same(left: Any, right: Any, same: Callable[[Tensor, Tensor], bool]) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return same(left.detach(), right.detach())
    return not isinstance(left, Tensor) and not isinstance(right, Tensor) and bool(left == right)


def equal(left: Tensor, right: Tensor) -> bool:
    """The same bits, and where one is not a number neither is the other: which of the many NaNs it is, kernels do not
    define."""
    return same_bits(left, right) or (left.layout is torch.strided and same_bits(_one_nan(left), _one_nan(right)))


def _one_nan(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return torch.where(tensor.isnan(), torch.nan, tensor) if tensor.is_floating_point() else tensor


def near(left: Tensor, right: Tensor) -> bool:
    """The same shape and type, and about the same values."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return not left.is_floating_point() or torch.allclose(left, right, rtol=1e-3, atol=1e-3, equal_nan=True)


def alike(left: Tensor, right: Tensor) -> bool:
    """The same shape and type."""
    return left.shape == right.shape and left.dtype == right.dtype
