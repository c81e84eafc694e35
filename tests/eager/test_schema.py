"""The tables of `record/schema.py`, each entry checked against the kernels, and PyTorch's own operators checked for
what the tables do not say: a writer without annotation, a draw without tag, a result that does not repeat itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
from helpers import same_bits, small_batch
from rekindle.record.schema import (
    MAY_LEAVE_DEVICE,
    NEVER_REPEAT,
    OVERWRITES,
    RUNNING_STATS,
    UNCOUNTED,
    UNINITIALISED,
    trains,
    traits_of,
    why_opaque,
)

aten = torch.ops.aten


def overloads(qualified: str) -> list[Any]:
    """All overloads of an operator."""
    packet = getattr(aten, qualified.removeprefix("aten::"))
    return [getattr(packet, name) for name in packet.overloads()]


def written_by_schema(func: Any) -> set[int]:
    """The positions of the arguments that the schema says are written."""
    arguments = enumerate(func._schema.arguments)
    return {position for position, argument in arguments if argument.alias_info and argument.alias_info.is_write}


TABLES = {
    "RUNNING_STATS": RUNNING_STATS,
    "UNCOUNTED": UNCOUNTED,
    "UNINITIALISED": UNINITIALISED,
    "NEVER_REPEAT": NEVER_REPEAT,
}
ENTRIES = [
    (table, name) for table, names in {**TABLES, "MAY_LEAVE_DEVICE": MAY_LEAVE_DEVICE}.items() for name in sorted(names)
]


@pytest.mark.parametrize(("table", "name"), ENTRIES)
def test_names_exist(table, name):
    """Every name in the tables is an operator of the installed PyTorch."""
    assert overloads(name)


# -- running statistics ------------------------------------------------------------------------------------------------

X = small_batch(0, 6, 4)
WEIGHT, BIAS = torch.full((4,), 1.5), torch.full((4,), 0.5)
STATS: dict[str, tuple[Any, Callable[[Tensor, Tensor, bool], tuple[Any, ...]]]] = {
    "native_batch_norm": (
        aten.native_batch_norm.default,
        lambda mean, var, training: (X, WEIGHT, BIAS, mean, var, training, 0.1, 1e-5),
    ),
    "_native_batch_norm_legit": (
        aten._native_batch_norm_legit.default,
        lambda mean, var, training: (X, WEIGHT, BIAS, mean, var, training, 0.1, 1e-5),
    ),
    "_batch_norm_with_update": (
        aten._batch_norm_with_update.default,
        lambda mean, var, training: (X, WEIGHT, BIAS, mean, var, 0.1, 1e-5),
    ),
    "batch_norm_update_stats": (
        aten.batch_norm_update_stats.default,
        lambda mean, var, training: (X, mean, var, 0.1),
    ),
}
"""Calls for those of `RUNNING_STATS` that have a kernel for the CPU."""


def run_stats(name: str, content: float, training: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    """The results of an op from running statistics of this content, and what became of them."""
    func, args = STATS[name]
    mean, var = torch.full((4,), content), torch.full((4,), content)
    return list(func(*args(mean, var, training))), mean, var


@pytest.mark.parametrize("name", STATS)
def test_running_statistics_are_written(name):
    """In training these ops do write the running statistics, at the positions that the table says."""
    positions, _ = RUNNING_STATS[f"aten::{name}"]
    func, args = STATS[name]
    marks = torch.full((4,), 7.0), torch.full((4,), 7.0)
    call = args(*marks, True)
    assert [call[position] for position in positions] == [*marks]
    func(*call)
    assert not any(torch.equal(mark, torch.full((4,), 7.0)) for mark in marks)


@pytest.mark.parametrize("name", STATS)
def test_results_do_not_depend_on_running_statistics(name):
    """In training the results do not depend on what the statistics held: replays may write into scratch."""
    (left, *_), (right, *_) = run_stats(name, 1.0), run_stats(name, 9.0)
    results = zip(left, right, strict=True)
    if name == "_batch_norm_with_update":
        results = list(results)[:-1]  # a reserve that is empty on the CPU
    assert all(same_bits(a, b) for a, b in results)


@pytest.mark.parametrize("name", [name for name in STATS if RUNNING_STATS[f"aten::{name}"][1] is not None])
def test_evaluation_writes_nothing(name):
    """Without training these ops write nothing, and read the statistics."""
    _, args = STATS[name]
    stats = RUNNING_STATS[f"aten::{name}"]
    (left, mean, var), (right, *_) = run_stats(name, 1.0, False), run_stats(name, 9.0, False)
    assert torch.equal(mean, torch.ones(4))
    assert torch.equal(var, torch.ones(4))
    assert not same_bits(left[0], right[0])
    assert trains(stats, args(mean, var, True))
    assert not trains(stats, args(mean, var, False))


@pytest.mark.parametrize("name", ["native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"])
def test_schemas_that_are_silent(name):
    """The reason for the table: these schemas do not say that the statistics are written. Should one of them do so, its
    entry is needed still, for the positions."""
    (func,) = (func for func in overloads(f"aten::{name}") if func._overloadname == "default")
    assert not written_by_schema(func)


@pytest.mark.parametrize("qualified", RUNNING_STATS)
def test_positions_of_running_statistics(qualified):
    """The positions in the table are those of the arguments of these names."""
    (mean, var), flag = RUNNING_STATS[qualified]
    (func,) = (func for func in overloads(qualified) if func._overloadname == "default")
    names = [argument.name for argument in func._schema.arguments]
    assert names[mean] == "running_mean"
    assert names[var] == "running_var"
    assert flag is None or names[flag] in ("training", "train", "use_input_stats")


def test_overloads_without_running_statistics():
    """Of these ops an overload that takes no statistics writes none."""
    assert traits_of(aten._native_batch_norm_legit.no_stats).stats is None
    assert traits_of(aten._native_batch_norm_legit.default).stats is not None


@pytest.mark.parametrize("qualified", UNCOUNTED)
def test_uncounted(qualified):
    """What is filled after it was saved is an argument that the schema says is written."""
    for func in overloads(qualified):
        if func._overloadname == "out":
            continue
        assert traits_of(func).uncounted in {name for _, name in traits_of(func).writes}


# -- ops that overwrite ------------------------------------------------------------------------------------------------

A, B = small_batch(1, 4, 8), small_batch(2, 4, 8)
WRITES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "copy_.default": ((A,), {}),
    "copy_.Tensor": ((A,), {}),
    "copy_.int": ((3,), {}),
    "copy_.float": ((3.0,), {}),
    "fill_.Scalar": ((3,), {}),
    "fill_.Tensor": ((torch.tensor(3.0),), {}),
    "zero_.default": ((), {}),
    "bernoulli_.float": ((0.3,), {}),
    "bernoulli_.Tensor": ((A.sigmoid(),), {}),
    "normal_.default": ((1.0, 2.0), {}),
    "uniform_.default": ((1.0, 2.0), {}),
    "random_.default": ((), {}),
    "random_.from": ((2, 9), {}),
    "random_.to": ((9,), {}),
    "exponential_.default": ((2.0,), {}),
    "geometric_.default": ((0.3,), {}),
    "log_normal_.default": ((1.0, 2.0), {}),
    "cauchy_.default": ((1.0, 2.0), {}),
    "_foreach_zero_.default": ((), {}),
    "_foreach_copy_.default": (([A, B],), {}),
}


def every_overwriting_overload() -> Iterator[str]:
    """The overloads of the ops in `OVERWRITES`, as "fill_.Scalar"."""
    for qualified in sorted(OVERWRITES):
        for func in overloads(qualified):
            if func._schema.arguments[0].alias_info is not None:
                yield f"{qualified.removeprefix('aten::')}.{func._overloadname}"


@pytest.mark.parametrize("name", list(every_overwriting_overload()))
def test_overwrites(name):
    """What these ops write does not depend on what was there: from two contents comes the same."""
    packet, _, overload = name.partition(".")
    args, kwargs = WRITES[name]
    func = getattr(getattr(aten, packet), overload)
    many = packet.startswith("_foreach")
    results = []
    for content in (-5.0, float("nan")):
        targets = [torch.full((4, 8), content) for _ in range(2 if many else 1)]
        torch.manual_seed(0)
        func(targets if many else targets[0], *args, **kwargs)
        results.append(targets)
    assert all(map(same_bits, *results))
    assert traits_of(func).overwrites


def test_out_overwrites():
    """An `out=` variant overwrites; one that fills nothing, as `empty.out`, does not."""
    assert traits_of(aten.mul.out).overwrites
    for qualified in UNINITIALISED:
        assert not any(traits_of(func).overwrites for func in overloads(qualified))


@pytest.mark.parametrize("qualified", sorted(UNINITIALISED))
def test_uninitialised(qualified):
    """The ops whose results have no content are known as such, and PyTorch agrees."""
    for func in overloads(qualified):
        assert traits_of(func).uninitialised
        assert torch.Tag.nondeterministic_seeded not in func.tags


# -- ops that must not be repeated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("qualified", sorted(NEVER_REPEAT))
def test_never_repeat(qualified):
    """Each overload is opaque, for the reason that the table gives."""
    for func in overloads(qualified):
        assert traits_of(func).opaque == NEVER_REPEAT[qualified]


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "opaque"),
    [
        (aten.index.Tensor, (A, [torch.tensor([0, 1])]), {}, False),
        (aten.index.Tensor, (A, [A > 0]), {}, True),
        (aten.index.Tensor, (A, [None, torch.ones(8, dtype=torch.uint8)]), {}, True),
        (aten._to_copy.default, (A,), {"dtype": torch.float64}, False),
        (aten._to_copy.default, (A,), {"device": "meta"}, False),
        (aten._to_copy.default, (torch.ones(3, device="meta"),), {"device": "cpu"}, True),
        (aten.copy_.default, (A.clone(), torch.ones(4, 8, device="meta")), {}, True),
        (aten.copy_.default, (A.clone(), B), {}, False),
    ],
)
def test_opaque_by_arguments(func, args, kwargs, opaque):
    """Of some ops only a call with certain arguments must not be repeated."""
    assert traits_of(func).check
    assert bool(why_opaque(func, args, kwargs)) is opaque


@pytest.mark.parametrize("func", [aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.item])
def test_opaque_by_tag(func):
    """Ops whose result depends on data in shape or at all are opaque by PyTorch's own tags."""
    func = func.default if hasattr(func, "default") else func
    assert traits_of(func).opaque


def test_strangers_are_opaque():
    """An op of a library that nobody knows is kept, not repeated."""
    strangers = library.Library("rekindle_test", "DEF")
    strangers.define("stranger(Tensor x) -> Tensor")
    strangers.impl("stranger", lambda x: x * 2, "CompositeExplicitAutograd")
    traits = traits_of(torch.ops.rekindle_test.stranger.default)
    assert "rekindle_test" in traits.opaque


def test_least_squares():
    """The bits of a least-squares solution vary from call to call, so it is kept."""
    x = small_batch(0, 30, 20).requires_grad_()
    y = small_batch(1, 30, 20)
    with rekindle.Session(rekindle.KeepNone()) as session:
        torch.linalg.lstsq(x.sin(), y).solution.sin().sum().backward()
    assert session.graph is not None
    (op,) = (op for op in session.graph.ops if "lstsq" in op.name)
    assert not any(session.graph.values[number].evictable for number in op.outputs)


# -- every operator that PyTorch tests ---------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool)
SAMPLES = 3


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [tensor for item in tree for tensor in tensors(item)] if isinstance(tree, (list, tuple)) else []


def content(tensor: Tensor) -> Tensor | None:
    """A copy of all bytes of a tensor's storage; None if it has none."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage.clone()) if storage.nbytes() else None


class Inspector(TorchDispatchMode):
    """Compares what each op does with what its traits say. Collects the names of those that do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.writers: set[str] = set()
        self.draws: set[str] = set()
        self.unrepeated: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        traits = traits_of(func)
        if traits.view or traits.reshapes:
            return func(*args, **kwargs)
        self.seen.add(traits.name)
        state = torch.get_rng_state()
        positions, names = {p for p, _ in traits.writes}, {n for _, n in traits.writes}
        if traits.stats is not None:
            positions |= set(traits.stats[0])
        read = [tensor for position, arg in enumerate(args) if position not in positions for tensor in tensors(arg)]
        read += [tensor for name, arg in kwargs.items() if name not in names for tensor in tensors(arg)]
        target = [tensor for position, arg in enumerate(args) if position in positions for tensor in tensors(arg)]
        target += [tensor for name, arg in kwargs.items() if name in names for tensor in tensors(arg)]
        written = {tensor.untyped_storage()._cdata for tensor in target if content(tensor) is not None}
        before = [(tensor, copy) for tensor in read if (copy := content(tensor)) is not None]
        result = func(*args, **kwargs)
        for tensor, copy in before:
            after = content(tensor)
            if tensor.untyped_storage()._cdata not in written and (after is None or not torch.equal(copy, after)):
                self.writers.add(traits.name)
        state_after = torch.get_rng_state()
        if not torch.equal(state, state_after) and not traits.random and not traits.opaque:
            self.draws.add(traits.name)
        if not traits.opaque and not traits.uninitialised and not target:
            self._repeat(func, args, kwargs, result, state)
            torch.set_rng_state(state_after)
        return result

    def _repeat(self, func: Any, args: Any, kwargs: Any, result: Any, state: Tensor) -> None:
        torch.set_rng_state(state)
        again = func(*args, **kwargs)
        for left, right in zip(tensors(result), tensors(again), strict=True):
            if left.layout is torch.strided and not left.is_mkldnn and not same_bits(left, right):
                self.unrepeated.add(str(func))


def inspect_all() -> Inspector:
    """Show an inspector a few calls of every operator in PyTorch's own database."""
    inspector = Inspector()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's samples
        from torch.testing._internal.common_methods_invocations import op_db

        for op in op_db:
            if op.name.startswith("jiterator"):  # for CUDA only
                continue
            for dtype in DTYPES:
                if dtype not in op.supported_dtypes("cpu"):
                    continue
                for _, sample in zip(range(SAMPLES), op.sample_inputs("cpu", dtype), strict=False):
                    with inspector:
                        op(sample.input, *sample.args, **sample.kwargs)
    return inspector


@pytest.fixture(scope="module")
def inspected() -> Inspector:
    """An inspector that has seen them all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as pool:  # for each sample PyTorch formats the whole stack, which is long under pytest
        inspector = pool.submit(inspect_all).result()
    torch.set_num_threads(threads)
    return inspector


def test_the_database_is_large(inspected):
    """The three tests below look at several hundred operators."""
    assert len(inspected.seen) > 400


def test_no_unannotated_writer(inspected):
    """No op writes into an argument that neither its schema nor the table names."""
    assert inspected.writers == set()


def test_no_untagged_draw(inspected):
    """No op moves the generator without the tag that says so."""
    assert inspected.draws == set()


def test_ops_repeat_themselves(inspected):
    """An op that is called again with the same arguments and generator state gives the same bits, or is opaque."""
    assert inspected.unrepeated == set()
