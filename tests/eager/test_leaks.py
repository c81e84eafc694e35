"""Nothing leaks: reference counting alone frees all that was recorded, whatever a step did and however it ended."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import rekindle
from helpers import Layer, same_bits, small_batch, small_model
from rekindle.record import aliasing
from rekindle.record.aliasing import Tracked, window_of
from rekindle.record.tape import Tape
from rekindle.runtime import replay
from watch import living, living_tensors, modes

pytestmark = [
    pytest.mark.usefixtures("counting"),
    pytest.mark.filterwarnings("ignore:PerModule.*no module that ran"),  # some models here have no Layer
]

POLICIES = [
    None,
    rekindle.KeepAll(),
    rekindle.KeepNone(),
    rekindle.EveryN(3),
    rekindle.PerModule(Layer),
    rekindle.Balanced(0.2),
]


class Stop(Exception):
    """Raised in the middle of a step."""


def grads(model: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def train_step(model: nn.Module, session: rekindle.Session | None = None, seed: int = 0) -> list[Tensor]:
    """The gradients of one step from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(seed)
    x = small_batch(seed)
    with session if session is not None else nullcontext():
        model(x).square().mean().backward()
    return grads(model)


def assert_clean(model: nn.Module, session: rekindle.Session) -> None:
    """Nothing of the session's records is alive, and its next step is exact."""
    assert not living()
    assert modes() == 0
    assert session._recorder.tape is None
    persistent = sum(tensor is not None for p in model.parameters() for tensor in (p, p.grad))
    assert len(session._ledger.storages) <= persistent + 1  # one more for what the test itself holds
    assert all(map(same_bits, train_step(model), train_step(model, session)))
    assert not living()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_after_backward(policy):
    """After each backward pass no record is alive, inside the session and after it."""
    model, session = small_model(2), rekindle.Session(policy)
    for seed in range(3):
        x = small_batch(seed)
        with session:
            model(x).sum().backward()
            if not isinstance(policy, rekindle.KeepAll):
                assert not living()
        assert not living()
    assert_clean(model, session)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_tensors_die(policy):
    """Every tensor made in a step dies with the step."""
    model, session = small_model(2), rekindle.Session(policy)
    train_step(model, session)
    for _ in range(2):
        before = living_tensors()
        died: list[weakref.ref[Tensor]] = []
        hooks = [
            m.register_forward_hook(lambda module, args, result, died=died: died.append(weakref.ref(result)))
            for m in model.modules()
        ]
        train_step(model, session)
        for hook in hooks:
            hook.remove()
        assert len(died) == len(hooks)
        assert not any(reference() is not None for reference in died)
        assert living_tensors() == before


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_exception_in_forward(policy):
    """An exception in the middle of forward passes through and leaves nothing."""
    model, session = small_model(3), rekindle.Session(policy)

    def stop(*_: object) -> None:
        raise Stop

    for _ in range(2):
        hook = model[1].down.register_forward_hook(stop)
        try:
            train_step(model, session)
        except Stop:
            pass
        else:
            pytest.fail("did not stop")
        hook.remove()
        model.zero_grad()
        assert_clean(model, session)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_exception_in_backward(policy, inside):
    """So does one in the middle of backward, in the `with` block or after it."""
    model, session = small_model(3), rekindle.Session(policy)

    def stop(grad: Tensor) -> None:
        raise Stop

    for _ in range(2):
        x = small_batch(0)
        try:
            with session:
                middle = model[:2](x)
                middle.register_hook(stop)
                loss = model[2:](middle).sum()
                del middle
                if inside:
                    loss.backward()
            loss.backward()
        except Stop:
            pass
        else:
            pytest.fail("did not stop")
        del loss, x
        model.zero_grad()
        assert_clean(model, session)


@pytest.mark.parametrize("policy", [rekindle.KeepNone(), rekindle.EveryN(3), rekindle.PerModule(Layer)], ids=repr)
@pytest.mark.parametrize("number", [1, 2, 4])
def test_exception_in_replay(policy, number, monkeypatch):
    """So does one in the middle of a replay; the failure is counted, and the step after it is exact."""
    model, session = small_model(3), rekindle.Session(policy)
    call, count = replay._call, Counter()

    def fail(op, args, kwargs, run):
        count["ops"] += 1
        if count["ops"] == number:
            raise Stop
        return call(op, args, kwargs, run)

    for failures in (1, 2):
        count.clear()
        with monkeypatch.context() as patch:
            patch.setattr(replay, "_call", fail)
            try:
                train_step(model, session)
            except Stop:
                pass
            else:
                pytest.fail("did not stop")
        model.zero_grad()
        assert session.stats.failed_recomputes == failures
        assert_clean(model, session)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_forward_without_backward(policy):
    """Evaluation code that never calls backward leaves nothing once its result is gone, at every turn of a loop."""
    model, session = small_model(2).eval(), rekindle.Session(policy)
    x = small_batch(0)
    counts = []
    with session:
        for _ in range(4):
            result = model(x)
            counts.append((living()["Activation"], len(session._ledger.storages)))
    assert max(counts) <= (counts[0][0] + 2, counts[0][1] + 2)  # where EveryN stands changes a few
    del result
    assert not living()
    assert_clean(model.train(), session)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("policy", [None, rekindle.KeepNone(), rekindle.PerModule(Layer)], ids=repr)
def test_long_loop_without_gradients(policy, mode):
    """A long loop that feeds each result to the next call, without gradients, inside one session: bounded records."""
    session = rekindle.Session(policy)
    x, most = small_batch(0), 0
    with session, mode():
        for number in range(12_000):
            x = x.sin()
            if number % 1500 == 0:
                most = max(most, sum(living().values()))
    assert most < 3 * 4096  # one cut to the next: an op and two activations each at most
    assert len(session._ledger.storages) <= 2
    del x
    assert not living()


def test_truncated_backpropagation():
    """Many short graphs inside one session, chained by a detached state, leave the same little each time."""
    model, session = small_model(1), rekindle.Session(rekindle.KeepNone())
    state, counts = small_batch(0), []
    with session:
        for _ in range(20):
            state = model(state)
            state.square().mean().backward()
            state = state.detach()
            counts.append((living(), len(session._ledger.storages), session._ledger.live_nbytes))
    assert counts[0] == counts[-1]
    del state
    assert not living()


@pytest.mark.parametrize("policy", [rekindle.KeepNone(), rekindle.PerModule(nn.Linear), rekindle.EveryN(2)], ids=repr)
def test_thousand_steps(policy):
    """A thousand steps hold memory flat: storages, bytes, objects and tensors are what they were."""
    model, session = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)), rekindle.Session(policy)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, counts = small_batch(0, width=32), []
    for number in range(1001):
        optimizer.zero_grad()
        with session:
            model(x).sin().sum().backward()
        optimizer.step()
        if number in (10, 1000):
            ledger, retained, taken = session._ledger, session._replayer._retained, session.snapshots._taken
            numbers = (
                len(ledger.storages),
                ledger.live_nbytes,
                len(retained),
                len(taken),
                len(session._learner.plans.planned),
            )
            counts.append((numbers, living(), living_tensors(), modes()))
    objects = len(gc.get_objects())
    for _ in range(100):
        with session:
            model(x).sin().sum().backward()
    assert counts[0] == counts[1]
    assert len(gc.get_objects()) - objects < 50
    assert session.stats.steps == 1101


def test_plans_are_bounded():
    """A session that never sees the same stream of ops twice does not collect plans for ever."""
    session = rekindle.Session(rekindle.ByDepth(1))
    x = small_batch(0).requires_grad_()
    for length in range(1, 60):
        for _ in range(2):
            with session:
                y = x
                for _ in range(length):
                    y = y.sin()
                y.sum().backward()
    assert len(session._learner.plans.planned) <= 16


CHAIN = 10_000


def chain(x: Tensor, length: int = CHAIN) -> Tensor:
    """`length` ops in a row, each of which saves what it read."""
    for _ in range(length):
        x = x.sin()
    return x


@pytest.fixture(scope="module")
def plain_chain() -> Tensor:
    """The gradient of the plain run."""
    x = small_batch(0, rows=4).requires_grad_()
    chain(x).sum().backward()
    return x.grad


@pytest.mark.parametrize("policy", [None, rekindle.KeepNone(), rekindle.EveryN(100), rekindle.ByDepth(9_000)], ids=repr)
def test_long_chain_is_exact(policy, plain_chain):
    """A graph of 10,000 chained ops is recomputed, whole under `KeepNone`, without recursion, and freed again."""
    session = rekindle.Session(policy, min_nbytes=1)
    for _ in range(2):
        x = small_batch(0, rows=4).requires_grad_()
        with session:
            chain(x).sum().backward()
        assert same_bits(x.grad, plain_chain)
        assert not living()
    if isinstance(policy, rekindle.KeepNone):
        assert session.last_step.ops_replayed == CHAIN - 1
        assert session.last_step.recompute_calls == 1


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_long_chain_is_freed(where):
    """A chain of 10,000 records that owns one another is freed without overflowing the stack, used or not."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        with rekindle.Session(rekindle.KeepNone(), min_nbytes=1):
            y = chain(small_batch(0, rows=4).requires_grad_())
            assert living()["Activation"] > CHAIN
            if where == "inside":
                del y
                assert not living()
                y = None
    finally:
        sys.setrecursionlimit(limit)
    del y
    assert not living()


def test_session_dies():
    """Nothing but its user keeps a session: no registry, hook or thread. It is a cycle, which the collector frees."""
    session = rekindle.Session(rekindle.Balanced(0.3))
    model = small_model(2)
    for seed in range(3):
        train_step(model, session, seed)
    gone = [weakref.ref(session), weakref.ref(session._recorder), weakref.ref(session._replayer)]
    del session
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_graph_outlives_its_session():
    """Backward may come when the session is gone; everything is freed after it."""
    model = small_model(2)
    plain = train_step(model)
    model.zero_grad()
    torch.manual_seed(0)
    x = small_batch(0)
    with rekindle.Session(rekindle.KeepNone()):
        loss = model(x).square().mean()
    loss.backward()
    assert all(map(same_bits, plain, grads(model)))
    del loss
    assert not living()


def test_models_are_not_kept():
    """A session does not keep alive the models it has seen."""
    session, model = rekindle.Session(rekindle.KeepNone()), small_model(1)
    train_step(model, session)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert not session._ledger.storages


def test_garbage_collected_while_recording(monkeypatch):
    """Tensors in cycles, which the collector frees in the middle of what Rekindle is doing, disturb no step."""
    model, session = small_model(1), rekindle.Session(rekindle.KeepNone())
    plain_value = Tape.plain_value

    def collecting(tape: Tape, tracked: Tracked) -> int:
        gc.collect(0)
        return plain_value(tape, tracked)

    def litter(grad: Tensor) -> None:
        cycle: list[object] = [grad + 1]
        cycle.append(cycle)

    plain = train_step(model)
    monkeypatch.setattr(Tape, "plain_value", collecting)
    for parameter in model.parameters():
        parameter.register_hook(litter)
    assert all(map(same_bits, plain, train_step(model, session)))


# -- what goes in the backward pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [lambda y: y, lambda y: y.detach().softmax(1)], ids=["output", "of the output"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: rekindle.Session(memory_budget="1GiB"),
        lambda: rekindle.Session(rekindle.EveryN(2), min_nbytes=0),
        lambda: rekindle.Session(rekindle.EveryN(1), min_nbytes=0, inplace="snapshot"),
    ],
    ids=["budget", "every-2", "snapshots"],
)
def test_what_user_code_holds_keeps_nothing_else(
    make: Callable[[], rekindle.Session], held: Callable[[Tensor], Tensor]
) -> None:
    """Logits that are kept for a metric are kept, and no activation that they were made from: the backward pass lets
    go of one after the other, as plain PyTorch does."""
    model, x = small_model(6), small_batch(0)

    def live(session: rekindle.Session, hold: bool) -> list[int]:
        seen: list[int] = []
        model.zero_grad()
        torch.manual_seed(0)
        with session:
            output = model(x)
            kept = held(output)
            loss = output.mean()
            del output
            if not hold:
                del kept
            hooks = [
                layer.up.weight.register_post_accumulate_grad_hook(lambda _: seen.append(session.live_nbytes))
                for layer in model[:-1]
            ]
            loss.backward()
        for hook in hooks:
            hook.remove()
        return seen

    holding, session = make(), make()
    for _ in range(3):
        assert {a - b for a, b in zip(live(holding, True), live(session, False), strict=True)} <= {x.nbytes}


def test_few_objects_an_op():
    """What is recorded of an op is few objects for Python's garbage collector, which walks them all again and again."""
    session = rekindle.Session(rekindle.KeepNone())
    for _ in range(2):  # the first step is also written down as a graph
        y = torch.randn(64, 64, requires_grad=True)
        with session:
            y = y.tanh()
            gc.collect()
            before = len(gc.get_objects())
            for _ in range(100):
                y = y.tanh()
            made = len(gc.get_objects()) - before
            y.sum().backward()
    assert made <= 14 * 100


def test_windows_are_shared_and_few(monkeypatch):
    """Equal windows are one object; the table of them does not grow for ever, and what it forgets stays right."""
    monkeypatch.setattr(aliasing, "_windows", {})
    monkeypatch.setattr(aliasing, "_MOST_WINDOWS", 8)
    first = window_of(torch.empty(3, 5))
    assert window_of(torch.empty(3, 5)) is first
    assert window_of(torch.empty(3, 5, dtype=torch.int32)) != first
    assert window_of(torch.empty(3, 5, dtype=torch.cfloat).conj()) != window_of(torch.empty(3, 5, dtype=torch.cfloat))
    for length in range(100):
        window_of(torch.empty(length))
        assert len(aliasing._windows) <= 8
    assert window_of(torch.empty(3, 5)) == first
