"""Seconds, and first: the package is there, trains a small model exactly, and gets out of the way when asked to."""

from __future__ import annotations

import re
from importlib.metadata import metadata

from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import rekindle
from helpers import Layer, Managed, assert_same_training, assert_worked, small_batch, small_model
from rekindle.graph import verify_graph


def step(model: nn.Module, number: int, managed: Managed) -> Tensor:
    """One step of training up to the gradients."""
    batch = small_batch(number)
    with managed:
        loss = model(batch).square().mean()
        loss.backward()
    return loss


def test_metadata() -> None:
    """The installed package says which version it is, what it needs and that it is typed."""
    about = metadata("rekindle")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", about["Version"])
    assert "torch>=2.11" in about.get_all("Requires-Dist", [])
    assert "Typing :: Typed" in about.get_all("Classifier", [])


def test_the_front_door_opens() -> None:
    """Every name that the package promises is there."""
    assert [name for name in rekindle.__all__ if not hasattr(rekindle, name)] == []


def test_trains_exactly() -> None:
    """Two steps under PerModule equal those of plain PyTorch bit for bit, and were not plain ones."""
    session = assert_same_training(small_model, step, rekindle.PerModule(Layer), steps=2, min_nbytes=0)
    assert_worked(session)
    assert session.stats.steps == 2
    assert session.graph is not None
    assert verify_graph(session.graph) is session.graph


class Watching(nn.Module):
    """Notes in each forward how many dispatch modes are active, and whether hooks take what autograd saves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.modes: list[int] = []
        self.hooked: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        """A layer that saves its result."""
        result = self.inner(x).exp()
        self.modes.append(len(_get_current_dispatch_mode_stack()))
        self.hooked.append(result.grad_fn._raw_saved_result.unpack_hook is not None)  # type: ignore[union-attr]
        return result


def test_keeping_everything_costs_nothing_later() -> None:
    """Under KeepAll the first step is recorded; later ones run with no dispatch mode and no hook at all."""
    model = Watching()
    session = rekindle.Session(policy=rekindle.KeepAll())
    for number in range(4):
        step(model, number, session)
    assert model.modes == [1, 0, 0, 0]
    assert model.hooked == [True, False, False, False]
    assert session.stats.evicted == session.stats.ops_replayed == 0
