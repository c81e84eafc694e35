"""Careful deletion: what may go, what never goes and why, in which order, and at any moment of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import rekindle
from helpers import assert_same_training, live_activations, same_bits, seeded, small_batch, small_model
from nets import ResNet
from rekindle import EvictionPolicy
from rekindle.record.activation import Activation
from rekindle.runtime import eviction, replay
from rekindle.runtime.eviction import Evictor, score
from rekindle.runtime.room import Room

pytestmark = pytest.mark.usefixtures("counting")  # what an earlier test left behind is not ours
NBYTES = 32 * 64 * 4
SAFE, AGGRESSIVE = EvictionPolicy.ALWAYS_SAFE, EvictionPolicy.AGGRESSIVE
POLICIES = (SAFE, AGGRESSIVE)


def leaf(seed: int = 0) -> Tensor:
    """Something to differentiate by."""
    return small_batch(seed).requires_grad_()


def of(session: rekindle.Session, tensor: Tensor) -> Activation:
    """The activation that a tensor looks at."""
    tracked = session._ledger.find(tensor)
    assert tracked is not None
    assert tracked.activation is not None
    return tracked.activation


def plain_gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
    """What plain PyTorch computes."""
    x = leaf()
    run(x).backward()
    assert x.grad is not None
    return x.grad


# -- what never goes ---------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """An activation that must not go: how to make it inside a session, and the words of the refusal."""

    make: Callable[[rekindle.Session, Tensor], tuple[Activation, Any]]
    why: str


LAYER = nn.Linear(64, 64)


def _parameter(session: rekindle.Session, x: Tensor) -> tuple[Activation, Any]:
    result = LAYER(x)
    return of(session, LAYER.weight), result


def _input(session: rekindle.Session, x: Tensor) -> tuple[Activation, Any]:
    result = x.sin()
    return of(session, x), result


def _made_by(function: Callable[[Tensor], Tensor]) -> Callable[[rekindle.Session, Tensor], tuple[Activation, Any]]:
    def make(session: rekindle.Session, x: Tensor) -> tuple[Activation, Any]:
        made = function(x)
        return of(session, made), (made * 2, made)

    return make


def _held_by_user(session: rekindle.Session, x: Tensor) -> tuple[Activation, Any]:
    hidden = x.exp()
    return of(session, hidden), (hidden, hidden.sin())


def _not_saved(session: rekindle.Session, x: Tensor) -> tuple[Activation, Any]:
    hidden = x + 1
    return of(session, hidden), hidden


def _evicted(session: rekindle.Session, x: Tensor) -> tuple[Activation, Any]:
    hidden = x.exp()
    activation, result = of(session, hidden), hidden.sin()
    del hidden
    assert session.try_evict(activation)
    return activation, result


NEVER = {
    "an input": Case(_input, "a leaf"),
    "a parameter": Case(_parameter, "a leaf"),
    "an op that routes": Case(_made_by(lambda x: x.topk(40)[0]), "routes by order"),
    "a shape that depends on a mask": Case(_made_by(lambda x: x[x > 0]), "its output shape depends on a mask"),
    "a shape that depends on data": Case(_made_by(lambda x: x.nonzero()), "its output shape depends on data"),
    "a small one": Case(_made_by(lambda x: x.sum(1)), "too small"),
    "an unseen writer": Case(_made_by(lambda x: torch.empty(32, 64)), "no recorded op has filled"),
    "the user holds it": Case(_held_by_user, "your code, or an op that runs now, looks at it too"),
    "only the user holds it": Case(_not_saved, "your code holds it; Rekindle does not"),
    "evicted already": Case(_evicted, "it is evicted already"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NEVER)
def test_never(name: str, policy: EvictionPolicy) -> None:
    """Neither policy evicts it; the answer is false, says why and nothing was freed."""
    session, case, x = rekindle.Session(), NEVER[name], leaf()
    with session:
        activation, _alive = case.make(session, x)
        live = session.live_nbytes
        answer = session.try_evict(activation, policy)
        assert not answer
        assert answer == rekindle.Eviction(False, 0, answer.why_not)
        assert case.why in answer.why_not
        session.sweep(policy)
        assert session.live_nbytes <= live
        assert activation.is_live == (name != "evicted already")


@pytest.mark.parametrize("policy", POLICIES)
def test_never_when_sources_are_gone(policy: EvictionPolicy) -> None:
    """What would be recomputed from a weight that an optimizer has stepped since stays, and says what is gone."""
    session, x = rekindle.Session(), leaf()
    weight = small_batch(1).requires_grad_()
    with session:
        hidden = (x * weight).exp()
        activation, loss = of(session, hidden), hidden.sum()
        del hidden
    with torch.no_grad():
        weight.add_(1)
    answer = session.try_evict(activation, policy)
    assert not answer
    assert "what it would be recomputed from is gone" in answer.why_not
    assert "aten.mul.Tensor" in answer.why_not
    assert session.sweep(policy).evicted == 0
    assert activation.is_live
    del loss


def test_never_what_a_running_op_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op's own argument stays while it runs, though nobody but the op holds it."""
    session, answers = rekindle.Session(), []
    run = Room.run

    def spy(self, func, args, kwargs, call, random=None):
        if func is torch.ops.aten.sin.default:
            answers.append(session.try_evict(of(session, args[0]), AGGRESSIVE))
        return run(self, func, args, kwargs, call, random)

    monkeypatch.setattr(Room, "run", spy)
    x = leaf()
    with session:
        x.exp().sin().sum().backward()
    assert [answer.why_not for answer in answers] == ["your code, or an op that runs now, looks at it too"]


# -- what may go -------------------------------------------------------------------------------------------------------


def test_evicts() -> None:
    """A recomputable activation goes: true, its bytes freed at once and counted, and the gradient exact."""
    session, x = rekindle.Session(), leaf()
    with session:
        hidden = x.exp()
        activation, loss = of(session, hidden), hidden.sin().sum()
        del hidden
        live = session.live_nbytes
        answer = session.try_evict(activation)
        assert answer
        assert answer == rekindle.Eviction(True, NBYTES, "")
        assert session.live_nbytes == live - NBYTES
        assert not activation.is_live
        assert (session.last_step.evicted, session.last_step.evicted_nbytes) == (1, NBYTES)
        loss.backward()
    assert same_bits(x.grad, plain_gradient(lambda x: x.exp().sin().sum()))


def test_checkpoint() -> None:
    """ALWAYS_SAFE, the default, refuses a checkpoint and names the policy that does not; AGGRESSIVE evicts it."""
    session, x = rekindle.Session(), leaf()
    with session:
        hidden = x.exp()
        mark, loss = session.mark(hidden), hidden.sin().sum()
        del hidden
        for answer in (session.try_evict(mark), session.try_evict(mark, SAFE)):
            assert not answer
            assert answer.why_not == "it is a checkpoint; only EvictionPolicy.AGGRESSIVE evicts those"
        assert mark.is_live
        assert session.try_evict(mark, AGGRESSIVE) == rekindle.Eviction(True, NBYTES)
        assert not mark.is_live
        assert mark.is_checkpoint
        loss.backward()
    assert same_bits(x.grad, plain_gradient(lambda x: x.exp().sin().sum()))


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("verify", [False, True])
def test_what_was_read_for_nothing_can_go(times: int, verify: bool) -> None:
    """A checkpoint that ops read whose results die, such as a norm to be printed, is what it was while user code holds
    it: known to be recomputable, at its position of a plan, held again when something needs it."""

    def run(x: Tensor, session: rekindle.Session | None) -> Tensor:
        hidden = (x * 2).sin()
        known = of(session, hidden) if session is not None else None
        maker, value = (known.op, known.value_id) if known is not None else (None, 0)
        del known
        for _ in range(times):
            hidden.norm()
        if session is not None:
            again = of(session, hidden)
            assert again.op is maker
            assert again.value_id == value
            assert again.is_checkpoint
            assert maker is not None
            assert list(maker.results()) == [again]
            del again, maker
        result = hidden.exp() * hidden.cos()
        assert session is None or of(session, hidden).held is not None
        del hidden
        if session is not None:
            assert session.sweep(AGGRESSIVE).freed_nbytes >= NBYTES
        return result.sum()

    expected = plain_gradient(lambda x: run(x, None))
    session = rekindle.Session(rekindle.EveryN(1), verify=verify)
    for _ in range(2):
        x = leaf()
        with session:
            run(x, session).backward()
        assert x.grad is not None
        assert same_bits(x.grad, expected)
        assert session.last_step.ops_replayed > 0


def test_what_was_read_for_nothing_goes_with_what_user_code_holds() -> None:
    """Nobody but user code keeps it: its bytes and its record end with the tensor."""
    session, x = rekindle.Session(rekindle.EveryN(1)), leaf()
    with session:
        hidden = (x * 2).sin()
        before = live_activations()
        for _ in range(3):
            hidden.norm()
            assert live_activations() == before
        live = session.live_nbytes
        del hidden
        assert live - session.live_nbytes == 2 * NBYTES  # of what `sin` saved, too
        assert live_activations() < before


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_that_cannot_be_recomputed(policy: EvictionPolicy) -> None:
    """AGGRESSIVE is not reckless: a marked leaf, and a marked result of an op that routes, stay."""
    session, x = rekindle.Session(), leaf()
    with session:
        values = x.topk(40)[0]
        marks = [session.mark(x), session.mark(values)]
        loss = (values * values).sum()
        del values
        assert [bool(session.try_evict(mark, policy)) for mark in marks] == [False, False]
        assert all("can never be recomputed" in session.try_evict(mark, policy).why_not for mark in marks)
        session.sweep(policy)
        assert all(mark.is_live for mark in marks)
        loss.backward()


def test_snapshot_goes_last() -> None:
    """A snapshot is refused by ALWAYS_SAFE; AGGRESSIVE lets it go if what it protects can be recomputed."""

    def run(x: Tensor, session: rekindle.Session | None) -> Tensor:
        hidden = x.exp()
        if session is not None:
            session.mark(hidden)
        loss = (hidden * x).sum()
        hidden.add_(1)
        return loss

    session, x = rekindle.Session(inplace="snapshot"), leaf()
    with session:
        loss = run(x, session)
        assert session.snapshots.nbytes == NBYTES
        assert session.sweep(SAFE).freed_nbytes == 0
        assert session.snapshots.nbytes == NBYTES
        sweep = session.sweep(AGGRESSIVE)
        assert sweep.freed_nbytes >= NBYTES
        assert session.snapshots.nbytes == 0
        loss.backward()
    y = leaf()
    (y.exp() * y).sum().backward()
    assert same_bits(x.grad, y.grad)


def chain(session: rekindle.Session, x: Tensor, marked: bool = True) -> tuple[Tensor, list[Activation]]:
    """exp, sin, cos, sin of `x`, each saved; the second marked."""
    a = x.exp()
    b = a.sin()
    c = b.cos()
    d = c.sin()
    activations = [of(session, tensor) for tensor in (a, b, c, d)]
    if marked:
        session.mark(b)
    return (d * d).sum(), activations


def chain_gradient() -> Tensor:
    """Of the same."""

    def run(x: Tensor) -> Tensor:
        last = x.exp().sin().cos().sin()
        return (last * last).sum()

    return plain_gradient(run)


@pytest.mark.parametrize("policy", POLICIES)
def test_sweep(policy: EvictionPolicy) -> None:
    """One sweep evicts all that its policy allows, tells what it did to the byte, and is counted."""
    session, x = rekindle.Session(), leaf()
    with session:
        loss, (a, mark, c, d) = chain(session, x)
        live = session.live_nbytes
        sweep = session.sweep(policy)
        aggressive = policy is AGGRESSIVE
        assert sweep.evicted == 3 + aggressive
        assert sweep.checkpoints == aggressive
        assert sweep.freed_nbytes == sweep.evicted * NBYTES == live - session.live_nbytes
        assert sweep.live_nbytes == session.live_nbytes
        assert [a.is_live, mark.is_live, c.is_live, d.is_live] == [False, not aggressive, False, False]
        again = session.sweep(policy)
        assert (again.freed_nbytes, again.evicted, again.checkpoints) == (0, 0, 0)
        assert session.last_step.sweeps == 2
        loss.backward()
    assert same_bits(x.grad, chain_gradient())


# -- sweep to a target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "policy", "evicted", "checkpoints", "reached"),
    [
        (4, SAFE, 0, 0, True),
        (3, SAFE, 1, 0, True),
        (2.5, SAFE, 2, 0, True),
        (1, SAFE, 3, 0, True),
        (0, SAFE, 3, 0, False),
        (1, AGGRESSIVE, 3, 0, True),
        (0, AGGRESSIVE, 4, 1, True),
    ],
)
def test_target(keep: float, policy: EvictionPolicy, evicted: int, checkpoints: int, reached: bool) -> None:
    """Just as much is evicted as the target asks for; the checkpoint only if allowed and still needed."""
    session, x = rekindle.Session(), leaf()
    with session:
        loss, _ = chain(session, x)
        rest = session.live_nbytes - 4 * NBYTES
        target = int(rest + keep * NBYTES)
        sweep = session.sweep_to_target(target, policy)
        assert (sweep.evicted, sweep.checkpoints, sweep.reached) == (evicted, checkpoints, reached)
        assert sweep.freed_nbytes == evicted * NBYTES
        assert sweep.live_nbytes == session.live_nbytes
        assert (session.live_nbytes <= target) == reached
        assert bool(sweep.why_not) != reached
        loss.backward()
    assert same_bits(x.grad, chain_gradient())


def test_target_that_cannot_be_reached() -> None:
    """It says by how much, and names the largest of what stays with the reason."""
    session, x = rekindle.Session(), leaf()
    with session:
        loss, _ = chain(session, x)
        sweep = session.sweep_to_target(0)
        assert not sweep.reached
        assert "8.0 KiB more than the target are still live" in sweep.why_not
        assert "8.0 KiB float32[32, 64], made by aten.sin.default in no module: it is a checkpoint" in sweep.why_not
        del loss


@pytest.mark.parametrize("target", ["16 KiB", "0.016MiB", 16384, "16.384 KB"])
def test_target_spelled(target: int | str) -> None:
    """A target is a number of bytes or a string, as everywhere."""
    session, x = rekindle.Session(), leaf()
    with session:
        loss, _ = chain(session, x, marked=False)
        assert session.sweep_to_target(target).reached
        assert NBYTES < session.live_nbytes <= 16800
        del loss


@pytest.mark.parametrize("target", ["16K", "lots", -1, 1.5])
def test_target_refused(target: Any) -> None:
    """What is no amount of memory is refused, and nothing evicted."""
    session, x = rekindle.Session(), leaf()
    with session:
        loss, _ = chain(session, x)
        live = session.live_nbytes
        with pytest.raises(rekindle.BytesError):
            session.sweep_to_target(target)
        assert session.live_nbytes == live
        del loss


def branches(session: rekindle.Session, x: Tensor, sizes: tuple[int, ...]) -> tuple[list[Tensor], list[Activation]]:
    """Independent activations of some rows each, made from `x`."""
    losses, activations = [], []
    for rows in sizes:
        hidden = x[:rows].exp()
        activations.append(of(session, hidden))
        losses.append(hidden.sum())
    return losses, activations


def order(monkeypatch: pytest.MonkeyPatch, session: rekindle.Session, policy: EvictionPolicy) -> list[Activation]:
    """In which order a sweep evicts."""
    log: list[Activation] = []
    try_evict = Evictor.try_evict

    def spy(self, activation, policy=SAFE):
        answer = try_evict(self, activation, policy)
        if answer:
            log.append(activation)
        return answer

    monkeypatch.setattr(Evictor, "try_evict", spy)
    session.sweep_to_target(0, policy)
    return log


@pytest.mark.parametrize(
    ("rows", "seconds", "last_use", "expected"),
    [
        ((32, 32, 32), (3.0, 1.0, 2.0), (1, 1, 1), [1, 2, 0]),  # the cheapest to recompute first
        ((8, 32, 16), (1.0, 1.0, 1.0), (1, 1, 1), [1, 2, 0]),  # the largest first
        ((32, 32, 32), (1.0, 1.0, 1.0), (3, 1, 2), [1, 2, 0]),  # the one not used for longest first
        ((8, 32, 32), (1.0, 3.0, 8.0), (1, 1, 1), [1, 0, 2]),  # seconds per byte
    ],
)
def test_order(monkeypatch: pytest.MonkeyPatch, rows, seconds, last_use, expected) -> None:
    """Within a group the lowest of DTR's h goes first: seconds for each byte and each op since the last use."""
    session, x = rekindle.Session(), leaf()
    with session:
        losses, activations = branches(session, x, rows)
        for activation, cost, use in zip(activations, seconds, last_use, strict=True):
            activation.op.seconds, activation.last_use = cost, use
        assert [activations.index(gone) for gone in order(monkeypatch, session, SAFE)] == expected
        del losses


def test_order_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no checkpoint goes first, then checkpoints, snapshots last, whatever their scores."""
    session, x = rekindle.Session(inplace="snapshot"), leaf()
    with session:
        dear = x.exp()
        cheap = x.sin().exp()
        copied = x.cos().exp()
        marks = [session.mark(cheap), session.mark(copied)]
        losses = [dear.sum(), cheap.sum(), copied.sum()]
        activation = of(session, dear)
        copied.mul_(2)
        assert marks[1].snapshot
        activation.op.seconds, marks[0].op.seconds, marks[1].op.seconds = 100.0, 1.0, 0.01
        del dear, cheap, copied
        gone = order(monkeypatch, session, AGGRESSIVE)
        found = [gone.index(one) for one in (activation, *marks)]
        assert found == sorted(found)
        del losses


def test_score() -> None:
    """h counts the evicted neighbours on both sides: what it is recomputed from, and what is recomputed from it."""
    session, x = rekindle.Session(), leaf()
    with session:
        loss, (a, b, c, d) = chain(session, x, marked=False)
        for activation, seconds in zip((a, b, c, d), (1.0, 10.0, 100.0, 1000.0), strict=True):
            activation.op.seconds, activation.last_use = seconds, 0
        now = 4
        assert score(b, now) == 10.0 / (NBYTES * 4)
        session.try_evict(a)
        assert score(b, now) == 11.0 / (NBYTES * 4)
        session.try_evict(c)
        assert score(b, now) == 111.0 / (NBYTES * 4)
        session.try_evict(d)
        assert score(b, now) == 1111.0 / (NBYTES * 4)
        assert score(b, 8) == 1111.0 / (NBYTES * 8)
        b.last_use = 6
        assert score(b, 8) == 1111.0 / (NBYTES * 2)
        assert score(b, 0) == 1111.0 / NBYTES
        del loss
    assert "Kirisame" in str(eviction.__doc__)


def test_long_neighbourhoods_are_bounded() -> None:
    """Scoring one activation of a long evicted chain looks at a bounded number of neighbours."""
    session, x = rekindle.Session(), leaf()
    with session:
        hidden = x
        for _ in range(300):
            hidden = hidden.sin()
        middle, loss = of(session, hidden), hidden.exp().sum()
        session.sweep()
        for op in replay.missing_ops(middle).ops:
            op.seconds = 1.0
        assert score(middle, 0) * NBYTES <= 2 * eviction._MOST_NEIGHBOURS + 2
        del loss


# -- at any moment -----------------------------------------------------------------------------------------------------


def inplace_net() -> nn.Module:
    """A ResNet with in-place ReLU and residual adds, and BatchNorm."""
    return ResNet((1, 1), width=8, classes=4)


def images(seed: int) -> dict[str, Tensor]:
    """A batch of it."""
    generator = seeded(seed)
    return {"images": torch.randn(4, 3, 32, 32, generator=generator), "labels": torch.arange(4)}


def forward(model: nn.Module, number: int) -> Tensor:
    """The loss of either model."""
    if isinstance(model, ResNet):
        return model(**images(number))
    return model(small_batch(number)).square().mean()


MODELS = {"mlp with dropout": small_model, "in-place resnet": inplace_net}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
each_policy = pytest.mark.parametrize("policy", POLICIES)
each_start = pytest.mark.parametrize("start", [None, rekindle.KeepNone(), rekindle.EveryN(2)], ids=repr)


def check(make: Callable[[], nn.Module], start: Any, arrange: Callable[[rekindle.Session, nn.Module], Any]) -> None:
    """Training in a session, in which `arrange` sweeps, equals plain training bit for bit."""
    sessions: list[rekindle.Session] = []

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed:
            hooks = []
            if isinstance(managed, rekindle.Session):
                sessions.append(managed)
                hooks = list(arrange(managed, model) or ())
            loss = forward(model, number)
            if isinstance(managed, rekindle.Session):
                loss.register_hook(lambda gradient: None)
            loss.backward()
            for hook in hooks:
                hook.remove()
        return loss

    session = assert_same_training(make, step, start)
    assert session.stats.sweeps > 0
    assert session.stats.ops_replayed > 0


@each_model
@each_policy
@each_start
def test_between_forward_and_backward(make: Any, policy: EvictionPolicy, start: Any) -> None:
    """Sweep when the loss is there: the gradients are exact, whatever the session's own policy kept."""

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed:
            loss = forward(model, number)
            if isinstance(managed, rekindle.Session):
                for activation in _activations(managed)[::3]:
                    if activation.op is not None and activation.held is not None:
                        activation.is_checkpoint = True
                managed.sweep(policy)
            loss.backward()
        return loss

    assert assert_same_training(make, step, start).stats.sweeps == 3


@each_model
@each_policy
@each_start
def test_in_forward(make: Any, policy: EvictionPolicy, start: Any) -> None:
    """Sweep from a hook after each module, in the middle of forward."""

    def arrange(session: rekindle.Session, model: nn.Module) -> Iterator[Any]:
        for module in model.modules():
            yield module.register_forward_hook(lambda *call: session.sweep(policy) and None)

    check(make, start, arrange)


@each_model
@each_policy
@each_start
def test_in_backward(make: Any, policy: EvictionPolicy, start: Any) -> None:
    """Sweep from a tensor hook on what each layer made, in the middle of backward."""

    def arrange(session: rekindle.Session, model: nn.Module) -> Iterator[Any]:
        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: session.sweep(policy) and None)

        for module in model.modules():
            if not isinstance(module, nn.ReLU):
                yield module.register_forward_hook(watch)

    check(make, start, arrange)


@each_policy
def test_in_module_backward_hook(policy: EvictionPolicy) -> None:
    """Sweep from full backward hooks of modules."""

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        session = managed if isinstance(managed, rekindle.Session) else None
        hooks = [m.register_full_backward_hook(lambda *c: session and session.sweep(policy) and None) for m in model]
        with managed:
            loss = model(small_batch(number).requires_grad_()).square().mean()
            if session is not None:
                session.sweep(AGGRESSIVE)
            loss.backward()
        for hook in hooks:
            hook.remove()
        return loss

    session = assert_same_training(small_model, step, None)
    assert session.stats.sweeps > 3
    assert session.stats.ops_replayed > 0


@each_model
@each_policy
@each_start
def test_in_a_replay(monkeypatch: pytest.MonkeyPatch, make: Any, policy: EvictionPolicy, start: Any) -> None:
    """Sweep before and after each op of each replay: nothing is pulled from under it."""
    sessions: list[rekindle.Session] = []
    call = replay._call

    def spy(op, args, kwargs, run):
        sessions[-1].sweep(policy)
        result = call(op, args, kwargs, run)
        sessions[-1].sweep(policy)
        return result

    monkeypatch.setattr(replay, "_call", spy)

    def step(model: nn.Module, number: int, managed: Any) -> Tensor:
        with managed:
            loss = forward(model, number)
            if isinstance(managed, rekindle.Session):
                sessions.append(managed)
                managed.sweep(AGGRESSIVE)
            loss.backward()
        return loss

    session = assert_same_training(make, step, start)
    assert session.stats.sweeps > 10


def test_a_replay_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a running replay reads is refused: evicting it would free nothing and cost a second replay."""
    session, x, answers = rekindle.Session(), leaf(), []
    call = replay._call

    def spy(op, args, kwargs, run):
        answers.append(session.try_evict(mark, AGGRESSIVE))
        return call(op, args, kwargs, run)

    with session:
        loss, (_, mark, _, _) = chain(session, x)
        session.sweep()
        monkeypatch.setattr(replay, "_call", spy)
        loss.backward()
    assert "looks at it too" in answers[0].why_not
    assert same_bits(x.grad, chain_gradient())


def _activations(session: rekindle.Session) -> list[Activation]:
    found = (tracked.activation for tracked in session._ledger.storages.values())
    return [activation for activation in found if activation is not None]


# -- random programs ---------------------------------------------------------------------------------------------------

CODES = ("exp", "linear", "dropout", "view", "branch", "join", "add_", "mul_slice_", "relu_", "copy", "norm")
program = st.lists(st.sampled_from(CODES), min_size=3, max_size=12)
moments = st.lists(st.sampled_from([None, None, SAFE, AGGRESSIVE, "mark", "target"]), min_size=12, max_size=12)


def run_program(codes: list[str], session: rekindle.Session | None, actions: list[Any], backward: list[Any]) -> Tensor:
    """A small net written as a list of steps, with something done to the session after each."""
    torch.manual_seed(0)
    weight = (torch.randn(32, 32) / 6).requires_grad_()
    x = torch.randn(32, 32, requires_grad=True)
    later = list(backward)

    def hook(gradient: Tensor) -> None:
        if session is not None and later:
            _do(session, later.pop(), None)

    with session if session is not None else nullcontext():
        hidden, branch = x * 1.0, x * 0.5
        for code, action in zip(codes, actions, strict=False):
            hidden, branch = _apply(code, hidden, branch, weight)
            hidden.register_hook(hook)
            if session is not None:
                _do(session, action, hidden)
        loss = (hidden.tanh() * branch.tanh()).sum()
        del hidden, branch
        if session is not None:
            _do(session, actions[-1], None)
        loss.backward()
    random = torch.rand(1)
    assert x.grad is not None
    return torch.cat([loss.detach().view(1), x.grad.flatten(), _gradient(weight), random])


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.numel()) if tensor.grad is None else tensor.grad.flatten()


def _apply(code: str, hidden: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if code == "exp":
        return hidden.tanh().exp(), branch
    if code == "linear":
        return hidden @ weight, branch
    if code == "dropout":
        return F.dropout(hidden, 0.3), branch
    if code == "view":
        return hidden.t()[:, ::2].repeat(1, 2), branch
    if code == "branch":
        return hidden.sin(), hidden.cos()
    if code == "join":
        return hidden + branch, branch.sigmoid()
    if code == "add_":
        return (hidden + 0).add_(branch), branch
    if code == "mul_slice_":
        fresh = hidden.clone()
        fresh[4:9].mul_(0.5)
        return fresh, branch
    if code == "relu_":
        return (hidden * 1.5).relu_(), branch
    if code == "copy":
        filled = torch.empty(32, 32)
        filled.copy_(hidden)
        return filled, branch
    return F.layer_norm(hidden, (32,)), branch


def _do(session: rekindle.Session, action: Any, hidden: Tensor | None) -> None:
    if isinstance(action, EvictionPolicy):
        session.sweep(action)
    elif action == "target":
        session.sweep_to_target(max(1, session.live_nbytes // 2), AGGRESSIVE)
    elif action == "mark" and hidden is not None:
        session.mark(hidden)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(program, moments, moments, st.sampled_from([None, rekindle.KeepNone(), rekindle.EveryN(2)]))
def test_random_programs(codes: list[str], actions: list[Any], backward: list[Any], start: Any) -> None:
    """Random nets with dropout, views, in-place writes and branches, swept and marked at random moments of forward and
    backward: the same bits, and nothing stays alive."""
    session = rekindle.Session(start)
    expected = run_program(codes, None, actions, backward)
    assert same_bits(run_program(codes, session, actions, backward), expected)
    assert session.stats.failed_recomputes == 0
    assert live_activations() == 0
