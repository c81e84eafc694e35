"""Which ops are replayed, in which order, and how often: exact counts for a network of eight named ops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rekindle
from helpers import small_batch
from rekindle.record.torch_private import AllocatorWatch
from rekindle.runtime import replay
from watch import log_replays

VALUE = 32 * 64 * 4  # bytes of each narrow activation
WIDE = 2 * VALUE


class First(nn.Module):
    """Widens: `mm`, `tanh`, `exp`. Autograd saves what `tanh` and `exp` return."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 128) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Three ops."""
        return x.mm(self.weight).tanh().exp()


class Second(nn.Module):
    """Narrows: `addmm`, `atan`, `erf`. Autograd saves what `atan` and `erf` read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 64) / 8)
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        """Three ops."""
        return torch.addmm(self.bias, x, self.weight).atan().erf()


class Network(nn.Module):
    """mm tanh exp | sigmoid | addmm atan erf | sin sum. Autograd saves what `sigmoid` returns and what `sin` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = First(), Second()

    def forward(self, x: Tensor) -> Tensor:
        """Nine ops, the last of which makes the loss."""
        return self.second(self.first(x).sigmoid()).sin().sum()


SECONDS = {"mm": 60, "tanh": 8, "exp": 9, "sigmoid": 10, "addmm": 90, "atan": 30, "erf": 40, "sin": 20}
"""What the ops are said to cost, so that policies which measure decide the same on every machine."""


@dataclass(frozen=True)
class Fixed:
    """A policy that believes the costs of the table."""

    policy: Callable[[rekindle.Graph], rekindle.Plan]

    def __call__(self, graph: rekindle.Graph) -> rekindle.Plan:
        ops = tuple(replace(op, seconds=float(SECONDS.get(short(op.name), 0))) for op in graph.ops)
        return self.policy(replace(graph, ops=ops))

    def __repr__(self) -> str:
        return repr(self.policy)


@dataclass(frozen=True)
class Made:
    """A policy of the user's own: keep what the ops of these names made."""

    names: str

    def __call__(self, graph: rekindle.Graph) -> list[int]:
        return [v.number for v in graph.evictable if short(graph.ops[v.made_by].name) in self.names.split()]


def short(name: str) -> str:
    """`aten.mm.default` is "mm"."""
    return name.split(".")[1]


def train_step(model: nn.Module, session: rekindle.Session, x: Tensor) -> None:
    """Forward and backward."""
    with session:
        model(x).backward()


ALL = "mm tanh exp sigmoid addmm atan erf"
TABLE: list[tuple[Any, str, int, int, int, int]] = [
    # policy, replayed in this order, checkpoints, recomputations, activations evicted, bytes evicted
    (rekindle.KeepAll(), "", 0, 0, 0, 0),
    (rekindle.KeepNone(), ALL, 0, 1, 6, 3 * WIDE + 3 * VALUE),
    (rekindle.EveryN(1), "", 8, 0, 0, 0),
    (rekindle.EveryN(2), "erf addmm exp", 4, 3, 3, WIDE + 2 * VALUE),
    (rekindle.EveryN(3), "erf sigmoid addmm mm tanh", 2, 3, 4, 2 * WIDE + 2 * VALUE),
    (rekindle.EveryN(5), "atan erf mm tanh exp sigmoid", 1, 2, 5, 3 * WIDE + 2 * VALUE),
    (rekindle.EveryN(99), ALL, 0, 1, 6, 3 * WIDE + 3 * VALUE),
    (rekindle.ByDepth(1), "", 8, 0, 0, 0),  # two ops, sum and what makes its gradient, come after sin
    (rekindle.ByDepth(5), "atan erf", 5, 1, 2, 2 * VALUE),
    (rekindle.ByDepth(7), "sigmoid addmm atan erf", 3, 1, 4, WIDE + 3 * VALUE),
    (rekindle.ByDepth(9), "tanh exp sigmoid addmm atan erf", 1, 1, 6, 3 * WIDE + 3 * VALUE),
    (rekindle.PerModule(First), "mm tanh", 5, 1, 1, WIDE),
    (rekindle.PerModule("second"), "addmm atan", 4, 1, 2, 2 * VALUE),
    (rekindle.PerModule(First, Second), "addmm atan mm tanh", 3, 2, 3, WIDE + 2 * VALUE),
    (rekindle.PerModule("*"), "addmm atan mm tanh", 3, 2, 3, WIDE + 2 * VALUE),
    (rekindle.PerModule(Network), ALL, 0, 1, 6, 3 * WIDE + 3 * VALUE),
    (rekindle.MemoryOptimal(0.2), "exp sigmoid addmm atan erf", 2, 1, 5, 2 * WIDE + 3 * VALUE),
    (rekindle.MemoryOptimal(0.5), "addmm atan erf", 4, 1, 3, 3 * VALUE),
    (rekindle.MemoryOptimal(1), "", 8, 0, 0, 0),
    (Fixed(rekindle.SpeedOptimal(0.2)), "atan mm tanh exp sigmoid", 2, 2, 4, 3 * WIDE + VALUE),
    (Fixed(rekindle.SpeedOptimal(0.5)), "tanh exp sigmoid", 4, 1, 3, 3 * WIDE),
    (Fixed(rekindle.Balanced(0.2)), "atan erf tanh exp sigmoid", 2, 2, 5, 3 * WIDE + 2 * VALUE),
    (Fixed(rekindle.Balanced(0.5)), "atan sigmoid tanh", 4, 3, 3, 2 * WIDE + VALUE),
    (Fixed(rekindle.Balanced(0.2, memory_weight=1)), "exp sigmoid addmm atan erf", 2, 1, 5, 2 * WIDE + 3 * VALUE),
    (Fixed(rekindle.Balanced(0.2, memory_weight=0)), "atan mm tanh exp sigmoid", 2, 2, 4, 3 * WIDE + VALUE),
    (Made(""), ALL, 0, 1, 6, 3 * WIDE + 3 * VALUE),
    (Made("exp"), "sigmoid addmm atan erf mm tanh", 1, 2, 5, 2 * WIDE + 3 * VALUE),
    (Made("sigmoid atan"), "erf addmm mm tanh exp", 2, 3, 4, 2 * WIDE + 2 * VALUE),
]


@pytest.mark.parametrize(
    ("policy", "replayed", "checkpoints", "calls", "evicted", "nbytes"), TABLE, ids=[repr(row[0]) for row in TABLE]
)
def test_table(policy, replayed, checkpoints, calls, evicted, nbytes, monkeypatch):
    """Under each policy exactly these ops are replayed, in this order, and the counters say so."""
    log = log_replays(monkeypatch)
    model, session = Network(), rekindle.Session(policy)
    train_step(model, session, small_batch(0))  # the first step shows some policies what there is to decide
    log.clear()
    train_step(model, session, small_batch(1))
    step = session.last_step
    assert " ".join(log) == replayed
    assert step.ops_replayed == len(log)
    assert (step.checkpoints, step.recompute_calls) == (checkpoints, calls)
    assert (step.evicted, step.evicted_nbytes) == (evicted, nbytes)
    assert step.failed_recomputes == 0


ON_THE_GO = [row for row in TABLE if hasattr(row[0], "decider") and not isinstance(row[0], rekindle.KeepAll)]
FROM_A_STEP = [row for row in TABLE if not hasattr(row[0], "decider")]


@pytest.mark.parametrize(("policy", "replayed"), [row[:2] for row in ON_THE_GO], ids=[repr(r[0]) for r in ON_THE_GO])
def test_on_the_go_from_the_first_step(policy, replayed, monkeypatch):
    """Policies that need no graph act in the first step as in every later one."""
    log = log_replays(monkeypatch)
    train_step(Network(), rekindle.Session(policy), small_batch(0))
    assert " ".join(log) == replayed


@pytest.mark.parametrize("policy", [row[0] for row in FROM_A_STEP], ids=repr)
def test_first_step_of_a_planning_policy_is_plain(policy, monkeypatch):
    """Policies that need the graph of a step watch the first one, in which nothing is evicted or replayed."""
    log = log_replays(monkeypatch)
    session = rekindle.Session(policy)
    train_step(Network(), session, small_batch(0))
    assert (log, session.stats.evicted) == ([], 0)


@pytest.mark.parametrize("n", [2, 3, 7, 10, 64])
@pytest.mark.parametrize("length", [1, 9, 20])
def test_chain_is_replayed_once(length, n, monkeypatch):
    """In a chain each activation that was not kept is recomputed exactly once, one recomputation for each segment."""
    log = log_replays(monkeypatch)
    x = small_batch(0).requires_grad_()
    session = rekindle.Session(rekindle.EveryN(n))
    with session:
        y = x
        for _ in range(length):
            y = y.sin().view(-1).view(32, 64)  # sin saves what it reads
        y.sum().backward()
    gone = [index for index in range(1, length) if index % n]  # the last one is not saved; x is no activation
    assert len(log) == len(gone)
    assert session.stats.evicted == len(gone)
    assert session.stats.recompute_calls == len({index // n for index in gone})


def test_recomputed_values_go_after_use():
    """Of one long replay, what autograd still waits for is held, and each value goes when it was asked for."""
    x = small_batch(0).requires_grad_()
    session, left = rekindle.Session(rekindle.KeepNone()), []
    with session:
        y = x
        for _ in range(6):
            y = y.sin()
            y.register_hook(lambda grad: left.append(held()))
        y = y.sum()

        def held() -> int:
            references = session._replayer._retained
            return sum(a.held is not None for a in (reference() for reference in references) if a is not None)

        y.backward()
    assert left == [0, 4, 3, 2, 1, 0]  # the first hook runs before anything was asked for
    assert session.stats.ops_replayed == 5


def test_what_backward_never_asks_for_goes_with_it():
    """A recomputed value that autograd waited for in vain is let go when the backward pass ends."""
    x = small_batch(0).requires_grad_()
    session = rekindle.Session(rekindle.KeepNone())
    with session:
        first = x.sin()
        branch = first.cos()  # saves `first`, as does the next line
        second = first.sin().sin().sum()
        del first
        torch.autograd.grad(second, x, retain_graph=True)
    retained = [a for a in (reference() for reference in session._replayer._retained) if a is not None]
    assert not any(activation.held is not None for activation in retained)
    assert session.stats.ops_replayed == 2
    branch.sum().backward()
    assert session.stats.ops_replayed == 3


def test_two_backwards_replay_twice(monkeypatch):
    """With `retain_graph=True` the second backward pass recomputes again: nothing recomputed outlives a pass."""
    log = log_replays(monkeypatch)
    model, x = Network(), small_batch(0)
    with rekindle.Session(rekindle.KeepNone()):
        loss = model(x)
        loss.backward(retain_graph=True)
        assert " ".join(log) == ALL
        loss.backward()
    assert " ".join(log) == f"{ALL} {ALL}"


def test_live_values_are_not_replayed(monkeypatch):
    """What user code still holds is not evicted, and replays start from it."""
    log = log_replays(monkeypatch)
    network, x = Network(), small_batch(0)
    with rekindle.Session(rekindle.KeepNone()):
        middle = network.first(x)
        network.second(middle.sigmoid()).sin().sum().backward()
    assert " ".join(log) == "sigmoid addmm atan erf mm tanh"


def test_one_replay_makes_all_results(monkeypatch):
    """An op with several results is replayed once for all of them."""
    log = log_replays(monkeypatch)
    x, weight = small_batch(0).requires_grad_(), torch.ones(64, requires_grad=True)
    session = rekindle.Session(rekindle.KeepNone(), min_nbytes=1)
    with session:
        F.layer_norm(x.sin(), (64,), weight).cos().sum().backward()
    assert log == ["sin", "native_layer_norm"]
    assert session.stats.evicted == 4  # what the norm read and its three results
    assert session.stats.recompute_calls == 1


def test_one_node_that_wants_input_and_result(monkeypatch):
    """A node may ask first for what an op read and then for what it made of it: the former is not recomputed twice."""
    log = log_replays(monkeypatch)
    x, weight = small_batch(0).requires_grad_(), torch.ones(64, requires_grad=True)
    session = rekindle.Session(rekindle.KeepNone(), min_nbytes=1)
    with session:
        F.layer_norm(x.sin(), (64,), weight).sum().backward()
    assert log == ["sin", "native_layer_norm"]
    assert session.stats.recompute_calls == 2
    assert session._replayer._leaving is None


def test_random_ops_repeat_their_numbers(monkeypatch):
    """A replayed dropout draws the same numbers, and the generator is afterwards where the plain run leaves it."""
    log = log_replays(monkeypatch)
    results = []
    for session in (None, rekindle.Session(rekindle.KeepNone())):
        torch.manual_seed(0)
        x = small_batch(0).requires_grad_()
        forward = F.dropout(x.sin(), 0.3).sin().sum() if session is None else None
        if session is not None:
            with session:
                forward = F.dropout(x.sin(), 0.3).sin().sum()
        between = torch.rand(3)
        forward.backward()
        results.append((x.grad, between, torch.rand(3)))
    assert all(map(torch.equal, *results))
    assert log == ["sin", "bernoulli_", "div_", "mul"]


def test_replay_writes_on_copies(monkeypatch):
    """A replayed in-place op writes into a copy: what it was recomputed from is as before, and so are its readers."""
    log = log_replays(monkeypatch)
    grads = []
    for session in (None, rekindle.Session(rekindle.KeepNone())):
        x = small_batch(0).requires_grad_()

        def forward(x: Tensor) -> Tensor:
            y = x * 2
            z = y + 1
            return (z.sin() + y.mul_(3).sin()).sin().sum()

        if session is None:
            forward(x).backward()
        else:
            with session:
                forward(x).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
    assert sorted(log) == sorted(["mul", "add", "sin", "mul_", "sin", "add"])


def test_a_replay_writes_into_what_it_made(monkeypatch):
    """A replayed in-place op that alone wants what the replay just made writes there: no byte more than the value."""
    log = log_replays(monkeypatch)
    x, weight = small_batch(0), torch.randn(64, 64, requires_grad=True)
    with rekindle.Session(rekindle.KeepNone()):
        y = x.mm(weight).relu_().neg_().sin()
    expected = x.mm(weight).relu_().neg_().detach()
    with AllocatorWatch() as watch:
        found = y.grad_fn._saved_self
    assert torch.equal(found, expected)
    assert watch.peak_nbytes == VALUE
    assert log == ["mm", "relu_", "neg_"]


def test_a_replay_copies_what_is_wanted_before_it_is_written(monkeypatch):
    """Where autograd waits for what an in-place op destroys, the replayed op writes into a copy, and both are right."""
    copies = []
    clone = replay.clone_storage
    monkeypatch.setattr(replay, "clone_storage", lambda base: copies.append(base.nbytes) or clone(base))
    results = []
    for session in (None, rekindle.Session(rekindle.KeepNone(), inplace="snapshot")):
        x = small_batch(0).requires_grad_()
        with session or nullcontext():
            y = x.exp().mul(2)
            z = y.sin()
            w = (y.clone() if session is None else y).relu_().cos()
            del y
            loss = (z * w).sum()
            del z, w
            loss.backward()
        results.append(x.grad)
    assert torch.equal(*results)
    assert copies == [VALUE]


@pytest.mark.parametrize(("rows", "replayed"), [(2048, []), (512, ["native_batch_norm"])])
def test_statistics_beside_a_large_result_are_kept(rows, replayed, monkeypatch):
    """What has less than a thousandth of what its op returned with it is kept: no op is repeated for it alone."""
    log = log_replays(monkeypatch)
    grads = []
    for session in (None, rekindle.Session(rekindle.KeepNone(), min_nbytes=0)):
        torch.manual_seed(0)
        x = torch.randn(rows, 16).requires_grad_()
        norm = nn.BatchNorm1d(16)
        with session or nullcontext():
            norm(x).add_(1).sum().backward()
        grads.append([x.grad, norm.weight.grad, norm.running_mean])
    assert all(map(torch.equal, *grads))
    assert log == replayed


def test_a_replay_stops_at_checkpoints_in_the_way(monkeypatch):
    """Only the branch that leads to what is asked for is replayed."""
    log = log_replays(monkeypatch)
    x = small_batch(0).requires_grad_()
    session = rekindle.Session(rekindle.KeepNone())
    with session:
        left, right = x.sin().sin(), x.cos().cos()
        session.mark(right)
        loss = left.sin().sum() * 1 + right.exp().sum() * 0
        del left, right
        torch.autograd.grad(loss, x)
    assert log.count("cos") == 1  # what the outer cos read; the marked one is there
    assert log.count("exp") == 1


def test_looking_at_a_saved_tensor_holds_nothing(counting):
    """A saved tensor read outside of a backward pass is recomputed; no copy is kept for a pass that may not come."""
    x = small_batch(0).requires_grad_()
    session = rekindle.Session(rekindle.KeepNone())
    with session:
        y = x.sin().cos().exp().sin()
    live = session._ledger.live_nbytes
    assert torch.equal(y.grad_fn._saved_self, x.detach().sin().cos().exp())
    assert session._ledger.live_nbytes == live
    assert session.stats.ops_replayed == 3
