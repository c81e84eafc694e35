"""What an op mutates, draws at random, or must never repeat.

Problem: the recorder must know for each ATen overload whether repeating it later gives the same bytes. Schemas say
most of it (alias annotations, tags); the tables below hold what they do not say. When in doubt an op is `opaque`: its
results are kept like an input, never recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from rekindle.graph import Graph, Op
from rekindle.record.torch_private import body_of

RUNNING_STATS: dict[str, tuple[tuple[int, int], int | None]] = {
    # op: (positions of running mean and variance, position of `training` or None where the op always trains).
    # In training the statistics are written, and the results do not depend on what they held. Most schemas do not even
    # say that they are written.
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::batch_norm": ((3, 4), 5),  # this and the next two are seen in inference mode only
    "aten::_batch_norm_impl_index": ((3, 4), 5),
    "aten::instance_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
    "aten::_native_batch_norm_legit": ((3, 4), 5),
    "aten::_batch_norm_with_update": ((3, 4), None),
    "aten::batch_norm_gather_stats": ((3, 4), None),
    "aten::batch_norm_gather_stats_with_counts": ((3, 4), None),
    "aten::batch_norm_update_stats": ((1, 2), None),
}
UNTOLD_VIEWS = frozenset({"aten::_unsafe_view"})
"""Return an alias of what they are given, and their schemas do not say so: matrix products end with them."""
UNINITIALISED = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
)
OVERWRITES = frozenset(
    # In-place ops whose result does not depend on what the tensor held.
    f"aten::{name}_"
    for name in (
        "copy",
        "fill",
        "zero",
        "bernoulli",
        "normal",
        "uniform",
        "random",
        "exponential",
        "geometric",
        "log_normal",
        "cauchy",
        "_foreach_zero",
        "_foreach_copy",
    )
)
NEVER_REPEAT: dict[str, str] = {
    **dict.fromkeys(
        ("aten::topk", "aten::sort", "aten::argsort", "aten::msort", "aten::kthvalue", "aten::mode"),
        "routes by order: recomputed ties may flip",
    ),
    **dict.fromkeys(
        ("aten::_cudnn_rnn", "aten::miopen_rnn", "aten::_cudnn_init_dropout_state"),
        "keeps dropout state of its own",
    ),
    **dict.fromkeys(
        ("aten::set_", "aten::resize_", "aten::resize_as_", "aten::resize_as_sparse_", "aten::set_data"),
        "changes the storage itself",
    ),
    "aten::linalg_lstsq": "its usual driver starts from uninitialised pivots, so its bits vary",
    "aten::_efficientzerotensor": "has no bytes",
    "aten::_pin_memory": "moves to pinned host memory",
    "aten::from_file": "reads a file that may have changed",
    "aten::_fused_moving_avg_obs_fq_helper": "keeps observer state of its own",
}
UNCOUNTED: dict[str, str] = {
    # op: the argument that it fills after autograd has saved it, and without counting that as a write.
    "aten::rrelu_with_noise": "noise",
    "aten::rrelu_with_noise_": "noise",
}
CONJUGATES_INSIDE = "aten::linalg_"
"""Kernels of these names may conjugate lazily what they go on to compute with, as `linalg_pinv` does. Under a dispatch
mode PyTorch then leaves the conjugation out: https://github.com/pytorch/pytorch/issues/198118."""
BRANCHING_NODES = frozenset(
    # Autograd nodes whose formula is another one while a dispatch mode is active: it rounds in another way.
    f"{name}Backward{number}"
    for name, number in (
        *(("Max", 1), ("Min", 1), ("Median", 0), ("Nanmedian", 0), ("MaskedFill", 1)),
        *(("Prod", 0), ("Prod", 1), ("Cumprod", 0), ("Ormqr", 0)),
        *(("LinalgDet", 0), ("LinalgEig", 0), ("LinalgEigh", 0)),
    )
)
MAY_LEAVE_DEVICE = frozenset({"aten::_to_copy", "aten::copy_", "aten::copy"})
_UNREPEATABLE_TAGS = {
    torch.Tag.dynamic_output_shape: "its output shape depends on data",
    torch.Tag.data_dependent_output: "its result depends on data on the device",
}
_BOOLEAN = (torch.bool, torch.uint8)
_MASKS = tuple(str(dtype).removeprefix("torch.") for dtype in _BOOLEAN)
_ITEM = "aten._local_scalar_dense."  # it reads one tensor; of others that were not recorded some are not known
_CONSTANTS = ("aten.arange.", "aten.full.", "aten.ones.", "aten.zeros.")
_MASKED = ("aten.index.", "aten.index_put", "aten._index_put_impl_")  # by names of ops


@dataclass(frozen=True, slots=True, eq=False)
class Traits:
    """What the recorder needs to know of one ATen overload.

    Attributes:
        name: the overload's full name, such as `aten.add_.Tensor`.
        view: nothing is computed or written; the results alias the arguments.
        reshapes: changes sizes or strides of its argument in place, not its bytes.
        writes: (position, name) of each argument that is written.
        random: draws from a generator.
        opaque: why it must never be repeated; empty if it may be.
        uninitialised: its result has no defined content.
        overwrites: what it writes does not depend on what was there.
        uncounted: the argument it fills after autograd has saved it, without counting a write; empty if none.
        conjugates: its kernel may conjugate lazily inside.
        stats: positions of running statistics that training overwrites, and of the `training` flag.
        check: whether `why_opaque` must look at the arguments of each call.
        plain: reads tensors, one per argument, and makes new ones: nothing else to see to.
        mutates: writes to an argument.
        by_data: the sizes of what it returns, or what the user's code does with that, may depend on data.
        call: runs the overload, as calling it does.
    """

    name: str
    call: Callable[..., Any]
    view: bool = False
    reshapes: bool = False
    writes: tuple[tuple[int, str], ...] = ()
    random: bool = False
    opaque: str = ""
    uninitialised: bool = False
    overwrites: bool = False
    uncounted: str = ""
    conjugates: bool = False
    stats: tuple[tuple[int, int], int | None] | None = None
    check: bool = False
    plain: bool = False
    mutates: bool = False
    by_data: bool = False


KNOWN: dict[int, Traits] = {}
"""The traits of the overloads met so far by `id`: overloads hash in Python, which costs more than the look-up. For the
recorder; everybody else calls `traits_of`."""
_kept: list[Any] = []  # so that no other object gets the `id` of one


def traits_of(func: Any) -> Traits:
    """The traits of an overload, worked out once per process."""
    traits = KNOWN.get(id(func))
    if traits is None:
        _kept.append(func)
        traits = KNOWN[id(func)] = _read(func)
    return traits


def _read(func: Any) -> Traits:
    if not isinstance(func, OpOverload):
        return Traits(str(func), func, opaque="a higher-order operator, which has no schema", by_data=True)
    schema = func._schema
    qualified, name = schema.name, str(func)
    writes = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    opaque = NEVER_REPEAT.get(qualified, "")
    tags = set(func.tags)
    known = func.namespace in ("aten", "prims")
    reshapes = torch.Tag.inplace_view in tags and not opaque
    aliased = bool(schema.returns) and all(result.alias_info is not None for result in schema.returns)
    aliased = aliased or qualified in UNTOLD_VIEWS
    stats = RUNNING_STATS.get(qualified)
    if stats is not None and not any(argument.name == "running_mean" for argument in schema.arguments):
        stats = None  # an overload that takes none, such as `_native_batch_norm_legit.no_stats`
    check = qualified in MAY_LEAVE_DEVICE or qualified == "aten::index"
    if not opaque and not known:
        opaque = f"of library {func.namespace!r}, which Rekindle does not know"
    if not opaque and not check:
        opaque = next((why for tag, why in _UNREPEATABLE_TAGS.items() if tag in tags), "")
    return Traits(
        name=name,
        call=body_of(func),
        view=aliased and not writes and not opaque,
        reshapes=reshapes,
        writes=() if reshapes else writes,
        random=torch.Tag.nondeterministic_seeded in tags,
        opaque=opaque,
        uninitialised=qualified in UNINITIALISED,
        overwrites=qualified in OVERWRITES
        or (qualified not in UNINITIALISED and any(name == "out" for _, name in writes)),
        uncounted=UNCOUNTED.get(qualified, ""),
        conjugates=qualified.startswith(CONJUGATES_INSIDE),
        stats=stats,
        check=check,
        mutates=bool(writes) or stats is not None,
        by_data=not known or not tags.isdisjoint(_UNREPEATABLE_TAGS),
        plain=not writes and stats is None and not any(map(_may_nest, schema.arguments)),
    )


def _may_nest(argument: Any) -> bool:
    """Whether an argument may be a list of tensors, or a tensor passed by keyword."""
    kind = str(argument.type)
    return "Tensor" in kind and (kind.startswith("List") or argument.kwarg_only)


def why_opaque(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Why this very call must not be repeated, for the overloads whose traits say `check`."""
    if func._schema.name == "aten::index":
        masks = any(isinstance(i, torch.Tensor) and i.dtype in _BOOLEAN for i in args[1])
        return "its output shape depends on a mask" if masks else ""
    source = args[1] if func._schema.name in ("aten::copy_", "aten::copy") else args[0]
    target = args[0].device if func._schema.name != "aten::_to_copy" else kwargs.get("device") or source.device
    if torch.device(target).type == "cpu" and source.device.type != "cpu":
        return "copies from the device to the host"
    return ""


def go_by_data(graph: Graph) -> bool:
    """Whether a step of the same shapes may have other sizes than this one, or other ops, as its data is another.

    What is computed from nothing but constants, such as positions, is the same each time.
    """
    traits = {traits.name: traits for traits in KNOWN.values()}
    constant: set[int] = set()
    for op in graph.ops:
        known = traits.get(op.name)
        if known is None:
            return True
        if constant.issuperset(op.inputs) and _repeats(known, op):
            constant.update(value for value in op.outputs if graph.values[value].dtype)  # else it was not recorded
        elif known.by_data:
            return True
        if op.name.startswith(_MASKED) and any(graph.values[value].dtype in _MASKS for value in op.inputs):
            return True
    return False


def _repeats(traits: Traits, op: Op) -> bool:
    """Whether an op that reads constants, or nothing, returns the same each time."""
    if op.random or op.backward or traits.mutates or traits.uninitialised:
        return False
    if traits.by_data:
        return bool(op.inputs) and op.name.startswith(_ITEM)
    return op.name.startswith("aten." if op.inputs else _CONSTANTS)


def trains(stats: tuple[tuple[int, int], int | None], args: Sequence[Any]) -> bool:
    """Whether this call of a normalisation op overwrites its running statistics."""
    flag = stats[1]
    return flag is None or bool(args[flag])
