"""What PyTorch does otherwise while a dispatch mode is active, as the recorder is one, and that a session makes up for
it: its numbers are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
from helpers import same_bits, small_batch
from rekindle.record.kernels import NODES, node_nbytes
from rekindle.record.schema import BRANCHING_NODES, traits_of
from rekindle.record.torch_private import AllocatorWatch, conjugating, step_aside
from rekindle.record.unseen import UnseenNodes
from watch import log_replays, modes


def gradients(f: Callable[[Tensor], Tensor], x: Tensor, managed: bool, twice: bool = False) -> list[Tensor]:
    """The gradient of `f` at a recorded copy of `x`, and the second one."""
    x = x.detach().requires_grad_()
    with rekindle.Session(rekindle.KeepNone(), min_nbytes=0) if managed else nullcontext():
        (first,) = torch.autograd.grad(real(f(x.clone())), x, create_graph=twice)
        return [first, *(torch.autograd.grad(real(first), x) if twice else ())]


def real(result: Tensor) -> Tensor:
    """A number to differentiate, from an op that saves the result."""
    result = result.sin()
    return (torch.view_as_real(result) if result.is_complex() else result).sum()


X = small_batch(3, 6, 5).double()
BRANCHING: dict[str, Callable[[Tensor], Tensor]] = {
    "MaxBackward1": torch.max,
    "MinBackward1": torch.min,
    "MedianBackward0": torch.median,
    "NanmedianBackward0": torch.nanmedian,
    "MaskedFillBackward1": lambda x: torch.zeros(6, 5, dtype=x.dtype).masked_fill(X > 0.3, x.sum()),
    "ProdBackward0": torch.prod,
    "ProdBackward1": lambda x: x.prod(1),
    "CumprodBackward0": lambda x: x.cumprod(1),
    "LinalgDetBackward0": lambda x: torch.linalg.det(x[:5]),
    "LinalgEigBackward0": lambda x: torch.linalg.eigvals(x[:5]).abs(),
    "LinalgEighBackward0": lambda x: torch.linalg.eigvalsh(x[:5] + x[:5].mT),
    "OrmqrBackward0": lambda x: torch.ormqr(*torch.geqrf(X), x),
}


def nodes(result: Tensor) -> set[str]:
    """The names of the autograd nodes behind a result."""
    return {node.name() for node in _all_nodes(result)}


def _all_nodes(result: Tensor) -> list[Node]:
    found, stack = [], [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            found.append(node)
            stack += [following for following, _ in node.next_functions]
    return found


def test_every_branching_node_is_tried() -> None:
    """The tests below reach each node in the table."""
    assert BRANCHING.keys() == BRANCHING_NODES == NODES.keys()


@pytest.mark.parametrize("name", BRANCHING)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_formulas_are_those_of_plain_pytorch(name: str, twice: bool) -> None:
    """Nodes whose formula asks whether a mode is active give the bits that they give without one."""
    f = BRANCHING[name]
    assert name in nodes(f(X.clone().requires_grad_()))
    plain, managed = gradients(f, X, False, twice), gradients(f, X, True, twice)
    assert all(map(same_bits, plain, managed))


ROWS, DTYPES = 40, [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
LARGE: dict[str, Callable[[Tensor], Tensor]] = BRANCHING | {
    "MaskedFillBackward1": lambda x: torch.zeros(ROWS, ROWS, dtype=x.dtype).masked_fill(x.real > 0.3, x.sum()),
    "LinalgDetBackward0": torch.linalg.det,
    "LinalgEigBackward0": lambda x: torch.linalg.eig(x).eigenvectors.abs(),
    "LinalgEighBackward0": lambda x: torch.linalg.eigh(x + x.mH).eigenvectors.abs(),
    "OrmqrBackward0": lambda x: torch.ormqr(*torch.geqrf(x.detach()), x),
}
REAL = ("Max", "Min", "Median", "Nanmedian")  # their kernels take nothing complex
PRECISE = ("Linalg", "Ormqr")  # and these nothing short
TAKEN = [
    (name, dtype)
    for name in LARGE
    for dtype in DTYPES
    if not (dtype.is_complex and name.startswith(REAL)) and not (dtype.itemsize == 2 and name.startswith(PRECISE))
]


@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize(("name", "dtype"), TAKEN, ids=str)
def test_what_an_unseen_node_takes(name: str, dtype: torch.dtype, zeros: bool) -> None:
    """A node that runs without the recorder allocates no more than the bound that room is made for."""
    x = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(0)).to(dtype)
    if zeros:
        x[::3, ::4] = 0
    x.requires_grad_()
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.numel()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = LARGE[name](x)
    node = next(node for node in _all_nodes(result) if node.name() == name)
    watch, largest = AllocatorWatch(), saved[max(saved)]

    def start(_: object) -> None:
        watch.__enter__()

    node.register_prehook(start)
    node.register_hook(lambda *_: watch.__exit__())
    real(result).backward()
    assert watch.worked
    assert 0 < watch.peak_nbytes <= node_nbytes(name, largest)


class Log(TorchDispatchMode):
    """Notes the names of ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_is_back_for_what_the_node_returned() -> None:
    """What other nodes have returned is added to it, and memory for that is to be counted."""
    mode, came = Log(), []

    def unpack(tensor: Tensor) -> Tensor:
        step_aside(mode, {"SinBackward0"}, lambda name, grads: came.append((name, len(grads), modes())))
        return tensor

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack), mode:
        y = x * 1
        loss = y.sin().sum() + y.cos().sum()
        mode.ops.clear()
        loss.backward()
    assert came == [("SinBackward0", 1, 1)]
    assert "aten.cos.default" not in mode.ops  # the formula of the node
    assert "aten.add.Tensor" in mode.ops
    assert same_bits(x.grad, X.cos() - X.sin())


def test_a_mode_is_not_back_after_a_node_that_failed() -> None:
    """A node that failed runs again, out of the mode's sight."""
    mode, fails, came = Log(), [True], []

    def unpack(tensor: Tensor) -> Tensor:
        if fails and step_aside(mode, {"SinBackward0"}, lambda name, grads: came.append(name)):
            fails.clear()
            raise RuntimeError("no room")
        return tensor

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        with mode:
            loss = x.sin().sum()
            with pytest.raises(RuntimeError, match="no room"):
                loss.backward(retain_graph=True)
        mode.ops.clear()
        loss.backward()
    assert (mode.ops, came, modes()) == ([], [], 0)
    assert same_bits(x.grad, X.cos())


@pytest.mark.parametrize("where", ["inside", "outside", "under a mode"])
def test_room_is_made_only_for_what_runs_unseen(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a backward pass outside of the session, and not where another mode keeps the recorder in its place."""
    made: list[str] = []
    monkeypatch.setattr(UnseenNodes, "asks", lambda self, node, saved: made.append(node))
    x = X.clone().requires_grad_()
    with rekindle.Session(rekindle.KeepNone(), min_nbytes=0):
        loss = x.sin().max()
        with Log() if where == "under a mode" else nullcontext():
            if where != "outside":
                loss.backward()
    if where == "outside":
        loss.backward()
    assert set(made) == ({"MaxBackward1"} if where == "inside" else set())


def test_a_mode_steps_aside_for_one_node() -> None:
    """A mode taken away inside a node is back when the node ends, and stays where others are active or another runs."""
    seen: list[tuple[str, int]] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def unpack(tensor: Tensor) -> Tensor:
        before = modes()
        step_aside(mode, {"SinBackward0"})
        seen.append((torch._C._current_autograd_node().name(), before - modes()))
        return tensor

    mode, x = Mode(), X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack), mode:
        x.sin().cos().sum().backward()
        assert modes() == 1
        assert seen == [("CosBackward0", 0), ("SinBackward0", 1)]
        with Mode():
            x.sin().sum().backward()
        assert seen[2:] == [("SinBackward0", 0)]
        step_aside(mode, {"SinBackward0"})  # outside of a backward pass
        assert modes() == 1


class Conjugates(TorchDispatchMode):
    """Multiplies by a lazily conjugated tensor inside the handler."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            self.left_out = args[0].conj() * 2
            with conjugating():
                self.carried_out = args[0].conj() * 2
        return func(*args, **(kwargs or {}))


def test_conjugation_inside_a_handler() -> None:
    """Inside a handler PyTorch leaves lazy conjugation out, and `conjugating` has it carried out. Once the first fact
    ends, the guard can go."""
    z = torch.tensor([1 + 2j])
    with Conjugates() as mode:
        z + 1
    assert torch.equal(mode.left_out.resolve_conj(), torch.tensor([2 + 4j]))
    assert torch.equal(mode.carried_out.resolve_conj(), torch.tensor([2 - 4j]))


def test_complex_pseudo_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """`linalg.pinv` of complex numbers is right in a session, where any other dispatch mode makes it wrong, and is
    right again when it is replayed."""
    replayed = log_replays(monkeypatch)
    z = torch.complex(X[:, :3], X[:, 2:])
    plain, managed = gradients(torch.linalg.pinv, z, False), gradients(torch.linalg.pinv, z, True)
    with rekindle.Session(rekindle.KeepNone()):
        inside = torch.linalg.pinv(z)
    assert same_bits(inside, torch.linalg.pinv(z))
    assert same_bits(*plain, *managed)
    assert "linalg_pinv" in replayed
    assert traits_of(torch.ops.aten.linalg_pinv.atol_rtol_tensor).conjugates
