"""What PyTorch does otherwise while a dispatch mode is active, as the recorder is one, and that a session makes up for
it: its numbers are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rekindle
from helpers import same_bits, small_batch
from rekindle.record.schema import BRANCHING_NODES, traits_of
from rekindle.record.torch_private import conjugating, step_aside
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
    found, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            found.add(node.name())
            stack += [following for following, _ in node.next_functions]
    return found


def test_every_branching_node_is_tried() -> None:
    """The tests below reach each node in the table."""
    assert BRANCHING.keys() == BRANCHING_NODES


@pytest.mark.parametrize("name", BRANCHING)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_formulas_are_those_of_plain_pytorch(name: str, twice: bool) -> None:
    """Nodes whose formula asks whether a mode is active give the bits that they give without one."""
    f = BRANCHING[name]
    assert name in nodes(f(X.clone().requires_grad_()))
    plain, managed = gradients(f, X, False, twice), gradients(f, X, True, twice)
    assert all(map(same_bits, plain, managed))


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
