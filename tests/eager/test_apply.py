"""`rekindle.apply` and `remove`: a model in a training loop that knows nothing of Rekindle."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

import rekindle
from helpers import Layer, assert_same, same_bits, small_batch, small_model, train
from peak import peak_bytes
from rekindle import _api
from rekindle.policy import Planner
from rekindle.runtime.room import kept_back
from watch import living, modes

engine = torch.autograd._engine_run_backward


def step(model: nn.Module, number: int, _: object) -> Tensor:
    """What a foreign training loop does: it enters no session."""
    loss = model(small_batch(number)).square().mean()
    loss.backward()
    return loss


def global_hooks() -> int:
    """How many hooks PyTorch calls for every module."""
    return len(torch_module._global_forward_hooks) + len(torch_module._global_forward_pre_hooks)


def grads(model: nn.Module) -> list[Tensor | None]:
    """The gradients of all parameters."""
    return [parameter.grad for parameter in model.parameters()]


class Recursive(nn.Module):
    """A module that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        """Apply the layer `times` times and once more."""
        x = self.layer(x).tanh()
        return self(x, times - 1) if times else x


class Failing(nn.Module):
    """Raises in the middle of its forward, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Two layers."""
        x = self.first(x).tanh()
        if self.error is not None:
            raise self.error("mine")
        return self.second(x).tanh()


@pytest.fixture
def applied():
    """Applies models, and removes them when the test is over."""
    models: list[nn.Module] = []

    def apply(model, policy=None, **options):
        models.append(model)
        return rekindle.apply(model, policy, **options)

    yield apply
    for model in models:
        try:
            rekindle.remove(model)
        except rekindle.SessionError:
            continue
    assert global_hooks() == 0
    assert modes() == 0


pytestmark = pytest.mark.filterwarnings("ignore:PerModule.*no module that ran")  # some models here have no Layer

POLICIES = [
    rekindle.KeepAll(),
    rekindle.KeepNone(),
    rekindle.EveryN(3),
    rekindle.PerModule(Layer),
    rekindle.Balanced(0.2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_trains_exactly_in_a_foreign_loop(policy, applied):
    """A loop that never heard of Rekindle gets the same losses, gradients and random state, bit for bit."""
    assert_same(train(small_model, step), train(lambda: applied(small_model(), policy), step))
    assert not living()


def test_works_after_forward_returned(applied):
    """The session is over when forward returns; evicted activations come back in a backward pass called later."""
    model = applied(small_model(), rekindle.KeepNone())
    loss = model(small_batch(0)).sum()
    assert modes() == 0
    assert rekindle.session_of(model).stats.ops_replayed == 0
    loss.backward()
    assert rekindle.session_of(model).stats.ops_replayed > 0


def test_returns_the_same_object(applied):
    """`apply` and `remove` give back the very module, its class and its attributes unchanged."""
    model = small_model()
    cls, attributes, keys = type(model), dict(vars(model)), list(model.state_dict())
    assert applied(model, rekindle.KeepNone()) is model
    model(small_batch(0)).sum().backward()
    assert type(model) is cls
    assert vars(model).keys() == attributes.keys()
    assert list(model.state_dict()) == keys
    assert rekindle.remove(model) is model


def test_hooks_of_others_run_as_before(applied):
    """Hooks on the module run once per forward, in their order, and are still there after `remove`."""
    seen = []
    model = small_model(2)
    model.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.register_forward_hook(lambda *_: seen.append("post"))
    model.register_full_backward_hook(lambda *_: seen.append("backward"))
    applied(model, rekindle.KeepNone())
    model(small_batch(0).requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"]
    rekindle.remove(model)
    model(small_batch(0).requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"] * 2


def test_pickles_as_before(applied):
    """An applied model pickles to the same bytes, and what is loaded is a plain model."""
    model = small_model(2)
    before = pickle.dumps(model)
    applied(model, rekindle.KeepNone())
    model(small_batch(0))
    assert pickle.dumps(model) == before
    with pytest.raises(rekindle.SessionError):
        rekindle.session_of(pickle.loads(before))


def test_saves_as_before(applied):
    """`torch.save` of an applied model's `state_dict` is what it was."""
    model = small_model(2)
    files = [io.BytesIO(), io.BytesIO()]
    torch.save(model.state_dict(), files[0])
    applied(model, rekindle.KeepNone())
    torch.save(model.state_dict(), files[1])
    assert files[0].getvalue() == files[1].getvalue()


def test_copies_are_plain(applied):
    """A deep copy of an applied model is not applied, and trains on its own."""
    model = applied(small_model(2), rekindle.KeepNone())
    twin = copy.deepcopy(model)
    twin(small_batch(0)).sum().backward()
    assert rekindle.session_of(model).stats.steps == 0
    with pytest.raises(rekindle.SessionError):
        rekindle.session_of(twin)


def test_module_paths_begin_at_the_model(applied):
    """Module paths are those of `model.named_modules()`, so `PerModule("0")` means `model[0]`."""
    model = applied(small_model(2), rekindle.PerModule("0"))
    model(small_batch(0)).sum().backward()
    session = rekindle.session_of(model)
    assert session.graph is not None
    paths = {call.path for call in session.graph.calls}
    assert paths == {name for name, _ in model.named_modules()}
    assert {value.name for value in session.graph.values if value.name} == {n for n, _ in model.named_parameters()}
    assert 0 < session.stats.evicted <= 5


def test_remove_undoes_it(applied):
    """After `remove` no hook is left, no mode is active, and no activation is evicted."""
    model = applied(small_model(), rekindle.KeepNone())
    session = rekindle.session_of(model)
    rekindle.remove(model)
    assert global_hooks() == 0
    model(small_batch(0)).sum().backward()
    assert session.stats.steps == 0


def test_remove_between_forward_and_backward(applied):
    """What was evicted before `remove` is still recomputed after it."""
    plain, managed = small_model(), small_model()
    managed.load_state_dict(plain.state_dict())
    applied(managed, rekindle.KeepNone())
    losses = []
    for model in (plain, managed):
        torch.manual_seed(1)
        losses.append(model(small_batch(0)).sum())
    rekindle.remove(managed)
    for loss in losses:
        loss.backward()
    assert all(map(torch.equal, grads(plain), grads(managed)))


def test_apply_again_after_remove(applied):
    """A removed model can be applied again, with another policy."""
    model = applied(small_model(), rekindle.KeepAll())
    rekindle.remove(model)
    applied(model, rekindle.KeepNone())
    model(small_batch(0)).sum().backward()
    assert rekindle.session_of(model).stats.ops_replayed > 0


@pytest.mark.parametrize("policy", POLICIES[1:], ids=repr)
def test_a_module_that_calls_itself(policy, applied):
    """The outermost call is the step; the inner calls of the same module belong to it."""

    def recursive(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model(small_batch(number)).square().mean()
        loss.backward()
        return loss

    managed = []

    def make() -> nn.Module:
        managed.append(applied(Recursive(), policy))
        return managed[0]

    assert_same(train(Recursive, recursive), train(make, recursive))
    assert rekindle.session_of(managed[0]).stats.steps == 3


def test_two_applied_models(applied):
    """Two applied models, one feeding the other, have a session each and train exactly."""

    def make() -> nn.Module:
        return nn.ModuleList([small_model(2), small_model(2)])

    def both(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model[1](model[0](small_batch(number)).tanh()).square().mean()
        loss.backward()
        return loss

    def make_applied() -> nn.Module:
        models = make()
        applied(models[0], rekindle.KeepNone())
        applied(models[1], rekindle.PerModule(Layer))
        sessions.extend(map(rekindle.session_of, models))
        return models

    sessions: list[rekindle.Session] = []
    assert_same(train(make, both), train(make_applied, both))
    assert [session.stats.steps for session in sessions] == [3, 3]
    assert all(session.stats.ops_replayed > 0 for session in sessions)


@pytest.mark.parametrize("outer", POLICIES, ids=repr)
def test_nested_applied_models(outer, applied):
    """An applied model inside an applied model: each looks after its own activations, and all is exact."""

    def make_applied() -> nn.Module:
        model = small_model()
        applied(model[1], rekindle.KeepNone())
        return applied(model, outer)

    assert_same(train(small_model, step), train(make_applied, step))


def test_applied_model_inside_a_session(applied):
    """An applied model called inside somebody's session trains exactly."""

    def make_applied() -> nn.Module:
        model = small_model()
        applied(model[1], rekindle.KeepNone())
        return model

    def inside(model: nn.Module, number: int, session: object) -> Tensor:
        with session:
            loss = model(small_batch(number)).square().mean()
            loss.backward()
        return loss

    managed = train(make_applied, inside, rekindle.Session(rekindle.EveryN(2)))
    assert_same(train(small_model, inside), managed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_in_forward_pass_through(error, applied, counting):
    """The user sees the error of forward and no other; the next step is managed and exact, nothing stays alive."""
    plain, managed = Failing(), Failing()
    managed.load_state_dict(plain.state_dict())
    applied(managed, rekindle.KeepNone())
    managed.error = error
    for _ in range(2):
        with pytest.raises(error, match="mine"):
            managed(small_batch(0))
    managed.error = None
    for model in (plain, managed):
        model(small_batch(0)).sum().backward()
    assert all(map(torch.equal, grads(plain), grads(managed)))
    assert rekindle.session_of(managed).last_step.ops_replayed > 0
    assert not living()
    assert modes() == 0


def test_exception_in_a_pre_hook(applied):
    """An error in somebody's pre-hook, before forward has begun, leaves no session open."""
    model = applied(small_model(2), rekindle.KeepNone())

    def fail(*_):
        raise ValueError("mine")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="mine"):
        model(small_batch(0))
    assert modes() == 0
    hook.remove()
    model(small_batch(0)).sum().backward()
    assert rekindle.session_of(model).last_step.ops_replayed > 0


def test_remove_after_an_interrupt(applied):
    """A KeyboardInterrupt, of which PyTorch tells no hook, leaves a session that `remove` closes."""
    model = applied(Failing(), rekindle.KeepNone())
    model.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        model(small_batch(0))
    rekindle.remove(model)
    assert modes() == 0


def test_failed_forward_is_not_planned_from(applied):
    """A policy that plans from a whole step does not plan from one that failed half way."""
    model = applied(Failing(), rekindle.ByDepth(1))
    model.error = ValueError
    with pytest.raises(ValueError, match="mine"):
        model(small_batch(0))
    assert rekindle.session_of(model).plan is None


def test_evaluation_leaves_nothing(applied, counting):
    """Forwards without a backward, with gradients or without, leave no record once their result is gone."""
    model = applied(small_model().eval(), rekindle.KeepNone())
    with torch.no_grad():
        for _ in range(3):
            result = model(small_batch(0))
    assert not living()
    result = model(small_batch(0))
    del result
    assert not living()


def test_last_graph_is_freed_with_the_result(applied, counting):
    """A second forward without backward frees the first one's graph: the records do not add up."""
    model = applied(small_model(), rekindle.KeepNone())
    counts = []
    for _ in range(4):
        result = model(small_batch(0))
        counts.append(living())
    assert counts[1] == counts[2] == counts[3]
    del result
    assert not living()


def test_ends_with_the_model(counting):
    """A model that is gone without `remove` leaves no hook behind."""
    model = rekindle.apply(small_model(1), rekindle.KeepNone())
    model(small_batch(0)).sum().backward()
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert global_hooks() == 0


def test_second_thread_is_refused(applied):
    """While one thread runs an applied model, another gets an error that says so, and the first is not disturbed."""
    model = applied(Failing(), rekindle.KeepNone())
    refused = []

    def intrude(*_):
        def run() -> None:
            with pytest.raises(rekindle.SessionError, match="another thread") as caught:
                model(small_batch(0))
            refused.append(caught)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    hook = model.first.register_forward_hook(intrude)
    loss = model(small_batch(0)).sum()
    hook.remove()
    loss.backward()
    assert len(refused) == 1
    assert rekindle.session_of(model).last_step.ops_replayed > 0
    assert modes() == 0


# -- the backward pass belongs to the step -----------------------------------------------------------------------------


class WithLoss(nn.Module):
    """A model that computes its loss, as those of `transformers` do."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.body = small_model(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        return self.body(x).square().mean()


ROWS = 256


def own_loss(model: nn.Module, number: int, managed: object) -> Tensor:
    """A step of `WithLoss` in a foreign loop, or in a session."""
    x = small_batch(number, rows=ROWS)
    with managed:
        loss = model(x)
        loss.backward()
    return loss.detach()


def budget_of(share: float) -> int:
    """A budget that lies a share of the way from the floor to the full need of a step of `WithLoss`."""
    session = rekindle.Session(memory_budget="1GiB")
    train(WithLoss, own_loss, session)
    planner = Planner(session.plan.graph)
    budget = planner.floor() + int(share * (planner.full - planner.floor()))
    return budget + kept_back(budget + kept_back(budget)) + (1 << 13)


def test_budget_is_planned_as_in_a_session(applied):
    """Under `apply` a budget leads to the plans that a session around the loop has: as many replays, step by step, no
    departure, and the same numbers as plain."""
    budget = budget_of(0.4)

    def replays(make, managed):
        counts = []

        def counted(model, number, within):
            loss = own_loss(model, number, within)
            session = managed or rekindle.session_of(model)
            counts.append((session.last_step.ops_replayed, session.last_step.departures, session.plan is not None))
            return loss

        return train(make, counted, managed, steps=5), counts

    session = rekindle.Session(memory_budget=budget, cost="roofline")
    within, expected = replays(WithLoss, session)
    managed, counts = replays(lambda: applied(WithLoss(), memory_budget=budget, cost="roofline"), None)
    plain = train(WithLoss, own_loss, steps=5)
    assert_same(plain, managed)
    assert_same(plain, within)
    assert counts == expected
    assert counts[-1][0] > 0
    assert all(planned for _, _, planned in counts)
    assert not living()


@pytest.mark.parametrize("outside", [False, True])
def test_whole_step_is_within_the_budget(outside, applied):
    """Told by the allocator, planned steps fit from the call of the model to the end of the backward pass, and so do
    those whose loss is computed outside of the model, where nobody sees it."""
    model, wide, labels = WithLoss(), torch.randn(64, 512), torch.zeros(ROWS, dtype=torch.long)

    def run() -> None:
        x = small_batch(0, rows=ROWS)
        loss = torch.nn.functional.cross_entropy(model.body(x) @ wide, labels) if outside else model(x)
        loss.backward()

    run()  # allocates the gradients
    standing = sum(parameter.nbytes for parameter in model.parameters()) * 2
    plain = peak_bytes(run)
    budget = standing + int(0.8 * plain)
    applied(model.body if outside else model, memory_budget=budget)
    session = rekindle.session_of(model.body if outside else model)
    peaks = [peak_bytes(run) for _ in range(5)]
    assert session.last_step.departures == 0
    assert session.last_step.ops_replayed > 0
    assert max(peaks[2:]) <= budget - standing


def test_statistics_are_of_the_whole_step(applied):
    """`last_step.peak_nbytes` is that of forward and backward: as in a session around both."""
    session = rekindle.Session(rekindle.PerModule(Layer))
    model, twin = WithLoss(), WithLoss()
    applied(twin, rekindle.PerModule(Layer))
    for number in range(3):
        own_loss(model, number, session)
        own_loss(twin, number, nullcontext())
    stats = rekindle.session_of(twin).last_step
    seed = 4  # bytes: the gradient of the loss itself is made before the backward pass begins
    same = replace(session.last_step, replay_seconds=stats.replay_seconds, peak_nbytes=stats.peak_nbytes + seed)
    assert replace(stats, peak_nbytes=stats.peak_nbytes + seed) == same
    assert 0 <= session.last_step.peak_nbytes - stats.peak_nbytes <= seed


def twins(apply) -> tuple[nn.Module, nn.Module]:
    """A plain model without dropout, and a managed one of the same weights."""
    plain, managed = WithLoss().eval(), WithLoss().eval()
    managed.load_state_dict(plain.state_dict())
    return plain, apply(managed, rekindle.KeepNone())


def ends(model: nn.Module) -> bool:
    """Whether the step of an applied model is over."""
    return rekindle.session_of(model)._stack is None


def test_ends_with_its_backward_pass(applied):
    """A step waits for its backward pass, and nothing is left of it afterwards: no mode, and PyTorch's own engine."""
    model = applied(WithLoss(), rekindle.KeepNone())
    loss = model(small_batch(0))
    assert not ends(model)
    assert modes() == 0
    loss.backward()
    assert ends(model)
    assert torch.autograd._engine_run_backward is engine


def test_two_backward_passes(applied):
    """With `retain_graph=True` the step goes on to the next backward pass. Both are exact."""

    def twice(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model(small_batch(number, rows=ROWS))
        loss.backward(retain_graph=True)
        if model in _api._applied:
            assert not ends(model)
        loss.backward()
        if model in _api._applied:
            assert ends(model)
        return loss.detach()

    budget = budget_of(0.4)
    managed = train(lambda: applied(WithLoss(), memory_budget=budget), twice, steps=4)
    assert_same(train(WithLoss, twice, steps=4), managed)


def test_somebody_elses_backward_pass(applied):
    """A backward pass between that does not come by what the model made is no part of its step: it does not end it, and
    its gradients do not count."""
    model, other = applied(WithLoss(), rekindle.KeepNone()), small_model(1)
    loss = model(small_batch(0))
    live = rekindle.session_of(model).live_nbytes
    other(small_batch(1)).sum().backward()
    assert not ends(model)
    assert rekindle.session_of(model).live_nbytes == live
    loss.backward()
    assert ends(model)


def test_other_modules_between(applied):
    """What other modules have that are called while a step waits is none of its own."""
    model, other = applied(WithLoss(), memory_budget="1GiB"), small_model(1)
    session = rekindle.session_of(model)
    for number in range(4):
        loss = model(small_batch(number, rows=ROWS))
        standing = session._ledger.standing_nbytes
        with torch.no_grad():
            other(small_batch(number))
        assert session._ledger.standing_nbytes == standing
        loss.backward()
        model.zero_grad()
    assert session.last_step.rested


def test_forward_without_gradients_between(applied):
    """A forward under `no_grad` between forward and backward, such as that of a reference in preference training, takes
    no part in the step, which is planned all the same."""

    def step(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model(small_batch(number, rows=ROWS))
        with torch.no_grad():
            reference = model(small_batch(number + 1, rows=ROWS))
        (loss * (1 + reference)).backward()
        return loss.detach()

    managed, budget = [], budget_of(0.4)

    def make() -> nn.Module:
        managed.append(applied(WithLoss(), memory_budget=budget))
        return managed[0]

    assert_same(train(WithLoss, step, steps=4), train(make, step, steps=4))
    session = rekindle.session_of(managed[0])
    assert (session.stats.steps, session.last_step.departures) == (4, 0)
    assert session.last_step.ops_replayed > 0
    assert session.plan is not None


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("together", [False, True])
def test_gradient_accumulation(together, within, applied):
    """Three forwards, with a backward pass after each or all of them at the end: each forward is a step."""

    def accumulate(model: nn.Module, number: int, _: object) -> Tensor:
        losses = []
        for part in range(3):
            losses.append(model(small_batch(3 * number + part, rows=ROWS)))
            if not together:
                losses[-1].backward()
        if together:
            sum(losses).backward()
        return torch.stack(losses).detach()

    managed = []
    options = {"memory_budget": (4 if together else 1) * budget_of(0.4)} if within else {"policy": rekindle.KeepNone()}

    def make() -> nn.Module:
        managed.append(applied(WithLoss(), **options))
        return managed[0]

    assert_same(train(WithLoss, accumulate), train(make, accumulate))
    assert rekindle.session_of(managed[0]).stats.steps == 9
    assert not living()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_in_the_backward_pass(error, applied, counting):
    """An error of a hook ends the step. The user sees it and no other; the next step is managed and exact."""

    def fail(_: Tensor) -> None:
        raise error("mine")

    plain, managed = twins(applied)
    hook = managed.body[1].register_full_backward_hook(lambda *_: fail(torch.empty(0)))
    with pytest.raises(error, match="mine"):
        managed(small_batch(0)).backward()
    hook.remove()
    assert ends(managed)
    assert modes() == 0
    assert torch.autograd._engine_run_backward is engine
    managed.zero_grad()
    for model in (plain, managed):
        model(small_batch(0)).backward()
    assert all(map(torch.equal, grads(plain), grads(managed)))
    assert rekindle.session_of(managed).last_step.ops_replayed > 0


@pytest.mark.parametrize("options", [{"policy": rekindle.KeepNone()}, {"memory_budget": "2MiB"}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_called_again_in_the_backward_pass(reentrant, options, applied):
    """`torch.utils.checkpoint` around an applied model calls it again in the backward pass: no step of its own."""

    def step(model: nn.Module, number: int, _: object) -> Tensor:
        x = small_batch(number, rows=ROWS).requires_grad_()
        loss = checkpoint(model, x, use_reentrant=reentrant)
        loss.backward()
        return loss.detach()

    assert_same(train(WithLoss, step), train(lambda: applied(WithLoss(), **options), step))
    assert modes() == 0


def test_remove_in_the_backward_pass(applied, counting):
    """A hook that removes the model ends nothing that still runs: the pass is exact, and no mode is left."""
    plain, managed = twins(applied)
    managed.body[1].register_full_backward_hook(lambda *_: rekindle.remove(managed) and None)
    for model in (plain, managed):
        model(small_batch(0)).backward()
    assert all(map(torch.equal, grads(plain), grads(managed)))
    assert global_hooks() == 0
    assert modes() == 0
    assert torch.autograd._engine_run_backward is engine
    assert not living()


def test_backward_pass_on_another_thread(applied, counting):
    """A backward pass that another thread runs is exact; the step ends with the next forward."""
    plain, managed = twins(applied)
    for _ in range(2):
        for model in (plain, managed):
            thread = threading.Thread(target=model(small_batch(0)).backward)
            thread.start()
            thread.join()
    assert all(map(torch.equal, grads(plain), grads(managed)))
    assert rekindle.session_of(managed).stats.steps == 2
    assert not ends(managed)
    rekindle.remove(managed)
    assert torch.autograd._engine_run_backward is engine
    assert not living()


def test_forward_on_another_thread_meanwhile(applied):
    """While the backward pass runs, a forward of another thread is a plain one, and exact."""
    model = twins(applied)[1]
    expected = model(small_batch(1)).detach()
    results = []

    def elsewhere(*_: object) -> None:
        thread = threading.Thread(target=lambda: results.append(model(small_batch(1)).detach()))
        thread.start()
        thread.join()

    hook = model.body[1].register_full_backward_hook(elsewhere)
    model(small_batch(0)).backward()
    hook.remove()
    assert same_bits(expected, results[0])
    assert rekindle.session_of(model).stats.steps == 2
    assert ends(model)


def test_model_is_gone_before_its_backward_pass(counting):
    """A step that waits keeps neither its model nor, after that, its session. The backward pass is exact without."""
    plain, model = twins(rekindle.apply)
    parameters, loss = list(model.parameters()), model(small_batch(0))
    gone, session = weakref.ref(model), weakref.ref(rekindle.session_of(model))
    del model
    assert gone() is None
    assert torch.autograd._engine_run_backward is engine
    loss.backward()
    plain(small_batch(0)).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), parameters, strict=True))
    del loss
    assert not living()
    gc.collect()
    assert session() is None


def test_one_backward_pass_of_two_models(applied):
    """Two applied models under budgets, one feeding the other: one backward pass ends both steps, which are planned."""

    def make() -> nn.Module:
        return nn.ModuleList([small_model(3), WithLoss(3)])

    def both(model: nn.Module, number: int, _: object) -> Tensor:
        loss = model[1](model[0](small_batch(number, rows=ROWS)).tanh())
        loss.backward()
        return loss.detach()

    budget = int(1.5 * budget_of(0.4))

    def make_applied() -> nn.Module:
        models = make()
        for model in models:
            applied(model, memory_budget=budget)
        sessions.extend(map(rekindle.session_of, models))
        return models

    sessions: list[rekindle.Session] = []
    assert_same(train(make, both, steps=4), train(make_applied, both, steps=4))
    assert [session.stats.steps for session in sessions] == [4, 4]
    assert all(session.plan is not None for session in sessions)
    assert all(session._stack is None for session in sessions)


def test_double_backward(applied):
    """A gradient penalty: the first backward pass makes a graph, and the step lasts until the second."""

    def penalised(model: nn.Module, number: int, _: object) -> Tensor:
        x = small_batch(number, rows=ROWS).requires_grad_()
        loss = model(x)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()
        return loss.detach()

    budget = 3 * budget_of(0.9)
    managed = train(lambda: applied(WithLoss(), memory_budget=budget), penalised, steps=4)
    assert_same(train(WithLoss, penalised, steps=4), managed)
    assert_same(train(WithLoss, penalised), train(lambda: applied(WithLoss(), rekindle.PerModule(Layer)), penalised))
