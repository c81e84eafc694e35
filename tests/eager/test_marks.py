"""`session.mark`: the user's own checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rekindle
from helpers import same_bits, seeded, small_batch
from watch import living, log_replays

Mark = Callable[[Tensor], rekindle.Activation]
NEVER_KEEP = [rekindle.KeepNone(), rekindle.EveryN(1000), rekindle.ByDepth(1000), lambda graph: []]


def weight() -> Tensor:
    """A parameter."""
    return torch.randn(64, 64, generator=seeded(5)).div(8).requires_grad_()


def run(forward: Callable[[Tensor, Tensor, Mark], Tensor], session: rekindle.Session | None) -> list[Tensor]:
    """Two steps, of which the second is planned; loss and gradients of the second."""
    results: list[Tensor] = []
    for _ in range(2):
        x, w = small_batch(0).requires_grad_(), weight()
        if session is None:
            loss = forward(x, w, lambda tensor: None).sum()  # type: ignore[arg-type]
            loss.backward()
        else:
            with session:
                loss = forward(x, w, session.mark).sum()
                loss.backward()
        results = [loss.detach(), x.grad, w.grad]
    return results


def of_result(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked as it is made."""
    y = x.mm(w)
    mark(y)
    return y.sin().cos()


def after_use(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked after it was read and saved."""
    y = x.mm(w)
    z = y.sin().cos()
    mark(y)
    return z


def of_view(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked through a view of a part of it: the whole activation is kept."""
    y = x.mm(w)
    mark(y.t()[3:5])
    return y.sin().cos()


def of_detached(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked through a detached alias."""
    y = x.mm(w)
    mark(y.detach())
    return y.sin().cos()


def of_unsaved(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked, though autograd does not save it: something saved is recomputed from it."""
    y = x.mm(w)
    mark(y)
    return (y + 1).sin().cos()


def of_forgotten(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked twice, with a reader between that is forgotten at once."""
    y = x.mm(w)
    mark(y)
    y.detach().max()
    mark(y)
    return y.sin().cos()


@pytest.mark.parametrize("policy", NEVER_KEEP, ids=["KeepNone", "EveryN", "ByDepth", "callable"])
@pytest.mark.parametrize("forward", [of_result, after_use, of_view, of_detached, of_unsaved, of_forgotten])
def test_kept_whatever_the_policy_says(forward, policy, monkeypatch):
    """A marked activation is never recomputed, and what is made of it is recomputed from it."""
    log = log_replays(monkeypatch)
    session = rekindle.Session(policy)
    assert all(map(same_bits, run(forward, None), run(forward, session)))
    assert "mm" not in log
    assert "sin" in log
    assert not living()


def overwritten(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked, then overwritten while something evicted must be recomputed from what it was."""
    y = x.mm(w)
    mark(y)
    z = y + 1
    y.mul_(2)
    return z.sin() + y.sin()


def overwritten_unread(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """Marked, then overwritten with nothing read before."""
    y = x.mm(w)
    mark(y)
    return y.mul_(2).sin().cos()


def made_in_place(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
    """What an in-place op made is marked."""
    y = x.mm(w).mul_(2)
    mark(y)
    return y.sin().cos()


@pytest.mark.parametrize("forward", [overwritten, overwritten_unread, made_in_place])
def test_exact_with_writes(forward):
    """A mark on something that an in-place op reads or makes changes no number."""
    session = rekindle.Session(rekindle.KeepNone())
    assert all(map(same_bits, run(forward, None), run(forward, session)))
    assert not living()


def test_marked_is_the_version_of_its_time(monkeypatch):
    """A write after the mark does not spoil it: what was read before is recomputed from a copy of what was marked."""
    log = log_replays(monkeypatch)
    session = rekindle.Session(rekindle.KeepNone())
    run(overwritten, session)
    assert "mm" not in log
    assert session.last_step.snapshots == 1
    assert session.snapshots.nbytes == 0  # gone with the graph


def test_returns_the_activation():
    """`mark` returns the activation, which tells what it is."""
    x, w = small_batch(0), weight()
    with rekindle.Session(rekindle.KeepNone()) as session:
        y = x.mm(w)
        z = y.tanh()
        activation = session.mark(z)
        assert type(activation) is rekindle.Activation
        assert activation.is_checkpoint
        assert not activation.is_leaf
        assert activation.is_live
        assert activation.nbytes == z.nbytes
        assert "tanh" in repr(activation)
        assert "checkpoint" in repr(activation)
        assert session.mark(z) is activation
        assert session.mark(z[3:]) is activation
        assert session.last_step.checkpoints == 1
        z.sum().backward()


def test_saved_inputs():
    """`saved_inputs` are the activations that its op read, each once, in the order of the arguments."""
    x, w = small_batch(0), weight()
    with rekindle.Session(rekindle.KeepNone()) as session:
        y = x.mm(w)
        z = torch.addcmul(y, y, x)
        product, left, right, result = map(session.mark, (y, x, w, z))
        assert result.saved_inputs == (product, left)
        assert product.saved_inputs == (left, right)
        assert left.saved_inputs == right.saved_inputs == ()
        assert left.is_leaf
        assert right.is_leaf
        z.sum().backward()


def test_leaf():
    """A mark on an input or a parameter is allowed, and changes nothing but the flag: leaves are kept anyway."""

    def forward(x: Tensor, w: Tensor, mark: Mark) -> Tensor:
        y = x.mm(w)
        for leaf in (x, w, w.t()):
            activation = mark(leaf)
            assert activation is None or activation.is_checkpoint
        return y.sin().cos()

    assert all(map(same_bits, run(forward, None), run(forward, rekindle.Session(rekindle.KeepNone()))))
    assert not living()


def test_small():
    """What is too small for a policy can be marked."""
    with rekindle.Session(rekindle.KeepNone()) as session:
        small = small_batch(0).sum()
        assert session.mark(small).is_checkpoint


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_under_keep_all(steps):
    """Marks work in every step of a session that keeps all, also in those that it did not mean to watch."""
    session = rekindle.Session(rekindle.KeepAll())
    for number in range(4):
        with session:
            y = small_batch(0) @ weight()
            if number >= steps - 1:
                activation = session.mark(y)
                assert activation.is_checkpoint
                if number >= steps:
                    assert len(activation.saved_inputs) == 2
            y.sum().backward()


def test_mark_ends_with_its_owner(counting):
    """An activation that nobody needs any more is not kept by its mark."""
    with rekindle.Session(rekindle.KeepNone()) as session:
        y = small_batch(0).requires_grad_().sin().cos().exp()
        session.mark(y)
        nbytes = session._ledger.live_nbytes
        del y
        assert session._ledger.live_nbytes < nbytes
    assert not living()
